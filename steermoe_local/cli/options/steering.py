"""The options that choose how a model is steered."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...errors import UsageError
from ...identity import ModelIdentity
from ...maps.ranks import RANKS, WEIGHTS
from ...model_files.model_info import model_info
from ...models.shipped_maps import map_path, recommended_numbers
from ...steering.presets import PRESETS
from ...steering.rules import DEFAULT_CAP, EQUAL, OWNERS, RULES, Rule
from ..output import warn
from .groups import RenamedOption, field_options, is_given, option, option_group, rank
from .system_text import UserPath

if TYPE_CHECKING:
    from ...steering.steering import Steering

# What only goes with a map, by the option's name.
_NUMBERS = ("activate", "deactivate", "preset", "reverse", "layers", "rank", "mode", "strength", "cap", "weights")
_RULE = frozenset({"mode", "strength", "cap", "weights"})
_NAMES = {"mode": "--mode", "scale": "--strength", "cap": "--cap", "weights": "--weights"}
_STRENGTH = 1.0  # logits, of a soft rule without --strength

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
    name = Rule().changed(**(near or values), strength=_STRENGTH, names=_NAMES).name
    return {"mode": name, **{field: value for field, value in values.items() if OWNERS.get(field) == name}}


def rule_of(
    mode: str | None, strength: float | None, cap: float | None, weights: str | None, given: Collection[str]
) -> Rule:
    """The rule that the options ask for; a soft one without a strength has 1 logit. Raises as `rule_choice`."""
    return Rule().changed(**rule_choice(mode, strength, cap, weights, given), strength=_STRENGTH, names=_NAMES)


@dataclass(frozen=True)
class SteeringFlags:
    """The options that choose a steering.

    `given` are the names of those on the command line. `bias_is_nearer`: where there is a map, too, the bias counts.
    """

    map_file: str | None = option(
        "--map",
        metavar="MAP",
        help="Expert map to steer by: a file, or the name of a map that ships with the embedded model, like "
        "digits-words.",
    )
    activate: int | None = option(
        "--activate", type=click.IntRange(0), metavar="N", help="Experts with RD > 0 to promote."
    )
    deactivate: int | None = option(
        "--deactivate", type=click.IntRange(0), metavar="N", help="Experts with RD < 0 to suppress."
    )
    rank: str = option(*RANK[0], **RANK[1])
    preset: str | None = option(
        "--preset", type=click.Choice(PRESETS), help="Numbers of experts that the paper took for this model."
    )
    reverse: bool = option(
        "--reverse", is_flag=True, help="Steer to the map's negative side: flip the sign of RD first."
    )
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
        help="Soft rule: add X to the router's logits of promoted experts, take it from suppressed ones.  "
        f"[default: {_STRENGTH:g} with --mode soft]",
    )
    cap: float | None = option(*CAP[0], **CAP[1])
    weights: str | None = option(*SOFT_WEIGHTS[0], **SOFT_WEIGHTS[1])
    bias: Path | None = option(
        "--bias",
        type=UserPath(path_type=Path),
        envvar="STEERMOE_BIAS",
        show_envvar=True,
        help="Bias file to steer by, instead of a map.",
    )
    force: bool = option(
        "--force", is_flag=True, help="Accept a map or bias whose router hash is another one, if the shape fits."
    )
    given: frozenset[str] = frozenset()
    bias_is_nearer: bool = False

    def __post_init__(self) -> None:
        """Raise UsageError for flags that exclude each other.

        Only flags of the command line can: what comes from the environment or the configuration gives way to them.
        """
        if {"map_file", "bias"} <= self.given:
            raise UsageError("--bias and --map both steer; give one of them")
        numbers = [f"--{name}" for name in _NUMBERS if name in self.given]
        if numbers and not self._map:
            what = "a bias file's choice of experts is made" if self._bias else "the experts are chosen from a map"
            raise UsageError(f"{numbers[0]}: {what}; give the map with --map MAP")
        if "preset" in self.given and (both := self.given & {"activate", "deactivate", "reverse"}):
            raise UsageError(f"--preset gives the numbers and the side; leave out --{min(both)}, or --preset")
        if "preset" in self.given and "rank" in self.given and self.rank != "rd":
            raise UsageError("--preset gives the paper's numbers, which are those of --rank rd; leave out one of them")
        if self.wanted or self.given & _RULE:
            _ = self.rule

    @property
    def wanted(self) -> bool:
        """Whether there is a map or a bias file to steer by."""
        return self._map is not None or self._bias is not None

    @property
    def rule(self) -> Rule:
        """The rule that the options ask for. Raises UsageError for some that exclude each other."""
        return rule_of(self.mode, self.strength, self.cap, self.weights, self.given)

    @property
    def _map(self) -> str | None:
        return None if self.bias is not None and self.bias_is_nearer else self.map_file

    @property
    def _bias(self) -> Path | None:
        return self.bias if self._map is None else None

    @property
    def source(self) -> dict[str, str]:
        """Where the steering comes from, as it was named: {"map": ...} or {"bias": ...}, {} for none."""
        if self._map is not None:
            return {"map": self._map}
        return {} if self._bias is None else {"bias": str(self._bias)}

    def open(self, identity: ModelIdentity | None, model_path: Path) -> Steering | None:
        """Read the map or bias file and check that it fits the model; None when nothing is to be steered.

        `identity` is the model's. None: for a map it is read from the file, which takes hashing its routers; a bias
        file is then only checked when it is attached. Warnings go to stderr.

        Raises FormatError, ModelMismatchError, ModelError, UsageError (no numbers of experts).
        """
        from ...steering.steering import Steering

        if self._map is not None:
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
        """The map's steering with the numbers of the flags, of the preset, or of the card that a shipped map has."""
        choice: dict[str, Any] = {"layers": self.layers, **self.rule.fields}
        preset = self.preset and ("preset" in self.given or not self.given & {"activate", "deactivate", "rank"})
        if self.preset and preset:
            steering, warnings = steering.changed(**choice).with_preset(self.preset)
            warn(*warnings)
            return steering
        numbers: tuple[int | None, int | None] = (self.activate, self.deactivate)
        if numbers == (None, None):
            numbers = recommended_numbers(path) or numbers
        if not any(numbers):
            raise UsageError(
                f"{path}: nothing to steer; say how many experts: --activate N (RD > 0), --deactivate N (RD < 0) or "
                f"both, or --preset {'|'.join(PRESETS)} for the paper's models"
            )
        choice |= {"activate": numbers[0] or 0, "deactivate": numbers[1] or 0, "reverse": self.reverse}
        return steering.changed(**choice, rank=self.rank)


def _flags(**values: Any) -> SteeringFlags:
    return SteeringFlags(
        **values,
        given=frozenset(filter(is_given, values)),
        bias_is_nearer="map_file" in values and "bias" in values and rank("bias") < rank("map_file"),
    )


steering_options = option_group(_flags, "steering_flags", field_options(SteeringFlags))
"""How to steer; the command gets the flags as `steering_flags` (SteeringFlags)."""
