"""Plans and --where in the commands that measure: what is steered where, what they refuse, and what results tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap
from steermoe_local.cli import main
from tests.support.paths import ROOT

DIGITS = ROOT / "expert_maps" / "tiny" / "digits-words.json"
FAST = ("-m", "tiny", "-t", "1", "-n", "8", "--n-text", "60", "--benign", "none")
TWO = ("--steer", "answer: digits-words", "--steer", "prompt: digits-words +1 -0")


def start(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def measured(folder: Path, *words: str) -> dict[str, Any]:
    done = start(*words, "-o", str(folder))
    assert done.exit_code == 0, done.output
    data: dict[str, Any] = json.loads((folder / "summary.json").read_text("utf-8"))
    return data


def test_a_plan_of_one_choice_is_measured_both_ways(tmp_path: Path) -> None:
    """The task is that of its map, as with --map; what is nowhere in force has no effect."""
    words = ("eval", *FAST, "--no-controls")
    data = measured(tmp_path / "answer", *words, "--steer", "answer: digits-words")
    assert {side["name"] for side in data["sides"]} == {"unsteered", "towards", "away"}
    assert data["effects"]["swing"]["value"] > 0.5
    assert "answer" in (tmp_path / "answer" / "report.md").read_text("utf-8")
    late = measured(tmp_path / "late", *words, "--steer", "answer[1000:]: digits-words")
    assert late["effects"]["swing"]["value"] == 0


def test_a_plan_of_several_choices_is_measured_as_a_whole(tmp_path: Path) -> None:
    data = measured(tmp_path / "out", "eval", *FAST, *TWO)
    assert {side["name"] for side in data["sides"]} == {"unsteered", "steered"}
    assert data["controls"] in ([], {})
    assert [rule["text"] for rule in data["steering"]["rules"]] == [
        "answer: digits-words",
        "prompt: digits-words +1 -0",
    ]


@pytest.mark.parametrize("command", ["experiment random10 --draws 1", "transfer --pairs none --quants Q8_0"])
def test_one_choice_is_wanted(command: str, tmp_path: Path) -> None:
    flags = [word for word in FAST if not (command.startswith("transfer") and word in ("--benign", "none"))]
    done = start(*command.split(), *flags, *TWO, "-o", str(tmp_path / "out"))
    assert done.exit_code == 2, done.output
    assert "2 choices of experts" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rule", ["answer: none", "all: none"])
def test_a_plan_that_steers_nothing_is_not_measured(rule: str, tmp_path: Path) -> None:
    words = ("--task", "builtin:digits-words", "--steer", rule, "-o", str(tmp_path / "out"))
    done = start("eval", *FAST, *words)
    assert done.exit_code == 2, done.output
    assert "steer nothing" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "option", "instead"),
    [("audit", "--steer", "--where"), ("audit", "--plan", "--where"), ("eval", "--where", "--steer")],
)
def test_the_other_option_is_named(command: str, option: str, instead: str) -> None:
    done = start(command, "-m", "tiny", option, "answer")
    assert done.exit_code == 2
    assert f"this command has {instead}" in done.stderr


@pytest.mark.parametrize("command", ["sweep", "tune"])
def test_the_rules_of_candidates(command: str, tmp_path: Path) -> None:
    """A plan of one map says where its candidates are in force: as --where does, which is not given beside it."""
    rest = ("--deactivate", "4") if command == "sweep" else ("--max-kl", "9", "--max-choices", "4")
    words = (command, *FAST, *rest)
    found = []
    for name, steered in (
        ("rules", ("--steer", "answer[0:2]: digits-words +1 -1")),
        ("where", ("--map", "digits-words", "--where", "answer[0:2]")),
    ):
        done = start(*words, *steered, "-o", str(tmp_path / name))
        assert done.exit_code in (0, 1), done.output  # 1: `tune` on so few items confirms nothing
        data = json.loads((tmp_path / name / "summary.json").read_text("utf-8"))
        assert "answer[0:2]: steered" in json.dumps(data["about"]["settings"]["placement"])
        found.append({key: data[key] for key in data if key not in ("about", "command", "bias")})
    assert found[0] == found[1]
    both = ("--steer", "answer: digits-words", "--where", "answer")
    two = ("--steer", "prompt: digits-words +1", "--steer", "answer: digits-words -1")
    for wrong, said in ((both, "both say where"), (two, "2 choices of experts")):
        done = start(*words, *wrong, "-o", str(tmp_path / "wrong"))
        assert done.exit_code == 2, done.output
        assert said in done.stderr
        assert not (tmp_path / "wrong").exists()


def test_where_candidates_steer(tmp_path: Path) -> None:
    words = ("sweep", *FAST, "--map", "digits-words", "--activate", "0", "--deactivate", "4", "--both-ways")
    swings = {}
    for name, where in (("answer", "answer"), ("late", "answer[1000:]"), ("prompt", "prompt[0:-1]")):
        data = measured(tmp_path / name, *words, "--where", where)
        swings[name] = max(abs(point["swing"]["value"]) for point in data["points"])
        assert f"{where}: steered" in json.dumps(data["about"]["settings"]["placement"])
        assert f"--where {where}" in data["command"].replace("'", "")
    assert swings["answer"] > 0.5
    assert swings["late"] == 0
    assert swings["prompt"] < swings["answer"]


def test_an_audit_of_the_answers_alone(tmp_path: Path) -> None:
    words = ("audit", "-m", "tiny", "-t", "1", "-n", "8", "--n-text", "60", "--task", "builtin:digits-words")
    rest = ("--draws", "2", "--layer-draws", "0", "--suppress", "20%", "--promote", "none")
    assert start(*words, *rest, "--where", "answer[1000:]", "-o", str(tmp_path / "out")).exit_code == 0
    (column,) = (tmp_path / "out" / "columns.jsonl").read_text("utf-8").splitlines()[-1:]
    assert "answer[1000:]" in (tmp_path / "out" / "summary.json").read_text("utf-8") + column
    report = (tmp_path / "out" / "report.md").read_text("utf-8")
    assert "| suppressed | 0.2 | 24 | 100% " in report, "nothing is in force, so all is kept"


def test_conditions_look_at_maps_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = DIGITS.read_text("utf-8").replace(ExpertMap.load(DIGITS).identity.router_sha256, "1" * 64)
    Path("foreign.json").write_text(text, "utf-8")
    shutil.copy(DIGITS, "own.json")
    words = ("sweep", *FAST, "--map", "digits-words", "--deactivate", "2")
    done = start(*words, "--where", "answer when foreign.json < 1 over prompt", "-o", "out")
    assert done.exit_code == 1, done.output
    assert "made for olmoe" in done.stderr
    done = start(*words, "--where", "answer when lost.json < 1 over prompt", "-o", "out")
    assert done.exit_code == 1
    assert not Path("out").exists()
    data = measured(Path("out"), *words, "--where", "answer when own.json < 100 over prompt")
    all_of_it = measured(Path("all"), *words, "--where", "answer")
    assert [point["rate"] for point in data["points"]] == [point["rate"] for point in all_of_it["points"]]
