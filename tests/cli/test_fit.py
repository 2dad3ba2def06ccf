"""steermoe fit: its file, what it prints, an interruption, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.bias_file import read_bias
from tests.support.interrupting import interrupted_after

NAME = "document-memory"
QUICK = "--budget 0.05 --population 8 --evaluations 24 --experts 6 --n-text 32 -t 1"


def start(line: str, *more: Any) -> Result:
    return CliRunner().invoke(main, [*line.split(), *map(str, more)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs, and a map with effects: pairs.jsonl, map.json."""
    found = tmp_path_factory.mktemp("fit")
    lines = behaviour(NAME).pairs.read_text("utf-8").splitlines()[::5]
    (found / "pairs.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    line = f"attribute -m tiny --map {NAME} --candidates 16 --draws 128 --items 20 --action suppress --n-text 32 -t 1"
    done = start(line, "--pairs", found / "pairs.jsonl", "-o", found / "map.json")
    assert done.exit_code == 0, done.output
    return found


def fit(folder: Path, output: Path, *more: Any) -> Result:
    line = f"fit -m tiny {QUICK}"
    return start(line, "--pairs", folder / "pairs.jsonl", "--map", folder / "map.json", "-o", output, *more)


@pytest.fixture(scope="module")
def fitted(folder: Path) -> Result:
    return fit(folder, folder / "bias.gguf", "--json")


def test_the_file_and_the_result(folder: Path, fitted: Result) -> None:
    assert fitted.exit_code == 0, fitted.output
    data = json.loads(fitted.stdout)
    bias = read_bias(folder / "bias.gguf")
    assert data["bias_digest"] == bias.key
    assert bias.mode == "soft"
    table = bias.dense()
    assert [row["fitted"] for row in data["experts"]] == [
        pytest.approx(float(table[row["layer"], row["expert"]])) for row in data["experts"]
    ]
    assert 1 <= len(data["experts"]) <= 6
    assert data["is_confirmed"] is True
    assert data["fitted_on"]["fitted"]["kl"] <= 0.05 * 1.001
    assert data["confirmed_on"]["n_items"] == 10
    assert re.search(
        r"10 to confirm; .+; at most [\d,]+ steps \(shorter with --evaluations N, .+\)$", fitted.stderr, re.M
    )
    assert not (folder / "bias.gguf.partial").exists()
    shown = start("bias show -m tiny", folder / "bias.gguf")
    assert shown.exit_code == 0, shown.output


def test_the_report(folder: Path, tmp_path: Path) -> None:
    result = fit(folder, tmp_path / "b.gguf", "--method", "none", "--reverse")
    assert result.exit_code == 0, result.output
    for words in ("layer ", "unsteered", "fitted", "others", "16 steerings measured", "written: "):
        assert words in result.stdout
    assert "start ->" not in result.stdout


def test_interrupted_and_resumed(folder: Path, fitted: Result, tmp_path: Path) -> None:
    output = tmp_path / "b.gguf"
    with interrupted_after(20):
        stopped = fit(folder, output, "--json")
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert not output.exists()
    assert fit(folder, output).exit_code == 2  # neither --resume nor --restart
    resumed = fit(folder, output, "--json", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert output.read_bytes() == (folder / "bias.gguf").read_bytes()
    again, whole = (json.loads(result.stdout) for result in (resumed, fitted))
    assert {**again, "bias": ""} == {**whole, "bias": ""}


@pytest.mark.parametrize(
    ("more", "status"),
    [
        (("--budget", "0"), 2),
        (("--budget", "-1"), 2),
        (("--budget", "nan"), 2),
        (("--budget", "inf"), 2),
        (("--experts", "0"), 2),
        (("--population", "2"), 2),
        (("--bound", "0"), 2),
        (("--method", "adam"), 2),
        (("--seed", "-1"), 2),
        (("--neutral", "none"), 2),
        (("--task", "builtin:neutral"), 2),
        (("--n-text", "9999999"), 2),
        (("--date", "2024-02-30"), 2),
        (("--map", map_path(NAME)), 2),
        (("--pairs", behaviour("digits-words").pairs), 2),
        (("--map", "no-such-map.json"), 1),
    ],
    ids=lambda value: " ".join(Path(str(part)).name for part in value) if isinstance(value, tuple) else None,
)
def test_what_it_refuses(folder: Path, tmp_path: Path, more: tuple[str, ...], status: int) -> None:
    """One line, a status, and neither an output nor a partial file."""
    result = fit(folder, tmp_path / "b.gguf", *more)
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_a_budget_that_was_too_small(folder: Path, fitted: Result, tmp_path: Path) -> None:
    """What was there stays, and what was measured serves a larger budget."""
    (tmp_path / "b.gguf").write_bytes(b"mine")
    refused = fit(folder, tmp_path / "b.gguf", "--budget", "1e-30")
    assert refused.exit_code == 2
    assert "1e-30" in refused.stderr
    assert (tmp_path / "b.gguf").read_bytes() == b"mine"
    assert fit(folder, tmp_path / "b.gguf", "--resume").exit_code == 0
    assert (tmp_path / "b.gguf").read_bytes() == (folder / "bias.gguf").read_bytes()


def test_an_output_that_another_process_writes(folder: Path, tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "b.gguf"):
        result = fit(folder, tmp_path / "b.gguf")
    assert result.exit_code == 1
    assert "writing this" in result.stderr
    assert not (tmp_path / "b.gguf").exists()
