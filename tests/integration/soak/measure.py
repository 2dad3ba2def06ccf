"""What a server holds, by the system's own account: memory, descriptors, threads, children."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import asdict, dataclass

import psutil

MIB = 1 << 20


@dataclass(frozen=True)
class Held:
    """A process's resident memory (MiB), descriptors, threads and children, and their memory together."""

    memory: float
    files: int
    threads: int
    children: int
    of_children: float

    def beyond(self, before: Held, allowed: Held) -> dict[str, tuple[float, float]]:
        """{what: (before, now)} of what is more than it was by more than what is allowed."""
        then, now, most = asdict(before), asdict(self), asdict(allowed)
        return {name: (then[name], now[name]) for name in now if now[name] > then[name] + most[name]}


def held(pid: int) -> Held:
    """What a process holds now."""
    process = psutil.Process(pid)
    memory, children = process.memory_info().rss / MIB, process.children(recursive=True)
    of_children = 0.0
    for child in children:
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            of_children += child.memory_info().rss / MIB
    files = process.num_fds() if hasattr(process, "num_fds") else process.num_handles()
    return Held(round(memory, 1), files, process.num_threads(), len(children), round(of_children, 1))


# Python's default executor makes a thread when none is idle, up to this number, and keeps all.
EXECUTOR_THREADS = min(32, (os.cpu_count() or 1) + 4)


class Curve(threading.Thread):
    """What a process holds, once a second until `stop`."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._pid, self._stopped, self._begun = pid, threading.Event(), time.monotonic()
        self.points: list[tuple[float, Held]] = []

    def run(self) -> None:
        while not self._stopped.wait(1.0):
            with contextlib.suppress(psutil.Error):
                self.points.append((round(time.monotonic() - self._begun, 1), held(self._pid)))

    def stop(self) -> list[tuple[float, Held]]:
        """End it; (seconds, what was held)."""
        self._stopped.set()
        self.join()
        return self.points
