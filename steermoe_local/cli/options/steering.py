"""The options that choose how a model is steered."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...identity import ModelIdentity
from ...maps.ranks import RANKS, WEIGHTS
from ...maps.recommended import nothing_to_steer
from ...model_files.model_info import model_info
from ...models.shipped_maps import map_path
from ...steering.plan_file import read_plan
from ...steering.presets import PRESETS
from ...steering.rules import DEFAULT_CAP, DEFAULT_STRENGTH, EQUAL, OWNERS, RULES, Rule
from ..output import warn
from .groups import STEERING, RenamedOption, field_options, is_given, option, option_group, rank
from .plans import RuleText, parse_texts, rule_texts
from .settings import provenance_of
from .system_text import UserPath

if TYPE_CHECKING:
    from ...evaluation.measuring.plans import Find
    from ...steering.plan import AnySteering
    from ...steering.plan_rules import RuleSpec
    from ...steering.steering import Steering

# What names a steering, by parameter: of those that are equally near the first counts.
_SOURCES = {"map_file": "--map", "bias": "--bias", "steer": "--steer", "plan": "--plan"}
# What only goes with a map, by the option's name.
_NUMBERS = ("activate", "deactivate", "preset", "reverse", "layers", "rank", "mode", "strength", "cap", "weights")
_RULE = frozenset({"mode", "strength", "cap", "weights"})
_NAMES = {"mode": "--mode", "scale": "--strength", "cap": "--cap", "weights": "--weights"}

OF_EACH_RULE = "each rule of a plan has its own choice of experts; write it there, like answer: NAME +8 -8 layers=3-7"
"""Why an option that chooses experts does not go with a plan."""

# Options of commands that choose experts, as names and attributes: `rank` names the score, the others are of the rule.
RANK: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--rank", "--score"),
    {
        "type": click.Choice(RANKS),
        "default": "rd",
        "show_default": True,
        "help": "Score by which experts are chosen; effect and efficiency need a map of `steermoe attribute`.",
    },
)
CAP: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--cap",),
    {
        "type": float,
        "metavar": "X",
        "help": "Capped rule: the hard one, but no logit moves by more than X; inf: any way.  "
        f"[default: {DEFAULT_CAP:g} with --mode capped]",
    },
)
SOFT_WEIGHTS: tuple[tuple[str, ...], dict[str, Any]] = (
    ("--weights",),
    {
        "type": click.Choice([*WEIGHTS, EQUAL]),
        "help": "Soft rule: strength in proportion to this score, the largest of the chosen in full.  "
        f"[default: {EQUAL}, all alike]",
    },
)


def rule_choice(
    mode: str | None, strength: float | None, cap: float | None, weights: str | None, given: Collection[str]
) -> dict[str, Any]:
    """What the options ask for, as arguments of `Rule.changed`; {} for nothing.

    What is not of the command line (`given`) gives way to what is. Raises UsageError for options that exclude each
    other.
    """
    if strength is not None and not math.isfinite(strength):
        raise UsageError(f"--strength {strength}: not a number of logits; give one like 2.5")
    asked = {"mode": mode, "scale": strength, "cap": cap, "weights": weights}
    values: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    near = {name: value for name, value in values.items() if _NAMES[name][2:] in given and value != EQUAL}
    if not near and mode is not None:
        near = {"mode": mode}
    if not values:
        return {}
    name = Rule().changed(**(near or values), strength=DEFAULT_STRENGTH, names=_NAMES).name
    return {"mode": name, **{field: value for field, value in values.items() if OWNERS.get(field) == name}}


def rule_of(
    mode: str | None, strength: float | None, cap: float | None, weights: str | None, given: Collection[str]
) -> Rule:
    """The rule that the options ask for; a soft one without a strength has 1 logit. Raises as `rule_choice`."""
    return Rule().changed(**rule_choice(mode, strength, cap, weights, given), strength=DEFAULT_STRENGTH, names=_NAMES)


@dataclass(frozen=True)
class SteeringFlags:
    """The options that choose a steering.

    `given` are the names of those on the command line. `ranks` says how near --map, --bias, --steer and --plan were
    given (`groups.rank`): the nearest counts.
    """

    map_file: str | None = option(
        "--map",
        metavar="MAP",
        help="Map to steer by, as it recommends: a file, or the name of one you learnt or that ships (digits-words).",
    )
    activate: int | None = option(
        "--activate", type=click.IntRange(0), metavar="N", help="Promote the first N experts with RD > 0."
    )
    deactivate: int | None = option(
        "--deactivate", type=click.IntRange(0), metavar="N", help="Suppress the first N experts with RD < 0."
    )
    rank: str = option(*RANK[0], **RANK[1])
    preset: str | None = option(
        "--preset", type=click.Choice(PRESETS), help="Numbers of experts that the paper took for this model."
    )
    reverse: bool = option("--reverse", is_flag=True, help="Steer to the map's negative side.")
    layers: str | None = option("--layers", metavar="A-B", help="Steer only these layers, like 3-7,9.  [default: all]")
    mode: str | None = option(
        "--mode", type=click.Choice(RULES), help="Steering rule.  [default: hard, or that of the options below]"
    )
    strength: float | None = option(
        "--strength",
        cls=RenamedOption,
        old_names=("--scale",),
        type=float,
        metavar="X",
        help=f"Soft rule: move router logits by X.  [default: {DEFAULT_STRENGTH:g} with --mode soft]",
    )
    cap: float | None = option(*CAP[0], **CAP[1])
    weights: str | None = option(*SOFT_WEIGHTS[0], **SOFT_WEIGHTS[1])
    bias: Path | None = option(
        "--bias",
        type=UserPath(path_type=Path),
        envvar="STEERMOE_BIAS",
        show_envvar=True,
        help="Bias file to steer by.",
    )
    steer: tuple[str, ...] = option(
        "--steer",
        type=RuleText(),
        multiple=True,
        metavar="RULE",
        help='Rule of a steering plan, like "thinking: none"; may be given again.',
    )
    plan: Path | None = option(
        "--plan",
        type=UserPath(path_type=Path),
        metavar="FILE",
        help="File of a steering plan (docs/plans.md).",
    )
    force: bool = option(
        "--force", is_flag=True, help="Accept a map or bias whose router hash is another one, if the shape fits."
    )
    given: frozenset[str] = frozenset()
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UsageError for flags that exclude each other.

        Only flags of the command line can: what comes from the environment or the configuration gives way to them.
        """
        typed = sorted(option for name, option in _SOURCES.items() if name in self.given)
        if len(typed) > 1:
            raise UsageError(f"{typed[0]} and {typed[1]} both steer; give one of them")
        numbers = [f"--{name}" for name in _NUMBERS if name in self.given]
        if numbers and self._source in ("steer", "plan"):
            raise UsageError(f"{numbers[0]}: {OF_EACH_RULE}")
        if numbers and not self._map:
            what = "a bias file's choice of experts is made" if self._bias else "the experts are chosen from a map"
            raise UsageError(f"{numbers[0]}: {what}; give the map with --map MAP")
        if "preset" in self.given and (both := self.given & {"activate", "deactivate", "reverse"}):
            raise UsageError(f"--preset gives the numbers and the side; leave out --{min(both)}, or --preset")
        if "preset" in self.given and "rank" in self.given and self.rank != "rd":
            raise UsageError("--preset gives the paper's numbers, which are those of --rank rd; leave out one of them")
        if self.wanted or self.given & _RULE:
            _ = self.rule
        if self._source == "steer":
            _ = self.rules

    @property
    def wanted(self) -> bool:
        """Whether there is a map, a bias file or a plan to steer by."""
        return self._source is not None

    @property
    def rule(self) -> Rule:
        """The rule that the options ask for. Raises UsageError for some that exclude each other."""
        return rule_of(self.mode, self.strength, self.cap, self.weights, self.given)

    @property
    def _rule_choice(self) -> dict[str, Any]:
        return rule_choice(self.mode, self.strength, self.cap, self.weights, self.given)

    @property
    def _source(self) -> str | None:
        """The parameter that names what steers."""
        there = [name for name in _SOURCES if getattr(self, name)]
        return min(there, key=lambda name: self.ranks.get(name, 0), default=None)

    @property
    def _map(self) -> str | None:
        return self.map_file if self._source == "map_file" else None

    @property
    def _bias(self) -> Path | None:
        return self.bias if self._source == "bias" else None

    @property
    def source(self) -> dict[str, str]:
        """Where the steering comes from, as it was named: {"map": ...}, {"bias": ...}, {"steer": ...} or {"plan": ...}.

        {} for none.
        """
        if self._source is None:
            return {}
        value = getattr(self, self._source)
        shown = "; ".join(rule_texts(self.steer)) if self._source == "steer" else str(value)
        return {_SOURCES[self._source][2:]: shown}

    @property
    def is_plan(self) -> bool:
        """Whether rules of a plan are what steers."""
        return self._source in ("steer", "plan")

    @cached_property
    def rules(self) -> Sequence[RuleSpec]:
        """The rules of the plan, none without one. Raises UsageError, FormatError, which name the rule."""
        if self._source == "steer":
            try:
                return parse_texts(self.steer)
            except UsageError as error:
                raise UsageError(f"--steer: {error}{provenance_of('steer')}") from None
        return read_plan(self.plan) if self._source == "plan" and self.plan else ()

    @property
    def map_name(self) -> str | None:
        """The name of the map that steers, as it was given; None for several, or for a bias file. Raises as `rules`."""
        names = {rule.name for rule in self.rules if rule.name is not None}
        return self._map if not self.is_plan else names.pop() if len(names) == 1 else None

    def open(self, identity: ModelIdentity | None, model_path: Path, find: Find = map_path) -> AnySteering | None:
        """Read the map, bias file or plan and check that it fits the model; None when nothing is to be steered.

        `identity` is the model's. None: for a map or plan it is read from the file, which takes hashing its routers; a
        bias file is then only checked when it is attached. `find` looks up what the rules of a plan name. Warnings go
        to stderr.

        Raises FormatError, ModelMismatchError, ModelError, UsageError (no numbers of experts, a bad rule).
        """
        from ...steering.steering import Steering

        steering: AnySteering
        if self.is_plan:
            from ...evaluation.measuring.plans import open_plan

            rules = self.plan if self._source == "plan" and self.plan else self.rules
            steering = open_plan(rules, find=find, tell=warn)
            identity = identity or model_info(model_path).require_moe()
        elif self._map is not None:
            path = map_path(self._map)
            steering = self._choice(Steering.open(map_file=path), path)
            identity = identity or model_info(model_path).require_moe()
        elif self._bias is not None:
            steering = Steering.open(bias=self._bias)
        else:
            return None
        if identity is not None:
            warn(*steering.check(identity, str(model_path), self.force))
        warn(*filter(None, [steering.shortfall]))
        return steering

    def _choice(self, steering: Steering, path: Path) -> Steering:
        """The map's steering with the choice of the flags, of the preset, or the one that the map recommends."""
        preset = self.preset and ("preset" in self.given or not self.given & {"activate", "deactivate", "rank"})
        if self.preset and preset:
            steering, warnings = steering.changed(layers=self.layers, **self.rule.fields).with_preset(self.preset)
            warn(*warnings)
            return steering
        if self.activate is self.deactivate is None and steering.recommended is not None:
            # what is not given is as it is recommended
            choice = {"layers": self.layers, "reverse": self.reverse or None, **self._rule_choice}
            if self.rank != "rd" or "rank" in self.given:
                choice["rank"] = self.rank
            return steering.recommending(choice).with_choice(choice, strength=DEFAULT_STRENGTH)[0]
        if not self.activate and not self.deactivate:
            raise UsageError(
                f"{nothing_to_steer(path, self.activate, self.deactivate)}, or give --preset {'|'.join(PRESETS)} for "
                "the paper's models"
            )
        return steering.changed(
            activate=self.activate or 0,
            deactivate=self.deactivate or 0,
            reverse=self.reverse,
            layers=self.layers,
            rank=self.rank,
            **self.rule.fields,
        )


def _flags(**values: Any) -> SteeringFlags:
    return SteeringFlags(
        **values,
        given=frozenset(filter(is_given, values)),
        ranks={name: rank(name) for name in _SOURCES if name in values},
    )


_COMMON = ("map_file", "activate", "deactivate", "reverse", "strength", "bias", "steer")

steering_options = option_group(
    _flags, "steering_flags", field_options(SteeringFlags), heading=STEERING, common=_COMMON
)
"""How to steer; the command gets the flags as `steering_flags` (SteeringFlags)."""
