"""How far two computations of one graph may lie apart by rounding alone.

Another batch size, another CPU or another kernel adds the same terms in another order, with or without fused
multiply-add. The allowances here follow from number formats and sizes, not from what a machine showed:

- Rounding to a format with unit roundoff u is off by at most u of the value, u / sqrt(3) in the mean square.
- A sum of n products in F32 rounds every partial sum. The k-th of terms of random sign is sqrt(k) of them large, so the
  mean-square error is u sqrt(n / 6) of the sum. This is the order one by one; a kernel with several partial sums is
  better, and ggml's sum in F32 or in more.
- Weights or a cache in F16 have ggml round the other factor to F16, too. Two computations that differ a little round
  some elements to neighbours; at worst all of them independently, each by u / sqrt(3).
- Errors of different steps are independent: squares add. A layer has at most `STEPS` steps in a row: norm; Q, K and V;
  scores; softmax; mixture of V; projection; norm; gate and up; down; mixture of the experts.
- A step passes on the relative error of its input and does not magnify it: norms take away the scale, and branches add
  to what they came from. A router does, where experts all but tie: a test must not have such ties, or count them.
- Two computations differ by sqrt(2) of one's error. Of a normal distribution, 2e-9 lies beyond `SIGMAS`.

The error is relative to the spread of the logits over the vocabulary, by which the same number is the allowance of
logits; that of log-probabilities is sqrt(2) larger, as the sum over all logits is off as much as each of them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

F16, F32 = 2.0**-11, 2.0**-24  # unit roundoff
STEPS = 10
SIGMAS = 6.0

TINY = {"n_layer": 5, "n_sum": 256}  # the embedded model


def logits(values: Any, n_layer: int, n_sum: int, stored: float = F32, summed: float = F32) -> float:
    """Largest difference of two computations of these logits (or log-probabilities), [..., vocabulary].

    `n_sum` is the largest number of products in one sum. `stored` is the unit roundoff of what the graph keeps or
    rounds factors to: F16 with weights or a cache in F16. `summed` is that of partial sums: a device may keep them in
    F16, too.
    """
    variance = np.asarray(values, np.float64).var(axis=-1).mean()
    step = summed * math.sqrt(n_sum / 6)
    if stored > F32:
        step = math.hypot(step, stored / math.sqrt(3))
    return float(SIGMAS * step * math.sqrt(2 * (STEPS * n_layer + 1) * variance))


def logprobs(values: Any, n_layer: int, n_sum: int, stored: float = F32) -> float:
    """`logits` for log-probabilities."""
    return math.sqrt(2) * logits(values, n_layer, n_sum, stored)


def kl(value: float, logprob: float) -> float:
    """Allowance of a Kullback-Leibler divergence of this `value`, with that of its log-probabilities.

    The mean of log p - log q under p: both move by `logprob`, and so does each p as a share of itself, with weight
    |log p - log q|, whose mean is below value + 2 / e.
    """
    return logprob * (2 + abs(value) + 2 / math.e)
