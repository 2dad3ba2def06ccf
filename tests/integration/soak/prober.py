"""How long /health takes, measured in a process of its own beside what the machine itself takes.

    python -m tests.integration.soak.prober URL=PID...     until its stdin is closed; then one JSON object on stdout

Every `PERIOD` a sample begins, whether or not the ones before are answered: a server that does not answer for a second
is seen by twenty samples. A sample asks each URL on a new connection. There are two controls of the machine's own
delays: at the same moment a server without work, of this module and in another process, is asked for an "ok"; and
Linux says for how long each thread of the asked server was ready to run and got no CPU (schedstat).

The rule (`Samples.late`): a sample is late if it took more than `LIMIT`, and by neither control the machine stopped for
more than half of its time. Then it was the server: it computed, or waited for its own locks. /health is held if at most
one sample of a hundred is late: its 99th percentile is below `LIMIT`, the machine's own stops apart. Nothing is
subtracted. Where the machine excuses more than `MOST_EXCUSED` of the samples, it stops so often that the others say
nothing of the server either (each of several threads waits for less than half): nothing is judged then.
On an idle machine with two cores the second control excuses nothing: a server whose threads wait for a CPU for half of
the time would need four busy ones, and it has two.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import socket
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PERIOD = 0.05
LIMIT = 0.1
MOST_EXCUSED = 0.05
_GIVEN_UP = 30.0
_ASK = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"


@dataclass
class Samples:
    """Samples of one URL, [start, seconds, status, no_cpu, cpu], and the other controls, [start, seconds], all in
    seconds; `no_cpu` is the longest that a thread got no CPU meanwhile, `cpu` what the main thread computed."""

    samples: list[tuple[float, float, int, float, float]] = field(default_factory=list)
    controls: list[tuple[float, float]] = field(default_factory=list)

    @property
    def late(self) -> list[tuple[float, float]]:
        """(start, seconds) of the samples that the server made wait for longer than `LIMIT`."""
        found = []
        for start, seconds, _, no_cpu, _ in self.samples:
            if seconds > LIMIT:
                # a control that began before may have run into it
                stops = [s for begun, s in self.controls if begun < start + seconds and begun + s > start]
                if max([no_cpu, *stops]) <= seconds / 2:
                    found.append((start, seconds))
        return found

    @property
    def excused(self) -> float:
        """The share of samples that took longer than `LIMIT` because of the machine."""
        return (sum(sample[1] > LIMIT for sample in self.samples) - len(self.late)) / max(1, len(self.samples))

    @property
    def is_judged(self) -> bool:
        """Whether the machine stopped so seldom that the samples say something of the server."""
        return self.excused <= MOST_EXCUSED

    @property
    def is_held(self) -> bool:
        """Whether the rule holds."""
        return bool(self.samples) and len(self.late) <= len(self.samples) / 100

    def report(self) -> dict[str, Any]:
        """Numbers in milliseconds."""
        own, control = [sample[1] for sample in self.samples], [s for _, s in self.controls]
        found: dict[str, Any] = {"samples": len(own), "statuses": sorted({sample[2] for sample in self.samples})}
        found |= _milliseconds(own)
        found |= {"late": len(self.late), "share excused by the machine": round(self.excused, 3)}
        for name, index in (("no cpu", 3), ("cpu", 4)):
            found[name] = _milliseconds([float(sample[index]) for sample in self.samples])
        return found | {"control": _milliseconds(control)}


def _milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    values = {"p50": cuts[49], "p99": cuts[98], "max": max(seconds)}
    return {name: round(1000 * value, 1) for name, value in values.items()}


def _say_ok(listening: socket.socket) -> None:
    """The control: a server without work, in a process."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    async def serve() -> None:
        server = await asyncio.start_server(answer, sock=listening)
        await server.serve_forever()

    asyncio.run(serve())


async def _ask(host: str, port: int) -> int:
    """The status of an answer, 0 for none."""
    try:
        async with asyncio.timeout(_GIVEN_UP):
            reader, writer = await asyncio.open_connection(host, port)
            try:
                writer.write(_ASK)
                answer = await reader.read()
            finally:
                writer.close()
        return int(answer.split(b" ", 2)[1])
    except (OSError, TimeoutError, IndexError, ValueError):
        return 0


def _schedule(pid: int) -> dict[int, tuple[int, int]]:
    """For each thread of a process the nanoseconds that it computed, and that it was ready to and got no CPU.

    Empty where the system does not tell.
    """
    found = {}
    for path in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # the thread is gone
            cpu, waited = path.read_text().split()[:2]
            found[int(path.parent.name)] = int(cpu), int(waited)
    return found


async def _probe(servers: dict[str, int], control: tuple[str, int], stop: threading.Event) -> dict[str, Samples]:
    found = {url: Samples() for url in servers}
    addresses = {url: url.removeprefix("http://").split(":") for url in servers}
    controls: list[tuple[float, float]] = []

    async def one(url: str) -> None:
        before, start = _schedule(pid := servers[url]), time.monotonic()
        status = await _ask(addresses[url][0], int(addresses[url][1]))
        seconds, after = time.monotonic() - start, _schedule(pid)
        threads = before.keys() & after.keys()
        no_cpu = max((after[thread][1] - before[thread][1] for thread in threads), default=0) / 1e9
        cpu = (after[pid][0] - before[pid][0]) / 1e9 if pid in threads else 0.0
        found[url].samples.append((start, seconds, status, no_cpu, cpu))

    async def other() -> None:
        start = time.monotonic()
        await _ask(*control)
        controls.append((start, time.monotonic() - start))

    tasks: set[asyncio.Task[None]] = set()
    while not stop.is_set():
        for sample in (*map(one, servers), other()):
            tasks.add(task := asyncio.create_task(sample))
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(PERIOD)
    await asyncio.gather(*tasks)
    for samples in found.values():
        samples.controls = controls
    return found


def main() -> None:
    """Probe until stdin is closed."""
    listening = socket.create_server(("127.0.0.1", 0))
    echo = multiprocessing.get_context("spawn").Process(target=_say_ok, args=(listening,), daemon=True)
    echo.start()
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    try:
        servers = {url: int(pid) for url, _, pid in (word.partition("=") for word in sys.argv[1:])}
        found = asyncio.run(_probe(servers, listening.getsockname()[:2], stop))
    finally:
        echo.terminate()
    print(json.dumps({url: {"samples": s.samples, "controls": s.controls} for url, s in found.items()}))


if __name__ == "__main__":
    main()
