"""Plans of ready biases for tests."""

from __future__ import annotations

from typing import Any

from steermoe_local import BiasFile
from steermoe_local.maps.routing_lean import RoutingLean
from steermoe_local.steering.bias_plan import BiasPlan, BiasRule
from steermoe_local.steering.plan_text import parse_rule


def plan(*rules: tuple[str, BiasFile | None], scores: Any = None) -> BiasPlan:
    """A plan of (where, bias), where as people write it; conditions on routing look at `scores` [n_layer, n_expert]."""
    found = []
    for where, bias in rules:
        spec = parse_rule(f"{where}: none")
        looks = spec.where.when is not None and spec.where.when.measure == "routing"
        found.append(BiasRule(spec.where, bias, RoutingLean(scores) if looks else None))
    return BiasPlan(tuple(found))
