"""Effects of interventions for the tests of maps: made up, not measured."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from steermoe_local.maps.effects import Attribution, Effects
from steermoe_local.maps.expert_map import ExpertMap
from tests.support.builders import HEX, table_map

RD = [[0.5, -0.4, 0.3, 0.0], [-0.9, 0.5, 0.1, 0.2]]
NAMES = {1: "promote", -1: "suppress"}


def attribution(actions: tuple[str, ...] = ("promote", "suppress"), **changes: Any) -> Attribution:
    """How the made-up effects would have been estimated."""
    fields: dict[str, Any] = {
        "response": "pairs",
        "items_sha256": HEX,
        "n_items": 24,
        "n_confirm": 12,
        "neutral": "neutral",
        "n_text": 500,
        "n_draws": dict.fromkeys(actions, 128),
        "rate": dict.fromkeys(actions, 0.125),
        "steer": "answer",
        "seed": 3,
        "r2": dict(zip(("promote", "suppress"), (0.75, 0.5), strict=True)),
        "r2_cost": dict(zip(("promote", "suppress"), (0.25, -0.125), strict=True)),
        "first": 8,
        "agreement": dict.fromkeys(actions, 0.875),
        "stable": dict(zip(("promote", "suppress"), (True, False), strict=True)),
    }
    for name in ("r2", "r2_cost", "stable"):
        fields[name] = {action: fields[name][action] for action in actions}
    return Attribution(**(fields | changes))


def effects(*rows: dict[str, Any], **facts: Any) -> Effects:
    """Effects of rows that give what they want to be different: `action` by its name, no cost, not confirmed."""
    common = {"effect": 0.0, "effect_se": 0.125, "p": 1.0, "control": False}
    return Effects.from_rows(attribution(**facts), [common | row for row in rows])


def five_effects() -> Effects:
    """Effects on the experts of `RD`: of each action a clear one, a passenger of RD, a random control."""
    confirmed = {"confirm": 0.25, "confirm_se": 0.0625}
    return effects(
        {"layer": 0, "expert": 0, "action": "promote", "effect": 0.5, "p": 0.001, "cost": 0.25, "cost_se": 0.0625},
        {"layer": 1, "expert": 0, "action": "promote", "effect": 0.0625, "p": 0.75, "cost": 0.125, "cost_se": 0.25},
        {"layer": 0, "expert": 3, "action": "promote", "effect": -0.25, "p": 0.25, "cost": 0.0, "cost_se": 0.0}
        | {"control": True},
        {"layer": 1, "expert": 0, "action": "suppress", "effect": 0.75, "p": 0.0, "cost": 0.5, "cost_se": 0.125}
        | confirmed,
        {"layer": 0, "expert": 0, "action": "suppress", "effect": -0.625, "p": 0.01, "cost": -0.01, "cost_se": 0.125},
    )


def effects_map(**changes: Any) -> ExpertMap:
    """A map of 2 layers of 4 experts with every field of version 2."""
    fields: dict[str, Any] = {
        "n1": 10,
        "n2": 20,
        "n_pairs": 2,
        "positive": "digits",
        "negative": "words",
        "logit": np.array(RD) * 2,
        "weight": np.array(RD) / 4,
        "effects": five_effects(),
    }
    return table_map(RD, **(fields | changes))


def random_effects(
    shape: tuple[int, int], seed: int = 0, n: int = 40, actions: tuple[str, ...] = ("promote", "suppress")
) -> Effects:
    """Effects of at most `n` experts an action, with costs."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for action in actions:
        for place in rng.permutation(math.prod(shape))[:n].tolist():
            effect = float(rng.normal()) / 4
            row = {"layer": place // shape[1], "expert": place % shape[1], "action": action, "effect": effect}
            row |= {"p": 0.001 if abs(effect) > 0.2 else 0.5, "cost": float(rng.exponential()) / 8, "cost_se": 0.01}
            rows.append(row | {"control": bool(rng.random() < 0.5)})
    return effects(*rows, actions=actions)
