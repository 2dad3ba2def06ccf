"""Throughput of `steermoe serve`: against llama-server of the same tree, and against one request at a time.

    python benchmarks/serving.py [--check] [--write-docs]     (make bench-serving; an hour on two cores)

Three servers run at the same time, ours and two llama-servers, with the same model, flags and threads. In a round every
variant handles the same load once, in rotating order, between turns of the two llama-servers; a ratio compares times of
one round only, so disturbances that last longer than a round cancel out. The ratio of the two llama-servers is the
remaining noise. A load is some completions of random tokens, `-np` of them at once, streamed or sent whole. Beside the
times stands the servers' processor time, which other work on the machine changes less. Progress goes to stderr, the
tables to stdout, and all figures to a JSON file.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import against_transformers
import numpy as np
from performance import OUTPUT, circumstances, deliver, head, load, ratio_cells, table
from random_q4 import SHAPES, cached_model
from ratios import Ratio, noise_of, speed_ratios, verdict
from servers import LLAMA_SERVER, Ask, Server, Setup, llama_server, our_server
from worker import steering_rows

from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.embedded import data_folder
from steermoe_local.steering.bias_file import BiasFile, write_bias

Log = Callable[[str], None]

START, END = "<!-- serving:start -->", "<!-- serving:end -->"
N_STEERINGS = 4
AT_LEAST = {"off": 0.95, "whole": 0.95, "same": 0.9, "mixed": 0.9}  # of llama-server's throughput
NAMES = {
    "off": "unsteered",
    "whole": "unsteered, answers sent whole",
    "same": "all under one steering",
    "mixed": f"under {N_STEERINGS} steerings, in one batch",
    "one": "one at a time, under one steering",
}
WHOLE = "llama-server, answers sent whole"


@dataclass(frozen=True)
class Load:
    """Tokens of each prompt and answer, and requests in a turn, at least as many as are answered at once."""

    n_prompt: int
    n_answer: int
    n_requests: int


@dataclass(frozen=True)
class Plan:
    """How much to measure: models, how many answers at once, loads by name, and seconds for each."""

    models: tuple[str, ...]
    parallel: tuple[int, ...]
    loads: dict[str, Load]
    seconds: float
    min_rounds: int
    n_follow_ups: int


FULL = Plan(("granite", "tiny"), (1, 4, 8), {"chat": Load(96, 48, 8), "prompts": Load(256, 8, 4)}, 60.0, 5, 5)
QUICK = Plan(("toy", "tiny"), (1, 2), {"chat": Load(16, 8, 2)}, 0.0, 2, 2)  # to try the script itself
MAX_ROUNDS = 40


def model_of(name: str, models: Path) -> tuple[Path, int, tuple[int, int]]:
    """Path, the token that ends a generation, and a range of tokens for prompts."""
    if name == "tiny":
        return data_folder() / "tiny-moe.gguf", 0, (300, 1200)
    return cached_model(name, models), 257, (0, 256)  # random_q4: bytes, a merge, the end


def write_steerings(model: Path, folder: Path) -> list[str]:
    """Names of bias files that promote one expert of each layer and suppress one: the amount of work stays the same."""
    identity = model_info(model).require_moe()
    for number in range(N_STEERINGS):
        rows = steering_rows(identity.n_layer, identity.n_expert, "hard", seed=number)
        values = {layer: np.array(row, np.float32) for layer, row in rows.items()}
        write_bias(BiasFile(identity, "hard", values), folder / f"s{number}.gguf")
    return [f"s{number}" for number in range(N_STEERINGS)]


class Prompts:
    """Random prompts without common beginnings, so that no server can reuse computed tokens."""

    def __init__(self, tokens: tuple[int, int]) -> None:
        self._tokens = tokens
        self._rng = random.Random(1)

    def next(self, n: int) -> list[int]:
        return [self._rng.randrange(*self._tokens) for _ in range(n)]


@dataclass
class Costs:
    """Seconds of turns and the servers' processor time in them, by variant, one value a round."""

    seconds: dict[str, list[float]]
    cpu: dict[str, list[float]]
    n_rounds: int = 0

    def add(self, found: dict[str, list[tuple[float, float | None]]]) -> None:
        """Add a round, which may have had several turns of a variant."""
        for name, turns in found.items():
            self.seconds.setdefault(name, []).append(statistics.fmean(seconds for seconds, _ in turns))
            known = [cpu for _, cpu in turns if cpu is not None]
            if len(known) == len(turns):
                self.cpu.setdefault(name, []).append(statistics.fmean(known))
        self.n_rounds += 1


def measure_load(
    ours: Server, theirs: list[Server], load: Load, steerings: list[str], prompts: Prompts, plan: Plan, n_parallel: int
) -> Costs:
    """What the turns of a load cost."""

    def turn(server: Server, variant: str) -> tuple[float, float | None]:
        chosen: dict[str, list[str | None]] = {"mixed": list(steerings), "same": [steerings[0]], "one": [steerings[0]]}
        names = chosen.get(variant, [None])
        asks = [
            Ask(prompts.next(load.n_prompt), load.n_answer, names[number % len(names)], stream=variant != "whole")
            for number in range(max(load.n_requests, n_parallel))
        ]
        before = server.cpu_seconds()
        seconds, _ = server.load(asks, 1 if variant == "one" else n_parallel)
        after = server.cpu_seconds()
        return seconds, None if before is None or after is None else after - before

    for server in (ours, *theirs):
        turn(server, "off")  # warm up
    turn(ours, "mixed")
    costs = Costs({}, {})
    end = time.monotonic() + plan.seconds
    while costs.n_rounds < plan.min_rounds or (time.monotonic() < end and costs.n_rounds < MAX_ROUNDS):
        variants = list(NAMES)
        shift = costs.n_rounds % len(variants)
        found: dict[str, list[tuple[float, float | None]]] = {"llama-server 0": [], "llama-server 1": []}
        for number, variant in enumerate(variants[shift:] + variants[:shift]):
            which = (costs.n_rounds + number) % 2
            whole = variant == "whole"
            name = WHOLE if whole else f"llama-server {which}"
            found.setdefault(name, []).append(turn(theirs[which], variant if whole else "off"))
            found[variant] = [turn(ours, variant)]
        costs.add(found)
    return costs


def compare(costs: Costs, n_tokens: int) -> dict[str, Any]:
    """Tokens per second, noise, ratios to llama-server with verdicts, and to one at a time."""
    times, cpu = costs.seconds, costs.cpu
    first, second = times["llama-server 0"], times["llama-server 1"]
    streamed = [statistics.fmean(pair) for pair in zip(first, second, strict=True)]
    same = Ratio.of(speed_ratios(first, second))
    report: dict[str, Any] = {
        "n_rounds": costs.n_rounds,
        "tokens_per_second": {name: n_tokens / statistics.median(values) for name, values in times.items()},
        "cpu_us_per_token": {name: 1e6 * statistics.fmean(values) / n_tokens for name, values in cpu.items()},
        "noise": same.to_dict(),
        "ratios": {},
        "over_one": {},
        "seconds": times,
        "cpu_seconds": cpu,
    }
    for name in NAMES:
        ratio = Ratio.of(speed_ratios(times[name], times[WHOLE] if name == "whole" else streamed))
        report["ratios"][name] = ratio.to_dict()
        if name in AT_LEAST:
            held = verdict(ratio, AT_LEAST[name], noise_of(same))
            report["ratios"][name] |= {"at_least": AT_LEAST[name], "holds": held}
            report["over_one"][name] = Ratio.of(speed_ratios(times[name], times["one"])).to_dict()
    return report


def measure_follow_ups(ours: Server, load: Load, steerings: list[str], prompts: Prompts, n: int) -> dict[str, Any]:
    """Times of a prompt and of the same prompt with more text, under the same steering and under another one."""
    found: dict[str, dict[str, list[float]]] = {
        name: {"cached": [], "seconds": []} for name in ("first", "same steering", "other steering")
    }
    for number in range(n):
        beginning = prompts.next(4 * load.n_prompt)
        for name, steering, more in (
            ("first", steerings[0], 0),
            ("same steering", steerings[0], 16),
            ("other steering", steerings[1 + number % (N_STEERINGS - 1)], 16),
        ):
            answer = ours.ask(Ask(beginning + prompts.next(more), 1, steering))
            found[name]["cached"].append(answer.n_cached / answer.n_prompt)
            found[name]["seconds"].append(answer.first)
    speed_up = Ratio.of(speed_ratios(found["same steering"]["seconds"], found["other steering"]["seconds"]))
    return {"n_prompt": 4 * load.n_prompt, "found": found, "speed_up": speed_up.to_dict()}


def measure(plan: Plan, n_threads: int, models: Path, log: Log) -> dict[str, Any]:
    """Measure all; returns what is written as JSON."""
    start = time.monotonic()
    report: dict[str, Any] = {**circumstances(), "threads": n_threads, "models": {}}
    for name in plan.models:
        path, end, tokens = model_of(name, models)
        prompts = Prompts(tokens)
        found: dict[str, Any] = {"parallel": {}}
        with tempfile.TemporaryDirectory() as temporary:
            steerings = write_steerings(path, Path(temporary))
            for n_parallel in plan.parallel:
                log(f"{name}, {n_parallel} at once: starting the servers")
                longest = max(4 * one.n_prompt + one.n_answer + 64 for one in plan.loads.values())
                setup = Setup(path, n_parallel, -(-longest // 256) * 256, n_threads)
                with ExitStack() as stack:
                    ours = stack.enter_context(our_server(setup, end, Path(temporary)))
                    theirs = [stack.enter_context(llama_server(setup, end)) for _ in range(2)]
                    loads = found["parallel"][str(n_parallel)] = {}
                    for kind, one in plan.loads.items():
                        costs = measure_load(ours, theirs, one, steerings, prompts, plan, n_parallel)
                        log(f"{name}, {n_parallel} at once, {kind}: {costs.n_rounds} rounds")
                        n_requests = max(one.n_requests, n_parallel)
                        about = {"n_prompt": one.n_prompt, "n_answer": one.n_answer, "n_requests": n_requests}
                        loads[kind] = about | compare(costs, n_requests * one.n_answer)
                    if "follow_ups" not in found:
                        chat = next(iter(plan.loads.values()))
                        found["follow_ups"] = measure_follow_ups(ours, chat, steerings, prompts, plan.n_follow_ups)
        report["models"][name] = found
    report["load_after"] = load()
    report["seconds"] = round(time.monotonic() - start)
    return report


#
# report
#


def load_section(model: str, kind: str, found: dict[str, Any], n_parallel: str) -> str:
    rates, cpu = found["tokens_per_second"], found["cpu_us_per_token"]

    def cells(title: str, rate: float, cost: float | None, *rest: str) -> list[str]:
        return [title, f"{rate:.0f}", "" if cost is None else f"{cost:.0f} µs", *rest]

    both = [f"llama-server {which}" for which in (0, 1)]
    known = [cpu[name] for name in both if name in cpu]
    rows = [
        cells(
            "llama-server / llama-server (noise)",
            statistics.fmean(rates[name] for name in both),
            statistics.fmean(known) if known else None,
            *ratio_cells(found["noise"], 2),
            *("", "", ""),
        ),
        cells(WHOLE, rates[WHOLE], cpu.get(WHOLE), *[""] * 6),
    ]
    for name, title in NAMES.items():
        ratio = found["ratios"][name]
        over = f"{found['over_one'][name]['median']:.2f}" if name in found["over_one"] else ""
        promise = f"≥ {ratio['at_least']:.2f}" if "at_least" in ratio else ""
        rest = (*ratio_cells(ratio, 2), promise, ratio.get("holds", ""), over)
        rows.append(cells(title, rates[name], cpu.get(name), *rest))
    header = ["ours / llama-server", "tokens/s", "CPU per token", "ratio", "95% interval", "min to max"]
    return (
        f"### Serving, {model}, {kind}, {n_parallel} at once\n\n{found['n_requests']} requests of {found['n_prompt']} "
        f"prompt tokens and {found['n_answer']} of answer; {found['n_rounds']} rounds.\n\n"
        + table([*header, "aim", "reached", "over one at a time"], rows)
    )


def follow_ups_section(models: dict[str, Any]) -> str:
    rows = []
    for model, report in models.items():
        follow_ups = report["follow_ups"]
        for name, found in follow_ups["found"].items():
            cached, seconds = (statistics.median(found[key]) for key in ("cached", "seconds"))
            rows.append([model, str(follow_ups["n_prompt"]), name, f"{100 * cached:.0f}%", f"{1000 * seconds:.0f} ms"])
    header = ["model", "prompt", "request", "of the prompt in memory", "to the first token"]
    return "### A prompt that was seen before\n\n" + table(header, rows)


def render(report: dict[str, Any]) -> str:
    sections = [head(report, "make bench-serving")]
    for model, found in report["models"].items():
        for n_parallel, loads in found["parallel"].items():
            sections += [load_section(model, kind, one, n_parallel) for kind, one in loads.items()]
    return "\n\n".join([*sections, follow_ups_section(report["models"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the server's throughput.")
    parser.add_argument("--json", type=Path, default=OUTPUT / "serving.json", help="where the figures go")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if an aim is missed")
    parser.add_argument("--quick", action="store_true", help="toy models, few rounds: tries the script, means nothing")
    parser.add_argument("--models", nargs="*", choices=["tiny", *SHAPES], help="measure these models")
    parser.add_argument("--seconds", type=float, help="for each load of each model")
    parser.add_argument("-np", "--parallel", nargs="*", type=int, metavar="N", help="answers at once, each measured")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, default=against_transformers.MODELS, help="keeps the random models")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    plan = QUICK if arguments.quick else FULL
    plan = replace(
        plan,
        models=tuple(arguments.models or plan.models),
        parallel=tuple(arguments.parallel or plan.parallel),
        seconds=plan.seconds if arguments.seconds is None else arguments.seconds,
    )

    def measured() -> dict[str, Any]:
        if not LLAMA_SERVER.exists():
            raise SystemExit("error: llama-server is not built; run make tools")
        return measure(plan, arguments.threads, arguments.folder, log)

    deliver(arguments, measured, render, log, (START, END))


if __name__ == "__main__":
    main()
