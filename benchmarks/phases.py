"""Measures what steering a part of the text does: the section "When" of docs/results.md.

    python benchmarks/phases.py [--write-docs] [--folder FOLDER] [--items N]

For each behaviour of `tiny`, the map of `steermoe detect` steers both ways in several windows: how far the answers
move, and what it costs on the neutral text. Then conditions: the steering of each behaviour is in force only where the
prompt leans to it, with the threshold that `steermoe condition fit` finds on prompts of all behaviours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from performance import git_commit, machine, table, write_docs
from results import OUTPUT, ROOT, detect, map_of, steermoe

from steermoe_local._util.files import tool_name
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.measuring.measurements import Measurement
from steermoe_local.evaluation.measuring.opening import open_evaluator
from steermoe_local.evaluation.metrics.intervals import Interval, difference, wilson
from steermoe_local.evaluation.tasks.builtin import open_task
from steermoe_local.generation.engine import FinishEvent, Request, Sampling
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.models.embedded import Behaviour, behaviours
from steermoe_local.pairs.pairs import Message, Pair, load_pairs, save_pairs
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.bias_plan import AnyBias
from steermoe_local.steering.plan import SteeringPlan
from steermoe_local.steering.steering import Steering

DOCS = ROOT / "docs" / "results.md"
START, END = "<!-- phases:start -->", "<!-- phases:end -->"
WINDOWS: tuple[tuple[str, ...], ...] = (
    ("all",),
    ("prompt",),
    ("prompt[-4:]",),
    ("answer",),
    ("answer[0:1]",),
    ("answer[0:4]",),
    ("answer[1:]",),
    ("all every 2",),
)
GATED = ("answer",)  # windows of a conditional rule
N_PAIRS = 60  # pairs of prompts from which each condition is fitted


def plan_of(
    windows: Sequence[str], steering: Steering, when: str = "", looks_at: ExpertMap | None = None
) -> SteeringPlan:
    """A plan that steers in these windows, under a condition where one can stand."""
    rules = [f"{window} when {when}: steering" if when else f"{window}: steering" for window in windows]

    def expert_map(name: str) -> tuple[ExpertMap, Path | None]:
        assert looks_at is not None
        return looks_at, None

    return SteeringPlan.open(rules, lambda name, choice: steering, expert_map, name=" and ".join(windows))


def both(behaviour: Behaviour, expert_map: ExpertMap) -> tuple[Steering, BiasFile, BiasFile]:
    """The steering by the card's numbers, and its biases to either side."""
    towards = Steering(
        behaviour.name, expert_map=expert_map, activate=behaviour.n_activate, deactivate=behaviour.n_deactivate
    )
    one, two = towards.bias_file(), towards.changed(reverse=True).bias_file()
    assert one is not None
    assert two is not None
    return towards, one, two


def windows_of(evaluator: Evaluator, behaviour: Behaviour, expert_map: ExpertMap) -> list[dict[str, Any]]:
    """Each window: how far the rate moves both ways, and the cost of both on the neutral text."""
    steering, towards, away = both(behaviour, expert_map)
    biases: list[AnyBias | None] = [None]
    for windows in WINDOWS:
        plan = plan_of(windows, steering)
        biases += [plan.placed(towards), plan.placed(away)]
    unsteered, *found = evaluator.measure(biases, benign=False)
    rows = []
    for index, windows in enumerate(WINDOWS):
        one, two = found[2 * index], found[2 * index + 1]
        rows.append(
            {
                "windows": " and ".join(windows),
                "swing": plain(difference(one.values, two.values)),
                "towards": one.rate,
                "away": two.rate,
                "kl": (cost(one) + cost(two)) / 2,
                "ill_formed": (one.label_share("ill-formed") + two.label_share("ill-formed")) / 2,
            }
        )
    return [{"windows": "", "swing": None, "towards": unsteered.rate, "away": unsteered.rate, "kl": 0.0}, *rows]


def cost(measured: Measurement) -> float:
    assert measured.text is not None
    return measured.text.kl


def prompt_pairs(behaviour: Behaviour, others: Sequence[Behaviour]) -> list[Pair]:
    """Pairs of a prompt of the behaviour and one of another; the targets are the prompts' texts."""
    of_others = [pair for other in others for pair in load_pairs(other.pairs)]
    drawn = np.random.default_rng(0).permutation(len(of_others))
    found = []
    for index, pair in enumerate(load_pairs(behaviour.pairs)[:N_PAIRS]):
        own, other = first_message(pair), first_message(of_others[int(drawn[index])])
        sides = (Message("user", own),), (Message("user", other),)
        found.append(Pair(f"{behaviour.name}-prompts-{index:03d}", *sides, own, other))
    return found


def first_message(pair: Pair) -> str:
    side = pair.positive
    assert not isinstance(side, str)
    return side[0].content


def condition_of(behaviour: Behaviour, folder: Path) -> tuple[str, ExpertMap, dict[str, Any]]:
    """A condition that holds for prompts of the behaviour, its map, and what `condition fit` says of it.

    The map is made of one half of the pairs of prompts, the threshold of the other.
    """
    others = [other for other in behaviours() if other.name != behaviour.name]
    halves = folder / f"{behaviour.name}.prompts-map.jsonl", folder / f"{behaviour.name}.prompts-fit.jsonl"
    gate, report = folder / f"{behaviour.name}.gate.json", folder / f"{behaviour.name}.condition.json"
    if not report.exists():
        pairs = prompt_pairs(behaviour, others)
        for half, path in zip((pairs[::2], pairs[1::2]), halves, strict=True):
            save_pairs(half, path)
        steermoe("detect", "-m", "tiny", "--pairs", str(halves[0]), "-o", str(gate), "-t", "1")
        words = ("--map", str(gate), "--pairs", str(halves[1]), "--steer-when", "positive", "-o", str(report))
        steermoe("condition", "fit", "-m", "tiny", *words, "-t", "1")
    data: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return f"gate > {data['threshold']!r} over prompt", ExpertMap.load(gate), data


def conditions_of(evaluator: Evaluator, behaviour: Behaviour, expert_map: ExpertMap, folder: Path) -> dict[str, Any]:
    """Steering only where the prompt leans to the behaviour: false alarms, misses, effect kept, cost saved."""
    when, looks_at, fitted = condition_of(behaviour, folder)
    steering, towards, away = both(behaviour, expert_map)
    always, gated = plan_of(GATED, steering), plan_of(GATED, steering, when, looks_at)
    biases = [plan.placed(bias) for plan in (always, gated) for bias in (towards, away)]
    found = evaluator.measure(biases, benign=False)
    fired = {other.name: fires(evaluator, gated.placed(towards), other) for other in behaviours()}
    own = fired.pop(behaviour.name)
    false = np.concatenate(list(fired.values()))
    return {
        "when": f"when gate > {fitted['threshold']:.4g} over prompt",
        "fit": fitted,
        "misses": plain(wilson(int((~own).sum()), len(own))),
        "false_alarms": plain(wilson(int(false.sum()), len(false))),
        "always": {"swing": plain(difference(found[0].values, found[1].values)), "kl": mean_cost(found[:2])},
        "gated": {"swing": plain(difference(found[2].values, found[3].values)), "kl": mean_cost(found[2:])},
    }


def mean_cost(measured: Sequence[Measurement]) -> float:
    return sum(map(cost, measured)) / len(measured)


def fires(evaluator: Evaluator, plan: AnyBias | None, behaviour: Behaviour) -> npt.NDArray[np.bool_]:
    """Whether the plan steers the answer to each held-out prompt of a behaviour."""
    task = open_task(f"builtin:{behaviour.name}")
    prompts = [evaluator.renderer.render(item.messages(task.system)) for item in task.items]
    requests = [
        Request(prompt.tokens, plan, Sampling(temperature=0), max_tokens=2, style=prompt.style) for prompt in prompts
    ]
    steered = np.zeros(len(requests), dtype=np.bool_)
    for index, event in evaluator.engine.generate(*requests):
        if isinstance(event, FinishEvent):
            steered[index] = event.n_steered > 0 or (event.end is not None and event.end.rule is not None)
    return steered


def plain(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def measure(behaviour: Behaviour, folder: Path, n_items: int | None) -> dict[str, Any]:
    """All figures of a behaviour; finished ones are kept in the folder."""
    done = folder / f"{behaviour.name}.{n_items or 'all'}.phases.json"
    if done.exists():
        data: dict[str, Any] = json.loads(done.read_text("utf-8"))
        return data
    expert_map = ExpertMap.load(map_of(behaviour.name, folder))
    settings = EvaluatorSettings(context={"n_threads": 1}, record=True)
    with open_evaluator(
        "tiny", f"builtin:{behaviour.name}", benign=None, n_items=n_items, settings=settings, n_threads=1
    ) as evaluator:
        data = {
            "made": f"{tool_name()}, {datetime.now(UTC).date().isoformat()}, {git_commit()}",
            "sides": [behaviour.positive, behaviour.negative],
            "n_items": len(evaluator.task.items),
            "n_text": settings.n_text,
            "windows": windows_of(evaluator, behaviour, expert_map),
            "condition": conditions_of(evaluator, behaviour, expert_map, folder),
        }
    done.write_text(json.dumps(data), encoding="utf-8")
    return data


def render(report: Mapping[str, Any]) -> str:
    """The tables."""
    made = dict.fromkeys(found["made"] for found in report["behaviours"].values())
    parts = [f"{'; '.join(made)}; {report['machine']['cpu']}, one thread, greedy."]
    for name, found in report["behaviours"].items():
        header = ["steered", "towards", "away", "swing, points", "KL", "ill-formed answers"]
        rows = [
            [
                row["windows"] or "nothing",
                f"{100 * row['towards']:.0f}%",
                f"{100 * row['away']:.0f}%",
                "" if row["swing"] is None else span(row["swing"]),
                f"{row['kl']:.4f}",
                "" if row["swing"] is None else f"{100 * row['ill_formed']:.0f}%",
            ]
            for row in found["windows"]
        ]
        parts.append(f"**{name}** ({' / '.join(found['sides'])}, {found['n_items']} prompts)\n\n" + table(header, rows))
    header = ["behaviour", "condition", "held-out AUC of the fit", "misses", "false alarms", "swing", "of always", "KL"]
    header.append("of always")
    rows = []
    for name, found in report["behaviours"].items():
        gate = found["condition"]
        rows.append(
            [
                name,
                gate["when"],
                f"{gate['fit']['auc']['value']:.2f}",
                span(gate["misses"], "%"),
                span(gate["false_alarms"], "%"),
                span(gate["gated"]["swing"]),
                span(gate["always"]["swing"]),
                f"{gate['gated']['kl']:.4f}",
                f"{gate['always']['kl']:.4f}",
            ]
        )
    parts.append("**Conditions** (rules of `answer`)\n\n" + table(header, rows))
    return "\n\n".join(parts) + "\n"


def span(found: Mapping[str, float], unit: str = "") -> str:
    value, low, high = (100 * found[name] for name in ("value", "low", "high"))
    return f"{value:.0f}{unit} ({low:.0f} to {high:.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=OUTPUT.parent / "phases")
    parser.add_argument("--items", type=int, help="first N prompts of each task: tries the script")
    parser.add_argument("--write-docs", action="store_true", help="put the tables into docs/results.md")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    detect("tiny", arguments.folder)
    report: dict[str, Any] = {"machine": machine(), "behaviours": {}}
    for behaviour in behaviours():
        print(behaviour.name, file=sys.stderr)
        report["behaviours"][behaviour.name] = measure(behaviour, arguments.folder, arguments.items)
    text = render(report)
    print(text)
    if arguments.write_docs:
        write_docs(DOCS, text, START, END)


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"error: {error}") from None
