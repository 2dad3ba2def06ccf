"""Measures a map over a grid of choices: effect against side effects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...measuring.measurements import UNSTEERED, Measurement
from ...measuring.side_effects import Fluency, fluency
from ...metrics.intervals import Interval, difference, rate
from ..steerings import study_metadata
from .grid import Choice, Grid, Impossible, Plan, plan
from .objective import cost_of, objective_values

if TYPE_CHECKING:
    from ....steering.steering import Steering
    from ...measuring.evaluator import Evaluator

__all__ = ["Choice", "Cost", "Grid", "Impossible", "Plan", "Point", "Sweep", "front", "plan", "sweep"]

Cost = Literal["ppl", "kl"]


@dataclass(frozen=True)
class Point:
    """The measurement of one choice.

    `effect` is its rate minus the unsteered model's; `gain` is the part of it in the steering's direction, where broken
    answers count for neither side (`objective.objective_values`). `swing` is the rate steered positively minus the rate
    steered negatively by the same numbers, with `both_ways`. `same_as`: index of an earlier point that steers equally,
    whose measurement this is. `front`: no other point of its direction, nor the unsteered model, has as much gain for
    less cost or more for as much; None where the cost was not measured.
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
        data = asdict(self)
        del data["choice"]
        return {**self.choice.to_dict(), **data}


@dataclass(frozen=True, eq=False)
class Sweep:
    """Points in the grid's order; `metadata` says where they come from. `cost` is that of the front."""

    metadata: dict[str, Any]
    grid: Grid
    unsteered: Interval
    unsteered_fluency: Fluency
    points: tuple[Point, ...]
    impossible: tuple[Impossible, ...]
    n_measured: int
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        return {
            "about": self.metadata,
            "grid": self.grid.to_dict(),
            "unsteered": {"rate": asdict(self.unsteered), "fluency": asdict(self.unsteered_fluency)},
            "points": [point.to_dict() for point in self.points],
            "impossible": [{**found.choice.to_dict(), "why": found.why} for found in self.impossible],
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
        metadata={**study_metadata(evaluator, steering), "seed": seed},
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
                n_active=m.n_experts[0],
                n_inactive=m.n_experts[1],
                rate=rate(m.values, seed),
                effect=difference(m.values, base.values, seed),
                gain=float((objective_values(m, choice.reverse) - objective_values(base, choice.reverse)).mean()),
                swing=difference(ways[0].values, ways[1].values, seed) if ways[0] and ways[1] else None,
                fluency=fluency(m, base),
            )
        )
        earlier.setdefault((m.key, choice.reverse), index)
    costs = [cost_of(point.fluency, cost) for point in found]
    for way in (False, True):
        indices = [i for i, point in enumerate(found) if point.choice.reverse == way and costs[i] is not None]
        # the unsteered model costs nothing: what does not beat it is on no front
        marks = front([(0.0, 0.0), *((found[i].gain, costs[i] or 0.0) for i in indices)])[1:]
        for i, mark in zip(indices, marks, strict=True):
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
