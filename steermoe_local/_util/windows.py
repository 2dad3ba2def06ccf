"""What Windows does otherwise than POSIX, in one place: names of devices, open files, signals, children, its shell.

Everything here works on every system; where it says Windows, other systems do what they always do. Modules ask
`sys.platform == "win32"`, which the type checker understands, never `os.name`.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from .file_kinds import StrPath

STOP_SIGNALS: tuple[int, ...] = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name)
)
"""Signals that ask a program to end; Ctrl-Break, and a console that is closed, send Windows' own."""

_DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_TRIES, _PAUSE = 50, 0.02  # a second in all
_IDLE = 10  # niceness from which on a child computes only where nobody else does


def is_device(name: str) -> bool:
    """Whether Windows takes a file of this name for a device, whatever its suffix."""
    return _DEVICES.fullmatch(name) is not None


def replace(source: StrPath, target: StrPath) -> None:
    """`os.replace`; on Windows, which replaces no file that is open, readers and virus scanners get a second to end.

    Raises OSError.
    """
    for _ in range(_TRIES if sys.platform == "win32" else 0):
        try:
            return os.replace(source, target)
        except PermissionError:
            time.sleep(_PAUSE)
    return os.replace(source, target)


def child_options(niceness: int | None) -> dict[str, Any]:
    """Options of `subprocess.Popen` on Windows: Ctrl-C does not reach the child, which gives way to other processes.

    Other systems have that otherwise (`children.Child`, `child_start`); {} there.
    """
    if sys.platform != "win32":
        return {}
    flags = subprocess.CREATE_NEW_PROCESS_GROUP
    if niceness is not None and niceness > 0:
        flags |= subprocess.IDLE_PRIORITY_CLASS if niceness >= _IDLE else subprocess.BELOW_NORMAL_PRIORITY_CLASS
    return {"creationflags": flags}


def as_typed(words: Sequence[str]) -> str:
    """Words as they are typed: for a POSIX shell, on Windows for its programs, which take double quotes alone."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
