"""Effects by depth: what a steering's experts do in one part of the layers alone, and without that part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...steering.bias_file import BiasFile
from ..measuring.json_values import plain
from ..measuring.measurements import UNSTEERED, Measurement
from ..metrics.intervals import Interval, Values, margin
from .steerings import EFFECT, NEGATIVE, POSITIVE, both_ways, effects_of, mirrored, study_metadata

if TYPE_CHECKING:
    from ...steering.steering import Steering
    from ..measuring.evaluator import Evaluator

THIRDS = ("early", "middle", "late")
WHOLE = "all layers"


@dataclass(frozen=True)
class LayerPart:
    """The experts of the whole choice that lie in some layers, and their effects alone.

    `kind` is "whole", "third", "layer" or "without" (all but a third). `steered` and `reversed` are the rates under the
    steering and its reverse minus the unsteered rate, `both` is their difference; `reversed` and `both` are None where
    there is no reverse. `kl` is that of the steering on the neutral text.
    """

    name: str
    kind: str
    layers: tuple[int, ...]
    n_active: int
    n_inactive: int
    steered: Interval = field(metadata={"json": "towards"})
    reversed: Interval | None = field(metadata={"json": "away"})
    both: Interval | None = field(metadata={"json": "swing"})
    kl: float | None

    @property
    def effect(self) -> Interval:
        """The difference between both directions, or to the unsteered model where there is no reverse."""
        return self.both or self.steered


@dataclass(frozen=True, eq=False)
class LayerEffects:
    """Effects of the whole choice, of thirds of the depth, of single layers, and of all but a third.

    `largest` is the third with the largest effect in the steering's direction; `margins` are by how much its effect is
    larger than that of each other third, over the same items. `clear`: all these intervals are above 0.
    """

    metadata: dict[str, Any] = field(metadata={"json": "about"})
    unsteered: float
    parts: tuple[LayerPart, ...]
    largest: str
    margins: dict[str, Interval]

    @property
    def clear(self) -> bool:
        """Whether the largest third's effect is larger than each other's, beyond the 95% intervals."""
        return bool(self.margins) and all(margin.low > 0 for margin in self.margins.values())

    def of(self, kind: str) -> tuple[LayerPart, ...]:
        """The parts of one kind, by depth."""
        return tuple(part for part in self.parts if part.kind == kind)

    @property
    def verdict(self) -> str:
        """One sentence: which third has the largest effect, whether that is certain, and what the paper says."""
        if len(self.of("third")) < len(THIRDS):
            return "There are too few layers with a router to speak of thirds."
        best = next(part for part in self.of("third") if part.name == self.largest)
        others = " and ".join(f"{name} by {_points(margin)}" for name, margin in self.margins.items())
        if best.effect.value == 0 and all(margin.value == 0 for margin in self.margins.values()):
            return "No third has an effect of its own."
        if self.clear:
            held = "agrees with" if self.largest == "middle" else "differs from"
            return (
                f"The {self.largest} third has the largest effect, more than {others}: this {held} the paper's finding "
                "that the middle layers matter most."
            )
        return (
            f"The {self.largest} third has the largest effect, but not certainly: more than {others}; this neither "
            "confirms nor refutes the paper's finding that the middle layers matter most."
        )

    def to_dict(self) -> dict[str, Any]:
        return {**plain(self), "clear": self.clear, "verdict": self.verdict}


def by_layer(evaluator: Evaluator, steering: Steering, *, seed: int = 0) -> LayerEffects:
    """Measure a steering part by part. The parts' experts are those of the whole choice, so they add up to it.

    `seed` is the bootstrap's. A bias file and a preset have no reverse. Raises UsageError for a steering that does
    nothing, and what `Steering.build` and `Evaluator.measure` raise.
    """
    biases = both_ways(steering, evaluator.identity)
    parts = _parts(_routed(steering, evaluator.identity.n_layer))
    base, *measured = evaluator.measure(
        [None, *(only_layers(bias, part) for _, _, part in parts for bias in biases)], benign=False, what="layers"
    )
    found, values = [], dict[str, Values]()
    for index, (name, kind, layers) in enumerate(parts):
        sides = measured[index * len(biases) : (index + 1) * len(biases)]
        found.append(_part(name, kind, layers, base, sides, seed))
        if kind == "third":  # in the steering's direction: what is positive is more of what it should do
            difference = sides[0].values - (sides[1] if len(sides) > 1 else base).values
            values[name] = -difference if steering.reverse else difference
    largest = max(values, key=lambda name: float(values[name].mean()))
    effects = {part.name: mirrored(part.effect) if steering.reverse else part.effect for part in found}
    return LayerEffects(
        metadata={
            **study_metadata(evaluator, steering),
            "activate": steering.activate,
            "deactivate": steering.deactivate,
            "seed": seed,
        },
        unsteered=base.rate,
        parts=tuple(found),
        largest=largest,
        margins={
            name: margin(values[largest] - values[name], effects[largest], effects[name], seed)
            for name in values
            if name != largest
        },
    )


def only_layers(bias: BiasFile, layers: Sequence[int]) -> BiasFile | None:
    """The part of a bias in some layers; None where it has none there."""
    values = {layer: row for layer, row in bias.values.items() if layer in layers}
    return replace(bias, values=values) if values else None


def thirds(layers: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Early, middle and late layers, as equal in number as can be, the earlier ones larger; empty ones are left out."""
    parts = zip(THIRDS, np.array_split(np.asarray(layers, dtype=np.int64), len(THIRDS)), strict=True)
    return {name: tuple(part.tolist()) for name, part in parts if part.size}


def _routed(steering: Steering, n_layer: int) -> tuple[int, ...]:
    """The layers that have a router as far as the map says; all of the model, where there is no map."""
    expert_map = steering.expert_map
    if expert_map is None:
        return tuple(range(n_layer))
    tables = [table for table in (expert_map.rd, expert_map.a1, expert_map.a2) if table is not None]
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
    name: str, kind: str, layers: tuple[int, ...], base: Measurement, sides: Sequence[Measurement], seed: int
) -> LayerPart:
    """`sides`: measured under the steering and, where there is one, under its reverse."""
    effects = effects_of({UNSTEERED: base, **dict(zip((POSITIVE, NEGATIVE), sides, strict=False))}, seed)
    steered = sides[0]
    return LayerPart(
        name=name,
        kind=kind,
        layers=layers,
        n_active=steered.n_experts[0],
        n_inactive=steered.n_experts[1],
        steered=effects[POSITIVE],
        reversed=effects.get(NEGATIVE),
        both=effects.get(EFFECT),
        kl=None if steered.text is None else steered.text.kl,
    )


def _points(found: Interval) -> str:
    return f"{100 * found.value:.0f} points ({100 * found.low:.0f} to {100 * found.high:.0f})"
