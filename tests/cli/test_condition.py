"""steermoe condition: its report and map, what it prints, an interruption, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap, save_pairs
from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviour
from steermoe_local.pairs.pairs import PairsFile
from steermoe_local.steering.plan_text import parse_rule
from tests.support.announced import untimed
from tests.support.condition_pairs import alike, kinds_of_prompts
from tests.support.held import HELD, hold, patience

QUICK = "condition fit -m tiny -t 1 --draws 99"
SECRETS = behaviour("refuse-comply").pairs


def start(*words: Any) -> Result:
    return CliRunner().invoke(main, [*QUICK.split(), *map(str, words)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("condition") / "kinds.jsonl"
    save_pairs(kinds_of_prompts(24), found)
    return found


@pytest.fixture(scope="module")
def fitted(pairs: Path) -> tuple[Result, Path]:
    folder = pairs.parent
    return start("--pairs", pairs, "-o", folder / "c.json", "--write-map", folder / "lean.json", "--json"), folder


def test_the_report_and_the_map(fitted: tuple[Result, Path], pairs: Path) -> None:
    done, folder = fitted
    assert done.exit_code == 0, done.output
    (announced,) = untimed(done.stderr)
    assert announced.startswith("condition fit: ")
    printed, kept = json.loads(done.stdout), json.loads((folder / "c.json").read_text("utf-8"))
    assert {name: value for name, value in kept.items() if name != "pairs"} == {
        name: printed[name] for name in kept if name != "pairs"
    }
    assert (kept["format"], kept["version"]) == ("steermoe-condition", 1)
    assert kept["auc"]["value"] == 1
    assert kept["pairs_sha256"] == PairsFile(pairs).digest
    assert len(kept["pairs"]) == kept["n_pairs"] == 24
    assert (printed["report"], printed["written_map"]) == (str(folder / "c.json"), str(folder / "lean.json"))
    made = ExpertMap.load(folder / "lean.json")
    assert made.sha256 == kept["map_sha256"]
    assert made.pairs_sha256 == (kept["pairs_sha256"],)
    assert made.behaviour == "kinds"
    rule = parse_rule(f"answer when {kept['when']}: none")
    assert rule.where.when is not None
    assert rule.where.when.map == str(folder / "lean.json")
    assert rule.where.when.below == kept["threshold"]
    assert sorted(path.name for path in folder.iterdir()) == ["c.json", "kinds.jsonl", "lean.json"]


def test_the_table(pairs: Path, tmp_path: Path) -> None:
    done = start("--pairs", pairs, "--steer-when", "positive", "--folds", "3")
    assert done.exit_code == 0, done.output
    assert "when kinds > " in done.stdout
    for words in (
        " over prompt",
        "24; 3 folds",
        "1.000 (",
        "p = 0.01",
        "of the negative sides",
        "of the positive sides",
    ):
        assert words in done.stdout
    assert "needed, not enough" in done.stdout
    assert "--write-map" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_pairs_that_are_alike(tmp_path: Path) -> None:
    """The condition is told, and that it is none."""
    save_pairs(alike(40, 1), tmp_path / "alike.jsonl")
    done = start("--pairs", tmp_path / "alike.jsonl", "--write-map", tmp_path / "m.json")
    assert done.exit_code == 0, done.output
    assert "does not differ from swapped sides" in done.stdout
    assert "\nwarning: " in done.stderr


def test_a_map_of_other_pairs(fitted: tuple[Result, Path], tmp_path: Path) -> None:
    _, folder = fitted
    save_pairs(kinds_of_prompts(24, first=24), tmp_path / "p.jsonl")
    done = start("--pairs", tmp_path / "p.jsonl", "--map", folder / "lean.json", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["cross_fitted"] is False
    assert data["map_sha256"] == ExpertMap.load(folder / "lean.json").sha256
    assert data["auc"]["value"] > 0.9
    assert data["when"].startswith(f"{folder / 'lean.json'} < ")


def test_constant_scores(pairs: Path, fitted: tuple[Result, Path], tmp_path: Path) -> None:
    made = ExpertMap.load(fitted[1] / "lean.json")
    ExpertMap(made.identity, "nothing", np.zeros(made.identity.shape)).save(tmp_path / "nothing.json")
    done = start("--pairs", pairs, "--map", tmp_path / "nothing.json")
    assert done.exit_code == 0, done.output
    assert "none: all spans have the same score" in done.stdout
    assert "no AUC" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_and_resumed(pairs: Path, tmp_path: Path) -> None:
    """Ctrl-C keeps what is recorded, and the report is that of an undisturbed run."""
    output = tmp_path / "c.json"
    words = [
        *QUICK.split(),
        "--pairs",
        str(pairs),
        "-b",
        "32",
        "-o",
        str(output),
        "--write-map",
        str(tmp_path / "m.json"),
    ]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*HELD, *words], env=os.environ | hold(checkpoints=4), **pipes) as process:
        patience(process, (tmp_path / "c.json.partial.npz").exists)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "--resume" in stderr.splitlines()[-2]
    assert not output.exists()
    refused = CliRunner().invoke(main, words)
    assert refused.exit_code == 2
    assert "--restart" in refused.stderr
    done = CliRunner().invoke(main, [*words, "--resume"])
    assert done.exit_code == 0, done.output
    again = CliRunner().invoke(
        main, [*words, "--resume", "-o", str(tmp_path / "d.json"), "--write-map", str(tmp_path / "m.json")]
    )
    assert again.exit_code == 0, again.output
    one, two = (json.loads((tmp_path / name).read_text("utf-8")) for name in ("c.json", "d.json"))
    for data in (one, two):
        del data["created"], data["map_sha256"]
    assert one == two
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "d.json", "m.json"]


def refused(words: list[Any], status: int = 2) -> str:
    done = start(*words)
    assert done.exit_code == status, done.output
    assert done.stdout == ""
    *skipped, error = done.stderr.splitlines()
    said = ("skipped: ", "further ", "condition fit: ")
    assert all(line.startswith(said) or " in all: " in line for line in skipped)
    assert error.startswith("error: ")
    return error


def test_what_it_refuses(pairs: Path, fitted: tuple[Result, Path], tmp_path: Path) -> None:
    _, folder = fitted
    out = tmp_path / "out.json"
    assert "leave out one" in refused(["--pairs", pairs, "--map", "digits-words", "--write-map", out])
    assert "made of these pairs" in refused(["--pairs", pairs, "--map", folder / "lean.json"])
    assert "give -o" in refused(["--pairs", pairs, "--resume"])
    assert "another file" in refused(["--pairs", pairs, "-o", out, "--write-map", out])
    save_pairs(kinds_of_prompts(19), tmp_path / "few.jsonl")
    assert "19 pairs" in refused(["--pairs", tmp_path / "few.jsonl", "-o", out])
    for over in ("last", "last:0", "last:4097", "last:x", "answer"):
        assert repr(over) in refused(["--pairs", pairs, "--over", over])
    # no side has a reply of sixteen tokens; no two prompts differ
    assert "none of the 120" in refused(["--pairs", SECRETS, "-o", out], 1)
    assert "none of the 120" in refused(["--pairs", SECRETS, "--over", "prompt", "-o", out], 1)
    assert [path.name for path in tmp_path.iterdir()] == ["few.jsonl"]
