"""Imports the rankings that SteerMoE's authors publish, and that their notebook writes, as expert maps.

A ranking is a pickled pandas frame with a row for each expert. Two layouts exist; both have the columns `layer`,
`expert`, `a1`, `a2` (target tokens that activated the expert, on either side), `d1`, `d2` (those that did not) and
`risk_diff`. Other columns are derived, or not used for the choice of experts. The pickle is never run: see
`pickle_frames`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

import numpy as np
import numpy.typing as npt

from .._util.file_kinds import RANKING, require_kind
from .._util.files import StrPath, read_bytes
from ..errors import FormatError, ModelMismatchError, UsageError
from ..identity import MAX_EXPERTS, MAX_LAYERS, ModelIdentity
from .counts import RoutingCounts
from .expert_map import ExpertMap, format_layers
from .pickle_frames import Frame, read_frame
from .scores import risk_difference_from

_MAX_BYTES = 64 << 20
# architectures whose first layers may be dense: src/models/*.cpp of llama.cpp that read leading_dense_block_count
LEADING_DENSE = frozenset(
    {
        *("afmoe", "bailingmoe", "bailingmoe2", "bailingmoe3", "cohere2moe", "deepseek", "deepseek2", "deepseek2-ocr"),
        *("deepseek32", "dots1", "dots3note", "ernie4_5-moe", "exaone-moe", "glm-dsa", "glm4moe", "glm5-next", "hy_v4"),
        *("kimi-k3", "kimi-linear", "laguna", "lfm2moe", "minimax-m3"),
    }
)
_COLUMNS = ("layer", "expert", "a1", "a2", "d1", "d2", "risk_diff")
# activations_[allenai--OLMoE-1B-7B-0125-Instruct]_[faithfulness].pkl
_NAME = re.compile(r"activations_\[([^\[\]]+)\]_\[([^\[\]]+)\]")
_SIDES = {"faithfulness": ("document", "no document"), "safety": ("refusal", "unsafe reply")}


@dataclass(frozen=True, eq=False)
class Rankings:
    """The counts of a published ranking: a1, a2 int64 [n_layer, n_expert], tokens n1 and n2, and top-k.

    `layers` are the numbers that it gives its layers with experts, in the order of the rows; () is 0, 1, 2, ...
    """

    a1: npt.NDArray[np.int64]
    a2: npt.NDArray[np.int64]
    n1: int
    n2: int
    n_expert_used: int
    layers: tuple[int, ...] = ()

    @property
    def numbers(self) -> tuple[int, ...]:
        """The numbers of the ranked layers."""
        return self.layers or tuple(range(self.shape[0]))

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
        moe_layers: Sequence[int] | None = None,
        model_layers: Sequence[int] | None = None,
    ) -> ExpertMap:
        """The expert map for a model; `where` (file of the ranking, and model) starts the message.

        `moe_layers` are the model's numbers of the ranked layers, for a ranking that numbers only layers with experts;
        `model_layers` are the model's layers with experts, where they are known. The sides of the published behaviours
        have default names.

        Raises ModelMismatchError when the model has other layers, experts or another top-k, UsageError when
        `moe_layers` are not as many as are ranked, or the ranking numbers them otherwise.
        """
        layers = self.layers_by(moe_layers, where)
        ranked = (self.shape[0], self.shape[1], self.n_expert_used)
        own = tuple(range(identity.n_layer) if model_layers is None else model_layers)
        same = ranked[1:] == (identity.n_expert, identity.n_expert_used)
        if same and moe_layers is None and layers != own and len(layers) == len(own):
            raise ModelMismatchError(
                f"{where}: ranks the layers {format_layers(layers)}, but the layers with experts are "
                f"{format_layers(own)} of the {identity.n_layer} of {identity.short}; if it numbers only those, give "
                f"--moe-layers {format_layers(own)}"
            )
        # without the model's own layers, those that the ranking or the caller names are taken as they are
        named = model_layers is None and (moe_layers is not None or self.layers) and layers[-1] < identity.n_layer
        if not same or not (layers == own or named):
            raise ModelMismatchError(
                f"{where}: ranks {ranked[0]} layers of {ranked[1]} experts, top-{ranked[2]}, but the model is "
                f"{identity.short}{_with_experts(own, identity.n_layer)}; take the ranking of this model"
            )
        tables = [np.zeros(identity.shape, dtype=np.int64) for _ in "12"]
        for table, counts in zip(tables, (self.a1, self.a2), strict=True):
            table[list(layers)] = counts
        known = _SIDES.get(behaviour, ("", ""))
        return ExpertMap.from_counts(
            RoutingCounts(identity, tables[0], tables[1], self.n1, self.n2, moe_layers=layers),
            behaviour,
            positive=positive or known[0],
            negative=negative or known[1],
            license=license,
            notes=notes,
        )

    def layers_by(self, moe_layers: Sequence[int] | None, where: str) -> tuple[int, ...]:
        """The model's numbers of the ranked layers. Raises UsageError for `moe_layers` that they cannot have."""
        if moe_layers is None:
            return self.numbers
        layers = tuple(moe_layers)
        if len(layers) != self.shape[0]:
            raise UsageError(
                f"--moe-layers {format_layers(layers)}: {len(layers)} layers, but {where} ranks {self.shape[0]}"
            )
        if self.layers and layers != self.layers:
            raise UsageError(
                f"--moe-layers {format_layers(layers)}: {where} says itself that its layers are "
                f"{format_layers(self.layers)}; leave the option out"
            )
        return layers


def _with_experts(layers: Sequence[int], n_layer: int) -> str:
    return "" if len(layers) == n_layer else f" with experts in {format_layers(layers)}"


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
    numbers, row = np.unique(layer, return_inverse=True)
    if frame.n_rows != len(numbers) * (int(expert.max()) + 1):  # layers without experts may be missing, nothing else
        numbers, row = np.arange(int(layer.max()) + 1), layer
    shape = (len(numbers), int(expert.max()) + 1)
    cell = row * shape[1] + expert
    if frame.n_rows != shape[0] * shape[1] or len(np.unique(cell)) != frame.n_rows:
        raise FormatError(
            f"layer, expert: {frame.n_rows} rows are not each of {shape[0]} layers and {shape[1]} experts once"
        )
    in_layer = np.bincount(row, sum(columns[name] for name in ("a1", "d1", "a2", "d2")))
    counted = in_layer[row] > 0  # a dense layer may have zeros in all columns
    if not counted.any():
        raise FormatError("a1, a2: no activations")
    tables: list[npt.NDArray[np.int64]] = []
    tokens: list[int] = []
    for side in ("1", "2"):
        a, total = columns["a" + side], columns["a" + side] + columns["d" + side]
        n = int(total[counted][0])
        if n == 0 or (total[counted] != n).any():
            raise FormatError(f"a{side} + d{side}: not the same number of tokens in every row")
        table = np.zeros(shape, dtype=np.int64)
        table.flat[cell] = a
        tables.append(table)
        tokens.append(n)
    routed = np.flatnonzero(tables[0].any(axis=1) | tables[1].any(axis=1))  # the others have no experts
    if not len(routed):
        raise FormatError("a1, a2: no activations")
    k = int(tables[0][routed[0]].sum()) // tokens[0]
    for side, table, n in zip("12", tables, tokens, strict=True):
        if k == 0 or (table[routed].sum(axis=1) != n * k).any():
            raise FormatError(f"a{side}: its sum is not the tokens times one top-k in every layer")
    risk = np.zeros(shape)
    risk.flat[cell] = np.where(counted, _numbers(frame, "risk_diff"), 0)  # 0 / 0 elsewhere
    again = risk_difference_from(tables[0], tokens[0], tables[1], tokens[1])
    if not np.abs(risk - again).max() <= 1e-9:  # not <=: NaN fails
        raise FormatError("risk_diff: is not a1 / (a1 + d1) - a2 / (a2 + d2)")
    found = tuple(int(number) for number in numbers[routed])
    layers = found if found != tuple(range(len(found))) else ()
    return Rankings(tables[0][routed], tables[1][routed], tokens[0], tokens[1], k, layers)


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
