"""Intervals against the papers that they come from, against statsmodels and scipy, and what must hold of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import pearsonr
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from steermoe_local.errors import UsageError
from steermoe_local.evaluation.metrics.intervals import Interval, bootstrap, difference, margin, newcombe, rate, wilson

BITS = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=60)
PAIRS = st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=60)
GRADES = st.lists(st.floats(0, 1), min_size=1, max_size=30)


def of_cells(e: int, f: int, g: int, h: int) -> tuple[list[int], list[int]]:
    """Items by cell: right on both sides, on the first alone, on the second alone, on neither."""
    return [1] * (e + f) + [0] * (g + h), [1] * e + [0] * f + [1] * g + [0] * h


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_as_published(successes: int, n: int, low: float, high: float) -> None:
    found = wilson(successes, n)
    assert (found.value, found.n, found.method) == (successes / n, n, "wilson")
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 500), st.data())
def test_wilson_inverts_the_score_test(n: int, data: st.DataObject) -> None:
    """Its bounds are the shares from which the observed one is 1.96 standard errors away."""
    k = data.draw(st.integers(0, n))
    found = wilson(k, n)
    assert 0 <= found.low <= found.value <= found.high <= 1
    z = NormalDist().inv_cdf(0.975)
    for bound in (found.low, found.high):
        if 0 < bound < 1:
            assert abs(found.value - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-9)
    mirrored = wilson(n - k, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-12)


@given(st.integers(1, 2000), st.data())
def test_wilson_of_statsmodels(n: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, n))
    found = wilson(k, n)
    assert (found.low, found.high) == pytest.approx(proportion_confint(k, n, method="wilson"), abs=1e-12)


def test_wilson_at_the_ends() -> None:
    assert wilson(0, 7).low == 0
    assert wilson(7, 7).high == 1
    z2 = NormalDist().inv_cdf(0.975) ** 2
    assert wilson(0, 7).high == pytest.approx(z2 / (7 + z2))  # by hand: p = 0 leaves z^2 / (n + z^2)
    for successes, n in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(UsageError):
            wilson(successes, n)


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 2635, table III, method 10
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((20, 12, 2, 16), 0.0562, 0.3292),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((36, 14, 0, 0), 0.1528, 0.4167),
        ((35, 14, 0, 1), 0.1461, 0.4175),
        ((18, 14, 0, 18), 0.1441, 0.3963),
        ((2, 97, 1, 0), 0.8721, 0.9854),
        ((1, 97, 1, 1), 0.8736, 0.9850),
        ((0, 29, 1, 0), 0.6666, 0.9882),
        ((2, 98, 0, 0), 0.9178, 0.9945),
        ((1, 98, 0, 1), 0.9171, 0.9916),
        ((0, 30, 0, 0), 0.8395, 1.0),
        ((54, 0, 0, 0), -0.0664, 0.0664),
        ((53, 0, 0, 1), -0.0729, 0.0729),
        ((30, 0, 0, 24), -0.0358, 0.0358),
        ((27, 0, 0, 27), -0.0351, 0.0351),
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), chapter 8
        ((59, 6, 16, 80), -0.1186, -0.0046),
    ],
)
def test_newcombe_as_published(cells: tuple[int, int, int, int], low: float, high: float) -> None:
    found = newcombe(*of_cells(*cells))
    e, f, g, h = cells
    assert found.value == pytest.approx((f - g) / (e + f + g + h))
    assert found.method == "newcombe"
    assert (found.low, found.high) == pytest.approx((low, high), abs=1.1e-4)


def correlation(one: Sequence[int], two: Sequence[int]) -> float:
    """Newcombe's: the phi coefficient, its numerator lowered by n / 2 where it is positive; 0 where a margin is."""
    if len(set(one)) < 2 or len(set(two)) < 2:
        return 0.0
    n = len(one)
    scale = n * n * float(np.std(one) * np.std(two))
    phi = pearsonr(one, two).statistic
    return float(phi if phi <= 0 else max(phi - n / 2 / scale, 0.0))


@given(PAIRS)
def test_newcombe_of_scipy_and_statsmodels(pairs: list[tuple[int, int]]) -> None:
    """Wilson's intervals of statsmodels combined with scipy's correlation; without one, statsmodels' own interval."""
    one, two = zip(*pairs, strict=True)
    found, phi, n = newcombe(one, two), correlation(one, two), len(pairs)
    (low1, high1), (low2, high2) = (proportion_confint(sum(side), n, method="wilson") for side in (one, two))
    p1, p2 = sum(one) / n, sum(two) / n
    below = [p1 - low1, high2 - p2]
    above = [high1 - p1, p2 - low2]
    widths = [math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y)) for x, y in (below, above)]
    bounds = (max(-1.0, p1 - p2 - widths[0]), min(1.0, p1 - p2 + widths[1]))
    assert (found.low, found.high) == pytest.approx(bounds, abs=1e-7)
    if phi == 0:
        independent = confint_proportions_2indep(sum(one), n, sum(two), n, method="newcomb", compare="diff")
        assert (found.low, found.high) == pytest.approx(independent, abs=1e-9)


@given(PAIRS)
def test_newcombe_holds_its_value_and_turns_round(pairs: list[tuple[int, int]]) -> None:
    one, two = zip(*pairs, strict=True)
    found, turned = newcombe(one, two), newcombe(two, one)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (-turned.high, -turned.low) == pytest.approx((found.low, found.high), abs=1e-9)
    assert found.high > found.low  # honest about agreement, too
    shuffled = newcombe(*zip(*reversed(pairs), strict=True))
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high), abs=1e-12)


@given(GRADES, st.integers(0, 3))
def test_bootstrap(values: list[float], seed: int) -> None:
    found = bootstrap(values, seed, draws=200)
    assert found == bootstrap(values, seed, draws=200)
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert (found.value, found.n) == (pytest.approx(np.mean(values)), len(values))


@given(st.lists(st.floats(0, 1), min_size=2, max_size=30), st.integers(0, 3))
def test_bootstrap_of_scipy(values: list[float], seed: int) -> None:
    """The same draws give the same bounds."""
    assume(np.ptp(values) > 0)
    found = bootstrap(values, seed, draws=200)
    theirs = scipy_bootstrap((values,), np.mean, n_resamples=200, method="percentile", rng=np.random.default_rng(seed))
    interval = theirs.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-12)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=30), st.integers(0, 3))
def test_a_difference_is_scipys_paired_bootstrap(pairs: list[tuple[float, float]], seed: int) -> None:
    one, two = (np.array(side) for side in zip(*pairs, strict=True))
    assume(np.ptp(one - two) > 1e-6 and not np.isin([one, two], (0.0, 1.0)).all())
    found = difference(one, two, seed, draws=200)

    def statistic(first: Any, second: Any, axis: int) -> Any:
        return first.mean(axis=axis) - second.mean(axis=axis)

    theirs = scipy_bootstrap(
        (one, two),
        statistic,
        n_resamples=200,
        paired=True,
        vectorized=True,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_bootstrap_against_the_normal_distribution() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    found = bootstrap(values, seed=2)
    half = 1.96 * values.std(ddof=1) / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)


@given(BITS)
def test_a_rate_of_zeros_and_ones_is_wilsons(values: list[int]) -> None:
    assert rate(values) == wilson(sum(values), len(values))


def test_which_method_is_taken() -> None:
    assert rate([0.0, 0.5, 1.0]).method == "bootstrap"
    assert difference([1, 0], [0, 0]).method == "newcombe"
    assert difference([1, 0.5], [0, 0]).method == "bootstrap"
    # items are drawn with both their values: a difference that hardly varies has hardly any spread
    found = difference([0.1, 0.5, 0.9], [0.0, 0.4, 0.79])
    assert (found.low, found.high) == pytest.approx((0.1, 0.11))


def test_items_that_are_all_alike_prove_little() -> None:
    """A bootstrap has nothing to draw from: one answer, or a few equal ones, would be certain."""
    assert difference([0.3, 0.7], [0.3, 0.7]).high == 0, "nothing changed"
    unseen = wilson(0, 3).high
    found = difference([0.1, 0.5, 0.9], [0.0, 0.4, 0.8])
    assert (found.low, found.high) == pytest.approx((0.1 - unseen * 1.1, 0.1 + unseen * 0.9))
    assert rate([0.6]).low < 0.3 < 0.9 < rate([0.6]).high
    effects = difference([1.0] * 4, [-0.5] * 4)  # each from -1 to 1
    assert effects.high == pytest.approx(1.5 + wilson(0, 4).high * 0.5)
    assert difference([0.5] * 40, [0.1] * 40).low > 0, "forty are proof"


def test_a_margin_of_items_that_are_all_alike() -> None:
    one, none = difference([1.0] * 4, [0.0] * 4), difference([0.0] * 4, [0.0] * 4)
    assert margin([1.0, 1.0, 0.0, 1.0], one, none) == bootstrap([1.0, 1.0, 0.0, 1.0])
    found = margin([1.0] * 4, one, none)
    assert found.value == 1
    assert found.low < 1 - (one.value - one.low)


def test_what_is_refused() -> None:
    for call in (
        lambda: rate([]),
        lambda: bootstrap([]),
        lambda: bootstrap([[0.1, 0.2]]),
        lambda: bootstrap([0.1, float("nan")]),
        lambda: difference([], []),
        lambda: difference([1, 0], [1]),
        lambda: newcombe([1, 0], [1]),
        lambda: newcombe([1, 0.5], [1, 0]),
        lambda: newcombe([], []),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_as_text() -> None:
    assert str(Interval(0.62, 0.484, 0.741, 50, "wilson")) == "62% (48 to 74)"
