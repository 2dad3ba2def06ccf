"""A process in the place of `steermoe learn`, which says and does what a test tells it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import IO, Any

from tests.support.running_server import until

# Obeys lines of stdin: what to write where, and how to end.
_PROGRAM = """
import json, os, sys
for line in sys.stdin:
    order = json.loads(line)
    if "err" in order:
        os.write(2, order["err"].encode("latin-1"))
    if "out" in order:
        os.write(1, order["out"].encode())
    if "exit" in order:
        os._exit(order["exit"])
"""
WORKS = {"outcome": "works", "verdict": "works: held out 31% -> 84% formal; random experts 6 points"}
DID_NOT = {"outcome": "did not work", "verdict": "did not work: random experts do as much"}


class FakeLearner:
    """Starts such processes (`start`), and tells the last one what to do."""

    def __init__(self) -> None:
        self.started: list[list[str]] = []
        self.pairs: list[str] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, words: Sequence[str], stdout: IO[bytes]) -> subprocess.Popen[bytes]:
        """As `learn_jobs.start_learning`."""
        for word in words:
            if word.startswith("--pairs="):
                with open(word.removeprefix("--pairs="), encoding="utf-8") as file:
                    self.pairs.append(file.read())
        pipe = subprocess.PIPE
        process = subprocess.Popen([sys.executable, "-c", _PROGRAM], stdin=pipe, stdout=stdout, stderr=pipe)
        self.processes.append(process)
        self.started.append(list(words))
        return process

    def wait_for(self, n: int = 1) -> None:
        """Wait until so many were started in all."""
        until(lambda: len(self.started) >= n)

    def tell(self, **order: Any) -> None:
        """Give the last one an order: err, out, exit."""
        stdin = self.processes[-1].stdin
        assert stdin is not None
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()

    def say(self, step: str, done: int = 0, total: int = 0, elapsed: float = 1.0, expected: float = 60.0) -> None:
        """Write an event of progress."""
        event = {"step": step, "done": done, "total": total, "elapsed": elapsed, "expected": expected}
        self.tell(err=json.dumps(event) + "\n")

    def end(self, result: Any = WORKS, status: int = 0) -> None:
        """Write the result and end."""
        self.tell(out=json.dumps(result), exit=status)

    def close(self) -> None:
        """End all."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stderr):
                if pipe is not None:
                    pipe.close()
