"""The command line of this package as a child process (`children.Child`): `run_program` is its function.

The words of the command line come by stdin, as one line of JSON, so that no other user of the machine reads them in the
list of processes, and a text among them has no effect on how the child is started.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

_ROOT = __name__.partition(".")[0]
_MOST_BYTES = 1 << 20  # of the words


def program_input(words: list[str]) -> bytes:
    """What is written to the child's stdin, which is closed then."""
    data = json.dumps(words).encode("ascii") + b"\n"
    if len(data) > _MOST_BYTES:
        raise ValueError("too many words for a command line")
    return data


def run_program() -> int:
    """Run `steermoe` with the words of stdin; returns its exit status."""
    words = json.loads(sys.stdin.buffer.readline(_MOST_BYTES + 1))
    _load_package()
    sys.argv = ["steermoe", *words]
    try:
        runpy.run_module(_ROOT, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _load_package() -> None:
    """Run the package's `__init__`, which a child leaves out: the command line imports from it."""
    path = list(sys.modules[_ROOT].__path__)
    spec = importlib.util.spec_from_file_location(_ROOT, Path(path[0]) / "__init__.py", submodule_search_locations=path)
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[_ROOT] = package
    spec.loader.exec_module(package)
