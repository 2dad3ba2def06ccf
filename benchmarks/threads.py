"""How fast one answer comes with one thread and with several, on an idle machine and beside other work.

    python benchmarks/threads.py [--rounds N] [--tokens N]     (about ten minutes)

For each model and each load of the machine, every variant runs in a process of its own, all of a round one after the
other, and is compared with the reference of its round: one thread. Variants: numbers of threads, and for several how
long a thread spins while it waits for the others before it sleeps (GNU's OpenMP: 3 ms by itself). `busy` has a process
in an endless loop for every CPU beside it. Speeds are of single tokens, decoded one after the other; CPU time is that
of all threads. The figures go to stdout, all of them to build/bench/threads.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from random_q4 import cached_model
from ratios import Ratio

from steermoe_local.models.embedded import embedded_model

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "build" / "bench"
WAITING = {
    "3 ms": {"GOMP_SPINCOUNT": "300000"},  # libgomp's own; by its source 100,000 spins are about a millisecond
    "0.1 ms": {"GOMP_SPINCOUNT": "10000"},
    "0.01 ms": {"GOMP_SPINCOUNT": "1000"},
    "sleeps": {"OMP_WAIT_POLICY": "passive"},
}
SHAPES = ("toy-olmoe", "granite-layers")


def child(model: str, n_threads: int, n_tokens: int) -> None:
    """Decode tokens with so many threads; print wall and CPU seconds of all but the first ones."""
    from steermoe_local.llama.steered_llama import SteeredLlama

    llama = SteeredLlama(model, n_ctx=512, n_batch=64, n_threads=n_threads)
    llama.eval(list(range(3, 40)))
    for token in range(8):
        llama.eval([token + 3])
    wall, cpu = time.perf_counter(), time.process_time()
    for index in range(n_tokens):
        llama.eval([index % 200 + 3])
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))


@contextmanager
def load(n: int) -> Iterator[None]:
    """Meanwhile `n` processes compute without an end."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(model: Path, n_threads: int, waiting: str, n_tokens: int) -> dict[str, float]:
    """One run of `child`."""
    command = [sys.executable, __file__, "--child", str(model), str(n_threads), str(n_tokens)]
    done = subprocess.run(command, env={**os.environ, **WAITING[waiting]}, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--models", default=",".join(("tiny", *SHAPES)))
    parser.add_argument("--loads", default="idle,busy")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--output", type=Path, default=BENCH / "threads.json")
    arguments = parser.parse_args()
    if arguments.child:
        model, n_threads, n_tokens = arguments.child
        child(model, int(n_threads), int(n_tokens))
        return
    n_cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = arguments.models.split(",")
    models = {
        name: embedded_model() if name == "tiny" else cached_model(name, arguments.output.parent) for name in wanted
    }
    counts = sorted({1, 2, n_cpus})
    variants = [(n, waiting) for n in counts for waiting in WAITING if n > 1 or waiting == "3 ms"]
    results = []
    print(f"{n_cpus} CPUs; speed and CPU time a token, as ratios to one thread")
    print(f"{'model':16} {'load':5} {'threads':>7} {'waiting':12} {'ms':>8} {'speed':>20} {'CPU time':>9}")
    for name, model in models.items():
        for state in arguments.loads.split(","):
            n_busy = n_cpus if state == "busy" else 0
            runs: dict[tuple[int, str], list[dict[str, float]]] = {variant: [] for variant in variants}
            with load(n_busy):
                for _ in range(arguments.rounds):
                    for variant in variants:
                        runs[variant].append(measure(model, *variant, arguments.tokens))
            reference = runs[variants[0]]
            for (n, waiting), found in runs.items():
                speed = Ratio.of([r["wall"] / f["wall"] for f, r in zip(found, reference, strict=True)])
                cpu = Ratio.of([f["cpu"] / r["cpu"] for f, r in zip(found, reference, strict=True)])
                ms = sorted(f["wall"] for f in found)[len(found) // 2] / arguments.tokens * 1000
                between = f"{speed.median:.2f} ({speed.low:.2f} to {speed.high:.2f})"
                print(f"{name:16} {state:5} {n:7} {waiting:12} {ms:8.2f} {between:>20} {cpu.median:9.2f}", flush=True)
                results.append(
                    {"model": name, "load": state, "threads": n, "waiting": waiting, "ms": ms}
                    | {"speed": speed.to_dict(), "cpu": cpu.to_dict(), "runs": found}
                )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"n_cpus": n_cpus, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
