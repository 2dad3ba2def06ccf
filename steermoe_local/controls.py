"""Controls: choices of experts that ought to do nothing, to compare a real one with."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .errors import ChoiceError
from .identity import ModelIdentity

__all__ = ["random_signs"]


def random_signs(
    signs: npt.NDArray[np.int8],
    identity: ModelIdentity,
    moe_layers: tuple[int, ...],
    rng: np.random.Generator,
) -> npt.NDArray[np.int8]:
    """As many +1 and -1 as in `signs` [n_layer, n_expert], on experts drawn evenly from all MoE layers.

    Draws that the model cannot carry out are drawn again: more than top-k +1 in a layer, or fewer than top-k experts
    left. Raises ChoiceError when 1000 draws in a row were of that kind.
    """
    k = identity.n_expert_used
    n_plus, n_minus = int((signs > 0).sum()), int((signs < 0).sum())
    candidates = [(layer, expert) for layer in moe_layers for expert in range(identity.n_expert)]
    for _ in range(1000):
        chosen = rng.permutation(len(candidates))[: n_plus + n_minus]
        drawn = np.zeros(identity.shape, dtype=np.int8)
        for place, index in enumerate(chosen):
            drawn[candidates[index]] = 1 if place < n_plus else -1
        plus, minus = (drawn > 0).sum(axis=1), (drawn < 0).sum(axis=1)
        # The reverse of a draw is used too, so both counts must do as +1 and as -1.
        if max(plus.max(), minus.max()) <= k and max(plus.max(), minus.max()) <= identity.n_expert - k:
            return drawn
    raise ChoiceError(f"{n_plus} + {n_minus} random experts do not fit a model with top-{k}; choose fewer")
