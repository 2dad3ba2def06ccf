"""Controls: choices of experts that should have no effect, to compare a real choice with.

All functions compute on tables [n_layer, n_expert]. A drawn choice is a relabelling of a real one: each of its experts
passes its value to another expert. So a choice and its reverse are moved together, and numbers, signs and strengths
stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ChoiceError
from ..identity import ModelIdentity

NEAREST = 4
"""A matched draw takes one of this many experts of nearest frequency."""
TOLERANCE = 0.05
"""Largest difference in frequency of a replacement from the same layer; beyond it, other layers are searched too."""

Expert = tuple[int, int]
Signs = npt.NDArray[np.int8]
Table = npt.NDArray[Any]

_TRIES = 1000


def random_signs(
    signs: npt.NDArray[np.int8],
    identity: ModelIdentity,
    moe_layers: tuple[int, ...],
    rng: np.random.Generator,
) -> npt.NDArray[np.int8]:
    """As many +1 and -1 as in `signs` [n_layer, n_expert], on experts drawn evenly from all MoE layers.

    A draw that the model cannot apply in both directions is repeated. Raises ChoiceError after 1000 such draws.
    """
    n_plus, n_minus = int((signs > 0).sum()), int((signs < 0).sum())
    candidates = [(layer, expert) for layer in moe_layers for expert in range(identity.n_expert)]
    for _ in range(_TRIES):
        chosen = rng.permutation(len(candidates))[: n_plus + n_minus]
        drawn = np.zeros(identity.shape, dtype=np.int8)
        for n, index in enumerate(chosen):
            drawn[candidates[index]] = 1 if n < n_plus else -1
        # The reverse of a draw is used too, so both counts must be possible as +1 and as -1.
        largest = max((drawn > 0).sum(axis=1).max(), (drawn < 0).sum(axis=1).max())
        if largest <= min(identity.max_active, identity.max_inactive):
            return drawn
    raise ChoiceError(
        f"{n_plus} + {n_minus} random experts do not fit a model with top-{identity.n_expert_used}; choose fewer"
    )


@dataclass(frozen=True)
class Relabelling:
    """For each chosen expert its replacement, both as (layer, expert); no replacement is used twice."""

    to: Mapping[Expert, Expert]

    def apply(self, table: Table) -> Table:
        """The table [n_layer, n_expert] with each value at its new expert, 0 elsewhere."""
        moved = np.zeros_like(table)
        for old, new in self.to.items():
            moved[new] = table[old]
        return moved

    def frequency_gap(self, frequency: npt.NDArray[np.float64]) -> float:
        """Mean difference in activation frequency [n_layer, n_expert] between an expert and its replacement."""
        return float(np.mean([abs(frequency[old] - frequency[new]) for old, new in self.to.items()]))


def activation_frequency(a1: Table, n1: int, a2: Table, n2: int) -> npt.NDArray[np.float64]:
    """Share of all target tokens, of both sides, that activated each expert: (a1 + a2) / (n1 + n2)."""
    total: npt.NDArray[np.float64] = np.asarray(a1, dtype=np.float64) + np.asarray(a2, dtype=np.float64)
    return total / (n1 + n2)


def draw_experts(
    tables: Sequence[Table],
    identity: ModelIdentity,
    layers: Sequence[int],
    rng: np.random.Generator,
    *,
    frequency: npt.NDArray[np.float64] | None = None,
) -> Relabelling:
    """Draw replacements from `layers` for the experts with a value in any of `tables` [n_layer, n_expert].

    `tables` are a choice and, if it is measured too, its reverse. A relabelled table has no more positive or negative
    values in a layer than a hard bias can have (or than the table itself has, as a soft bias may), and is neither one
    of `tables` nor the negation of one.

    Without `frequency`, experts are drawn evenly, one after the other, from the layers that have room. With the
    activation frequencies [n_layer, n_expert], an expert is replaced by one that was neither chosen nor drawn yet: of
    those in its own layer whose frequency differs by `TOLERANCE` at most, one of the `NEAREST` nearest; if its layer
    has none, one of the `NEAREST` nearest in all layers.

    Raises ChoiceError when no such draw exists, or 1000 in a row failed.
    """
    cells = np.argwhere(np.any([table != 0 for table in tables], axis=0)).tolist()
    chosen: list[Expert] = [(layer, expert) for layer, expert in cells]
    if not chosen:
        raise ChoiceError("no experts are chosen, so there is nothing to draw others for")
    known = {array.tobytes() for table in tables for array in (table + 0.0, 0.0 - table)}
    for _ in range(_TRIES):
        room = _Room(tables, identity)
        found = _draw(chosen, room, layers, rng, frequency)
        if found is not None and not any((found.apply(table) + 0.0).tobytes() in known for table in tables):
            return found
        if found is None and frequency is not None and len(chosen) >= len(layers) * identity.n_expert:
            break
    kind = "random experts" if frequency is None else "experts that were not chosen"
    raise ChoiceError(
        f"{len(chosen)} other {kind} do not fit into {len(layers)} layers of {identity.n_expert} with "
        f"top-{identity.n_expert_used}; choose fewer experts or more layers"
    )


def bottom_signs(
    rd: npt.NDArray[np.float64], n_plus: int, n_minus: int, identity: ModelIdentity, layers: Sequence[int]
) -> Signs:
    """Signs of the experts of `layers` with the smallest |RD|: `n_plus` with RD > 0 get +1, `n_minus` with RD < 0 -1.

    Ties by layer and expert. An expert whose RD is exactly 0 has no side and is left out. Experts beyond what a layer
    of a hard bias can have of a sign are skipped. Raises ChoiceError when there are not enough.
    """
    signs = np.zeros(rd.shape, dtype=np.int8)
    for sign, wanted, most in ((1, n_plus, identity.max_active), (-1, n_minus, identity.max_inactive)):
        cells = [(layer, e) for layer in sorted(layers) for e in np.flatnonzero(np.sign(rd[layer]) == sign).tolist()]
        taken = 0
        for layer, expert in sorted(cells, key=lambda cell: abs(rd[cell])):
            if taken < wanted and (signs[layer] == sign).sum() < most:
                signs[layer, expert] = sign
                taken += 1
        if taken < wanted:
            raise ChoiceError(f"only {taken} experts with RD {'>' if sign > 0 else '<'} 0, but {wanted} are wanted")
    return signs


class _Room:
    """How many more positive and negative values each layer can take, for each of the tables."""

    def __init__(self, tables: Sequence[Table], identity: ModelIdentity) -> None:
        self.n_expert = identity.n_expert
        self.tables = tables
        self.left: list[dict[int, npt.NDArray[np.int64]]] = []
        for table in tables:
            sides = {}
            for sign, most in ((1, identity.max_active), (-1, identity.max_inactive)):
                has = (np.sign(table) == sign).sum(axis=1)
                sides[sign] = np.full(len(table), max(most, int(has.max())), dtype=np.int64)
            self.left.append(sides)

    def fits(self, expert: Expert, layer: int) -> bool:
        """Whether the values of `expert` can move to an expert of `layer`."""
        return all(left[sign][layer] > 0 for left, sign in self._signs(expert))

    def take(self, expert: Expert, layer: int) -> None:
        """Reserve room for the values of `expert` in `layer`."""
        for left, sign in self._signs(expert):
            left[sign][layer] -= 1

    def _signs(self, expert: Expert) -> Iterator[tuple[dict[int, npt.NDArray[np.int64]], int]]:
        for table, left in zip(self.tables, self.left, strict=True):
            if table[expert]:
                yield left, int(np.sign(table[expert]))


def _draw(
    chosen: Sequence[Expert],
    room: _Room,
    layers: Sequence[int],
    rng: np.random.Generator,
    frequency: npt.NDArray[np.float64] | None,
) -> Relabelling | None:
    """One attempt; None when an expert finds no replacement."""
    pool: list[Expert] = [(layer, expert) for layer in layers for expert in range(room.n_expert)]
    if frequency is not None:
        own = set(chosen)
        pool = [expert for expert in pool if expert not in own]
    free = [pool[i] for i in rng.permutation(len(pool))]
    to: dict[Expert, Expert] = {}
    for index in rng.permutation(len(chosen)).tolist():
        old = chosen[index]
        if frequency is None:
            new = next((expert for expert in free if room.fits(old, expert[0])), None)
        else:
            new = _nearest(old, [expert for expert in free if room.fits(old, expert[0])], frequency, rng)
        if new is None:
            return None
        free.remove(new)
        room.take(old, new[0])
        to[old] = new
    return Relabelling(to)


def _nearest(
    old: Expert, free: Sequence[Expert], frequency: npt.NDArray[np.float64], rng: np.random.Generator
) -> Expert | None:
    def gap(expert: Expert) -> float:
        return float(abs(frequency[expert] - frequency[old]))

    candidates = [expert for expert in free if expert[0] == old[0] and gap(expert) <= TOLERANCE] or free
    # `free` is in random order, so ties are broken at random
    near = sorted(candidates, key=gap)[:NEAREST]
    return near[int(rng.integers(len(near)))] if near else None
