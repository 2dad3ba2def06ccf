"""Confidence intervals of shares over items x draws, where both are samples: crossed, not independent, observations.

The variance of the mean of a table [n_items, n_draws] is estimated with items and draws as two crossed clusters:
V = V_items + V_draws - V_cells, each the squared standard error as if only these were sampled (Cameron, Gelbach and
Miller, J. Business & Economic Statistics 29 (2011) 238). A share gets Wilson's interval with the effective number of
observations p (1 - p) / V and Student's quantile (Korn and Graubard, Survey Methodology 24 (1998) 193; Dean and Pagano,
J. Survey Statistics and Methodology 3 (2015) 484), at Satterthwaite's degrees of freedom.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...maps.significance import t_quantile
from .intervals import Z95, Interval, wilson_bounds

CROSSED = "crossed"
_ROUNDING = 1e-12


class _Parts(NamedTuple):
    """A variance of a mean and its degrees of freedom."""

    variance: float
    freedom: float


def crossed_share(values: npt.ArrayLike) -> Interval:
    """The mean of values from 0 to 1 of each item under each draw, [n_items, n_draws], over both; `n` counts items.

    Where nothing varies (all are kept, or all lost), how alike draws and items are cannot be seen: the interval is
    Wilson's for as many observations as there are items, or draws, whichever are fewer. A table of one row (or column)
    is a sample of draws (items) alone. Raises UsageError for an empty table, or values outside 0 to 1.
    """
    table = _table(values)
    if table.min() < 0 or table.max() > 1:
        raise UsageError("a share is of values from 0 to 1")
    p = float(table.mean())
    parts = _parts(table)
    seen = p * (1 - p)
    if parts.variance <= _ROUNDING or seen <= _ROUNDING:
        n, z = float(min((side for side in table.shape if side > 1), default=1)), Z95
    else:
        n, z = seen / parts.variance, _student(parts.freedom)
        if np.isin(table, (0, 1)).all():
            # a small table can vary so little by chance that it would count for more than its values
            n = min(n, float(table.size))
    low, high = wilson_bounds(p, n, z)
    return Interval(p, low, high, table.shape[0], CROSSED)


def crossed_difference(one: npt.ArrayLike, two: npt.ArrayLike, *, same_items: bool = False) -> Interval:
    """mean(one) - mean(two) of values from 0 to 1, [n_items, n_draws] each, under the same draws; `n` counts items.

    `same_items`: rows are the same items as well, else two independent samples of them. Where neither varies, and for a
    difference that all draws and items share, the intervals of both are combined as in Newcombe's method, without
    correlation. Raises UsageError for tables of other draws or items.
    """
    a, b = _table(one), _table(two)
    if a.shape[1] != b.shape[1] or (same_items and a.shape != b.shape):
        raise UsageError(f"tables of {a.shape} and {b.shape} are not of the same draws; measure both under them")
    value = float(a.mean() - b.mean())
    if same_items:
        parts = _parts(a - b)
    else:
        draws = _of_means(a.mean(axis=0) - b.mean(axis=0))
        items = [_of_means(table.mean(axis=1)) for table in (a, b)]
        # what is no sample of items, as a text is none, counts its cells once
        cells = sum(_of_cells(table) for table in (a, b) if min(table.shape) > 1)
        parts = _joined([draws, *items], cells)
    if parts.variance <= _ROUNDING:
        first, second = crossed_share(a), crossed_share(b)
        below = math.hypot(first.value - first.low, second.high - second.value)
        above = math.hypot(first.high - first.value, second.value - second.low)
    else:
        below = above = _student(parts.freedom) * math.sqrt(parts.variance)
    return Interval(value, max(-1.0, value - below), min(1.0, value + above), a.shape[0], CROSSED)


def _table(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all():
        raise UsageError("an interval needs a finite value for each item under each draw, of one at least")
    return table


def _parts(table: npt.NDArray[np.float64]) -> _Parts:
    """The variance of the mean, over rows and columns."""
    sides = [_of_means(table.mean(axis=axis)) for axis in (0, 1)]
    return _joined(sides, _of_cells(table) if min(table.shape) > 1 else 0.0)


def _joined(samples: list[_Parts], cells: float) -> _Parts:
    """The sum of variances of samples, less what all of them count (the cells), never below the largest of them."""
    total = sum(part.variance for part in samples)
    if total <= _ROUNDING:
        return _Parts(cells, math.inf)
    freedom = total * total / sum(part.variance**2 / part.freedom for part in samples if part.variance)
    return _Parts(max(total - cells, *(part.variance for part in samples), cells), freedom)


def _of_means(means: npt.NDArray[np.float64]) -> _Parts:
    n = means.size
    return _Parts(float(means.var(ddof=1)) / n, n - 1.0) if n > 1 else _Parts(0.0, 1.0)


def _of_cells(table: npt.NDArray[np.float64]) -> float:
    return float(table.var()) / (table.size - 1) if table.size > 1 else 0.0


def _student(freedom: float) -> float:
    """Student's quantile of a two-sided 95% interval; below 3 degrees of freedom that of the whole number below."""
    return t_quantile(0.95, freedom if freedom >= 3 else math.floor(freedom))
