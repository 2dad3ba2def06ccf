"""Interventions per second: `steermoe attribute`'s batches against the same interventions one by one.

    python benchmarks/attribution.py [--write-docs]     (ten minutes on two quiet cores)

Whole models of real shapes with random Q4_0 weights. One item of a prompt and two answers, under random draws of 64
candidates; three processes take turns in each round: batches that steer the answers, batches that steer the prompts,
too, and SteeredLlama, one draw after the other. A ratio compares their CPU times (and wall times) of one round, so
other work of the machine cancels out. Progress goes to stderr, the tables to stdout, figures to
build/bench/attribution.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import performance
from random_q4 import SHAPES, version_of, write_model
from ratios import Ratio, speed_ratios, verdict
from workers import Worker

START, END = "<!-- attribution:start -->", "<!-- attribution:end -->"
MODELS = {"Granite 1B-A400M": "granite", "OLMoE 1B-7B": "olmoe"}
N_PROMPT, N_ANSWER = 96, 8  # tokens of the prompt, and of each of two answers
# draws of a round; 64 are a block of `attribute`, of which 16 fill several batches where prompts or texts are steered
N_DRAWS = {"answer": 64, "text": 16, "all": 16, "alone": 4, "kept": 4}
N_TEXT = 96  # tokens of the neutral text that count: the command's default
AIM = 5.0
SIDES = ("answer", "all", "alone", "kept")
# a run for the docs: both actions, so many draws, items that estimate, items that confirm the first experts
RUN = {"actions": 2, "draws": 1088, "items": 30, "confirm": 30}
N_FIRST = 9  # steerings of a confirming item: the first experts, and none
CORES = 8
APART = ("difference, answers", "difference, prompts, too", "difference, one by one, other batches")
# what is compared: (column, faster, slower); the first has the aim
RATIOS = (
    ("answers steered, over one by one", "answer", "alone"),
    ("answers steered, over one by one with the prompt kept", "answer", "kept"),
    ("prompts steered, too, over one by one", "all", "alone"),
)


def model_of(shape: str, folder: Path) -> Path:
    """The random model, made if the folder does not hold it yet (as performance.py does)."""
    path = folder / f"{shape}-{version_of(SHAPES[shape])}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_model(path, SHAPES[shape])
    return path


def start(model: Path, n_threads: int, *flags: str) -> Worker:
    """A process (attribution_worker.py)."""
    return Worker(
        "attribution_worker.py", model, "--threads", n_threads, "--prompt", N_PROMPT, "--answer", N_ANSWER, *flags
    )


def measure_model(model: Path, n_threads: int, n_rounds: int, log: performance.Log) -> dict[str, Any]:
    """Seconds of a draw on each side, round by round, how far margins lie apart, and peaks of memory."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in (*SIDES, "text")}
    apart: dict[str, float] = {"answer": 0.0, "all": 0.0, "kept": 0.0}
    with (
        start(model, n_threads, "--steer", "answer") as answer,
        start(model, n_threads, "--steer", "all") as both,
        start(model, n_threads) as alone,
    ):
        asks = {
            "answer": (answer, "batched"),
            "text": (answer, "text"),
            "all": (both, "batched"),
            "alone": (alone, "alone"),
            "kept": (alone, "kept"),
        }
        for worker, do in asks.values():
            worker.ask(do, n=2)  # to warm up
        for number in range(n_rounds):
            log(f"round {number + 1} of {n_rounds}")
            values = {}
            for name, (worker, do) in asks.items():
                found = worker.ask(do, n=N_DRAWS[name])
                values[name] = np.array(found["values"])
                of_draw = N_DRAWS[name] / (N_TEXT / found["n_tokens"] if name == "text" else 1)
                times[name].append({kind: found[kind] / of_draw for kind in ("cpu", "seconds")})
            for batched, one in (("answer", "kept"), ("all", "alone")):
                off = np.abs(values[batched][: N_DRAWS[one]] - values[one])
                apart[batched] = max(apart[batched], float(off.max()))
        # what rounding does to SteeredLlama itself
        again = np.array(alone.ask("kept", n=N_DRAWS["kept"], n_together=16)["values"])
        apart["kept"] = float(np.abs(again - values["kept"]).max())
        spread = {name: float(np.std(values[name])) for name in ("answer", "all")}
        peaks = {
            name: worker.ask("memory")["peak"] for name, worker in (("answer", answer), ("all", both), ("alone", alone))
        }
    ratios = {
        column: {
            kind: Ratio.of(speed_ratios([t[kind] for t in times[fast]], [t[kind] for t in times[slow]])).to_dict()
            for kind in ("cpu", "seconds")
        }
        for column, fast, slow in RATIOS
    }
    first = Ratio(**ratios[RATIOS[0][0]]["cpu"])
    return {
        "times": times,
        "ratios": ratios,
        "apart": apart,
        "spread": spread,
        "peak_mb": peaks,
        "file_mb": model.stat().st_size / 1e6,
        "holds": verdict(first, AIM, 0.0),
    }


def measure(arguments: argparse.Namespace, log: performance.Log) -> dict[str, Any]:
    """Measure all models; returns what is written as JSON."""
    begin = time.monotonic()
    report: dict[str, Any] = {**performance.circumstances(), "rounds": arguments.rounds, "models": {}}
    names = {"toy": "toy"} if arguments.quick else MODELS
    for name, shape in names.items():
        model = model_of(shape, arguments.models)
        for n_threads in arguments.threads:

            def say(line: str, head: str = f"{name}, {n_threads} threads") -> None:
                log(f"{head}: {line}")

            report["models"][f"{name}, {n_threads}"] = measure_model(model, n_threads, arguments.rounds, say)
    return report | {"seconds": round(time.monotonic() - begin)}


def median(one: dict[str, Any], side: str, kind: str) -> float:
    """Median seconds of a draw."""
    return statistics.median(time[kind] for time in one["times"][side])


def run_hours(one: dict[str, Any]) -> float:
    """Hours of CPU time of the run that the docs describe."""
    item, text = median(one, "answer", "cpu"), median(one, "text", "cpu")
    draws = RUN["draws"] * (RUN["items"] * item + text)
    return RUN["actions"] * (draws + RUN["confirm"] * N_FIRST * item) / 3600


def render(report: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    speeds, ratios, hours = [], [], []
    for key, one in report["models"].items():
        lead = key.split(", ")
        speeds.append(
            [
                *lead,
                *(f"{1 / median(one, side, 'cpu'):.2f} ({1 / median(one, side, 'seconds'):.2f})" for side in SIDES),
                f"{1 / median(one, 'text', 'cpu'):.2f} ({1 / median(one, 'text', 'seconds'):.2f})",
                *(f"{peak:.0f} MB" if peak else "-" for peak in one["peak_mb"].values()),
            ]
        )
        ratios.append(
            [
                *lead,
                *(
                    f"{found['cpu']['median']:.1f} ({found['seconds']['median']:.1f})"
                    for found in one["ratios"].values()
                ),
                one["holds"],
                *(f"{one['apart'][side]:.4f}" for side in ("answer", "all", "kept")),
            ]
        )
        total = run_hours(one)
        hours.append([*lead, f"{total:.1f}", f"{total / CORES:.1f}", f"{total * ratio_of(one):.0f}"])
    sections = [
        performance.head(report, "python benchmarks/attribution.py"),
        f"Draws per second of CPU time (in brackets: of wall time), of one item: a prompt of {N_PROMPT} tokens, two "
        f"answers of {N_ANSWER}; medians of {report['rounds']} rounds. Peaks of memory with the weights.",
        performance.table(
            [
                *("model", "threads", "answers steered", "prompts, too", "one by one", "one by one, prompt kept"),
                *(f"neutral text, {N_TEXT} tokens", "peak, answers", "peak, prompts, too", "peak, one by one"),
            ],
            speeds,
        ),
        f"How many times as many draws in CPU time (in wall time); aim of the first: {AIM:.0f}. Then the largest "
        "difference, in nats, of a margin from that of the same intervention one by one, and last of SteeredLlama's "
        "own margins when it reads the prompt in other batches: what rounding does to these random models.",
        performance.table(
            [
                "model",
                "threads",
                *(column for column, _, _ in RATIOS),
                "holds",
                *APART,
            ],
            ratios,
        ),
        f"A run with {RUN['actions']} actions, {RUN['draws']} draws of each (the most that `auto` takes for 64 "
        f"candidates), {RUN['items']} such items that estimate, {RUN['confirm']} that confirm, and the neutral text:",
        performance.table(
            [
                "model",
                "threads",
                "hours of CPU time",
                f"hours on {CORES} cores like these",
                "one by one, CPU time, about",
            ],
            hours,
        ),
    ]
    return "\n\n".join(sections) + "\n"


def ratio_of(one: dict[str, Any]) -> float:
    """How many times as long the same takes one by one, in CPU time."""
    found: float = one["ratios"][RATIOS[0][0]]["cpu"]["median"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how many interventions a second attribution makes.")
    parser.add_argument("--json", type=Path, default=performance.OUTPUT / "attribution.json", help="for the figures")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if the aim is not reached")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a toy model: tries the script, means nothing")
    parser.add_argument("--models", type=Path, default=performance.OUTPUT / "models", help="keeps the random models")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("--rounds: at least 1")
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    performance.deliver(arguments, lambda: measure(arguments, log), render, log, (START, END))


if __name__ == "__main__":
    main()
