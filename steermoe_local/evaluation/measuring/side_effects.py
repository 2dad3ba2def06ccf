"""Side effects of a steering: what it does to text that it should leave alone, and to the form of answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..metrics.intervals import Interval, rate
from .measurements import Measurement

LOOPING = 0.5
"""An answer loops when at least this share of its tokens is one stretch that repeats itself."""


@dataclass(frozen=True)
class Fluency:
    """Side effects of one steering.

    On the neutral text, None where there is none: `perplexity`, `perplexity_ratio` to the unsteered model, `kl` (mean
    KL(unsteered || steered) in nats), `same_top` (share of tokens with the same likeliest token). Of the task's
    answers: mean `distinct_2`, `longest_loop` (largest share of an answer that repeats itself), and the shares that are
    `looping`, `empty`, `cut` (at max_tokens), or `ill_formed` (on neither side). `refused`: the share
    of benign prompts that were refused, None where there are none.
    """

    perplexity: float | None
    perplexity_ratio: float | None
    kl: float | None
    same_top: float | None
    distinct_2: float
    longest_loop: float
    looping: float
    empty: float
    cut: float
    ill_formed: float
    refused: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def fluency(measured: Measurement, unsteered: Measurement) -> Fluency:
    """Side effects of a measured steering, compared with the unsteered model."""
    text, base = measured.text, unsteered.text
    return Fluency(
        perplexity=None if text is None else text.perplexity,
        perplexity_ratio=None if text is None or base is None else float(np.exp(text.nll - base.nll)),
        kl=None if text is None else text.kl,
        same_top=None if text is None else text.same_top,
        distinct_2=float(np.mean([answer.distinct_2 for answer in measured.answers])),
        longest_loop=max(answer.loop for answer in measured.answers),
        looping=_share([answer.loop >= LOOPING for answer in measured.answers]),
        empty=_share([answer.empty for answer in measured.answers]),
        cut=_share([answer.cut for answer in measured.answers]),
        ill_formed=measured.label_share("ill-formed"),
        refused=rate(measured.benign_values) if measured.benign else None,
    )


def _share(found: Sequence[bool]) -> float:
    return sum(found) / len(found)
