"""Risk differences by hand, and the ranking against a slow oracle."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import UsageError
from steermoe_local.maps.scores import activation_rates, rank, risk_difference, risk_difference_from
from tests.support.builders import identity, random_counts


def test_two_by_two_by_hand() -> None:
    # layer 0: 3 of 4 and 1 of 4 tokens, against 1 of 5 and 4 of 5
    rd = risk_difference_from([[3, 1], [0, 4]], 4, [[1, 4], [5, 0]], 5)
    assert rd.tolist() == [[3 / 4 - 1 / 5, 1 / 4 - 4 / 5], [-1.0, 1.0]]
    assert rd.dtype == np.float64


def test_counts_give_the_same_and_dense_layers_zero() -> None:
    counts = random_counts(1)
    rd = risk_difference(counts)
    assert rd.shape == (3, 4)
    assert not rd[0].any()
    for layer, expert in np.ndindex(3, 4):
        exact = Fraction(int(counts.a1[layer, expert]), 7) - Fraction(int(counts.a2[layer, expert]), 11)
        assert rd[layer, expert] == pytest.approx(float(exact), abs=1e-15)


def test_rates_sum_to_top_k() -> None:
    p1, p2 = activation_rates(random_counts(2, identity(2, 6, 3)))
    assert np.allclose(p1.sum(axis=1), 3)
    assert np.allclose(p2.sum(axis=1), 3)


@pytest.mark.parametrize("side", ["n1", "n2"])
def test_no_tokens(side: str) -> None:
    with pytest.raises(UsageError, match="no token counted"):
        risk_difference(random_counts(1, **{side: 0}))  # type: ignore[arg-type]


def test_counts_that_break_top_k() -> None:
    with pytest.raises(UsageError, match=r"1, positive side: 14 activations of 8"):
        activation_rates(replace(random_counts(1), n1=8))


def test_shapes_must_agree() -> None:
    with pytest.raises(UsageError, match="differ"):
        risk_difference_from([[1]], 1, [[1, 0]], 1)


def test_rank_breaks_ties_by_layer_and_expert() -> None:
    rd = [[0.5, -0.5, 0.0], [-1.0, 0.5, 0.25]]
    assert rank(rd).tolist() == [[1, 0], [0, 0], [0, 1], [1, 1], [1, 2], [0, 2]]
    assert rank(rd, [0]).tolist() == [[0, 0], [0, 1], [0, 2]]
    assert rank(rd, []).shape == (0, 2)


@given(
    st.integers(1, 5).flatmap(
        lambda n: st.lists(
            st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.1, 0.5]), min_size=n, max_size=n),
            min_size=1,
            max_size=5,
        )
    )
)
def test_rank_against_sorted(rows: list[list[float]]) -> None:
    expected = sorted(((-abs(v), layer, e) for layer, row in enumerate(rows) for e, v in enumerate(row)))
    assert rank(rows).tolist() == [[layer, e] for _, layer, e in expected]


@pytest.mark.parametrize("bad", [[1.0], [[float("nan")]], [[float("inf")]]])
def test_rank_refuses(bad: object) -> None:
    with pytest.raises(UsageError, match="finite table"):
        rank(bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="outside the table"):
        rank([[0.0]], [1])
