"""Risk differences of routing counts, and the ranking of experts by them: arithmetic on arrays."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .counts import RoutingCounts

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def activation_rates(counts: RoutingCounts) -> tuple[FloatArray, FloatArray]:
    """Share of target tokens that activated each expert: (p1, p2), float64 [n_layer, n_expert].

    p = a / N (arXiv 2509.09660, Eq. 3). In each MoE layer the rates of a side sum to top-k, as every token activates k
    experts; dense layers are 0.

    Raises UsageError when a side counted no token or a MoE layer's sum is not k.
    """
    rates = []
    for name, a, n in (("positive", counts.a1, counts.n1), ("negative", counts.a2, counts.n2)):
        rates.append(_rates(a, n, name))
        expected = n * counts.identity.n_expert_used
        for layer in counts.moe_layers:
            if int(a[layer].sum()) != expected:  # on integers, where the equation is exact
                raise UsageError(
                    f"counts: layer {layer}, {name} side: {int(a[layer].sum())} activations of {n} tokens, but "
                    f"top-{counts.identity.n_expert_used} makes {expected}; record the counts again"
                )
    return rates[0], rates[1]


def risk_difference(counts: RoutingCounts) -> FloatArray:
    """Risk difference of each expert, float64 [n_layer, n_expert], within [-1, 1].

    RD = a1 / N1 - a2 / N2 (arXiv 2509.09660, Eq. 4): positive where the positive side of the pairs activates the expert
    more often. Dense layers are 0, and no value is NaN.

    Raises UsageError when a side counted no token or the counts break the top-k rule.
    """
    p1, p2 = activation_rates(counts)
    return p1 - p2


def risk_difference_from(a1: npt.ArrayLike, n1: int, a2: npt.ArrayLike, n2: int) -> FloatArray:
    """Risk difference a1 / n1 - a2 / n2 of plain tables of one shape, float64.

    Raises UsageError when n1 or n2 is not positive or the shapes differ.
    """
    first, second = np.asarray(a1), np.asarray(a2)
    if first.shape != second.shape:
        raise UsageError(f"a1 and a2: shapes {first.shape} and {second.shape} differ")
    return _rates(first, n1, "positive") - _rates(second, n2, "negative")


def log_odds(a1: npt.ArrayLike, n1: int, a2: npt.ArrayLike, n2: int) -> FloatArray:
    """Difference of the log-odds of activation between the sides, float64 of the tables' shape; 0 without activations.

    log((a1 + 1/2) / (n1 - a1 + 1/2)) - log((a2 + 1/2) / (n2 - a2 + 1/2)). The halves keep it finite and take away most
    of the bias of small counts (Haldane, Ann. Hum. Genet. 20, 1956; Anscombe, Biometrika 43, 1956).

    Raises UsageError when n1 or n2 is not positive or the shapes differ.
    """
    risk_difference_from(a1, n1, a2, n2)  # checks them
    odds = []
    for a, n in ((np.asarray(a1, dtype=np.float64), n1), (np.asarray(a2, dtype=np.float64), n2)):
        odds.append(np.log(a + 0.5) - np.log(n - a + 0.5))
    routed = np.asarray(a1) + np.asarray(a2) > 0
    # an expert that no side activates says nothing, also where the sides have different numbers of tokens
    return np.where(routed, odds[0] - odds[1], 0.0)


def rank(rd: npt.ArrayLike, moe_layers: Iterable[int] | None = None) -> IntArray:
    """Rank experts by |RD|, descending; ties by (layer, expert), ascending.

    Returns int64 [n, 2], each row (layer, expert), of the experts in `moe_layers`, or in all layers when it is None.

    Raises UsageError when `rd` is not a finite table or a layer is outside it.
    """
    table = np.asarray(rd, dtype=np.float64)
    if table.ndim != 2 or not np.isfinite(table).all():
        raise UsageError("rd: not a finite table [n_layer, n_expert]")
    n_layer, n_expert = table.shape
    wanted = range(n_layer) if moe_layers is None else sorted(set(moe_layers))
    if any(not 0 <= layer < n_layer for layer in wanted):
        raise UsageError(f"moe_layers: outside the table's layers 0 to {n_layer - 1}")
    layers = np.asarray(wanted, dtype=np.int64)
    # Row-major positions of the chosen layers: a stable sort then breaks ties as documented.
    order = np.argsort(-np.abs(table[layers]).ravel(), kind="stable")
    return np.stack([layers[order // n_expert], order % n_expert], axis=1).astype(np.int64)


def _rates(a: npt.NDArray[np.generic], n: int, side: str) -> FloatArray:
    if n <= 0:
        raise UsageError(f"counts: no token counted on the {side} side; check the pairs' targets")
    return np.asarray(a, dtype=np.float64) / float(n)
