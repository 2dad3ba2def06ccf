"""Recipes that look inside a steering: where in the depth it works, and under which rule."""

from __future__ import annotations

import numpy as np

from ...errors import ChoiceError
from ...maps.expert_map import parse_layers
from ...steering.bias_file import BiasFile
from ..metrics.formatting import percent, points
from ..metrics.intervals import rate
from ..reports.report import Table
from ..studies.layers import LayerPart, by_layer, thirds
from .setup import Answer, Lab
from .wording import (
    SCALES,
    Sides,
    depth_finding,
    layer_names,
    router_kinds,
    rules_finding,
    swing_figures,
    text_cells,
    works,
)

__all__ = ["layers", "routing_kinds"]


def layers(lab: Lab) -> Answer:
    """The same numbers of experts, chosen in one third of the depth or one layer at a time; and the choice in parts."""
    whole = lab.steering
    expert_map = whole.expert_map
    assert expert_map is not None
    scope = None if whole.layers is None else parse_layers(whole.layers)
    routed = [layer for layer in np.flatnonzero(expert_map.rd.any(axis=1)).tolist() if scope is None or layer in scope]
    by_third = thirds(routed)
    parts = by_third | {f"layer {layer}": (layer,) for layer in routed}
    ways: dict[str, tuple[BiasFile | None, ...]] = {}
    refused: dict[str, str] = {}
    for name, chosen in parts.items():
        one = whole.changed(layers=",".join(map(str, chosen)))
        try:
            ways[name] = tuple(way.build(lab.evaluator.identity) for way in (one, one.changed(reverse=True)))
        except ChoiceError as error:
            refused[name] = str(error)
    flat = [bias for pair in ways.values() for bias in pair]
    unsteered, *measured = lab.evaluator.measure([None, *flat], benign=False, what="layers")
    found = {
        name: Sides(unsteered, measured[2 * place], measured[2 * place + 1], lab.seed)
        for place, name in enumerate(ways)
    }
    rows = [
        (name, layer_names(chosen), *_part_cells(found[name]))
        if name in found
        else (name, layer_names(chosen), "-", "-", "-", "-", refused[name])
        for name, chosen in parts.items()
    ]
    header = ("part", "layers", "experts + / -", "towards", "away", "swing", "note")
    finding, verdict = depth_finding({name: sides for name, sides in found.items() if name in by_third}, lab.seed)
    divided = by_layer(lab.evaluator, whole, seed=lab.seed)
    lies = [layer for part in divided.of("layer") for layer in part.layers if part.n_active or part.n_inactive]
    finding = (
        f"With {whole.activate} + {whole.deactivate} experts chosen in one third at a time, {finding} The choice from "
        f"all layers lies in layers {layer_names(lies)}."
    )
    tables = [
        Table("The same numbers of experts, chosen in each part", header, tuple(rows), "rates; swing in points"),
        Table(
            "The choice from all layers, in parts",
            _PARTS,
            tuple(_layer_row(part) for part in divided.parts),
            "points against the unsteered model",
        ),
    ]
    figures = {
        "chosen_in": {name: swing_figures(sides) for name, sides in found.items()},
        "refused": refused,
        "divided": divided.to_dict(),
    }
    return finding, verdict, tables, figures


_PARTS = ("part", "layers", "experts + / -", "towards", "away", "swing")


def _part_cells(sides: Sides) -> tuple[str, ...]:
    bias = sides.towards.bias
    n = (bias.n_active, bias.n_inactive) if bias else (0, 0)
    return (f"{n[0]} / {n[1]}", percent(sides.towards.rate), percent(sides.away.rate), points(sides.swing), "")


def _layer_row(part: LayerPart) -> tuple[str, ...]:
    effects = ["-" if effect is None else points(effect) for effect in (part.towards, part.away, part.swing)]
    return (part.name, layer_names(part.layers), f"{part.n_active} / {part.n_inactive}", *effects)


def routing_kinds(lab: Lab) -> Answer:
    """The same experts under the hard rule, promoted or suppressed alone, and under soft rules."""
    base = lab.steering.changed(scale=None)
    variants = {"hard": base}
    if base.activate and base.deactivate:
        variants |= {"hard, promote only": base.changed(deactivate=0), "hard, suppress only": base.changed(activate=0)}
    variants |= {f"soft {scale:g}": base.changed(scale=scale) for scale in SCALES}
    ways = [way.build(lab.evaluator.identity) for one in variants.values() for way in (one, one.changed(reverse=True))]
    unsteered, *measured = lab.evaluator.measure([None, *ways], benign=False, what="routing kinds")
    found = {
        name: Sides(unsteered, measured[2 * index], measured[2 * index + 1], lab.seed)
        for index, name in enumerate(variants)
    }
    rows = [
        (
            name,
            str(rate(sides.towards.values, lab.seed)),
            str(rate(sides.away.values, lab.seed)),
            points(sides.swing),
            *text_cells(sides.towards, unsteered),
        )
        for name, sides in found.items()
    ]
    header = ("rule", "towards", "away", "swing", "perplexity ratio", "KL")
    kinds = router_kinds(lab.evaluator)
    tables = [
        Table("Rules", header, tuple(rows), "perplexity and KL (nats) of towards on the neutral text"),
        Table("Routers", ("layers", "gating", "top-k", "selection bias", "expert groups", "steerable"), kinds),
    ]
    hard = found["hard"].swing
    finding = rules_finding(found, hard, kinds)
    figures = {name: swing_figures(sides) for name, sides in found.items()}
    return (
        finding,
        "for" if works(hard) else "against",
        tables,
        {"rules": figures, "routers": [list(k) for k in kinds]},
    )
