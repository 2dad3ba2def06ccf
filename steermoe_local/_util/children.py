"""Child processes of this package: Python in isolated mode, which runs one function of the package.

A child (`Child`) is started when code must be killed when it takes too long, may abort its process, or needs limits;
a `Worker` is a child that is kept and answers requests. Nothing else of the package starts a Python.

- No code of the current folder runs in it, nor of folders in PYTHONPATH that the parent has imported nothing from, nor
  anything else that PYTHON* variables name: it is `python -I`, and gets the import path from the parent. The standard
  library comes first in it. It finds the package where the parent has it: installed, for the user, editable, or a
  source tree.
- It ends when its parent ends, however that ends.
- Its limits are set by itself, after its imports; where the system lacks them (Windows; macOS the one of memory), the
  parent's deadline remains.

A Python that cannot start without PYTHONHOME has no children.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import json
import os
import signal
import site
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import NativeError
from .child_start import READY
from .import_path import is_current_folder
from .package import PACKAGE
from .windows import child_options

_ROOT = __name__.partition(".")[0]
_START_SECONDS = 60.0  # until a child has imported its function
_OUT_OF_CPU = int(getattr(signal, "SIGXCPU", -1 << 31))  # Windows has no such limit
_START = Path(__file__).with_name("child_start.py")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a child may take; None for no limit.

    memory: bytes of address space beyond what its imports take. cpu_seconds: CPU time, of a `Worker` for each request.
    file_bytes: size of each file that it writes. niceness: how far it gives way to other processes for the CPUs.
    """

    memory: int | None = None
    cpu_seconds: int | None = None
    file_bytes: int | None = None
    niceness: int | None = None


class Child(subprocess.Popen[bytes]):
    """A process that calls `function(*arguments)`, a function of a module of this package, and exits with its result.

    The arguments are JSON values. stdin and stdout are the null device unless others are given; stderr is the parent's.
    Ctrl-C does not reach it. `leftover`: a file that it removes when its parent ends before it; the function must then
    not hold Python's lock for long.

    Raises NativeError when no Python can be started.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any] = (),
        *,
        limits: Limits | None = None,
        stdin: int | IO[bytes] = subprocess.DEVNULL,
        stdout: int | IO[bytes] = subprocess.DEVNULL,
        stderr: int | IO[bytes] | None = None,
        leftover: Path | None = None,
        _answers: bool = False,
    ) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise NativeError("no Python to start a child process with (sys.executable); install the package with pip")
        order = import_order() | {
            "module": function.__module__,
            "function": function.__qualname__,
            "arguments": list(arguments),
            "answers": _answers,
            "limits": dataclasses.asdict(limits or Limits()),
            "parent": os.getpid(),
            "leftover": None if leftover is None else os.path.abspath(leftover),
        }
        with _lifeline() as (theirs, ours):
            options = child_options(limits.niceness if limits else None)
            if theirs is not None:
                options |= {"pass_fds": [theirs], "process_group": 0}
            super().__init__(
                [*_command(), json.dumps(order | {"lifeline": theirs})],
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                **options,
            )
            # the descriptor is this object's from here on
            self.let_go = weakref.finalize(self, _close, ours)

    def end(self) -> None:
        """Kill it, if it runs, wait, and close the pipes."""
        self.kill()
        try:
            with self:
                pass
        except BrokenPipeError:  # what it was sent and did not read any more
            self.let_go()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self.let_go()


class ChildError(Exception):
    """A worker gave no answer: it took too long (`timed_out`), or it ended.

    It ends by its limits (`out_of_cpu`: that of CPU time), by an error in its function, or because it was interrupted.
    """

    def __init__(self, timed_out: bool, out_of_cpu: bool = False) -> None:
        super().__init__("took too long" if timed_out else "ended without an answer")
        self.timed_out = timed_out
        self.out_of_cpu = out_of_cpu


class Worker:
    """A child that is started when it is first needed, kept, and answers one request at a time.

    `function(*request)` runs in the child; request and result are JSON values. After a request without an answer the
    next one gets a new child. `most_bytes` is the length of the longest answer, as JSON.
    """

    def __init__(
        self, function: Callable[..., Any], limits: Limits | None = None, *, most_bytes: int = 64 << 20
    ) -> None:
        self._function = function
        self._limits = limits
        self._most_bytes = most_bytes
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._process_id = os.getpid()
        atexit.register(self.stop)

    def ask(self, *request: Any, seconds: float) -> Any:
        """The function's result.

        Raises ChildError when it does not come within `seconds` of the request, NativeError when no child can start.
        """
        line = json.dumps(request).encode("ascii") + b"\n"
        with self._lock:
            child = self._running()
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                with _killed_after(child, seconds) as late:
                    child.stdin.write(line)
                    child.stdin.flush()
                    answer = child.stdout.readline(self._most_bytes)
            except OSError:
                answer = b""
            except BaseException:  # an interrupt: the answer would be taken for the next one's
                self.stop()
                raise
            if late.is_set() or not answer.endswith(b"\n"):
                self.stop()
            if not answer.endswith(b"\n"):
                raise ChildError(late.is_set(), child.returncode == -_OUT_OF_CPU)
        return json.loads(answer)

    def start(self) -> None:
        """Start the child now, so that the first request need not wait for it. Raises NativeError."""
        with self._lock:
            self._running()

    def interrupt(self) -> None:
        """Kill the child from another thread than the one that waits for it, which gets ChildError."""
        child = self._child
        if child is not None:
            child.kill()

    def stop(self) -> None:
        """End the child; the next request starts another."""
        child, self._child = self._child, None
        if child is not None and self._process_id == os.getpid():
            child.end()

    def _running(self) -> Child:
        if self._process_id != os.getpid():  # after a fork the child is the other process's
            self._child, self._process_id = None, os.getpid()
        if self._child is None or self._child.poll() is not None:
            self.stop()
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            child = Child(self._function, limits=self._limits, stdin=pipe, stdout=pipe, stderr=null, _answers=True)
            self._child = child
            self._require_ready(child)
        return self._child

    def _require_ready(self, child: Child) -> None:
        """Wait until the child has imported its function. Raises NativeError if it cannot; no other child could."""
        assert child.stdout is not None
        try:
            with _killed_after(child, _START_SECONDS) as late:
                is_ready = child.stdout.readline(len(READY)) == READY
        except BaseException:
            self.stop()
            raise
        if is_ready:
            return
        self.stop()
        if child.returncode < 0 and not late.is_set():  # killed from outside
            raise ChildError(False)
        raise NativeError(
            f"no child process can be started for {self._function.__module__}: `{sys.executable} -I` does not run, or "
            "lacks modules; install the package again, without PYTHONHOME"
        )


@contextlib.contextmanager
def _killed_after(child: Child, seconds: float) -> Iterator[threading.Event]:
    """Kill the child if the block takes longer than `seconds`; the event tells whether that was done."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()


def import_order() -> dict[str, Any]:
    """What a child needs in order to import as this process does, without the current folder."""
    path = [entry for entry in sys.path if os.path.isabs(entry) and not is_current_folder(entry)]
    package = sys.modules.get(_ROOT)
    places = getattr(package, "__path__", [str(PACKAGE)])
    user_sites = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return {
        "package": _ROOT,
        "package_path": [os.path.abspath(place) for place in places],
        "path": path,
        "used": sorted(_used_entries().intersection(path)),
        "user_sites": [folder for folder in user_sites if os.path.isabs(folder) and not is_current_folder(folder)],
        "library": [sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), *_library_parts()],
    }


def _used_entries() -> set[str]:
    """Entries of the import path from which this process has imported something else than this package."""
    used: set[str] = set()
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is None or "." in name or name in (_ROOT, "__main__"):
            continue
        if spec.submodule_search_locations is not None:
            used.update(os.path.dirname(place) for place in list(spec.submodule_search_locations))
        elif spec.has_location and spec.origin:
            used.add(os.path.dirname(spec.origin))
    return used


def _library_parts() -> list[str]:
    """The standard library's archive and its folder of extension modules, as they stand on the import path."""
    return [
        entry
        for entry in sys.path
        if os.path.basename(entry) in ("lib-dynload", "DLLs")
        or (entry.endswith(".zip") and os.path.basename(entry).startswith("python"))
    ]


def _command() -> list[str]:
    """The interpreter in isolated mode, which drops PYTHON* variables, the user's site and the script's folder."""
    flags = ["-I", "-X", "utf8"]
    if sys.dont_write_bytecode:
        flags.append("-B")
    if sys.pycache_prefix:
        flags += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    return [sys.executable, *flags, str(_START)]


@contextlib.contextmanager
def _lifeline() -> Iterator[tuple[int | None, int | None]]:
    """The child's and the parent's end of a pipe that closes with the parent; none on Windows, which has handles."""
    if sys.platform == "win32":
        yield None, None
        return
    theirs, ours = os.pipe()
    try:
        yield theirs, ours
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(theirs)


def _close(descriptor: int | None) -> None:
    if descriptor is not None:
        with contextlib.suppress(OSError):
            os.close(descriptor)
