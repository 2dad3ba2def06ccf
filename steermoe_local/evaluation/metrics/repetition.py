"""Measures how much an answer repeats itself, as models do that are steered too hard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

_LONGEST_PERIOD = 64  # tokens; a longer loop is not counted as one
_REPEATS = 3  # a phrase said twice is no loop yet


@dataclass(frozen=True)
class Repetition:
    """`distinct_2`: different pairs of neighbours over all pairs (Li et al., NAACL 2016), 1 for fewer than two tokens.

    `loop`: the share of the tokens in the longest stretch in which some tokens come three times in a row or more.
    """

    distinct_2: float
    loop: float


def repetition(tokens: Sequence[int]) -> Repetition:
    """Measure the tokens of one answer."""
    n = len(tokens)
    pairs = list(pairwise(tokens))
    distinct = len(set(pairs)) / len(pairs) if pairs else 1.0
    longest = 0
    for period in range(1, min(_LONGEST_PERIOD, n // _REPEATS) + 1):
        run = 0  # tokens in a row that equal the one a period before
        for i in range(period, n):
            run = run + 1 if tokens[i] == tokens[i - period] else 0
            if run >= (_REPEATS - 1) * period:
                longest = max(longest, run + period)
    return Repetition(distinct, longest / n if n else 0.0)
