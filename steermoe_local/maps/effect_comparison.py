"""Agreement of two maps about the effects of interventions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .effects import ACTIONS
from .expert_map import ExpertMap
from .significance import pearson, require_one_shape, spearman


@dataclass(frozen=True)
class EffectComparison:
    """Agreement of two maps about the effects of one action, over the `n` experts on which both tried it.

    Of the `n_significant` whose effect is significant in both, `n_same_sign` steer to the same side. The correlations
    are 0 for fewer than two experts.
    """

    n: int
    pearson: float
    spearman: float
    n_significant: int
    n_same_sign: int


def compare_effects(one: ExpertMap, two: ExpertMap) -> dict[str, EffectComparison] | None:
    """Compare the effects of two maps, by the action's name; None unless both have effects.

    Raises ModelMismatchError for other shapes.
    """
    require_one_shape(one, two)
    if one.effects is None or two.effects is None:
        return None
    found = {}
    for name, action in ACTIONS.items():
        (x, first), (y, second) = (
            (e.table(action, "effect", m.identity.shape), e.table(action, "significant", m.identity.shape))
            for m, e in ((one, one.effects), (two, two.effects))
        )
        both = ~np.isnan(x) & ~np.isnan(y)
        clear = both & (first == 1) & (second == 1)
        same = clear & (np.sign(x) == np.sign(y))
        a, b = x[both], y[both]
        found[name] = EffectComparison(
            n=int(both.sum()),
            pearson=pearson(a, b) if a.size else 0.0,
            spearman=spearman(a, b) if a.size else 0.0,
            n_significant=int(clear.sum()),
            n_same_sign=int(same.sum()),
        )
    return found
