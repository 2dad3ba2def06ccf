"""Takes the current folder off the import path: downloads lie there, and they are not trusted.

Imports only what Python has loaded before: anything else could come from there.
"""

import os
import sys


def is_current_folder(entry: str) -> bool:
    """Whether an entry of the import path is the current folder; "" is."""
    try:
        return not entry or os.path.samefile(entry, os.curdir)
    except (OSError, ValueError):
        return False


def leave_current_folder() -> None:
    """Take the current folder off this process's import path, where it stands before the standard library.

    It is there under `python -m` and `python -c`, and by an empty or relative entry of PYTHONPATH. It stays where
    PYTHONPATH names it by its absolute path, and where Python itself put it (site-packages).
    """
    named: list[str] = []
    if not sys.flags.ignore_environment:
        named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    library = os.path.dirname(os.__file__)
    end = sys.path.index(library) if library in sys.path else len(sys.path)
    kept = [entry for entry in sys.path[:end] if not is_current_folder(entry)]
    wanted = [entry for entry in named if os.path.isabs(entry) and is_current_folder(entry)]
    sys.path[:end] = [*kept, *wanted[:1]]


def leave_it_as_program() -> None:
    """The same before anything else is imported, where this process is `steermoe` or `python -m steermoe_local`."""
    first = sys.argv[0] if getattr(sys, "argv", None) else ""
    by_module = first == "-m" and any(
        (flag, name) == ("-m", __name__.partition(".")[0])
        for flag, name in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    )
    if by_module or os.path.splitext(os.path.basename(first))[0].removesuffix("-script") == "steermoe":
        leave_current_folder()
