"""How far the routing of a text leans to a side of an expert map."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .ranks import Scored, action_scores

Float64 = npt.NDArray[np.float64]

_CHUNK = 1024  # tokens; of a long prompt the table of all selections would take hundreds of MB


@dataclass(frozen=True, eq=False)
class RoutingLean:
    """Scores routing: the sum, over all experts, of a map's score times the share of the tokens that select the expert.

    `scores` float64 [n_layer, n_expert]. The last layer of the model counts nothing: it routes only the tokens whose
    logits are asked for, which are not the same in every computation of a text.
    """

    scores: Float64

    def __post_init__(self) -> None:
        """Copy the scores, without those of the last layer."""
        scores = np.array(self.scores, dtype=np.float64)
        if scores.ndim != 2 or not np.isfinite(scores).all():
            raise UsageError(f"scores of experts: not a table of finite numbers, but of shape {scores.shape}")
        scores[-1:] = 0
        scores += 0.0  # -0 and 0 are one
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)

    @classmethod
    def of_map(cls, expert_map: Scored, by: str = "rd") -> RoutingLean:
        """Take the scores of a map: "rd", or "effect", the significant effects of promoting less those of suppressing.

        Raises UsageError for a map without effects.
        """
        if by == "rd":
            return cls(expert_map.rd)
        promote, suppress = action_scores(expert_map, by)
        return cls(promote - suppress)

    def of_tokens(self, experts: npt.NDArray[np.int32]) -> Float64:
        """Score of each token. experts: int32 [n_tokens, n_layer, top_k], -1 where a layer did not route the token.

        Returns float64 [n_tokens]; the score of a span is their mean. A token's score is the same, to the bit, whatever
        it is asked for with.
        """
        layers = np.arange(len(self.scores))[None, :, None]
        scores = np.empty(len(experts))
        for start in range(0, len(experts), _CHUNK):
            part = experts[start : start + _CHUNK]
            of_slots = np.where(part < 0, 0.0, self.scores[layers, part.clip(0)])
            # one row of numbers a token, so that its sum does not depend on the tokens beside it
            scores[start : start + _CHUNK] = of_slots.reshape(len(part), -1).sum(axis=1)
        return scores

    def of_counts(self, counts: npt.NDArray[np.int64], n_tokens: int) -> float:
        """Score of a span of `n_tokens` by its selections, [n_layer, n_expert]."""
        return float((self.scores * counts).sum() / n_tokens)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the table of scores, in hex."""
        return hashlib.sha256(
            repr(self.scores.shape).encode() + np.ascontiguousarray(self.scores).tobytes()
        ).hexdigest()
