"""Decides whether a steering works, by the values of the held-out items under it and under its controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..evaluation.metrics.intervals import Interval, difference, margin, rate

Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Confirmed:
    """What the held-out items say. Rates are 0 to 1 with 95% intervals; `gain` is steered less unsteered.

    `random` and `shuffled` are mean gains of random experts (of `n_random` draws) and of a map of shuffled pairs, taken
    both ways round, as either way of swapping a half of the pairs is as good; None where there was none.
    `above_random` and `above_shuffled` are how much larger the gain is, `n_below` how many draws of random experts have
    a smaller gain. `perplexity` is the increase of the perplexity of neutral text, as a share, `kl` in nats a token.
    `by_margin` are the unsteered and the steered share of held-out pairs whose positive answer is the likelier one,
    where the items are scored otherwise; the verdict does not depend on them. `problem` says why it did not work, "" if
    it did.
    """

    unsteered: Interval
    steered: Interval
    gain: Interval
    random: float
    n_random: int
    n_below: int
    above_random: Interval
    shuffled: float | None
    above_shuffled: Interval | None
    perplexity: float
    kl: float
    problem: str = ""
    by_margin: tuple[Interval, Interval] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Confirmed:
        """Rebuild it from `to_dict`."""
        names = ("unsteered", "steered", "gain", "above_random", "above_shuffled")
        intervals = {name: None if data[name] is None else Interval(**data[name]) for name in names}
        both = data.get("by_margin")
        return cls(**{**data, **intervals, "by_margin": both and tuple(Interval(**one) for one in both)})


def judge(
    unsteered: Values,
    steered: Values,
    random: Sequence[Values],
    shuffled: Sequence[Values],
    *,
    perplexity: float,
    kl: float,
    max_ppl_increase: float,
    seed: int = 0,
) -> Confirmed:
    """Judge values [n_items] of the same items: unsteered, steered, each draw of random experts, shuffled both ways."""
    gain = difference(steered, unsteered, seed)
    gains = steered - unsteered
    random_gains = np.array([values - unsteered for values in random])
    by_item = random_gains.mean(axis=0)
    above_random = margin(gains - by_item, gain, difference(by_item + unsteered, unsteered, seed), seed)
    n_below = int((random_gains.mean(axis=1) < gain.value - 1e-12).sum())
    shuffled_gain: float | None = None
    above_shuffled: Interval | None = None
    if len(shuffled):
        mean = np.array([values - unsteered for values in shuffled]).mean(axis=0)
        shuffled_gain = float(mean.mean())
        above_shuffled = margin(gains - mean, gain, difference(mean + unsteered, unsteered, seed), seed)
    problem = ""
    if gain.low <= 0:
        problem = f"on held-out items the gain is {_points(gain)}, which may be none"
    elif above_random.low <= 0 or n_below < len(random):
        problem = (
            f"random experts do as much: the gain is {100 * gain.value:+.0f} points, {n_below} of {len(random)} draws "
            f"of as many random experts stay below it (their mean: {100 * by_item.mean():+.0f})"
        )
    elif above_shuffled is not None and above_shuffled.low <= 0:
        problem = (
            f"a map of shuffled pairs does as much: {100 * (shuffled_gain or 0):+.0f} points, where the real one has "
            f"{100 * gain.value:+.0f}"
        )
    elif perplexity > max_ppl_increase:
        problem = f"the perplexity of neutral text rises by {perplexity:.1%}, more than {max_ppl_increase:.0%}"
    return Confirmed(
        unsteered=rate(unsteered, seed),
        steered=rate(steered, seed),
        gain=gain,
        random=float(by_item.mean()),
        n_random=len(random),
        n_below=n_below,
        above_random=above_random,
        shuffled=shuffled_gain,
        above_shuffled=above_shuffled,
        perplexity=perplexity,
        kl=kl,
        problem=problem,
    )


def _points(found: Interval) -> str:
    return f"{100 * found.value:+.0f} points ({100 * found.low:+.0f} to {100 * found.high:+.0f})"
