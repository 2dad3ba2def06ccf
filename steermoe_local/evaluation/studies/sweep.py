"""The effect of a map against its price, over a grid of choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...errors import ChoiceError, UsageError
from ...identity import ModelIdentity
from ...steering.bias_file import BiasFile
from ..measuring.measurements import UNSTEERED, Measurement, bias_key
from ..measuring.side_effects import Fluency, fluency
from ..metrics.intervals import Interval, difference, rate
from .objective import aimed_values, cost_of, facts

if TYPE_CHECKING:
    from ...steering.steering import Steering
    from ..measuring.evaluator import Evaluator

__all__ = ["Choice", "Cost", "Grid", "Impossible", "Plan", "Point", "Sweep", "front", "plan", "sweep"]

Cost = Literal["ppl", "kl"]
_MOST = 100_000  # choices; a grid of more is a slip of the pen


@dataclass(frozen=True)
class Grid:
    """All combinations of these; `strengths`: None is the hard rule; `both_ways`: also steer away from the behaviour.

    Raises UsageError for an empty list, or too large a grid.
    """

    activate: tuple[int, ...] = (0,)
    deactivate: tuple[int, ...] = (0,)
    layers: tuple[str | None, ...] = (None,)
    strengths: tuple[float | None, ...] = (None,)
    both_ways: bool = False

    def __post_init__(self) -> None:
        """Drop what stands twice, and check the sizes."""
        for name in ("activate", "deactivate", "layers", "strengths"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
            if not getattr(self, name):
                raise UsageError(f"grid: {name}: nothing given; give one value at least")
        if self.n > _MOST:
            raise UsageError(f"grid: {self.n} choices are more than {_MOST}; take larger steps")

    @property
    def n(self) -> int:
        """How many choices it has."""
        n = len(self.activate) * len(self.deactivate) * len(self.layers) * len(self.strengths)
        return 2 * n if self.both_ways else n

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Choice:
    """One choice of the grid; `scale` None is the hard rule, `layers` None are all."""

    activate: int
    deactivate: int
    layers: str | None = None
    scale: float | None = None
    reverse: bool = False

    def __str__(self) -> str:
        """Like "+5 -20, layers 0-2, strength 2, reverse"."""
        parts = [
            f"+{self.activate} -{self.deactivate}",
            f"layers {self.layers}" if self.layers is not None else "",
            f"strength {self.scale:g}" if self.scale is not None else "",
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
    """What a sweep will measure: the possible choices with their biases, and the others.

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

    `identity` is the model's, by default the map's. The steering's own numbers, layers and strength do not count; its
    direction does. Raises UsageError for a bias file, ChoiceError when no choice is possible.
    """
    if steering.expert_map is None:
        raise UsageError(f"{steering.name}: a bias file's choice of experts is made; give the map with --map MAP")
    choices, biases, impossible = [], [], []
    first: ChoiceError | None = None
    for choice in _choices(grid, steering.reverse):
        try:
            bias = _build(steering, choice, identity)
        except ChoiceError as error:
            first = first or error
            impossible.append(Impossible(choice, str(error)))
            continue
        choices.append(choice)
        biases.append(bias)
    if first and not choices:
        raise ChoiceError(f"no choice of the grid is possible; the first: {first}")
    return Plan(tuple(choices), tuple(biases), tuple(bias_key(bias) for bias in biases), tuple(impossible))


def _choices(grid: Grid, reverse: bool) -> list[Choice]:
    ways = (reverse, not reverse) if grid.both_ways else (reverse,)
    return [
        Choice(activate, deactivate, layers, scale, way)
        for layers in grid.layers
        for scale in grid.strengths
        for activate in grid.activate
        for deactivate in grid.deactivate
        for way in ways
    ]


def _build(steering: Steering, choice: Choice, identity: ModelIdentity | None) -> BiasFile | None:
    return steering.changed(**asdict(choice)).build(identity)


@dataclass(frozen=True)
class Point:
    """What one choice does.

    `effect` is its rate minus the unsteered model's; `gain` is what of it goes the way that is steered to, where broken
    answers count for neither side (`aims.aimed_values`). `swing` is rate towards minus rate away of the same numbers,
    with `both_ways`. `same_as`: index of an earlier point that steers equally, whose measurement this is. `front`: no
    other point of its direction, nor the unsteered model, has as much gain for less cost or more for as much; None
    where the cost was not measured.
    """

    choice: Choice
    key: str
    same_as: int | None
    n_active: int
    n_inactive: int
    rate: Interval
    effect: Interval
    gain: float
    swing: Interval | None
    fluency: Fluency
    front: bool | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        data = asdict(self)
        return {**data.pop("choice"), **data}


@dataclass(frozen=True, eq=False)
class Sweep:
    """Points in the grid's order; `about` is where they come from. `cost` is what the front is drawn over."""

    about: dict[str, Any]
    grid: Grid
    unsteered: Interval
    unsteered_fluency: Fluency
    points: tuple[Point, ...]
    impossible: tuple[Impossible, ...]
    n_measured: int
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "about": self.about,
            "grid": self.grid.to_dict(),
            "unsteered": {"rate": asdict(self.unsteered), "fluency": self.unsteered_fluency.to_dict()},
            "points": [point.to_dict() for point in self.points],
            "impossible": [{**asdict(found.choice), "why": found.why} for found in self.impossible],
            "n_measured": self.n_measured,
            "cost": self.cost,
        }


def sweep(
    evaluator: Evaluator,
    steering: Steering,
    grid: Grid,
    *,
    cost: Cost = "ppl",
    seed: int = 0,
    announce: Callable[[Plan], None] | None = None,
) -> Sweep:
    """Measure every choice of `grid`; equal ones once. `seed` is the bootstrap's, `announce` gets the plan beforehand.

    Choices that the model cannot carry out are listed, not fatal. Raises what `plan` and `Evaluator.measure` raise.
    """
    planned = plan(steering, grid, evaluator.identity)
    if announce:
        announce(planned)
    base, *measured = evaluator.measure([None, *planned.biases], what="sweep")
    return Sweep(
        about={**facts(evaluator, steering), "seed": seed},
        grid=grid,
        unsteered=rate(base.values, seed),
        unsteered_fluency=fluency(base, base),
        points=_points(planned, base, measured, cost, seed),
        impossible=planned.impossible,
        n_measured=planned.n_measured,
        cost=cost,
    )


def _points(
    planned: Plan, base: Measurement, measured: Sequence[Measurement], cost: Cost, seed: int
) -> tuple[Point, ...]:
    found: list[Point] = []
    earlier: dict[tuple[str, bool], int] = {}
    by_choice = dict(zip(planned.choices, measured, strict=True))
    for index, (choice, m) in enumerate(by_choice.items()):
        other = by_choice.get(replace(choice, reverse=not choice.reverse))
        ways = (other, m) if choice.reverse else (m, other)
        found.append(
            Point(
                choice=choice,
                key=m.key,
                same_as=earlier.get((m.key, choice.reverse)),
                n_active=m.bias.n_active if m.bias else 0,
                n_inactive=m.bias.n_inactive if m.bias else 0,
                rate=rate(m.values, seed),
                effect=difference(m.values, base.values, seed),
                gain=float((aimed_values(m, choice.reverse) - aimed_values(base, choice.reverse)).mean()),
                swing=difference(ways[0].values, ways[1].values, seed) if ways[0] and ways[1] else None,
                fluency=fluency(m, base),
            )
        )
        earlier.setdefault((m.key, choice.reverse), index)
    costs = [cost_of(point.fluency, cost) for point in found]
    for way in (False, True):
        places = [i for i, point in enumerate(found) if point.choice.reverse == way and costs[i] is not None]
        # the unsteered model is there for nothing: what does not beat it is on no front
        marks = front([(0.0, 0.0), *((found[i].gain, costs[i] or 0.0) for i in places)])[1:]
        for i, mark in zip(places, marks, strict=True):
            found[i] = replace(found[i], front=bool(mark) and found[i].key != UNSTEERED)
    return tuple(found)


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of (gain, cost) are on the Pareto front: no other has as much gain for less, or more for as much.

    Equal points are on it together.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][1], -points[i][0]))
    marks = [False] * len(points)
    best, last = -np.inf, -np.inf  # gain of the front so far, and the cost at which it was reached
    for i in order:
        gain, cost = points[i]
        if gain > best or (gain == best and cost == last):
            marks[i] = True
            best, last = gain, cost
    return marks
