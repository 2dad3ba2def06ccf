"""steermoe experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.cli.options.evaluation_setup import EvaluationSetup
from steermoe_local.errors import UsageError
from steermoe_local.evaluation.experiments import experiments
from steermoe_local.evaluation.experiments.experiments import EXPERIMENTS
from steermoe_local.evaluation.measuring.evaluator import Evaluator
from steermoe_local.evaluation.tasks import builtin
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.bias_file import write_bias
from steermoe_local.steering.steering import Steering

FAST = ("-n", "4", "--draws", "2", "-t", "1", "--n-text", "100", "--benign", "none")


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, ["experiment", *map(str, args)], **kwargs)


def test_the_names_are_the_experiments() -> None:
    name = next(param for param in main.commands["experiment"].params if param.name == "name")
    assert isinstance(name.type, click.Choice)
    assert list(name.type.choices) == list(EXPERIMENTS)
    shown = run("-h").output
    assert all(f"\n  {name}  " in shown for name in EXPERIMENTS)


def test_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model and a map: the embedded ones, and a folder of its own."""
    monkeypatch.chdir(tmp_path)
    done = run("random10", *FAST)
    assert done.exit_code == 0, done.output
    assert "Ten random experts swing the rate by" in done.stdout
    folder = tmp_path / "experiment-random10"
    names = {path.name for path in folder.iterdir()} - {"random10.png", "random10.svg"}  # drawn where matplotlib is
    assert names == {"records.jsonl", "report.html", "report.md", "summary.json"}
    data = json.loads((folder / "summary.json").read_text("utf-8"))
    assert data["experiment"] == "random10"
    assert data["about"]["model"]["architecture"] == "olmoe"
    assert data["about"]["steering"]["activate"] == 2, "the numbers of the model's card"
    assert data["command"].startswith("steermoe experiment ")
    assert data["finding"] in done.stdout
    report = (folder / "report.md").read_text("utf-8")
    assert report.startswith("# random10\n")
    assert data["command"] in report
    assert str(tmp_path) not in report
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text("utf-8").splitlines()]
    # unsteered, both ways, and two draws both ways; text for the first three
    assert len(lines) == (1 + 2 + 2 * 2) * 4 + 3


def test_json(tmp_path: Path) -> None:
    done = run("routing-kinds", "-m", "tiny", "--map", "document-memory", *FAST, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data == json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert data["about"]["settings"]["task"] == "document-memory"
    assert data["about"]["steering"]["deactivate"] == 4


def test_activate_benign_and_its_ability(tmp_path: Path) -> None:
    done = run("activate-benign", *FAST, "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert "ability" in json.loads(done.stdout)["figures"]
    done = run("activate-benign", *FAST, "--ability", "none", "-o", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    assert "ability" not in json.loads(done.stdout)["figures"]
    nothing = ("--ability", "none", "--neutral", "none")
    done = run("activate-benign", *FAST, *nothing, "-o", tmp_path / "other")
    assert done.exit_code != 0
    assert "something benign" in done.stderr


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(experiments, "ahead", stop)  # when all is measured
        done = run("random10", *FAST, "-o", out)
        assert done.exit_code == 130
        assert "--resume" in done.stderr
    assert (out / "records.jsonl.partial").exists()
    refused = run("random10", *FAST, "-o", out)
    assert refused.exit_code != 0
    assert "--resume" in refused.stderr
    counted: list[int] = []
    finish = Evaluator.finish
    monkeypatch.setattr(Evaluator, "finish", lambda self: (counted.append(self.n_computed), finish(self))[1])
    done = run("random10", *FAST, "-o", out, "--resume")
    assert done.exit_code == 0, done.output
    assert counted == [0], "nothing was computed again"
    assert not (out / "records.jsonl.partial").exists()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("top21",), "top21"),
        (("top20", "--reverse"), "--reverse"),
        (("top20", "--preset", "safe"), "--preset"),
        (("superficial", "--pairs", "missing.jsonl"), "missing.jsonl"),
        (("top20", "--draws", "0"), "--draws"),
        (("top20", "--ability", "builtin:neutral"), "--ability is for"),
        (("top20", "-m", "missing.gguf"), "missing.gguf"),
        (("top20", "--layers", "7-9"), "layer"),
    ],
)
def test_refused(tmp_path: Path, args: tuple[str, ...], words: str) -> None:
    done = run(*args, "-o", tmp_path / "out")
    assert done.exit_code in (1, 2), done.output
    assert words in done.stderr
    assert not (tmp_path / "out" / "summary.json").exists()
    assert "Traceback" not in done.stderr


def test_another_model_needs_a_map_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default map is of the embedded model: on others nobody asked for it."""
    monkeypatch.setattr(builtin, "is_embedded", lambda _: False)
    done = run("random10", "-m", "tiny", "-o", tmp_path / "out")
    assert done.exit_code == 2
    assert "give --map MAP" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_said(tmp_path: Path) -> None:
    done = run("superficial", *FAST, "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "superficial pairs\n" in done.stderr


def test_a_full_disk_at_the_end_costs_no_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"

    def full(*_: Any) -> Any:
        raise UsageError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(EvaluationSetup, "write", full)
        done = run("random10", *FAST, "-o", out)
    assert done.exit_code != 0
    assert "--resume" in done.stderr
    assert (out / "records.jsonl.partial").exists()


def test_a_bias_file_is_no_map(tmp_path: Path) -> None:
    bias = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2).build()
    assert bias is not None
    write_bias(bias, tmp_path / "b.gguf")
    done = run("top20", "--bias", tmp_path / "b.gguf", "--task", "builtin:digits-words", *FAST, "-o", tmp_path / "out")
    assert done.exit_code != 0
    assert "from a map" in done.stderr
