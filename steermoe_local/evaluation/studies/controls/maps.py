"""Control maps: detection on pairs whose sides mean nothing, or differ in form alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ....detection.recorder import record_counts
from ....errors import PairsError, UsageError
from ....identity import ModelIdentity
from ....llama.steered_llama import SteeredLlama
from ....maps.expert_map import ExpertMap
from ....maps.scores import risk_difference_from
from ....pairs.builders import Tally
from ....pairs.control_pairs import SURFACES, superficial_pairs
from ....pairs.pairs import Pair

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class HalvedMaps:
    """Maps of the same pairs, combined in other ways, by labels such as "shuffle 1".

    `real`: as they are. `shuffled`: the sides of a random half of the pairs are swapped, so that the sides mean
    nothing; the pairs still show both behaviours. `same_side`: one half of the pairs against the other, of one side
    alone (the positive and the negative in turn), so that the behaviour is the same on both sides.
    """

    real: ExpertMap
    shuffled: Mapping[str, ExpertMap]
    same_side: Mapping[str, ExpertMap]


def halved_maps(
    model: SteeredLlama,
    pairs: Sequence[Pair],
    n: int,
    *,
    seed: int = 0,
    recording: Mapping[str, Any] | None = None,
) -> HalvedMaps:
    """Maps of `n` random halves of the pairs (rounded down). The pairs are run through the model once.

    `recording` are further arguments of `record_counts`; pairs that cannot be counted are left out. Raises UsageError
    for fewer than two pairs, PairsError when none could be counted.
    """
    if len(pairs) < 2:
        raise UsageError("half of the pairs are shuffled, so it takes two pairs at least; give more")
    halves = np.zeros((n, len(pairs)), dtype=bool)
    for draw in range(n):
        rng = np.random.default_rng([seed, draw])
        halves[draw, rng.permutation(len(pairs))[: len(pairs) // 2]] = True
    sums = _record(model, pairs, halves, recording)
    shuffled, same_side = {}, {}
    for draw in range(n):
        half, half_n = sums.parts[draw], sums.parts_n[draw]
        rest, rest_n = sums.total - half, sums.total_n - half_n
        if not (half_n.all() and rest_n.all()):
            continue  # all pairs of a half were left out
        swapped = (rest[0] + half[1], rest[1] + half[0])
        shuffled[f"shuffle {draw + 1}"] = sums.map("shuffled", swapped, rest_n + half_n[::-1])
        side, name = draw % 2, ("positive", "negative")[draw % 2]
        alone = sums.map(f"same {name} side", (half[side], rest[side]), (half_n[side], rest_n[side]))
        same_side[f"{name} side, halves {draw + 1}"] = alone
    return HalvedMaps(sums.map("pairs", sums.total, sums.total_n), shuffled, same_side)


def superficial_maps(
    model: SteeredLlama, pairs: Sequence[Pair], *, recording: Mapping[str, Any] | None = None
) -> dict[str, ExpertMap]:
    """Maps of pairs that differ in nothing but form, by kind of `control_pairs.SURFACES`, and one of "all kinds".

    Each pair becomes one superficial pair, the kinds in turn, so a kind's map is made of a part of them. Kinds for
    which no pair was left have no map. Raises PairsError when there are none at all.
    """
    made = list(superficial_pairs(pairs, Tally()))
    if not made:
        raise PairsError("no superficial pairs could be made of these pairs")
    kinds = list(SURFACES)
    groups = np.array([[pair.id.endswith(f"~{kind}") for pair in made] for kind in kinds])
    sums = _record(model, made, groups, recording)
    maps = {
        kind: sums.map(kind, a, n, int(n_pairs))
        for kind, a, n, n_pairs in zip(kinds, sums.parts, sums.parts_n, sums.parts_pairs, strict=True)
        if n.all()
    }
    if len(maps) > 1:
        maps["all kinds"] = sums.map("superficial", sums.total, sums.total_n)
    return maps


class _Sums:
    """A sink for per-pair counts that keeps only sums, so that memory does not grow with the pairs.

    `groups` [n, n_pairs] marks pairs. `parts` are the sums of each group's pairs, int64 [n, 2, n_layer, n_expert]
    (positive side, negative side), `parts_n` their tokens [n, 2]; `total` and `total_n` are those of all pairs.
    """

    def __init__(self, identity: ModelIdentity, ids: Sequence[str], groups: npt.NDArray[np.bool_]) -> None:
        n = len(groups)
        self.identity, self.groups = identity, groups
        self.index_of = {name: index for index, name in enumerate(ids)}
        self.n_pairs = 0
        self.total, self.total_n = np.zeros((2, *identity.shape), np.int64), np.zeros(2, np.int64)
        self.parts, self.parts_n = np.zeros((n, 2, *identity.shape), np.int64), np.zeros((n, 2), np.int64)
        self.parts_pairs = np.zeros(n, np.int64)

    def append(self, pair_ids: Sequence[str], a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Add some pairs: `a` [pairs, 2, n_layer, n_expert], `n` [pairs, 2]."""
        counts, tokens = np.asarray(a).astype(np.int64), np.asarray(n).astype(np.int64)
        marks = self.groups[:, [self.index_of[name] for name in pair_ids]].astype(np.int64)
        self.n_pairs += len(counts)
        self.total += counts.sum(axis=0)
        self.total_n += tokens.sum(axis=0)
        self.parts += np.tensordot(marks, counts, axes=1)
        self.parts_n += marks @ tokens
        self.parts_pairs += marks.sum(axis=1)

    def map(self, behaviour: str, a: Sequence[Int64] | Int64, n: Any, n_pairs: int | None = None) -> ExpertMap:
        """A map of counts `a` and tokens `n`, both (positive, negative)."""
        n1, n2 = int(n[0]), int(n[1])
        return ExpertMap(
            identity=self.identity,
            behaviour=behaviour,
            rd=risk_difference_from(a[0], n1, a[1], n2),
            n1=n1,
            n2=n2,
            n_pairs=self.n_pairs if n_pairs is None else n_pairs,
            a1=np.array(a[0]),
            a2=np.array(a[1]),
        )


def _record(
    model: SteeredLlama,
    pairs: Sequence[Pair],
    groups: npt.NDArray[np.bool_],
    recording: Mapping[str, Any] | None,
) -> _Sums:
    made: list[_Sums] = []

    def sink(identity: ModelIdentity, _digest: str) -> _Sums:
        made.append(_Sums(identity, [pair.id for pair in pairs], groups))
        return made[0]

    record_counts(model, pairs, **{"on_skip": lambda *_: None, **(recording or {}), "per_pair": sink})
    return made[0]
