"""The result of a transfer: one column for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ....maps.significance import Comparison
from ...measuring.json_values import from_plain, plain
from ...measuring.measurements import UNSTEERED
from ...metrics.intervals import Interval, difference
from ...tasks.neutral_text import TextScore
from ..evaluate import Evaluation
from ..steerings import EFFECT, NEGATIVE, POSITIVE
from .agreement import RoutingAgreement
from .quantize import ModelFile


@dataclass(frozen=True)
class MapEffect:
    """The effect of steering by one map on one model.

    `rates` of the task by side (unsteered, towards, away), `effects` as in `Evaluation`: differences over the same
    items ("towards", "away", "swing"). `headline` names the effect to compare: "swing", or "towards" where there is no
    reverse. `change` is this model's headline effect less the base model's by the base's map, over the same items; None
    on the base. `perplexity_ratio` on the neutral text by side, against this model unsteered. `signatures` are those
    that fired, as "side: signature".
    """

    rates: Mapping[str, Interval]
    effects: Mapping[str, Interval]
    headline: str
    perplexity_ratio: Mapping[str, float | None]
    signatures: tuple[str, ...]
    change: Interval | None = None
    items: tuple[float, ...] = field(default=(), repr=False)
    """The headline effect of each item."""

    @classmethod
    def of(cls, found: Evaluation, base: MapEffect | None, seed: int) -> MapEffect:
        """Of an evaluation; `base` is the effect on the base model, None for that model itself."""
        values = {side.name: measured.values for side, measured in zip(found.sides, found.measurements, strict=True)}
        name, _ = found.headline
        one, other = (POSITIVE, NEGATIVE) if name == EFFECT else (name, UNSTEERED)
        items = values[one] - values[other]
        return cls(
            rates={side.name: side.rate for side in found.sides},
            effects=dict(found.effects),
            headline=name,
            perplexity_ratio={side.name: side.fluency.perplexity_ratio for side in found.sides},
            signatures=tuple(f"{s.side}: {s.name}" for s in found.signatures),
            change=None if base is None else difference(items, base.items, seed),
            items=tuple(items.tolist()),
        )

    @property
    def effect(self) -> Interval:
        """The headline effect."""
        return self.effects[self.headline]


@dataclass(frozen=True)
class Column:
    """One model: the base, or a quantization of it.

    `map`: RD of the map made on this model against the map that is tested, None without pairs. `effect` is that of the
    tested map, `own_effect` that of this model's own, `own_gain` what that one does more. `routing` and `text` compare
    with the base, both unsteered, None on the base; `perplexity` is on the neutral text. `notes` name what could not be
    measured.
    """

    name: str
    file: ModelFile
    effect: MapEffect
    own_effect: MapEffect | None = None
    own_gain: Interval | None = None
    map: Comparison | None = None
    own_map_sha256: str | None = None
    routing: RoutingAgreement | None = None
    text: TextScore | None = None
    perplexity: float | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self, items: bool = False) -> dict[str, Any]:
        """As plain JSON values; with the effects of each item it can be read again."""
        data: dict[str, Any] = plain(self)
        if not items:
            for effect in filter(None, (data["effect"], data["own_effect"])):
                del effect["items"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path) -> Column:
        """Read what `to_dict(items=True)` made; `folder` is that of the models."""
        found: Column = from_plain(cls, data)
        return replace(found, file=replace(found.file, path=folder / found.file.path))


@dataclass(frozen=True)
class Transfer:
    """The base model and its quantizations, in the order in which they were asked for, and their provenance."""

    task: str
    positive: str
    negative: str
    base: Column
    columns: tuple[Column, ...]
    warnings: tuple[str, ...]
    provenance: Mapping[str, Any]

    def column(self, name: str) -> Column:
        """The quantization of that name, or "base". Raises KeyError."""
        return {column.name: column for column in (self.base, *self.columns)}[name]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the effects of each item."""
        columns = [column.to_dict() for column in (self.base, *self.columns)]
        return {**plain(self), "base": columns[0], "columns": columns[1:]}
