"""Links and pipes that a stranger put where a command keeps files that nobody named: nothing is written elsewhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from steermoe_local._util.writing import require_no_link
from steermoe_local.cli import main
from steermoe_local.errors import UsageError
from steermoe_local.evaluation.studies.transfer.quantize import Quantizer, file_type
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import behaviour
from steermoe_local.server.folder_changes import change_together

RUN = "run -m tiny --temp 0 -n 2 -t 1 --n-prompts prompts.txt -o out.jsonl"
DETECT = "detect -m tiny --pairs few.jsonl -t 1 -o map.json --per-pair pairs.npz"
EVAL = "eval -m tiny --map digits-words --activate 2 -t 1 -n 2 --benign none --n-text 20 -o out"
WAYS = [
    (RUN, "out.jsonl.partial"),
    (DETECT, "map.json.partial.npz"),
    (DETECT, "map.json.partial.pairs"),
    (EVAL, "out/records.jsonl.partial"),
    (EVAL, "out/summary.json"),
    (EVAL, "out/report.md"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "download"
    (path / "out").mkdir(parents=True)
    monkeypatch.chdir(path)
    (path / "prompts.txt").write_text("What is three plus four?\n")
    pairs = behaviour("digits-words").pairs.read_text("utf-8").splitlines(keepends=True)
    (path / "few.jsonl").write_text("".join(pairs[:2]))
    return path


@pytest.mark.parametrize("restart", ["", " --restart"])
@pytest.mark.parametrize(("command", "name"), WAYS)
@pytest.mark.parametrize("victim", ["there", "missing"])
def test_links_are_not_followed(folder: Path, command: str, name: str, victim: str, restart: str) -> None:
    elsewhere = folder.parent / "elsewhere"
    if victim == "there":
        elsewhere.write_text("precious")
    (folder / name).symlink_to(elsewhere)
    done = CliRunner().invoke(main, (command + restart).split())
    assert done.exit_code == 2
    assert f"{name}: a symbolic link" in done.stderr
    assert (elsewhere.read_text() == "precious") if victim == "there" else not elsewhere.exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("command", [RUN, DETECT])
def test_pipes_are_not_waited_for(folder: Path, command: str) -> None:
    os.mkfifo(folder / {RUN: "out.jsonl.partial", DETECT: "map.json.partial.pairs"}[command])
    for more in ("", " --restart", " --resume"):
        done = CliRunner().invoke(main, (command + more).split())
        assert done.exit_code == 2
        assert "not a regular file" in done.stderr


def test_folders_of_results_may_be_links(folder: Path) -> None:
    (folder / "real").mkdir()
    (folder / "out").rmdir()
    (folder / "out").symlink_to(folder / "real")
    done = CliRunner().invoke(main, EVAL.split())
    assert done.exit_code == 0, done.output
    assert (folder / "real" / "summary.json").is_file()
    assert require_no_link(folder / "out") == folder / "out"


def test_quantizations(folder: Path, tiny_path: Path) -> None:
    quantizer = Quantizer(model_info(tiny_path), folder / "models", n_threads=1)
    kind = file_type("Q8_0")
    (folder / "models").mkdir()
    quantizer.path(kind).symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UsageError, match="a symbolic link"):
        quantizer.make(kind)
    assert not (folder.parent / "elsewhere").exists()


def test_the_journal_of_a_maps_folder(folder: Path) -> None:
    (folder / ".a.changing").symlink_to(folder.parent / "elsewhere")
    with pytest.raises(UsageError, match="a symbolic link"):
        change_together(folder, "a", {"a.json": lambda path: path.write_text("{}") and None})
    assert not (folder.parent / "elsewhere").exists()
    assert not (folder / "a.json").exists()
