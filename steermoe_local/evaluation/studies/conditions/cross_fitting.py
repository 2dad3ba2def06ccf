"""Scores of pairs by maps that have not seen them: of the pairs of other folds, or fixed in advance.

The lean of a span is that of `RoutingLean`. Folds hold whole clusters: pairs that share a text are in one fold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ....errors import UsageError
from ....maps.kept_pairs import KeptPairs
from ....maps.routing_lean import RoutingLean
from ...metrics.separation import Numbers, Scores, auc

_DIGITS = 10  # of a score; what is behind them is rounding, which would break ties
_BLOCK = 1 << 22  # scores of experts in memory at a time, over draws and folds


def clusters_of(contents: Sequence[tuple[bytes, bytes]]) -> Numbers:
    """A number for each pair, the same for pairs that share the content of a side, directly or through others."""
    parent = list(range(len(contents)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first: dict[bytes, int] = {}
    for pair, sides in enumerate(contents):
        for side in sides:
            one, two = root(first.setdefault(side, pair)), root(pair)
            parent[max(one, two)] = min(one, two)
    return np.array([root(i) for i in range(len(contents))], dtype=np.int64)


def folds_of(clusters: Numbers, n_folds: int, seed: int) -> Numbers:
    """The fold of each pair: clusters in a random order, the large ones first, each to the fold with fewest pairs.

    Raises UsageError for fewer clusters than twice the folds.
    """
    numbers, sizes = np.unique(clusters, return_counts=True)
    if len(numbers) < 2 * n_folds:
        raise UsageError(
            f"{len(numbers)} pairs that share no text do not make {n_folds} folds of two at least; "
            "give more pairs, or fewer folds"
        )
    order = np.random.default_rng(seed).permutation(len(numbers))
    filled = np.zeros(n_folds, dtype=np.int64)
    fold: dict[int, int] = {}
    for i in order[np.argsort(-sizes[order], kind="stable")].tolist():
        fold[int(numbers[i])] = at = int(np.argmin(filled))
        filled[at] += sizes[i]
    return np.array([fold[cluster] for cluster in clusters.tolist()], dtype=np.int64)


class PairScores(ABC):
    """Scores of pairs, float64 [n_pairs, 2] (positive, negative), in folds.

    `strata` says which scores may be compared with each other, and `depend` whether pairs have made the maps by which
    others are scored. Raises UsageError as `folds_of`.
    """

    strata: Numbers
    depend: bool

    def __init__(self, pairs: KeptPairs, clusters: Numbers, n_folds: int, seed: int) -> None:
        self.clusters, self.folds, self.n_folds = clusters, folds_of(clusters, n_folds, seed), n_folds
        self._pairs = pairs
        self._of_fold = [pairs.some(np.flatnonzero(self.folds == fold)) for fold in range(n_folds)]

    @abstractmethod
    def held_out(self) -> Scores:
        """The scores of every pair, by a map that has not seen it."""

    @abstractmethod
    def training(self, fold: int) -> Scores:
        """The scores of the pairs of the other folds, in their order, of which the threshold of a fold is made."""

    @abstractmethod
    def swapped_aucs(self, swaps: npt.NDArray[np.bool_]) -> Scores:
        """The AUC of each draw of `swaps` [draws, n_pairs], in which the sides of some pairs are exchanged."""

    def _scored(self, fold: int, scores: npt.NDArray[np.float64]) -> Scores:
        """The leans of a fold's pairs by some maps: `scores` [maps, n_layer, n_expert] make [maps, pairs, 2]."""
        pairs = self._of_fold[fold]
        tables = scores.reshape(len(scores), -1)
        found = np.empty((len(scores), len(pairs.at), 2))
        for part, a in pairs.chunks():
            shares = a.reshape(len(a), 2, -1) / pairs.n[part][:, :, None]
            found[:, part] = np.moveaxis(shares @ tables.T, 2, 0)
        return np.round(found, _DIGITS)

    def _joined(self, parts: Iterator[Scores]) -> Scores:
        """Scores [pairs of the fold, 2] of each fold, in the order of the pairs."""
        found = np.empty((len(self.folds), 2))
        for pairs, part in zip(self._of_fold, parts, strict=True):
            found[pairs.at] = part
        return found


class FixedScores(PairScores):
    """Scores by a map of other pairs. All of them can be compared."""

    depend = False

    def __init__(self, pairs: KeptPairs, clusters: Numbers, n_folds: int, seed: int, lean: RoutingLean) -> None:
        super().__init__(pairs, clusters, n_folds, seed)
        self.strata = np.zeros(len(pairs), dtype=np.int64)
        tables = lean.scores[None]
        self._scores = self._joined(self._scored(fold, tables)[0] for fold in range(n_folds))

    def held_out(self) -> Scores:
        return self._scores

    def training(self, fold: int) -> Scores:
        return np.asarray(self._scores[self.folds != fold])

    def swapped_aucs(self, swaps: npt.NDArray[np.bool_]) -> Scores:
        return np.array([auc(*_exchanged(self._scores, swap).T) for swap in swaps])


class CrossFittedScores(PairScores):
    """Scores by the risk differences of the pairs of the other folds. Those of one fold can be compared.

    A threshold for a fold is made of scores of the other folds, each by the map of all folds but these two.
    """

    depend = True

    def __init__(self, pairs: KeptPairs, clusters: Numbers, n_folds: int, seed: int) -> None:
        super().__init__(pairs, clusters, n_folds, seed)
        self.strata = self.folds
        self._a = np.stack([self._sum_of(fold) for fold in range(n_folds)])  # [folds, 2, n_layer, n_expert]
        self._n = np.stack([part.n.sum(axis=0) for part in self._of_fold]).astype(np.float64)  # [folds, 2]

    def _sum_of(self, fold: int) -> npt.NDArray[np.float64]:
        total: npt.NDArray[np.float64] = sum(a.sum(axis=0, dtype=np.float64) for _, a in self._of_fold[fold].chunks())
        return total

    def held_out(self) -> Scores:
        return self._joined(self._scored(fold, self._without(fold))[0] for fold in range(self.n_folds))

    def training(self, fold: int) -> Scores:
        def parts() -> Iterator[Scores]:
            for other, pairs in enumerate(self._of_fold):
                both = self._without(fold, other)
                yield np.zeros((len(pairs.at), 2)) if other == fold else self._scored(other, both)[0]

        return np.asarray(self._joined(parts())[self.folds != fold])

    def _without(self, *left_out: int) -> npt.NDArray[np.float64]:
        """The scores [1, n_layer, n_expert] of the map of the pairs of all other folds."""
        others = [fold for fold in range(self.n_folds) if fold not in left_out]
        return _leans(self._a[others].sum(axis=0)[None], self._n[others].sum(axis=0)[None])

    def swapped_aucs(self, swaps: npt.NDArray[np.bool_]) -> Scores:
        size = max(1, _BLOCK // self._a[:, 0].size)
        return np.concatenate([self._of_block(swaps[at : at + size]) for at in range(0, len(swaps), size)])

    def _of_block(self, swaps: npt.NDArray[np.bool_]) -> Scores:
        """The maps are made again from the exchanged sides."""
        moved = np.zeros((self.n_folds, len(swaps), *self._a.shape[2:]))  # from the negative to the positive side
        moved_n = np.zeros((self.n_folds, len(swaps)))
        for fold, pairs in enumerate(self._of_fold):
            chosen = swaps[:, pairs.at].astype(np.float64)
            for part, a in pairs.chunks():
                change = a[:, 1].astype(np.float64) - a[:, 0]
                moved[fold] += np.tensordot(chosen[:, part], change, axes=1)
            moved_n[fold] = chosen @ (pairs.n[:, 1] - pairs.n[:, 0])
        a_all, n_all = self._a.sum(axis=0), self._n.sum(axis=0)
        moved_all, moved_n_all = moved.sum(axis=0), moved_n.sum(axis=0)
        found = np.zeros(len(swaps))
        for fold, pairs in enumerate(self._of_fold):
            sums = np.repeat((a_all - self._a[fold])[None], len(swaps), axis=0)
            tokens = np.repeat((n_all - self._n[fold])[None], len(swaps), axis=0)
            for side, sign in ((0, 1), (1, -1)):
                sums[:, side] += sign * (moved_all - moved[fold])
                tokens[:, side] += sign * (moved_n_all - moved_n[fold])
            scores = self._scored(fold, _leans(sums, tokens))
            for draw, swap in enumerate(swaps[:, pairs.at]):
                found[draw] += len(pairs.at) * auc(*_exchanged(scores[draw], swap).T)
        return found / len(self.folds)


def _leans(a: npt.NDArray[np.float64], n: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What `RoutingLean` weighs experts by, of the risk differences of `a` [maps, 2, n_layer, n_expert], `n` [maps, 2].

    Returns [maps, n_layer, n_expert].
    """
    rates = a / n[:, :, None, None]
    return np.stack([RoutingLean(rd).scores for rd in rates[:, 0] - rates[:, 1]])


def _exchanged(scores: Scores, swap: npt.NDArray[np.bool_]) -> Scores:
    return np.where(swap[:, None], scores[:, ::-1], scores)
