"""The command line, `steermoe`. Parsing and printing only; everything else is in the package.

Imports: every folder of the package; nothing imports it.
Public: `main`.
"""

from __future__ import annotations

from .group import main

__all__ = ["main"]
