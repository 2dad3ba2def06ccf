"""Intervals over items x draws: against statsmodels and scipy, by simulation, and what must hold of all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import statsmodels.api as sm
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import expit
from scipy.stats import t as student

from steermoe_local.errors import UsageError
from steermoe_local.evaluation.metrics import crossed
from steermoe_local.evaluation.metrics.crossed import crossed_difference, crossed_share
from steermoe_local.evaluation.metrics.intervals import wilson

Table = npt.NDArray[np.float64]
SIDES = arrays.array_shapes(min_dims=2, max_dims=2, max_side=8)
BITS = SIDES.flatmap(lambda shape: arrays.arrays(np.float64, shape, elements=st.sampled_from([0.0, 1.0])))


def drawn(rng: np.random.Generator, shape: tuple[int, int], mean: float, items: float, draws: float) -> Table:
    """Bits of a logistic model with random items and random draws."""
    logits = mean + items * rng.normal(size=(shape[0], 1)) + draws * rng.normal(size=(1, shape[1]))
    return (rng.random(shape) < expit(logits)).astype(np.float64)


def truth(mean: float, items: float, draws: float) -> float:
    """The share that `drawn` has in the long run, by quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    return float(weights @ expit(mean + np.hypot(items, draws) * nodes) / weights.sum())


@pytest.mark.parametrize("freedom", [3.0, 3.5, 4.0, 5.0, 9.0, 19.0, 1000.0])
def test_students_quantile(freedom: float) -> None:
    assert crossed._student(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=2e-3)


def test_students_quantile_of_few() -> None:
    assert crossed._student(2.0) == pytest.approx(student.ppf(0.975, 2))
    assert crossed._student(1.0) == pytest.approx(student.ppf(0.975, 1))
    assert crossed._student(2.9) > student.ppf(0.975, 2.9), "rather too wide"


def test_the_variance_is_that_of_two_clusters() -> None:
    """Cameron, Gelbach and Miller's, as statsmodels computes it for a regression on a constant."""
    table = drawn(np.random.default_rng(1), (12, 7), 1.0, 1.0, 1.0)
    rows, columns = np.indices(table.shape)
    groups = np.column_stack([rows.ravel(), columns.ravel()])
    found = sm.OLS(table.ravel(), np.ones(table.size)).fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert crossed._parts(table).variance == pytest.approx(float(found.cov_params()[0, 0]))


@pytest.mark.parametrize("shape", [(20, 5), (50, 20), (10, 20)])
@pytest.mark.parametrize(
    ("mean", "items", "draws"), [(1.5, 1.0, 0.7), (3.0, 1.5, 1.0), (0.0, 0.5, 2.0), (2.0, 0.0, 0.0), (2.0, 3.0, 0.3)]
)
def test_coverage(shape: tuple[int, int], mean: float, items: float, draws: float) -> None:
    """95% nominally; 400 samples tell that to 2 points, and few clusters cost a few more."""
    rng, share = np.random.default_rng(0), truth(mean, items, draws)
    found = [crossed_share(drawn(rng, shape, mean, items, draws)) for _ in range(400)]
    assert np.mean([one.low <= share <= one.high for one in found]) >= 0.9


def test_cells_are_not_observations() -> None:
    """Wilson's interval of all cells, as if they were independent, misses the share far more often."""
    rng, share = np.random.default_rng(0), truth(1.5, 1.0, 1.0)
    tables = [drawn(rng, (50, 20), 1.5, 1.0, 1.0) for _ in range(300)]
    naive = [wilson(int(table.sum()), table.size) for table in tables]
    assert np.mean([one.low <= share <= one.high for one in naive]) < 0.6
    right = [crossed_share(table) for table in tables]
    assert np.mean([one.low <= share <= one.high for one in right]) > 0.9


@pytest.mark.parametrize("same_items", [False, True])
def test_coverage_of_differences(same_items: bool) -> None:
    """Of two behaviours under the same draws, which both suffer from."""
    rng, hit = np.random.default_rng(0), 0
    means, items, draws = (1.5, 0.5), 1.0, 0.8
    share = truth(means[0], items, draws) - truth(means[1], items, draws)
    for _ in range(400):
        effect = draws * rng.normal(size=(1, 15))
        sides = [items * rng.normal(size=(40, 1)) for _ in means]
        if same_items:
            sides = [sides[0], sides[0]]
        one, two = (
            (rng.random((40, 15)) < expit(mean + side + effect)).astype(float)
            for mean, side in zip(means, sides, strict=True)
        )
        found = crossed_difference(one, two, same_items=same_items)
        hit += found.low <= share <= found.high
    assert hit >= 0.9 * 400


@given(BITS)
def test_what_holds_of_all(table: Table) -> None:
    found = crossed_share(table)
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.value == pytest.approx(table.mean())
    assert (found.n, found.method) == (table.shape[0], "crossed")
    mirrored = crossed_share(1 - table)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)
    turned = crossed_share(table.T)
    assert (turned.low, turned.high) == pytest.approx((found.low, found.high), abs=1e-9)
    apart = crossed_difference(table, 1 - table)
    assert -1 <= apart.low <= apart.value + 1e-12 <= apart.high + 1e-12 <= 1 + 1e-12
    same = crossed_difference(table, table, same_items=True)
    assert same.low <= same.value == 0 <= same.high


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_nothing_varies(value: float) -> None:
    """No more is sure than as many observations as there are draws say."""
    found, plain = crossed_share(np.full((50, 20), value)), wilson(int(20 * value), 20)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))
    apart = crossed_difference(np.ones((50, 20)), np.ones((30, 20)))
    assert apart.value == 0
    assert apart.low < 0 < apart.high


def test_a_table_of_one_row_is_a_sample_of_draws() -> None:
    values = np.array([[0.9, 0.92, 0.88, 0.91]])
    found = crossed_share(values)
    half = student.ppf(0.975, 3) * values.std(ddof=1) / 2
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.02)
    assert crossed_share([[1.0]]).low == pytest.approx(wilson(1, 1).low)


@pytest.mark.parametrize("table", [[], [[]], [1.0], [[np.nan]], [[1.5]], [[-0.1]]])
def test_refused(table: list[float]) -> None:
    with pytest.raises(UsageError):
        crossed_share(table)


def test_other_draws_are_refused() -> None:
    with pytest.raises(UsageError, match="same draws"):
        crossed_difference(np.ones((3, 4)), np.ones((3, 5)))
    with pytest.raises(UsageError, match="same draws"):
        crossed_difference(np.ones((3, 4)), np.ones((2, 4)), same_items=True)
