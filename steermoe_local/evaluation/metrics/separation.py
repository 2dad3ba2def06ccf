"""How well a score separates the two sides of pairs: the area under the ROC curve, and a threshold.

AUC is the probability that the score of a positive side is above that of a negative one, ties counting half (Mann and
Whitney, Ann. Math. Statist. 18, 1947). Strata are pairs whose scores can be compared, like those of one fold of a
cross-validation, which are scored by one map: only scores of one stratum are compared, and the AUC is the mean of the
strata's, weighted by their pairs.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ...errors import UsageError
from ...maps.significance import mean_ranks, t_quantile
from .intervals import Z95, Interval, wilson_bounds

Scores = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]

CLUSTERED = "clustered"
_ROUNDING = 1e-12


def auc(positive: Scores, negative: Scores) -> float:
    """AUC of the scores of some positive and some negative sides, both 1-dimensional and not empty."""
    return float(_placements(positive, negative).mean())


def auc_interval(scores: Scores, strata: Numbers, clusters: Numbers, swapped: Scores | None = None) -> Interval:
    """AUC of pairs' scores [n_pairs, 2], within strata, with its 95% interval over `clusters` of pairs.

    The variance is that of the placements, the shares of the other side that a score is above (DeLong, DeLong and
    Clarke-Pearson, Biometrics 44, 1988), summed within a cluster, so that both sides of a pair, and pairs that share a
    text, count as one observation (Obuchowski, Biometrics 53, 1997). The interval is Wilson's with the effective number
    of observations AUC (1 - AUC) / variance and Student's quantile, as that of a share in `crossed`. Where nothing
    varies it is Wilson's for as many observations as there are clusters.

    `swapped` are AUCs of the same pairs with sides swapped at random, for which all was computed anew. Scores by maps
    of the other folds depend on each other, which placements do not show, and these AUCs do: no more observations are
    counted than those of which a share of 1/2 varies as they do. Where the sides differ much that is too few.

    Raises UsageError for fewer than two clusters.
    """
    _, cluster = np.unique(clusters, return_inverse=True)
    n_clusters = int(cluster.max()) + 1
    if n_clusters < 2:
        raise UsageError("one pair has no spread to estimate an interval from; give at least two")
    value, deviations = 0.0, np.zeros(len(scores))
    for stratum in np.unique(strata):
        at = np.flatnonzero(strata == stratum)
        one, two = scores[at].T
        above = _placements(one, two)  # of the positive sides
        below = 1 - _placements(two, one)  # of the negative sides: the share that is above them
        area = float(above.mean())
        value += area * len(at) / len(scores)
        # a small stratum's mean is near its own placements
        deviations[at] = (above + below - 2 * area) * math.sqrt(len(at) / max(len(at) - 1, 1))
    of_clusters = np.bincount(cluster, weights=deviations)
    variance = float(np.square(of_clusters).sum()) / len(scores) ** 2
    seen = value * (1 - value)
    varies = variance > _ROUNDING and seen > _ROUNDING
    n = seen / variance if varies else float(n_clusters)
    if swapped is not None and (of_swapped := float(swapped.var())) > _ROUNDING:
        n = min(n, 0.25 / of_swapped)
    low, high = wilson_bounds(value, n, t_quantile(0.95, n_clusters - 1) if varies else Z95)
    return Interval(value, low, high, len(scores), CLUSTERED)


def best_threshold(scores: Scores) -> float | None:
    """The threshold between neighbouring scores that maximizes balanced accuracy, of pairs' scores [n_pairs, 2].

    Balanced accuracy is the mean of the shares of positive sides above and of negative sides below it. Of equally good
    thresholds that in the widest gap is taken, then the lowest. It is the middle of the gap, rounded to as few digits
    as keep it in the middle half. None where all scores are the same.
    """
    values = np.unique(scores)
    if len(values) < 2:
        return None
    below = [np.searchsorted(np.sort(side), values[:-1], side="right") for side in scores.T]  # scores up to a value
    correct = below[1] - below[0]  # balanced accuracy is 1/2 + this / (2 n_pairs)
    gaps = np.where(correct == correct.max(), np.diff(values), -1.0)
    at = int(np.argmax(gaps))
    low, high = float(values[at]), float(values[at + 1])
    middle = low + (high - low) / 2
    rounded = (float(f"{middle:.{digits}g}") for digits in range(1, 18))
    return next((value for value in rounded if abs(value - middle) <= (high - low) / 4), middle)


def _placements(one: Scores, other: Scores) -> Scores:
    """Of each score of `one`, the share of `other` that it is above; ties count half."""
    ranks = mean_ranks(np.concatenate([one, other]))[: len(one)]
    return (ranks - mean_ranks(one)) / len(other)
