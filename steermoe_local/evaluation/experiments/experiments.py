"""Named experiments: each asks one question of a map, beside its control, and answers it in a sentence from figures.

docs/experiments.md says of each what is steered, what it is compared with, and what would speak for or against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ..._util.files import timestamp, tool_name
from ...errors import UsageError
from ...maps.expert_map import parse_layers
from ...maps.scores import rank
from ..measuring.evaluator import Evaluator
from ..metrics.formatting import in_points, percent, points
from ..metrics.intervals import difference, rate
from ..reports.report import Table
from ..studies.control_draws import Plan
from .setup import Answer, Experiment, Lab
from .within import layers, routing_kinds
from .wording import (
    GUARDS,
    HARM,
    LEAST,
    Verdict,
    ahead,
    compared,
    controls_table,
    cost,
    guard_harms,
    linked,
    map_facts,
    map_row,
    require,
    side_row,
    size,
    swing_figures,
    works,
)

__all__ = ["RECIPES", "Experiment", "Lab", "Recipe", "run_recipe"]


@dataclass(frozen=True)
class Recipe:
    """A named experiment: its question, what answers it, and whether it needs the map's pairs."""

    name: str
    question: str
    answer: Callable[[Lab], Answer]
    needs_pairs: bool = False


def run_recipe(name: str, lab: Lab) -> Experiment:
    """Run a recipe by its name. Raises UsageError, and what measuring raises."""
    if name not in RECIPES:
        raise UsageError(f"{name!r} is no experiment; take one of {', '.join(RECIPES)}")
    recipe = RECIPES[name]
    if recipe.needs_pairs and not lab.pairs:
        raise UsageError(f"{name}: needs the pairs that the map was made of; give them with --pairs FILE")
    finding, verdict, tables, figures = recipe.answer(lab)
    evaluator = lab.evaluator
    facts = {**lab.steering.to_dict(), "map": None}  # a path says where somebody keeps the map, its digest which it is
    about = {
        **evaluator.metadata,
        "steering": facts,
        "map_sha256": facts["map_sha256"],
        "task_sha256": evaluator.task.sha256,
        "settings": evaluator.settings,
        "n_items": len(evaluator.task.items),
        "n_draws": lab.n_draws,
        "seed": lab.seed,
        "tool": tool_name(),
        "created": timestamp(),
    }
    return Experiment(name, recipe.question, finding, verdict, tuple(tables), figures, about)


def random10(lab: Lab) -> Answer:
    """Ten random experts, five promoted and five suppressed, against the ten that the map would take."""
    steering = lab.steering.changed(activate=5, deactivate=5)
    sides = lab.sides(steering)
    control = lab.controls(["random"], steering, sides.swing.value)["random"]
    require(control)
    moved = float(np.mean(np.abs(control.effects) >= LEAST))
    finding = (
        f"Ten random experts swing the rate by {size(control)}, by {in_points(LEAST)} or more in {moved:.0%} of "
        f"{control.n} draws; {compared('the ten experts of the map', sides.swing, control)}."
    )
    rows = [(label, f"{100 * effect:+.0f}") for label, effect in zip(control.labels, control.effects, strict=True)]
    draws = Table("Swing of each draw", ("draw", "points"), tuple(rows))
    figures = {**swing_figures(sides), "random": control.to_dict(), "moved": moved}
    return (
        finding,
        ahead(sides.swing, control),
        [sides.table(), controls_table([control], sides.swing), draws],
        figures,
    )


def top20(lab: Lab) -> Answer:
    """The twenty experts of largest |RD|, each by the sign of its RD, and all of them turned round."""
    expert_map = lab.steering.expert_map
    assert expert_map is not None
    scope = None if lab.steering.layers is None else parse_layers(lab.steering.layers)
    scores = [float(expert_map.rd[layer, expert]) for layer, expert in rank(expert_map.rd, scope)[:20].tolist()]
    n_plus, n_minus = sum(score > 0 for score in scores), sum(score < 0 for score in scores)
    steering = lab.steering.changed(activate=n_plus, deactivate=n_minus)
    reverse = lab.steering.changed(activate=n_minus, deactivate=n_plus, reverse=True)
    sides = lab.sides(steering, reverse)
    found = lab.controls(["random", "bottom"], steering, sides.swing.value, reverse)
    control = found["random"]
    require(control)
    rates = [percent(found.rate) for found in (sides.unsteered, sides.towards, sides.away)]
    finding = (
        f"The top {n_plus + n_minus} experts by |RD| ({n_plus} with RD > 0, {n_minus} with RD < 0) take the rate from "
        f"{rates[0]} to {rates[1]} towards and {rates[2]} away: "
        f"{compared('they', sides.swing, control)}{cost(sides)}."
    )
    figures = {
        **swing_figures(sides),
        "n_plus": n_plus,
        "n_minus": n_minus,
        "controls": {kind: control.to_dict() for kind, control in found.items()},
    }
    return finding, ahead(sides.swing, control), [sides.table(), controls_table(found.values(), sides.swing)], figures


def activate_benign(lab: Lab) -> Answer:
    """Promote the behaviour's experts, suppress none, and look at what has nothing to do with the behaviour."""
    if not lab.steering.activate:
        raise UsageError("activate-benign promotes experts and suppresses none; give --activate N")
    steering = lab.steering.changed(deactivate=0)
    plan = Plan(
        lab.evaluator, steering, False, None, (min(lab.n_draws, 5), 1), None, None, {}, lab.seed, lambda _: None
    )
    draws = plan.random().draws
    names = ["unsteered", "towards", "other side", *(f"random {draw.label}" for draw in draws)]
    ways = (steering, steering.changed(reverse=True))
    biases = [None, *(way.build(lab.evaluator.identity) for way in ways), *(draw.biases[0] for draw in draws)]
    measured = lab.evaluator.measure(biases, what="benign")
    base, towards = measured[:2]
    rows = [side_row(name, found, base) for name, found in zip(names, measured, strict=True)]
    tables = [Table("Rates and guards", GUARDS, tuple(rows), "each way promotes experts and suppresses none")]
    harms, kept, figures = guard_harms(towards, base)
    if lab.ability is not None:
        task, scorer = lab.ability
        with Evaluator(
            lab.evaluator.model, task, scorer, settings=lab.settings, progress=lab.evaluator.progress
        ) as evaluator:
            able = evaluator.measure(biases, what=task.name)
        changes = [difference(found.values, able[0].values, lab.seed) for found in able]
        rows = [
            (name, str(rate(found.values, lab.seed)), points(change))
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
    done = f"Promoting {plan.real[0].n_active} experts of {lab.steering.side or lab.steering.name} alone"
    effect = difference(towards.values, base.values, lab.seed)
    if harms:
        rest = f" ({'; '.join(kept)} within bounds)" if kept else ""
        finding = (
            f"{done} does harm where it should not: {'; '.join(harms)}{rest}; its effect is {points(effect)} points."
        )
    else:
        finding = f"{done} leaves alone what it should: {'; '.join(kept)}; its effect is {points(effect)} points."
    figures |= {"rates": {name: found.rate for name, found in zip(names, measured, strict=True)}}
    return finding, "against" if harms else "for", tables, {**figures, "effect": asdict(effect)}


def superficial(lab: Lab) -> Answer:
    """Maps of pairs that differ in form alone, and of pairs that do not differ in the behaviour."""
    sides = lab.sides(lab.steering)
    found = lab.controls(["superficial", "same-side"], lab.steering, sides.swing.value)
    control = found["superficial"]
    require(control)
    strong = [
        f"{label} {100 * effect:+.0f}"
        for label, effect in zip(control.labels, control.effects, strict=True)
        if abs(effect) >= max(LEAST, sides.swing.value / 2)
    ]
    real = f"the map itself swings it by {points(sides.swing)} points"
    if not works(sides.swing):
        finding = f"{real[0].upper()}{real[1:]}, which is no effect; maps of superficial pairs by {size(control)}."
    elif strong:
        finding = (
            f"Of {control.n} maps of superficial pairs, {len(strong)} steer the behaviour at least half as strongly as "
            f"the map ({', '.join(strong)}): form and behaviour share experts here; {real}."
        )
    else:
        finding = f"Maps of superficial pairs swing the rate by {size(control)}, less than half of the map; {real}."
    verdict: Verdict = "against" if strong or not works(sides.swing) else "for"
    rows = [map_row(label, effect, fact) for c in found.values() for label, effect, fact in map_facts(c)]
    header = ("map", "pairs", "swing", "experts shared", "shared, turned", "correlation of RD")
    tables = [sides.table(), controls_table(found.values(), sides.swing), Table("Control maps", header, tuple(rows))]
    figures = {**swing_figures(sides), "controls": {kind: c.to_dict() for kind, c in found.items()}}
    return finding, verdict, tables, figures


def random_matched(lab: Lab) -> Answer:
    """As many random experts, evenly drawn, and drawn among those that are activated about as often."""
    sides = lab.sides(lab.steering)
    found = lab.controls(["random", "matched"], lab.steering, sides.swing.value)
    even, matched = found["random"], found["matched"]
    require(even)
    require(matched)
    gaps = [100 * matched.details[name] for name in ("frequency_gap", "frequency_gap_of_even_draws")]
    gap = f"{gaps[0]:.0f} points, against {gaps[1]:.0f}"
    finding = (
        f"Experts of matched activation frequency (off by {gap} of evenly drawn ones) swing the rate by "
        f"{size(matched)}, evenly drawn ones by {size(even)}; {compared('the map', sides.swing, matched)}"
        f"{linked(matched)}."
    )
    figures = {**swing_figures(sides), "controls": {kind: control.to_dict() for kind, control in found.items()}}
    verdicts = {ahead(sides.swing, even), ahead(sides.swing, matched)}
    verdict: Verdict = "against" if "against" in verdicts else "open" if "open" in verdicts else "for"
    return finding, verdict, [sides.table(), controls_table(found.values(), sides.swing)], figures


_RECIPES = (
    Recipe("random10", "Does steering any ten experts change the behaviour?", random10),
    Recipe("top20", "Do the twenty experts of largest |RD| move the behaviour, and both ways?", top20),
    Recipe("activate-benign", "Does promoting the behaviour's experts leave neutral abilities alone?", activate_benign),
    Recipe("superficial", "Would a map of mere form steer the behaviour as well?", superficial, needs_pairs=True),
    Recipe("random-matched", "Is it these experts, or any that are used as often?", random_matched),
    Recipe("layers", "Where in the depth of the model does the steering work?", layers),
    Recipe("routing-kinds", "Does the effect hang on the rule by which the routers are steered?", routing_kinds),
)
RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in _RECIPES}
"""The recipes by name, in the order in which one would run them."""
