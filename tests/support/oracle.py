"""NumPy oracle of the steering rule, written from the paper's section 3.2 (docs: how steering works), not from the C++.

Logits are float32 [tokens, experts]; everything after the edit is done in float64.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support import rounding

Logits = npt.NDArray[np.float32]

_TINIEST = 2.0**-126


def steer(z: Logits, mode: str, values: npt.ArrayLike, epsilon: float = 0.01, cap: float = np.inf) -> Logits:
    """The edited logits z' of one layer. `values` [experts]: logits for the soft rule, signs for the others.

    `cap`: the most logits by which the capped rule moves an expert.
    """
    row = np.asarray(values, dtype=np.float32)
    if mode == "soft":
        return z + row
    eps = np.float32(epsilon)
    highest, lowest = z.max(axis=1, keepdims=True), z.min(axis=1, keepdims=True)  # both before any edit
    promoted, suppressed = np.broadcast_to(highest + eps, z.shape), np.broadcast_to(lowest - eps, z.shape)
    if mode == "capped":
        far = np.float32(cap)
        promoted = np.maximum(z, np.minimum(promoted, z + far))
        suppressed = np.minimum(z, np.maximum(suppressed, z - far))
    return np.where(row > 0, promoted, np.where(row < 0, suppressed, z))


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


def selection_scores(
    z: Logits, function: str, bias: npt.NDArray[Any] | None = None, groups: tuple[int, int] | None = None
) -> npt.NDArray[np.float64]:
    """What top-k sees for the (edited) logits z, float64 [tokens, experts].

    function: how scores come from logits ("logits": they are the scores). bias [experts] is added for the choice alone.
    groups (count, used): groups of equal size, of which those with the greatest sum of two best scores stay; scores of
    the others are -inf.
    """
    scores = _scores(z.astype(np.float64), function)
    if bias is not None:
        scores = scores + bias
    if groups is not None:
        count, used = groups
        grouped = scores.reshape(len(scores), count, -1)
        strength = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        out = np.argsort(-strength, axis=1, kind="stable")[:, used:]
        np.put_along_axis(grouped, out[:, :, None], -np.inf, axis=1)
        scores = grouped.reshape(scores.shape)
    return scores


def chosen_by(scores: npt.NDArray[Any], signs: npt.ArrayLike, k: int) -> npt.NDArray[np.int64]:
    """The promise, [tokens, k]: +1 experts before all others, -1 experts behind them, by their scores within each."""
    rank = np.broadcast_to(np.asarray(signs), scores.shape)
    return np.lexsort((-scores, -rank), axis=1)[:, :k]


def selected_weights(z: Logits, experts: npt.NDArray[Any], gating: str) -> npt.NDArray[np.float64]:
    """Mixing weights of the chosen experts before any normalisation, [tokens, k], from the (edited) logits z alone."""
    wide = z.astype(np.float64)
    if gating == "softmax_weight":
        return _softmax(np.take_along_axis(wide, experts, axis=1))
    return np.take_along_axis(_scores(wide, gating), experts, axis=1)


Sums = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]


def sums(z: Logits, experts: npt.NDArray[Any], mixed: npt.NDArray[Any]) -> Sums:
    """What a recorder sums over tokens: logits [experts], their spread [1] and the mixing weights [experts].

    z [tokens, experts], the chosen experts and their weights `mixed` [tokens, k].
    """
    wide = z.astype(np.float64)
    spread = ((wide - wide.mean(axis=1, keepdims=True)) ** 2).sum()
    weights = np.bincount(experts.ravel(), mixed.ravel().astype(np.float64), minlength=z.shape[1])
    return wide.sum(axis=0), np.array([spread]), weights


def sums_allowance(z: Logits | None, mixed: npt.NDArray[Any] | None, what: str) -> float:
    """How far two orders of adding the same float64 terms may lie apart: n u times the sum of their sizes, twice.

    A squared deviation is off by 4 roundings more, of the greatest logit's size.
    """
    if z is None or mixed is None:
        return 0.0
    u = 2.0**-53
    if what == "spread":
        size = float(np.abs(z).max())
        return 2 * u * (z.size + z.shape[1] + 4) * z.size * 4 * size**2
    terms = z if what == "logits" else mixed
    return 2 * u * len(terms) * float(np.abs(terms.astype(np.float64)).sum())


EXP = 4 * rounding.F32  # relative error of exp in F32: ggml's own is off by at most 2 units in the last place


def score_allowance(z: Logits, function: str, exp: float = EXP) -> npt.NDArray[np.float64]:
    """How far F32 scores of the same F32 logits may lie from those of the oracle, [tokens, experts].

    `exp` is the relative error of the exponential function that computes them. With u the unit roundoff of F32:

    - softmax of n: exp's argument, the distance x to the largest logit, is rounded by u |x|, and so is exp(x) as a
      share of itself. The mean of |x| under the softmax itself is at most log n, which moves the sum by as much; the
      sum rounds n - 1 times, its inverse and the product once each.
    - sigmoid: exp, a sum and a quotient.
    - sqrt_softplus: 1 + exp(z) rounds by u of itself, which moves its logarithm by u; logarithm and root round by 2 u
      and u. An error d of the softplus s moves its root by d / (sqrt(s) + sqrt(s - d)), at most sqrt(d).

    F32 has no full precision below 2^-126.
    """
    wide, u = z.astype(np.float64), rounding.F32
    if function == "logits":
        return np.zeros(z.shape)
    score = _scores(wide, "softmax" if function == "softmax_weight" else function)
    if function in ("softmax", "softmax_weight"):
        n = z.shape[1]
        share = u * (wide.max(axis=1, keepdims=True) - wide + np.log(n) + n + 1) + 2 * exp
        return share * score + n * _TINIEST
    if function == "sigmoid":
        return (exp + 2 * u) * score + _TINIEST
    assert function == "sqrt_softplus", function
    off = (exp + u) * (1 + np.tanh(wide / 2)) / 2 + u + 2 * u * score**2 + _TINIEST
    return off / np.maximum(score + np.sqrt(np.maximum(score**2 - off, 0)), np.sqrt(off)) + u * score


def weight_allowance(
    z: Logits, experts: npt.NDArray[Any], gating: str, norm: bool = False, exp: float = EXP
) -> npt.NDArray[np.float64]:
    """The same for the mixing weights of the chosen experts, [tokens, k]; `norm`: each a share of their sum.

    The sum is off as far as its parts are, and rounds k - 1 times; the quotient rounds once.
    """
    if gating == "softmax_weight":
        chosen_logits = np.take_along_axis(z, experts, axis=1)
        off, values = score_allowance(chosen_logits, gating, exp), _softmax(chosen_logits.astype(np.float64))
    else:
        off = np.take_along_axis(score_allowance(z, gating, exp), experts, axis=1)
        values = np.take_along_axis(_scores(z.astype(np.float64), gating), experts, axis=1)
    if not norm:
        return off
    total = np.maximum(values.sum(axis=1, keepdims=True), 2.0**-14)  # at which llama.cpp keeps it
    share = values / total
    rounded = experts.shape[1] * rounding.F32 * share
    return (off + share * off.sum(axis=1, keepdims=True)) / total + rounded  # type: ignore[no-any-return]


def _scores(z: npt.NDArray[np.float64], function: str) -> npt.NDArray[np.float64]:
    if function in ("logits", "softmax_weight"):
        return z.copy()
    if function == "softmax":
        return _softmax(z)
    if function == "sigmoid":
        return 1 / (1 + np.exp(-z))
    assert function == "sqrt_softplus", function
    return np.sqrt(np.logaddexp(0, z))


def _softmax(z: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)
