"""The clock of `learn`: how long each step is expected to take on this machine, what it took, and when to stop it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..generation.engine import Engine, Request, Sampling, TokenEvent
from ..llama.rendering import RenderedPrompt
from .options import Sizes

STEPS = ("answers", "detect", "attribute", "tune", "confirm", "report")
"""The steps in their order."""

_LONGEST = 4.0  # seconds of decoding that a measurement takes at most
_DECODED = 16  # tokens of each answer that it looks at
_SCORED = 1.6  # cost of a token whose logits over the vocabulary are read, over one of a prompt
_MARGIN = 1.1  # expected times are promised
_TYPICAL = (
    0.7  # of the most draws and trials, what a run takes: most end early, as they are stable or have the most gain
)
_TEXT_OF_DRAW = 64  # tokens of neutral text that each draw of an attribution reads
_OVERHEAD = {"answers": 0.5, "detect": 1.0, "attribute": 1.0, "tune": 1.0, "confirm": 1.0, "report": 4.0}  # seconds


@dataclass(frozen=True)
class Speed:
    """Tokens per second of this model on this machine: `prompt` read in batches, `decode` of answers side by side."""

    prompt: float
    decode: float

    def to_dict(self) -> dict[str, float]:
        """As plain JSON values."""
        return {"prompt": round(self.prompt, 2), "decode": round(self.decode, 2)}


@dataclass(frozen=True)
class Work:
    """What a run has to do, from which the time follows: tokens of a prompt and of an answer, and numbers of items.

    `n_asked`: questions that the model answers twice. `generated`: held-out answers are generated, and so are those of
    the choice if `chosen_generated`; else two given answers are read.
    """

    prompt: float
    answer: float
    n_asked: int
    n_pairs: int
    n_choosing: int
    n_heldout: int
    generated: bool = False
    chosen_generated: bool = False


def measure_speed(
    engine: Engine, prompts: Sequence[RenderedPrompt], now: Callable[[], float] = time.monotonic
) -> Speed:
    """Measure both speeds on prompts, one for each slot of the engine; takes some seconds."""
    tokens = [prompt.tokens for prompt in prompts[: engine.n_slots]]
    greedy = Sampling(temperature=0)
    start = now()
    for _ in engine.generate(*(Request(one, sampling=greedy, max_tokens=1, routing=False) for one in tokens)):
        pass
    prompt = sum(map(len, tokens)) / max(now() - start, 1e-6)
    start, n = now(), 0
    events = engine.generate(*(Request(one, sampling=greedy, max_tokens=_DECODED, routing=False) for one in tokens))
    for _, event in events:
        n += isinstance(event, TokenEvent) and event.token >= 0
        if now() - start > _LONGEST:
            break
    events.close()
    engine.forget()
    return Speed(prompt, max(n, 1) / max(now() - start, 1e-6))


def expected_seconds(sizes: Sizes, work: Work, speed: Speed) -> dict[str, float]:
    """Seconds that each step is expected to take, with a margin."""
    pair = work.prompt + work.answer
    read = (work.prompt + 2 * _SCORED * work.answer) / speed.prompt
    written = work.prompt / speed.prompt + 0.8 * sizes.answer_tokens / speed.decode
    text = 2 * _SCORED * sizes.n_text / speed.prompt
    items = max(1, min(sizes.n_items, work.n_pairs) // 2)
    shortened = 2 * min(1.4 * sizes.item_words, work.answer)
    draws = 2 * sizes.draws * (items * shortened + _TEXT_OF_DRAW) * _SCORED / speed.prompt if sizes.n_candidates else 0
    seconds = {
        "answers": 2 * work.n_asked * written,
        "detect": 2 * work.n_pairs * pair / speed.prompt,
        "attribute": draws,
        "tune": sizes.n_trials * (text + work.n_choosing * (written if work.chosen_generated else read)),
        "confirm": 2 * text + (sizes.n_random + 4) * work.n_heldout * (written if work.generated else read),
        "report": 0.0,
    }
    overhead = {step: _OVERHEAD[step] if seconds[step] or step == "report" else 0.0 for step in STEPS}
    typical = {"attribute": _TYPICAL, "tune": _TYPICAL}
    return {step: _MARGIN * typical.get(step, 1.0) * seconds[step] + overhead[step] for step in STEPS}


class Clock:
    """Seconds that each step is `expected` to take, and has `spent`, those of earlier processes included.

    A step may take its own time and what the steps before it left over, less what they took too long, but half of its
    own in any case: a machine that became slower makes a run longer, not worse than it has to be.
    """

    def __init__(
        self,
        expected: Mapping[str, float] | None = None,
        spent: Mapping[str, float] | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self.expected = {step: float((expected or {}).get(step, 0.0)) for step in STEPS}
        self._spent = {step: float((spent or {}).get(step, 0.0)) for step in STEPS}
        self._now = now
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
        """Seconds that all steps are expected to take."""
        return sum(self.expected.values())

    def over(self, share: float = 1.0) -> bool:
        """Whether the current step has used up its time, or this share of it; never without an expectation."""
        if not self.total or not self._step:
            return False
        before = sum(self.expected[step] for step in STEPS[: STEPS.index(self._step)])
        own = share * self.expected[self._step]
        return self.elapsed > before + own and self._spent[self._step] > own / 2

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
        now = self._now()
        if self._step:
            self._spent[self._step] += now - self._since
        self._since = now
