"""Speed of prompts, recording and decoding by type of weights: against an unpatched build, transformers, llama-imatrix.

    python benchmarks/prompts.py [--only NAMES] [--parts PARTS] [--write-docs]     (half an hour on two cores)

Layers of real models' shapes with random weights, quantized by llama.cpp, in worker processes of the stock build, of
ours and of transformers, which do the same work in turn. A ratio compares the CPU times (and the wall times) of one
round, so other work of the machine, which slows both, cancels out. Every layer is computed for every token
(worker.py, --whole), because the last one, which is usually left out, is all that some of these models have.

Parts: `stock`, `transformers`, `imatrix`. What the machine lacks is left out, and the tables say why. Progress goes to
stderr, the tables to stdout, and all figures to build/bench/prompts.json, as they come.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import against_transformers
import detection
import performance
from prompts_tables import END, START, render
from random_q4 import SHAPES, version_of, write_model
from worker import LETTERS
from workers import Worker, WorkerError, llama_worker

from steermoe_local.evaluation.studies.transfer.quantize import file_type
from steermoe_local.llama.quantizer import quantize_file

QUANTS = ("Q4_0", "Q4_K_M", "Q8_0", "MXFP4")
LAYERS = {
    "Granite 1B-A400M": "granite-layers",
    "OLMoE 1B-7B": "olmoe-layers",
    "Qwen3 30B-A3B": "qwen3-layers",
    "gpt-oss 20B": "gpt-oss-layers",
}
TOYS = {"toy": "toy-olmoe"}
NO_K_QUANTS = {"gpt-oss-layers", "toy-olmoe"}  # their rows are no multiples of 256 values
PARTS = ("stock", "transformers", "imatrix")
N_CTX = 2048 + 128
N_DECODED = 64
TRIAL = 512  # tokens of the prompt that decides how transformers computes, but for shorter ones
IMATRIX_PAIRS, IMATRIX_TOKENS = 4, 128  # of each side

Answer = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Something to time. `sides` says who does it: a worker's name, and its request."""

    name: str
    sides: Mapping[str, dict[str, Any]]
    part: str = "stock"


def prompt(n: int, variant: str = "plain") -> dict[str, Any]:
    return {"do": "prompt", "variant": variant, "n": n}


def theirs(n: int, hooks: str = "none") -> dict[str, Any]:
    """A request to transformers; `experts` comes with the trial."""
    return {"do": "prompt", "hooks": hooks, "n": n}


DECODE = {"do": "decode", "variant": "plain", "start": 64, "n": N_DECODED}  # after the prompt that was read before
TASKS = (
    Task("prompt 64", {"stock": prompt(64), "ours": prompt(64), "transformers": theirs(64)}),
    Task(
        "prompt 512",
        {
            "stock": prompt(512),
            "ours": prompt(512),
            "recorder": prompt(512, "recorder"),
            "not repacked": prompt(512),
            "transformers": theirs(512),
        },
    ),
    Task("prompt 2048", {"stock": prompt(2048), "ours": prompt(2048), "transformers": theirs(2048)}),
    # a pair has two prompts of 512 tokens
    Task("detection 512", {"recorder": prompt(1024, "detect"), "transformers": theirs(512, "count")}, "transformers"),
    Task("decode", {"stock": DECODE, "ours": DECODE}),
)


def model_of(shape: str, quant: str, folder: Path) -> Path:
    """The quantized random model, made if the folder does not hold it yet."""
    path = folder / f"{shape}-{version_of(SHAPES[shape])}-{quant}.gguf"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob(f"{shape}-????????-{quant}.gguf"):
        old.unlink()
    source, partial = path.with_name(f"{shape}-F16.partial"), path.with_suffix(".partial")
    if not source.exists():
        write_model(source, SHAPES[shape], f16=True)
    try:
        quantize_file(source, partial, file_type(quant).number)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def models_of(shape: str, folder: Path, log: performance.Log) -> dict[str, Path]:
    """The models of a shape by type."""
    models = {}
    for quant in QUANTS:
        if not (shape in NO_K_QUANTS and "_K" in quant):
            log(f"{shape}, {quant}: model")
            models[quant] = model_of(shape, quant, folder)
    (folder / f"{shape}-F16.partial").unlink(missing_ok=True)
    return models


class Ours:
    """The processes of one model: stock's, ours, ours that records, ours without repacked weights."""

    def __init__(self, stack: ExitStack, model: Path, n_threads: int, parts: Sequence[str]) -> None:
        self.workers: dict[str, Worker] = {}
        self.loads: dict[str, list[dict[str, float]]] = {"stock": [], "ours": [], "not repacked": []}

        def start(name: str) -> Worker:
            variants = ["recorder", "detect"] if name == "recorder" else ["plain"]
            stock, repack = name == "stock", name != "not repacked"
            worker = llama_worker(model, variants, n_threads, n_ctx=N_CTX, whole=True, stock=stock, repack=repack)
            if name in self.loads:
                self.loads[name].append(worker.ask("load"))
            return worker

        names = ["stock", "ours", "recorder", "not repacked"] if "stock" in parts else ["ours", "recorder"]
        for name in names[:2] if "stock" in parts else []:
            start(name).close()
        for name in names:
            self.workers[name] = stack.enter_context(start(name))
            if name == "recorder":
                self.workers[name].ask(**prompt(64, "recorder"))
                self.workers[name].ask(**prompt(128, "detect"))
            else:
                self.workers[name].ask(**prompt(64))
        self.n_different = 0
        self.times: dict[str, dict[str, list[dict[str, float]]]] = {}

    def note(self, task: str, side: str, answer: Answer) -> None:
        times = {kind: answer[kind] for kind in ("cpu", "seconds")}
        self.times.setdefault(task, {}).setdefault(side, []).append(times)

    def take_turn(self, task: Task, number: int) -> None:
        """Every process does the task once, in an order that rotates with the rounds."""
        sides = [side for side in task.sides if side in self.workers]
        first = number % len(sides)
        answers = {side: self.workers[side].ask(**task.sides[side]) for side in sides[first:] + sides[:first]}
        if "stock" in answers:
            self.n_different += answers["stock"]["logits"] != answers["ours"]["logits"]
        for side, answer in answers.items():
            if task.name == "detection 512":
                answer = {kind: answer[kind] / 2 for kind in ("cpu", "seconds")}
            self.note(task.name, side, answer)

    def result(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "times": self.times,
            "rounds_with_other_logits": self.n_different,
            "load": {
                name: {kind: min(load[kind] for load in loads) for kind in ("cpu", "seconds")}
                for name, loads in self.loads.items()
                if loads
            },
            "peak_mb": {name: worker.ask("memory")["peak"] for name, worker in self.workers.items()},
        }


class Transformers:
    """Its processes, and for each request the way to compute that a trial found fastest in CPU time."""

    def __init__(self, stack: ExitStack, shape: str, n_threads: int, others: float, log: performance.Log) -> None:
        def run(n: int) -> against_transformers.Run:
            def cpu(worker: Worker, experts: str) -> float:
                return float(min(worker.ask(**theirs(n), experts=experts)["cpu"] for _ in range(2))) / n

            return cpu

        runs = {f"prompt {n}": run(n) for n in (64, TRIAL)}
        dtypes = list(against_transformers.BYTES)
        best, trial = against_transformers.find_best(shape, dtypes, n_threads, runs, log, others)
        self.skipped = "" if best else trial["reason"]
        self.best = {task.name: best.get(task.name, best[f"prompt {TRIAL}"]) for task in TASKS} if best else {}
        self.workers = {
            dtype: stack.enter_context(against_transformers.torch_worker(shape, dtype, n_threads))
            for dtype in sorted({dtype for dtype, _ in self.best.values()})
        }
        for task in TASKS:  # warm up
            self.answer(task, TRIAL)

    def answer(self, task: Task, n: int | None = None) -> Answer | None:
        """The times of a task, or of one with a prompt of n tokens; None where transformers has no part in it."""
        request = task.sides.get("transformers")
        if not self.workers or request is None:
            return None
        dtype, experts = self.best[task.name]
        answer = self.workers[dtype].ask(**request | ({"n": n} if n else {}), experts=experts)
        assert isinstance(answer, dict)
        return answer


def measure_models(
    shape: str, models: Mapping[str, Path], n_threads: int, n_rounds: int, parts: Sequence[str], log: performance.Log
) -> dict[str, dict[str, Any]]:
    """All models of a shape by type, in the same rounds; transformers, which has no types, runs once a round."""
    tasks = [task for task in TASKS if task.part in parts or task.part == "stock"]
    with ExitStack() as stack:
        log("loading")
        ours = {quant: Ours(stack, model, n_threads, parts) for quant, model in models.items()}
        transformers = None
        reason = ""
        if "transformers" in parts:
            try:
                transformers = Transformers(stack, shape, n_threads, 2e9, log)
                reason = transformers.skipped
            except WorkerError as error:
                reason = str(error)
            if reason:
                log(f"transformers: not measured: {reason}")
        for number in range(n_rounds):
            log(f"round {number + 1} of {n_rounds}")
            for task in tasks:
                answer = transformers.answer(task) if transformers else None
                for one in ours.values():
                    if answer:
                        one.note(task.name, "transformers", answer)
                    one.take_turn(task, number)
        found = {quant: one.result() for quant, one in ours.items()}
        for one in found.values():
            if reason:
                one["transformers"] = {"skipped": reason}
            elif transformers:
                one["transformers"] = {"how": {task: " ".join(way) for task, way in transformers.best.items()}}
        return found


def measure_imatrix(model: Path, n_threads: int, n_rounds: int, log: performance.Log) -> dict[str, Any]:
    """`steermoe detect` against llama-imatrix on one text; {"skipped": reason} where that cannot be run."""
    if reason := detection.why_no_imatrix():
        return {"skipped": reason}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        both = detection.jobs(folder, IMATRIX_PAIRS, IMATRIX_TOKENS, LETTERS)["same text"]
        try:
            return detection.against_imatrix(
                model.stem, model, both, n_rounds, 512, n_threads, folder, lambda line: None, noise=False, whole=True
            )
        except (WorkerError, ValueError) as error:  # the latter: the tokens cost less than the noise of starting
            log(f"llama-imatrix: not measured: {error}")
            return {"skipped": str(error)}


def measure(arguments: argparse.Namespace, log: performance.Log) -> dict[str, Any]:
    """Measure the shapes whose names have one of the words; returns what is written as JSON, also on the way."""
    start = time.monotonic()
    wanted = arguments.only.lower().split(",")
    parts = arguments.parts.split(",")
    layers = {name: shape for name, shape in LAYERS.items() if any(word in name.lower() for word in wanted)}
    report: dict[str, Any] = {**performance.circumstances(), "rounds": arguments.rounds, "versions": {}, "layers": {}}
    before = 0.0
    if arguments.add and arguments.json.exists():
        old = json.loads(arguments.json.read_text(encoding="utf-8"))
        report["layers"], before = old["layers"], old["seconds"]
    for package in ("torch", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            report["versions"][package] = importlib.metadata.version(package)
    for name, shape in (TOYS if arguments.quick else layers).items():
        models = models_of(shape, arguments.models, log)
        for n_threads in arguments.threads:

            def say(line: str, head: str = f"{name}, {n_threads} threads") -> None:
                log(f"{head}: {line}")

            found: dict[str, dict[str, Any]] = {quant: {} for quant in models}
            if "stock" in parts or "transformers" in parts:
                found = measure_models(shape, models, n_threads, arguments.rounds, parts, say)
            for quant, model in models.items():
                if "imatrix" in parts:
                    say(f"{quant}: llama-imatrix")
                    found[quant]["imatrix"] = measure_imatrix(model, n_threads, arguments.imatrix_rounds, say)
                report["layers"][f"{name}, {quant}, {n_threads}"] = found[quant]
            report["seconds"] = round(before + time.monotonic() - start)
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compare prompts with an unpatched build, transformers, llama-imatrix."
    )
    parser.add_argument("--json", type=Path, default=performance.OUTPUT / "prompts.json", help="where the figures go")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if logits differ from stock's")
    parser.add_argument("--only", default="", help="words in the names of the shapes to measure, with commas between")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--parts", default=",".join(PARTS), help="of stock,transformers,imatrix")
    parser.add_argument("--add", action="store_true", help="add to the figures in the file of --json (or replace them)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--imatrix-rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a toy model: tries the script, means nothing")
    parser.add_argument("--models", type=Path, default=performance.OUTPUT / "models", help="keeps the random models")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts.split(",")) - set(PARTS):
        parser.error(f"--parts: unknown {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    if arguments.rounds < 1 or arguments.imatrix_rounds < 1:
        parser.error("--rounds and --imatrix-rounds: at least 1")
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    def measured() -> dict[str, Any]:
        performance.require_stock()
        return measure(arguments, log)

    performance.deliver(arguments, measured, render, log, (START, END))


if __name__ == "__main__":
    main()
