"""The mathematics of a fit: a start in closed form, its scale, and a search without gradients (docs/fit.md).

Nothing here runs a model: `Measure` does, and a test may give any surface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.package import away_from
from ..errors import UsageError
from ..maps.effects import Effects

FloatArray = npt.NDArray[np.float64]

Measure = Callable[[str, FloatArray], tuple[FloatArray, FloatArray]]
"""Called with (what it is for, values float64 [k, n]); gives gains, larger is better, and costs, float64 [k] each."""

_TINY = 1e-9  # nats: the least cost, where an estimate and its error are 0
_DOWN = 64.0  # a grid of scales reaches from its largest one down by this factor
_BEYOND = 8.0  # the first grid goes on beyond the bound by it: experts at the bound stay there, the others follow
_GRIDS = 3  # grids at most, each below the one before, until a scale is within the budget
_RAY = (0.75, 1.1)  # multiples of the search's mean that are measured at its end
_STEEP = 2.0  # slope of the penalty, in gains for each budget: four times that of the gain in the start's model
_TOLERANCES = {"tolx": 1e-4, "tolfun": 1e-6}  # logits, nats: a search whose steps are smaller has come to rest
_WIDTH = 0.3  # first standard deviation of the search, in shares of each value
_ROUNDING = 1e-3  # nats: margins of equal steerings may differ by less, as batches round
_LEAST_SHARE = 0.25  # of the largest value: experts with smaller ones are varied as if they had it


@dataclass(frozen=True, eq=False)
class Direction:
    """Experts to be fitted, int64 [n, 2] (layer, expert), and their values up to a scale; the largest is +-1."""

    experts: npt.NDArray[np.int64]
    values: FloatArray

    def __len__(self) -> int:
        return len(self.experts)

    def scaled(self, scales: npt.ArrayLike, bound: float) -> FloatArray:
        """The values at some scales, each cut to +-`bound`, float64 [n_scales, n]."""
        found: FloatArray = np.clip(np.outer(np.asarray(scales, dtype=np.float64), self.values), -bound, bound)
        return found


@dataclass(frozen=True, eq=False)
class Point:
    """Values that were measured, float64 [n], with their gain and cost in nats."""

    values: FloatArray
    gain: float
    cost: float


@dataclass(frozen=True, eq=False)
class Refined:
    """What a search found: the best of all points within the budget, and the best on the ray through its mean.

    `ray` is `best`'s start where no point of the ray is within the budget. `n_evaluations` steerings were measured, in
    `n_generations` and for the ray; `ended` says why there were no more.
    """

    best: Point
    ray: Point
    n_evaluations: int
    n_generations: int
    ended: str


def optimum(effect: npt.ArrayLike, cost: npt.ArrayLike, budget: float) -> FloatArray:
    """The x that maximizes sum(effect * x) while sum(cost * x^2) <= budget: x = effect / cost, scaled onto the budget.

    By Lagrange: effect = 2 m cost x for a multiplier m > 0. `cost` > 0. 0 everywhere if all effects are 0.
    """
    e, c = np.asarray(effect, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    x = e / c
    norm = float((c * np.square(x)).sum())
    found: FloatArray = x * np.sqrt(budget / norm) if norm > 0 else np.zeros_like(x)
    return found


def direction(effects: Effects, n: int, *, reverse: bool = False) -> Direction:
    """The first `n` experts to fit, and the closed form's values for them.

    Of an expert's significant actions that move the margin to the wanted side, the one with the larger effect gives the
    sign. A cost below its standard error counts as that error, as it is not known to be lower; without costs all count
    the same. The experts are ranked by effect^2 / cost, their share in what the closed form gains.

    Raises UsageError when there is none.
    """
    gain = -effects.effect if reverse else effects.effect
    cost = np.maximum(np.maximum(effects.cost, effects.cost_se), _TINY)
    cost = np.where(np.isnan(cost), 1.0, cost)
    best: dict[tuple[int, int], int] = {}
    for row in np.flatnonzero(effects.significant & (gain > 0)):
        expert = int(effects.layer[row]), int(effects.expert[row])
        if expert not in best or gain[row] > gain[best[expert]]:
            best[expert] = int(row)
    if not best:
        side = "negative" if reverse else "positive"
        raise UsageError(
            f"none of the map's {len(gain)} effects is significant and moves towards the {side} side; run steermoe "
            "attribute with more draws, items or candidates, or fit the other side "
            f"({'without' if reverse else 'with'} --reverse)"
        )
    rows = np.array(sorted(best.values(), key=lambda row: (-(gain[row] ** 2) / cost[row], row))[:n])
    values = effects.action[rows] * optimum(gain[rows], cost[rows], 1.0)
    experts = np.stack([effects.layer[rows], effects.expert[rows]], axis=1)
    return Direction(experts, values / np.abs(values).max())


def scale_start(
    measure: Measure, toward: Direction, *, budget: float, bound: float, population: int
) -> tuple[Point, int]:
    """The best scale of a direction within the budget, and how many scales were measured for it.

    A grid of `population` scales, a constant factor apart, then as many between the neighbours of its best one: a
    bisection in which all points of a step share the batches. Beyond the first scale over the budget nothing is taken.

    Raises UsageError when the smallest scale is above the budget.
    """
    found: list[Point] = []
    top = bound * _BEYOND
    scales = np.geomspace(top / (_DOWN * _BEYOND), top, population)
    for number in range(_GRIDS):
        points = _points(measure, f"scale {number}", toward.scaled(scales, bound))
        found += points
        if points[0].cost <= budget:
            break
        top = scales[0]
        scales = np.geomspace(top / _DOWN, top, population + 1)[:-1]
    else:
        raise UsageError(
            f"budget: {budget:g} nats are too small: the least steering that was tried, {top:.2g} logits at most, "
            f"costs {found[-population].cost:.2g}; give a larger budget"
        )
    within = _first_within(points, budget)
    at = max(range(within), key=lambda index: points[index].gain)
    between = np.linspace(scales[max(0, at - 1)], scales[min(population - 1, at + 1)], population + 2)[1:-1]
    finer = _points(measure, "scale between", toward.scaled(between, bound))
    found += finer
    return max([points[at], *finer[: _first_within(finer, budget)]], key=lambda point: point.gain), len(found)


def refine(
    measure: Measure, start: Point, *, budget: float, bound: float, population: int, evaluations: int, seed: int
) -> Refined:
    """Improve a point by CMA-ES (Hansen, arXiv 1604.00772), with a penalty for costs above the budget.

    Each generation is `population` values, measured together. `evaluations` bounds what is measured, in whole
    generations, of which there is one at least. At the end multiples of the search's mean are measured, as the best of
    many noisy points owes a part of its gain to chance, and the mean does not.

    Raises UsageError when the package cma is missing.
    """
    strategy = _strategy(start.values, bound, population, seed)
    best = start
    n = n_generations = 0
    ended = "evaluations"
    while not n_generations or n + 2 * population <= evaluations:
        if n_generations and (reasons := strategy.stop()):
            ended = ", ".join(sorted(reasons))
            break
        asked = strategy.ask()
        points = _points(measure, f"generation {n_generations}", np.array(asked))
        # in the start's model gain grows with the root of cost: at the budget its slope is half a gain for each budget
        slope = _STEEP * max(abs(best.gain), _TINY)
        strategy.tell(asked, [slope * max(0.0, p.cost / budget - 1) - p.gain for p in points])
        best = _better(best, points, budget)
        n, n_generations = n + population, n_generations + 1
    ray = np.outer(np.linspace(*_RAY, population), strategy.result.xfavorite)
    points = _points(measure, "ray", np.clip(ray, -bound, bound))
    within = [point for point in points if point.cost <= budget]
    return Refined(
        _better(best, points, budget),
        max(within, key=lambda point: point.gain, default=start),
        n + population,
        n_generations,
        ended,
    )


def choose(gains: FloatArray, costs: FloatArray, budget: float) -> tuple[int, int, float, float]:
    """Which of some points to take by what they do to other items and another text.

    `gains`: float64 [n_items, n_points], `costs`: float64 [n_points]; the start is the first point. It stays unless
    another one is within the budget, and better by more than a standard error of the difference (the rule of one
    standard error: Breiman et al., Classification and Regression Trees, 1984). `n_items` and `n_points` are 2 at least.

    Returns the index of the point to take; and that of the best other one, its difference and the error of that.
    """
    others = gains[:, 1:] - gains[:, :1]
    within = np.flatnonzero(costs[1:] <= budget)
    means = others.mean(axis=0)
    best = int(within[means[within].argmax()] if len(within) else means.argmax())
    difference = float(means[best])
    error = float(others[:, best].std(ddof=1) / np.sqrt(len(gains)))
    taken = len(within) > 0 and difference > max(error, _ROUNDING)
    return (best + 1 if taken else 0), best + 1, difference, error


def require_search() -> None:
    """Raise UsageError when the package of the search is missing."""
    _cma()


def search_version() -> str:
    """Version of the package of the search, on which results depend. Raises UsageError when it is missing."""
    return str(_cma().__version__)


def _points(measure: Measure, what: str, values: FloatArray) -> list[Point]:
    gains, costs = measure(what, values)
    return [Point(row, float(gain), float(cost)) for row, gain, cost in zip(values, gains, costs, strict=True)]


def _first_within(points: list[Point], budget: float) -> int:
    """How many of the first points are within the budget, one after the other."""
    return next((index for index, point in enumerate(points) if point.cost > budget), len(points))


def _better(best: Point, points: list[Point], budget: float) -> Point:
    return max([best, *(point for point in points if point.cost <= budget)], key=lambda point: point.gain)


def _strategy(start: FloatArray, bound: float, population: int, seed: int) -> Any:
    widths = np.maximum(np.abs(start), _LEAST_SHARE * np.abs(start).max())
    options = {
        "bounds": [-bound, bound],
        "popsize": population,
        "CMA_stds": widths,
        # draws of its own: neither the global generator nor the clock has a part in them
        "randn": np.random.RandomState(seed % 2**32).randn,
        "seed": np.nan,
        **_TOLERANCES,
        "verbose": -10,  # prints nothing, writes nothing, and reads no file of signals
        "verb_log": 0,
        "verb_disp": 0,
        "signals_filename": "",
    }
    return _cma().CMAEvolutionStrategy(np.clip(start, -0.99 * bound, 0.99 * bound), _WIDTH, options)


def _cma() -> Any:
    try:
        with away_from("matplotlibrc"):  # which cma imports matplotlib with, if that is there
            import cma
    except ImportError:
        raise UsageError(
            "the search needs cma, which is not installed: pip install 'steermoe-local[fit]', or take --method none"
        ) from None
    return cma
