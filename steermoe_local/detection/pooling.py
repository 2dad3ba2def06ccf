"""Puts what was counted of a group of prompts together: by sides, by parts of the targets, and by pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..maps.routing_sums import RoutingSums
from .batches import Owners
from .checkpoint import PairRecords, Tables
from .grouping import Group

Int64 = npt.NDArray[np.int64]


def times_counted(group: Group, owners: Owners, phase: int | None) -> Int64:
    """How often each bin counts for each side, int64 [2, bins]: of one phase of the targets, or of all tokens."""
    n_parts = group.members.shape[1] // len(owners)
    members = group.members.reshape(len(group.members), len(owners), n_parts)
    # a prompt has a row in one part only
    chosen = np.asarray(members.any(axis=2)) if phase is None else members[:, :, phase]
    sides = np.array([side for _, side in owners])
    return np.stack([chosen[:, sides == side].sum(axis=1, dtype=np.int64) for side in (0, 1)])


def pooled_sums(sums: Sequence[npt.NDArray[np.float64]], times: Int64) -> RoutingSums:
    """The sums of a group's sides. The bins are added in their order, so that the same group has the same bits."""
    totals = []
    for table in sums:
        total = np.zeros((2, *table.shape[1:]))
        for side, number in np.argwhere(times):
            with np.errstate(invalid="ignore"):  # infinities of a router that overflowed
                total[side] += times[side, number] * table[number]
        totals.append(total)
    return RoutingSums(*totals)


def add_counts(tables: Tables, counts: Int64, tokens: Int64, times: Int64) -> None:
    """Add a group's counts to its sides."""
    tables.a += np.tensordot(times, counts, axes=1)
    tables.n += times @ tokens


def split_pairs(records: PairRecords, counts: Int64, tokens: Int64, group: Group, owners: Owners) -> None:
    """Add a group's counts to the records of their pairs."""
    n_parts = group.members.shape[1] // len(owners)
    for column in range(group.members.shape[1]):
        item, side = owners[column // n_parts]
        at = (item, side) if records.n.ndim == 2 else (item, side, column % n_parts)
        mine = group.members[:, column]
        records.a[at] = counts[mine].sum(axis=0)
        records.n[at] = tokens[mine].sum(axis=0).max()
