"""Sums of what the routers compute for the target tokens, and the scores that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingSums:
    """Sums over target tokens, of the positive and of the negative sides (docs/method.md).

    `logits` are float64 [2, n_layer, n_expert]: the routers' logits, after a bias of the router's own. `spread` is
    [2, n_layer]: over the experts, too, the squared deviation of each logit from the mean of its token. `weights` are
    [2, n_layer, n_expert]: the weights with which selected experts are mixed, after the model's own normalisation and
    scaling. Rows of layers without a router are 0. The arrays are copied and read-only. They add up with `+`.
    """

    logits: FloatArray
    spread: FloatArray
    weights: FloatArray

    def __post_init__(self) -> None:
        for name in MEMBERS:
            table = np.array(getattr(self, name), dtype=np.float64)
            table.flags.writeable = False
            object.__setattr__(self, name, table)

    @classmethod
    def zeros(cls, shape: tuple[int, int]) -> RoutingSums:
        """Those of no token of a model of `shape` (n_layer, n_expert)."""
        return cls(**{name: np.zeros(size) for name, size in shapes(shape).items()})

    @property
    def is_finite(self) -> bool:
        """Whether no router overflowed."""
        return all(bool(np.isfinite(getattr(self, name)).all()) for name in MEMBERS)

    def __add__(self, other: RoutingSums) -> RoutingSums:
        with np.errstate(invalid="ignore"):  # infinities of a router that overflowed
            return RoutingSums(*(getattr(self, name) + getattr(other, name) for name in MEMBERS))

    def check(self, a: npt.NDArray[Any], where: str, again: str) -> None:
        """Check them against the counts a [2, n_layer, n_expert] of the same tokens. Raises FormatError."""
        for name, size in shapes((a.shape[1], a.shape[2])).items():
            table = getattr(self, name)
            if table.shape != size:
                raise FormatError(f"{where}: {name}: shape {table.shape}, must be {size}; {again}")
            if not np.isfinite(table).all():
                raise FormatError(f"{where}: {name}: NaN or infinity in it; {again}")
        routed = a.any(axis=2)
        if self.spread.min() < 0 or self.spread[~routed].any():
            raise FormatError(f"{where}: spread: below 0, or of a layer without tokens; {again}")
        if self.logits[~routed].any():
            raise FormatError(f"{where}: logits: of a layer without tokens; {again}")
        if self.weights[a == 0].any():
            raise FormatError(f"{where}: weights: of an expert that no token selected; {again}")


MEMBERS = tuple(field.name for field in fields(RoutingSums))


def shapes(shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of the tables by name, for a model of `shape` (n_layer, n_expert)."""
    return {"logits": (2, *shape), "spread": (2, shape[0]), "weights": (2, *shape)}


def logit_difference(sums: RoutingSums, n1: int, n2: int) -> FloatArray:
    """Difference of the mean router logit in units of the layer's deviation, float64 [n_layer, n_expert].

    Above 0 where the positive side's logits are higher. Logits are taken from the mean of their token, because a
    softmax and a top-k do not see what is added to all of them; the deviation is that of all tokens' logits from these
    means, pooled over tokens and experts. 0 in layers without a router, and where all logits of each token are equal.
    """
    means = sums.logits / np.array([n1, n2])[:, None, None]
    centred = means - means.mean(axis=2, keepdims=True)
    deviation = np.sqrt(sums.spread.sum(axis=0) / ((n1 + n2) * sums.logits.shape[2]))
    known = deviation > 0
    return np.where(known[:, None], (centred[0] - centred[1]) / np.where(known, deviation, 1.0)[:, None], 0.0)


def weight_difference(sums: RoutingSums, n1: int, n2: int) -> FloatArray:
    """Difference of the mean routed weight of a target token, float64 [n_layer, n_expert]; not selected counts 0."""
    return np.asarray(sums.weights[0] / n1 - sums.weights[1] / n2)
