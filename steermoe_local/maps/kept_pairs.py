"""Routing counts of pairs in memory, of which the statistics take some, or some with their sides exchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.unsignedinteger[Any]]

_CHUNK = 64  # pairs


class KeptPairs:
    """The counts of pairs as they come, each in the smallest type that holds it."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self._a: list[Counts] = []
        self._n: list[npt.NDArray[np.int64]] = []

    def __len__(self) -> int:
        return len(self._a)

    def append(self, pair_ids: Sequence[str], a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Add pairs and their ids, as `add`: what `record_counts` gives to a sink."""
        self.ids += pair_ids
        self.add(a, n)

    def add(self, a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Add pairs: `a` whole numbers [pairs, 2, n_layer, n_expert], `n` [pairs, 2] tokens; positive, negative."""
        self._a += [counts.astype(np.min_scalar_type(int(counts.max(initial=0)))) for counts in np.asarray(a)]
        self._n += list(np.asarray(n).astype(np.int64))

    def some(self, at: npt.NDArray[np.int64], swapped: npt.NDArray[np.bool_] | None = None) -> SomePairs:
        """The pairs `at` some places; `swapped` [len(at)] of them have their sides exchanged."""
        return SomePairs(self._a, self._n, at, swapped)


@dataclass(frozen=True, eq=False)
class SomePairs:
    """Some of the pairs that are kept, as `significance.Pairs`."""

    _a: list[Counts]
    _n: list[npt.NDArray[np.int64]]
    at: npt.NDArray[np.int64]
    swapped: npt.NDArray[np.bool_] | None = None

    @property
    def n(self) -> npt.NDArray[np.int64]:
        """Tokens, int64 [pairs, 2]."""
        tokens: npt.NDArray[np.int64] = self._turned(np.stack([self._n[i] for i in self.at]), slice(None))
        return tokens

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers that routed a token."""
        routed = np.any([self._a[i].any(axis=(0, 2)) for i in self.at], axis=0)
        return tuple(np.flatnonzero(routed).tolist())

    def chunks(self) -> Iterator[tuple[slice, Counts]]:
        """Yield (pairs, activations [pairs, 2, n_layer, n_expert]) in order."""
        for start in range(0, len(self.at), _CHUNK):
            part = slice(start, min(start + _CHUNK, len(self.at)))
            yield part, self._turned(np.stack([self._a[i] for i in self.at[part]]), part)

    def _turned(self, values: Any, part: slice) -> Any:
        if self.swapped is not None:
            exchanged = self.swapped[part]
            values[exchanged] = values[exchanged][:, ::-1]
        return values
