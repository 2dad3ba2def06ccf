"""What studies share about a steering: its biases in both directions, the effects measured under them, metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._util.files import timestamp, tool_name
from ...errors import UsageError
from ...identity import ModelIdentity
from ...steering.bias_file import BiasFile
from ...steering.bias_plan import AnyBias
from ...steering.plan import AnySteering, SteeringPlan
from ...steering.steering import Steering
from ..measuring.measurements import UNSTEERED, Measurement
from ..metrics.intervals import Interval, difference

if TYPE_CHECKING:
    from ..measuring.evaluator import Evaluator

POSITIVE, NEGATIVE, STEERED, EFFECT = "towards", "away", "steered", "swing"
"""Names of sides and of the effect in files and reports: steering to the map's positive side, to its negative side, by
a bias file; and the rate of the first minus that of the second."""


def has_reverse(steering: AnySteering) -> bool:
    """Whether it can be reversed: not a bias file or a plan, nor a preset, which never steers to the other side."""
    return isinstance(steering, Steering) and steering.expert_map is not None and not steering.preset


def both_ways(steering: Steering, identity: ModelIdentity, reverse: bool = True) -> tuple[BiasFile, ...]:
    """Build the bias of a steering and, with `reverse`, that of the reversed choice, if there is one.

    Raises UsageError for a steering that changes nothing, ChoiceError for what the model cannot carry out.
    """
    steered = steering.build(identity)
    if steered is None:
        raise UsageError(f"{steering.name}: steers nothing; choose experts with activate, deactivate or both")
    if not reverse or not has_reverse(steering):
        return (steered,)
    other = steering.changed(reverse=not steering.reverse).bias_file(identity)
    return (steered,) if other is None else (steered, other)


def side_biases(steering: AnySteering, identity: ModelIdentity, reverse: bool = True) -> dict[str, AnyBias | None]:
    """The bias of each side by its name, the unsteered model's (None) first; with `reverse` of both. As `both_ways`."""
    if isinstance(steering, SteeringPlan):
        plan = steering.build(identity)
        if plan is None:
            raise UsageError(f"{steering.name}: no rule of the plan steers anything; name a map and numbers of experts")
        return {UNSTEERED: None, STEERED: plan}
    biases = both_ways(steering, identity, reverse)
    names = [STEERED] if steering.expert_map is None else [POSITIVE, NEGATIVE]
    if steering.reverse:
        names.reverse()
    found = dict(zip(names, biases, strict=False))
    return {UNSTEERED: None, **{name: found[name] for name in (STEERED, POSITIVE, NEGATIVE) if name in found}}


def effects_of(measured: Mapping[str, Measurement], seed: int = 0) -> dict[str, Interval]:
    """Differences of rates over the same items: each side's minus the unsteered one, and the effect if both are there.

    `measured` has each side by its name. `seed` is the bootstrap's.
    """
    values = {name: found.values for name, found in measured.items()}
    effects = {name: difference(found, values[UNSTEERED], seed) for name, found in values.items() if name != UNSTEERED}
    if {POSITIVE, NEGATIVE} <= values.keys():
        effects[EFFECT] = difference(values[POSITIVE], values[NEGATIVE], seed)
    return effects


def mirrored(effect: Interval) -> Interval:
    """The same effect with the other sign."""
    return replace(effect, value=-effect.value, low=-effect.high, high=-effect.low)


def steering_facts(steering: AnySteering) -> dict[str, Any]:
    """The choice as plain JSON values, without the user's folders."""
    return _without_folders(steering.to_dict())


def _without_folders(facts: dict[str, Any]) -> dict[str, Any]:
    for kind in ("map", "bias", "plan"):
        if facts.get(kind):
            facts[kind] = Path(facts[kind]).name
    for name in ("steering", "looks_at"):
        if facts.get(name):
            facts[name] = _without_folders(facts[name])
    if "rules" in facts:
        facts["rules"] = [_without_folders(rule) for rule in facts["rules"]]
    return facts


def study_metadata(evaluator: Evaluator, steering: Steering) -> dict[str, Any]:
    """The origin of a result as plain JSON values: model, map, task and settings, tool and date."""
    expert_map = steering.expert_map
    source = {} if expert_map is None else {"map_sha256": expert_map.sha256, "behaviour": expert_map.behaviour}
    return {
        "model": evaluator.identity.to_dict(),
        **evaluator.metadata,
        "steering": {
            "name": steering.name,
            **source,
            "side": steering.side,
            "reverse": steering.reverse,
            "layers": steering.layers,
            "scale": steering.scale,
            **steering.further,
        },
        "positive": evaluator.task.positive,
        "negative": evaluator.task.negative,
        "n_items": len(evaluator.task.items),
        "settings": evaluator.settings,
        "tool": tool_name(),
        "created": timestamp(),
    }
