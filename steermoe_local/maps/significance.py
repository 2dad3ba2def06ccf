"""Significance of risk differences: standard errors, p-values, split-half stability, a shuffled control, comparisons.

Tokens of one prompt are not independent, so the pair is the unit: standard errors are clustered by pairs, halves are
halves of the pairs, and the control swaps the sides of whole pairs. docs/statistics.md has the formulas and sources.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ModelMismatchError, UsageError
from .confidence import Confidence, Control, SplitHalf
from .expert_map import ExpertMap
from .pair_counts import PairCounts
from .scores import rank

FloatArray = npt.NDArray[np.float64]

TOP_N = 20
REPEATS = 100
DRAWS = 999
# With more degrees of freedom Student's t is the normal distribution to three digits; fewer give wider intervals.
_MAX_DF = 10_000


class Pairs(Protocol):
    """The part of `PairCounts` that is used here: tokens [n_pairs, 2], and activations a chunk at a time."""

    @property
    def n(self) -> npt.NDArray[np.int64]: ...
    @property
    def moe_layers(self) -> tuple[int, ...]: ...
    def chunks(self) -> Iterator[tuple[slice, npt.NDArray[np.unsignedinteger[Any]]]]:
        """Yield (pairs, activations [pairs, 2, n_layer, n_expert]) in order."""


def standard_errors(pairs: Pairs) -> FloatArray:
    """Cluster-robust standard error of each risk difference, float64 [n_layer, n_expert].

    RD is a difference of two ratios of sums over pairs; linearised, pair i contributes

        u_i = (a1_i - p1 n1_i) / N1 - (a2_i - p2 n2_i) / N2

    and Var(RD) = G / (G - 1) sum u_i^2 over the G pairs (the sum of u_i is 0). As u_i holds both sides of a pair, their
    covariance is in it. Taylor linearisation of a ratio: Woodruff, JASA 66 (1971) 411; the same as the sandwich of
    Liang and Zeger, Biometrika 73 (1986) 13, with pairs as clusters. 0 where all pairs behave the same.

    Raises UsageError for fewer than two pairs, or a side without tokens.
    """
    totals = _tokens(pairs)
    n_pairs = len(pairs.n)
    if n_pairs < 2:
        raise UsageError("one pair has no spread to estimate an interval from; give at least two")
    sums = _sums(pairs, np.ones((n_pairs, 1)))[0]
    rates = sums / totals[:, None, None]
    squares = np.zeros(sums.shape[1:])
    for part, a in pairs.chunks():
        u = (a - rates * pairs.n[part][:, :, None, None]) / totals[:, None, None]
        squares += np.square(u[:, 0] - u[:, 1]).sum(axis=0)
    # rounding errors where the spread is exactly 0 (p = 1 in every pair)
    squares[squares < n_pairs * 1e-30] = 0
    return np.sqrt(squares * n_pairs / (n_pairs - 1))


def half_widths(se: npt.ArrayLike, n_pairs: int, level: float = 0.95) -> FloatArray:
    """Half widths of confidence intervals RD +- t se; t is Student's with n_pairs - 1 degrees of freedom."""
    return np.asarray(se, dtype=np.float64) * t_quantile(level, n_pairs - 1)


def p_values(rd: npt.ArrayLike, se: npt.ArrayLike, n_pairs: int) -> FloatArray:
    """Two-sided p-values of RD = 0, uncorrected: Student's t of RD / se with n_pairs - 1 degrees of freedom.

    At least 2^(1 - n_pairs), the smallest p-value of the exact test that swaps the sides of n_pairs pairs in all ways,
    so that a few equal pairs are not significant.
    """
    scores, errors = np.broadcast_arrays(np.abs(np.asarray(rd, dtype=np.float64)), np.asarray(se, dtype=np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.where(scores == 0, 0.0, scores / errors)
    return np.maximum(_t_two_sided(t, n_pairs - 1), 2.0 ** -min(n_pairs - 1, 1000))


def holm(p: npt.ArrayLike) -> FloatArray:
    """Holm's step-down correction (Scand. J. Statist. 6, 1979) of the family-wise error, under any dependence."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, axis=None, kind="stable")
    steps = values.ravel()[order] * np.arange(values.size, 0, -1)
    return _back(np.minimum(np.maximum.accumulate(steps), 1.0), order, values.shape)


def benjamini_hochberg(p: npt.ArrayLike) -> FloatArray:
    """Benjamini and Hochberg's step-up correction (JRSS B 57, 1995) of the false discovery rate."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values, axis=None, kind="stable")[::-1]
    steps = values.ravel()[order] * values.size / np.arange(values.size, 0, -1)
    return _back(np.minimum(np.minimum.accumulate(steps), 1.0), order, values.shape)


# Holm is the default: experts of a layer compete for k slots, and Holm holds under any dependence.
CORRECTIONS = {"holm": holm, "bh": benjamini_hochberg}


def split_half(pairs: Pairs, top_n: int = TOP_N, repeats: int = REPEATS, seed: int = 0) -> SplitHalf:
    """Compare maps of random halves of the pairs; see `SplitHalf`.

    Raises UsageError for fewer than two pairs.
    """
    n_pairs = len(pairs.n)
    if n_pairs < 2:
        raise UsageError("one pair cannot be halved; give at least two")
    rng = np.random.default_rng(seed)
    halves = np.zeros((n_pairs, repeats))
    for column in range(repeats):
        halves[rng.permutation(n_pairs)[: n_pairs // 2], column] = 1
    first = _sums(pairs, halves)
    whole = _sums(pairs, np.ones((n_pairs, 1)))
    tokens = halves.T @ pairs.n
    layers = list(pairs.moe_layers)
    correlations, overlaps = [], []
    for part, n in zip(first, tokens, strict=True):
        one = _rd(part, n)[layers]
        two = _rd(whole[0] - part, pairs.n.sum(axis=0) - n)[layers]
        correlations.append(spearman(np.abs(one), np.abs(two)))
        overlaps.append(overlap(one, two, top_n))
    return SplitHalf(repeats, float(np.mean(correlations)), float(np.mean(overlaps)))


def shuffled_control(pairs: Pairs, top_n: int = TOP_N, draws: int = DRAWS, seed: int = 0) -> tuple[Control, Control]:
    """Compare the map with `draws` maps whose sides are swapped at random, pair by pair.

    Returns the controls of max |RD| and of the sum of the `top_n` largest |RD|. If the sides do not differ, every such
    map is as likely as the real one, so p is exact: a randomisation test (Phipson and Smyth, 2010, for the +1).
    """
    totals = _tokens(pairs)
    rng = np.random.default_rng(seed)
    whole = _sums(pairs, np.ones((len(pairs.n), 1)))[0]
    moved = np.zeros((draws, *whole.shape[1:]))  # counts that each draw moves from the negative to the positive side
    moved_n = np.zeros(draws)
    for part, a in pairs.chunks():
        swaps = rng.integers(0, 2, size=(draws, len(a))).astype(np.float64)
        difference = a[:, 1].astype(np.float64) - a[:, 0]
        moved += (swaps @ difference.reshape(len(a), -1)).reshape(moved.shape)
        moved_n += swaps @ (pairs.n[part, 1] - pairs.n[part, 0])
    layers = list(pairs.moe_layers)
    maxima, sums = [], []
    for added, n in zip([np.zeros(whole.shape[1:]), *moved], [0.0, *moved_n.tolist()], strict=True):
        rd = _rd(np.stack([whole[0] + added, whole[1] - added]), totals + np.array([n, -n]))
        sizes = np.sort(np.abs(rd[layers]), axis=None)[::-1]
        maxima.append(sizes[0])
        sums.append(sizes[:top_n].sum())
    return control_of(np.asarray(maxima)), control_of(np.asarray(sums))


def annotate(
    expert_map: ExpertMap,
    pair_counts: PairCounts,
    *,
    top_n: int = TOP_N,
    repeats: int = REPEATS,
    draws: int = DRAWS,
    seed: int = 0,
) -> ExpertMap:
    """Return the map with standard errors, split-half stability and the shuffled control of its pairs.

    The map of a single pair is returned unchanged. Raises ModelMismatchError or FormatError for pairs of another
    map.
    """
    pair_counts.require_total(expert_map, "the map")
    if pair_counts.n_pairs < 2:
        return expert_map
    top_n = min(top_n, len(pair_counts.moe_layers) * expert_map.identity.n_expert)
    max_rd, sum_top = shuffled_control(pair_counts, top_n, draws, seed)
    confidence = Confidence(
        n_pairs=pair_counts.n_pairs,
        moe_layers=pair_counts.moe_layers,
        top_n=top_n,
        seed=seed,
        split_half=split_half(pair_counts, top_n, repeats, seed),
        draws=draws,
        max_rd=max_rd,
        sum_top=sum_top,
    )
    return replace(expert_map, se=standard_errors(pair_counts), confidence=confidence)


def corrected_p(expert_map: ExpertMap, correction: str = "holm") -> FloatArray:
    """p-values of an annotated map, corrected for the experts of its MoE layers; 1 in other layers.

    Raises UsageError for a map without standard errors.
    """
    if expert_map.se is None or expert_map.confidence is None:
        raise UsageError("the map has no standard errors; make them with steermoe map stats MAP --per-pair FILE")
    layers = list(expert_map.confidence.moe_layers)
    p = np.ones(expert_map.rd.shape)
    raw = p_values(expert_map.rd[layers], expert_map.se[layers], expert_map.confidence.n_pairs)
    p[layers] = CORRECTIONS[correction](raw)
    return p


@dataclass(frozen=True)
class Comparison:
    """Agreement of two maps over the experts of all layers with a score in either.

    `overlap` is the share of the `top_n` experts by |RD| that are the same, with the same sign, in both; `chance` is
    its expectation for random sets. `by_layer` is Pearson's correlation in each of `layers`.
    """

    pearson: float
    spearman: float
    top_n: int
    overlap: float
    chance: float
    layers: tuple[int, ...]
    by_layer: tuple[float, ...]


def compare(one: ExpertMap, two: ExpertMap, top_n: int = TOP_N) -> Comparison:
    """Compare two maps of one shape: two behaviours, or two quantizations of a model.

    Raises ModelMismatchError for other shapes.
    """
    require_one_shape(one, two)
    layers = np.flatnonzero(one.rd.any(axis=1) | two.rd.any(axis=1))
    x, y = one.rd[layers], two.rd[layers]
    if not x.size:
        raise UsageError("both maps are 0 everywhere; there is nothing to compare")
    top_n = min(top_n, x.size)
    return Comparison(
        pearson=pearson(x, y),
        spearman=spearman(x, y),
        top_n=top_n,
        overlap=overlap(x, y, top_n),
        # the same expert, with one of two signs
        chance=top_n / x.size / 2,
        layers=tuple(layers.tolist()),
        by_layer=tuple(pearson(a, b) for a, b in zip(x, y, strict=True)),
    )


def require_one_shape(one: ExpertMap, two: ExpertMap) -> None:
    """Raise ModelMismatchError for maps whose experts do not correspond."""
    if one.identity.shape != two.identity.shape:
        raise ModelMismatchError(
            f"maps of {one.identity.short} and of {two.identity.short}: their experts do not correspond; "
            "compare maps of one model"
        )


def pearson(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Pearson's correlation of all values; 0 when one side is constant."""
    a, b = (np.asarray(side, dtype=np.float64).ravel() for side in (x, y))
    a, b = a - a.mean(), b - b.mean()
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip(float(a @ b) / scale, -1, 1)) if scale > 0 else 0.0


def spearman(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Spearman's rank correlation of all values, ties at their mean rank; 0 when one side is constant."""
    return pearson(mean_ranks(x), mean_ranks(y))


def overlap(x: FloatArray, y: FloatArray, n: int) -> float:
    """Share of the `n` experts with the largest |RD| that two tables [n_layer, n_expert] have in common, by sign."""
    one, two = ({(*cell, np.sign(x_or_y[tuple(cell)])) for cell in rank(x_or_y)[:n].tolist()} for x_or_y in (x, y))
    return len(one & two) / max(len(one), 1)


@functools.cache
def t_quantile(level: float, df: float) -> float:
    """The t with P(|T| <= t) = level for Student's distribution, whose `df` need not be whole.

    Raises UsageError unless 0 < level < 1 and df >= 1.
    """
    if not 0 < level < 1:
        raise UsageError(f"level: {level!r} is not between 0 and 1; write 0.95 for 95%")
    if df < 1:
        raise UsageError("one pair has no spread to estimate an interval from; give at least two")
    df = min(df, _MAX_DF)
    # P(|T| > t) is convex: Newton's steps from 0 never pass the solution, and end where only rounding is left
    density = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t = 0.0
    while True:
        excess = float(_t_two_sided(np.asarray(t), df)) - (1 - level)
        larger = t + excess / (2 * density * (1 + t * t / df) ** (-(df + 1) / 2))
        if larger <= t:
            return t
        t = larger


def _t_two_sided(t: FloatArray, df: float) -> FloatArray:
    """P(|T| >= t): the regularised incomplete beta function I_x(df/2, 1/2) at x = df / (df + t^2)."""
    df = min(df, _MAX_DF)
    with np.errstate(over="ignore"):
        square = np.square(np.asarray(t, dtype=np.float64))
    a, b = df / 2, 0.5
    x, y = df / (df + square), np.where(np.isinf(square), 1.0, square / (df + np.where(np.isinf(square), 0, square)))
    # the continued fraction converges fast below the mean of the distribution, the mirrored one above it
    near = x < (a + 1) / (a + b + 2)
    fraction = np.where(near, _beta_fraction(np.where(near, x, 0), a, b), 1.0)
    mirrored = np.where(near, 1.0, _beta_fraction(np.where(near, 0, y), b, a))
    with np.errstate(divide="ignore"):
        log_front = a * np.log(x) + b * np.log(y) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    front = np.exp(log_front)
    tail: FloatArray = np.clip(np.where(near, front * fraction / a, 1 - front * mirrored / b), 0.0, 1.0)
    return tail


def _beta_fraction(x: FloatArray, a: float, b: float) -> FloatArray:
    """Continued fraction of the incomplete beta function (DLMF 8.17.22), from its end backwards."""
    value = np.ones_like(x)
    for m in range(40 + int(2 * math.sqrt(a + b)), 0, -1):  # it takes O(sqrt(a + b)) terms
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m - 1) * (a + b + m - 1) * x / ((a + 2 * m - 2) * (a + 2 * m - 1))
        value = 1 + odd / (1 + even / value)
    return np.asarray(1 / value)


def _tokens(pairs: Pairs) -> FloatArray:
    totals = pairs.n.sum(axis=0)
    if (totals <= 0).any():
        raise UsageError("pair counts: a side without target tokens; check the pairs' targets")
    return np.asarray(totals, dtype=np.float64)


def _sums(pairs: Pairs, weights: FloatArray) -> FloatArray:
    """Weighted sums over pairs: weights [n_pairs, m] make [m, 2, n_layer, n_expert]. Exact for 0 and 1."""
    total: FloatArray | None = None
    for part, a in pairs.chunks():
        flat = a.reshape(len(a), -1).astype(np.float64)
        added = (weights[part].T @ flat).reshape(weights.shape[1], *a.shape[1:])
        total = added if total is None else total + added
    if total is None:
        raise UsageError("pair counts: no pairs; give at least one")
    return total


def _rd(sums: FloatArray, tokens: npt.NDArray[Any]) -> FloatArray:
    """RD of sums [2, n_layer, n_expert]; the rates of a side without tokens in a draw are 0."""
    rates: FloatArray = sums / np.maximum(tokens, 1)[:, None, None]
    return np.asarray(rates[0] - rates[1])


def control_of(values: FloatArray) -> Control:
    """Control of the first value, that of the pairs as they are, among the others, those of shuffled pairs."""
    value, shuffled = float(values[0]), values[1:]
    # those that equal it up to rounding count as at least as large
    as_large = int((shuffled >= value - 1e-12).sum())
    median, q95 = np.quantile(shuffled, [0.5, 0.95]).tolist()
    return Control(value=value, median=median, q95=q95, p=(1 + as_large) / (1 + len(shuffled)))


def mean_ranks(values: npt.ArrayLike) -> FloatArray:
    """Ranks from 1 of all values, ties at their mean rank."""
    _, inverse, counts = np.unique(np.asarray(values).ravel(), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse.ravel()], dtype=np.float64)


def _back(values: FloatArray, order: npt.NDArray[np.intp], shape: Sequence[int]) -> FloatArray:
    result = np.empty(len(order))
    result[order] = values
    return result.reshape(shape)
