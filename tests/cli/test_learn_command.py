"""steermoe learn: the verdict, the next commands, the exit status, an interruption, and what it refuses."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.learning.clock import Clock
from steermoe_local.learning.options import SIZES
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.models.user_maps import user_maps
from steermoe_local.pairs.pairs import Pair, save_pairs
from tests.learning.conftest import SMALL
from tests.support.interrupting import interrupted_after

PAIRS = behaviour("digits-words").pairs
OPENINGS = ("--like", "Use digits.", "--unlike", "Use words.")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, maps_folder: Path) -> None:
    """Few of everything, a maps folder of the test's own, and a clock that stops nothing early."""
    monkeypatch.setattr("steermoe_local.learning.learn.Clock", lambda *given: Clock(*given[:2], now=lambda: 0.0))
    monkeypatch.setitem(SIZES, "quick", replace(SIZES["quick"], **SMALL))  # type: ignore[index]


def learn(*words: str) -> Result:
    return CliRunner().invoke(main, ["learn", *words, "-m", "tiny", "-t", "1", "--quick"])


def test_three_commands(tmp_path: Path) -> None:
    """Learnt from two instructions; then --map NAME is it, with the numbers that it recommends."""
    result = learn("numbers", *OPENINGS, "--positive", "digits")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("works: held out ")
    assert "steermoe chat -m tiny --map numbers" in result.stdout
    assert user_maps() == {"numbers": tmp_path / "maps" / "numbers" / "map.json"}
    assert "the model reads" in result.stderr
    assert "were expected" in result.stderr
    folder = tmp_path / "maps" / "numbers"
    assert "steermoe learn" in (folder / "report.md").read_text("utf-8")
    built = CliRunner().invoke(main, ["map", "show", str(folder / "map.json"), "--json"])
    assert built.exit_code == 0, built.output
    again = learn("numbers", *OPENINGS)
    assert again.exit_code == 2
    assert "--restart" in again.stderr


def test_json_and_progress_for_programs() -> None:
    result = learn("numbers", "--pairs", str(PAIRS), "--json", "--progress", "json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["outcome"] == "works"
    assert data["verdict"].startswith("works: ")
    told = [json.loads(line) for line in result.stderr.splitlines() if line.startswith("{")]
    assert [set(one) for one in told] == [{"step", "done", "total", "elapsed", "expected"}] * len(told)
    assert [one["elapsed"] for one in told] == sorted(one["elapsed"] for one in told)
    steps = list(dict.fromkeys(one["step"] for one in told))
    assert steps == ["detect", "attribute", "tune", "confirm", "report"]
    assert all(0 <= one["done"] <= one["total"] for one in told)


def test_what_did_not_work(tmp_path: Path) -> None:
    """Exit status 1, the reason and what to try; the results are written all the same."""
    result = learn("documents", "--behaviour", "document-memory")
    assert result.exit_code == 1
    assert result.stdout.startswith("did not work: ")
    assert "what to try: " in result.stdout
    assert "Traceback" not in result.output
    assert (tmp_path / "maps" / "documents" / "report.md").exists()


def test_interrupted_and_resumed() -> None:
    with interrupted_after(40):
        result = learn("numbers", *OPENINGS)
    assert result.exit_code == 130
    assert "--resume" in result.stderr
    refused = learn("numbers", *OPENINGS)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    result = learn("numbers", *OPENINGS, "--resume")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("works: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("terse", "what is to be learnt?"),
        ("concize", "did you mean concise?"),
        ("terse --like x", "--like and --unlike go together"),
        ("terse --like x --unlike x", "the same instruction"),
        ("terse --like x --unlike y --pairs pairs.jsonl", "give one of them"),
        ("terse --questions q.txt --pairs pairs.jsonl", "--questions"),
        ("terse --pairs none.jsonl", "none.jsonl"),
        ("terse --behaviour digit-words", "digits-words"),
        ("Terse --like x --unlike y", "no name for a map"),
        ("terse --like x --unlike y --thorough", "exclude each other"),
        ("terse --like x --unlike y --resume --restart", "exclude each other"),
        ("terse --like x --unlike y --judge http://localhost:1/v1", "--judge-model"),
    ],
)
def test_wrong_input(words: str, message: str, tmp_path: Path) -> None:
    """One line with the fault and the cure, before anything is made."""
    result = learn(*words.split())
    assert result.exit_code in (1, 2)
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "maps").exists()


def test_questions_that_are_too_few(tmp_path: Path) -> None:
    (tmp_path / "questions.txt").write_text("What is it?\n" * 5, encoding="utf-8")
    result = learn("few", *OPENINGS, "--questions", str(tmp_path / "questions.txt"))
    assert result.exit_code == 1
    assert "too few questions (5)" in result.stderr
    assert "give 34 at least" in result.stderr
    assert not (tmp_path / "maps").exists()


def test_a_name_that_another_map_has(tmp_path: Path) -> None:
    """The folder would hide the user's own map; a map that ships is hidden, which is said."""
    maps = tmp_path / "maps"
    maps.mkdir()
    shutil.copy(shipped_maps()["digits-words"], maps / "mine.json")
    result = learn("mine", "--pairs", str(PAIRS))
    assert result.exit_code == 2
    assert "choose another name" in result.stderr
    assert list(maps.iterdir()) == [maps / "mine.json"]
    result = learn("digits-words", "--pairs", str(PAIRS))
    assert result.exit_code == 0, result.output
    assert "the name of a map that ships" in result.stderr


def test_a_folder_that_is_not_the_users(tmp_path: Path) -> None:
    """The next commands name its path, quoted as a shell wants it."""
    folder = tmp_path / "other maps"
    result = learn("numbers", "--pairs", str(PAIRS), "--maps-dir", str(folder))
    assert result.exit_code == 0, result.output
    command = next(line for line in result.stdout.splitlines() if "steermoe run" in line)
    words = shlex.split(command)[1:]
    done = CliRunner().invoke(main, [*words, "--temp", "0", "-n", "8"])
    assert done.exit_code == 0, done.output
    assert f"--maps '{folder}'" in result.stdout
    assert "--map numbers" not in result.stdout


def test_a_steering_without_a_map(tmp_path: Path) -> None:
    """A run that ended before there was a map, or was interrupted: --map says so."""
    run = ["run", "tiny", "hello", "--map", "same"]
    with interrupted_after(1):
        learn("same", "--like", "Use digits.", "--unlike", "Answer with digits.")
    refused = CliRunner().invoke(main, run)
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert learn("same", "--like", "Use digits.", "--unlike", "Answer with digits.", "--restart").exit_code == 1
    refused = CliRunner().invoke(main, run)
    assert refused.exit_code == 2
    assert str(tmp_path / "maps" / "same" / "report.md") in refused.stderr


def test_pairs_that_are_too_few(tmp_path: Path) -> None:
    save_pairs([Pair(str(n), f"a {n}", f"a x{n}", str(n), f"x{n}") for n in range(5)], tmp_path / "few.jsonl")
    result = learn("few", "--pairs", str(tmp_path / "few.jsonl"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 5 pairs are too few")
