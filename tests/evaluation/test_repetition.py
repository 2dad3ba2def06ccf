"""Repetition by hand, and against a search that tries every stretch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.evaluation.metrics.repetition import repetition

TOKENS = st.lists(st.integers(0, 2), max_size=24)


def longest_loop(tokens: list[int]) -> int:
    """Tokens of the longest stretch that repeats its first `period` tokens at least three times."""
    best = 0
    for start in range(len(tokens)):
        for end in range(start + 3, len(tokens) + 1):
            part = tokens[start:end]
            periods = range(1, len(part) // 3 + 1)
            if any(all(part[i] == part[i - p] for i in range(p, len(part))) for p in periods):
                best = max(best, len(part))
    return best


@pytest.mark.parametrize(
    ("tokens", "distinct", "loop"),
    [
        ([], 1.0, 0.0),
        ([7], 1.0, 0.0),
        ([7, 7], 1.0, 0.0),
        ([7, 7, 7], 0.5, 1.0),
        ([1, 2, 3, 4], 1.0, 0.0),
        ([1, 2, 1, 2], 2 / 3, 0.0),  # said twice is no loop yet
        ([1, 2, 1, 2, 1, 2], 2 / 5, 1.0),
        ([9, 8, 1, 2, 1, 2, 1, 2], 4 / 7, 6 / 8),
        ([1, 2, 1, 2, 1, 2, 1, 9], 3 / 7, 7 / 8),  # an unfinished round counts
        ([5, 5, 5, 1, 6, 6, 6, 6], 4 / 7, 4 / 8),
    ],
)
def test_by_hand(tokens: list[int], distinct: float, loop: float) -> None:
    found = repetition(tokens)
    assert (found.distinct_2, found.loop) == pytest.approx((distinct, loop))


@given(TOKENS)
def test_the_longest_loop_is_found(tokens: list[int]) -> None:
    found = repetition(tokens)
    assert found.loop == pytest.approx(longest_loop(tokens) / len(tokens) if tokens else 0.0)
    assert 0 < found.distinct_2 <= 1


@given(TOKENS, st.integers(1, 1000))
def test_what_tokens_are_does_not_matter(tokens: list[int], by: int) -> None:
    assert repetition([token + by for token in tokens]) == repetition(tokens)


def test_periods_up_to_64() -> None:
    assert repetition([*range(64)] * 3).loop == 1.0
    assert repetition([*range(65)] * 3).loop == 0.0
