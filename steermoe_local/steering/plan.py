"""Steering plans: an ordered list of rules, each of which says where in a text which steering is in force."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.files import is_sha256
from ..errors import FormatError, UsageError, prefixed
from ..identity import ModelIdentity
from ..maps.expert_map import ExpertMap
from ..maps.routing_lean import RoutingLean
from .bias_file import BiasFile
from .bias_plan import AnyBias, BiasRule, simplest
from .plan_objects import rule_to_dict, rules_from
from .plan_rules import MAX_RULES, RuleSpec
from .plan_text import format_rule, parse_rule
from .steering import Steering

OpenSteering = Callable[[str, Mapping[str, Any]], Steering]
"""(name, choice of experts) -> the steering that a rule names. Raises for an unknown name or an impossible choice."""
OpenMap = Callable[[str], tuple[ExpertMap, Path | None]]
"""name -> the map that a condition names, and its file."""


@dataclass(frozen=True, eq=False)
class PlanRule:
    """A rule whose names were looked up.

    `steering` None: nothing steers there. `looks_at` is the map of a condition on routing, `looks_at_path` its file.
    """

    spec: RuleSpec
    steering: Steering | None
    looks_at: ExpertMap | None = None
    looks_at_path: Path | None = None

    @property
    def text(self) -> str:
        """The rule as people write it."""
        return format_rule(self.spec)

    @property
    def lean(self) -> RoutingLean | None:
        """What the condition looks at, if it is one on routing. Raises UsageError for a map without its scores."""
        when = self.spec.where.when
        return None if self.looks_at is None or when is None else RoutingLean.of_map(self.looks_at, when.by)


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """Rules, of which the first one that matches a token steers it; without a match it is unsteered.

    Takes the place of a `Steering` wherever an answer is steered. `name` is shown to users, `path` is the file of the
    plan, if it has one.
    """

    name: str
    rules: tuple[PlanRule, ...]
    path: Path | None = None

    @classmethod
    def open(
        cls,
        rules: Sequence[RuleSpec | str | Mapping[str, Any]],
        steering: OpenSteering,
        expert_map: OpenMap,
        *,
        name: str = "plan",
        path: Path | None = None,
    ) -> SteeringPlan:
        """Look up what rules name, in their text form, their object form, or read already.

        Raises UsageError, which names the rule, and what `steering` and `expert_map` raise, with the rule's number
        before the message.
        """
        specs = rules_from(rules)
        found = [_looked_up(number, spec, steering, expert_map) for number, spec in enumerate(specs, 1)]
        return cls(name, tuple(found), path)

    @property
    def texts(self) -> list[str]:
        """The rules as people write them."""
        return [rule.text for rule in self.rules]

    @property
    def steerings(self) -> list[Steering]:
        """The steerings of the rules, each once."""
        return list(dict.fromkeys(rule.steering for rule in self.rules if rule.steering is not None))

    @property
    def windows(self) -> list[str]:
        """Where each rule is, and whether it steers: its text with "steered" in the place of what steers."""
        return [format_rule(RuleSpec(rule.spec.where, rule.spec.name and "steered")) for rule in self.rules]

    @property
    def needs_routing(self) -> bool:
        """Whether a condition looks at the routing of the text."""
        return any(rule.looks_at is not None for rule in self.rules)

    @property
    def single(self) -> Steering | None:
        """The steering of the rules, if all that steer have the same one; None otherwise."""
        contents = {steering.content for steering in self.steerings}
        return self.steerings[0] if len(contents) == 1 else None

    def placed(self, bias: BiasFile | None) -> AnyBias | None:
        """What steers when `bias` takes the place of every steering of the plan."""
        return simplest(
            [BiasRule(rule.spec.where, None if rule.steering is None else bias, rule.lean) for rule in self.rules]
        )

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map of all steerings, if they are of one map; None otherwise."""
        found = list(dict.fromkeys(steering.expert_map for steering in self.steerings))
        if not found or None in found or len({made.sha256 for made in found if made}) > 1:
            return None
        return found[0]

    @property
    def identity(self) -> ModelIdentity | None:
        """The model that the first map or bias was made for; None if nothing steers."""
        return next((steering.identity for steering in self.steerings), None)

    @property
    def mode(self) -> str:
        """The rule of all steerings (hard, soft or capped), "mixed" for several, "" if nothing steers."""
        modes = {steering.mode for steering in self.steerings}
        return modes.pop() if len(modes) == 1 else "mixed" if modes else ""

    @property
    def side(self) -> str:
        """The side that all steerings steer towards, "" if there are several."""
        sides = {steering.side for steering in self.steerings}
        return sides.pop() if len(sides) == 1 else ""

    @property
    def shortfall(self) -> str:
        """The first of the steerings' shortfalls, with its rule's number; "" without any. Raises as `build`."""
        for number, rule in enumerate(self.rules, 1):
            with prefixed(f"rule {number}"):
                words = "" if rule.steering is None else rule.steering.shortfall
            if words:
                return f"rule {number}: {words}"
        return ""

    def check(self, identity: ModelIdentity, where: str, force: bool = False) -> list[str]:
        """Check that all maps and biases were made for the model `identity`, whose file is `where`.

        Returns warnings, as `ModelIdentity.require_same`. Raises ModelMismatchError.
        """
        warnings: dict[str, None] = {}
        for number, rule in enumerate(self.rules, 1):
            if rule.steering is not None:
                warnings |= dict.fromkeys(rule.steering.check(identity, where, force))
            if rule.looks_at is not None:
                what = f"rule {number}: when {rule.spec.where.when.map}" if rule.spec.where.when else ""
                warnings |= dict.fromkeys(rule.looks_at.identity.require_same(identity, what, where, force))
        return list(warnings)

    def build(self, identity: ModelIdentity | None = None) -> AnyBias | None:
        """What steers by this plan: a `BiasPlan`; a bias alone if one is in force at every token; None if none ever is.

        It is made for `identity`, by default that of the maps; see `check`. Raises ChoiceError, UsageError, FormatError
        for what the model cannot carry out, with the rule's number before the message.
        """
        return simplest([_built(number, rule, identity) for number, rule in enumerate(self.rules, 1)])

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for plans that build equal biases for one model, however they are written and their maps called."""
        return tuple(
            (
                rule.spec.where.nameless,
                None if rule.steering is None else rule.steering.content,
                None if rule.looks_at is None else rule.looks_at.sha256,
                None if rule.spec.where.when is None else rule.spec.where.when.by,
            )
            for rule in self.rules
        )

    @property
    def sha256(self) -> str:
        """Digest of `content`, in hex."""
        return hashlib.sha256(repr(self.content).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain JSON values: its rules as texts and as objects, with what steers. Raises as `build`."""
        return {
            "name": self.name,
            "plan": None if self.path is None else str(self.path),
            "plan_sha256": self.sha256,
            "rules": [_rule_dict(rule) for rule in self.rules],
        }

    @classmethod
    def from_dict(cls, data: object, where: str = "steering") -> SteeringPlan:
        """Open the files that `to_dict` describes; their digests must be the same.

        `where` starts the messages. Raises FormatError, also for a file that is missing or has changed.
        """
        rules = data.get("rules") if isinstance(data, Mapping) else None
        name = data.get("name") if isinstance(data, Mapping) else None
        if not isinstance(rules, list) or not 1 <= len(rules) <= MAX_RULES or not isinstance(name, str):
            raise FormatError(f"{where}: not a plan with a name and 1 to {MAX_RULES} rules; choose the steering again")
        found = []
        for number, rule in enumerate(rules, 1):
            at = f"{where}.rules[{number}]"
            text = rule.get("text") if isinstance(rule, Mapping) else None
            if not isinstance(text, str):
                raise FormatError(f"{at}: not a rule with its text; choose the steering again")
            try:
                spec = parse_rule(text, number)
            except UsageError as error:
                raise FormatError(f"{at}: {error}") from None
            steers, looks_at, when = rule.get("steering"), rule.get("looks_at"), spec.where.when
            for part, there, needed in (
                ("steering", steers is not None, spec.name is not None),
                ("looks_at", looks_at is not None, when is not None and when.measure == "routing"),
            ):
                if there != needed:
                    what = "missing" if needed else "not of this rule"
                    raise FormatError(f"{at}.{part}: {what}, {format_rule(spec)}; choose the steering again")
            steering = None if steers is None else Steering.from_dict(steers, f"{at}.steering")
            found.append(PlanRule(spec, steering, *_map_from(looks_at, f"{at}.looks_at")))
        plan = data.get("plan") if isinstance(data, Mapping) else None
        return cls(name, tuple(found), Path(plan) if isinstance(plan, str) and "\0" not in plan else None)

    def to_json(self) -> dict[str, Any]:
        """The content of a plan's file, NAME.plan.json: {"rules": [...]} in their object form."""
        return {"rules": [rule_to_dict(rule.spec) for rule in self.rules]}


AnySteering = Steering | SteeringPlan
"""What can be chosen to steer answers."""


def require_experts(name: str, steering: Steering, choice: Mapping[str, Any]) -> None:
    """Check that a rule with `choice` of the map `name` steers something. Raises UsageError, which says how."""
    if steering.expert_map is None or steering.has_experts:
        return
    if {"activate", "deactivate"} & choice.keys():
        raise UsageError(f"{name}: no experts, so nothing steers there; write +N or -N, or none in the map's place")
    raise UsageError(
        f"{name}: the map recommends no numbers of experts; write +N for those to promote (RD > 0), -N for those to "
        f"suppress (RD < 0), like {name} +N -M (steermoe tune finds good ones, steermoe learn makes a map that "
        "has them)"
    )


def map_of_condition(name: str, source: Steering) -> tuple[ExpertMap, Path | None]:
    """The map, and its file, that a condition names `name`. Raises UsageError for a bias file."""
    if source.expert_map is None:
        raise UsageError(f"when {name}: a bias file has no scores to look at; name an expert map")
    return source.expert_map, source.path


def _rule_dict(rule: PlanRule) -> dict[str, Any]:
    steering = None if rule.steering is None else rule.steering.to_dict()
    data: dict[str, Any] = {"text": rule.text, **rule_to_dict(rule.spec), "steering": steering}
    if rule.looks_at is not None:
        path = None if rule.looks_at_path is None else str(rule.looks_at_path)
        data["looks_at"] = {"map": path, "map_sha256": rule.looks_at.sha256}
    return data


def _map_from(data: object, where: str) -> tuple[ExpertMap | None, Path | None]:
    """The map that a condition looks at, as `_rule_dict` describes it. Raises FormatError."""
    if data is None:
        return None, None
    path, digest = (data.get("map"), data.get("map_sha256")) if isinstance(data, Mapping) else (None, None)
    if not isinstance(path, str) or "\0" in path or not is_sha256(digest):
        raise FormatError(f"{where}: not a map with its file and digest; choose the steering again")
    if not Path(path).is_file():
        raise FormatError(f"{where}.map: {path}: no such file; bring it back or choose another steering")
    expert_map = ExpertMap.load(path)
    if expert_map.sha256 != digest:
        raise FormatError(f"{where}.map: {path}: not the file that it was; bring the old one back or choose again")
    return expert_map, Path(path)


def _looked_up(number: int, spec: RuleSpec, steering: OpenSteering, expert_map: OpenMap) -> PlanRule:
    when = spec.where.when
    with prefixed(f"rule {number}"):
        found = None if spec.name is None else steering(spec.name, spec.choice)
        if when is None or when.measure != "routing":
            return PlanRule(spec, found)
        looked_up = PlanRule(spec, found, *expert_map(when.map))
        _ = looked_up.lean  # what the map lacks is told now
        return looked_up


def _built(number: int, rule: PlanRule, identity: ModelIdentity | None) -> BiasRule:
    with prefixed(f"rule {number}"):
        return BiasRule(rule.spec.where, None if rule.steering is None else rule.steering.build(identity), rule.lean)
