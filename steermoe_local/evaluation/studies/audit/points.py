"""What was measured under the draws of one rate, as a point of an audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....pairs.prompts import PromptItem
from ...measuring.measurements import Answer, Measurement
from ...measuring.side_effects import LOOPING
from ...metrics.crossed import crossed_difference
from .perturbations import Plan
from .results import Kept, Point

SHOWN = 0.5
"""An item shows a behaviour if its value, the mean over its seeds, is at least this."""

Mask = npt.NDArray[np.bool_]
Table = npt.NDArray[np.float64]
"""1 where an item shows the behaviour under a draw, 0 where it does not, [n_items, n_draws]."""
Key = tuple[str, float, tuple[int, ...] | None]
"""An action, its rate, and the block of layers that it is restricted to; None: all."""


@dataclass(frozen=True)
class Shown:
    """Which items of the task, and of the unrelated one, showed it on the unsteered base."""

    behaviour: Mask
    unrelated: Mask

    @classmethod
    def of(cls, measured: Measurement) -> Shown:
        return cls(_shows(measured.values), _shows(measured.benign_values))


def point(plan: Plan, key: Key, draws: Sequence[Measurement], unsteered: Measurement, shown: Shown) -> Point:
    """What the draws of a key keep of `shown`; the text is compared with this model `unsteered`."""
    action, rate, block = key
    kept, others = table(draws, shown.behaviour), table(draws, ~shown.behaviour)
    unrelated = text = gap = text_gap = kl = ratio = None
    if shown.unrelated.any():
        other = np.stack([_shows(found.benign_values)[shown.unrelated] for found in draws], axis=1)
        unrelated, gap = Kept.of(other), crossed_difference(kept, other)
    scores = [found.text for found in draws if found.text is not None]
    if scores and unsteered.text is not None:
        tokens = np.array([[score.same_top for score in scores]])
        text, text_gap = Kept.of(tokens), crossed_difference(kept, tokens)
        kl = float(np.mean([score.kl for score in scores]))
        ratio = float(np.exp(np.mean([score.nll for score in scores]) - unsteered.text.nll))
    return Point(
        action=action,
        rate=rate,
        layers=plan.layers if block is None else block,
        n_experts=max(sum(found.n_experts) for found in draws),
        behaviour=Kept.of(kept),
        gained=float(others.mean()) if others.size else None,
        shown=float(np.mean([_shows(found.values).mean() for found in draws])),
        broken=float(np.mean([_broken(answer) for found in draws for answer in found.answers])),
        unrelated=unrelated,
        text=text,
        kl=kl,
        perplexity_ratio=ratio,
        gap=gap,
        text_gap=text_gap,
    )


def table(draws: Sequence[Measurement], items: Mask) -> Table:
    """What the masked items show under each draw."""
    return np.stack([_shows(found.values)[items] for found in draws], axis=1).astype(np.float64)


def ids(items: Sequence[PromptItem], mask: Mask) -> tuple[str, ...]:
    """The ids of the masked items, as texts."""
    return tuple(str(item.id) for item, there in zip(items, mask, strict=True) if there)


def _shows(values: npt.NDArray[np.float64]) -> Mask:
    return values >= SHOWN


def _broken(answer: Answer) -> bool:
    return answer.label == "ill-formed" or answer.empty or answer.loop >= LOOPING
