"""Confidence intervals of rates and of differences of rates over the items of a task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ...errors import UsageError

Z95 = 1.959963984540054  # the standard normal quantile of a two-sided 95% interval
_DRAWS = 2000
_EQUAL = 1e-12  # values that differ by less are the same up to rounding

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval [low, high], over `n` items; `method`: wilson, newcombe or bootstrap."""

    value: float
    low: float
    high: float
    n: int
    method: str

    def __str__(self) -> str:
        """Like "62% (48 to 74)"."""
        return f"{100 * self.value:.0f}% ({100 * self.low:.0f} to {100 * self.high:.0f})"


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a share (JASA 22 (1927) 209). Raises UsageError for impossible counts."""
    if not 0 <= successes <= n or n < 1:
        raise UsageError(f"{successes} of {n} is no share")
    p = successes / n
    low, high = wilson_bounds(p, n)
    return Interval(p, low, high, n, "wilson")


def wilson_bounds(p: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Ends of Wilson's interval of a share `p` of `n` observations, which need not be whole, at the quantile `z`."""
    z2 = z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # at the ends the bound is exactly 0 or 1, which rounding misses
    low = 0.0 if p <= _EQUAL else max(0.0, middle - half)
    return low, 1.0 if p >= 1 - _EQUAL else min(1.0, middle + half)


def bootstrap(
    values: npt.ArrayLike, seed: int = 0, draws: int = _DRAWS, *, possible: tuple[float, float] | None = None
) -> Interval:
    """Percentile bootstrap of the mean of items' values [n] (Efron and Tibshirani, 1993, ch. 13).

    Where all items have the same value the interval is a point: right for "nothing changed", but too narrow for any
    other effect. So with `possible`, the lowest and the highest value of an item, such an effect gets the interval that
    Wilson's bound for 0 of n allows: that share of items may lie at either end.

    Raises UsageError for no values, or values that are not finite.
    """
    items = np.asarray(values, dtype=np.float64)
    if items.ndim != 1 or not items.size or not np.isfinite(items).all():
        raise UsageError("an interval needs a finite value for each of one item at least")
    rng = np.random.default_rng(seed)
    means = items[rng.integers(0, items.size, (draws, items.size))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    value = float(items.mean())
    if possible is not None and abs(value) > _EQUAL and float(np.ptp(items)) <= _EQUAL:
        unseen = wilson(0, items.size).high
        low, high = (value + unseen * (end - value) for end in possible)
    return Interval(value, float(low), float(high), items.size, "bootstrap")


def newcombe(one: npt.ArrayLike, two: npt.ArrayLike) -> Interval:
    """Interval of the difference of two shares of the same items, values 0 or 1, [n] each.

    Newcombe's method 10 (Statistics in Medicine 17 (1998) 2635): Wilson's intervals of both shares combined, with their
    correlation. Its width is above 0 where all items agree, unlike the bootstrap's. Raises UsageError for values that
    are not pairs of 0 and 1.
    """
    a, b = _pairs(one, two)
    n = a.size
    if not _binary(a, b):
        raise UsageError("Newcombe's interval is of values that are 0 or 1; take a bootstrap")
    p1, p2 = wilson(int(a.sum()), n), wilson(int(b.sum()), n)
    both, neither = float((a * b).sum()), float(((1 - a) * (1 - b)).sum())
    first, second = float((a * (1 - b)).sum()), float(((1 - a) * b).sum())
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    cross = both * neither - first * second
    if cross > 0:
        cross = max(cross - n / 2, 0.0)  # continuity, as in the paper
    phi = cross / math.sqrt(margins) if margins else 0.0
    below, above = (p1.value - p1.low, p2.high - p2.value), (p2.value - p2.low, p1.high - p1.value)
    low, high = (math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y)) for x, y in (below, above))
    d = p1.value - p2.value
    return Interval(d, max(-1.0, d - low), min(1.0, d + high), n, "newcombe")


def difference(one: npt.ArrayLike, two: npt.ArrayLike, seed: int = 0, draws: int = _DRAWS) -> Interval:
    """Interval of mean(one) - mean(two) over the same items [n].

    Newcombe's if all values are 0 or 1, else a bootstrap that draws items with both their values. Raises UsageError.
    """
    a, b = _pairs(one, two)
    return newcombe(a, b) if _binary(a, b) else bootstrap(a - b, seed, draws, possible=_possible(a - b))


def rate(values: Sequence[float] | Values, seed: int = 0) -> Interval:
    """Mean of items' values: Wilson's interval if all are 0 or 1, else the bootstrap's. Raises UsageError."""
    items = np.asarray(values, dtype=np.float64)
    if items.size and _binary(items):
        return wilson(int(items.sum()), items.size)
    return bootstrap(items, seed, possible=(0.0, 1.0))


def margin(more: npt.ArrayLike, one: Interval, two: Interval, seed: int = 0) -> Interval:
    """How much larger one effect is than another over the same items; `more` is the difference by item [n].

    A bootstrap over the items; where all items are alike and it is a point, the intervals of the two effects combined
    as in Newcombe's method, without the correlation. Raises UsageError.
    """
    found = bootstrap(more, seed)
    if found.low < found.high:
        return found
    below = math.hypot(one.value - one.low, two.high - two.value)
    above = math.hypot(one.high - one.value, two.value - two.low)
    return replace(found, low=found.value - below, high=found.value + above, method="newcombe")


def _possible(differences: Values) -> tuple[float, float]:
    """The lowest and highest possible difference: -1 and 1 of rates, twice that of effects."""
    widest = max(1.0, float(np.ceil(np.abs(differences).max(initial=0.0))))
    return -widest, widest


def _pairs(one: npt.ArrayLike, two: npt.ArrayLike) -> tuple[Values, Values]:
    a, b = np.asarray(one, dtype=np.float64), np.asarray(two, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise UsageError(f"{a.size} and {b.size} items are not pairs; measure both sides on the same items")
    return a, b


def _binary(*sides: Values) -> bool:
    return all(bool(np.isin(side, (0.0, 1.0)).all()) for side in sides)
