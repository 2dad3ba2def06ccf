"""The design of the interventions: candidates, and the random draws of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..identity import ModelIdentity
from ..maps.effects import ACTIONS, PROMOTE
from ..maps.expert_map import ExpertMap
from ..maps.scores import rank

RATE = 0.12
_SHARE_OF_SLOTS = 0.25  # most of a layer's top-k slots that a draw may expect to promote


@dataclass(frozen=True, eq=False)
class Candidates:
    """Experts whose effects are estimated: int64 [n, 2], rows (layer, expert); `control`: drawn at random, bool [n]."""

    experts: npt.NDArray[np.int64]
    control: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.experts)


def choose_candidates(expert_map: ExpertMap, layers: list[int], n: int, seed: int) -> Candidates:
    """The first `n` experts by |RD| in `layers`, and as many others at random, or all the others if there are fewer.

    Raises UsageError when `n` is not from 1 to the number of experts.
    """
    ranked = rank(expert_map.rd, layers)
    if not 1 <= n <= len(ranked):
        raise UsageError(f"candidates: {n} is not from 1 to the {len(ranked)} experts that can be steered")
    rest = ranked[n:]
    drawn = np.random.default_rng([seed, 0]).permutation(len(rest))[:n]
    controls = rest[np.sort(drawn)]
    return Candidates(
        np.concatenate([ranked[:n], controls]),
        np.arange(n + len(controls)) >= n,
    )


@dataclass(frozen=True, eq=False)
class Design:
    """Random draws of one action: each candidate is taken with probability `rate`, independently.

    A layer takes at most what the action allows there (top-k promoted experts; top-k experts that are not suppressed);
    a draw beyond it loses some of them at random.
    """

    action: str
    candidates: Candidates
    identity: ModelIdentity
    rate: float
    seed: int

    def draws(self, block: int, n: int) -> npt.NDArray[np.bool_]:
        """Draws of a block, bool [n, n_candidates]; the same for every call."""
        rng = np.random.default_rng([self.seed, 1 + list(ACTIONS).index(self.action), block])
        taken = rng.random((n, len(self.candidates))) < self.rate
        order = rng.random(taken.shape)  # who loses its place in a full layer
        most = self.identity.max_active if ACTIONS[self.action] == PROMOTE else self.identity.max_inactive
        layer = self.candidates.experts[:, 0]
        for of in np.unique(layer):
            mine = layer == of
            places = np.where(taken[:, mine], order[:, mine], np.inf).argsort(axis=1).argsort(axis=1)
            taken[:, mine] &= places < most
        return taken

    def signs(self, draw: npt.NDArray[np.bool_]) -> npt.NDArray[np.int8]:
        """The choice of a draw, int8 [n_layer, n_expert]."""
        signs = np.zeros(self.identity.shape, dtype=np.int8)
        signs[tuple(self.candidates.experts[draw].T)] = ACTIONS[self.action]
        return signs


def default_rate(action: str, candidates: Candidates, identity: ModelIdentity) -> float:
    """`RATE`; less for promoting where a layer has many candidates, so that draws seldom fill its top-k slots."""
    most = int(np.bincount(candidates.experts[:, 0]).max())
    if ACTIONS[action] == PROMOTE:
        return min(RATE, _SHARE_OF_SLOTS * identity.max_active / most)
    return min(RATE, _SHARE_OF_SLOTS * identity.max_inactive / most)
