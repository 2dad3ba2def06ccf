"""What was measured of one steering, and its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from ...steering.bias_file import BiasFile, none_if_empty
from ...steering.bias_plan import AnyBias, BiasPlan
from ..metrics.repetition import repetition
from ..tasks.neutral_text import TextScore
from ..tasks.tasks import Score
from .replies import Job, Reply

UNSTEERED = "unsteered"


def bias_key(bias: AnyBias | None) -> str:
    """The first 16 digits of the bias's key, as in records.jsonl; "unsteered" for None and one that changes nothing."""
    steering = none_if_empty(bias) if isinstance(bias, BiasFile) else bias
    return UNSTEERED if steering is None else steering.key[:16]


@dataclass(frozen=True)
class Answer:
    """An item's answer under one steering. `finish`: "stop", "length" (cut at max_tokens) or "context" (also cut).

    `distinct_2` and `loop` measure how much it repeats itself; see `repetition`. For choices, `text` is the chosen one.
    `n_steered` of its tokens, of all choices together, were drawn under a rule of a plan that steers; None: it was not
    measured under a plan, or by an earlier version.
    """

    item: str
    seed: int
    text: str
    value: float
    label: str
    finish: str
    n_tokens: int
    distinct_2: float
    loop: float
    n_steered: int | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Answer:
        """The answer in a line of records.jsonl."""
        found = {name: record[name] for name in cls.__dataclass_fields__ if name != "n_steered"}
        return cls(**found, n_steered=record.get("n_steered"))

    @property
    def empty(self) -> bool:
        """Whether there is nothing but white space."""
        return not self.text.strip()

    @property
    def cut(self) -> bool:
        """Whether it ended at max_tokens or the end of the context."""
        return self.finish in ("length", "context")


@dataclass(frozen=True, eq=False)
class Measurement:
    """What was measured under one steering: answers in the order of items and seeds, benign prompts, neutral text.

    `bias` was in force where the evaluator's settings place it, `conditional` if that depended on conditions.
    """

    bias: AnyBias | None
    key: str
    answers: tuple[Answer, ...]
    benign: tuple[Answer, ...] = ()
    text: TextScore | None = None
    conditional: bool = False

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """Value of each item, [n_items] in the task's order: the mean over its seeds."""
        return by_item(self.answers, attrgetter("value"))

    @property
    def benign_values(self) -> npt.NDArray[np.float64]:
        """Value of each benign prompt, [n_items]: how far it was refused."""
        return by_item(self.benign, attrgetter("value"))

    @property
    def rate(self) -> float:
        """Mean value of the items: how far the task's positive side is shown."""
        return float(self.values.mean())

    @property
    def n_experts(self) -> tuple[int, int]:
        """How many experts are promoted and suppressed."""
        return (0, 0) if self.bias is None else (self.bias.n_active, self.bias.n_inactive)

    def label_share(self, label: str) -> float:
        """Share of the answers with this label."""
        return float(np.mean([answer.label == label for answer in self.answers]))

    @property
    def steered(self) -> float | None:
        """Share of the answers in which a condition held; see `steered_share`."""
        return steered_share(self.answers) if self.conditional else None

    @property
    def benign_steered(self) -> float | None:
        """Share of the answers to benign prompts in which a condition held; see `steered_share`."""
        return steered_share(self.benign) if self.conditional else None


def steered_share(answers: Sequence[Answer]) -> float | None:
    """Share of answers with a token that was drawn under a rule that steers; None without any, or where one is unknown.

    A reply that ends at its first token has none.
    """
    counts = [answer.n_steered for answer in answers]
    known = [n > 0 for n in counts if n is not None]
    return float(np.mean(known)) if known and len(known) == len(counts) else None


def record_of(job: Job, reply: Reply, score: Score) -> dict[str, Any]:
    """A line of records.jsonl, from which `Answer.from_record` reads."""
    found = repetition(reply.tokens)
    text = max(reply.choices, key=lambda choice: choice.logprob).text if reply.choices else reply.text
    return {
        "id": job.id,
        "bias": job.id.partition("/")[0],
        "kind": "benign" if job.benign else "answer",
        "item": str(job.item.id),
        "seed": job.seed,
        "text": text,
        "value": score.value,
        "label": score.label,
        "finish": "stop" if reply.choices or reply.finish is None else reply.finish.reason,
        "n_tokens": len(reply.tokens),
        "distinct_2": found.distinct_2,
        "loop": found.loop,
        **({"n_steered": reply.n_steered} if isinstance(job.bias, BiasPlan) else {}),
        **({"choices": [[c.text, c.logprob, c.n_tokens] for c in reply.choices]} if reply.choices else {}),
    }


def by_item(answers: Sequence[Answer], value: Callable[[Answer], float]) -> npt.NDArray[np.float64]:
    """Mean of a value of the answers to each item, [n_items] in their order."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        values.setdefault(answer.item, []).append(value(answer))
    return np.array([np.mean(found) for found in values.values()], dtype=np.float64)
