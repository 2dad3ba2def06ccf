"""Commands on a model whose chat template takes all time, all memory, or is none: one line, and Ctrl-C ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from steermoe_local.llama.template_pool import SECONDS_VARIABLE
from tests.support.gguf_copy import copy_model
from tests.support.hostile_templates import FOREVER, LARGE, UNREADABLE
from tests.support.paths import ROOT

pytest.importorskip("resource", reason="this system limits no CPU time and memory")

PROGRAM = [sys.executable, "-c", "from steermoe_local.cli import main; main()"]
PAIRS = ROOT / "examples" / "pairs" / "numbers.jsonl"
TEMPLATES = {"time": FOREVER, "memory": LARGE["lists doubled"], "reading": UNREADABLE["a long and"], "none": "{{ x "}
COMMANDS = {
    "run": ("run", "-p", "one", "-n", "2"),
    "chat": ("chat",),
    "pairs check": ("pairs", "check", PAIRS),
    "detect": ("detect", "--pairs", PAIRS, "-o", "map.json"),
    "eval": ("eval", "--map", "digits-words", "-n", "2", "-o", "eval"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bombs")
    return {
        name: copy_model(tiny_path, folder / f"{name}.gguf", template=template)[0]
        for name, template in TEMPLATES.items()
    }


def steermoe(folder: Path, *arguments: object, seconds: int = 1) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), SECONDS_VARIABLE: str(seconds)}
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], cwd=folder, env=environment, input="Hi.\n", capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("command", "kind"),
    [*((command, "time") for command in COMMANDS), ("run", "memory"), ("run", "reading"), ("run", "none")],
)
def test_commands(command: str, kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    name, *arguments = COMMANDS[command]
    where = [name] if name != "pairs" else [name, arguments.pop(0)]
    seconds = 60 if kind == "memory" else 1  # on a slow machine, too, memory is what it runs out of
    done = steermoe(tmp_path, *where, *arguments, "-m", models[kind], seconds=seconds)
    assert done.returncode in (1, 2) or command == "chat", done.stderr
    said = done.stderr + done.stdout
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "chat template" in line]
    assert lines, said
    words = {"time": "too long", "memory": "too much memory", "reading": "chat template", "none": "cannot be read"}
    assert all(words[kind] in line for line in lines), lines
    assert any("--raw" in line for line in lines)


@pytest.mark.parametrize("kind", TEMPLATES)
def test_info(kind: str, models: dict[str, Path], tmp_path: Path) -> None:
    """It reads the template, and renders nothing."""
    done = steermoe(tmp_path, "info", models[kind])
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.lstrip().startswith("chat template"))
    assert ("yes, but" in line) == (kind in ("reading", "none"))


@pytest.mark.parametrize("command", ["run", "detect"])
def test_ctrl_c(command: str, models: dict[str, Path], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), SECONDS_VARIABLE: "3600"}
    with subprocess.Popen(
        [*PROGRAM, *map(str, COMMANDS[command]), "-m", models["time"]],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        children: list[psutil.Process] = []
        # until a child works on the bomb: its start takes far less than a second of CPU time
        while not any(child.cpu_times().user > 2 for child in children):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
            children = psutil.Process(process.pid).children()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert err.endswith(b"error: interrupted\n")
    assert not psutil.wait_procs(children, timeout=60)[1]
