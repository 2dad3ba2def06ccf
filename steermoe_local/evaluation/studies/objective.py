"""What a search wants, and what it may cost: the gain of a steering, and a budget of fluency."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..._util.files import timestamp, tool_name
from ...errors import UsageError
from ..measuring.measurements import Answer, Measurement
from ..measuring.side_effects import Fluency, fluency
from ..tasks.neutral_text import TextScore

if TYPE_CHECKING:
    from ...steering.steering import Steering
    from ..measuring.evaluator import Evaluator

__all__ = ["Budget", "Space", "Values", "aimed_values", "cost_of", "facts", "space", "standard_error", "text_costs"]

Values = npt.NDArray[np.float64]


def aimed_values(measured: Measurement, reverse: bool = False) -> Values:
    """How far each item shows the side that is steered to, [n_items] in the task's order.

    The scorer's value, or 1 minus it with `reverse`; but 0 for an answer that is empty or ill-formed. Otherwise a model
    that only stammers would count as steered away from everything.
    """
    found: dict[str, list[float]] = {}
    for answer in measured.answers:
        value = 1 - answer.value if reverse else answer.value
        found.setdefault(answer.item, []).append(0.0 if _broken(answer) else value)
    return np.array([np.mean(values) for values in found.values()], dtype=np.float64)


def _broken(answer: Answer) -> bool:
    return answer.label == "ill-formed" or answer.empty


def standard_error(values: Values) -> float:
    """Of the mean of values [n]; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0


@dataclass(frozen=True)
class Budget:
    """What a steering may cost at most, against the unsteered model; None: not looked at.

    On the neutral text: `max_ppl_increase` of the perplexity (0.05 is 5%) and `max_kl` in nats. Of the answers:
    `max_refusal_increase` is the share of benign prompts refused beyond those that the unsteered model refuses, and
    `max_looping_increase` the same of answers that loop.

    Raises UsageError without a limit on the text, and for limits that are no numbers from 0 up.
    """

    max_ppl_increase: float | None = None
    max_kl: float | None = None
    max_refusal_increase: float | None = None
    max_looping_increase: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        for name, limit in asdict(self).items():
            if limit is not None and not 0 <= limit < math.inf:
                raise UsageError(f"{name}: {limit} is not a limit; give a number from 0 up")
        if self.max_ppl_increase is None and self.max_kl is None:
            raise UsageError("a fluency budget is needed: give --max-ppl-increase, --max-kl or both")

    @property
    def wants_benign(self) -> bool:
        """Must benign prompts be answered?"""
        return self.max_refusal_increase is not None

    def check_guards(self, benign: object | None, neutral: object | None) -> None:
        """Raise UsageError if there is nothing to measure a limit by."""
        if neutral is None:
            raise UsageError("a fluency budget needs a neutral text to predict; give one with --neutral FILE")
        if self.wants_benign and benign is None:
            raise UsageError("a limit on refusals needs benign prompts; give some with --benign FILE")

    def over_text(self, text: TextScore, base: TextScore) -> str:
        """Why the neutral text is outside of the budget, "" if it is inside."""
        ppl, kl = text_costs(text, base)
        if self.max_ppl_increase is not None and not ppl <= self.max_ppl_increase:
            return f"perplexity {ppl:+.1%}"
        if self.max_kl is not None and not kl <= self.max_kl:
            return f"KL {kl:.3g}"
        return ""

    def over_answers(self, measured: Measurement, unsteered: Measurement) -> str:
        """Why the answers are outside of the budget, "" if they are inside."""
        found, base = fluency(measured, unsteered), fluency(unsteered, unsteered)
        if self.max_refusal_increase is not None and found.refused and base.refused:
            more = found.refused.value - base.refused.value
            if more > self.max_refusal_increase:
                return f"refuses {more:+.0%} of the benign prompts"
        if self.max_looping_increase is not None and (more := found.looping - base.looping) > self.max_looping_increase:
            return f"{more:+.0%} of the answers loop"
        return ""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        """Like "perplexity at most +5%, KL at most 0.1"."""
        parts = {
            "perplexity at most +{:.3g}%": None if self.max_ppl_increase is None else 100 * self.max_ppl_increase,
            "KL at most {:.3g} nats": self.max_kl,
            "refusals of benign prompts at most +{:.3g} points": _points(self.max_refusal_increase),
            "looping answers at most +{:.3g} points": _points(self.max_looping_increase),
        }
        return ", ".join(words.format(value) for words, value in parts.items() if value is not None)


def _points(share: float | None) -> float | None:
    return None if share is None else 100 * share


def text_costs(text: TextScore, base: TextScore) -> tuple[float, float]:
    """(increase of the perplexity as a share of the unsteered one, KL in nats)."""
    return math.expm1(min(text.nll - base.nll, 700.0)), text.kl


def cost_of(found: Fluency, name: str) -> float | None:
    """The cost `name` ("ppl": increase of the perplexity as a share, "kl": nats); None where there was no text."""
    if name == "kl":
        return found.kl
    return None if found.perplexity_ratio is None else found.perplexity_ratio - 1


class Space(NamedTuple):
    """The numbers of experts that make different choices, each ascending from 0."""

    activate: tuple[int, ...]
    deactivate: tuple[int, ...]

    @property
    def n_choices(self) -> int:
        """How many choices that steer something the whole grid has."""
        return len(self.activate) * len(self.deactivate) - 1


def space(steering: Steering) -> Space:
    """All numbers that are worth a look: those that change the choice, and that the model can carry out.

    A number to activate changes nothing where it would only add an expert to a layer that has top-k promoted ones; see
    `ExpertMap.choose`. Raises UsageError for a bias file, whose choice is made; ChoiceError for layers that are not
    there.
    """
    from ...maps.expert_map import parse_layers

    made = steering.expert_map
    if made is None:
        raise UsageError(f"{steering.name}: a bias file's choice of experts is made; give the map with --map MAP")
    layers = None if steering.layers is None else list(parse_layers(steering.layers))
    return Space(*made.numbers(reverse=steering.reverse, layers=layers))


def facts(evaluator: Evaluator, steering: Steering) -> dict[str, Any]:
    """Where a result comes from: model, map, task and settings, tool and date, as plain JSON values."""
    made = steering.expert_map
    source: Mapping[str, Any] = {} if made is None else {"map_sha256": made.sha256, "behaviour": made.behaviour}
    return {
        "model": evaluator.identity.to_dict(),
        **evaluator.metadata,
        "steering": {
            "name": steering.name,
            **source,
            "side": steering.side,
            "reverse": steering.reverse,
            "layers": steering.layers,
            "scale": steering.scale,
        },
        "positive": evaluator.task.positive,
        "negative": evaluator.task.negative,
        "n_items": len(evaluator.task.items),
        "settings": evaluator.settings,
        "tool": tool_name(),
        "created": timestamp(),
    }
