"""The end of the process after a signal, whatever its threads are doing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import TracebackType

import psutil

from .._util.windows import STOP_SIGNALS

STOPPED = 130
"""The exit status of a server that did not end in order: a second signal, one while it loads, or its deadline."""


def end_now() -> None:
    """End the process and its children."""
    with contextlib.suppress(psutil.Error, OSError):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error, OSError):
                child.kill()
    os._exit(STOPPED)


class StopDeadline:
    """Ends the process `seconds` after its first SIGINT or SIGTERM, and at once at the second.

    A thread of its own waits for the signals: Python runs its handlers in the main thread only, which may be busy. It
    needs Python's lock, so a single call of C code that keeps it delays the end.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._signalled = False

    def __enter__(self) -> StopDeadline:
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # Windows: asyncio's loop needs it for itself; there the handler of the main thread must do.
        self._before = -1
        if sys.platform != "win32":
            self._before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, name="steermoe-stop", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._signalled:
            return  # the deadline holds until the process has ended
        if sys.platform != "win32":
            signal.set_wakeup_fd(self._before)
        self._write.close()  # ends the thread

    def noticed(self, sig: int) -> None:
        """Tell of a signal that the handler of the main thread has got (Windows)."""
        if sys.platform == "win32":
            self._write.send(bytes([sig]))

    def _wait(self) -> None:
        ends: float | None = None
        while True:
            self._read.settimeout(None if ends is None else max(0.001, ends - time.monotonic()))
            try:
                found = self._read.recv(64)
            except TimeoutError:
                end_now()
            if not found:
                self._read.close()
                return
            for _ in (one for one in found if one in STOP_SIGNALS):
                if ends is not None:
                    end_now()
                ends, self._signalled = time.monotonic() + self._seconds, True
