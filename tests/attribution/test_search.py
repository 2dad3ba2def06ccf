"""The mathematics of a fit: the closed form against another optimizer, and the search on surfaces that are known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize

from steermoe_local.attribution.search import (
    Direction,
    Measure,
    Point,
    choose,
    direction,
    optimum,
    refine,
    scale_start,
)
from steermoe_local.errors import UsageError
from steermoe_local.maps.effects import Attribution, Effects

Array = np.ndarray[Any, Any]

BOTH = ("promote", "suppress")
FACTS = Attribution(
    "pairs", "0" * 64, 8, 8, "text", 96, dict.fromkeys(BOTH, 64), dict.fromkeys(BOTH, 0.1), "answer", 0,
    dict.fromkeys(BOTH, 0.9), {}, 8, dict.fromkeys(BOTH, 1.0), dict.fromkeys(BOTH, True),
)  # fmt: skip


def effects(*rows: tuple[int, int, int, float, float, float, float]) -> Effects:
    """Rows of (layer, expert, action, effect, p, cost, error of the cost)."""
    layer, expert, action, effect, p, cost, cost_se = (np.array(column) for column in zip(*rows, strict=True))
    nothing = np.full(len(rows), np.nan)
    known = {"effect": effect, "effect_se": np.abs(effect) / 9, "p": p, "cost": cost, "cost_se": cost_se}
    control = np.zeros(len(rows), bool)
    return Effects(FACTS, layer, expert, action, **known, confirm=nothing, confirm_se=nothing, control=control)


#
# the closed form
#


@pytest.mark.parametrize("seed", range(8))
def test_the_closed_form_against_another_optimizer(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 7))
    effect, cost, budget = rng.normal(size=n), rng.uniform(0.05, 3, n), float(rng.uniform(0.01, 2))
    x = optimum(effect, cost, budget)
    assert float(cost @ x**2) == pytest.approx(budget)
    found = minimize(
        lambda y: -float(effect @ y),
        rng.normal(size=n) * 0.1,
        jac=lambda _: -effect,
        constraints={"type": "ineq", "fun": lambda y: budget - float(cost @ y**2), "jac": lambda y: -2 * cost * y},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    assert found.success
    assert x == pytest.approx(found.x, abs=1e-4 * float(np.abs(x).max()))
    assert float(effect @ x) == pytest.approx(-found.fun, rel=1e-6)


def test_without_effects_the_closed_form_is_zero() -> None:
    assert not optimum([0.0, 0.0], [1.0, 2.0], 1.0).any()


def test_the_direction_takes_sign_floor_and_order() -> None:
    found = direction(
        effects(
            (0, 1, +1, 0.2, 0.01, 0.01, 0.001),  # the weaker action of an expert
            (0, 1, -1, 0.4, 0.01, 0.02, 0.001),
            (1, 2, +1, 0.3, 0.01, -0.5, 0.03),  # a cost below its error counts as the error
            (2, 3, -1, -0.9, 0.01, 0.01, 0.001),  # to the other side
            (3, 4, -1, 0.9, 0.20, 0.01, 0.001),  # not significant
            (3, 5, +1, 0.1, 0.01, 0.01, 0.001),
        ),
        8,
    )
    # by effect^2 / cost: 8, 3, 1; values by effect / cost: -20, 10, 10
    assert found.experts.tolist() == [[0, 1], [1, 2], [3, 5]]
    assert found.values == pytest.approx([-1.0, 0.5, 0.5])
    assert found.scaled([4, 20], 8.0).tolist() == [[-4, 2, 2], [-8, 8, 8]]


def test_the_direction_to_the_other_side_and_its_first_ones() -> None:
    rows = ((0, 1, -1, -0.2, 0.01, 0.1, 0.0), (0, 2, +1, -0.4, 0.01, 0.1, 0.0), (0, 3, +1, 0.9, 0.01, 0.1, 0.0))
    found = direction(effects(*rows), 8, reverse=True)
    assert found.experts.tolist() == [[0, 2], [0, 1]]
    assert found.values == pytest.approx([1.0, -0.5])
    assert direction(effects(*rows), 1, reverse=True).experts.tolist() == [[0, 2]]


def test_a_map_without_costs_takes_them_as_equal() -> None:
    nan = float("nan")
    found = direction(effects((0, 1, -1, 0.2, 0.01, nan, nan), (0, 2, +1, 0.4, 0.01, nan, nan)), 8)
    assert found.values == pytest.approx([1.0, -0.5])


def test_costs_and_errors_of_zero() -> None:
    assert np.isfinite(direction(effects((0, 1, -1, 0.2, 0.01, 0.0, 0.0)), 8).values).all()


@pytest.mark.parametrize(("reverse", "p", "effect"), [(False, 0.2, 0.5), (False, 0.01, -0.5), (True, 0.01, 0.5)])
def test_no_effect_to_that_side(reverse: bool, p: float, effect: float) -> None:
    with pytest.raises(UsageError, match="steermoe attribute"):
        direction(effects((0, 1, -1, effect, p, 0.1, 0.1)), 8, reverse=reverse)


#
# the scale
#

TOWARD = Direction(np.array([[0, 0], [0, 1]]), np.array([1.0, -0.5]))


def surface(gain: Any, cost: Any, seen: list[Array] | None = None) -> Measure:
    def measure(what: str, values: Array) -> tuple[Array, Array]:
        assert what
        if seen is not None:
            seen.append(values)
        return np.array([gain(x) for x in values]), np.array([cost(x) for x in values])

    return measure


def square(x: Array) -> float:
    return float(x @ x)


def along(x: Array) -> float:
    return float(x @ TOWARD.values)


@pytest.mark.parametrize("budget", [1e-7, 1e-3, 0.3, 5.0])
def test_the_scale_reaches_the_budget(budget: float) -> None:
    """Gain grows with the scale, so the best scale within the budget is the one that costs it."""
    seen: list[Array] = []
    start, n = scale_start(surface(along, square, seen), TOWARD, budget=budget, bound=8.0, population=32)
    assert 0.97 * budget <= start.cost <= budget
    assert n == sum(len(values) for values in seen)
    assert all(len(values) == 32 for values in seen)


def test_a_scale_beyond_which_the_gain_falls() -> None:
    """The best scale is inside the budget; it is found within the second grid's step."""
    start, _ = scale_start(
        surface(lambda x: -((x[0] - 2.0) ** 2), square), TOWARD, budget=100.0, bound=8.0, population=16
    )
    assert start.values[0] == pytest.approx(2.0, abs=0.06)


def test_a_scale_at_the_bound() -> None:
    """Where nothing costs, the first values stay at the bound and the others follow them."""
    start, _ = scale_start(surface(along, lambda _: 0.0), TOWARD, budget=1.0, bound=3.0, population=8)
    assert start.values == pytest.approx([3.0, -3.0])


def test_no_scale_beyond_the_first_that_costs_too_much() -> None:
    """Costs that fall again at larger scales, as saturated ones may, are no way around the budget."""
    start, _ = scale_start(
        surface(along, lambda x: 9.0 if 1 <= x[0] < 3 else 0.1), TOWARD, budget=1.0, bound=8.0, population=32
    )
    assert start.values[0] < 1


def test_a_budget_that_is_too_small() -> None:
    with pytest.raises(UsageError, match=r"budget: 1e-05 .* costs 0\.5"):
        scale_start(surface(along, lambda _: 0.5), TOWARD, budget=1e-5, bound=8.0, population=8)


#
# the search
#

COST = np.array([[1.0, 0.6, 0.0], [0.6, 1.0, 0.3], [0.0, 0.3, 0.5]])
EFFECT = np.array([1.0, 0.8, 0.3])


def cross_cost(x: Array) -> float:
    return float(x @ COST @ x)


def linear(x: Array) -> float:
    return float(x @ EFFECT)


def best_of(budget: float) -> float:
    """The most that the linear gain reaches under a cost with interactions: sqrt(B e' C^-1 e)."""
    return float(np.sqrt(budget * EFFECT @ np.linalg.solve(COST, EFFECT)))


def started(budget: float) -> Point:
    """The closed form's values, scaled onto the true cost."""
    x = optimum(EFFECT, np.diag(COST), 1.0)
    x *= np.sqrt(budget / cross_cost(x))
    return Point(x, linear(x), cross_cost(x))


def search(measure: Measure, start: Point, **changed: Any) -> Any:
    given: dict[str, Any] = {"budget": 0.5, "bound": 8.0, "population": 16, "evaluations": 960, "seed": 3}
    return refine(measure, start, **(given | changed))


def test_the_search_finds_what_the_start_cannot_know() -> None:
    """Costs that interact: the start ignores that, the search comes to within 1% of the optimum, and stays inside."""
    start = started(0.5)
    assert start.gain < 0.97 * best_of(0.5)
    found = search(surface(linear, cross_cost), start)
    assert found.best.cost <= 0.5
    assert 0.99 * best_of(0.5) <= found.best.gain <= best_of(0.5)
    assert found.ray.cost <= 0.5
    assert found.ray.gain >= 0.98 * best_of(0.5)


def test_the_search_on_a_saturating_surface_with_noise() -> None:
    """Gains that saturate, and noise: the mean of the search is good by the surface without noise."""
    rng = np.random.default_rng(0)

    def saturating(x: Array) -> float:
        return float(np.tanh(x[0]) + np.tanh(x[1] + x[2]))

    start = Point(np.array([0.7, 0.1, 0.1]), 0.8, 0.5)
    found = search(surface(lambda x: saturating(x) + 0.01 * rng.normal(), lambda x: float(x @ x)), start)
    # by symmetry the second and third are equal: a grid over the rest
    angles = np.linspace(0, np.pi / 2, 1001)
    most = max(
        saturating(np.sqrt(0.5) * np.array([np.cos(a), np.sin(a) / np.sqrt(2), np.sin(a) / np.sqrt(2)])) for a in angles
    )
    assert saturating(found.ray.values) >= 0.97 * most


def test_the_same_seed_the_same_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but seed and measurements has a part in it; nothing is written, NumPy's own draws stay as they are."""
    monkeypatch.chdir(tmp_path)
    before = np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    runs: list[list[Array]] = [[], [], []]
    for seen, seed in zip(runs, (3, 3, 4), strict=True):
        search(surface(linear, cross_cost, seen), started(0.5), evaluations=128, seed=seed)
    assert np.random.get_state()[1].tolist() == before  # type: ignore[union-attr]
    assert [values.tolist() for values in runs[0]] == [values.tolist() for values in runs[1]]
    assert runs[0][0].tolist() != runs[2][0].tolist()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("evaluations", "generations"), [(1, 1), (47, 1), (48, 2), (160, 9)])
def test_what_is_measured(evaluations: int, generations: int) -> None:
    """Whole generations within the evaluations, one at least, and then the ray through the mean."""
    seen: list[Array] = []
    found = search(surface(linear, cross_cost, seen), started(0.5), evaluations=evaluations)
    assert found.n_generations == generations
    assert found.n_evaluations == sum(map(len, seen)) == 16 * (generations + 1)


def test_no_value_beyond_the_bound() -> None:
    seen: list[Array] = []
    start = Point(np.array([1.5, -1.5, 1.5]), 1.0, 0.1)
    search(surface(linear, lambda _: 0.1, seen), start, bound=1.5)
    assert max(float(np.abs(values).max()) for values in seen) <= 1.5


def test_a_start_that_nothing_betters_stays() -> None:
    start = Point(np.array([1.0, 1.0, 1.0]), 5.0, 0.4)
    found = search(surface(lambda x: 4.0 - float(x @ x), cross_cost), start, evaluations=64)
    assert found.best is start
    found = search(surface(lambda _: 9.0, lambda _: 0.6), start, evaluations=64)
    assert found.best is start
    assert found.ray is start


def test_a_search_that_has_come_to_rest_ends() -> None:
    found = search(surface(lambda x: -float(x @ x), lambda _: 0.1), started(0.5), evaluations=100_000)
    assert found.n_evaluations < 20_000
    assert found.ended != "evaluations"


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(UsageError, match=r"steermoe-local\[fit\].*--method none"):
        search(surface(linear, cross_cost), started(0.5))


#
# start or search
#


START = np.array([1.0, 2.0, 3.0, 4.0])
NOISE = np.array([-0.4, 0.4, -0.4, 0.4])
ERROR = float(NOISE.std(ddof=1) / 2)


def points(*by: float) -> Array:
    """The start's gains, and those of points that are better by some standard errors."""
    return np.stack([START, *(START + NOISE + errors * ERROR for errors in by)], axis=1)


@pytest.mark.parametrize(
    ("by", "costs", "found"),
    [
        ((-1.5, 0.9), (0, 0, 0), (0, 2, 0.9)),
        ((-1.5, 1.1, 0.9), (0, 0, 0, 0), (2, 2, 1.1)),
        ((3.0, 2.0), (0, 1.1, 1.0), (2, 2, 2.0)),  # the best one is above the budget, which is 1
        ((3.0, 0.5), (0, 1.1, 1.0), (0, 2, 0.5)),
        ((3.0, 4.0), (0, 1.1, 1.2), (0, 2, 4.0)),  # all are
        ((-1.5, 0.9), (9, 0, 0), (0, 2, 0.9)),  # the start's own cost does not count: the search has bound it
    ],
)
def test_the_start_stays_unless_another_is_better_by_an_error(by: Any, costs: Any, found: Any) -> None:
    taken, best, gain, error = choose(points(*by), np.array(costs, float), 1.0)
    assert (taken, best, gain) == (*found[:2], pytest.approx(found[2] * ERROR))
    assert error == pytest.approx(ERROR)


@pytest.mark.parametrize("rounding", [0.0, 1e-4])
def test_equal_points_leave_the_start(rounding: float) -> None:
    assert choose(np.stack([START, START + rounding], axis=1), np.zeros(2), 1.0)[0] == 0
