"""`steermoe serve` as a process of its own, and what the system says of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support.running_server import until

COMMAND = [sys.executable, "-c", "from steermoe_local.cli import main; main()", "serve"]
_URL = re.compile(r"http://\S+:\d+")


@dataclass
class Process:
    """A server in a process, and a client of it."""

    url: str
    client: httpx.Client
    process: subprocess.Popen[bytes]

    @property
    def address(self) -> tuple[str, int]:
        """(host, port)."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def health(self) -> tuple[int, int]:
        """(busy sequences, waiting requests)."""
        found = self.client.get("/health").json()
        return found["slots"]["busy"], found["waiting"]

    def idle(self) -> bool:
        """Does nothing run or wait?"""
        return self.health() == (0, 0)

    def cpu_seconds(self) -> float:
        """What the process has computed so far, whatever else the machine does."""
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def system(self) -> dict[str, int]:
        """What Linux says: resident memory and its peak in KiB, threads, open files."""
        folder = Path(f"/proc/{self.process.pid}")
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        numbers = {name: int(fields[field].split()[0]) for name, field in _FIELDS.items()}
        return numbers | {"files": len(list((folder / "fd").iterdir()))}


_FIELDS = {"memory": "VmRSS", "peak": "VmHWM", "threads": "Threads"}


@contextmanager
def serving(
    *arguments: Any,
    model: Any = "tiny",
    parallel: int = 4,
    n_ctx: int = 512,
    queue: int = 512,
    command: Sequence[str] = COMMAND,
    stopped: bool = False,
) -> Iterator[Process]:
    """Serve a model until the block ends; it must end well, then, and have written no traceback.

    With `stopped` the block ends the server.
    """
    command = [*command, "-m", model, "--port", 0, "-t", 1, "-np", parallel, "-c", n_ctx, "--queue", queue, *arguments]
    with tempfile.TemporaryFile("w+") as log:

        def written() -> str:
            log.seek(0)
            return log.read()

        with subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=log) as process:
            try:
                until(lambda: process.poll() is not None or _URL.search(written()), seconds=60)
                found = _URL.search(written())
                assert found, written()
                with httpx.Client(base_url=found[0], timeout=60, trust_env=False) as client:
                    yield Process(found[0], client, process)
                if not stopped:
                    assert process.poll() is None, f"the server died: {written()[-2000:]}"
                    process.terminate()
                    process.wait(30)
            finally:
                process.kill()
        assert process.returncode == 0, written()[-2000:]
        assert "Traceback" not in written(), written()[-4000:]
