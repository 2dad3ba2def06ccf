"""Ranks: the scores of a map by which experts can be chosen, each as a score for promoting and one for suppressing."""

from __future__ import annotations

from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from ..errors import ChoiceError, UsageError
from .effects import ATTRIBUTE, PROMOTE, SUPPRESS, Effects
from .scores import FloatArray, log_odds

Rank = Literal["rd", "log-odds", "logit", "weight", "effect", "efficiency"]
RANKS: tuple[Rank, ...] = get_args(Rank)
Weights = Literal["log-odds", "logit", "weight", "effect"]
WEIGHTS: tuple[Weights, ...] = get_args(Weights)
"""Scores by whose size the soft rule can weight experts."""
OBSERVED = RANKS[:4]
"""Ranks by what the router does on the pairs: one score for an expert, above 0 where the positive side uses it more."""


class Scored(Protocol):
    """The part of `ExpertMap` that is used here."""

    @property
    def rd(self) -> FloatArray: ...
    @property
    def a1(self) -> npt.NDArray[Any] | None: ...
    @property
    def a2(self) -> npt.NDArray[Any] | None: ...
    @property
    def n1(self) -> int: ...
    @property
    def n2(self) -> int: ...
    @property
    def logit(self) -> FloatArray | None: ...
    @property
    def weight(self) -> FloatArray | None: ...
    @property
    def effects(self) -> Effects | None: ...


def observed_score(expert_map: Scored, rank: str, what: str = "rank") -> FloatArray:
    """A score of `OBSERVED` as float64 [n_layer, n_expert]; 0 in layers without a router.

    Raises UsageError for a map that was made without it; `what` begins the message.
    """
    m = expert_map
    if rank == "rd":
        return m.rd
    if rank == "log-odds":
        if m.a1 is None or m.a2 is None:
            raise UsageError(f"{what} {rank}: the map has no counts (a1, a2); make it again with steermoe detect")
        return log_odds(m.a1, m.n1, m.a2, m.n2)
    table = m.logit if rank == "logit" else m.weight
    if table is None:
        raise UsageError(f"{what} {rank}: the map has no table {rank}; make it again with steermoe detect")
    return table


def require_effects(expert_map: Scored, what: str) -> Effects:
    """The map's effects, which `what` needs. Raises UsageError for a map without them; `what` begins the message."""
    if expert_map.effects is None:
        raise UsageError(f"{what}: the map has no effects; estimate them: {ATTRIBUTE}")
    return expert_map.effects


def action_scores(expert_map: Scored, rank: str) -> tuple[FloatArray, FloatArray]:
    """What promoting and what suppressing each expert is worth: two tables float64 [n_layer, n_expert].

    Above 0 steers towards the positive side, below 0 towards the negative one; 0 is not chosen. By an observed score
    suppressing is worth what promoting is, with the opposite sign. By `effect` and `efficiency` each action has its own
    estimate, and what is not significant, or was not tried, is 0; of an expert whose two actions both steer to one side
    the better is kept.

    Raises UsageError for an unknown rank, and for a map without the data.
    """
    if rank not in RANKS:
        raise UsageError(f"rank: {rank!r} is none of {', '.join(RANKS)}")
    if rank in OBSERVED:
        score = observed_score(expert_map, rank)
        return score, -score
    effects, shape = require_effects(expert_map, f"rank {rank}"), (expert_map.rd.shape[0], expert_map.rd.shape[1])
    if rank == "efficiency" and np.isnan(effects.cost).any():
        raise UsageError("rank efficiency: the map's effects have no costs; run steermoe attribute with a neutral text")

    def worth(action: int) -> FloatArray:
        significant = effects.table(action, "significant", shape) == 1
        return np.where(significant, effects.table(action, rank, shape), 0.0)

    promote, suppress = worth(PROMOTE), worth(SUPPRESS)
    both = np.sign(promote) * np.sign(suppress) > 0
    first = np.abs(promote) >= np.abs(suppress)
    return np.where(both & ~first, 0.0, promote), np.where(both & first, 0.0, suppress)


def ranks_of(expert_map: Scored) -> tuple[Rank, ...]:
    """The ranks whose data the map has."""
    m = expert_map
    there: dict[Rank, bool] = {
        "rd": True,
        "log-odds": m.a1 is not None and m.a2 is not None,
        "logit": m.logit is not None,
        "weight": m.weight is not None,
        "effect": m.effects is not None,
        "efficiency": m.effects is not None and not bool(np.isnan(m.effects.cost).any()),
    }
    return tuple(rank for rank in RANKS if there[rank])


def relative_sizes(expert_map: Scored, weights: str, signs: npt.NDArray[np.int8]) -> FloatArray:
    """|score| of each chosen expert over the largest of them, float64 [n_layer, n_expert] within [0, 1]; 0 elsewhere.

    `signs` [n_layer, n_expert] are +1, -1 or 0. By `effect` the score is that of the action which the sign stands for.

    Raises UsageError for unknown weights and a map without the data, ChoiceError where the action on a chosen expert
    was not tried, or all weights are 0.
    """
    if weights not in WEIGHTS:
        raise UsageError(f"weights: {weights!r} is none of {', '.join(WEIGHTS)}")
    if weights in OBSERVED:
        score = observed_score(expert_map, weights, "weights")
    else:
        effects, shape = require_effects(expert_map, f"weights {weights}"), (signs.shape[0], signs.shape[1])
        score = np.where(signs > 0, *(effects.table(action, "effect", shape) for action in (PROMOTE, SUPPRESS)))
    sizes = np.where(signs != 0, np.abs(score), 0.0)
    if np.isnan(sizes).any():
        layer, expert = np.argwhere(np.isnan(sizes))[0].tolist()
        action = "promoting" if signs[layer, expert] > 0 else "suppressing"
        raise ChoiceError(
            f"weights {weights}: {action} expert {expert} of layer {layer} was not tried, so its effect is not known; "
            "choose by rank effect, or fewer experts, or run steermoe attribute with more --candidates"
        )
    largest = sizes.max(initial=0.0)
    if not largest and signs.any():
        raise ChoiceError(f"weights {weights}: are 0 for every chosen expert, which would steer nothing; take others")
    return sizes / largest if largest else sizes
