"""Formats figures for sentences and tables."""

from __future__ import annotations

import math

from .intervals import Interval


def percent(share: float | None) -> str:
    """Like "62%", "-" for None."""
    return "-" if share is None else f"{share:.0%}"


def draws_below(share: float) -> str:
    """A share of draws in percent; "100%" only if it is all of them."""
    return percent(share) if share >= 1 or round(share, 2) < 1 else f"{math.floor(1000 * share) / 10}%"


def signed(share: float) -> str:
    """A difference of shares in points, like "+62"."""
    return f"{100 * share + 0.0:+.0f}"


def in_points(share: float) -> str:
    """Like "5 points"."""
    return f"{100 * share:.0f} points"


def points(effect: Interval) -> str:
    """Like "+62 (+48 to +74)"."""
    return f"{signed(effect.value)} ({signed(effect.low)} to {signed(effect.high)})"


def number(value: float | None, digits: int) -> str:
    """With `digits` digits after the point, "-" for None."""
    return "-" if value is None else f"{value:.{digits}f}"
