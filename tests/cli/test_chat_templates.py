"""Chat templates under every command: one that cannot be read, one without system messages, one with the date."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, Pair, RoutingCounts
from steermoe_local.cli import main
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.pairs.pairs import Message, save_pairs
from tests.support.templated import BROKEN, DATED, NO_SYSTEM, Models, models

ASK = ("-t", "1", "--temp", "0", "-n", "3")
ONE, TWO = "2024-02-29", "2025-12-01"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Models:
    return models(tmp_path_factory.mktemp("models"), tiny_path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pairs with a system message."""

    def side(reply: str) -> tuple[Message, ...]:
        return Message("system", "Be brief."), Message("user", "Count to two."), Message("assistant", reply)

    path = tmp_path / "pairs.jsonl"
    save_pairs([Pair(f"p{i}", side(f"{i}, 2"), side(f"{i}, two"), "2", "two") for i in range(3)], path)
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "prompt": f"Add {i} and 1.", "system": "Be brief."}) + "\n" for i in "12")
    )
    return path


def run(*arguments: Any, **options: Any) -> Result:
    result = CliRunner().invoke(main, list(map(str, arguments)), **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def ok(*arguments: Any, **options: Any) -> Result:
    result = run(*arguments, **options)
    assert result.exit_code == 0, result.output
    return result


#
# one that cannot be read
#


def test_a_template_that_cannot_be_read(model: Models, pairs: Path, prompts: Path, tmp_path: Path) -> None:
    """One line, wherever it is needed; texts are continued without it."""
    path = model(BROKEN)
    plain = tmp_path / "plain.jsonl"
    save_pairs([Pair("a", "one two", "1 2", "two", "2")], plain)
    for arguments in (
        ("detect", "--pairs", pairs, "-o", tmp_path / "m.json"),
        ("run", "-p", "Hi.", *ASK),
        ("run", "--n-prompts", prompts, *ASK),
        ("chat", *ASK),
        ("tasks", "check", "builtin:digits-words"),
        ("eval", "--map", "digits-words", "--n-items", 1, "-o", tmp_path / "results"),
    ):
        result = run(*arguments, "-m", path, input="Hi.\n")
        assert result.exit_code == 1, arguments
        assert result.stdout == "", arguments
        assert result.stderr.count("\n") == 1, (arguments, result.stderr)
        assert "chat template cannot" in result.stderr, arguments
    checked = run("pairs", "check", pairs, "-m", path, "--json")
    assert checked.exit_code == 1
    assert all("cannot be read" in problem["reason"] for problem in json.loads(checked.stdout)["problems"])
    assert "cannot be read" in ok("info", path).stdout
    assert ok("run", "-m", path, "--raw", "-p", "Hi.", *ASK).stdout
    ok("pairs", "check", plain, "-m", path)
    ok("detect", "-m", path, "--pairs", plain, "-o", tmp_path / "m.json", "-t", "1")


#
# one without system messages
#


def test_a_system_message_that_is_refused(model: Models, pairs: Path, prompts: Path, tmp_path: Path) -> None:
    """It goes into the user's message, which is said once."""
    path = model(NO_SYSTEM)
    for arguments in (
        ("pairs", "check", pairs),
        ("detect", "--pairs", pairs, "-o", tmp_path / "m.json", "-t", "1"),
        ("run", "-sys", "Be brief.", "-p", "Hi.", *ASK),
        ("run", "--n-prompts", prompts, *ASK),
        ("chat", "-sys", "Be brief.", *ASK),
    ):
        result = ok(*arguments, "-m", path, input="Hi.\nHi.\n")
        assert result.stderr.count("no system message") == 1, (arguments, result.stderr)
        assert "no system message" not in result.stdout
    shown = ok("pairs", "check", pairs, "-m", path).stdout
    assert "<|user|>Be brief.\nCount to two.<|end|>" in shown
    assert "<|system|>" not in shown
    assert "system message" not in ok("run", "-p", "Hi.", *ASK, "-m", path).stderr


#
# dates
#


def test_the_date_of_a_recording(model: Models, pairs: Path, tmp_path: Path) -> None:
    path, output, counts = model(DATED), tmp_path / "m.json", tmp_path / "c.npz"
    flags = ("detect", "-m", path, "--pairs", pairs, "-t", "1", "-o", output, "--counts", counts)
    ok(*flags, "--date", ONE)
    assert json.loads(output.read_text())["dates"] == [ONE]
    assert ExpertMap.load(output).dates == RoutingCounts.load(counts).dates == (ONE,)
    first = ExpertMap.load(output)
    assert ONE in ok("map", "show", output).stdout
    ok(*flags, "--date", TWO)
    assert not (ExpertMap.load(output).rd == first.rd).all(), "the date is in the prompts"
    ok(*flags, "--date", ONE)
    assert (ExpertMap.load(output).rd == first.rd).all()
    ok(*flags)
    assert len(ExpertMap.load(output).dates) == 1
    assert ExpertMap.load(output).dates[0] > TWO  # today
    summary = json.loads(ok("pairs", "check", pairs, "-m", path, "--date", ONE, "--json").stdout)
    assert summary["date"] == ONE
    assert f"Today is {ONE}" in ok("pairs", "check", pairs, "-m", path, "--date", ONE, "--full").stdout


def test_a_template_without_a_date(pairs: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.json"
    ok("detect", "-m", "tiny", "--pairs", pairs, "-t", "1", "-o", output, "--date", ONE)
    assert "dates" not in json.loads(output.read_text())
    assert json.loads(ok("pairs", "check", pairs, "-m", "tiny", "--json").stdout)["date"] is None


@pytest.mark.parametrize("text", ["2023-02-29", "20240229", "29.2.2024", "today", ""])
def test_what_is_no_date(pairs: Path, text: str) -> None:
    result = run("pairs", "check", pairs, "-m", "tiny", "--date", text)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "--date" in result.stderr


def refused(*arguments: Any) -> str:
    """What is said of a run that began under ONE, and is resumed under another date."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"--date {ONE}" in result.stderr
    assert "--restart" in result.stderr
    return result.stderr


def test_a_recording_goes_on_under_its_date(
    model: Models, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("detect", "-m", model(DATED), "--pairs", pairs, "-t", "1", "-b", "64", "-o")
    ok(*flags, tmp_path / "whole.json", "--date", ONE)
    with monkeypatch.context() as patch:
        patch.setattr(ExpertMap, "from_counts", _interrupt)
        assert run(*flags, tmp_path / "m.json", "--date", ONE).exit_code == 130
    assert TWO in refused(*flags, tmp_path / "m.json", "--resume", "--date", TWO)
    refused(*flags, tmp_path / "m.json", "--resume")  # today is another day, too
    ok(*flags, tmp_path / "m.json", "--resume", "--date", ONE)
    assert (ExpertMap.load(tmp_path / "m.json").rd == ExpertMap.load(tmp_path / "whole.json").rd).all()


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_answers_go_on_under_their_date(
    model: Models, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("run", "-m", model(DATED), "--n-prompts", prompts, *ASK, "-o", tmp_path / "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "finish", _interrupt)
        assert run(*flags, "--date", ONE).exit_code == 130
    partial = tmp_path / "a.jsonl.partial"
    kept = partial.read_text("utf-8")
    assert json.loads(kept.splitlines()[0])["settings"]["date"] == ONE
    assert TWO in refused(*flags, "--resume", "--date", TWO)
    refused(*flags, "--resume")
    assert json.loads(ok(*flags, "--resume", "--date", ONE, "--json").stdout)["date"] == ONE
    # a file that an earlier version began goes on under the date that is given
    head, *rest = kept.splitlines()
    old = json.loads(head)
    del old["settings"]["date"]
    partial.write_text("\n".join([json.dumps(old), *rest]) + "\n", "utf-8")
    assert "--date" in run(*flags, "--resume").stderr
    ok(*flags, "--resume", "--date", ONE)


def test_an_evaluation_goes_on_under_its_date(model: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("eval", "-m", model(DATED), "--map", "digits-words", "--n-items", 1, "-t", "1", "-o", tmp_path / "e")
    flags += ("--neutral", "none", "--benign", "none", "-n", "2")
    with monkeypatch.context() as patch:
        patch.setattr("steermoe_local.evaluation.measuring.evaluator.Scoring.finish", _interrupt)
        assert run(*flags, "--date", ONE).exit_code == 130
    assert TWO in refused(*flags, "--resume", "--date", TWO)
    refused(*flags, "--resume")
    ok(*flags, "--resume", "--date", ONE)
    written = "".join(path.read_text("utf-8") for path in (tmp_path / "e").iterdir() if path.suffix == ".json")
    assert f'"date": "{ONE}"' in written


def test_one_answer(model: Models) -> None:
    flags = ("run", "-m", model(DATED), "-p", "Hi.", *ASK, "--json")
    assert json.loads(ok(*flags, "--date", ONE).stdout)["date"] == ONE
    assert "date" not in json.loads(ok(*flags, "--raw").stdout)
    assert run(*flags, "--raw", "--date", ONE).exit_code == 2


def test_merged_counts_keep_all_dates(model: Models, pairs: Path, tmp_path: Path) -> None:
    for number, date in ((1, ONE), (2, TWO)):
        flags = ("--shard", f"{number}/2", "--date", date, "--counts", tmp_path / f"{number}.npz")
        ok("detect", "-m", model(DATED), "--pairs", pairs, "-t", "1", "-o", tmp_path / "m.json", *flags)
    files = (tmp_path / "1.npz", tmp_path / "2.npz")
    merged = ok("map", "merge", *files, "-o", tmp_path / "both.json")
    assert ExpertMap.load(tmp_path / "both.json").dates == (ONE, TWO)
    assert ONE in merged.stderr
    assert TWO in merged.stderr
    shutil.copy(files[0], tmp_path / "again.npz")
    assert "date" not in ok("map", "merge", files[0], "-o", tmp_path / "one.json").stderr
