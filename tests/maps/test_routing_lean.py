"""How routing leans to a side of a map, against sums over single selections."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import UsageError
from steermoe_local.maps.effects import PROMOTE, SUPPRESS
from steermoe_local.maps.routing_lean import RoutingLean
from tests.support.builders import table_map
from tests.support.scored_maps import scored_map


def selections(rng: np.random.Generator, n: int, shape: tuple[int, int], top_k: int) -> np.ndarray:
    """Experts of n tokens, int32 [n, n_layer, top_k]; some layers route nothing."""
    found = np.stack([[rng.permutation(shape[1])[:top_k] for _ in range(shape[0])] for _ in range(n)]).astype(np.int32)
    found[rng.random((n, shape[0])) < 0.2] = -1
    return found


@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 5), st.integers(1, 8))
def test_sums_over_single_selections(seed: int, n: int, n_layer: int, n_expert: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n_layer, n_expert))
    lean = RoutingLean(scores)
    experts = selections(rng, n, (n_layer, n_expert), int(rng.integers(1, n_expert + 1)))
    counts = np.zeros((n_layer, n_expert), np.int64)
    by_token = lean.of_tokens(experts)
    for token, found in enumerate(experts.tolist()):
        total = Fraction(0)
        for layer, slots in enumerate(found):
            for expert in slots:
                if expert >= 0:
                    counts[layer, expert] += 1
                    if layer < n_layer - 1:
                        total += Fraction(scores[layer, expert])
        assert math.isclose(by_token[token], float(total), rel_tol=0, abs_tol=1e-12 * n_layer * n_expert)
    assert math.isclose(lean.of_counts(counts, n), by_token.mean(), rel_tol=0, abs_tol=1e-12 * n_layer * n_expert)


def test_a_token_alone_and_among_others_is_the_same_to_the_bit() -> None:
    """Sums of floats depend on their order: a condition would not be the same in a batch, or in a longer prompt."""
    rng = np.random.default_rng(3)
    for shape, top_k in (((48, 128), 8), ((7, 9), 3), ((3, 200), 131)):
        lean = RoutingLean(rng.normal(size=shape) * 10.0 ** rng.integers(-9, 9, shape))
        experts = selections(rng, 2100 if shape == (7, 9) else 70, shape, top_k)
        whole = lean.of_tokens(experts)
        assert np.array_equal(np.concatenate([lean.of_tokens(experts[i : i + 1]) for i in range(len(experts))]), whole)
        for size in (2, 3, 17, 1500):
            parts = [lean.of_tokens(experts[i : i + size]) for i in range(0, len(experts), size)]
            assert np.array_equal(np.concatenate(parts), whole)
        assert np.array_equal(lean.of_tokens(np.asfortranarray(experts)), whole)
    assert lean.of_tokens(experts[:0]).shape == (0,)


def test_long_prompts_take_no_table_of_all_selections() -> None:
    lean = RoutingLean(np.ones((48, 128)))
    experts = np.zeros((30_000, 48, 8), np.int32)
    tracemalloc.start()
    assert (lean.of_tokens(experts) == 47 * 8).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < experts.nbytes / 2


def test_the_scores_of_a_map() -> None:
    found = scored_map()
    lean = RoutingLean.of_map(found)
    assert np.array_equal(lean.scores[:-1], found.rd[:-1])
    assert not lean.scores[-1].any(), "the last layer routes only tokens whose logits are asked for"
    by_effect = RoutingLean.of_map(found, "effect")
    assert found.effects is not None
    tables = [
        np.where(
            found.effects.table(action, "significant", found.rd.shape) == 1,
            found.effects.table(action, "effect", found.rd.shape),
            0,
        )
        for action in (PROMOTE, SUPPRESS)
    ]
    one = (tables[0] != 0) != (tables[1] != 0)  # of experts with both actions, the better can be kept alone
    one[-1] = False
    assert one.any()
    assert np.array_equal(by_effect.scores[one], (tables[0] - tables[1])[one])
    with pytest.raises(UsageError, match="effect"):
        RoutingLean.of_map(table_map([[0.5, -0.5], [0.25, 0.0]]), "effect")
    with pytest.raises(UsageError, match="'size'"):
        RoutingLean.of_map(found, "size")


def test_scores_are_copied_and_finite() -> None:
    table = np.eye(3)
    lean = RoutingLean(table)
    table[0, 0] = 5
    assert lean.scores[0, 0] == 1
    with pytest.raises(ValueError, match="read-only"):
        lean.scores[0, 0] = 2
    for bad in (np.full((2, 2), np.nan), np.full((2, 2), np.inf), np.zeros(3), np.zeros((1, 2, 3))):
        with pytest.raises(UsageError, match="scores of experts"):
            RoutingLean(bad)


def test_digests() -> None:
    table = np.random.default_rng(0).normal(size=(4, 5))
    assert RoutingLean(table).digest == RoutingLean(np.asfortranarray(table)).digest
    last = table.copy()
    last[-1] += 1
    assert RoutingLean(last).digest == RoutingLean(table).digest, "the last layer counts nothing"
    first = table.copy()
    first[0, 0] = np.nextafter(first[0, 0], 9)
    assert RoutingLean(first).digest != RoutingLean(table).digest
    assert RoutingLean(table.reshape(5, 4)).digest != RoutingLean(table).digest
    assert RoutingLean(-np.zeros((2, 3))).digest == RoutingLean(np.zeros((2, 3))).digest
    assert RoutingLean(np.zeros((2, 3))).digest != RoutingLean(np.zeros((3, 2))).digest
