"""Repacked weights under a memory limit: does a model run at full speed, slowly, or not at all?

    sudo python benchmarks/memory_limits.py granite.gguf

For each limit, a child process in a memory control group of its own (Linux, version 1 or 2, root) drops the file from
the page cache, loads it with and without repacking, reads 128 tokens and decodes ten. It prints a line for each, with
the limit as a part of what the model and its copies take. `MemoryEstimate.has_room_for_copies` follows from these.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

from steermoe_local import SteeredLlama, model_info
from steermoe_local.llama.cpu import repacks
from steermoe_local.model_files.memory import check_memory

PROMPT, DECODED = 128, 10
PATIENCE = 120  # seconds for a child
LIMITS = (2.0, 1.5, 1.3, 1.2, 1.1, 1.0, 0.8)


def group(limit: int) -> Path:
    """Put this process into a new control group with a limit in bytes; its folder."""
    old = Path("/sys/fs/cgroup/memory")
    root, name = (old, "memory.limit_in_bytes") if old.is_dir() else (Path("/sys/fs/cgroup"), "memory.max")
    folder = root / f"steermoe-{os.getpid()}"
    folder.mkdir()
    (folder / name).write_text(str(limit))
    (folder / "cgroup.procs").write_text(str(os.getpid()))
    return folder


def child(model: str, limit: int, repack: bool) -> None:
    file = os.open(model, os.O_RDONLY)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)
    print(group(limit), file=sys.stderr, flush=True)
    times = [time.perf_counter()]
    llama = SteeredLlama(model, n_ctx=256, n_batch=PROMPT, n_threads=1, repack=repack)
    times.append(time.perf_counter())
    llama.eval(list(range(100, 100 + PROMPT)))
    times.append(time.perf_counter())
    for _ in range(DECODED):
        llama.eval([5])
    times.append(time.perf_counter())
    print("  ".join(f"{after - before:8.2f}" for before, after in pairwise(times)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.model, int(arguments.child[0]), arguments.child[1] == "1")
        return
    estimate = check_memory(model_info(arguments.model), 256, repacks=repacks(), free=1 << 60)
    print(f"with copies: {estimate.total / 1e6:.0f} MB, of which copies {estimate.copies / 1e6:.0f} MB; seconds")
    print("limit  repacked      load    prompt    decode")
    for part in LIMITS:
        for repack in (1, 0):
            limit = int(estimate.total * part)
            command = [sys.executable, __file__, arguments.model, "--child", str(limit), str(repack)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
                try:
                    out, err = process.communicate(timeout=PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    out, err = f"more than {PATIENCE} s", process.communicate()[1]
            result = out.strip() or f"killed ({process.returncode})"
            print(f"{part:5.2f}  {'yes' if repack else 'no':8}  {result}", flush=True)
            if folder := err.partition("\n")[0]:
                Path(folder).rmdir()


if __name__ == "__main__":
    main()
