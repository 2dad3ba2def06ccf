"""The program of a child process that `children` starts: `python -I child_start.py JSON`.

It sets the import path that its parent names, ends when the parent ends, loads the function, applies limits, calls it.
Run as a script, before the package can be imported; so it imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import importlib.util
import json
import os
import signal
import site
import sys
import threading
from typing import Any

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment]

READY = b"ready\n"
"""What a child that answers writes first."""


def main(order: dict[str, Any]) -> int:
    """Carry out an order (`children.Child`). Returns the exit status."""
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which decides
    _end_with_parent(order["parent"], order["lifeline"], order["leftover"])
    sys.path[:] = _import_path(sys.path[:], order)
    _add_package(order["package"], order["package_path"])
    module = importlib.import_module(order["module"])
    function = getattr(module, order["function"])
    _apply(order["limits"])
    if order["answers"]:
        _answer(function, order["limits"]["cpu_seconds"])
        return 0
    return int(function(*order["arguments"]) or 0)


def _import_path(own: list[str], order: dict[str, Any]) -> list[str]:
    """The standard library, then the parent's path as far as it is safe, then what else this interpreter has.

    Nothing can shadow the standard library; of the rest, the parent's order decides which version is found.
    """
    for folder in order["user_sites"]:  # with their .pth files: editable installations
        site.addsitedir(folder)
    added = [entry for entry in sys.path if entry not in own]
    parent = order["path"]
    known = {*own, *added, *order["used"]}
    library = [entry for entry in own if entry in order["library"]]
    return list(dict.fromkeys([*library, *(entry for entry in parent if entry in known), *own, *added]))


def _add_package(name: str, path: list[str]) -> None:
    """Make the package importable wherever it lies, without its parent folder on the import path.

    Its `__init__` is not run: a child loads what its own module imports, not the whole public API.
    """
    spec = importlib.machinery.ModuleSpec(name, None, is_package=True)
    spec.submodule_search_locations = path
    sys.modules[name] = importlib.util.module_from_spec(spec)


def _end_with_parent(parent: int, lifeline: int | None, leftover: str | None) -> None:
    """End this process when the parent has ended, whatever it is doing, and however the parent ended.

    On POSIX `lifeline` is the read end of a pipe whose other end only the parent holds.
    """

    def wait() -> None:
        if lifeline is None:
            _wait_on_windows(parent)
        else:
            with contextlib.suppress(OSError):
                os.read(lifeline, 1)
        if leftover is not None:
            with contextlib.suppress(OSError):
                os.unlink(leftover)
        os._exit(1)

    if lifeline is not None and leftover is None and sys.platform == "linux":
        # a thread of Python does not run while an extension or `re` holds the lock, nor in a process that is stopped
        # (SIGSTOP); the kernel's signal comes anyway
        import fcntl

        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    threading.Thread(target=wait, daemon=True).start()  # also if the parent has ended already


def _wait_on_windows(parent: int) -> None:
    """Return when the process `parent` has ended. A child that holds Python's lock ends only when it gives it up."""
    if sys.platform == "win32":
        import _winapi

        with contextlib.suppress(OSError):
            handle = _winapi.OpenProcess(0x00100000, False, parent)  # SYNCHRONIZE
            _winapi.WaitForSingleObject(handle, _winapi.INFINITE)


def _apply(limits: dict[str, int | None]) -> None:
    """Set the limits that this system has; memory counts from what is in use now, after the imports."""
    if resource is None:
        return
    _limit("RLIMIT_CORE", 0)
    if limits["niceness"] is not None:
        os.nice(limits["niceness"])
    if limits["memory"] is not None:
        _limit("RLIMIT_AS", _address_space() + limits["memory"])
    _limit("RLIMIT_FSIZE", limits["file_bytes"])
    _allow_cpu(limits["cpu_seconds"])


def _limit(name: str, value: int | None) -> None:
    if value is None:
        return
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a limit that this system does not have
        number = getattr(resource, name)
        _, hard = resource.getrlimit(number)
        most = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (most, most))


def _allow_cpu(seconds: int | None) -> None:
    """Let this process take so much CPU time from now on; then the kernel ends it."""
    if seconds is None or resource is None:
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    with contextlib.suppress(OSError, ValueError):
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + 1 + seconds, hard))


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not say (then the limit counts from nothing)."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _answer(function: Any, cpu_seconds: int | None) -> None:
    """Answer every line of stdin, a JSON array of arguments, by a line of JSON."""
    # what a library prints must not stand between the answers
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    out.write(READY)
    out.flush()
    for line in sys.stdin.buffer:
        _allow_cpu(cpu_seconds)
        out.write(json.dumps(function(*json.loads(line))).encode("ascii") + b"\n")
        out.flush()


if __name__ == "__main__":
    status = main(json.loads(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # without waiting for the thread
