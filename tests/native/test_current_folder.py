"""What is built loads no library of the current folder: llama.cpp's programs neither."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.planted import LIBRARIES, plant, traces

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="traps are made for Linux")


def test_programs(tool: Any, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-bench asks for every backend there could be, and links libgomp."""
    monkeypatch.chdir(plant(tmp_path / "current", libraries=LIBRARIES))
    done = tool("llama-bench", "-m", tiny_path, "-p", 4, "-n", 1, "-r", 1, "-t", 1)
    assert traces(tmp_path) == []
    assert done.returncode == 0, done.stderr


def test_the_traps_are_libraries(tmp_path: Path) -> None:
    folder = plant(tmp_path / "current", libraries=LIBRARIES)
    for name in LIBRARIES:
        code = f"import ctypes; ctypes.CDLL({str(folder / name)!r})"
        subprocess.run([sys.executable, "-I", "-c", code], check=True)
    assert traces(tmp_path) == list(LIBRARIES)
