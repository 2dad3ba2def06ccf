"""Ratios of times measured in the same rounds, and whether they meet a promise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

N_RESAMPLES = 4000
MAX_NOISE = 0.05


@dataclass(frozen=True)
class Ratio:
    """Median of a ratio over rounds, its 95% interval (percentile bootstrap of the median), and the extremes."""

    median: float
    low: float
    high: float
    min: float
    max: float
    n: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """Summarize the ratios of several rounds. Raises ValueError for none, or for one that is not positive."""
        values = sorted(ratios)
        if not values or not values[0] > 0:
            raise ValueError(f"ratios must be positive, got {values}")
        samples = np.random.default_rng(1).choice(values, (N_RESAMPLES, len(values)))
        low, high = np.percentile(np.median(samples, axis=1), (2.5, 97.5))
        return cls(
            statistics.median(values),
            float(low),
            float(high),
            values[0],
            values[-1],
            len(values),
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def speed_ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Speed of a variant over that of its reference, round by round: above 1 is faster than the reference."""
    return [theirs / ours for ours, theirs in zip(seconds, reference, strict=True)]


def noise_of(same: Ratio) -> float:
    """The largest distance from 1 in the interval of the reference against itself."""
    return max(abs(same.low - 1), abs(same.high - 1))


def verdict(ratio: Ratio, at_least: float, noise: float) -> str:
    """Whether a promise "at least" holds: "yes", "within noise" (not distinguishable from "yes"), "no", "too noisy".

    Within noise: the interval reaches the promised ratio, or misses it by no more than the noise.
    Too noisy: the reference against itself varies so much that only a "no" is certain.
    """
    if noise > MAX_NOISE and ratio.high + noise >= at_least:
        return "too noisy"
    if ratio.median >= at_least:
        return "yes"
    return "within noise" if ratio.high + noise >= at_least else "no"
