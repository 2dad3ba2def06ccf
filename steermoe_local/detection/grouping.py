"""Groups prompts for one decode; tokens of common beginnings are computed once.

A group is a tree of tokens. A row is one token at one position. It belongs to every prompt that begins with the tokens
on the path to it: attention is causal, so later tokens do not change what a token computes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..llama.rendering import Prompt
from ..llama.tokenizing import common_prefix

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Group:
    """Rows in decoding order: each token comes after all tokens that it attends to.

    Attributes:
        n_prompts: sequences 0 to n_prompts - 1.
        n_kept: tokens at the beginning of every prompt that are in memory already and have no row.
        tokens, positions: int32 [rows].
        sequences: int32, the prompts of row 0, of row 1, ..., ascending in each; `ends` int64 [rows]: where each ends.
        bins: int32 [rows], which counter takes the row; -1 for none.
        members: bool [bins, prompts * parts]: for which prompts a counter counts, and as which part of their targets:
            column prompt * parts + part. More than one where targets share tokens.
    """

    n_prompts: int
    n_kept: int
    tokens: Int32
    positions: Int32
    sequences: Int32
    ends: npt.NDArray[np.int64]
    bins: Int32
    members: npt.NDArray[np.bool_]


class GroupBuilder:
    """Collects prompts, a pair at a time, as long as they fit into one decode."""

    def __init__(
        self,
        *,
        n_rows: int,
        n_prompts: int,
        n_bins: int,
        kept: Sequence[int] = (),
        share: bool = True,
        n_parts: int = 1,
    ) -> None:
        """At most `n_rows` tokens to decode. `kept`: tokens that memory holds already. Targets have `n_parts` parts."""
        self._limits = (n_rows, n_prompts, n_bins)
        self._n_parts = n_parts
        self._kept = kept
        self._share = share
        self.clear()

    def clear(self) -> None:
        """Begin a new group."""
        self._n_kept = len(self._kept)
        self._tokens: list[int] = []
        self._positions: list[int] = []
        self._children: dict[tuple[int, int], int] = {}  # (row before, token): row
        self._paths: list[list[int]] = []  # rows of each prompt
        self._counted: dict[int, int] = {}  # row: bits of the prompts, and of their parts, that count it
        self._bins: Counter[int] = Counter()  # such bits: rows

    def __len__(self) -> int:
        """Prompts in the group."""
        return len(self._paths)

    @property
    def n_rows(self) -> int:
        """Tokens to decode."""
        return len(self._tokens) - self._n_kept

    def add(self, prompts: Sequence[Prompt], parts: Sequence[Sequence[int]] | None = None) -> bool:
        """Add prompts if there is room. An empty group takes any number of tokens, to be decoded in pieces.

        `parts` are those of each target's tokens; None: all are of part 0.
        """
        was_empty = not self._paths
        state = self._n_kept, len(self._tokens), len(self._paths), self._counted.copy(), self._bins.copy()
        for index, prompt in enumerate(prompts):
            self._add(prompt, None if parts is None else parts[index])
        n_rows, n_prompts, n_bins = self._limits
        if was_empty or (self.n_rows <= n_rows and len(self) <= n_prompts and len(self._bins) <= n_bins):
            return True
        self._n_kept, first_row, first_prompt, self._counted, self._bins = state
        self._children = {key: row for key, row in self._children.items() if row < first_row}
        del self._tokens[first_row:], self._positions[first_row:], self._paths[first_prompt:]
        return False

    def _add(self, prompt: Prompt, parts: Sequence[int] | None) -> None:
        tokens, positions, children = self._tokens, self._positions, self._children
        path: list[int] = []
        row = -1
        if self._share:
            for position, token in enumerate(prompt.tokens):
                key = (row, token)
                found = children.get(key)
                if found is None:
                    found = children[key] = len(tokens)
                    tokens.append(token)
                    positions.append(position)
                row = found
                path.append(row)
        else:
            path.extend(range(len(tokens), len(tokens) + len(prompt.tokens)))
            tokens.extend(prompt.tokens)
            positions.extend(range(len(prompt.tokens)))
        first = self._n_parts * len(self._paths)
        for index, part in zip(prompt.target, parts or [0] * len(prompt.target), strict=True):
            row, bit = path[index], 1 << first + part
            bits = self._counted.get(row, 0)
            if bits:
                self._bins[bits] -= 1
                if not self._bins[bits]:
                    del self._bins[bits]
            self._counted[row] = bits | bit
            self._bins[bits | bit] += 1
        self._paths.append(path)
        # the beginning of all prompts that is in memory; counted tokens must be decoded
        self._n_kept = common_prefix(self._kept[: min(self._n_kept, *prompt.target)], prompt.tokens)

    def build(self) -> Group:
        """The group, its rows without what is kept."""
        kept = self._n_kept
        n_rows = len(self._tokens)
        owner = np.repeat(np.arange(len(self._paths), dtype=np.int32), [len(path) for path in self._paths])
        rows = np.concatenate([np.asarray(path, dtype=np.int64) for path in self._paths])
        # stable: the prompts of a row stay ascending
        order = np.argsort(rows, kind="stable")
        order = order[np.searchsorted(rows[order], kept) :] if kept else order
        number = {bits: index for index, bits in enumerate(self._bins)}
        bins = np.full(n_rows, -1, dtype=np.int32)
        for row, bits in self._counted.items():
            bins[row] = number[bits]
        n_columns = self._n_parts * len(self._paths)
        members = np.array(
            [[bits >> column & 1 for column in range(n_columns)] for bits in number], dtype=np.bool_
        ).reshape(len(number), n_columns)
        return Group(
            n_prompts=len(self._paths),
            n_kept=kept,
            tokens=np.asarray(self._tokens[kept:], dtype=np.int32),
            positions=np.asarray(self._positions[kept:], dtype=np.int32),
            sequences=owner[order],
            ends=np.cumsum(np.bincount(rows, minlength=n_rows)[kept:]),
            bins=bins[kept:],
            members=members,
        )
