"""The folder of this package, with its data, libraries and maps."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def away_from(name: str) -> Iterator[None]:
    """Be in another folder during the block, if there is a file `name` in the current one.

    For the import of libraries that read their configuration from the current folder.
    """
    if not os.path.lexists(name):
        yield
        return
    if sys.platform == "win32":
        back: str | int = os.getcwd()
    else:
        back = os.open(os.curdir, os.O_RDONLY)
    os.chdir(PACKAGE)
    try:
        yield
    finally:
        os.chdir(back)
        if isinstance(back, int):
            os.close(back)
