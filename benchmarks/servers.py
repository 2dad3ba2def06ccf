"""Servers in separate processes, and a load for them: raw sockets, so that the client itself takes little time."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workers import HERE, WorkerError

LLAMA_SERVER = HERE.parent / "build" / "native" / "bin" / "llama-server"
OURS = [sys.executable, "-P", "-c", "from steermoe_local.cli import main; main()", "serve"]
START_SECONDS = 300.0
ANSWER_SECONDS = 600.0


@dataclass(frozen=True)
class Setup:
    """Settings of every server, with llama.cpp's names; `n_ctx` is tokens per answer."""

    model: Path
    parallel: int
    n_ctx: int
    n_threads: int
    n_batch: int = 512

    @property
    def flags(self) -> list[object]:
        """Flags that both servers know."""
        shared: list[object] = ["-m", self.model, "-np", self.parallel, "-t", self.n_threads, "-fa", "off"]
        return [*shared, "-b", self.n_batch, "-ub", self.n_batch]


@dataclass(frozen=True)
class Ask:
    """A completion of exactly `n` tokens: the end of generation is banned."""

    prompt: list[int]
    n: int
    steering: str | None = None
    stream: bool = True


@dataclass(frozen=True)
class Answered:
    """Seconds to the first token of a stream and to the end, and how many of the prompt's tokens were in memory."""

    first: float
    seconds: float
    n_prompt: int
    n_generated: int
    n_cached: int


class Server:
    """A running server. It sleeps while it has no requests, so that it does not disturb the others."""

    def __init__(self, port: int, pid: int, end: int, *, steers: bool) -> None:
        """`end` is the token that ends a generation."""
        self._port, self._pid, self._end, self._steers = port, pid, end, steers

    def cpu_seconds(self) -> float | None:
        """Processor time of the process and all its threads so far; None where the system does not tell."""
        try:
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, ask: Ask) -> Answered:
        """Get an answer. Raises WorkerError when it does not have the requested length or status."""
        body: dict[str, Any] = {"prompt": ask.prompt, "max_tokens": ask.n, "temperature": 0, "stream": ask.stream}
        body |= {"stream_options": {"include_usage": True}} if ask.stream else {}
        body |= {"logit_bias": {str(self._end): -100}}
        body |= {"steering": ask.steering} if self._steers else {}
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{self._port}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        start = time.perf_counter()
        first = 0.0
        parts: list[bytes] = []
        with socket.create_connection(("127.0.0.1", self._port), timeout=ANSWER_SECONDS) as connection:
            connection.sendall(head.encode() + data)
            while part := connection.recv(1 << 16):
                parts.append(part)
                if not first and b'"text":"' in part and b'"text":""' not in part:
                    first = time.perf_counter() - start
        seconds = time.perf_counter() - start
        return self._answered(b"".join(parts).decode("utf-8", "replace"), ask, first or seconds, seconds)

    def _answered(self, text: str, ask: Ask, first: float, seconds: float) -> Answered:
        ends = [line for line in text.split("\n") if '"usage":{' in line]
        usage = json.loads(ends[-1][ends[-1].index("{") :])["usage"] if ends else {}
        n_generated = usage.get("completion_tokens")
        if not text.startswith("HTTP/1.1 200") or n_generated != ask.n:
            raise WorkerError(
                f"the server on port {self._port} answered {n_generated} of {ask.n} tokens: {text[-300:]}"
            )
        details = usage.get("prompt_tokens_details") or {}
        return Answered(first, seconds, usage["prompt_tokens"], n_generated, details.get("cached_tokens", 0))

    def load(self, asks: Sequence[Ask], concurrency: int) -> tuple[float, list[Answered]]:
        """Ask all, `concurrency` at once; seconds from the first to the last byte."""
        with ThreadPoolExecutor(concurrency) as pool:
            start = time.perf_counter()
            answers = list(pool.map(self.ask, asks))
            return time.perf_counter() - start, answers


@contextlib.contextmanager
def our_server(setup: Setup, end: int, maps: Path) -> Iterator[Server]:
    """`steermoe serve`; requests can name the bias files in `maps`."""
    command = [*OURS, *setup.flags, "-c", setup.n_ctx, "--port", 0, "--maps", maps, "--queue", 1000]
    with _running(command) as lines:
        url = _line_with(lines, re.compile(r"http://127\.0\.0\.1:(\d+)"))
        yield Server(int(url[1]), lines[0].pid, end, steers=True)


@contextlib.contextmanager
def llama_server(setup: Setup, end: int) -> Iterator[Server]:
    """llama-server of the same tree, without steering and without work that ours does not have."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [LLAMA_SERVER, *setup.flags, "-c", setup.n_ctx * setup.parallel, "--port", port]
    command += ["--no-webui", "--cache-ram", 0, "--ctx-checkpoints", 0, "--no-context-shift"]
    with _running(command) as lines:
        _line_with(lines, re.compile("listening on http"))
        yield Server(port, lines[0].pid, end, steers=False)


Lines = list[str]


@contextlib.contextmanager
def _running(command: Sequence[object]) -> Iterator[tuple[subprocess.Popen[str], Lines]]:
    clean = {name: value for name, value in os.environ.items() if name not in ("STEERMOE_BIAS", "STEERMOE_FORCE")}
    lines: Lines = []
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=clean, text=True
    ) as process:

        def read() -> None:
            assert process.stderr is not None
            for line in process.stderr:  # until it ends: a full pipe would block the server
                lines.append(line)
                del lines[:-200]

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield process, lines
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            reader.join(10)


def _line_with(running: tuple[subprocess.Popen[str], Lines], pattern: re.Pattern[str]) -> re.Match[str]:
    process, lines = running
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if found := pattern.search("".join(lines.copy())):
            return found
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise WorkerError(f"{process.args}: did not start: {''.join(lines)[-600:]}")  # type: ignore[str-bytes-safe]
