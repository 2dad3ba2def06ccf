"""`steermoe trace`: prompts, answers and pairs under their steering, its options and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import RoutingCounts, load_pairs, save_pairs
from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path
from tests.support.held import HELD, hold, patience
from tests.support.near_ties import near_ties_of_pairs
from tests.support.traces import arrays_of, counts_of

PROMPT, ANSWER = 0, 2  # phases
F32 = ("-ctk", "f32", "-ctv", "f32", "-fa", "off")


def run(*words: Any, **options: Any) -> Result:
    return CliRunner().invoke(main, ["trace", "-m", "tiny", "-t", "1", *map(str, words)], **options)


def done(*words: Any, **options: Any) -> Result:
    result = run(*words, **options)
    assert result.exit_code == 0, result.output
    return result


def tokens_of(arrays: dict[str, Any]) -> list[str]:
    names = dict(zip(arrays["vocabulary"].tolist(), arrays["vocabulary_texts"].tolist(), strict=True))
    return [names[token] for token in arrays["tokens"].tolist()]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    lines = behaviour("digits-words").heldout.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:21]), "utf-8")
    return path


def test_a_prompt_and_its_answer(tmp_path: Path) -> None:
    out = tmp_path / "t.npz"
    asked = ("-p", "What is three plus four?", "--temp", "0")
    result = done(*asked, "-n", "8", "-o", out, "--json")
    facts = json.loads(result.stdout)
    said = CliRunner().invoke(main, ["run", "-m", "tiny", "-t", "1", *asked, "-n", "8", "--json"])
    usage = json.loads(said.stdout)["usage"]
    arrays = arrays_of(out)
    # "7" and then the end of the generation, which is drawn where "7" is read
    assert facts["n_tokens"] == usage["total_tokens"] == len(arrays["tokens"])
    assert facts["n_answered"] == usage["completion_tokens"]
    assert facts["bytes"] == out.stat().st_size
    assert arrays["phases"].tolist() == [PROMPT] * usage["prompt_tokens"] + [ANSWER] * usage["completion_tokens"]
    assert "".join(np.array(tokens_of(arrays))[arrays["phases"] == ANSWER]) == json.loads(said.stdout)["text"]
    assert (arrays["rules"] == -1).all()
    assert arrays["positions"].tolist() == list(range(facts["n_tokens"]))
    plain = tmp_path / "plain.npz"
    done(*asked[:2], "-o", plain)
    alone = arrays_of(plain)
    assert len(alone["tokens"]) == usage["prompt_tokens"]
    assert str(out) in result.stderr
    assert "at most" in result.stderr


def test_an_answer_is_read_under_what_steered_it(tmp_path: Path) -> None:
    """A token of the answer is steered where it is drawn; with a condition it is what the generation decided."""
    out = tmp_path / "t.npz"
    rules = ("answer[0:1]: digits-words +2 -2 reverse", "answer when entropy > 0.001: digits-words +2 -2")
    steer = [word for rule in rules for word in ("--steer", rule)]
    facts = json.loads(
        done("-p", "Count from one to five.", "--temp", "0", "-n", "6", *steer, "-o", out, "--json").stdout
    )
    arrays = arrays_of(out)
    answer = arrays["phases"] == ANSWER
    assert facts["n_answered"] == 6
    assert answer.sum() == 5, "the last token was drawn and never read"
    n_prompt = int((~answer).sum())
    assert (arrays["rules"][: n_prompt - 1] == -1).all()
    assert arrays["rules"][n_prompt - 1] == 0
    assert set(arrays["rules"][answer].tolist()) <= {-1, 1}
    assert 1 in arrays["rules"]
    chosen = json.loads(str(arrays["meta"]))["steering"]["rules"]
    assert [rule["map"] for rule in chosen] == ["digits-words"] * 2
    signs: dict[int, Any] = {}
    for number, reverse in ((0, True), (1, False)):
        words = ["bias", "build", str(map_path("digits-words")), "--activate", "2", "--deactivate", "2"]
        path = tmp_path / f"{number}.gguf"
        made = CliRunner().invoke(main, [*words, *(["--reverse"] if reverse else []), "-o", str(path)])
        assert made.exit_code == 0, made.output
        from steermoe_local import read_bias

        signs[number] = read_bias(path).values
    for index in np.flatnonzero(arrays["rules"] >= 0):
        for layer, row in signs[int(arrays["rules"][index])].items():
            selected = arrays["experts"][index, layer]
            assert set(np.flatnonzero(row > 0)) <= set(selected.tolist())
            assert not set(np.flatnonzero(row < 0)) & set(selected.tolist())


def test_many_prompts(tmp_path: Path, questions: Path) -> None:
    """In their order, with and without answers, however many at once."""
    expected = [json.loads(line)["id"] for line in questions.read_text("utf-8").splitlines()]
    found = []
    for number, words in enumerate((("-n", "3", "-np", "1"), ("-n", "3", "-np", "2"), ())):
        out = tmp_path / f"{number}.npz"
        done("--prompts", questions, "--temp", "0", *words, *F32, "-o", out)
        arrays = arrays_of(out)
        assert arrays["ids"].tolist() == expected
        assert arrays["items"].tolist() == list(range(len(expected)))
        assert np.array_equal(np.flatnonzero(arrays["positions"] == 0), arrays["first"])
        found.append(arrays)
    assert np.array_equal(found[0]["tokens"], found[1]["tokens"])
    prompts = found[0]["phases"] == PROMPT
    assert np.array_equal(found[0]["tokens"][prompts], found[2]["tokens"])
    out = tmp_path / "stdin.csv"
    done("--prompts", "-", "--raw", "-o", out, input="one, two\nthree\n")
    assert out.read_text("utf-8").startswith("item,id,side,position,token,text,phase,target,rule,layer,expert_0,")


def test_counts_of_pairs_are_those_of_detect(tmp_path: Path, tiny_f32_path: Path) -> None:
    """On pairs of which rounding decides nothing: the last layer is computed for more tokens than detect needs."""
    pairs = load_pairs(behaviour("digits-words").pairs)[:24]
    untied = [pair for pair in pairs if not near_ties_of_pairs(tiny_f32_path, [pair])]
    assert len(untied) > 8
    save_pairs(untied, tmp_path / "pairs.jsonl")
    options = ["-m", str(tiny_f32_path), "-t", "1", "--pairs", str(tmp_path / "pairs.jsonl"), *F32]
    counted = ["detect", *options, "-o", str(tmp_path / "m.json"), "--counts", str(tmp_path / "c.npz")]
    for words in (counted, ["trace", *options, "-o", str(tmp_path / "t.npz")]):
        result = CliRunner().invoke(main, words)
        assert result.exit_code == 0, result.output
    counts, arrays = RoutingCounts.load(tmp_path / "c.npz"), arrays_of(tmp_path / "t.npz")
    sides = arrays["sides"][arrays["texts"]]
    n_expert = counts.identity.n_expert
    for side, a, n in ((1, counts.a1, counts.n1), (2, counts.a2, counts.n2)):
        wanted = arrays["targets"] & (sides == side)
        assert wanted.sum() == n
        assert np.array_equal(counts_of(arrays, wanted, n_expert), a)
    assert json.loads(str(arrays["meta"]))["pairs_sha256"] == counts.pairs_digest[0]


def test_pairs_that_cannot_be_traced(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    save_pairs(load_pairs(behaviour("digits-words").pairs)[:3], path)
    result = done("--pairs", path, "-c", "17", "-o", tmp_path / "t.npz", "--json")
    facts = json.loads(result.stdout)
    assert facts["n_texts"] + 2 * facts["n_skipped"] == 6
    result = run("--pairs", path, "-c", "4", "-o", tmp_path / "none.npz")
    assert result.exit_code == 1
    assert not (tmp_path / "none.npz").exists()
    assert result.stderr.count("skipped: pair") == 3
    assert result.stderr.splitlines()[-1].startswith(f"error: {path}: ")


def test_a_plan_that_steers_nothing_is_said(tmp_path: Path) -> None:
    result = done("-p", "x", "--steer", "answer: digits-words +2 -2", "-o", tmp_path / "t.npz")
    assert "warning: " in result.stderr
    rules = arrays_of(tmp_path / "t.npz")["rules"].tolist()
    assert rules == [-1] * (len(rules) - 1) + [0]
    assert "but its last token" in result.stderr
    for rule in ("answer when entropy < 99", "answer[1:]", "answer after x"):
        result = done("-p", "x", "--steer", f"{rule}: digits-words +2 -2", "-o", tmp_path / "t.npz")
        assert "nothing is steered" in result.stderr
        assert "last token" not in result.stderr
        assert (arrays_of(tmp_path / "t.npz")["rules"] == -1).all()
    looking = "answer when digits-words > -5 over prompt: digits-words +2 -2"
    result = done("-p", "x", "--steer", looking, "-o", tmp_path / "t.npz")
    assert result.stderr.count("warning: ") == 2
    assert (arrays_of(tmp_path / "t.npz")["rules"] == -1).all()
    done("-p", "x", "-n", "4", "--temp", "0", "--steer", looking, "-o", tmp_path / "t.npz")
    assert 0 in arrays_of(tmp_path / "t.npz")["rules"]
    pairs = tmp_path / "pairs.jsonl"
    save_pairs(load_pairs(behaviour("digits-words").pairs)[:3], pairs)
    result = done("--pairs", pairs, "--steer", "answer: digits-words +2 -2", "-o", tmp_path / "t.npz")
    assert "warning: " in result.stderr
    assert (arrays_of(tmp_path / "t.npz")["rules"] == -1).all()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ((), "-p TEXT"),
        (("-p", "x", "--pairs", "p.jsonl"), "give one"),
        (("-p", "  "), "no prompt"),
        (("--pairs", "p.jsonl", "-n", "4"), "-n: "),
        (("--pairs", "p.jsonl", "--raw"), "--raw: "),
        (("--pairs", "p.jsonl", "-sys", "x"), "-sys: "),
        (("-p", "x", "--raw", "-sys", "y"), "--raw"),
        (("-p", "x", "--raw", "--date", "2025-01-01"), "--date"),
        (("-p", "x", "-n", "-2"), "'-n'"),
        (("-p", "x", "-n", "9" * 30, "-c", "4"), "raise -c"),
        (("-p", "x", "-n", "2", "-c", "99999999999"), "memory"),
        (("-p", "x", "-n", "2", "-c", "99999999999", "--no-memory-check"), "n_ctx"),
        (("-p", "one two three four five six", "-c", "3"), "raise -c"),
        (("-p", "x", "--steer", "answer: nowhere +1 -1"), "nowhere"),
        (("-p", "x", "--map", "digits-words", "--layers", "99"), "99"),
    ],
    ids=" ".join,
)
def test_what_is_refused(words: tuple[str, ...], names: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*words, "-o", "t.npz")
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    error = result.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert names in error
    assert os.listdir(tmp_path) == []


def test_a_huge_n_ends_with_the_context(tmp_path: Path) -> None:
    """As `run -n`: it is a limit, and the context is another."""
    result = done("-p", "Count.", "--raw", "-n", "9" * 30, "-c", "24", "--temp", "0", "-o", tmp_path / "t.npz")
    assert len(arrays_of(tmp_path / "t.npz")["tokens"]) <= 24
    assert "at most 2" in result.stderr


def test_other_settings_of_n_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STEERMOE_PREDICT is a limit of other commands; it must not make this one answer."""
    monkeypatch.setenv("STEERMOE_PREDICT", "5")
    result = done("-p", "one", "-o", tmp_path / "t.npz", "--json")
    assert json.loads(result.stdout)["n_answered"] == 0


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_interrupted(end: signal.Signals, tmp_path: Path, questions: Path) -> None:
    """Nothing is left under the output's name; what a killed process left is removed by the next."""
    out = tmp_path / "t.npz"
    out.write_bytes(b"old")
    words = ["trace", "-m", "tiny", "-t", "1", "--prompts", questions, "-n", "3", "-np", "1", "--temp", "0", "-o", out]
    words += ["-b", "64"]  # a part is written before the held answers come
    with subprocess.Popen(
        [*HELD, *map(str, words)], env=os.environ | hold(answers=12), stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        try:
            patience(process, lambda: list(tmp_path.glob(f".{out.name}.*.tmp")))
            process.send_signal(end)
            _, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == (130 if end == signal.SIGINT else -signal.SIGKILL)
    assert b"Traceback" not in stderr
    assert out.read_bytes() == b"old"
    if end == signal.SIGINT:
        assert not list(tmp_path.glob(".*"))
    done(*words[5:])
    assert not list(tmp_path.glob(".*"))
    assert len(arrays_of(out)["items"]) == 21
