"""Estimates of effects from random interventions: arithmetic on arrays.

The response of a draw is regressed on which candidates it took. As these are drawn independently, the least-squares
coefficient of a candidate estimates its average effect over the draws' choices of the others, whether or not effects
add up (Freedman, Ann. Appl. Stat. 2, 2008; Lin, Ann. Appl. Stat. 7, 2013); it is a weighted Banzhaf value. How far they
add up is what R2 on held-out draws says. Linear surrogates of this kind: Ilyas et al., Datamodels, arXiv 2202.00622.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..maps.significance import p_values

FloatArray = npt.NDArray[np.float64]

DRAWS_A_CANDIDATE = 2
"""Draws that the regression needs for each candidate: with fewer the errors are no more than guesses."""
_FOLDS = 5
_BOOTSTRAPS = 400


@dataclass(frozen=True, eq=False)
class Estimates:
    """Effects of candidates: `effect` and its standard error `se`, float64 [n]; `p`, two-sided, uncorrected.

    `base` is the estimated response without any intervention. `r2` is the share of the variance of the response that
    is predicted on held-out draws; below 0 where the mean predicts better.
    """

    effect: FloatArray
    se: FloatArray
    p: FloatArray
    base: float
    r2: float


def least_draws(n_candidates: int) -> int:
    """The fewest draws that `estimate` takes."""
    return DRAWS_A_CANDIDATE * (n_candidates + 1)


def estimate(draws: npt.ArrayLike, response: npt.ArrayLike) -> Estimates:
    """Estimate effects by least squares, with errors that allow any variance of the residuals (HC3).

    `draws`: bool [n_draws, n_candidates], `response`: float64 [n_draws]. HC3: MacKinnon and White, J. Econometrics 29
    (1985). R2 is by five folds. Candidates that no draw took, or all draws did, have effect 0 and an error of infinity.

    Raises UsageError for fewer draws than `least_draws`.
    """
    x, y = np.asarray(draws, dtype=np.float64), np.asarray(response, dtype=np.float64)
    n, p = x.shape
    if n < least_draws(p):
        raise UsageError(f"draws: {n} are too few for {p} candidates; take at least {least_draws(p)}")
    known = (x != x[0]).any(axis=0)
    full = np.column_stack([np.ones(n), x[:, known]])
    inverse = np.linalg.pinv(full.T @ full)
    coefficients = inverse @ (full.T @ y)
    residual = y - full @ coefficients
    leverage = ((full @ inverse) * full).sum(axis=1)
    weighted = full * (residual / np.maximum(1 - leverage, 1e-12))[:, None]
    variance = np.diag(inverse @ (weighted.T @ weighted) @ inverse)
    effect, se = np.zeros(p), np.full(p, np.inf)
    effect[known], se[known] = coefficients[1:], np.sqrt(np.maximum(variance[1:], 0))
    n_free = n - full.shape[1]
    chance = np.ones(p)
    chance[known] = p_values(effect[known], se[known], n_free + 1)
    return Estimates(effect, se, chance, float(coefficients[0]), held_out_r2(full, y))


def held_out_r2(x: FloatArray, y: FloatArray) -> float:
    """1 - squared error over squared deviation of responses that were predicted from other draws, in five folds."""
    fold = np.arange(len(y)) % _FOLDS
    error = deviation = 0.0
    for held in range(_FOLDS):
        test, train = fold == held, fold != held
        coefficients = np.linalg.lstsq(x[train], y[train], rcond=None)[0]
        error += float(np.square(y[test] - x[test] @ coefficients).sum())
        deviation += float(np.square(y[test] - y[train].mean()).sum())
    return 1 - error / deviation if deviation else 0.0


def agreement(effect: FloatArray, se: FloatArray, first: int, seed: int = 0) -> float:
    """Share of the `first` experts by |effect| that two runs of as many draws are expected to have in common.

    By a parametric bootstrap: pairs of runs are drawn from normal distributions about the estimates, which are shrunk
    towards 0 first (James and Stein, positive part), as estimates spread more widely than what they estimate. Without
    it, runs that measure nothing but noise would seem to agree.
    """
    known = np.isfinite(se)
    spread = float(np.square(effect[known]).sum())
    kept = max(0.0, 1 - float(np.square(se[known]).sum()) / spread) if spread else 0.0
    error = np.where(known, se, np.abs(effect).max(initial=0.0))
    noise = np.random.default_rng(seed).standard_normal((2, _BOOTSTRAPS, len(effect)))
    order = np.argsort(-np.abs(kept * effect + noise * error), axis=-1, kind="stable")[..., :first]
    both = (order[0][:, :, None] == order[1][:, None, :]).any(axis=2)
    return float(both.mean())
