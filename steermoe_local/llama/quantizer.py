"""llama.cpp's quantizer, `llama_model_quantize`, in a process of its own.

The call takes minutes, cannot be cancelled, and aborts the process on some files; in a child process it can be ended by
Ctrl-C and an abort is an error. Run as a module, this file is that child.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from .._util.package import PACKAGE
from ..errors import NativeError
from .library import llama_cpp, take_log_error

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
    if not sys.executable:
        raise NativeError("no Python to run the quantizer in (sys.executable is empty); use llama-quantize instead")
    arguments = [str(source), str(target), str(number), str(n_threads or 0), str(int(requantize))]
    package = str(PACKAGE.parent)
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *arguments],
            stdin=subprocess.PIPE,  # closes when this process ends, however it ends; the child then ends too
            stdout=subprocess.DEVNULL,
            stderr=log,
            env=os.environ | {"PYTHONPATH": path},
        ) as child,
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
        reason = f"ended by signal {-status}; {reason}"
    raise NativeError(reason, status)


def _end_with_parent(target: str) -> None:
    """End this process, without its partial output, when the parent is gone and stdin is closed."""
    os.read(0, 1)
    Path(target).unlink(missing_ok=True)
    os._exit(1)


def _reason() -> str:
    """llama.cpp's error in one line, without its box characters."""
    words = [line.strip(" =\r") for line in take_log_error().splitlines()]
    return "; ".join(word for word in words if word) or "no reason given"


def main(arguments: Sequence[str]) -> int:
    """Quantize; the last line on stderr is the reason of a failure."""
    source, target, number, n_threads, requantize = arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal signals the whole group; the parent decides
    threading.Thread(target=_end_with_parent, args=(target,), daemon=True).start()
    lib = llama_cpp()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = int(number), int(n_threads)
    params.allow_requantize = bool(int(requantize))
    take_log_error()
    status = int(lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))
    if status:
        print(_reason(), file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))  # without waiting for the thread at stdin
