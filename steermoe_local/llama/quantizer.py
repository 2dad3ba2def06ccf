"""llama.cpp's quantizer, `llama_model_quantize`, in a process of its own.

The call takes minutes, cannot be cancelled, and aborts the process on some files; in a child process it can be ended by
Ctrl-C and an abort is an error.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .._util.children import Child
from ..errors import NativeError
from .library import llama_cpp, take_log_error, tell_of_crashes

_POLL = 0.2  # seconds between two progress reports


def quantize_file(
    source: Path,
    target: Path,
    number: int,
    *,
    n_threads: int | None = None,
    requantize: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write `source` (of a split model the first part) to `target` as llama.h's `enum llama_ftype` `number`.

    `requantize`: also tensors that are quantized already. `on_bytes` is called now and then with the number of bytes
    written. An interrupt ends the child; the caller removes what it wrote.

    Raises NativeError with llama.cpp's reason.
    """
    arguments = [str(source), str(target), number, n_threads or 0, requantize]
    with (
        tempfile.TemporaryFile() as log,
        Child(_quantize, arguments, stderr=log, leftover=target) as child,
    ):
        try:
            while True:
                try:
                    status = child.wait(_POLL)
                    break
                except subprocess.TimeoutExpired:
                    if on_bytes and target.exists():
                        on_bytes(target.stat().st_size)
        except BaseException:
            child.kill()
            raise
        log.seek(0)
        lines = log.read().decode("utf-8", "replace").strip().splitlines()
    if status == 0:
        return
    reason = " ".join(lines[-1].split()) if lines else "no reason given"
    if status < 0:
        if status == -9 and not lines:
            reason = "the system does that when memory runs out: close other programs"
        reason = f"ended by signal {-status}; {reason.removeprefix('error: ')}"
    raise NativeError(reason, status)


def _reason() -> str:
    """llama.cpp's error in one line, without its box characters."""
    words = [line.strip(" =\r") for line in take_log_error().splitlines()]
    return "; ".join(word for word in words if word) or "no reason given"


def _quantize(source: str, target: str, number: int, n_threads: int, requantize: bool) -> int:
    """In the child: quantize; the last line on stderr is the reason of a failure."""
    tell_of_crashes()
    lib = llama_cpp()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = number, n_threads
    params.allow_requantize = requantize
    take_log_error()
    status = int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))
    if status:
        print(_reason(), file=sys.stderr, flush=True)
    return status
