"""The clock of `learn`: how long each step is expected to take on this machine, what it took, and when to stop it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .options import Sizes

STEPS = ("answers", "detect", "attribute", "tune", "confirm", "report")
"""The steps in their order."""

_MARGIN = 1.2  # expected times are promised
_BLOCK = 128  # draws after which an attribution may end, as its first experts are stable
_OF_MORE = 0.5  # of draws beyond these, what a run takes
_OF_TRIALS = 0.6  # of the most choices, what a search tries: a large gain ends it
_ALONE = 9  # steerings that confirm the effects of each action
_OVERHEAD = {"answers": 0.2, "detect": 0.8, "attribute": 0.4, "tune": 0.4, "confirm": 0.4, "report": 2.0}  # seconds


@dataclass(frozen=True)
class Speed:
    """Tokens per second of this model on this machine.

    `prompt`: read in batches; `decode`: written in answers side by side; `scored`: read, with the probability of the
    next token each; `text`: read under a steering, with the distribution of the next token compared with another one.
    """

    prompt: float
    decode: float
    scored: float
    text: float

    def to_dict(self) -> dict[str, float]:
        """As plain JSON values."""
        return {name: round(value, 2) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class Work:
    """What a run has to do, from which the time follows: mean numbers of tokens, and numbers of items.

    Attributes:
        prompt: tokens of a held-out prompt.
        answer: tokens of an answer of a pair.
        written: tokens of an answer that the model writes.
        n_asked: questions that the model answers twice.
        asked: tokens of such a question under an instruction.
        n_pairs, n_choosing, n_heldout: items of the parts.
        generated: held-out answers are written; else both answers of a pair are read.
        chosen_generated: so are those on which the numbers are chosen.
        text: tokens that are read of the neutral text under each steering.
        draw_text: tokens that each draw of an attribution reads of it.
    """

    prompt: float
    answer: float
    written: float
    n_asked: int
    n_pairs: int
    n_choosing: int
    n_heldout: int
    asked: float = 0.0
    generated: bool = False
    chosen_generated: bool = False
    text: float = 0.0
    draw_text: float = 0.0


@dataclass(frozen=True)
class Tokens:
    """Tokens that a step computes, by how: see `Speed`."""

    prompt: float = 0.0
    decode: float = 0.0
    scored: float = 0.0
    text: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """How long they take."""
        return float(sum(n / getattr(speed, how) for how, n in asdict(self).items()))

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(asdict(self).values()))


def expected_tokens(sizes: Sizes, work: Work) -> dict[str, Tokens]:
    """Tokens that each step on the model is expected to compute, in a run that no time ends and that works."""

    def answered(n: float, generated: bool) -> tuple[float, float, float]:
        """Of `n` held-out answers: written, or two given ones read behind one prompt."""
        return (n * work.prompt, n * work.written, 0.0) if generated else (n * work.prompt, 0.0, 2 * n * work.answer)

    items = max(1, min(sizes.n_items, work.n_pairs) // 2)
    both = 1 + 2 * min(1.4 * sizes.item_words, work.answer)  # the prompt's last token, and both answers
    draws = min(sizes.draws, _BLOCK + _OF_MORE * max(0, sizes.draws - _BLOCK))
    some = 2 if sizes.n_candidates else 0  # actions
    trials = _OF_TRIALS * sizes.n_trials
    chosen = answered((trials + 1) * work.n_choosing, work.chosen_generated)
    confirmed = answered((sizes.n_random + 4) * work.n_heldout, work.generated)
    return {
        "answers": Tokens(2 * work.n_asked * work.asked, 2 * work.n_asked * work.written),
        "detect": Tokens(work.n_pairs * (work.prompt + 2 * work.answer)),
        "attribute": Tokens(
            some * items * work.prompt,
            scored=some * (draws * (items * both + work.draw_text) + _ALONE * items * both),
        ),
        "tune": Tokens(*chosen, (2 * trials + 1) * work.text),  # each time under the unsteered model, too
        "confirm": Tokens(*confirmed, 2 * work.text),
    }


def expected_seconds(sizes: Sizes, work: Work, speed: Speed) -> dict[str, float]:
    """Seconds that each step is expected to take, with a margin."""
    tokens = expected_tokens(sizes, work)
    seconds = {step: tokens[step].seconds(speed) if step in tokens else 0.0 for step in STEPS}
    overhead = {step: _OVERHEAD[step] if seconds[step] or step == "report" else 0.0 for step in STEPS}
    return {step: _MARGIN * seconds[step] + overhead[step] for step in STEPS}


class Clock:
    """Seconds that each step is `expected` to take, and has `spent`, those of earlier processes included.

    `expected` is what was said; `foresee` tells it later, better numbers, which `foreseen` has.

    A step may take its own time, less what the steps before it took too long, but half of its own in any case: a
    machine that became slower makes a run longer, not worse than it has to be.
    """

    def __init__(
        self,
        expected: Mapping[str, float] | None = None,
        spent: Mapping[str, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.expected = {step: float((expected or {}).get(step, 0.0)) for step in STEPS}
        self._likely: dict[str, float] = {}
        self._spent = {step: float((spent or {}).get(step, 0.0)) for step in STEPS}
        self.now = now
        self._step = ""
        self._since = now()

    def begin(self, step: str) -> None:
        """Begin a step, and end the one before it; "" only ends."""
        self._settle()
        self._step = step

    @property
    def spent(self) -> dict[str, float]:
        """Seconds that each step has taken so far."""
        self._settle()
        return {step: round(seconds, 3) for step, seconds in self._spent.items()}

    @property
    def elapsed(self) -> float:
        """Seconds that all steps have taken so far."""
        self._settle()
        return sum(self._spent.values())

    @property
    def total(self) -> float:
        """Seconds that all steps are expected to take, as was said."""
        return sum(self.expected.values())

    def foresee(self, seconds: Mapping[str, float]) -> None:
        """Take numbers that are known better by now, of the steps that are not done; none is above what was said."""
        self._likely |= {step: min(value, self.expected[step]) for step, value in seconds.items()}

    @property
    def foreseen(self) -> float:
        """Seconds that all steps will take by what is known now: those that are done what they took."""
        self._settle()
        now = STEPS.index(self._step) if self._step else 0
        seconds = self._spent_before(now)
        for step in STEPS[now:]:
            likely = self._likely.get(step, self.expected[step])
            seconds += max(likely, self._spent[step]) if step == self._step else likely
        return min(self.total, seconds)

    def _spent_before(self, index: int) -> float:
        return sum(self._spent[step] for step in STEPS[:index])

    def over(self, share: float = 1.0) -> bool:
        """Whether the current step has used up its time, or this share of it; never without an expectation.

        What steps before it left over is kept for the last ones, which cannot be stopped.
        """
        if not self.total or not self._step:
            return False
        before = sum(self.expected[step] for step in STEPS[: STEPS.index(self._step)])
        own = share * self.expected[self._step]
        elapsed = self.elapsed  # settles what the current step has spent
        spent = self._spent[self._step]
        return spent > own or (elapsed > before + own and spent > own / 2)

    def to_dict(self) -> dict[str, Any]:
        """Expected and spent seconds, by step and in all."""
        expected = {step: round(seconds, 1) for step, seconds in self.expected.items()}
        spent = {step: round(seconds, 1) for step, seconds in self.spent.items()}
        return {
            "expected": expected,
            "spent": spent,
            "expected_total": round(self.total, 1),
            "spent_total": round(self.elapsed, 1),
        }

    def _settle(self) -> None:
        """Add the time since the last look to the current step."""
        now = self.now()
        if self._step:
            self._spent[self._step] += now - self._since
        self._since = now
