"""The objective of a search, its budget of side effects, and its search space."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

from ....errors import UsageError
from ....maps.expert_map import ExpertMap, parse_layers
from ....steering.steering import Steering
from ...measuring.measurements import Answer, Measurement, by_item
from ...measuring.side_effects import Fluency, fluency
from ...metrics.intervals import Values
from ...tasks.neutral_text import TextScore


def objective_values(measured: Measurement, reverse: bool = False) -> Values:
    """How far each item shows the side that is steered to, [n_items] in the task's order.

    The scorer's value, or 1 minus it with `reverse`; but 0 for an answer that is empty or ill-formed. Otherwise broken
    answers would count as the negative side.
    """

    def value(answer: Answer) -> float:
        broken = answer.label == "ill-formed" or answer.empty
        return 0.0 if broken else 1 - answer.value if reverse else answer.value

    return by_item(measured.answers, value)


def standard_error(values: Values) -> float:
    """The standard error of the mean of values [n]; 0 for a single one."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else 0.0


@dataclass(frozen=True)
class Budget:
    """Limits on the side effects of a steering, against the unsteered model; None: no limit.

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
        for name, limit in asdict(self).items():
            if limit is not None and not 0 <= limit < math.inf:
                raise UsageError(f"{name}: {limit} is not a limit; give a number from 0 up")
        if self.max_ppl_increase is None and self.max_kl is None:
            raise UsageError("a fluency budget is needed: give --max-ppl-increase, --max-kl or both")

    @property
    def wants_benign(self) -> bool:
        """Whether benign prompts have to be answered."""
        return self.max_refusal_increase is not None

    def check_guards(self, benign: object | None, neutral: object | None) -> None:
        """Raise UsageError if a limit cannot be measured."""
        if neutral is None:
            raise UsageError("a fluency budget needs a neutral text to predict; give one with --neutral FILE")
        if self.wants_benign and benign is None:
            raise UsageError("a limit on refusals needs benign prompts; give some with --benign FILE")

    def over_text(self, text: TextScore, base: TextScore) -> str:
        """The limit that the neutral text breaks, and by how much; "" for none."""
        ppl, kl = text_costs(text, base)
        if self.max_ppl_increase is not None and not ppl <= self.max_ppl_increase:
            return f"perplexity {ppl:+.1%}"
        if self.max_kl is not None and not kl <= self.max_kl:
            return f"KL {kl:.3g}"
        return ""

    def over_answers(self, measured: Measurement, unsteered: Measurement) -> str:
        """The limit that the answers break, and by how much; "" for none."""
        found, base = fluency(measured, unsteered), fluency(unsteered, unsteered)
        if self.max_refusal_increase is not None and found.refused and base.refused:
            more = found.refused.value - base.refused.value
            if more > self.max_refusal_increase:
                return f"refuses {more:+.0%} of the benign prompts"
        if self.max_looping_increase is not None and (more := found.looping - base.looping) > self.max_looping_increase:
            return f"{more:+.0%} of the answers loop"
        return ""

    def __str__(self) -> str:
        """Like "perplexity at most +5%, KL at most 0.1 nats"."""
        parts = (
            ("perplexity at most +{:.3g}%", self.max_ppl_increase, 100),
            ("KL at most {:.3g} nats", self.max_kl, 1),
            ("refusals of benign prompts at most +{:.3g} points", self.max_refusal_increase, 100),
            ("looping answers at most +{:.3g} points", self.max_looping_increase, 100),
        )
        return ", ".join(words.format(scale * limit) for words, limit, scale in parts if limit is not None)


def text_costs(text: TextScore, base: TextScore) -> tuple[float, float]:
    """(increase of the perplexity as a share of the unsteered one, KL in nats)."""
    return math.expm1(min(text.nll - base.nll, 700.0)), text.kl


def cost_of(found: Fluency, name: str) -> float | None:
    """The cost `name` ("ppl": increase of the perplexity as a share, "kl": nats); None where there was no text."""
    if name == "kl":
        return found.kl
    return None if found.perplexity_ratio is None else found.perplexity_ratio - 1


class SearchSpace(NamedTuple):
    """The numbers of experts that make different choices, each ascending from 0."""

    activate: tuple[int, ...]
    deactivate: tuple[int, ...]

    @property
    def n_choices(self) -> int:
        """How many choices there are, without the one that steers nothing."""
        return len(self.activate) * len(self.deactivate) - 1


def map_of(steering: Steering) -> ExpertMap:
    """The map to choose from. Raises UsageError for a bias file, whose choice is made."""
    if steering.expert_map is None:
        raise UsageError(f"{steering.name}: a bias file's choice of experts is made; give the map with --map MAP")
    return steering.expert_map


def search_space(steering: Steering) -> SearchSpace:
    """All numbers of experts that change the choice, and that the model can carry out.

    A number to activate changes nothing where it would only add an expert to a layer that has top-k promoted ones; see
    `ExpertMap.choose`. Raises UsageError for a bias file, ChoiceError for layers that are not there.
    """
    layers = None if steering.layers is None else parse_layers(steering.layers)
    return SearchSpace(*map_of(steering).numbers(reverse=steering.reverse, layers=layers, rank=steering.rank))
