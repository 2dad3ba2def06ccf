"""Where in the model a steering works: its experts of one part of the depth alone, and without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UsageError
from ...steering.bias_file import BiasFile
from ..measuring.measurements import Measurement
from ..metrics.intervals import Interval, difference, margin
from .objective import Values, facts

if TYPE_CHECKING:
    from ...steering.steering import Steering
    from ..measuring.evaluator import Evaluator

__all__ = ["THIRDS", "LayerEffects", "LayerPart", "by_layer", "only_layers", "thirds"]

THIRDS = ("early", "middle", "late")
WHOLE = "all layers"


@dataclass(frozen=True)
class LayerPart:
    """The experts of the whole choice that lie in some layers, and what they do alone.

    `kind` is "whole", "third", "layer" or "without" (all but a third). `towards` and `away` are the rates of the
    steering and of its reverse minus the unsteered rate, `swing` their difference; `away` and `swing` are None where
    there is no reverse. `kl` is that of the steering on the neutral text.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    n_active: int
    n_inactive: int
    towards: Interval
    away: Interval | None
    swing: Interval | None
    kl: float | None

    @property
    def effect(self) -> Interval:
        """The swing; what the steering alone does where there is none."""
        return self.swing or self.towards


@dataclass(frozen=True, eq=False)
class LayerEffects:
    """Effects of the whole choice, of thirds of the depth, of single layers, and of all but a third.

    `largest` is the third with the largest effect in the steering's direction; `margins` are by how much its effect is
    larger than that of each other third, over the same items. `clear`: all these intervals are above 0.
    """

    about: dict[str, Any]
    unsteered: float
    parts: tuple[LayerPart, ...]
    largest: str
    margins: dict[str, Interval]

    @property
    def clear(self) -> bool:
        """Is the largest third's effect larger than that of each other, beyond the 95% intervals?"""
        return bool(self.margins) and all(margin.low > 0 for margin in self.margins.values())

    def of(self, kind: str) -> tuple[LayerPart, ...]:
        """The parts of one kind, by depth."""
        return tuple(part for part in self.parts if part.kind == kind)

    @property
    def verdict(self) -> str:
        """One sentence: which third does most, whether that is certain, and what the paper says."""
        if len(self.of("third")) < len(THIRDS):
            return "There are too few layers with a router to speak of thirds."
        best = next(part for part in self.of("third") if part.name == self.largest)
        others = " and ".join(f"{name} by {_points(margin)}" for name, margin in self.margins.items())
        held = "agrees with" if self.largest == "middle" else "differs from"
        claim = f"this {held} the paper's finding that the middle layers matter most"
        if best.effect.value == 0 and all(margin.value == 0 for margin in self.margins.values()):
            return "No third has an effect of its own."
        if self.clear:
            return f"The {self.largest} third has the largest effect, more than {others}: {claim}."
        return (
            f"The {self.largest} third has the largest effect, but not certainly: more than {others}; this neither "
            "confirms nor refutes the paper's finding that the middle layers matter most."
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "about": self.about,
            "unsteered": self.unsteered,
            "parts": [{**asdict(part), "layers": list(part.layers)} for part in self.parts],
            "largest": self.largest,
            "margins": {name: asdict(margin) for name, margin in self.margins.items()},
            "clear": self.clear,
            "verdict": self.verdict,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LayerEffects:
        """Of what `to_dict` made."""
        parts = tuple(
            LayerPart(
                **{
                    **part,
                    "layers": tuple(part["layers"]),
                    **{name: _interval(part[name]) for name in ("towards", "away", "swing")},
                }
            )
            for part in data["parts"]
        )
        margins = {name: Interval(**margin) for name, margin in data["margins"].items()}
        return cls(data["about"], data["unsteered"], parts, data["largest"], margins)


def _interval(data: Mapping[str, Any] | None) -> Interval | None:
    return None if data is None else Interval(**data)


def by_layer(evaluator: Evaluator, steering: Steering, *, seed: int = 0) -> LayerEffects:
    """Measure a steering part by part. The parts' experts are those of the whole choice, so they add up to it.

    `seed` is the bootstrap's. A bias file and a preset have no reverse. Raises UsageError for a steering that does
    nothing, and what `Steering.build` and `Evaluator.measure` raise.
    """
    from .evaluate import has_reverse

    towards = steering.build(evaluator.identity)
    if towards is None:
        raise UsageError(f"{steering.name}: steers nothing; choose experts with activate, deactivate or both")
    reverse = steering.changed(reverse=not steering.reverse) if has_reverse(steering) else None
    away = None if reverse is None else reverse.bias_file(evaluator.identity)
    layers = _routed(steering, evaluator.identity.n_layer)
    parts = _parts(layers)
    ways = [way for way in (towards, away) if way is not None]
    base, *measured = evaluator.measure(
        [None, *(only_layers(way, part) for _, _, part in parts for way in ways)], benign=False, what="layers"
    )
    grouped = [measured[i : i + len(ways)] for i in range(0, len(measured), len(ways))]
    found = tuple(
        _part(name, kind, chosen, group, base, seed) for (name, kind, chosen), group in zip(parts, grouped, strict=True)
    )
    sign = -1.0 if steering.reverse else 1.0
    effects: dict[str, Values] = {
        name: sign * (group[0].values - (group[1] if len(group) > 1 else base).values)
        for (name, kind, _), group in zip(parts, grouped, strict=True)
        if kind == "third"
    }
    largest = max(effects, key=lambda name: float(effects[name].mean()))
    own = {part.name: part.effect if sign > 0 else _mirrored(part.effect) for part in found if part.kind == "third"}
    margins = {
        name: margin(effects[largest] - values, own[largest], own[name], seed)
        for name, values in effects.items()
        if name != largest
    }
    return LayerEffects(
        about={
            **facts(evaluator, steering),
            "activate": steering.activate,
            "deactivate": steering.deactivate,
            "seed": seed,
        },
        unsteered=base.rate,
        parts=found,
        largest=largest,
        margins=margins,
    )


def _mirrored(found: Interval) -> Interval:
    return replace(found, value=-found.value, low=-found.high, high=-found.low)


def only_layers(bias: BiasFile, layers: Sequence[int]) -> BiasFile | None:
    """What a bias does in some layers; None for nothing."""
    values = {layer: row for layer, row in bias.values.items() if layer in layers}
    return replace(bias, values=values) if values else None


def thirds(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Early, middle and late layers, as equal in number as can be, the earlier ones larger; empty ones are left out."""
    parts = zip(THIRDS, np.array_split(np.asarray(layers, dtype=np.int64), len(THIRDS)), strict=True)
    return {name: tuple(part.tolist()) for name, part in parts if part.size}


def _routed(steering: Steering, n_layer: int) -> tuple[int, ...]:
    """The layers in which the map knows of routing; all of the model, where there is no map."""
    made = steering.expert_map
    if made is None:
        return tuple(range(n_layer))
    tables = [table for table in (made.rd, made.a1, made.a2) if table is not None]
    return tuple(layer for layer in range(n_layer) if any(table[layer].any() for table in tables))


def _parts(layers: Sequence[int]) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, kind, layers) of each part."""
    by_third = thirds(layers)
    return [
        (WHOLE, "whole", tuple(layers)),
        *((name, "third", part) for name, part in by_third.items()),
        *((f"layer {layer}", "layer", (layer,)) for layer in layers),
        *((f"all but {name}", "without", tuple(sorted(set(layers) - set(part)))) for name, part in by_third.items()),
    ]


def _part(
    name: str, kind: str, layers: tuple[int, ...], measured: Sequence[Measurement], base: Measurement, seed: int
) -> LayerPart:
    towards = measured[0]
    away = measured[1] if len(measured) > 1 else None
    return LayerPart(
        name=name,
        kind=kind,
        layers=layers,
        n_active=towards.bias.n_active if towards.bias else 0,
        n_inactive=towards.bias.n_inactive if towards.bias else 0,
        towards=difference(towards.values, base.values, seed),
        away=None if away is None else difference(away.values, base.values, seed),
        swing=None if away is None else difference(towards.values, away.values, seed),
        kl=None if towards.text is None else towards.text.kl,
    )


def _points(found: Interval) -> str:
    return f"{100 * found.value:.0f} points ({100 * found.low:.0f} to {100 * found.high:.0f})"
