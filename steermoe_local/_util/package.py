"""The folder of this package, with its data, libraries and maps."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
