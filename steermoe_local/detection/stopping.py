"""Checks of a running recording: are the first experts settled, so that it may end before its last pair?

The rule and what is stored of it are in `maps/stability.py`; docs/statistics.md says what each bound is for, and which
error is left.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ..maps.confidence import SHUFFLED_LEVEL
from ..maps.kept_pairs import KeptPairs, SomePairs
from ..maps.significance import DRAWS, REPEATS, shuffled_control, split_half, t_quantile
from ..maps.stability import LEAST_PAIRS, Stability, UntilStable

GROUPS = LEAST_PAIRS // 2  # of the jackknife
_SWAPS = 20  # maps of swapped sides, whose agreement is chance
_BOUND = 0.90  # two-sided; its lower end holds with 95%
_SEED = 0


class StabilityCheck:
    """The counts of each pair of a running recording, and whether it may end."""

    def __init__(self, rule: UntilStable, n_given: int, shape: tuple[int, int]) -> None:
        """`shape` is the model's (n_layer, n_expert)."""
        self._rule, self._n_given, self._shape = rule, n_given, shape
        self.looks = rule.looks(n_given)
        self._alpha = SHUFFLED_LEVEL / max(1, len(self.looks))
        self._kept = KeptPairs()
        self._n_looked = self._in_a_row = 0

    def add(self, a: npt.NDArray[np.unsignedinteger[Any]], n: npt.NDArray[np.int64]) -> None:
        """Add pairs: `a` [pairs, 2, n_layer, n_expert], `n` [pairs, 2]."""
        self._kept.add(a, n)

    def stopped(self) -> Stability | None:
        """Make the checks that are due since the last call; how the run ended, if one of them ends it.

        What a check says depends on the pairs before it only, so that a resumed run repeats them.
        """
        while self._n_looked < len(self.looks) and self.looks[self._n_looked] <= len(self._kept):
            n_pairs = self.looks[self._n_looked]
            self._n_looked += 1
            if self._reached(n_pairs):
                self._in_a_row += 1
            else:
                self._in_a_row = 0
            if self._in_a_row >= self._rule.checks:
                found = self._judged(n_pairs, stopped=True)
                if found.stable:
                    return found
        return None

    def ended(self) -> Stability:
        """How a run ended that no check ended."""
        n_pairs = len(self._kept)
        if n_pairs < self._rule.min_pairs:
            first = self._first(self._kept.some(np.arange(n_pairs)))
            return Stability(self._rule, self._n_given, n_pairs, len(self.looks), False, first)
        return self._judged(n_pairs, stopped=False)

    def _first(self, kept: SomePairs) -> int:
        """How many experts are compared: more than a quarter would mostly agree by chance."""
        return max(1, min(self._rule.first, len(kept.moe_layers) * self._shape[1] // 4))

    def _reached(self, n_pairs: int) -> bool:
        agreement, _, error = self._agreement(self._kept.some(np.arange(n_pairs)), self._rule.level)
        return agreement - t_quantile(_BOUND, GROUPS - 1) * error >= self._rule.level

    def _judged(self, n_pairs: int, *, stopped: bool) -> Stability:
        kept = self._kept.some(np.arange(n_pairs))
        first = self._first(kept)
        agreement, chance, error = self._agreement(kept)
        # the smallest p, doubled, must be able to reach alpha
        draws = max(DRAWS, round(2 / self._alpha) - 1)
        controls = shuffled_control(kept, first, draws, _SEED)
        return Stability(
            rule=self._rule,
            n_given=self._n_given,
            n_pairs=n_pairs,
            n_checks=len(self.looks),
            stopped=stopped,
            first=first,
            agreement=agreement,
            chance=chance,
            error=error,
            lower=agreement - t_quantile(_BOUND, GROUPS - 1) * error,
            p=min(1.0, 2 * min(control.p for control in controls)),
            alpha=self._alpha,
        )

    def _agreement(self, kept: SomePairs, needed: float = 0.0) -> tuple[float, float, float]:
        """(agreement, chance, standard error); the error of an agreement below `needed` is not computed.

        The error is that of the pairs, by the jackknife over groups of them: halvings of the same pairs say nothing
        about other pairs.
        """
        first, n = self._first(kept), len(kept.n)
        rng = np.random.default_rng(_SEED)
        swapped = (replace(kept, swapped=rng.integers(0, 2, n).astype(np.bool_)) for _ in range(_SWAPS))
        chance = float(np.mean([split_half(pairs, first, REPEATS // _SWAPS, _SEED).overlap for pairs in swapped]))
        scale = max(1 - chance, 1e-9)
        agreement = (split_half(kept, first, REPEATS, _SEED).overlap - chance) / scale
        if agreement < needed:
            return agreement, chance, 0.0
        parts = []
        for group in range(GROUPS):
            without = np.flatnonzero(np.arange(n) % GROUPS != group)
            parts.append(split_half(replace(kept, at=without, swapped=None), first, REPEATS, _SEED).overlap / scale)
        error = np.sqrt((GROUPS - 1) / GROUPS * np.square(np.asarray(parts) - np.mean(parts)).sum())
        return agreement, chance, float(error)
