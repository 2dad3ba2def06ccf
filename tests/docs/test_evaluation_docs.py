"""The pages on measuring: their examples run, with few items, and every command line in them is one."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.cli import main
from steermoe_local.evaluation.experiments.experiments import EXPERIMENTS
from steermoe_local.evaluation.studies.audit.perturbations import Perturbations
from steermoe_local.evaluation.studies.audit.results import LEVEL
from steermoe_local.evaluation.studies.controls.controls import ALL
from steermoe_local.evaluation.studies.evaluate import Controls
from steermoe_local.models import local_models
from steermoe_local.models.embedded import behaviours
from steermoe_local.steering.plan_text import parse_rule
from tests.support.pages import commands, parse
from tests.support.paths import ROOT

PAGES = ("evaluation", "tasks", "task-builders", "experiments", "tuning", "transfer", "audit")
BLOCK = re.compile(r"(<!-- not run: [^\n]*-->\n)?^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text("utf-8")


def blocks(name: str, language: str, skipped: bool = False) -> list[str]:
    return [text for mark, kind, text in BLOCK.findall(page(name)) if kind == language and (skipped or not mark)]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_line_is_well_formed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what is not run: options that are not there, or want something else, are found."""
    monkeypatch.chdir(tmp_path)
    for file in ("questions.jsonl", "pairs.jsonl", "map.json", "model.gguf", "olmoe.gguf", "tone.jsonl"):
        Path(file).touch()
    monkeypatch.setattr(local_models, "resolve_model", lambda name, *_: Path(str(name)))
    calls = [call for script in blocks(name, "sh", skipped=True) for call in commands(script)]
    assert len(calls) == len(re.findall(r"^steermoe ", page(name), re.MULTILINE)) > 0
    for call in calls:
        parse(call[: call.index("#")] if "#" in call else call)


@pytest.mark.parametrize("name", [name for name in PAGES if blocks(name, "sh")])
def test_the_shell_blocks_run(name: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    few = {"STEERMOE_THREADS": "1", "STEERMOE_BENIGN": "none", "STEERMOE_N_TEXT": "50"}
    for script in blocks(name, "sh"):
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=tmp_path,
            env=os.environ | few | {"PATH": path},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout
    for folder in tmp_path.iterdir():
        for file in folder.iterdir():
            assert f"`{file.name}`" in page(name), "each file that is written is described"


def test_transfer_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = blocks("transfer", "python")
    exec(compile(script, "docs/transfer.md", "exec"), {})
    name, pearson, same_sets, effect = capsys.readouterr().out.split(maxsplit=3)
    assert name == "Q2_K"
    assert 0.9 < float(pearson) < 1
    assert 0 < float(same_sets) < 1
    assert effect.startswith("100% (")


def test_audit_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (script,) = blocks("audit", "python")
    exec(compile(script, "docs/audit.md", "exec"), {})
    *points, breaks = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in points] == ["0.1", "0.4"]
    assert all(line.count("% (") == 3 for line in points)
    assert breaks.startswith("[('suppress', ")
    assert not list(tmp_path.iterdir()), "without a file for the answers none is written"


def test_building_in_python(tmp_path: Path) -> None:
    (script,) = blocks("task-builders", "python")
    names: dict[str, Any] = {}
    exec(compile(script, "docs/task-builders.md", "exec"), names)
    rows = [{"prompt": f"What is {n} plus one?"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    tally = names["build"]("prompts", str(tmp_path / "rows.json"), str(tmp_path / "task.jsonl"))
    assert tally.items == len((tmp_path / "task.jsonl").read_text("utf-8").splitlines()) - 1 == 4


def test_records_are_described() -> None:
    for kind in ("answer", "benign", "text"):
        assert f"| `{kind}` |" in page("formats")


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("results")


def test_the_commands_behind_the_results(results: Any, tmp_path: Path) -> None:
    """Each behaviour gets each measurement, by command lines that the program takes."""
    for behaviour in behaviours():
        results.map_of(behaviour.name, tmp_path).touch()
    found = results.jobs("tiny", None, tmp_path)
    kinds = {"eval", "sweep", "transfer", *EXPERIMENTS}
    assert {job.name for job in found} == {f"{one.name}/{kind}" for one in behaviours() for kind in kinds}
    for job in found:
        parse([*job.words, "-t", "1", "-o", str(tmp_path / "out")])
        assert "--no-controls" not in job.words
        assert "-n" not in job.words or job.kind in EXPERIMENTS


def test_the_commands_for_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The empty column of docs/results.md can be filled as the page says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_models, "resolve_model", lambda name, *_: Path(str(name)))
    for file in ("squad.jsonl", "task.jsonl", "faithful.json", "phases.first16.json", "phases.rest16.json"):
        Path(file).touch()
    column = page("results").partition("## A model trained as usual")[2]
    found = [shlex.split(text)[1:] for text in re.findall(r"`(steermoe [^`]*)`", column)]
    measuring = {"eval", "tune", "experiment", "transfer", "condition"}
    assert {call[0] for call in found} == measuring | {"pairs", "detect", "tasks", "map"}
    for call in found:
        if call[0] in measuring:
            call += [] if "--steer" in call or call[0] == "condition" else ["--map", "faithful.json"]
            call += [] if "-m" in call else ["-m", "olmoe-1b-7b"]
        parse(call)
        for rule in (words for option, words in pairwise(call) if option == "--steer"):
            assert parse_rule(rule).name == "faithful.json"


def test_the_defaults_are_those_of_the_pages() -> None:
    """Twenty draws and all controls, unless somebody asks for less."""

    def default(command: str, option: str) -> Any:
        found = main.commands[command]
        return next(one.default for one in found.params if option in one.opts)

    assert default("eval", "--control-draws") == default("experiment", "--draws") == Controls().n_draws == 20
    assert default("eval", "--controls") is True
    assert Controls().kinds == ALL
    for command in ("eval", "sweep", "tune", "transfer", "audit"):
        assert default(command, "--parallel") == 16
        assert default(command, "--n-text") == 2000
    assert default("transfer", "--quants") == "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K,IQ4_XS"
    assert default("transfer", "--top-n") == 20
    wanted = Perturbations()
    assert default("audit", "--draws") == wanted.n_draws == 20
    assert default("audit", "--layer-draws") == wanted.n_layer_draws
    assert default("audit", "--blocks") == wanted.n_blocks
    assert default("audit", "--level") == f"{LEVEL:.0%}"
    assert default("tune", "--choosing-share") == "50%"
