"""Pairs to record, and the comparison of what was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from steermoe_local import Pair, RoutingCounts
from steermoe_local.maps.routing_sums import MEMBERS, RoutingSums
from tests.support.low_level import F32
from tests.support.paths import ROOT

PROGRAM = "from steermoe_local.cli import main; main()"
CACHE: dict[str, Any] = {"type_k": F32, "type_v": F32, "flash_attn": False}  # which would round to F16
DATA = ROOT / "steermoe_local" / "data"


def text_pairs(n: int) -> list[Pair]:
    return [Pair(f"p{i}", f"Count up: {i}, {i + 1}", f"Count down: {i + 1}, {i}", f"{i}", f"{i}") for i in range(n)]


def same(one: RoutingCounts, two: RoutingCounts) -> bool:
    numbers = one.n1 == two.n1 and one.n2 == two.n2 and one.n_pairs == two.n_pairs
    return numbers and np.array_equal(one.a1, two.a1) and np.array_equal(one.a2, two.a2)


def sums_bytes(sums: RoutingSums | None) -> list[bytes]:
    """All bits of recorded sums."""
    assert sums is not None
    return [getattr(sums, name).tobytes() for name in MEMBERS]
