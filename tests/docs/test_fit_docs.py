"""The blocks of docs/fit.md run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from steermoe_local.steering.bias_file import read_bias
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "fit.md").read_text("utf-8")


def run(language: str, command: list[str], folder: Path) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    done = subprocess.run(
        [*command, found], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_blocks_run(tmp_path: Path) -> None:
    shown = run("sh", ["bash", "-euo", "pipefail", "-c"], tmp_path)
    assert shown.strip().splitlines()[-1].strip().isdigit()
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.jsonl", "causes.json", "digits.gguf"}
    change, kl = map(float, run("python", [sys.executable, "-c"], tmp_path).split())
    assert change > 0
    assert 0 <= kl < 1
    assert {read_bias(tmp_path / name).mode for name in ("digits.gguf", "start.gguf")} == {"soft"}
