"""The command line: results on stdout, one-line errors, exit statuses, JSON, and a page of help that is up to date."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local import BiasFile, ExpertMap, RoutingCounts, read_bias, write_bias
from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviours
from tests.support.held import HELD, hold, patience
from tests.support.pages import load_generate
from tests.support.paths import ROOT

PAIRS = ROOT / "examples" / "pairs" / "numbers.jsonl"


def run(*args: Any, **kwargs: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args], **kwargs)


@pytest.fixture(scope="module")
def digits_map(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The way of the README, once: a map of the embedded model."""
    folder = tmp_path_factory.mktemp("cli")
    pairs = next(b.pairs for b in behaviours() if b.name == "digits-words")
    result = run(
        "detect", "-m", "tiny", "--pairs", pairs, "-o", folder / "m.json", "--counts", folder / "c.npz", "--json"
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["n_pairs"] == len(pairs.read_text().splitlines())
    assert data["n1"] == RoutingCounts.load(folder / "c.npz").n1
    return folder / "m.json"


def test_info_names_gating_and_experts() -> None:
    result = run("info", "tiny", "--json")
    data = json.loads(result.stdout)
    assert data["architecture"] == "olmoe"
    assert data["gating"] == "softmax"
    assert data["moe_layers"] == list(range(data["n_layer"]))
    assert "steerable" in run("info", "tiny").stdout


def test_map_show(digits_map: Path) -> None:
    result = run("map", "show", digits_map, "-n", 3, "--json")
    data = json.loads(result.stdout)
    top = [(entry["layer"], entry["expert"], entry["rd"]) for entry in data["top"]]
    assert top == ExpertMap.load(digits_map).top(3)
    assert run("map", "show", digits_map).stdout.count("\n") > 20


def test_bias_build_writes_what_choose_chooses(digits_map: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.gguf"
    result = run(
        "bias", "build", digits_map, "-o", out, "--activate", 3, "--deactivate", 4, "--reverse", "--layers", "1-2"
    )
    assert result.exit_code == 0, result.output
    expected = ExpertMap.load(digits_map).choose(3, 4, reverse=True, layers=(1, 2))
    assert (read_bias(out).signs == expected).all()
    shown = json.loads(run("bias", "show", out, "--json").stdout)
    assert (shown["n_active"], shown["n_inactive"]) == ((expected > 0).sum(), (expected < 0).sum())
    assert json.loads(shown["provenance"]["choice"])["reverse"] is True


def test_bias_show_of_capped_files(digits_map: Path, tmp_path: Path) -> None:
    expert_map = ExpertMap.load(digits_map)
    for cap, shown, text in ((1.5, 1.5, "cap 1.5"), (float("inf"), "inf", "cap inf")):
        write_bias(BiasFile.from_capped(expert_map.choose(2, 2), expert_map.identity, cap), tmp_path / "b.gguf")
        facts = json.loads(run("bias", "show", tmp_path / "b.gguf", "--json").stdout)
        assert (facts["mode"], facts["cap"]) == ("capped", shown)
        assert f"capped, {text}, epsilon 0.01" in run("bias", "show", tmp_path / "b.gguf").stdout


def test_soft_bias_has_the_strength(digits_map: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.gguf"
    choice = ("bias", "build", digits_map, "-o", out, "--deactivate", 4)
    for flags in (("--strength", "2.5"), ("--scale", "2.5")):  # the second is the name of older releases
        assert run(*choice, "--mode", "soft", *flags).exit_code == 0
        assert read_bias(out).mode == "soft"
        assert sorted({float(v) for v in read_bias(out).dense().ravel()}) == [-2.5, 0.0]
    for name in ("STEERMOE_STRENGTH", "STEERMOE_SCALE", "STEERMOE_BIAS_BUILD_SCALE"):
        assert run(*choice, "--mode", "soft", env={name: "3"}).exit_code == 0
        assert float(read_bias(out).dense().min()) == -3
        # a default of `run` and `chat` is no wish for the soft rule here
        assert run(*choice, env={name: "3"}).exit_code == 0
        assert read_bias(out).mode == "hard"


def test_run_is_steered_by_option_and_by_environment(digits_map: Path, tmp_path: Path) -> None:
    answers = {}
    for name, flags in (("digits", []), ("words", ["--reverse"])):
        out = tmp_path / f"{name}.gguf"
        run("bias", "build", digits_map, "-o", out, "--activate", 8, "--deactivate", 8, *flags)
        arguments = ["run", "-m", "tiny", "--temp", 0, "-n", 16, "-p", "Which number comes after three?"]
        answers[name] = run(*arguments, "--bias", out).stdout
        assert run(*arguments, env={"STEERMOE_BIAS": str(out)}).stdout == answers[name]
        data = json.loads(run(*arguments, "--bias", out, "--json").stdout)
        assert data["text"].strip() == answers[name].strip()
        assert data["steering"]["n_inactive"] == read_bias(out).n_inactive
    assert answers["digits"].strip().isdigit()
    assert answers["words"].strip().isalpha()


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["info", "missing.gguf"], 1, "missing.gguf"),
        (["info", str(PAIRS)], 1, "GGUF"),
        (["detect", "-m", "tiny", "--pairs", "none.jsonl", "-o", "m.json"], 1, "none.jsonl"),
        (["detect", "-m", "none.gguf", "--pairs", str(PAIRS), "-o", "m.json"], 1, "none.gguf"),
        (["detect", "-m", "tiny", "--pairs", str(PAIRS), "-o", "m.json", "-c", "4"], 1, "-c"),
        (["detect", "-m", "tiny", "--pairs", str(PAIRS), "-o", "no/folder/m.json"], 2, "create it first"),
        (["map", "show", str(PAIRS)], 1, "not an expert map"),
        (["bias", "show", str(PAIRS)], 1, "GGUF"),
        (["run", "-m", "tiny", "-p", "x", "--bias", str(PAIRS)], 1, "GGUF"),
        (["run", "-m", "tiny", "-p", "x", "--temperatur", "0"], 2, "no such option"),
        (["run", "-m", "tiny", "-p", "x", "--raw", "-sys", "y"], 2, "--raw"),
        (["run", "-m", "tiny", "-p", "long " * 300, "-c", "64"], 2, "raise it (-c "),
    ],
)
def test_errors_are_one_line_with_a_status(
    arguments: list[str], status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert result.exit_code == status, result.output
    assert words in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not any(tmp_path.iterdir()), "a failed command must leave no file"
    if result.stderr.startswith("error:"):
        assert result.stderr.count("\n") == 1


def test_bias_build_refuses_what_makes_no_sense(digits_map: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.gguf"
    for flags, words in (
        ([], "--activate"),
        (["--deactivate", 1, "--strength", 2], "--strength"),
        (["--deactivate", 1, "--mode", "soft", "--epsilon", 1], "--epsilon"),
        (["--deactivate", 1, "--layers", "7-3"], "layers"),
    ):
        result = run("bias", "build", digits_map, "-o", out, *flags)
        assert result.exit_code == 2, flags
        assert words in result.stderr
    assert not out.exists()


def test_map_of_another_model_is_refused(digits_map: Path, tmp_path: Path) -> None:
    text = digits_map.read_text()
    digest = json.loads(text)["model"]["router_sha256"]
    (tmp_path / "other.json").write_text(text.replace(digest, "0" * 64))
    bias = tmp_path / "other.gguf"
    assert run("bias", "build", tmp_path / "other.json", "-o", bias, "--deactivate", 1).exit_code == 0
    arguments = ["run", "-m", "tiny", "-p", "x", "-n", 1, "--temp", 0, "--bias", bias]
    result = run(*arguments)
    assert result.exit_code == 1
    assert "made for olmoe" in result.stderr
    assert run(*arguments, "--force").exit_code == 0


def test_the_installed_program_survives_a_closed_pipe(digits_map: Path) -> None:
    program = Path(sys.executable).with_name("steermoe")
    shell = f"'{program}' map show '{digits_map}' -n 120 | head -n 1"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert result.stdout.startswith("behaviour")
    assert "Traceback" not in result.stderr


def test_every_command_has_help_with_an_example() -> None:
    def walk(command: Any, path: list[str]) -> None:
        result = run(*path, "--help")
        assert result.exit_code == 0
        if hasattr(command, "commands"):
            for name, sub in command.commands.items():
                walk(sub, [*path, name])
        else:
            assert "Example" in result.output, path

    walk(main, [])


def test_the_generated_page_is_up_to_date() -> None:
    assert (ROOT / "docs" / "cli.md").read_text("utf-8") == load_generate().render(), "run make docs"


def test_ctrl_c_ends_long_work_with_one_line(tmp_path: Path) -> None:
    command = [*HELD, "demo", "--full", "-o", str(tmp_path / "out")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=os.environ | hold(answers=1), **pipes) as process:  # type: ignore[call-overload]
        patience(process, lambda: list(tmp_path.glob("out/*.map.json")))  # it is at work
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert [line for line in err.splitlines() if not line.startswith("demo: ")] == ["error: interrupted"]
    assert out == ""
    assert not list(tmp_path.glob("out/*.tmp")), "a half-written file stayed"
