"""`steermoe eval`, and the options that the measuring commands share."""

from __future__ import annotations

import builtins
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from steermoe_local import BiasFile, SteeredLlama, UsageError, write_bias
from steermoe_local.cli import main
from steermoe_local.cli.options.evaluation_setup import EvaluationSetup, evaluation_options
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.steering import Steering
from tests.support.announced import untimed
from tests.support.held import HELD, hold, patience
from tests.support.interrupting import interrupted_after

FEW = ("-t", "1", "-n", "4", "--benign", "none", "--n-text", "20")


def run(*words: Any) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def evaluated(out: Path, *words: Any, model: Any = "tiny") -> Any:
    return run("eval", "-m", model, "-o", out, *FEW, *words)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be loaded: that would be long work."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(SteeredLlama, "__init__", refuse)


def test_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = evaluated(out, "--map", "digits-words", "--control-draws", 1)
    assert done.exit_code == 0, done.output
    assert "unsteered" in done.stdout
    assert "towards - away" in done.stdout
    assert done.stdout.splitlines()[-1] == f"written: {out / 'report.md'}"
    names = {"summary.json", "report.md", "report.html", "records.jsonl", "effect.png", "effect.svg"}
    assert {path.name for path in out.iterdir()} == names
    data = json.loads((out / "summary.json").read_text("utf-8"))
    assert [side["name"] for side in data["sides"]] == ["unsteered", "towards", "away"]
    assert {"random", "matched", "bottom", "superficial", "shuffled"} <= {c["kind"] for c in data["controls"]}
    assert {c["kind"]: c["n"] for c in data["controls"]}["superficial"] > 0, "the shipped map's pairs are known"
    command = "steermoe eval --model tiny --map digits-words --n-items 4 --n-text 20 --benign none --threads 1 "
    assert data["command"] == f"{command}--control-draws 1 -o OUT"
    assert data["command"] in (out / "report.md").read_text("utf-8")
    records = [json.loads(line) for line in (out / "records.jsonl").read_text("utf-8").splitlines()]
    assert [record["kind"] for record in records[:5]] == ["answer"] * 4 + ["text"]
    assert len({record["id"] for record in records}) == len(records)
    assert {signature["name"] for signature in data["signatures"]} <= {"no effect"}, "four items are few"


def test_json_says_what_the_file_says(tmp_path: Path) -> None:
    done = evaluated(tmp_path, "--map", "digits-words", "--no-controls", "--no-away", "--neutral", "none", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data == json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert list(data["effects"]) == ["towards"]
    assert data["controls"] == []
    assert data["sides"][0]["fluency"]["perplexity"] is None


def test_a_bias_file(tmp_path: Path) -> None:
    bias = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2).build()
    assert bias is not None
    write_bias(bias, tmp_path / "bias.gguf")
    words = ("--task", "builtin:digits-words", "--no-controls", "--json")
    done = evaluated(tmp_path / "out", "--bias", tmp_path / "bias.gguf", *words)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert [side["name"] for side in data["sides"]] == ["unsteered", "steered"]
    assert data["sides"][0]["rate"]["value"] < 1, "the bias does not steer the unsteered side"
    assert data["sides"][1]["rate"]["value"] == 1


def test_the_environment_steers_nothing_but_its_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """STEERMOE_BIAS is --bias; a map on the command line is nearer, and the unsteered side stays so."""
    plain = json.loads(evaluated(tmp_path / "a", "--map", "digits-words", "--no-controls", "--json").stdout)
    bias = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2, reverse=True).build()
    assert bias is not None
    write_bias(bias, tmp_path / "bias.gguf")
    monkeypatch.setenv("STEERMOE_BIAS", str(tmp_path / "bias.gguf"))
    done = evaluated(tmp_path / "b", "--map", "digits-words", "--no-controls", "--json")
    assert json.loads(done.stdout)["sides"] == plain["sides"]


def test_a_task_file_with_options(tmp_path: Path) -> None:
    task = tmp_path / "task.jsonl"
    task.write_text('{"id": 1, "prompt": "Which number comes after three?", "answer": "4"}\n', "utf-8")
    words = ("--scorer", "contains", "--scorer-option", "words=false", "--max-tokens", "8", "--no-controls", "--json")
    done = evaluated(tmp_path / "out", "--map", "digits-words", "--task", task, *words)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["effects"]["swing"]["value"] == 1
    done = evaluated(tmp_path / "out", "--map", "digits-words", "--task", task, "--no-controls")
    assert (done.exit_code, "give --scorer NAME" in done.stderr) == (2, True)
    done = evaluated(tmp_path / "out", "--map", "digits-words", "--task", task, *words[:2], "--scorer-option", "x=1")
    assert done.exit_code == 2
    assert "x" in done.stderr


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    done = evaluated(tmp_path, "--map", "digits-words", "--no-controls")
    assert done.exit_code == 0, done.output
    assert "pip install 'steermoe-local[plot]'" in done.stderr
    assert not (tmp_path / "effect.png").exists()
    assert "effect.png" not in (tmp_path / "report.md").read_text("utf-8")


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    words = ("--map", "digits-words", "--no-controls")
    assert evaluated(tmp_path / "whole", *words).exit_code == 0
    out = tmp_path / "parts"
    with interrupted_after(6):
        done = evaluated(out, *words)
    assert done.exit_code == 130
    partial = out / "records.jsonl.partial"
    assert f"6 results are kept in {partial}" in done.stderr
    assert "--resume" in done.stderr
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert len(partial.read_text("utf-8").splitlines()) == 7

    done = evaluated(out, *words)
    assert done.exit_code == 2
    assert f"{partial}: " in done.stderr
    assert "--resume" in done.stderr
    assert "--restart" in done.stderr
    done = evaluated(out, *words, "--resume", "--max-tokens", 3)
    assert done.exit_code == 2
    assert "with task_sha256 " in done.stderr
    assert partial.exists()

    done = evaluated(out, *words, "--resume")
    assert done.exit_code == 0, done.output
    for name in ("records.jsonl", "effect.svg"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not partial.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_and_resumed(tmp_path: Path) -> None:
    """A real one, between two answers."""
    partial = tmp_path / "out" / "records.jsonl.partial"
    words = ["eval", "-m", "tiny", "--map", "digits-words", "--no-controls", "-t", "1", "-np", "2", "-n", "40"]
    words += ["--benign", "none", "--n-text", "20", "-o", str(tmp_path / "out")]

    def lines_kept() -> int:
        return partial.read_bytes().count(b"\n") if partial.exists() else 0

    def start(held: dict[str, str]) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen([*HELD, *words], env=os.environ | held, text=True, **pipes)

    with start(hold(answers=12)) as process:
        patience(process, lambda: lines_kept() >= 5)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    announced, told, last = untimed(stderr)
    assert announced.startswith("eval: 120 answers and 3 texts (shorter with ")
    assert told == f"{lines_kept() - 1} results are kept in {partial}; go on with the same command and --resume"
    assert last == "error: interrupted"
    words.append("--resume")
    with start(hold()) as process:
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    records = [json.loads(line) for line in (tmp_path / "out" / "records.jsonl").read_text("utf-8").splitlines()]
    assert len({record["id"] for record in records}) == len(records) == 3 * (40 + 1), "three sides, and their text"
    assert not partial.exists()


def test_restart_forgets(tmp_path: Path) -> None:
    words = ("--map", "digits-words", "--no-controls")
    with interrupted_after(3):
        evaluated(tmp_path, *words)
    done = evaluated(tmp_path, *words, "--restart", "--max-tokens", 5)
    assert done.exit_code == 0, done.output
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text("utf-8").splitlines()]
    assert len(records) == 3 * 4 + 3
    assert max(record["n_tokens"] for record in records if record["kind"] == "answer") <= 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--task"),
        (("--task", "builtin:digits-words"), "--map MAP, --bias FILE, or rules"),
        (("--map", "no-such"), "no-such: neither a file nor a map"),
        (("--map", "no-such", "--task", "builtin:digits-words"), "no-such: "),
        (("--map", "digits-words", "--task", "builtin:no"), "'no'"),
        (("--map", "digits-words", "--task", "missing.jsonl"), "missing.jsonl: "),
        (("--map", "digits-words", "--scorer", "no"), "no"),
        (("--map", "digits-words", "--layers", "77"), "77"),
        (("--map", "digits-words", "--resume", "--restart"), "--resume and --restart"),
        (("--map", "digits-words", "--seeds", "1,2"), "greedy"),
        (("--map", "digits-words", "--temp", "1", "--seeds", "1,1"), "--seeds: a seed"),
        (("--map", "digits-words", "--seeds", "x"), "'x'"),
        (("--map", "digits-words", "--seeds", "3-1"), "'3-1'"),
        (("--map", "digits-words", "--seeds", "0-99999"), "'0-99999'"),
        (("--map", "digits-words", "--neutral", "missing.txt"), "missing.txt: "),
        (("--map", "digits-words", "--no-controls", "--pairs", "p.jsonl"), "--pairs is for"),
        (("--map", "digits-words", "--no-controls", "--control-draws", "9"), "--control-draws is for"),
        (("--map", "digits-words", "--pairs", "missing.jsonl"), "missing.jsonl"),
        (("--map", "digits-words", "-c", "12"), "n_ctx is 12; raise it (-c "),
        (("--map", "digits-words", "--bias", "x.gguf"), "--bias and --map"),
    ],
)
def test_what_is_wrong_is_reported_before_long_work(
    tmp_path: Path, no_model: None, words: tuple[str, ...], message: str
) -> None:
    done = evaluated(tmp_path / "out", *words)
    assert done.exit_code in (1, 2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stdout == ""


def test_folders_that_cannot_be_written(tmp_path: Path, no_model: None) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "taken" / "report.md").mkdir(parents=True)
    for out, message in (
        (tmp_path / "file", f"{tmp_path / 'file'}: is a file"),
        (tmp_path / "no" / "out", f"{tmp_path / 'no' / 'out'}: "),
        (tmp_path / "taken", "report.md: "),
    ):
        done = evaluated(out, "--map", "digits-words")
        assert done.exit_code == 2
        assert message in done.stderr


def test_other_models(tmp_path: Path, random_model: Callable[..., Path], no_model: None) -> None:
    from tests.support.random_models import OLMOE

    done = evaluated(tmp_path, "--map", "digits-words", "--task", "builtin:digits-words", model=random_model(OLMOE))
    assert done.exit_code == 1
    assert "digits-words.json: " in done.stderr
    done = evaluated(tmp_path, "--map", "digits-words", model=tmp_path / "missing.gguf")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")


def test_no_experts(tmp_path: Path, no_model: None) -> None:
    from tests.support.builders import write_gguf

    path = write_gguf(tmp_path / "dense.gguf", "llama", {"llama.block_count": 1, "llama.context_length": 64}, {})
    done = evaluated(tmp_path / "out", "--map", "digits-words", model=path)
    assert done.exit_code == 1
    assert "Mixture-of-Experts" in done.stderr


#
# what the commands share
#


def setup_of(*words: str, without: tuple[str, ...] = ()) -> Any:
    """The setup that a command of its own gets."""
    found: list[Any] = []

    @click.command("own", context_settings={"obj": None})
    @evaluation_options(without=without)
    @click.option("--activate", "counts", default="1,2")
    def own(setup: EvaluationSetup, counts: str) -> None:
        found.append((setup, counts))

    done = CliRunner().invoke(own, words, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return found[0]


def test_a_command_with_options_of_its_own() -> None:
    words = ("-m", "tiny", "--map", "digits-words", "--reverse", "--activate", "0,5", *FEW)
    setup, counts = setup_of(*words, without=("activate", "deactivate", "output", "resume", "restart"))
    assert counts == "0,5"
    assert (setup.steering_flags.activate, setup.steering_flags.deactivate, setup.output) == (None, None, None)
    steering = setup.map_steering
    assert (steering.activate, steering.deactivate, steering.reverse) == (2, 4, True)
    assert setup.settings.n_parallel == 16
    assert setup.task.name == "digits-words"
    assert setup.guards[0] is None
    assert setup.command.endswith("--threads 1 --activate 0,5")
    with setup.evaluator() as evaluator:
        assert evaluator.metadata == setup.metadata
        assert len(evaluator.measure([None])[0].answers) == 4


def test_what_a_command_leaves_out() -> None:
    setup, _ = setup_of("-m", "tiny", "--map", "digits-words", without=("activate", "output", "benign_name", "seeds"))
    assert setup.guards[0] is None, "no option for benign prompts, no benign prompts"
    assert (setup.settings.seeds, setup.output) == ((0,), None)


def test_numbers_and_seeds() -> None:
    setup, _ = setup_of(
        *("-m", "tiny", "--map", "digits-words", "-o", "x", "--temp", "0.5", "--seeds", "1,4-6", "--seed", "9"),
        *("--n-text", "0", "-np", "3", "-n", "7", "-c", "0", "--thinking", "--chat-template-kwargs", '{"a": 1}'),
        without=("activate",),
    )
    assert setup.settings.seeds == (1, 4, 5, 6)
    assert setup.settings.sampling.temperature == 0.5
    assert (setup.seed, setup.settings.n_text, setup.settings.n_parallel) == (9, None, 3)
    assert len(setup.task.items) == 7
    assert setup.settings.n_ctx == setup.facts.context_length
    assert setup.settings.template_arguments == {"a": 1}
    assert "--seeds 1,4,5,6" in setup.command
    assert "--chat-template-kwargs '{\"a\": 1}'" in setup.command
    assert "--thinking" in setup.command


def test_a_token_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    setup, _ = setup_of("-m", "tiny", "-hft", "geheim", "--map", "digits-words", "-o", "x", without=("activate",))
    assert "geheim" not in setup.command
    assert "-o OUT" in setup.command


def test_bias_files_have_no_map(tmp_path: Path, tiny_path: Path) -> None:
    bias = Steering.open(map_file=map_path("digits-words"), activate=2).build()
    assert isinstance(bias, BiasFile)
    write_bias(bias, tmp_path / "b.gguf")
    words = ("-m", "tiny", "--bias", str(tmp_path / "b.gguf"), "--task", "builtin:digits-words", "-o", "x")
    setup, _ = setup_of(*words, without=("activate",))
    assert setup.steering.bias is not None
    with pytest.raises(UsageError, match="from a map"):
        _ = setup.map_steering
