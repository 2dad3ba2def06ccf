"""steermoe sweep: its lists, its files, an interruption, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from tests.support.interrupting import interrupted_after

MAP = "sweep -m tiny --map digits-words -t 1 -n 6 --n-text 100 --benign none"


def start(line: str, *more: str) -> Result:
    return CliRunner().invoke(main, [*line.split(), *more])


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A small grid with an equal and an impossible choice."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    line = f"{MAP} --activate 0,2 --deactivate 0..2:2,50,60 --layers all --layers 9 --strength hard,2 --both-ways"
    return folder, start(line, "-o", str(folder))


def test_the_files(swept: tuple[Path, Result]) -> None:
    folder, result = swept
    assert result.exit_code == 0, result.output
    names = sorted(path.name for path in folder.iterdir())
    assert names == [
        "pareto.png",
        "pareto.svg",
        "records.jsonl",
        "report.html",
        "report.md",
        "summary.json",
        "table.csv",
    ]
    data = json.loads((folder / "summary.json").read_text("utf-8"))
    assert data["command"].startswith("steermoe sweep --model tiny --map digits-words")
    assert data["grid"]["deactivate"] == [0, 2, 50, 60]
    assert data["grid"]["strengths"] == [None, 2.0]
    assert len(data["points"]) == 36
    assert len(data["impossible"]) == 28, "without experts a layer that is not there is no matter"
    assert all("no layer 9" in item["why"] for item in data["impossible"])
    rows = list(csv.DictReader((folder / "table.csv").read_text("utf-8").splitlines()))
    assert len(rows) == 64
    assert "## Pareto front" in (folder / "report.md").read_text("utf-8")


def test_equal_choices_are_measured_once_and_announced(swept: tuple[Path, Result]) -> None:
    folder, result = swept
    data = json.loads((folder / "summary.json").read_text("utf-8"))
    same = [point for point in data["points"] if point["same_as"] is not None]
    assert {point["deactivate"] for point in same} == {0, 60}, "0 and 0 in both rules, 60 as 50"
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf-8").splitlines()]
    biases = {record["bias"] for record in records}
    assert len(biases) == data["n_measured"] + 1
    assert f"64 choices: {data['n_measured']} to measure, " in result.stderr
    assert "unsteered model, answers 6" in result.stderr


def test_towards_and_away(swept: tuple[Path, Result]) -> None:
    data = json.loads((swept[0] / "summary.json").read_text("utf-8"))
    rates = {
        point["reverse"]: point["rate"]["value"]
        for point in data["points"]
        if (point["activate"], point["deactivate"], point["scale"]) == (2, 2, None)
    }
    assert rates[False] > 0.8
    assert rates[True] < 0.2


def test_caps_and_weights_by_rank(tmp_path: Path) -> None:
    """--cap alone measures the capped rule alone; with --strength both; weights are of the soft points."""
    line = f"{MAP} --activate 2 --rank log-odds --cap 1,inf --json"
    data = json.loads(start(line, "-o", str(tmp_path / "one")).stdout)
    assert [(point["scale"], point["cap"]) for point in data["points"]] == [(None, 1.0), (None, "inf")]
    assert data["about"]["steering"]["rank"] == "log-odds"
    more = ("--strength", "hard,2", "--weights", "log-odds", "-o", str(tmp_path / "two"))
    data = json.loads(start(line, *more).stdout)
    found = [(point["scale"], point["weights"], point["cap"]) for point in data["points"]]
    assert found == [(None, None, None), (2.0, "log-odds", None), (None, None, 1.0), (None, None, "inf")]
    effects = [point["effect"]["value"] for point in data["points"]]
    assert effects[0] == effects[3], "an infinite cap is the hard rule"


def test_resumed(tmp_path: Path) -> None:
    """Interrupted, then --resume: the same answer as in one go; without it the rest is not trodden on."""
    line = f"{MAP} --activate 0..2 --json -o"
    whole = json.loads(start(line, str(tmp_path / "whole")).stdout)
    with interrupted_after(10):
        broken = start(line, str(tmp_path / "out"))
    assert broken.exit_code == 130
    assert "10 results are kept" in broken.stderr
    again = start(line, str(tmp_path / "out"))
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    resumed = start(line, str(tmp_path / "out"), "--resume")
    data = json.loads(resumed.stdout)
    for name in ("points", "unsteered", "n_measured", "impossible"):
        assert data[name] == whole[name]
    one, two = ((tmp_path / name / "records.jsonl").read_text("utf-8") for name in ("whole", "out"))
    assert one == two


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("", "give --activate LIST"),
        ("--activate 0", "nothing to measure"),
        ("--activate 1-5", "--activate: '1-5'"),
        ("--deactivate 5..0", "--deactivate: '5..0'"),
        ("--activate 1 --strength 1,x", "--strength: 'x' in '1,x'"),
        ("--activate 1 --cap 1,x", "--cap: 'x' in '1,x'"),
        ("--activate 1 --cap 0", "--cap: '0'"),
        ("--activate 1 --strength= --cap 1", "--strength"),
        ("--activate 1 --weights logit", "weights logit"),
        ("--activate 1 --strength 2 --weights logit", "steermoe detect"),
        ("--activate 1 --rank effect", "steermoe attribute"),
        ("--activate 1 --mode capped", "'--mode'"),
        ("--activate 1 --layers 3-", "layers: '3-'"),
        ("--activate 1 --layers 7", "layer 7"),
        ("--activate 0..9999 --deactivate 0..9999", "more than 100000"),
        ("--activate 1 --preset safe", "'--preset'"),
        ("--activate 1 --bias x.gguf", "'--bias'"),
        ("--activate 1 --cost loss", "'loss'"),
    ],
)
def test_refused(more: str, words: str, tmp_path: Path) -> None:
    result = start(f"{MAP} {more}", "-o", str(tmp_path / "out"))
    assert result.exit_code in (1, 2)
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir()), "nothing is made"


def test_without_map_or_task(tmp_path: Path) -> None:
    result = start("sweep -m tiny --activate 1 --task builtin:neutral", "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "give --map MAP" in result.stderr
    result = start("sweep -m tiny --activate 1", "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "--task" in result.stderr
    assert not list(tmp_path.iterdir())


def test_settings_of_other_commands_do_not_reach_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STEERMOE_ACTIVATE is how a chat is steered."""
    monkeypatch.setenv("STEERMOE_ACTIVATE", "5")
    monkeypatch.setenv("STEERMOE_LAYERS", "1")
    monkeypatch.setenv("STEERMOE_CAP", "1")
    monkeypatch.setenv("STEERMOE_WEIGHTS", "logit")
    monkeypatch.setenv("STEERMOE_MODE", "capped")
    result = start(MAP, "-o", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "--activate LIST" in result.stderr
