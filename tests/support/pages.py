"""Runs what a page of the documentation shows, as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(command: list[str], folder: Path) -> str:
    """What a command prints in `folder`, with this environment's programs before others; it must end with status 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
