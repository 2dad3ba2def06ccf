"""A clock of seconds in which this process ran: it stands still while the process is stopped (SIGSTOP, Ctrl-Z)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_EVERY = 0.05  # seconds between two looks
_STOPPED = 0.5  # a look that comes so much later was not made by a process that ran


class RunningClock:
    """A context manager, and a function that returns seconds, as `time.monotonic` does.

    Inside the block a thread looks at the clock at short intervals. A gap between two looks is time in which none of
    the process's threads ran, and is left out. Gaps of less than half a second count as time that passed.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._seen = now()
        self._left_out = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._look, name="steermoe-clock", daemon=True)

    def __enter__(self) -> RunningClock:
        self._seen = self._now()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    def __call__(self) -> float:
        with self._lock:
            now = self._now()
            if self._thread.is_alive():
                gap = now - self._seen
                if gap > _STOPPED:
                    self._left_out += gap - _EVERY
                self._seen = now
            return now - self._left_out

    def _look(self) -> None:
        while not self._end.wait(_EVERY):
            self()
