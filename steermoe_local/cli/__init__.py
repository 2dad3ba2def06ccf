"""The command line, `steermoe`. Parsing and printing only; everything else is in the package.

Imports: every folder of the package; nothing imports it.
Public: `main`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .group import main

__all__ = ["main"]


def __getattr__(name: str) -> Any:
    # When it is asked for: `start` shows an interrupt or an error while the commands are imported as one line.
    if name == "main":
        from .group import main

        return main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
