"""Maps of the embedded model that have every score by which experts can be chosen; effects are made up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from steermoe_local.maps.expert_map import ExpertMap
from tests.support.paths import ROOT
from tests.support.random_effects import random_effects

DIGITS = ROOT / "expert_maps" / "tiny" / "digits-words.json"


def scored_map(seed: int = 0) -> ExpertMap:
    """The shipped map digits-words with tables of its own for logit and weight, and effects of 40 experts an action."""
    found = ExpertMap.load(DIGITS)
    rng = np.random.default_rng(seed)
    routed = found.rd != 0
    tables = [np.where(routed, rng.normal(size=found.rd.shape), 0.0) for _ in range(2)]
    n_layer, n_expert = found.identity.shape
    effects = random_effects((n_layer - 1, n_expert), seed)
    effects = replace(effects, layer=effects.layer + 1)  # layer 0 is dense
    return replace(found, logit=tables[0], weight=tables[1], effects=effects)


def save_scored(path: Path, seed: int = 0) -> ExpertMap:
    """Write `scored_map` and return it."""
    made = scored_map(seed)
    made.save(path)
    return made
