"""What a registered name stands for, and what is said about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..maps.ranks import ranks_of
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import AnyBias, BiasPlan
from ..steering.plan import AnySteering, SteeringPlan
from ..steering.rules import json_cap
from ..steering.steering import Steering
from .choices import NUMBERS
from .plans import tables_of

NONE = "none"
"""The name that stands for no steering."""

Source = Literal["ships", "folder", "command line", "request"]


@dataclass(frozen=True)
class Applied:
    """What steers an answer. `label` is its name in the metrics, `info` what the answer says about it."""

    label: str
    bias: AnyBias | None = None
    info: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Registered:
    """A name and the steering that it stands for."""

    name: str
    steering: AnySteering
    source: Source

    @property
    def kind(self) -> Literal["map", "bias", "plan"]:
        """What it is; a choice is a map with other numbers."""
        if isinstance(self.steering, SteeringPlan):
            return "plan"
        return "bias" if self.steering.expert_map is None else "map"

    @property
    def is_map(self) -> bool:
        """Whether requests can change the numbers of experts."""
        return self.kind == "map"

    @property
    def has_numbers(self) -> bool:
        """Whether a request needs to give nothing but the name."""
        return has_numbers(self.steering)

    def to_dict(self) -> dict[str, Any]:
        """The entry in GET /v1/steering."""
        steering, expert_map = self.steering, self.steering.expert_map
        facts: dict[str, Any] = {"name": self.name, "object": "steering", "kind": self.kind, "source": self.source}
        facts |= {"usable_by_name": self.has_numbers, "mode": steering.mode}
        if isinstance(steering, SteeringPlan):
            return facts | {"rules": steering.texts, "plan_sha256": steering.sha256}
        if expert_map is None:
            assert steering.bias is not None
            return facts | {"n_active": steering.bias.n_active, "n_inactive": steering.bias.n_inactive}
        facts |= {name: getattr(steering, name) for name in (*NUMBERS, "scale", "preset", "rank", "weights")}
        facts |= {"cap": json_cap(steering.cap), "ranks": list(ranks_of(expert_map))}
        facts["fitted"] = len(steering.values) or None
        facts["presets"] = {p.name: {"activate": p.n_activate, "deactivate": p.n_deactivate} for p in steering.presets}
        facts |= {name: getattr(expert_map, name) for name in ("behaviour", "positive", "negative")}
        recommended = expert_map.recommended
        facts["recommended"] = None if recommended is None else recommended.to_dict()
        return facts | {"side": steering.side, "map_sha256": expert_map.sha256, "n_pairs": expert_map.n_pairs or None}


def biases_of(bias: AnyBias | None) -> tuple[BiasFile, ...]:
    """The biases that are attached for what steers a request."""
    if bias is None:
        return ()
    return bias.biases if isinstance(bias, BiasPlan) else (bias,)


def has_numbers(steering: AnySteering) -> bool:
    """Whether it steers as it is; a map may have come without numbers of experts."""
    if isinstance(steering, SteeringPlan) or steering.expert_map is None:
        return True
    return steering.has_experts


def applied(label: str, steering: AnySteering, bias: AnyBias | None) -> Applied:
    """What `bias`, which was built of `steering`, is for an answer."""
    info: dict[str, Any] = {"name": steering.name if isinstance(steering, SteeringPlan) else label.partition(":")[0]}
    if isinstance(steering, SteeringPlan):
        info |= {"kind": "plan", "rules": steering.texts, "plan_sha256": steering.sha256, "side": steering.side}
    if bias is None:
        return Applied(NONE, None, info | {"n_active": 0, "n_inactive": 0})
    info["mode"] = bias.mode if isinstance(bias, BiasFile) else steering.mode
    info |= {"n_active": bias.n_active, "n_inactive": bias.n_inactive, "bias_sha256": bias.key}
    if isinstance(steering, Steering) and steering.expert_map is not None:
        info |= {"map_sha256": steering.expert_map.sha256, "side": steering.side}
        info |= {field: getattr(steering, field) for field in (*NUMBERS, "scale", "rank", "weights")}
        info |= {"cap": json_cap(steering.cap), "fitted": len(steering.values) or None}
        if steering.preset is not None:
            info["preset"] = steering.preset
    return Applied(label, bias, info)


def n_bytes(steering: AnySteering) -> int:
    """Size of a steering's tables, and of a plan's rules."""
    if isinstance(steering, SteeringPlan):
        return sum(map(n_bytes, tables_of(steering))) + sum(len(text.encode()) for text in steering.texts)
    expert_map, bias = steering.expert_map, steering.bias
    if expert_map is not None:
        names = ("rd", "a1", "a2", "se", "logit", "weight")
        tables = [table for name in names if (table := getattr(expert_map, name)) is not None]
        effects = 0 if expert_map.effects is None else expert_map.effects.nbytes
        return effects + sum(int(table.nbytes) for table in tables)
    return 0 if bias is None else sum(row.nbytes for row in bias.values.values())
