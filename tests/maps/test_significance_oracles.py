"""Standard errors, p-values, corrections, correlations and the shuffled control against scipy and statsmodels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import test_proportions_2indep as proportions_2indep

from steermoe_local.maps import significance
from tests.maps.test_significance import InMemory, table

Array = np.ndarray[Any, Any]


def random_tables(seed: int, n_pairs: int, n_expert: int = 3) -> InMemory:
    rng = np.random.default_rng(seed)
    n = rng.integers(2, 12, size=(n_pairs, 2))
    own = rng.beta(2, 3, size=(n_pairs, 1, n_expert))
    return table(rng.binomial(n[:, :, None], own), n)


@pytest.mark.parametrize("seed", range(4))
def test_standard_errors_are_those_of_clustered_least_squares(seed: int) -> None:
    """One row a token, its activation regressed on its side; the slope is the RD, the pairs are the clusters."""
    pairs = random_tables(seed, 25)
    se = significance.standard_errors(pairs)
    for expert in range(3):
        active, side, cluster = [], [], []
        for pair, (counts, tokens) in enumerate(zip(pairs.a[:, :, 0, expert], pairs.n, strict=True)):
            for positive, a, n in ((1, counts[0], tokens[0]), (0, counts[1], tokens[1])):
                active += [1] * int(a) + [0] * int(n - a)
                side += [positive] * int(n)
                cluster += [pair] * int(n)
        clustered = {"groups": np.array(cluster), "use_correction": False}
        fit = sm.OLS(np.array(active), sm.add_constant(np.array(side))).fit(cov_type="cluster", cov_kwds=clustered)
        assert fit.params[1] == pytest.approx(pairs.rd[0, expert], abs=1e-12)
        assert se[0, expert] == pytest.approx(fit.bse[1] * np.sqrt(25 / 24), rel=1e-9)


def test_independent_tokens_are_two_proportions() -> None:
    """One token a cluster, on one side: the unpooled z-test of two proportions, but for the factor of few clusters."""
    n = np.array([[1, 0]] * 40 + [[0, 1]] * 60)
    a = np.zeros((100, 2, 1), dtype=int)
    a[:10, 0], a[40:85, 1] = 1, 1
    pairs = table(a, n)
    z = proportions_2indep(10, 40, 45, 60, method="wald", compare="diff").statistic
    se = significance.standard_errors(pairs)[0, 0] * np.sqrt(99 / 100)
    assert pairs.rd[0, 0] / se == pytest.approx(z, rel=1e-12)


@pytest.mark.parametrize("n_pairs", [2, 3, 11, 101, 3000])
def test_p_values_are_those_of_student(n_pairs: int) -> None:
    t = np.concatenate([np.linspace(0, 12, 49), [30.0, 1e3, 1e6]])
    expected = np.maximum(2 * stats.t.sf(t, n_pairs - 1), 2.0 ** -min(n_pairs - 1, 1000))
    assert significance.p_values(t, np.ones_like(t), n_pairs) == pytest.approx(expected, rel=1e-8)


@settings(max_examples=40)
@given(st.floats(0.01, 0.9999), st.integers(1, 9000))
def test_quantiles_are_those_of_student(level: float, df: int) -> None:
    assert significance.t_quantile(level, df) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-7)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_benjamini_hochberg(values: list[float]) -> None:
    p = np.array(values)
    assert significance.benjamini_hochberg(p) == pytest.approx(multipletests(p, method="fdr_bh")[1], abs=1e-14)
    assert significance.benjamini_hochberg(p) == pytest.approx(stats.false_discovery_control(p), abs=1e-14)


@pytest.mark.parametrize("n", [1, 2, 5, 40, 1000])
def test_holm(n: int) -> None:
    p = np.random.default_rng(n).beta(0.3, 2, size=n).round(2)  # ties, and zeros
    assert significance.holm(p) == pytest.approx(multipletests(p, method="holm")[1], abs=1e-14)


# few distinct values: many ties
NUMBERS = st.one_of(st.floats(-1, 1), st.integers(-2, 2).map(float))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=3, max_size=40))
def test_correlations(points: list[tuple[float, float]]) -> None:
    x, y = np.array(points).T
    if np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:  # scipy gives NaN for a constant side and warns near one
        return
    assert significance.pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-9)
    assert significance.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_the_control_is_a_permutation_test_of_paired_samples(seed: int) -> None:
    """scipy's exact test over all 2^8 swaps of sides; 8,000 draws come within what they can tell."""
    pairs = random_tables(seed, 8)
    a, n = pairs.a[:, :, 0].reshape(16, 3).astype(float), pairs.n.reshape(16)

    def statistic(positive: Array, negative: Array, top: int) -> float:
        rates = [a[side.astype(int)].sum(axis=0) / n[side.astype(int)].sum() for side in (positive, negative)]
        return float(np.sort(np.abs(rates[0] - rates[1]))[::-1][:top].sum())

    controls = significance.shuffled_control(pairs, 2, 8000)
    for top, control in zip((1, 2), controls, strict=True):
        exact = stats.permutation_test(
            (np.arange(0, 16, 2), np.arange(1, 16, 2)),
            lambda x, y, top=top: statistic(x, y, top),
            permutation_type="samples",
            vectorized=False,
            n_resamples=np.inf,
            alternative="greater",
        )
        assert control.value == pytest.approx(exact.statistic)
        assert control.p == pytest.approx(exact.pvalue, abs=0.025)
