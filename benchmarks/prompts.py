"""Speed of prompts, recording and decoding on repacked weights, against an unpatched build.

    python benchmarks/prompts.py [--only NAMES] [--write-docs]     (about fifteen minutes on two cores)

Layers of real models' shapes with random weights, quantized by llama.cpp, in worker processes of the stock build and
of ours, which do the same work in turn. A ratio compares the CPU times (and the wall times) of one round,
so other work of the machine, which slows both, cancels out; the table has the medians. Progress goes to stderr, the
table to stdout, and all figures to build/bench/prompts.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import performance
from random_q4 import SHAPES, Shape, version_of, write_model
from workers import Worker, llama_worker

from steermoe_local.evaluation.studies.transfer.quantize import file_type
from steermoe_local.llama.quantizer import quantize_file

START, END = "<!-- prompts:start -->", "<!-- prompts:end -->"
N_VOCAB = 512  # so that the time is that of the layers
QUANTS = ("Q4_0", "Q4_K_M", "Q8_0", "MXFP4")
LAYERS = {
    "Granite 1B-A400M": replace(SHAPES["granite"], n_layer=6, n_vocab=N_VOCAB),
    "OLMoE 1B-7B": replace(SHAPES["olmoe"], n_layer=2, n_vocab=N_VOCAB),
    "Qwen3 30B-A3B": Shape("olmoe", 1, 2048, 16, 4, 768, 128, 8, N_VOCAB),
    "gpt-oss 20B": Shape("olmoe", 1, 2880, 45, 9, 2880, 32, 4, N_VOCAB),
}
MISSING = {("gpt-oss 20B", "Q4_K_M")}  # its rows are no multiple of 256 values
PROMPTS = (64, 512, 2048)
N_RECORDED, N_DECODED = 512, 64
N_CTX = 2048 + 128


@dataclass(frozen=True)
class Task:
    """Something to time. `variant` is ours; stock always has `plain`."""

    name: str
    do: str
    variant: str
    arguments: dict[str, int]


TASKS = (
    *(Task(f"prompt {n}", "prompt", "plain", {"n": n}) for n in PROMPTS),
    Task(f"recorder {N_RECORDED}", "prompt", "recorder", {"n": N_RECORDED}),
    # after the prompt that the tasks before left
    Task("decode", "decode", "plain", {"start": PROMPTS[0], "n": N_DECODED}),
)


def model_of(name: str, quant: str, folder: Path) -> Path:
    """The quantized random model, made if the folder does not hold it yet."""
    shape = LAYERS[name]
    stem = f"layers-{version_of(shape)}"
    path = folder / f"{stem}-{quant}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    source, partial = folder / f"{stem}-F16.gguf", path.with_suffix(".partial")
    if not source.exists():
        write_model(source, shape, f16=True)
    try:
        quantize_file(source, partial, file_type(quant).number)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def measure_one(model: Path, n_threads: int, n_rounds: int) -> dict[str, Any]:
    """Ratios of stock's times over ours by task, the loads, and the peaks of memory."""
    loads: dict[str, list[float]] = {"stock": [], "plain": [], "recorder": []}

    def start(name: str) -> Worker:
        began = time.perf_counter()
        variant = "plain" if name == "stock" else name
        worker = llama_worker(model, [variant], n_threads, stock=name == "stock", n_ctx=N_CTX)
        loads[name].append(time.perf_counter() - began)
        return worker

    for name in ("stock", "plain", "stock", "plain"):  # the first ones read the file, and Python's modules
        start(name).close()
    times: dict[str, list[dict[str, float]]] = {task.name: [] for task in TASKS}
    n_different = 0
    # a recorder of its own process: memory is compared with what does the same
    with start("stock") as stock, start("plain") as plain, start("recorder") as recorder:
        for number in range(n_rounds + 1):
            for task in TASKS:
                ours = recorder if task.variant == "recorder" else plain
                turns = [(stock, "plain"), (ours, task.variant)]
                order = (0, 1) if number % 2 else (1, 0)
                answers = {i: turns[i][0].ask(task.do, variant=turns[i][1], **task.arguments) for i in order}
                theirs, own = answers[0], answers[1]
                n_different += task.variant == "plain" and theirs["logits"] != own["logits"]
                if number:  # the first round is to warm up
                    ratios = {kind: theirs[kind] / own[kind] for kind in ("cpu", "seconds")}
                    times[task.name].append(ratios | {"own_cpu": own["cpu"], "own_seconds": own["seconds"]})
        memory = {name: worker.ask("memory")["peak"] for name, worker in (("stock", stock), ("ours", plain))}
    return {
        "rounds": times,
        "rounds_with_other_logits": n_different,
        "load_seconds": {"stock": min(loads["stock"][1:]), "ours": min(loads["plain"][1:])},
        "peak_mb": memory,
    }


def measure(wanted: list[str], n_rounds: int, folder: Path, log: performance.Log) -> dict[str, Any]:
    """Measure the shapes whose names have one of the words; returns what is written as JSON."""
    start = time.monotonic()
    report: dict[str, Any] = {**performance.circumstances(), "rounds": n_rounds, "layers": {}}
    for name in LAYERS:
        if not any(word.lower() in name.lower() for word in wanted):
            continue
        for quant in QUANTS:
            if (name, quant) in MISSING:
                continue
            log(f"{name}, {quant}: model")
            model = model_of(name, quant, folder)
            for n_threads in (1, 2):
                log(f"{name}, {quant}, {n_threads} threads")
                report["layers"][f"{name}, {quant}, {n_threads}"] = measure_one(model, n_threads, n_rounds)
        for source in folder.glob("layers-*-F16.gguf"):
            source.unlink()
    return report | {"seconds": round(time.monotonic() - start)}


def render(report: dict[str, Any]) -> str:
    """The table of docs/performance.md."""
    names = [task.name for task in TASKS]
    rows = []
    for key, one in report["layers"].items():
        median = {
            (name, kind): statistics.median(row[kind] for row in one["rounds"][name])
            for name in names
            for kind in ("cpu", "seconds")
        }
        cells = [f"{median[name, 'cpu']:.2f} ({median[name, 'seconds']:.2f})" for name in names]
        load, peak = one["load_seconds"], one["peak_mb"]
        n = one["rounds_with_other_logits"]
        more = f"{peak['ours'] - peak['stock']:+.0f} MB" if peak["ours"] else ""  # None where /proc is missing
        cells += [f"{load['stock'] / load['ours']:.2f}", more]
        rows.append([*key.split(", "), *cells, f"other bits {n} times" if n else "same bits"])
    return (
        f"{performance.head(report, 'python benchmarks/prompts.py')}\n\n"
        f"Ours over stock, medians of {report['rounds']} rounds, in CPU time and in brackets in wall time: above 1 is "
        "faster.\nThe recorder counts every token in every layer; stock, which has none, computes the same prompt.\n\n"
        + performance.table(["layers", "type", "threads", *names, "load", "peak memory", "logits"], rows)
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare prompts with an unpatched build.")
    parser.add_argument("--json", type=Path, default=performance.OUTPUT / "prompts.json", help="where the figures go")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the table into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if logits differ from stock's")
    parser.add_argument("--only", default="", help="words in the names of the shapes to measure, with commas between")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", type=Path, default=performance.OUTPUT / "models", help="keeps the random models")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    def measured() -> dict[str, Any]:
        performance.require_stock()
        return measure(arguments.only.split(","), arguments.rounds, arguments.models, log)

    performance.deliver(arguments, measured, render, log, (START, END))


if __name__ == "__main__":
    main()
