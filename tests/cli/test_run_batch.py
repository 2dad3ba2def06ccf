"""`steermoe run --n-prompts`: many prompts at once, in order, whatever interrupts it."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.cli.run.batch import _in_order
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.models.embedded import behaviours, score_reply
from tests.support.announced import untimed
from tests.support.gguf_copy import copy_model
from tests.support.held import hold, patience
from tests.support.run_models import ASK, QUESTION, invoke, start, talker

TINY = ("-m", "tiny", *ASK)
HELDOUT = behaviours()[0].heldout


@pytest.fixture(scope="module")
def endless(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return talker(tmp_path_factory.mktemp("endless"), tiny_path)


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Ten held-out questions; their lengths differ."""
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(HELDOUT.read_text("utf-8").splitlines(keepends=True)[:10]), "utf-8")
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def answers(*arguments: Any, **kwargs: Any) -> list[dict[str, Any]]:
    done = invoke(*arguments, **kwargs)
    assert done.exit_code == 0, done.output
    (announced,) = untimed(done.stderr)
    assert announced.startswith("run: ")
    return lines(done.stdout)


def sides_of(got: list[dict[str, Any]]) -> list[str]:
    """Which side each answer shows, by the rules of the embedded model's data; the reference answers came along."""
    return [
        score_reply("digits-words", line["text"], line["extra"]["positive"], line["extra"]["negative"])[0]
        for line in got
    ]


#
# what comes
#


def test_every_prompt_gets_its_line(questions: Path) -> None:
    asked = lines(questions.read_text("utf-8"))
    got = answers(*TINY, "--n-prompts", questions, "--map", "digits-words")
    assert [line["id"] for line in got] == [line["id"] for line in asked]
    assert [line["extra"] for line in got] == [{key: line[key] for key in ("positive", "negative")} for line in asked]
    assert sides_of(got) == ["positive"] * 10
    assert {line["finish_reason"] for line in got} == {"stop"}
    assert got[0]["steering"]["name"] == "digits-words"
    words = answers(*TINY, "--n-prompts", questions, "--map", "digits-words", "--reverse")
    assert sides_of(words) == ["negative"] * 10


def test_alone_or_in_company(questions: Path) -> None:
    """However many are decoded at once, and through the command for one prompt, the answer is the same."""
    base = answers(*TINY, "--n-prompts", questions, "-np", 1)
    for parallel in (3, 16):
        assert answers(*TINY, "--n-prompts", questions, "-np", parallel) == base
    for line, asked in list(zip(base, lines(questions.read_text("utf-8")), strict=True))[:3]:
        one = json.loads(invoke(*TINY, "--json", "-p", asked["messages"][0]["content"]).stdout)
        assert {key: one[key] for key in ("text", "usage", "finish_reason", "seed")} == {
            key: line[key] for key in ("text", "usage", "finish_reason", "seed")
        }


def test_a_seed_holds_for_each_prompt(endless: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("one two\none two\n")
    ask = ("-m", endless, "-t", 1, "--temp", 1, "-n", 8, "--n-prompts", tmp_path / "q.txt", "-np", 1)
    first, second = answers(*ask, "-s", 5)
    assert first["text"] == second["text"]
    assert first["text"] == json.loads(invoke(*ask[:8], "-s", 5, "-p", "one two", "--json").stdout)["text"]
    first, second = answers(*ask)
    assert first["seed"] != second["seed"]


def test_lines_of_text_and_stdin(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text(f"{QUESTION}\n\n{QUESTION}\n")
    got = answers(*TINY, "--prompts", tmp_path / "q.txt")
    assert [(line["id"], line["text"]) for line in got] == [("line-1", "4"), ("line-3", "4")]
    assert answers(*TINY, "--n-prompts", "-", input=f"{QUESTION}\n\n{QUESTION}\n") == got
    # what is piped in is no part of prompts from a file
    assert answers(*TINY, "--n-prompts", tmp_path / "q.txt", input="noise") == got


def test_both_sides_of_every_prompt(questions: Path) -> None:
    ask = (*TINY, "--n-prompts", questions, "--map", "digits-words", "--reverse")
    both, steered, without = (
        answers(*ask, "--compare", "-np", 2),
        answers(*ask),
        answers(*TINY, "--n-prompts", questions),
    )
    for line, one, other in zip(both, steered, without, strict=True):
        assert list(line) == ["id", "extra", "unsteered", "steered", "steering"]
        assert line["steered"] == {key: one[key] for key in line["steered"]}
        assert line["unsteered"] == {key: other[key] for key in line["unsteered"]}


def test_a_message_of_the_assistant_at_the_end_is_continued(tmp_path: Path) -> None:
    asked = {"role": "user", "content": "Please count starting at eleven until fifteen."}
    (whole,) = answers(*TINY, "--n-prompts", "-", input=json.dumps({"messages": [asked]}))
    first, blank, rest = whole["text"].partition(" ")
    assert rest
    begun = {"messages": [asked, {"role": "assistant", "content": first}]}
    (line,) = answers(*TINY, "--n-prompts", "-", input=json.dumps(begun))
    assert line["text"] == blank + rest


def test_system_messages(endless: Path, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"prompt": "one"}\n{"prompt": "one", "system": "two two two two"}\n'
        '{"messages": [{"role": "system", "content": "two two two two"}, {"role": "user", "content": "one"}]}\n'
    )
    ask = ("-m", endless, *ASK, "-n", 1, "--n-prompts", tmp_path / "q.jsonl")
    plain, own, message = (line["usage"]["prompt_tokens"] for line in answers(*ask))
    assert plain < own == message
    assert {line["usage"]["prompt_tokens"] for line in answers(*ask, "-sys", "two two two two")} == {own}


def test_raw_prompts(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("one, two, three\n")
    got = answers(*TINY, "--raw", "-n", 3, "--n-prompts", tmp_path / "q.txt")
    one = invoke(*TINY, "--raw", "-n", 3, "-p", "one, two, three")
    assert got[0]["text"] + "\n" == one.stdout


#
# what is reported before the model is loaded
#


@pytest.mark.parametrize(
    ("text", "flags", "status", "words"),
    [
        ('{"prompt": "x"}\n{"promt": "y"}\n', (), 1, ":2: neither prompt nor messages"),
        ('{"prompt": "x", "id": 1}\n\n{"prompt": "y", "id": 1}\n', (), 1, ":3: id: 1 is already the id of line 1"),
        ("\n", (), 1, ": no prompts in it"),
        ('{"prompt": "x"}\n{"prompt": "' + "long " * 600 + '"}\n', (), 2, ":2: a prompt of "),
        ('{"prompt": "x"}\n{"prompt": "' + "long " * 40 + '"}\n', ("-c", 64), 2, "the context has 64; raise -c"),
        (
            '{"prompt": "x"}\n{"messages": [{"role": "user", "content": "y"}]}',
            ("--raw",),
            2,
            ":2: messages: --raw uses",
        ),
        ('{"prompt": "x", "system": "y"}', ("--raw",), 2, ":1: system: --raw uses no chat template"),
    ],
)
def test_the_whole_file_is_checked_first(
    text: str, flags: Sequence[Any], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "steermoe_local.llama.steered_llama.SteeredLlama.__init__", lambda *_, **__: pytest.fail("it was loaded")
    )
    path, out = tmp_path / "q.jsonl", tmp_path / "out.jsonl"
    path.write_text(text)
    done = invoke(*TINY, "--n-prompts", path, "-o", out, *flags)
    assert done.exit_code == status, done.output
    assert done.stderr.startswith(f"error: {path}")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1
    assert [found.name for found in tmp_path.iterdir()] == ["q.jsonl"]


def test_what_the_template_refuses(tiny_path: Path, tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system message') }}{% endif %}x"
    (model,) = copy_model(tiny_path, tmp_path / "strict.gguf", template=template)
    (bare,) = copy_model(tiny_path, tmp_path / "bare.gguf", template="")
    path = tmp_path / "q.jsonl"
    path.write_text('{"prompt": "x"}\n{"prompt": "x", "system": "y"}\n')
    done = invoke("-m", model, *ASK, "--n-prompts", path)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: {path}:2: ")
    assert "no system message" in done.stderr
    done = invoke("-m", bare, *ASK, "--n-prompts", path)
    assert done.exit_code == 2
    assert f"{path}:2: system: {bare} has no chat template" in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--resume", "--restart", "-o", "o"), "--resume and --restart exclude each other"),
        (("--resume",), "name it with -o OUTPUT"),
        (("--restart",), "name it with -o OUTPUT"),
        (("-o", "no/such/folder"), "create it first"),
        (("-np", 0), "-np"),
        (("-np", 257), "-np"),
    ],
)
def test_options_that_do_not_fit(flags: Sequence[Any], words: str, questions: Path) -> None:
    done = invoke(*TINY, "--n-prompts", questions, *flags)
    assert done.exit_code == 2
    assert words in done.stderr


def test_a_short_context_is_made_for_short_answers(endless: Path, tmp_path: Path) -> None:
    """With -n known, a prompt's place in memory is no longer than it needs, at most what the model was trained with."""
    (tmp_path / "q.txt").write_text("one\n" + "two " * 100 + "\n")
    long = answers("-m", endless, *ASK, "-n", 8, "--n-prompts", tmp_path / "q.txt")
    assert [line["finish_reason"] for line in long] == ["length", "length"]
    assert [line["usage"]["completion_tokens"] for line in long] == [8, 8]


#
# an output file
#


def test_the_output_file(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    ask = (*TINY, "--n-prompts", questions)
    done = invoke(*ask, "-o", out)
    assert done.exit_code == 0
    assert lines(out.read_text("utf-8")) == answers(*ask)
    assert done.stdout.splitlines()[-1] == f"written: {out}"
    assert done.stdout.startswith("10 prompts answered, ")
    summary = json.loads(invoke(*ask, "-o", out, "--json").stdout)
    assert (summary["output"], summary["n_prompts"], summary["n_answered"]) == (str(out), 10, 10)
    assert summary["completion_tokens"] == sum(line["usage"]["completion_tokens"] for line in answers(*ask))
    assert not AnswerFile(out).exists()


@pytest.fixture
def interrupted(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, tuple[Any, ...]]:
    """A run that Ctrl-C ended behind its fourth answer: its output and command."""
    out = tmp_path / "out.jsonl"
    ask = (*TINY, "--n-prompts", questions, "-o", out)
    real = AnswerFile.add
    seen: list[Any] = []

    def add(self: AnswerFile, record: Any) -> None:
        real(self, record)
        seen.append(record)
        if len(seen) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", add)
        done = invoke(*ask)
    assert done.exit_code == 130
    announced, kept, error = done.stderr.splitlines()
    assert announced.startswith("run: 10 answers of at most ")
    assert kept.startswith("4 of 10 answers")
    assert "--resume" in kept
    assert error == "error: interrupted"
    assert not out.exists()
    return out, ask


def test_an_interrupted_run_goes_on(interrupted: tuple[Path, tuple[Any, ...]], questions: Path) -> None:
    out, ask = interrupted
    again = invoke(*ask)
    assert again.exit_code == 2
    for value in (f"{out}.partial: ", "--resume", "--restart"):
        assert value in again.stderr
    done = invoke(*ask, "--resume")
    assert done.stdout.startswith("6 prompts answered, ")
    assert lines(out.read_text("utf-8")) == answers(*TINY, "--n-prompts", questions)
    assert not Path(f"{out}.partial").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--map", "digits-words"), "begun with steering null"),
        (("-n", 5), "begun with n_predict null, now it is 5"),
        (("-s", 5), "begun with sampling"),
        (("-sys", "x"), 'begun with system null, now it is "x"'),
        (("--raw",), "messages: --raw"),
        (("--stop", "x"), "begun with stop []"),
        (("--chat-template-kwargs", '{"a": 1}'), "begun with template_arguments"),
        (("-c", 300), "begun with n_ctx"),
    ],
)
def test_other_options_do_not_go_on(interrupted: tuple[Path, tuple[Any, ...]], more: Sequence[Any], words: str) -> None:
    out, ask = interrupted
    before = Path(f"{out}.partial").read_bytes()
    done = invoke(*ask, *more, "--resume")
    assert done.exit_code == 2
    assert words in done.stderr
    assert Path(f"{out}.partial").read_bytes() == before


def test_other_prompts_or_another_model_do_not_go_on(
    interrupted: tuple[Path, tuple[Any, ...]], questions: Path, endless: Path
) -> None:
    out, ask = interrupted
    assert "begun with model" in invoke("-m", endless, *ask[2:], "-c", 1024, "--resume").stderr
    questions.write_text(questions.read_text("utf-8").replace("Add", "Sum"), "utf-8")
    assert "begun with prompts" in invoke(*ask, "--resume").stderr
    done = invoke(*ask, "--restart")
    assert done.exit_code == 0
    assert len(lines(out.read_text("utf-8"))) == 10


def test_all_done_but_the_last_step(interrupted: tuple[Path, tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Then no model is needed."""
    out, ask = interrupted
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert invoke(*ask, "--resume").exit_code == 130
    monkeypatch.setattr(
        "steermoe_local.llama.steered_llama.SteeredLlama.__init__", lambda *_, **__: pytest.fail("it was loaded")
    )
    done = invoke(*ask, "--resume")
    assert done.exit_code == 0, done.output
    assert len(lines(out.read_text("utf-8"))) == 10


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_program_is_stopped(how: signal.Signals, endless: Path, tmp_path: Path) -> None:
    questions, out = tmp_path / "q.txt", tmp_path / "out.jsonl"
    questions.write_text("".join(f"one {n}\n" for n in range(100)))
    ask = ("-m", endless, *ASK, "-n", 30, "--n-prompts", questions, "-o", out)
    partial = Path(f"{out}.partial")
    with start(*ask, held=hold(answers=10)) as process:
        patience(process, lambda: partial.exists() and partial.read_bytes().count(b"\n") >= 4)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -9)
    n_kept = partial.read_bytes().count(b"\n") - 1
    assert 3 <= n_kept < 100
    if how == signal.SIGINT:
        announced, kept, error = untimed(err.decode())
        assert announced.startswith("run: 100 answers of at most 30 tokens")
        assert kept.startswith(f"{n_kept} of 100 answers")
        assert error == "error: interrupted"
    done = invoke(*ask, "--resume")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(f"{100 - n_kept} prompts answered, ")
    assert [line["id"] for line in lines(out.read_text("utf-8"))] == [f"line-{n + 1}" for n in range(100)]


def test_a_reader_that_goes_away(endless: Path, tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("one two\n" * 200)
    closed = tmp_path / "closed"
    ask = ("-m", endless, *ASK, "-n", 40, "--n-prompts", tmp_path / "q.txt")
    with start(*ask, held=hold(answers=10, until=closed)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["id"] == "line-1"
        process.stdout.close()
        closed.touch()
        assert process.wait(timeout=60) == 1
        (announced,) = untimed(process.stderr.read().decode())
        assert announced.startswith("run: 200 answers of at most 40 tokens")


#
# its parts
#


@given(st.permutations(range(12)))
def test_in_order(order: list[int]) -> None:
    records = ((index, {"id": index}) for index in order)
    assert [record["id"] for record in _in_order(records)] == list(range(12))
