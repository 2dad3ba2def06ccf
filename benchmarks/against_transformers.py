"""Compares steermoe-local with the obvious alternative, transformers on the CPU with forward hooks, on the same work.

    python benchmarks/against_transformers.py [--shape granite] [--dtypes bfloat16,float32]

Same shape, random weights, same tokens and threads. For each figure, transformers uses the number type and the
implementation of experts that a trial finds fastest; it computes only the last token's logits, with its KV cache.
Results are printed as JSON. `make bench` runs this as a part of performance.py.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from random_q4 import SHAPES, cached_model, tensors
from ratios import Ratio, speed_ratios, verdict
from workers import HERE, Worker, llama_worker

Log = Callable[[str], None]
Run = Callable[[Worker, str], float]  # a worker and the experts' implementation: seconds per token
N_PROMPT, N_DECODE = 256, 16
MODELS = HERE.parent / "build" / "bench" / "models"
BYTES = {"bfloat16": 2, "float32": 4}
# aims, not promises: they depend on the CPU's instructions as much as on this project's code
AIMS = {"prompt": 1.0, "detection": 1.0, "steered decode": 4.0}
MEMORY_AIM = 1 / 3

# figure: (their request, hooks, our variant); detection reads twice as many tokens: a pair has two sides
FIGURES = {
    "prompt": ("prompt", "none", "plain"),
    "detection": ("prompt", "count", "detect"),
    "steered decode": ("decode", "steer", "hard"),
}


def free_memory() -> float | None:
    """Available memory in bytes; None where it is unknown."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None


def why_not(shape: str, dtype: str, others: float = 2e9) -> str:
    """Why transformers cannot run the shape here, "" if it can; `others` are bytes for its activations and for ours."""
    if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
        return "torch and transformers are not installed (make test-reference installs them)"
    sizes = tensors(SHAPES[shape]).values()
    need = BYTES[dtype] * sum(_product(size) for size in sizes) * 1.15 + others
    free = free_memory()
    if free is not None and need > free:
        return f"{shape} in {dtype} needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are available"
    return ""


def _product(size: Sequence[int]) -> int:
    result = 1
    for n in size:
        result *= n
    return result


def torch_worker(shape: str, dtype: str, n_threads: int) -> Worker:
    return Worker("torch_worker.py", shape, "--threads", n_threads, "--dtype", dtype)


def run_theirs(figure: str, worker: Worker, experts: str) -> float:
    """Seconds per token of a figure under transformers."""
    do, hooks, _ = FIGURES[figure]
    if do == "prompt":
        return float(worker.ask("prompt", n=N_PROMPT, hooks=hooks, experts=experts)["seconds"]) / N_PROMPT
    answer = worker.ask("decode", start=N_PROMPT, n=N_DECODE, hooks=hooks, experts=experts)
    return float(answer["seconds"]) / N_DECODE


def run_ours(worker: Worker, figure: str) -> float:
    """Seconds per token of a figure under llama.cpp; a decode follows a prompt of its own variant."""
    do, _, variant = FIGURES[figure]
    if do == "decode":
        return float(worker.ask("decode", variant=variant, start=N_PROMPT, n=N_DECODE)["seconds"]) / N_DECODE
    n = 2 * N_PROMPT if variant == "detect" else N_PROMPT
    return float(worker.ask("prompt", variant=variant, n=n)["seconds"]) / n


def find_best(
    shape: str, dtypes: Sequence[str], n_threads: int, runs: Mapping[str, Run], log: Log, others: float = 2e9
) -> tuple[dict[str, list[str]], dict[str, Any]]:
    """The fastest (dtype, experts) of each figure in `runs`, and the trial's tokens per second.

    The runs of a worker are made in their order, after a prompt.
    """
    trial: dict[str, dict[str, float]] = {figure: {} for figure in runs}
    skipped: dict[str, str] = {}
    for dtype in dtypes:
        if reason := why_not(shape, dtype, others):
            skipped[dtype] = reason
            continue
        with torch_worker(shape, dtype, n_threads) as worker:
            worker.ask("prompt", n=N_PROMPT, hooks="none", experts="grouped_mm")  # warm up
            for experts in ("eager", "grouped_mm", "batched_mm"):
                for figure, run in runs.items():
                    if experts == "batched_mm" and "decode" not in figure:
                        continue  # it copies the experts of every token: gigabytes for a prompt
                    speed = 1 / run(worker, experts)
                    trial[figure][f"{dtype} {experts}"] = speed
                    log(f"transformers, {dtype}, {experts}: {figure} {speed:.1f} tokens/s")
    best = {figure: max(speeds, key=speeds.__getitem__).split() for figure, speeds in trial.items() if speeds}
    reason = "; ".join(dict.fromkeys(skipped.values()))
    return best, {"tokens_per_second": trial, "skipped": skipped, "reason": reason}


def measure(
    shape: str, *, dtypes: Sequence[str], n_threads: int, seconds: float, min_rounds: int, models: Path, log: Log
) -> dict[str, Any]:
    """Measure both, turn by turn. Returns {"skipped": reason} where transformers cannot run."""
    # the decode of the trial follows the prompt
    runs = {figure: partial(run_theirs, figure) for figure in ("prompt", "steered decode")}
    best, trial = find_best(shape, dtypes, n_threads, runs, log)
    if not best:
        return {"skipped": trial["reason"]}
    best["detection"] = best["prompt"]
    model = cached_model(shape, models)
    times: dict[str, dict[str, list[float]]] = {figure: {"ours": [], "theirs": []} for figure in FIGURES}
    with ExitStack() as stack:
        ours = stack.enter_context(llama_worker(model, ["plain", "hard", "detect"], n_threads))
        theirs = {
            dtype: stack.enter_context(torch_worker(shape, dtype, n_threads))
            for dtype in sorted({dtype for dtype, _ in best.values()})
        }
        ours.ask("prompt", variant="hard", n=N_PROMPT)  # the text that steered decode continues
        for worker in theirs.values():
            worker.ask("prompt", n=N_PROMPT, hooks="none", experts="grouped_mm")
        end = time.monotonic() + seconds
        n_rounds = 0
        while n_rounds < min_rounds or (time.monotonic() < end and n_rounds < 15):
            for figure in FIGURES:
                dtype, experts = best[figure]
                for side in ("ours", "theirs") if n_rounds % 2 else ("theirs", "ours"):
                    taken = run_ours(ours, figure) if side == "ours" else run_theirs(figure, theirs[dtype], experts)
                    times[figure][side].append(taken)
            n_rounds += 1
            log(f"transformers, {shape}: round {n_rounds}")
        peaks = {dtype: worker.ask("memory")["peak"] for dtype, worker in theirs.items()}
    result: dict[str, Any] = {"shape": shape, "n_rounds": n_rounds, "trial": trial, "figures": {}}
    result["versions"] = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    for figure, both in times.items():
        ratio = Ratio.of(speed_ratios(both["ours"], both["theirs"]))
        result["figures"][figure] = {
            "how": " ".join(best[figure]),
            "ours": 1 / sorted(both["ours"])[n_rounds // 2],
            "theirs": 1 / sorted(both["theirs"])[n_rounds // 2],
            "ratio": ratio.to_dict(),
            "aim": AIMS[figure],
            "reached": verdict(ratio, AIMS[figure], 0.0),
        }
    result["memory"] = measure_memory(model, peaks, n_threads)
    return result


def measure_memory(model: Path, theirs: dict[str, float | None], n_threads: int) -> dict[str, Any]:
    """Peak memory of a prompt and steered decode in MB; ours are measured in separate processes."""
    result: dict[str, Any] = {"theirs": theirs, "aim": MEMORY_AIM}
    for name, mmap in (("ours", False), ("ours_mapped", True)):
        with llama_worker(model, ["hard"], n_threads, mmap=mmap) as worker:
            run = {"variant": "hard"}
            worker.ask("prompt", n=N_PROMPT, **run)
            worker.ask("decode", start=N_PROMPT, n=N_DECODE, **run)
            result[name] = worker.ask("memory")["peak"]
    known = [peak for peak in theirs.values() if peak is not None]
    if known and result["ours"] is not None:
        result["ratio"] = result["ours"] / min(known)
        result["reached"] = "yes" if result["ratio"] <= MEMORY_AIM else "no"
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare with transformers on the CPU.")
    parser.add_argument("--shape", choices=SHAPES, default="granite")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="number types to try (bfloat16,float32)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seconds", type=float, default=90, help="time for the rounds")
    parser.add_argument("--min-rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, default=MODELS, help="folder that keeps the random models")
    arguments = parser.parse_args()
    result = measure(
        arguments.shape,
        dtypes=arguments.dtypes.split(","),
        n_threads=arguments.threads,
        seconds=arguments.seconds,
        min_rounds=arguments.min_rounds,
        models=arguments.models,
        log=lambda line: print(line, file=sys.stderr),
    )
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
