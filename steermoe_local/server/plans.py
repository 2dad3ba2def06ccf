"""Plans of requests and of the maps folder: their names looked up, and what is kept of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from .._util.closest import did_you_mean
from ..errors import SteerMoEError, UsageError
from ..maps.expert_map import ExpertMap
from ..steering.plan import AnySteering, PlanRule, SteeringPlan, map_of_condition, require_experts
from ..steering.plan_rules import RuleSpec
from ..steering.rules import json_cap
from ..steering.steering import Steering
from .api_errors import ApiError, as_api_error, request_error
from .choices import whole_choice, with_choice
from .schemas import SteeringChoice
from .schemas_plans import is_name, one_line

_NAMES_TOLD = 20  # registered names in a message


class _UnknownName(UsageError):
    """A rule names what is not registered."""


@contextmanager
def refusing(param: str) -> Iterator[None]:
    """Make errors of a request's plan, which name the rule, those of the field `param` with status 400."""
    try:
        yield
    except SteerMoEError as error:
        code = "steering_not_found" if isinstance(error, _UnknownName) else as_api_error(error).code
        raise ApiError(400, f"{param}: {one_line(error)}", param=param, code=code) from None


def open_plan(
    rules: Sequence[RuleSpec],
    entries: Mapping[str, AnySteering],
    name: str,
    *,
    made_of: Mapping[str, str] | None = None,
    path: Path | None = None,
) -> SteeringPlan:
    """A plan whose rules name `entries`; every rule of it gives all that is chosen of its map.

    With `made_of` (`sources` of the plan when it was written) its names must stand for the same maps and biases, and
    the numbers are those of the rules alone. Raises UsageError and what a choice raises, with the rule's number.
    """

    def steering(named: str, choice: Mapping[str, Any]) -> Steering:
        found = _source(named, entries, made_of)
        if made_of is not None and found.expert_map is not None:
            found = Steering(named, found.expert_map, path=found.path).recommending(choice)
        fields: dict[str, Any] = {key: json_cap(value) if key == "cap" else value for key, value in choice.items()}
        try:
            changed = with_choice(found, SteeringChoice(map=named, **fields))
        except ValidationError as error:
            raise UsageError(str(request_error(error))) from None
        require_experts(named, changed, choice)
        return changed

    def expert_map(named: str) -> tuple[ExpertMap, Path | None]:
        return map_of_condition(named, _source(named, entries, made_of))

    plan = SteeringPlan.open(rules, steering, expert_map, name=name, path=path)
    return replace(plan, rules=tuple(map(with_all, plan.rules)))


def _source(name: str, entries: Mapping[str, AnySteering], made_of: Mapping[str, str] | None) -> Steering:
    if not is_name(name):
        raise UsageError(f"{name[:80]!r} is no name of a registered map or bias; rules take no paths")
    found = entries.get(name)
    if found is None:
        names = sorted(known for known, entry in entries.items() if isinstance(entry, Steering))
        told = ", ".join([*names[:_NAMES_TOLD], *(["..."] if len(names) > _NAMES_TOLD else [])])
        raise _UnknownName(
            f"steering {name!r} is not registered; there are: {told or 'none'}{did_you_mean(name, names)}"
        )
    if isinstance(found, SteeringPlan):
        raise UsageError(f"{name}: a plan; a rule names a map or a bias file")
    if made_of is not None and made_of.get(name) != found.source_sha256:
        raise UsageError(f"{name!r} is not what the plan was made of; register the plan again")
    return found


def with_all(rule: PlanRule) -> PlanRule:
    """The rule with all that it chooses: a name may stand for other numbers by the time that it is read again."""
    if rule.steering is None or rule.steering.expert_map is None:
        return rule
    choice = whole_choice(rule.steering)
    if choice.get("cap") == "inf":
        choice["cap"] = math.inf
    return replace(rule, spec=replace(rule.spec, choice=choice))


def sources(plan: SteeringPlan) -> dict[str, str]:
    """By name the digests of the maps and biases that a plan was made of."""
    found = {}
    for rule in plan.rules:
        when = rule.spec.where.when
        if rule.spec.name is not None and rule.steering is not None and (digest := rule.steering.source_sha256):
            found[rule.spec.name] = digest
        if when is not None and rule.looks_at is not None:
            found[when.map] = rule.looks_at.sha256
    return found


def tables_of(plan: SteeringPlan) -> list[Steering]:
    """The maps and biases that a plan keeps in memory, each once, without choices."""
    maps = [rule.looks_at for rule in plan.rules] + [steering.expert_map for steering in plan.steerings]
    biases = {steering.bias.key: steering for steering in plan.steerings if steering.bias is not None}
    return [
        *(Steering(plan.name, found) for found in {one.sha256: one for one in maps if one is not None}.values()),
        *biases.values(),
    ]
