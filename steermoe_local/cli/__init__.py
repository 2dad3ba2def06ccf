"""The command line, `steermoe`. Parsing and printing only; everything else is in the package."""

from __future__ import annotations

from .group import main

__all__ = ["main"]
