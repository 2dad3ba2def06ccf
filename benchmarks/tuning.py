"""Compares the search of `steermoe tune` with a grid, on the embedded model: the picks, and the answers they needed.

    python benchmarks/tuning.py [--full] [--only BEHAVIOUR] [--items N] [--seed S] [OUTPUT.json]

Both choose on one half of the held-out prompts under the same budget, and are compared on the other half. The grid has
8 x 8 numbers of experts, with --full all possible choices, some 900. Decoding is greedy on one thread, so a machine
gets the same figures every time. Prints a Markdown table, and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from steermoe_local import ExpertMap, SteeredLlama, __version__, load_pairs, record_counts
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.metrics.formatting import points
from steermoe_local.evaluation.metrics.intervals import Interval
from steermoe_local.evaluation.studies.search.objective import Budget, search_space
from steermoe_local.evaluation.studies.search.tune import Tuning, exhaustive, tune
from steermoe_local.evaluation.tasks.builtin import builtin_task, default_guards
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.models.embedded import Behaviour, behaviours, embedded_model
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.steering.steering import Steering

GRID = (0, 1, 2, 4, 8, 16, 24, 40)
N_TEXT = 2000  # tokens of the neutral text
BUDGET = Budget(max_ppl_increase=0.05, max_looping_increase=0.05)


def compare(n_items: int | None, full: bool, seed: int, only: str | None = None) -> list[dict[str, Any]]:
    """One row for each behaviour and direction."""
    rows = []
    llama = SteeredLlama(str(embedded_model()), n_ctx=64, verbose=False)
    _, neutral = default_guards(embedded_model())
    for behaviour in (found for found in behaviours() if only in (None, found.name)):
        task = builtin_task(behaviour.name).first(n_items)
        expert_map = map_of(behaviour)
        for reverse in (False, True):
            steering = Steering(behaviour.name, expert_map=expert_map, reverse=reverse)
            settings = EvaluatorSettings(n_parallel=32, n_text=N_TEXT, context={"n_threads": 1})
            found: dict[str, Any] = {
                "behaviour": behaviour.name,
                "side": steering.side,
                "n_choices": search_space(steering).n_choices,
            }
            for method in ("search", "grid"):
                # a separate evaluator for each: cached measurements of the other must not make it faster
                with Evaluator(
                    llama, task, make_scorer(task.scorer, task.options), neutral=neutral, settings=settings
                ) as evaluator:
                    start = time.perf_counter()
                    numbers_of = None if full else GRID
                    made = (
                        tune(evaluator, steering, BUDGET, seed=seed)
                        if method == "search"
                        else exhaustive(
                            evaluator, steering, BUDGET, seed=seed, activate=numbers_of, deactivate=numbers_of
                        )
                    )
                    found[method] = summary(made) | {"seconds": round(time.perf_counter() - start, 1)}
            rows.append(found)
            print(line(found), flush=True)
    return rows


def map_of(behaviour: Behaviour) -> ExpertMap:
    """The shipped map, or one that is made here from the behaviour's pairs."""
    path = shipped_maps().get(behaviour.name)
    if path is not None:
        return ExpertMap.load(path)
    counts = record_counts(embedded_model(), load_pairs(behaviour.pairs), behaviour=behaviour.name, n_threads=1)
    return ExpertMap.from_counts(counts, positive=behaviour.positive, negative=behaviour.negative)


def summary(made: Tuning) -> dict[str, Any]:
    """The figures that are compared."""
    data = made.to_dict()
    names = ("outcome", "reason", "chosen", "strongest", "choosing", "heldout", "heldout_strongest", "fluency")
    return {name: data[name] for name in (*names, "n_tried", "n_measured", "n_answers", "n_grid")}


HEADER = (
    "| behaviour, side | `tune`: experts | gain, held out | grid: experts | gain, held out | grid's strongest | "
    "gain, held out | choices tried | answers |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    search, grid = row["search"], row["grid"]
    cells: Sequence[str] = (
        f"{row['behaviour']}, {row['side']}",
        numbers(search["chosen"], search["outcome"]),
        gain(search["heldout"]),
        numbers(grid["chosen"], grid["outcome"]),
        gain(grid["heldout"]),
        numbers(grid["strongest"], ""),
        gain(grid["heldout_strongest"]),
        f"{search['n_tried']} against {grid['n_tried']}, of {row['n_choices']}",
        f"{search['n_answers']} against {grid['n_answers']}",
    )
    return f"| {' | '.join(cells)} |"


def numbers(choice: dict[str, Any] | None, outcome: str) -> str:
    words = "none" if choice is None else f"+{choice['activate']} -{choice['deactivate']}"
    return words if outcome in ("", "found") else f"{words} ({outcome})"


def gain(effect: dict[str, Any] | None) -> str:
    return "-" if effect is None else points(Interval(**effect["gain"]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="tune against a grid, on the embedded model")
    parser.add_argument("output", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--full", action="store_true", help="every choice instead of 8 x 8")
    parser.add_argument("--only", choices=[behaviour.name for behaviour in behaviours()], help="one behaviour")
    parser.add_argument("--items", type=int, help="first N prompts of each task")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split and the bootstrap")
    given = parser.parse_args(arguments)
    print(HEADER)
    start = time.perf_counter()
    rows = compare(given.items, given.full, given.seed, given.only)
    facts = {
        "tool": f"steermoe-local {__version__}",
        "machine": platform.machine(),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "seed": given.seed,
        "items": given.items,
        "budget": asdict(BUDGET),
        "grid": "all" if given.full else GRID,
        "seconds": round(time.perf_counter() - start),
    }
    tried = [sum(row[method]["n_tried"] for row in rows) for method in ("search", "grid")]
    answers = [sum(row[method]["n_answers"] for row in rows) for method in ("search", "grid")]
    print(
        f"\n{tried[0]} choices tried against {tried[1]} ({1 - tried[0] / tried[1]:.0%} saved), {answers[0]} answers "
        f"against {answers[1]} ({1 - answers[0] / answers[1]:.0%} saved); {BUDGET}; seed {given.seed}; "
        f"{facts['tool']}, {facts['machine']}, {facts['date']}, {facts['seconds']} s"
    )
    if given.output:
        given.output.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
