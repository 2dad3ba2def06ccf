"""What a change of steering costs in a long conversation, and what a row for each token costs against one for all.

    python benchmarks/switching.py [--write-docs]     (about ten minutes on two quiet cores)

First the time to the answer's first token when a question follows a conversation of 2,000 tokens and the steering has
changed: of all tokens, or of answers alone, which leaves the memory of the prompts as it is. Then prompts and answers
under plans against the same under one steering. Layers of a real model's shape with random Q4_0 weights; one process,
variants in turn, CPU time. Progress goes to stderr, the tables to stdout, all figures to build/bench/switching.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import performance
from random_q4 import SHAPES, cached_model
from ratios import Ratio, noise_of, speed_ratios, verdict
from worker import steering_rows

from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.model_files.model_info import model_info
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.bias_plan import AnyBias, BiasPlan, BiasRule
from steermoe_local.steering.plan_text import parse_rule

START, END = "<!-- switching:start -->", "<!-- switching:end -->"
N_CONVERSATION, N_ANSWER, N_QUESTION = 2000, 64, 32
N_PROMPT, N_DECODED = 1024, 64
N_TOKENS = 256  # of the random models' vocabularies: bytes
AT_LEAST = 0.99  # speed of a plan over that of one steering
SAME, AGAIN, ALONE, IN_TURN = "one steering", "one steering again (noise)", "answers alone", "two steerings in turn"
SECOND = "every second token"
PROMISED = (ALONE, SECOND, IN_TURN)


def plan(rules: Mapping[str, BiasFile | None]) -> BiasPlan:
    """A plan of (where as people write it, bias)."""
    return BiasPlan(tuple(BiasRule(parse_rule(f"{where}: none").where, bias) for where, bias in rules.items()))


def biases_of(model: Path) -> tuple[BiasFile, BiasFile]:
    """Two biases that promote one expert of each layer and suppress one: the experts' work stays the same."""
    identity = model_info(model).require_moe()

    def bias(seed: int) -> BiasFile:
        rows = steering_rows(identity.n_layer, identity.n_expert, "hard", seed)
        return BiasFile(identity, "hard", {layer: np.array(row, np.float32) for layer, row in rows.items()})

    return bias(1), bias(2)


class Runner:
    """An engine with one slot, and what its requests cost."""

    def __init__(self, model: Path, n_threads: int) -> None:
        llama = SteeredLlama(model, n_ctx=64, n_threads=n_threads, n_threads_batch=n_threads)
        self._engine = Engine(llama, n_ctx=2 * N_CONVERSATION, n_threads=n_threads)
        ends = {257: -np.inf}  # random_q4: the end of a generation
        self._sampling = Sampling(temperature=0, logit_bias=ends)
        self._rng = np.random.default_rng(1)

    def tokens(self, n: int) -> list[int]:
        """Random tokens."""
        found: list[int] = self._rng.integers(0, N_TOKENS, n).tolist()
        return found

    def run(
        self, tokens: list[int], bias: AnyBias | None, n: int, reuse: bool = True
    ) -> tuple[list[int], FinishEvent, float]:
        """(tokens of the answer, its end, CPU seconds)."""
        request = Request(tokens, bias, self._sampling, n, reuse=reuse, routing=False)
        start, said = time.process_time(), []
        for _, event in self._engine.generate(request):
            if isinstance(event, FinishEvent):
                return said, event, time.process_time() - start
            said += [event.token] if event.token >= 0 else []
        raise AssertionError("no end")


def measure_switches(
    runner: Runner, one: BiasFile, other: BiasFile, n_rounds: int, log: performance.Log
) -> dict[str, Any]:
    """CPU seconds to the first token behind a conversation, by the change before the question."""
    answers, others = plan({"answer": one}), plan({"answer": other})
    changes: dict[str, tuple[AnyBias | None, AnyBias | None]] = {
        "none (unsteered)": (None, None),
        "none (all tokens)": (one, one),
        "none (answers)": (answers, answers),
        "all tokens: on": (None, one),
        "all tokens: another": (one, other),
        "all tokens: off": (one, None),
        "answers: on": (None, answers),
        "answers: another": (answers, others),
        "answers: off": (answers, None),
    }
    found: dict[str, Any] = {name: {"cpu": [], "cached": [], "prompt": []} for name in changes}
    for number in range(n_rounds):
        log(f"switches, round {number + 1} of {n_rounds}")
        for name, (before, after) in changes.items():
            conversation = runner.tokens(N_CONVERSATION - N_ANSWER)
            said, _, _ = runner.run(conversation, before, N_ANSWER)
            text = [*conversation, *said, *runner.tokens(N_QUESTION)]
            _, end, cpu = runner.run(text, after, 1)
            for key, value in (("cpu", cpu), ("cached", end.n_cached), ("prompt", end.n_prompt)):
                found[name][key].append(value)
    return found


def measure_rows(runner: Runner, one: BiasFile, other: BiasFile, n_rounds: int, log: performance.Log) -> dict[str, Any]:
    """CPU seconds of a prompt and of an answer's tokens, under one steering and under plans."""
    variants: dict[str, AnyBias | None] = {
        SAME: one,
        AGAIN: one,
        "unsteered": None,
        ALONE: plan({"answer": one}),
        SECOND: plan({"all every 2": one}),
        IN_TURN: plan({"all every 2": one, "all": other}),
        "the next token's entropy": plan({"answer when entropy > -1": one, "all": one}),
    }
    found: dict[str, Any] = {name: {"prompt": [], "answer": []} for name in variants}
    for bias in variants.values():
        runner.run(runner.tokens(64), bias, 2)  # graphs are made for what comes first
    for number in range(n_rounds):
        log(f"rows, round {number + 1} of {n_rounds}")
        prompt = runner.tokens(N_PROMPT)
        names = list(variants)
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            _, _, read = runner.run(prompt, variants[name], 1, reuse=False)
            _, end, cpu = runner.run(prompt, variants[name], N_DECODED)
            assert end.n_cached == N_PROMPT - 1
            found[name]["prompt"].append(read)
            found[name]["answer"].append(cpu)
    return found


def compare(rows: dict[str, Any]) -> dict[str, Any]:
    """Speed of each variant over that of one steering, for prompts and answers; of plans whether the promise holds."""
    found: dict[str, Any] = {}
    for part in ("prompt", "answer"):
        ratios = {name: Ratio.of(speed_ratios(times[part], rows[SAME][part])) for name, times in rows.items()}
        for name in rows.keys() - {SAME}:
            held = {"at_least": AT_LEAST, "holds": verdict(ratios[name], AT_LEAST, noise_of(ratios[AGAIN]))}
            about = held if name in PROMISED else {}
            found.setdefault(name, {})[part] = ratios[name].to_dict() | about
    return {name: found[name] for name in rows if name != SAME}


def measure(shape: str, n_threads: int, n_rounds: int, folder: Path, log: performance.Log) -> dict[str, Any]:
    """Measure all; returns what is written as JSON."""
    begin = time.monotonic()
    model = cached_model(shape, folder)
    one, other = biases_of(model)
    runner = Runner(model, n_threads)
    report: dict[str, Any] = {**performance.circumstances(), "threads": n_threads, "shape": shape, "rounds": n_rounds}
    report["switches"] = measure_switches(runner, one, other, n_rounds, log)
    report["rows"] = measure_rows(runner, one, other, n_rounds, log)
    report["ratios"] = compare(report["rows"])
    return report | {"seconds": round(time.monotonic() - begin)}


def render(report: dict[str, Any]) -> str:
    """The tables of docs/performance.md."""
    middle: Callable[[list[float]], float] = statistics.median
    switches = [
        [
            name,
            f"{middle(found['cached']):.0f} of {middle(found['prompt']):.0f}",
            f"{1000 * middle(found['cpu']):.0f} ms",
        ]
        for name, found in report["switches"].items()
    ]
    rows = [[name, *_cells(found["prompt"]), *_cells(found["answer"])] for name, found in report["ratios"].items()]
    header = [
        f"{part}{column}"
        for part in ("prompt: ", "answer: ")
        for column in ("ratio", "95% interval", "min to max", f"at least {AT_LEAST}")
    ]
    return (
        f"{performance.head(report, 'python benchmarks/switching.py')}\n\n"
        f"A question of {N_QUESTION} tokens behind a conversation of {N_CONVERSATION}, whose last answer has "
        f"{N_ANSWER}: CPU time to the first token of the answer, {report['shape']}, medians of {report['rounds']} "
        "rounds.\n\n"
        + performance.table(["change of the steering", "tokens in memory used", "to the first token"], switches)
        + f"\n\nSpeed over that under one steering of all tokens, of a prompt of {N_PROMPT} tokens and of {N_DECODED} "
        "tokens of an answer.\n\n" + performance.table(["steering", *header], rows) + "\n"
    )


def _cells(found: dict[str, Any]) -> list[str]:
    return [*performance.ratio_cells(found), found.get("holds", "")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what changes of steering, and plans, cost.")
    parser.add_argument("--json", type=Path, default=performance.OUTPUT / "switching.json", help="where the figures go")
    parser.add_argument("--from", dest="source", type=Path, help="do not measure, take the figures of this file")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/performance.md")
    parser.add_argument("--check", action="store_true", help="fail if a promise does not hold")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="granite-layers", help="of the layers")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", type=Path, default=performance.OUTPUT / "models", help="keeps the random models")
    arguments = parser.parse_args()
    begin = time.monotonic()

    def log(line: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {line}", file=sys.stderr, flush=True)

    def measured() -> dict[str, Any]:
        return measure(arguments.shape, arguments.threads, arguments.rounds, arguments.models, log)

    performance.deliver(arguments, measured, render, log, (START, END))


if __name__ == "__main__":
    main()
