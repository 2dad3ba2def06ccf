"""AUC, its interval and the threshold: other definitions, simulation, ties."""

from __future__ import annotations

from itertools import pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steermoe_local import UsageError
from steermoe_local.evaluation.metrics.intervals import wilson
from steermoe_local.evaluation.metrics.separation import CLUSTERED, auc, auc_interval, best_threshold

Array = np.ndarray[Any, Any]
# few values, so that ties are common
scores = st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=12)
pairs = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=1, max_size=12).map(
    lambda rows: np.array(rows, dtype=np.float64) / 4
)


@given(scores, scores)
def test_auc_is_its_definition_and_mann_whitneys_u(one: list[float], two: list[float]) -> None:
    wins = [(x > y) + 0.5 * (x == y) for x in one for y in two]
    found = auc(np.array(one), np.array(two))
    assert found == pytest.approx(np.mean(wins), abs=1e-12)
    u = stats.mannwhitneyu(one, two).statistic
    assert found == pytest.approx(u / (len(one) * len(two)), abs=1e-12)


def binormal(rng: np.random.Generator, n: int, area: float, correlation: float) -> Array:
    """Scores of pairs [n, 2] whose AUC is `area`; both sides of a pair are correlated."""
    common, own = rng.normal(size=(n, 1)), rng.normal(size=(n, 2))
    found: Array = np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own
    found[:, 0] += NormalDist().inv_cdf(area) * np.sqrt(2)
    return found


@pytest.mark.parametrize(("area", "correlation"), [(0.5, 0.6), (0.75, 0.0), (0.95, 0.6)])
@pytest.mark.parametrize("n_strata", [1, 5])
def test_the_interval_covers(area: float, correlation: float, n_strata: int) -> None:
    """In 94% of runs at least; of 300 such runs fewer than 89% do in one of ten thousand tests."""
    rng = np.random.default_rng(7)
    covers = []
    for _ in range(300):
        found = auc_interval(binormal(rng, 30, area, correlation), np.arange(30) % n_strata, np.arange(30))
        covers.append(found.low <= area <= found.high)
        assert 0 <= found.low <= found.value <= found.high <= 1
    assert np.mean(covers) >= 0.89
    assert (found.n, found.method) == (30, CLUSTERED)


def test_pairs_of_a_cluster_count_once() -> None:
    """Every pair twice: the interval is that of one of each, but for what the placements know of their own copies."""
    rng = np.random.default_rng(1)
    once = binormal(rng, 60, 0.8, 0.0)
    zeros = np.zeros(60, dtype=np.int64)
    one = auc_interval(once, zeros, np.arange(60))
    twice = np.concatenate([once, once])
    two = auc_interval(twice, np.zeros(120, dtype=np.int64), np.tile(np.arange(60), 2))
    apart = auc_interval(twice, np.zeros(120, dtype=np.int64), np.arange(120))
    assert two.value == pytest.approx(one.value)
    assert two.high - two.low == pytest.approx(one.high - one.low, rel=0.02)
    assert apart.high - apart.low < 0.75 * (two.high - two.low)


def test_only_scores_of_a_stratum_are_compared() -> None:
    """Each stratum has an offset of its own; pooled, the AUC would be another one."""
    rng = np.random.default_rng(2)
    base = binormal(rng, 40, 0.9, 0.0)
    strata = np.arange(40) % 4
    moved = base + 100.0 * strata[:, None]
    found = auc_interval(moved, strata, np.arange(40))
    parts = [auc(*base[strata == stratum].T) for stratum in range(4)]
    assert found.value == pytest.approx(np.mean(parts))
    assert abs(auc(*moved.T) - found.value) > 0.1


def test_no_more_observations_than_swapped_sides_show() -> None:
    rng = np.random.default_rng(3)
    found, zeros, each = binormal(rng, 50, 0.8, 0.0), np.zeros(50, dtype=np.int64), np.arange(50)
    narrow = auc_interval(found, zeros, each)
    assert auc_interval(found, zeros, each, rng.normal(0.5, 0.01, 99)) == narrow
    assert auc_interval(found, zeros, each, np.full(99, 0.5)) == narrow
    wide = auc_interval(found, zeros, each, np.array([0.3, 0.7] * 40))  # as varied as 0.25 / 0.2^2 coins
    assert wide.value == narrow.value
    assert wide.low < narrow.low < narrow.high < wide.high
    best = auc_interval(np.stack([each + 99.0, each], axis=1), zeros, each, np.array([0.4, 0.6] * 40))
    assert (best.value, best.low) == (1.0, pytest.approx(wilson(25, 25).low))


def test_the_ends() -> None:
    apart = np.stack([np.arange(20) + 100.0, np.arange(20)], axis=1)
    zeros, each = np.zeros(20, dtype=np.int64), np.arange(20)
    best = auc_interval(apart, zeros, each)
    assert (best.value, best.high) == (1.0, 1.0)
    assert best.low == wilson(20, 20).low
    worst = auc_interval(apart[:, ::-1], zeros, each)
    assert (worst.value, worst.low) == (0.0, 0.0)
    with pytest.raises(UsageError, match="one pair"):
        auc_interval(apart, zeros, zeros)


@settings(max_examples=300)
@given(pairs)
def test_no_threshold_is_better(scores: Array) -> None:
    """Against all thresholds between scores, by counting."""

    def balanced(limit: float) -> int:  # accuracy, times twice the pairs
        return int((scores[:, 0] > limit).sum() + (scores[:, 1] < limit).sum())

    values = sorted(set(scores.ravel().tolist()))
    found = best_threshold(scores)
    if len(values) == 1:
        assert found is None
        return
    assert found is not None
    assert found not in values
    middles = [(low + high) / 2 for low, high in pairwise(values)]
    assert balanced(found) == max(map(balanced, middles))
    low = max(value for value in values if value < found)
    high = min(value for value in values if value > found)
    assert abs(found - (low + high) / 2) <= (high - low) / 4 + 1e-15
    widest = max(b - a for a, b in pairwise(values) if balanced((a + b) / 2) == balanced(found))
    assert high - low == widest


def test_a_threshold_is_short_and_stays_in_its_gap() -> None:
    assert best_threshold(np.array([[0.126, 0.1]])) == 0.11
    assert best_threshold(np.array([[1e-9, 0.0]])) == 5e-10
    assert best_threshold(np.array([[0.5 + 2e-10, 0.5]])) == pytest.approx(0.5 + 1e-10, abs=5e-11)
    assert best_threshold(np.array([[3.0, 3.0], [3.0, 3.0]])) is None
