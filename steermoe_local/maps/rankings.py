"""Imports the rankings that SteerMoE's authors publish, and that their notebook writes, as expert maps.

A ranking is a pickled pandas frame with a row for each expert. Two layouts exist; both have the columns `layer`,
`expert`, `a1`, `a2` (target tokens that activated the expert, on either side), `d1`, `d2` (those that did not) and
`risk_diff`. Other columns are derived, or not used for the choice of experts. The pickle is never run: see
`pickle_frames`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from .._util.file_kinds import RANKING, require_kind
from .._util.files import StrPath, read_bytes
from ..errors import FormatError, ModelMismatchError
from ..identity import MAX_EXPERTS, MAX_LAYERS, ModelIdentity
from .counts import RoutingCounts
from .expert_map import ExpertMap
from .pickle_frames import Frame, read_frame
from .scores import risk_difference_from

_MAX_BYTES = 64 << 20
_COLUMNS = ("layer", "expert", "a1", "a2", "d1", "d2", "risk_diff")
# activations_[allenai--OLMoE-1B-7B-0125-Instruct]_[faithfulness].pkl
_NAME = re.compile(r"activations_\[([^\[\]]+)\]_\[([^\[\]]+)\]")
_SIDES = {"faithfulness": ("document", "no document"), "safety": ("refusal", "unsafe reply")}


@dataclass(frozen=True, eq=False)
class Rankings:
    """The counts of a published ranking: a1, a2 int64 [n_layer, n_expert], tokens n1 and n2, and top-k."""

    a1: npt.NDArray[np.int64]
    a2: npt.NDArray[np.int64]
    n1: int
    n2: int
    n_expert_used: int

    @property
    def shape(self) -> tuple[int, int]:
        """(n_layer, n_expert)."""
        return (self.a1.shape[0], self.a1.shape[1])

    def to_map(
        self,
        identity: ModelIdentity,
        behaviour: str,
        *,
        where: str,
        positive: str = "",
        negative: str = "",
        license: str = "",
        notes: str = "",
    ) -> ExpertMap:
        """The expert map for a model; `where` (file of the ranking, and model) starts the message.

        The sides of the published behaviours have default names.

        Raises ModelMismatchError when the model has other layers, experts or another top-k.
        """
        ranked = (*self.shape, self.n_expert_used)
        if ranked != (*identity.shape, identity.n_expert_used):
            raise ModelMismatchError(
                f"{where}: ranks {ranked[0]} layers of {ranked[1]} experts, top-{ranked[2]}, but the model is "
                f"{identity.short}; take the ranking of this model"
            )
        known = _SIDES.get(behaviour, ("", ""))
        return ExpertMap.from_counts(
            RoutingCounts(identity, self.a1, self.a2, self.n1, self.n2, moe_layers=tuple(range(identity.n_layer))),
            behaviour,
            positive=positive or known[0],
            negative=negative or known[1],
            license=license,
            notes=notes,
        )


def ranking_name(path: StrPath) -> tuple[str, str]:
    """(model, behaviour) by a published file's name, each "" for another name."""
    found = _NAME.search(PurePath(path).name)
    return (found[1].replace("--", "/"), found[2]) if found else ("", "")


def read_rankings(path: StrPath) -> Rankings:
    """Read a pickled ranking without running it.

    Checks that every expert of every layer is there once, that all rows count the same tokens, that the activations
    of every layer sum to one top-k, and that `risk_diff` is a1 / n1 - a2 / n2.

    Raises FormatError.
    """
    require_kind(path, "a pickled ranking", RANKING)
    frame = read_frame(read_bytes(path, "a pickled ranking", _MAX_BYTES), str(path))
    try:
        return _rankings(frame)
    except FormatError as error:
        raise FormatError(f"{path}: not a ranking of experts: {error}") from None


def _rankings(frame: Frame) -> Rankings:
    columns = {name: _whole(frame, name) for name in _COLUMNS[:-1]}
    layer, expert = columns["layer"], columns["expert"]
    if not frame.n_rows or layer.max() >= MAX_LAYERS or expert.max() >= MAX_EXPERTS:
        raise FormatError("layer, expert: no rows, or numbers beyond any model's")
    shape = (int(layer.max()) + 1, int(expert.max()) + 1)
    cell = layer * shape[1] + expert
    if frame.n_rows != shape[0] * shape[1] or len(np.unique(cell)) != frame.n_rows:
        raise FormatError(
            f"layer, expert: {frame.n_rows} rows are not each of {shape[0]} layers and {shape[1]} experts once"
        )
    tables: list[npt.NDArray[np.int64]] = []
    tokens: list[int] = []
    for side in ("1", "2"):
        a, total = columns["a" + side], columns["a" + side] + columns["d" + side]
        if total[0] == 0 or (total != total[0]).any():
            raise FormatError(f"a{side} + d{side}: not the same number of tokens in every row")
        table = np.zeros(shape, dtype=np.int64)
        table.flat[cell] = a
        tables.append(table)
        tokens.append(int(total[0]))
    k = int(tables[0][0].sum()) // tokens[0]
    for side, table, n in zip("12", tables, tokens, strict=True):
        if k == 0 or (table.sum(axis=1) != n * k).any():
            raise FormatError(f"a{side}: its sum is not the tokens times one top-k in every layer")
    risk = np.zeros(shape)
    risk.flat[cell] = _numbers(frame, "risk_diff")
    again = risk_difference_from(tables[0], tokens[0], tables[1], tokens[1])
    if not np.abs(risk - again).max() <= 1e-9:  # not <=: NaN fails
        raise FormatError("risk_diff: is not a1 / (a1 + d1) - a2 / (a2 + d2)")
    return Rankings(tables[0], tables[1], tokens[0], tokens[1], k)


def _numbers(frame: Frame, name: str) -> npt.NDArray[np.float64]:
    column = frame.columns.get(name)
    if column is None or column.dtype.kind not in "iuf":
        raise FormatError(f"{name}: there is no such column of numbers")
    return np.asarray(column, dtype=np.float64)


def _whole(frame: Frame, name: str) -> npt.NDArray[np.int64]:
    """A column of counts, which the reference writes as float64."""
    numbers = _numbers(frame, name)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all() and (numbers <= 1 << 52).all()):
        raise FormatError(f"{name}: numbers that are no counts")
    whole = numbers.astype(np.int64)
    if (whole != numbers).any():
        raise FormatError(f"{name}: numbers that are no counts")
    return whole
