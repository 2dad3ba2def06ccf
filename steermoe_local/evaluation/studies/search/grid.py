"""A grid of choices: read from lists as on the command line, and built into biases."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ....errors import ChoiceError, UsageError
from ....identity import ModelIdentity
from ....steering.bias_file import BiasFile
from ....steering.rules import MAX_CAP, Rule, json_cap
from ....steering.steering import Steering
from ...measuring.json_values import plain
from ...measuring.measurements import UNSTEERED, bias_key
from .objective import map_of

_MOST_CHOICES = 100_000  # a grid of more is a typing error
MOST = 10_000
"""Most numbers that a list may come to."""

_NUMBER = r"[0-9]{1,9}"
_RANGE = re.compile(rf"({_NUMBER})(?:\.\.({_NUMBER})(?::({_NUMBER}))?)?")


def parse_numbers(text: str, what: str = "numbers") -> tuple[int, ...]:
    """Whole numbers from 0 up, each once, in the order in which they stand: "0,5" or "0..200:20".

    `a..b:step` goes from a to b, b included if a step ends there; `a..b` goes by 1. Commas separate the parts.

    Raises UsageError; `what` begins its message.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{what}: {part.strip()!r} in {text!r} is not like 5 or 0..200:20")
        first, last, step = (int(group) if group else None for group in match.groups())
        assert first is not None  # the pattern has it
        if step == 0:
            raise UsageError(f"{what}: {part.strip()!r}: a step of 0 never ends; give 1 or more")
        if last is not None and last < first:
            raise UsageError(f"{what}: {part.strip()!r} is empty; write the smaller number first")
        numbers = range(first, (first if last is None else last) + 1, step or 1)
        if len(found) + len(numbers) > MOST:
            raise UsageError(f"{what}: {text!r} are more than {MOST} numbers; take larger steps")
        found.update(dict.fromkeys(numbers))
    return tuple(found)


def parse_strengths(text: str, what: str = "strength") -> tuple[float | None, ...]:
    """Strengths in their order, each once: `hard` is the hard rule (None), numbers are logits of the soft rule.

    Raises UsageError; `what` begins its message.
    """
    found: dict[float | None, None] = {}
    for part in (part.strip() for part in text.split(",")):
        if part == "hard":
            found[None] = None
            continue
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not part.isascii() or "_" in part:
            raise UsageError(f"{what}: {part!r} in {text!r} is neither `hard` nor a number of logits like 2.5")
        if number == 0:
            raise UsageError(f"{what}: a strength of 0 steers nothing; leave it out")
        found[number] = None
    return tuple(found)


def parse_caps(text: str, what: str = "cap") -> tuple[float, ...]:
    """Caps of the capped rule in their order, each once: logits above 0, `inf` for none.

    Raises UsageError; `what` begins its message.
    """
    found: dict[float, None] = {}
    for part in (part.strip() for part in text.split(",")):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not (0 < number <= MAX_CAP or number == math.inf) or not part.isascii() or "_" in part:
            raise UsageError(f"{what}: {part!r} in {text!r} is neither a number of logits above 0, like 2, nor inf")
        found[number] = None
    return tuple(found)


@dataclass(frozen=True)
class Grid:
    """All combinations of these; `both_ways`: also the reverse of each.

    `strengths` and `caps` together are the rules: None is the hard rule, another strength the soft one, with `weights`,
    a cap the capped one. Raises UsageError for an empty list, weights without a soft rule, or too large a grid.
    """

    activate: tuple[int, ...] = (0,)
    deactivate: tuple[int, ...] = (0,)
    layers: tuple[str | None, ...] = (None,)
    strengths: tuple[float | None, ...] = (None,)
    both_ways: bool = False
    caps: tuple[float, ...] = ()
    weights: str | None = None

    def __post_init__(self) -> None:
        for name in ("activate", "deactivate", "layers", "strengths", "caps"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
            if not getattr(self, name) and not (name == "caps" or (name == "strengths" and self.caps)):
                raise UsageError(f"grid: {name}: nothing given; give one value at least")
        if self.weights is not None and not any(strength is not None for strength in self.strengths):
            raise UsageError(f"grid: weights {self.weights}: belong to the soft rule; give strengths, too")
        if self.n > _MOST_CHOICES:
            raise UsageError(f"grid: {self.n} choices are more than {_MOST_CHOICES}; take larger steps")

    @property
    def n(self) -> int:
        """How many choices it has."""
        n = len(self.activate) * len(self.deactivate) * len(self.layers) * len(self.rules)
        return 2 * n if self.both_ways else n

    @property
    def rules(self) -> tuple[Rule, ...]:
        """The rules, those with a cap last."""
        strengths = (Rule(scale, None if scale is None else self.weights) for scale in self.strengths)
        return (*strengths, *(Rule(cap=cap) for cap in self.caps))

    def to_dict(self) -> dict[str, Any]:
        return {**plain(self), "caps": [json_cap(cap) for cap in self.caps]}


@dataclass(frozen=True)
class Choice:
    """One choice of the grid; without `scale` and `cap` the rule is hard, `layers` None are all."""

    activate: int
    deactivate: int
    layers: str | None = None
    scale: float | None = None
    reverse: bool = False
    cap: float | None = None
    weights: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cap": json_cap(self.cap)}

    def __str__(self) -> str:
        """Like "+5 -20, layers 0-2, strength 2, reverse"."""
        parts = [
            f"+{self.activate} -{self.deactivate}",
            f"layers {self.layers}" if self.layers is not None else "",
            f"strength {self.scale:g}" if self.scale is not None else "",
            f"weights {self.weights}" if self.weights is not None else "",
            f"cap {self.cap:g}" if self.cap is not None else "",
            "reverse" if self.reverse else "",
        ]
        return ", ".join(part for part in parts if part)


@dataclass(frozen=True)
class Impossible:
    """A choice that the model cannot carry out, and why."""

    choice: Choice
    why: str


@dataclass(frozen=True, eq=False)
class Plan:
    """The choices of a grid that are possible, with their biases, and the others.

    `keys` are equal for choices that steer equally.
    """

    choices: tuple[Choice, ...]
    biases: tuple[BiasFile | None, ...]
    keys: tuple[str, ...]
    impossible: tuple[Impossible, ...]

    @property
    def n_measured(self) -> int:
        """Steerings to measure, without the unsteered model."""
        return len(set(self.keys) - {UNSTEERED})

    def __str__(self) -> str:
        """One line, such as "66 choices: 60 to measure, 4 equal to another or to no steering, 2 impossible"."""
        n, bad = len(self.choices), len(self.impossible)
        equal = n - self.n_measured
        parts = [
            f"{self.n_measured} to measure",
            f"{equal} equal to another or to no steering" if equal else "",
            f"{bad} impossible" if bad else "",
        ]
        return f"{n + bad} choices: {', '.join(part for part in parts if part)}"


def plan(steering: Steering, grid: Grid, identity: ModelIdentity | None = None) -> Plan:
    """Build all choices of a grid from the steering's map; nothing is measured yet.

    `identity` is the model's, by default the map's. The steering's own numbers, layers and rule do not count; its
    direction does. Raises UsageError for a bias file, ChoiceError when no choice is possible.
    """
    map_of(steering)
    choices, biases, impossible = [], [], []
    ways = (steering.reverse, not steering.reverse) if grid.both_ways else (steering.reverse,)
    for layers, rule, activate, deactivate, reverse in itertools.product(
        grid.layers, grid.rules, grid.activate, grid.deactivate, ways
    ):
        choice = Choice(activate, deactivate, layers, reverse=reverse, **rule.fields)
        try:
            biases.append(steering.changed(**asdict(choice)).build(identity))
            choices.append(choice)
        except ChoiceError as error:
            impossible.append(Impossible(choice, str(error)))
    if impossible and not choices:
        raise ChoiceError(f"no choice of the grid is possible; the first: {impossible[0].why}")
    return Plan(tuple(choices), tuple(biases), tuple(bias_key(bias) for bias in biases), tuple(impossible))
