"""Windows programs of a cross-build, run by wine without a display (make test-windows)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT

BUILD = Path(os.environ.get("STEERMOE_WINDOWS_BUILD", ROOT / "build" / "windows"))
"""The cross-build: bin/ has llama.cpp's programs and all DLLs, tests/ those of tests/native."""
SECONDS = 240.0


def seen(path: Path) -> str:
    """A path as Windows programs see it: wine has the root folder as drive Z."""
    return "Z:" + str(path.resolve()).replace("/", "\\")


@cache
def _environment() -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in ("DISPLAY", "WAYLAND_DISPLAY", "STEERMOE_BIAS")
    }
    return kept | {
        "WINEPREFIX": str(BUILD / "prefix"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # wine would ask for installers of its own
        "WINEPATH": seen(BUILD / "bin"),  # for the programs of tests/
        "LC_ALL": "C.UTF-8",  # of the names of files
        "TERM": "xterm",
    }


def environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a Windows program."""
    return _environment() | dict(env or {})


def command(program: str, *arguments: Any) -> list[str]:
    """The words that run NAME.exe of bin/ or tests/."""
    folder = next((folder for folder in (BUILD / "bin", BUILD / "tests") if (folder / f"{program}.exe").exists()), None)
    assert folder is not None, f"{program}.exe is not built: make test-windows"
    return ["wine", str(folder / f"{program}.exe"), *(seen(a) if isinstance(a, Path) else str(a) for a in arguments)]


def wine(program: str, *arguments: Any, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[bytes]:
    """Run a program to its end; paths among its arguments become Windows'."""
    return subprocess.run(
        command(program, *arguments),
        env=environment(env),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
