"""`steermoe run` under plans: what is answered, what is told of it, and files of prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local import open_plan
from steermoe_local.cli import main
from tests.support.chat_program import COUNT, DIGITS_ANSWER, WORDS_ANSWER

RUN = ("run", "-m", "tiny", "-t", "1", "--temp", "0")
WORDS = ("--steer", "thinking: none", "--steer", "answer: digits-words reverse")
PROMPTS = [COUNT, "Which number comes after three?", "Add four and six.", "Which number comes after nine?"]


def start(*words: Any) -> Result:
    done = CliRunner().invoke(main, [*RUN, *map(str, words)])
    assert done.exit_code == 0, done.output
    return done


def answered(*words: Any, prompt: str = COUNT) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(start("-p", prompt, "--json", *words).stdout)
    return data


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))
    return path


def test_what_is_told_of_a_plan() -> None:
    data = answered(*WORDS)
    assert data["text"] == WORDS_ANSWER
    steering = data["steering"]
    plan = open_plan([WORDS[1], WORDS[3]])
    assert steering["plan_sha256"] == plan.sha256
    assert [rule["text"] for rule in steering["rules"]] == plan.texts
    assert (steering["rules"][1]["steering"]["side"], steering["rules"][0]["steering"]) == ("words", None)
    assert steering["n_steered"] == data["usage"]["completion_tokens"]


@pytest.mark.parametrize(
    ("rule", "n_steered"),
    [("answer[0:4]", 4), ("answer[2:4]", 2), ("thinking", 0), ("answer every 100", 1), ("answer[500:]", 0)],
)
def test_how_many_tokens_were_steered(rule: str, n_steered: int) -> None:
    data = answered("--steer", f"{rule}: digits-words reverse")
    assert data["steering"]["n_steered"] == n_steered
    assert not n_steered or data["usage"]["completion_tokens"] > n_steered
    if not n_steered:
        assert data["text"] == answered()["text"]


def test_a_rule_of_all_tokens_is_a_map() -> None:
    by_map = answered("--map", "digits-words", "--activate", 3, "--deactivate", 1, "--reverse")
    by_rule = answered("--steer", "all: digits-words +3 -1 reverse")
    assert (by_rule["text"], by_rule["usage"]) == (by_map["text"], by_map["usage"])
    assert by_rule["steering"]["rules"][0]["steering"]["map_sha256"] == by_map["steering"]["map_sha256"]


def test_both_answers_of_a_comparison() -> None:
    shown = start("-p", COUNT, "--compare", *WORDS).stdout
    assert shown == f"== unsteered\n{DIGITS_ANSWER}\n\n== steered: {WORDS[1]}; {WORDS[3]}\n{WORDS_ANSWER}\n"
    data = answered("--compare", *WORDS)
    assert (data["unsteered"]["text"], data["steered"]["text"]) == (DIGITS_ANSWER, WORDS_ANSWER)
    assert data["steering"]["n_steered"] == data["steered"]["usage"]["completion_tokens"]


def test_a_condition_on_the_prompt() -> None:
    """The map's lean of the prompt decides, and nothing else: one of two opposite conditions holds."""
    texts = {}
    for sign in "<>":
        rule = f"answer when digits-words {sign} 0.5 over prompt: digits-words reverse"
        data = answered("--steer", rule)
        texts[sign] = (data["text"], data["steering"]["n_steered"] > 0)
    assert sorted(texts.values()) == [(DIGITS_ANSWER, False), (WORDS_ANSWER, True)]


def test_files_of_prompts(prompts: Path, tmp_path: Path) -> None:
    """Each answer is that of its prompt alone, however many are decoded at once, and tells the rules."""
    flags = (*WORDS, "--steer", "prompt: document-memory +1 -1")
    alone = [answered(*flags, prompt=prompt) for prompt in PROMPTS]
    for n in (1, 3):
        lines = start("--n-prompts", prompts, "-np", n, *flags).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        assert [record["text"] for record in records] == [answer["text"] for answer in alone]
        for record, answer in zip(records, alone, strict=True):
            steering = record["steering"]
            assert steering["rules"] == [*WORDS[1::2], "prompt: document-memory +1 -1"]
            assert steering["plan_sha256"] == answer["steering"]["plan_sha256"]
            assert steering["n_steered"] == answer["steering"]["n_steered"]


def test_an_interrupted_run_goes_on_under_the_same_plan(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steermoe_local.generation.answer_file import AnswerFile

    output = tmp_path / "out.jsonl"
    words = ("--n-prompts", str(prompts), "-np", "1", "-o", str(output))
    add, n = AnswerFile.add, 0

    def interrupted(self: AnswerFile, record: Any) -> None:
        nonlocal n
        n += 1
        if n > 2:
            raise KeyboardInterrupt
        add(self, record)

    monkeypatch.setattr(AnswerFile, "add", interrupted)
    assert CliRunner().invoke(main, [*RUN, *words, *WORDS]).exit_code == 130
    monkeypatch.undo()
    other = CliRunner().invoke(main, [*RUN, *words, "--steer", "answer: digits-words reverse", "--resume"])
    assert other.exit_code == 2, other.output
    assert "steering" in other.stderr
    start(*words, *WORDS, "--resume")
    records = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    assert [record["id"] for record in records] == list(range(len(PROMPTS)))
    assert records[0]["text"] == WORDS_ANSWER
