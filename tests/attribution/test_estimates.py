"""Estimates of effects against surfaces whose effects are known, against other implementations, and by simulation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steermoe_local.attribution.estimates import Estimates, agreement, estimate, held_out_r2, least_draws
from steermoe_local.errors import UsageError

Array = np.ndarray[Any, Any]
Surface = Callable[[tuple[bool, ...]], float]


def random_draws(rng: np.random.Generator, n: int, p: int, rate: float = 0.2) -> Array:
    return rng.random((n, p)) < rate


#
# surfaces
#


@given(seed=st.integers(0, 1 << 30), p=st.integers(1, 12), scale=st.sampled_from([1e-3, 1.0, 50.0]))
@settings(max_examples=30, deadline=None)
def test_an_additive_surface_is_found_exactly(seed: int, p: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    draws = np.concatenate([random_draws(rng, least_draws(p) + 20, p, 0.3), np.eye(p, dtype=bool)])
    truth = rng.normal(scale=scale, size=p)
    found = estimate(draws, 2.5 + draws @ truth)
    np.testing.assert_allclose(found.effect, truth, rtol=0, atol=1e-11 * (scale + 2.5))
    assert found.base == pytest.approx(2.5, abs=1e-10 * (scale + 1))
    assert (found.se < 1e-9 * (scale + 2.5)).all()
    assert found.r2 == pytest.approx(1, abs=1e-9)


def saturating(draw: tuple[bool, ...]) -> float:
    """One suppressed expert is replaced by another: the second costs more."""
    return -math.log1p(sum(weight for weight, taken in zip((1.0, 2.0, 0.5, 0.1, 3.0), draw, strict=False) if taken))


def interacting(draw: tuple[bool, ...]) -> float:
    """The first matters only without the second; the third and fourth only together."""
    a, b, c, d = draw[:4]
    return 1.0 * (a and not b) - 2.0 * (c and d) + 0.25 * b + 5.0 * all(draw)


def parity(draw: tuple[bool, ...]) -> float:
    """No expert has an average effect at rate 1/2, and all of them together are everything."""
    return float(sum(draw) % 2)


def average_effects(surface: Surface, n: int, rate: Fraction) -> list[float]:
    """Of each candidate: the mean over independent draws of the others of what taking it changes, by enumeration."""
    found = []
    for i in range(n):
        total = 0.0
        for others in itertools.product((False, True), repeat=n - 1):
            chance = rate ** sum(others) * (1 - rate) ** (n - 1 - sum(others))
            change = surface((*others[:i], True, *others[i:])) - surface((*others[:i], False, *others[i:]))
            total += float(chance) * change
        found.append(total)
    return found


@pytest.mark.parametrize("rate", [Fraction(1, 2), Fraction(1, 3), Fraction(1, 4)])
@pytest.mark.parametrize("surface", [saturating, interacting, parity])
def test_a_surface_that_does_not_add_up_gives_the_average_effect(surface: Surface, rate: Fraction) -> None:
    """All 2^n draws, each as often as the rate makes it likely: the coefficients are the average effects, no others."""
    n = 5 if rate == Fraction(1, 2) else 4
    rows = [
        draw
        for draw in itertools.product((False, True), repeat=n)
        for _ in range((rate.denominator - 1) ** (n - sum(draw)))
    ]
    response = [surface(draw) for draw in rows]
    found = estimate(rows, response)
    np.testing.assert_allclose(found.effect, average_effects(surface, n, rate), rtol=0, atol=1e-12)
    assert found.r2 < 0.999  # it says that they do not add up


def test_effects_of_a_pair_that_acts_together_are_shared() -> None:
    """Two experts that only act together: each has the rate's share of the effect, and its action alone has none."""
    rng = np.random.default_rng(1)
    draws = random_draws(rng, 20_000, 4, 0.25)
    found = estimate(draws, (draws[:, 0] & draws[:, 1]).astype(float))
    assert found.effect[:2] == pytest.approx([0.25, 0.25], abs=5 * found.se[0])
    assert np.abs(found.effect[2:]).max() < 5 * found.se[2]


#
# errors
#


def hc3(x: Array, y: Array) -> tuple[Array, Array]:
    """Coefficients and HC3 errors by the formula of MacKinnon and White, with whole matrices; [intercept, ...]."""
    full = np.hstack([np.ones((len(y), 1)), x.astype(float)])
    bread = np.linalg.inv(full.T @ full)
    coefficients = bread @ full.T @ y
    hat = full @ bread @ full.T
    scaled = (y - hat @ y) / (1 - np.diag(hat))
    return coefficients, np.sqrt(np.diag(bread @ full.T @ np.diag(scaled**2) @ full @ bread))


@pytest.mark.parametrize("seed", range(4))
def test_errors_are_hc3(seed: int) -> None:
    rng = np.random.default_rng(seed)
    draws = random_draws(rng, 90, 7)
    response = draws @ rng.normal(size=7) + (0.1 + draws[:, 0]) * rng.normal(size=90)
    found = estimate(draws, response)
    coefficients, se = hc3(draws, response)
    np.testing.assert_allclose([found.base, *found.effect], coefficients, rtol=1e-10)
    np.testing.assert_allclose(found.se, se[1:], rtol=1e-10)
    model = sm.OLS(response, sm.add_constant(draws.astype(float))).fit(cov_type="HC3", use_t=True)
    np.testing.assert_allclose(found.se, model.bse[1:], rtol=1e-10)
    p = 2 * stats.t.sf(np.abs(found.effect / found.se), 90 - 8)
    np.testing.assert_allclose(found.p, p, rtol=1e-6, atol=1e-12)


N_SIMULATIONS = 1000
SIGMAS = 5.0  # 1 in 3 million, two-sided


def coverage(response: Callable[[np.random.Generator, Array], Array], truth: Array, n: int, rate: float) -> Array:
    """Share of simulated runs whose 95% interval holds the truth, for each candidate."""
    rng = np.random.default_rng(11)
    inside = np.zeros(len(truth))
    for _ in range(N_SIMULATIONS):
        draws = random_draws(rng, n, len(truth), rate)
        found = estimate(draws, response(rng, draws))
        inside += np.abs(found.effect - truth) <= stats.t.ppf(0.975, n - len(truth) - 1) * found.se
    return inside / N_SIMULATIONS


def allowed(share: float) -> float:
    """How far a share of the simulated runs may lie from its expectation."""
    return SIGMAS * math.sqrt(share * (1 - share) / N_SIMULATIONS)


TRUTH = np.array([0.5, -0.3, 0.0, 0.0, 1.0])


def even(rng: np.random.Generator, draws: Array) -> Array:
    return draws @ TRUTH + 0.2 * rng.normal(size=len(draws))


def uneven(rng: np.random.Generator, draws: Array) -> Array:
    """Where the first expert is taken, the others matter ten times as much."""
    noise: Array = (0.1 + 0.9 * draws[:, 0]) * rng.normal(size=len(draws))
    return draws @ TRUTH + noise


@pytest.mark.parametrize("response", [even, uneven])
def test_intervals_cover_the_truth(response: Any) -> None:
    covered = coverage(response, TRUTH, n=150, rate=0.2)
    assert (np.abs(covered - 0.95) < allowed(0.95)).all(), covered


def test_classical_errors_would_not() -> None:
    """The simulation tells them apart: errors that assume one variance miss the truth of the first expert."""
    rng = np.random.default_rng(11)
    inside = 0
    for _ in range(N_SIMULATIONS):
        draws = random_draws(rng, 150, 5, 0.2)
        model = sm.OLS(uneven(rng, draws), sm.add_constant(draws.astype(float))).fit()
        inside += bool(model.conf_int()[1][0] <= TRUTH[0] <= model.conf_int()[1][1])
    assert inside / N_SIMULATIONS < 0.95 - allowed(0.95)


def test_intervals_cover_average_effects_of_a_surface_that_does_not_add_up() -> None:
    """Nothing is random but the draws: what does not add up is the residual, and its size depends on the draw."""
    truth = np.array(average_effects(saturating, 5, Fraction(1, 4)))

    def response(rng: np.random.Generator, draws: Array) -> Array:
        weights = np.array([1.0, 2.0, 0.5, 0.1, 3.0])
        return -np.log1p(draws @ weights)

    covered = coverage(response, truth, n=200, rate=0.25)
    assert (np.abs(covered - 0.95) < allowed(0.95)).all(), covered


#
# held-out R2
#


def test_r2_is_that_of_predictions_for_other_folds() -> None:
    rng = np.random.default_rng(4)
    draws = random_draws(rng, 83, 6, 0.4)
    response = draws @ rng.normal(size=6) + rng.normal(size=83)
    error = deviation = 0.0
    for i in range(83):
        others = np.array([j for j in range(83) if j % 5 != i % 5])
        coefficients, _ = hc3(draws[others], response[others])
        error += (response[i] - coefficients[0] - draws[i] @ coefficients[1:]) ** 2
        deviation += (response[i] - response[others].mean()) ** 2
    assert estimate(draws, response).r2 == pytest.approx(1 - error / deviation, rel=1e-9)


def test_r2_is_the_share_of_the_variance_that_adds_up() -> None:
    rng = np.random.default_rng(3)
    draws = random_draws(rng, 4000, 6, 0.5)
    added = draws @ np.full(6, 0.4)  # variance 6 * 0.16 / 4
    for noise in (0.1, 0.5, 2.0):
        expected = 0.24 / (0.24 + noise**2)
        assert estimate(draws, added + noise * rng.normal(size=4000)).r2 == pytest.approx(expected, abs=0.05)
    assert estimate(draws, rng.normal(size=4000)).r2 == pytest.approx(0, abs=0.01)
    assert estimate(draws[:60], rng.normal(size=60)).r2 < 0  # fewer draws predict worse than the mean does


def test_r2_of_a_constant_response_is_0() -> None:
    draws = random_draws(np.random.default_rng(2), 40, 3, 0.5)
    found = estimate(draws, np.full(40, 1.25))
    assert found.r2 <= 0
    np.testing.assert_allclose(found.effect, 0, atol=1e-12)
    assert held_out_r2(np.ones((10, 1)), np.zeros(10)) == 0


#
# agreement
#


def spread(first: float, n: int) -> Array:
    return first * 0.9 ** np.arange(n)


def test_agreement_falls_with_the_error() -> None:
    effect = spread(0.5, 40)
    shares = [agreement(effect, np.full(40, se), 8) for se in (0.0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 1.0)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    # of the last, nothing but chance is left: 8 of 40
    assert shares[-1] == pytest.approx(8 / 40, abs=5 * math.sqrt(0.2 * 0.8 / (8 * 400)))


@pytest.mark.parametrize("se", [0.01, 0.03, 0.1])
@pytest.mark.parametrize("truth", [spread(0.5, 40), np.r_[np.full(8, 0.3), np.zeros(32)], np.zeros(40)])
def test_agreement_is_that_of_real_runs_or_less(truth: Array, se: float) -> None:
    """Runs are simulated; two of them agree at least as often as each one says of itself."""
    rng = np.random.default_rng(6)
    said, real = [], []
    for _ in range(100):
        one, two = truth + se * rng.normal(size=(2, 40))
        said.append(agreement(one, np.full(40, se), 8))
        real.append(len(set(np.argsort(-np.abs(one))[:8]) & set(np.argsort(-np.abs(two))[:8])) / 8)
    noise = 4 * math.hypot(np.std(said), np.std(real)) / 10  # of the two means of 100 runs
    assert np.mean(said) <= np.mean(real) + noise
    if np.mean(real) > 0.75:  # where a run could be stable, it is not much less
        assert np.mean(said) >= np.mean(real) - 0.2


def test_a_candidate_without_an_estimate_makes_a_run_less_sure() -> None:
    effect, se = spread(0.5, 20), np.full(20, 0.001)
    unknown = se.copy()
    unknown[15:] = np.inf
    assert agreement(np.where(np.isinf(unknown), 0, effect), unknown, 8) < agreement(effect, se, 8)


#
# edges
#


def test_a_candidate_that_was_never_or_always_taken_has_no_estimate() -> None:
    rng = np.random.default_rng(8)
    draws = random_draws(rng, 60, 5, 0.3)
    draws[:, 1], draws[:, 3] = False, True
    found = estimate(draws, draws @ np.array([1.0, 9.0, 2.0, 9.0, 3.0]))
    np.testing.assert_allclose(found.effect, [1, 0, 2, 0, 3], atol=1e-12)
    assert np.isinf(found.se[[1, 3]]).all()
    assert (found.p[[1, 3]] == 1).all()
    assert np.isfinite(found.se[[0, 2, 4]]).all()


def test_candidates_that_are_always_taken_together_do_not_end_it() -> None:
    rng = np.random.default_rng(9)
    draws = random_draws(rng, 60, 3, 0.3)
    draws[:, 1] = draws[:, 0]
    found = estimate(draws, draws[:, 0] * 1.0)
    assert np.isfinite(found.effect).all()
    assert found.effect[0] + found.effect[1] == pytest.approx(1)


@given(n_candidates=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_too_few_draws_are_refused(n_candidates: int) -> None:
    n = least_draws(n_candidates)
    assert n > n_candidates + 1
    rng = np.random.default_rng(n)
    assert isinstance(estimate(random_draws(rng, n, n_candidates, 0.5), rng.normal(size=n)), Estimates)
    with pytest.raises(UsageError, match=str(n)):
        estimate(random_draws(rng, n - 1, n_candidates), np.zeros(n - 1))
