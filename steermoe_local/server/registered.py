"""A registered steering, what it is for a request, and how it is told apart from others."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import FormatError
from ..steering.bias_file import BiasFile
from ..steering.steering import Steering

__all__ = ["NONE", "NUMBERS", "Applied", "Registered", "Source", "map_digest", "size"]

NONE = "none"
"""The name that stands for no steering."""

Source = Literal["ships", "folder", "command line", "request"]

NUMBERS = ("activate", "deactivate", "reverse", "layers")
"""The fields of a choice that say which experts."""


@dataclass(frozen=True)
class Applied:
    """A steering as it is applied to an answer. `label` is what the metrics call it."""

    label: str
    bias: BiasFile | None = None
    info: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Registered:
    """A name and what it stands for."""

    name: str
    steering: Steering
    source: Source

    @property
    def is_map(self) -> bool:
        """Can the numbers of experts be changed?"""
        return self.steering.expert_map is not None

    @property
    def has_numbers(self) -> bool:
        """Is the name alone enough?"""
        return not self.is_map or bool(self.steering.activate or self.steering.deactivate)

    def to_dict(self) -> dict[str, Any]:
        """What GET /v1/steering says of it."""
        steering = self.steering
        made = steering.expert_map
        facts: dict[str, Any] = {"name": self.name, "object": "steering", "kind": "map" if made else "bias"}
        facts |= {"source": self.source, "usable_by_name": self.has_numbers, "mode": steering.mode}
        if made is None:
            assert steering.bias is not None
            return facts | {"n_active": steering.bias.n_active, "n_inactive": steering.bias.n_inactive}
        facts |= {name: getattr(steering, name) for name in (*NUMBERS, "scale")}
        facts |= {"behaviour": made.behaviour, "positive": made.positive, "negative": made.negative}
        return facts | {"side": steering.side, "map_sha256": map_digest(steering), "n_pairs": made.n_pairs}


_digests: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def map_digest(steering: Steering) -> str | None:
    """`ExpertMap.sha256`, computed once: it writes the whole map."""
    made = steering.expert_map
    if made is None:
        return None
    if made not in _digests:
        _digests[made] = made.sha256
    return _digests[made]


def size(steering: Steering) -> int:
    """Bytes of a steering's tables."""
    if steering.expert_map is not None:
        tables = (steering.expert_map.rd, steering.expert_map.a1, steering.expert_map.a2, steering.expert_map.se)
        return sum(table.nbytes for table in tables if table is not None)
    if steering.bias is None:
        raise FormatError("neither a map nor a bias")
    return sum(row.nbytes for row in steering.bias.values.values())
