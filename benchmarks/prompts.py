"""Speed of prompts, recording and decoding on repacked weights, against an unpatched build.

    python benchmarks/prompts.py [--only NAME ...] [--write-docs]     (about fifteen minutes on two cores)

Layers of real models' shapes with random weights, quantized by llama.cpp, in worker processes of the stock build and
of ours, which do the same work in turn. A ratio compares the CPU times (and the wall times) of one round,
so other work of the machine, which slows both, cancels out; the table has the medians. Progress goes to stderr, the
table to stdout, and all figures to build/bench/prompts.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import performance
from random_q4 import SHAPES, Shape, write_model
from workers import STOCK, Worker, WorkerError, llama_worker

from steermoe_local.llama.quantizer import quantize_file

OUTPUT = performance.OUTPUT
START, END = "<!-- prompts:start -->", "<!-- prompts:end -->"
N_VOCAB = 512  # so that the time is that of the layers
QUANTS = {"Q4_0": 2, "Q4_K_M": 15, "Q8_0": 7, "MXFP4": 38}  # numbers of llama.h's enum llama_ftype
LAYERS = {
    "Granite 1B-A400M": replace(SHAPES["granite"], n_layer=6, n_vocab=N_VOCAB),
    "OLMoE 1B-7B": replace(SHAPES["olmoe"], n_layer=2, n_vocab=N_VOCAB),
    "Qwen3 30B-A3B": Shape("olmoe", 1, 2048, 16, 4, 768, 128, 8, N_VOCAB),
    "gpt-oss 20B": Shape("olmoe", 1, 2880, 45, 9, 2880, 32, 4, N_VOCAB),
}
MISSING = {("gpt-oss 20B", "Q4_K_M")}  # its rows are no multiple of 256 values
PROMPTS = (64, 512, 2048)
N_RECORDED, N_DECODED = 512, 16
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
    version = zlib.crc32(repr(shape).encode() + (Path(__file__).parent / "random_q4.py").read_bytes())
    stem = f"layers-{version:08x}"
    path = folder / f"{stem}-{quant}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    source, partial = folder / f"{stem}-F16.gguf", path.with_suffix(".partial")
    if not source.exists():
        write_model(source, shape, f16=True)
    quantize_file(source, partial, QUANTS[quant])
    partial.replace(path)
    return path


def measure(model: Path, n_threads: int, n_rounds: int) -> dict[str, Any]:
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
    differ = 0
    # a recorder of its own process: memory is compared with what does the same
    with start("stock") as stock, start("plain") as plain, start("recorder") as recorder:
        for number in range(n_rounds + 1):
            for task in TASKS:
                turns = [(stock, "plain"), (recorder if task.variant == "recorder" else plain, task.variant)]
                order = (0, 1) if number % 2 else (1, 0)
                answers = {i: turns[i][0].ask(task.do, variant=turns[i][1], **task.arguments) for i in order}
                theirs, own = answers[0], answers[1]
                differ += task.variant == "plain" and theirs["logits"] != own["logits"]
                if number:  # the first round is to warm up
                    ratios = {kind: theirs[kind] / own[kind] for kind in ("cpu", "seconds")}
                    times[task.name].append(ratios | {"own_cpu": own["cpu"], "own_seconds": own["seconds"]})
        memory = {name: worker.ask("memory")["peak"] for name, worker in (("stock", stock), ("ours", plain))}
    return {
        "tasks": {
            name: {kind: statistics.median(row[kind] for row in rows) for kind in rows[0]}
            for name, rows in times.items()
        },
        "with_other_logits": differ,
        "load_seconds": {"stock": min(loads["stock"][1:]), "ours": min(loads["plain"][1:])},
        "peak_mb": memory,
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """The table of the documentation."""
    names = [task.name for task in TASKS]
    lines = [f"| layers | type | threads | {' | '.join(names)} | load | peak memory | logits |"]
    lines.append("| --- " * (len(names) + 6) + "|")
    for key, one in found.items():
        cells = [f"{one['tasks'][name]['cpu']:.2f} ({one['tasks'][name]['seconds']:.2f})" for name in names]
        load = one["load_seconds"]["stock"] / one["load_seconds"]["ours"]
        more = one["peak_mb"]["ours"] - one["peak_mb"]["stock"]
        same = "same bits" if not one["with_other_logits"] else f"{one['with_other_logits']} DIFFER"
        lines.append(f"| {key} | {' | '.join(cells)} | {load:.2f} | {more:+.0f} MB | {same} |")
    return "\n".join(lines)


def text(found: dict[str, dict[str, Any]], machine: str) -> str:
    return f"""{machine}

Ours over stock, in CPU time and in brackets in wall time: above 1 is faster. The recorder counts every token in every
layer; stock, which has none, computes the same prompt.

{table(found)}
"""


def all_of(wanted: Iterable[str], n_rounds: int, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """The measurements by the first columns of their rows."""
    found = {}
    for name in LAYERS:
        if not any(part.lower() in name.lower() for part in wanted):
            continue
        for quant in QUANTS:
            if (name, quant) in MISSING:
                continue
            say(f"{name}, {quant}: making the model")
            model = model_of(name, quant, OUTPUT / "models")
            for n_threads in (1, 2):
                say(f"{name}, {quant}, {n_threads} threads")
                found[f"{name} | {quant} | {n_threads}"] = measure(model, n_threads, n_rounds)
        for source in (OUTPUT / "models").glob("layers-*-F16.gguf"):
            source.unlink()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare prompts with an unpatched build.")
    parser.add_argument("--only", action="append", default=[], help="a part of a shape's name; several times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write-docs", action="store_true", help="write the table into docs/performance.md")
    arguments = parser.parse_args()
    if not STOCK.is_dir():
        print(f"error: {STOCK}: missing; make bench builds it", file=sys.stderr)
        return 1
    began = time.monotonic()
    try:
        found = all_of(arguments.only or [""], arguments.rounds, lambda line: print(line, file=sys.stderr, flush=True))
    except WorkerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    machine = performance.machine_line(f"`python benchmarks/prompts.py` in {time.monotonic() - began:.0f} s")
    (OUTPUT / "prompts.json").write_text(json.dumps({"machine": machine, "found": found}, indent=1) + "\n")
    print(table(found))
    if arguments.write_docs:
        performance.write_docs(performance.DOCS, text(found, machine), START, END)
    return 1 if any(one["with_other_logits"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
