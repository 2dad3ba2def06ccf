"""Client side of the processes that answer requests (worker.py, torch_worker.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
STOCK = HERE.parent / "build" / "stock" / "bin"


def clean_environment() -> dict[str, str]:
    """The environment without what would steer the models, or change the threads that a benchmark asks for."""
    names = ("STEERMOE_BIAS", "STEERMOE_FORCE")
    return {name: value for name, value in os.environ.items() if name not in names and not name.startswith("OMP_")}


class WorkerError(Exception):
    """A worker ended; the text is the last line it wrote."""


class Worker:
    """A running worker. It sleeps between requests, so that it does not disturb the others."""

    def __init__(self, script: str, *arguments: object, environment: dict[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=clean_environment() | (environment or {}),
            text=True,
        )
        self._name = f"{script} {' '.join(map(str, arguments))}"
        self._receive()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Send a request and wait for its answer. Raises WorkerError."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # a missing answer is reported below
            print(json.dumps({"do": do, **arguments}), file=self._process.stdin, flush=True)
        return self._receive()

    def _receive(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise WorkerError(f"{self._name}: ended with status {status}; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """End the process and wait for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is not None:  # an answer that it may be working on is not needed
            self._process.kill()
        self.close()


def llama_worker(
    model: Path,
    variants: Sequence[str],
    n_threads: int,
    *,
    stock: bool = False,
    mmap: bool = True,
    bias: Path | None = None,
    n_ctx: int = 1024,
    repack: bool = True,
    whole: bool = False,
    n_gpu_layers: int = 0,
    stock_folder: Path = STOCK,
) -> Worker:
    """A worker of our build or of the stock build. `bias` steers all its contexts, by STEERMOE_BIAS.

    `whole`: every layer is computed for every token, the last one too (worker.py says how). `n_gpu_layers` are on the
    first device of both builds.
    """
    arguments = [model, "--threads", n_threads, "--variants", ",".join(variants)]
    arguments += ["--stock"] if stock else []
    arguments += [] if mmap else ["--no-mmap"]
    arguments += ["--ctx", n_ctx]
    arguments += [] if repack else ["--no-repack"]
    arguments += ["--whole"] if whole else []
    arguments += ["--gpu-layers", n_gpu_layers]
    environment = {"LLAMA_CPP_LIB_PATH": str(stock_folder)} if stock else {}
    environment |= {"STEERMOE_BIAS": str(bias)} if bias else {}
    return Worker("worker.py", *arguments, environment=environment)
