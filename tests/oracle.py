"""NumPy oracle of the steering rule, written from the paper's section 3.2 (docs: how steering works), not from the C++.

Logits are float32 [tokens, experts]; everything after the edit is done in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


def steer(z: Logits, mode: str, values: npt.ArrayLike, epsilon: float = 0.01) -> Logits:
    """The edited logits z' of one layer. `values` [experts]: signs for the hard rule, logits for the soft one."""
    row = np.asarray(values, dtype=np.float32)
    if mode == "soft":
        return z + row
    eps = np.float32(epsilon)
    highest, lowest = z.max(axis=1, keepdims=True), z.min(axis=1, keepdims=True)  # both before any edit
    return np.where(row > 0, highest + eps, np.where(row < 0, lowest - eps, z))


def chosen(z: Logits, k: int) -> npt.NDArray[np.int64]:
    """The top-k experts of each token, best first; equal logits in the order of the experts."""
    return np.argsort(-z, axis=1, kind="stable")[:, :k]


def weights(z: Logits, experts: npt.NDArray[Any], gating: str, norm: bool) -> npt.NDArray[np.float64]:
    """Mixing weights of the chosen experts, [tokens, k].

    gating "softmax": over all experts, then taken from the chosen; "softmax-weight": over the chosen alone.
    """
    wide = z.astype(np.float64)
    if gating == "softmax-weight":
        return _softmax(np.take_along_axis(wide, experts, axis=1))
    taken = np.take_along_axis(_softmax(wide), experts, axis=1)
    return taken / taken.sum(axis=1, keepdims=True) if norm else taken


def _softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
