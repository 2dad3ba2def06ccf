"""The named experiments: each answers one question about a map, compared with a control, in a sentence from figures.

docs/experiments.md says of each what is steered, what it is compared with, and what would speak for or against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..._util.files import timestamp, tool_name
from ...errors import ChoiceError, UsageError
from ...maps.expert_map import parse_layers
from ...maps.ranks import action_scores
from ...maps.scores import rank
from ..measuring.evaluator import Evaluator
from ..measuring.side_effects import fluency
from ..metrics.formatting import in_points, percent, points
from ..metrics.intervals import difference, rate
from ..reports.document import Table
from ..reports.verdicts import HARM
from ..studies.controls.controls import ControlResult, Controls
from ..studies.controls.draws import ControlPlan
from ..studies.layers import by_layer, thirds
from .experiment import GUARDS, Biases, ExperimentResult, ExperimentSetup, Found, Sides, Verdict, side_row, text_cells
from .findings import (
    LEAST,
    SCALES,
    ahead,
    compared,
    controls_table,
    depth_finding,
    guard_harms,
    layer_names,
    map_rows,
    require,
    router_kinds,
    rules_finding,
    size,
    works,
)

__all__ = ["EXPERIMENTS", "Experiment", "ExperimentResult", "ExperimentSetup", "run_experiment"]


@dataclass(frozen=True)
class Experiment:
    """A named experiment: its question, the function that answers it, and whether it needs the map's pairs."""

    name: str
    question: str
    answer: Callable[[ExperimentSetup], Found]
    needs_pairs: bool = False


def run_experiment(name: str, setup: ExperimentSetup) -> ExperimentResult:
    """Run an experiment by its name. Raises UsageError, and what measuring raises."""
    if name not in EXPERIMENTS:
        raise UsageError(f"{name!r} is no experiment; take one of {', '.join(EXPERIMENTS)}")
    experiment = EXPERIMENTS[name]
    if experiment.needs_pairs and not setup.pairs:
        raise UsageError(f"{name}: needs the pairs that the map was made of; give them with --pairs FILE")
    finding, verdict, tables, figures = experiment.answer(setup)
    evaluator = setup.evaluator
    facts = {**setup.steering.to_dict(), "map": None}  # no path of this machine: the digest identifies the map
    metadata = {
        **evaluator.metadata,
        "steering": facts,
        "map_sha256": facts["map_sha256"],
        "task_sha256": evaluator.task.sha256,
        "settings": evaluator.settings,
        "n_items": len(evaluator.task.items),
        "n_draws": setup.n_draws,
        "seed": setup.seed,
        "tool": tool_name(),
        "created": timestamp(),
    }
    return ExperimentResult(name, experiment.question, finding, verdict, figures, tuple(tables), metadata)


def random10(setup: ExperimentSetup) -> Found:
    """Ten random experts, five promoted and five suppressed, against the ten that the map would take."""
    steering = setup.steering.changed(activate=5, deactivate=5)
    sides, found = setup.compare(["random"], steering)
    effect, control = sides.effect, require(found["random"])
    moved = float(np.mean(np.abs(control.effects) >= LEAST))
    finding = (
        f"Ten random experts swing the rate by {size(control)}, by {in_points(LEAST)} or more in {moved:.0%} of "
        f"{control.n} draws; {compared('the ten experts of the map', effect, control)}."
    )
    rows = [(label, f"{100 * drawn:+.0f}") for label, drawn in zip(control.labels, control.effects, strict=True)]
    tables = [
        sides.table(),
        controls_table([control], effect),
        Table("Swing of each draw", ("draw", "points"), (*rows,)),
    ]
    return finding, ahead(effect, control), tables, {**sides.figures(), "random": control.to_dict(), "moved": moved}


def top20(setup: ExperimentSetup) -> Found:
    """The twenty experts of largest |RD|, each by the sign of its RD, and all of them reversed."""
    expert_map = setup.steering.expert_map
    assert expert_map is not None
    scope = None if setup.steering.layers is None else parse_layers(setup.steering.layers)
    by = setup.steering.rank
    promote, suppress = action_scores(expert_map, by)
    worth = np.maximum(np.maximum(promote, suppress), 0.0)  # |RD|, where experts are chosen by it
    first = [(layer, e) for layer, e in rank(worth, scope)[:20].tolist() if worth[layer, e] > 0]
    n_plus = sum(bool(promote[cell] > suppress[cell]) for cell in first)
    n_minus = len(first) - n_plus
    steering = setup.steering.changed(activate=n_plus, deactivate=n_minus)
    reverse = setup.steering.changed(activate=n_minus, deactivate=n_plus, reverse=True)
    sides, found = setup.compare(["random", "bottom"], steering, reverse)
    control = require(found["random"])
    score = "|RD|" if by == "rd" else by
    signs = ("with RD > 0", "with RD < 0") if by == "rd" else ("promoted", "suppressed")
    rates = [percent(measured.rate) for measured in (sides.unsteered, sides.positive, sides.negative)]
    ratio = fluency(sides.positive, sides.unsteered).perplexity_ratio
    cost = (
        f"; towards, perplexity on the neutral text changes by {100 * (ratio - 1):+.1f}%" if ratio is not None else ""
    )
    finding = (
        f"The top {n_plus + n_minus} experts by {score} ({n_plus} {signs[0]}, {n_minus} {signs[1]}) take the rate from "
        f"{rates[0]} to {rates[1]} towards and {rates[2]} away: "
        f"{compared('they', sides.effect, control)}{cost}."
    )
    figures = {**sides.figures(), "n_plus": n_plus, "n_minus": n_minus, "controls": _figures(found)}
    return finding, ahead(sides.effect, control), [sides.table(), controls_table(found.values(), sides.effect)], figures


def activate_benign(setup: ExperimentSetup) -> Found:
    """Promote the behaviour's experts, suppress none, and measure what should not change."""
    if not setup.steering.activate:
        raise UsageError("activate-benign promotes experts and suppresses none; give --activate N")
    steering = setup.steering.changed(deactivate=0)
    controls = Controls(min(setup.n_draws, 5), ["random"])
    plan = ControlPlan(setup.evaluator, steering, controls, both_ways=False, seed=setup.seed)
    draws = plan.draws("random").draws
    names = ["unsteered", "towards", "other side", *(f"random {draw.label}" for draw in draws)]
    biases = [None, *setup.biases(steering), *(draw.biases[0] for draw in draws)]
    measured = setup.evaluator.measure(biases, what="benign")
    base, positive = measured[:2]
    rows = [side_row(name, found, base) for name, found in zip(names, measured, strict=True)]
    tables = [Table("Rates and guards", GUARDS, tuple(rows), "each way promotes experts and suppresses none")]
    harms, kept, figures = guard_harms(positive, base)
    if setup.ability is not None:
        task, scorer = setup.ability
        with Evaluator(
            setup.evaluator.model, task, scorer, settings=setup.settings, progress=setup.evaluator.progress
        ) as evaluator:
            able = evaluator.measure(biases, what=task.name)
        changes = [difference(found.values, able[0].values, setup.seed) for found in able]
        rows = [
            (name, str(rate(found.values, setup.seed)), points(change))
            for name, found, change in zip(names, able, changes, strict=True)
        ]
        tables.append(Table(f"Ability: {task.name}", ("side", task.positive or "rate", "change"), tuple(rows)))
        change = changes[1]
        words = f"{task.name} from {percent(able[0].rate)} to {percent(able[1].rate)}"
        (harms if change.value <= -HARM and change.high < 0 else kept).append(words)
        figures["ability"] = {name: found.rate for name, found in zip(names, able, strict=True)}
        figures["ability_change"] = asdict(change)
    if not harms and not kept:
        raise UsageError("activate-benign needs something benign: a neutral text, benign prompts or an ability's task")
    done = f"Promoting {plan.real[0].n_active} experts of {setup.steering.side or setup.steering.name} alone"
    effect = difference(positive.values, base.values, setup.seed)
    if harms:
        rest = f" ({'; '.join(kept)} within bounds)" if kept else ""
        finding = f"{done} does harm where it should not: {'; '.join(harms)}{rest}"
    else:
        finding = f"{done} leaves alone what it should: {'; '.join(kept)}"
    figures |= {"rates": {name: found.rate for name, found in zip(names, measured, strict=True)}}
    figures |= {"effect": asdict(effect)}
    return f"{finding}; its effect is {points(effect)} points.", "against" if harms else "for", tables, figures


def superficial(setup: ExperimentSetup) -> Found:
    """Maps of pairs that differ in form alone, and of pairs that do not differ in the behaviour."""
    sides, found = setup.compare(["superficial", "same-side"], setup.steering)
    effect, control = sides.effect, require(found["superficial"])
    strong = [
        f"{label} {100 * drawn:+.0f}"
        for label, drawn in zip(control.labels, control.effects, strict=True)
        if abs(drawn) >= max(LEAST, effect.value / 2)
    ]
    real = f"the map itself swings it by {points(effect)} points"
    if not works(effect):
        finding = f"{real[0].upper()}{real[1:]}, which is no effect; maps of superficial pairs by {size(control)}."
    elif strong:
        finding = (
            f"Of {control.n} maps of superficial pairs, {len(strong)} steer the behaviour at least half as strongly as "
            f"the map ({', '.join(strong)}): form and behaviour share experts here; {real}."
        )
    else:
        finding = f"Maps of superficial pairs swing the rate by {size(control)}, less than half of the map; {real}."
    verdict: Verdict = "against" if strong or not works(effect) else "for"
    rows = [row for control in found.values() for row in map_rows(control)]
    header = ("map", "pairs", "swing", "experts shared", "shared, turned", "correlation of RD")
    tables = [sides.table(), controls_table(found.values(), effect), Table("Control maps", header, tuple(rows))]
    return finding, verdict, tables, {**sides.figures(), "controls": _figures(found)}


def random_matched(setup: ExperimentSetup) -> Found:
    """As many random experts, evenly drawn, and drawn among those that are activated about as often."""
    sides, found = setup.compare(["random", "matched"], setup.steering)
    effect, even, matched = sides.effect, require(found["random"]), require(found["matched"])
    gaps = [100 * matched.details[name] for name in ("frequency_gap", "frequency_gap_of_even_draws")]
    note = f". Mind that {matched.note}" if matched.note else ""
    finding = (
        f"Experts of matched activation frequency (off by {gaps[0]:.0f} points, against {gaps[1]:.0f} of evenly drawn "
        f"ones) swing the rate by {size(matched)}, evenly drawn ones by {size(even)}; "
        f"{compared('the map', effect, matched)}{note}."
    )
    verdicts = {ahead(effect, even), ahead(effect, matched)}
    verdict: Verdict = "against" if "against" in verdicts else "open" if "open" in verdicts else "for"
    tables = [sides.table(), controls_table(found.values(), effect)]
    return finding, verdict, tables, {**sides.figures(), "controls": _figures(found)}


def _figures(found: Mapping[str, ControlResult]) -> dict[str, Any]:
    return {kind: control.to_dict() for kind, control in found.items()}


def layers(setup: ExperimentSetup) -> Found:
    """The same numbers of experts, chosen in one third of the depth or one layer at a time; and the choice in parts."""
    whole = setup.steering
    expert_map = whole.expert_map
    assert expert_map is not None
    scope = None if whole.layers is None else parse_layers(whole.layers)
    routed = [layer for layer in np.flatnonzero(expert_map.rd.any(axis=1)).tolist() if scope is None or layer in scope]
    by_third = thirds(routed)
    parts = by_third | {f"layer {layer}": (layer,) for layer in routed}
    biases: dict[str, Biases] = {}
    refused: dict[str, str] = {}
    for name, chosen in parts.items():
        try:
            biases[name] = setup.biases(whole.changed(layers=",".join(map(str, chosen))))
        except ChoiceError as error:
            refused[name] = str(error)
    found = setup.measure(biases, "layers")
    rows = [
        (
            name,
            layer_names(chosen),
            *(_part_cells(found[name]) if name in found else ("-", "-", "-", "-", refused[name])),
        )
        for name, chosen in parts.items()
    ]
    header = ("part", "layers", "experts + / -", "towards", "away", "swing")
    finding, verdict = depth_finding({name: sides for name, sides in found.items() if name in by_third}, setup.seed)
    divided = by_layer(setup.evaluator, whole, seed=setup.seed)
    lies = [layer for part in divided.of("layer") for layer in part.layers if part.n_active or part.n_inactive]
    finding = (
        f"With {whole.activate} + {whole.deactivate} experts chosen in one third at a time, {finding} The choice from "
        f"all layers lies in layers {layer_names(lies)}."
    )
    divided_rows = [
        (
            part.name,
            layer_names(part.layers),
            f"{part.n_active} / {part.n_inactive}",
            *("-" if effect is None else points(effect) for effect in (part.steered, part.reversed, part.both)),
        )
        for part in divided.parts
    ]
    title, note = "The same numbers of experts, chosen in each part", "rates; swing in points"
    tables = [
        Table(title, (*header, "note"), tuple(rows), note),
        Table(
            "The choice from all layers, in parts", header, tuple(divided_rows), "points against the unsteered model"
        ),
    ]
    figures = {
        "chosen_in": {name: sides.figures() for name, sides in found.items()},
        "refused": refused,
        "divided": divided.to_dict(),
    }
    return finding, verdict, tables, figures


def _part_cells(sides: Sides) -> tuple[str, ...]:
    n_active, n_inactive = sides.positive.n_experts
    rates = [percent(found.rate) for found in (sides.positive, sides.negative)]
    return (f"{n_active} / {n_inactive}", *rates, points(sides.effect), "")


def routing_kinds(setup: ExperimentSetup) -> Found:
    """The same experts under the hard rule, promoted or suppressed alone, and under soft rules."""
    base = setup.steering.changed(scale=None, weights=None, cap=None)
    variants = {"hard": base}
    if base.activate and base.deactivate:
        variants |= {"hard, promote only": base.changed(deactivate=0), "hard, suppress only": base.changed(activate=0)}
    variants |= {f"soft {scale:g}": base.changed(scale=scale, weights=setup.steering.weights) for scale in SCALES}
    found = setup.measure({name: setup.biases(steering) for name, steering in variants.items()}, "routing kinds")
    rows = [
        (
            name,
            *(str(rate(measured.values, setup.seed)) for measured in (sides.positive, sides.negative)),
            points(sides.effect),
            *text_cells(sides.positive, sides.unsteered),
        )
        for name, sides in found.items()
    ]
    header = ("rule", "towards", "away", "swing", "perplexity ratio", "KL")
    kinds = router_kinds(setup.evaluator)
    tables = [
        Table("Rules", header, tuple(rows), "perplexity and KL (nats) of towards on the neutral text"),
        Table("Routers", ("layers", "gating", "top-k", "selection bias", "expert groups", "steerable"), kinds),
    ]
    figures = {"rules": {name: sides.figures() for name, sides in found.items()}, "routers": [list(k) for k in kinds]}
    return rules_finding(found, kinds), "for" if works(found["hard"].effect) else "against", tables, figures


_EXPERIMENTS = (
    Experiment("random10", "Does steering any ten experts change the behaviour?", random10),
    Experiment("top20", "Do the twenty experts of largest |RD| move the behaviour, and both ways?", top20),
    Experiment(
        "activate-benign", "Does promoting the behaviour's experts leave neutral abilities alone?", activate_benign
    ),
    Experiment("superficial", "Would a map of mere form steer the behaviour as well?", superficial, needs_pairs=True),
    Experiment("random-matched", "Is it these experts, or any that are used as often?", random_matched),
    Experiment("layers", "Where in the depth of the model does the steering work?", layers),
    Experiment("routing-kinds", "Does the effect depend on the rule by which the routers are steered?", routing_kinds),
)
EXPERIMENTS: Mapping[str, Experiment] = {experiment.name: experiment for experiment in _EXPERIMENTS}
"""The experiments by name, in the order in which one would run them."""
