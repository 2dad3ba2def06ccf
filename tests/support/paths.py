"""Where things are in the source tree."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "native"
GOLDEN = ROOT / "tests" / "golden"
DATA = ROOT / "tests" / "data"
