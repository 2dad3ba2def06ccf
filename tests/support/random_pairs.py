"""Per-pair counts of random routing, and their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local.identity import ModelIdentity
from steermoe_local.maps.pair_counts import PairCountsWriter
from tests.support.builders import DATE, HEX, identity

Arrays = tuple[list[str], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def random_pairs(seed: int, n_pairs: int = 7, model: ModelIdentity | None = None, most: int = 9) -> Arrays:
    """(ids, a [pairs, 2, n_layer, n_expert], n [pairs, 2]) of random top-k choices; layer 0 is dense."""
    model = model or identity()
    rng = np.random.default_rng(seed)
    n = rng.integers(1, most, size=(n_pairs, 2))
    a = np.zeros((n_pairs, 2, *model.shape), dtype=np.int64)
    for pair, side in np.ndindex(n_pairs, 2):
        for layer in range(1, model.n_layer):
            for _ in range(n[pair, side]):
                a[pair, side, layer, rng.permutation(model.n_expert)[: model.n_expert_used]] += 1
    return [f"pair-{seed}-{i}" for i in range(n_pairs)], a, n


def write(path: Path, pairs: Arrays, model: ModelIdentity | None = None, step: int = 3, **more: Any) -> Path:
    ids, a, n = pairs
    options = {"behaviour": "digits", "pairs_digest": HEX, "created": DATE} | more
    with PairCountsWriter(path, model or identity(), **options) as writer:
        for at in range(0, len(ids), step):
            writer.append(ids[at : at + step], a[at : at + step], n[at : at + step])
        assert writer.n_pairs == len(ids)
    return path
