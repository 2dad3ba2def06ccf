"""Rules of a steering plan: where in a text a steering is in force, and under which condition.

One rule has two forms with the same fields: a line of text for people (plan_text.py) and an object for programs
(plan_objects.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from ..errors import UsageError

Phase = Literal["prompt", "thinking", "answer"]
Measure = Literal["routing", "entropy", "margin"]

PHASES: tuple[Phase, ...] = get_args(Phase)
EVERYWHERE = "all"
"""In place of a phase: all tokens, from the first of the prompt on."""
NONE = "none"
"""In place of a steering: nothing steers."""
BY = ("rd", "effect")
"""The scores of a map that a condition on routing can weigh the experts by."""
MAX_RULES = 64
MAX_RULE = 4096
"""Most characters of a rule in its text form."""
MAX_TOKENS = 1 << 31
MAX_LAST = 4096
"""Most tokens of an answer that a condition looks back to."""
MAX_TEXT = 1000
"""Most characters of the text of `after` or `until`."""


@dataclass(frozen=True)
class Condition:
    """What must hold for a rule to be in force.

    `measure` "routing": the mean, over the tokens of a span, of the sum of the map's scores `by` over the experts that
    a token selects (`RoutingLean`). The span is the prompt (`last` None) or the last `last` tokens of the reply; before
    there are so many the condition does not hold. "entropy" (nats) and "margin" (nats, the log-probability of the
    likeliest token less that of the second) are of the distribution that the token was drawn from. Just one of `below`
    and `above` is given. `map` is the name of the map as it was written.

    Raises UsageError.
    """

    measure: Measure
    below: float | None = None
    above: float | None = None
    map: str = ""
    by: str = "rd"
    last: int | None = None

    def __post_init__(self) -> None:
        """Check that the fields go together."""
        if self.measure not in get_args(Measure):
            raise UsageError(f"when: {self.measure!r} is none of {', '.join(get_args(Measure))}")
        if (self.below is None) == (self.above is None):
            raise UsageError("when: give one limit, below (<) or above (>)")
        if not math.isfinite(self.limit):
            raise UsageError(f"when: {self.limit} is no limit; give a finite number")
        if self.measure != "routing":
            if self.map or self.last is not None or self.by != "rd":
                raise UsageError(f"when {self.measure}: is of the next token alone; leave out the map and over")
            return
        if not self.map:
            raise UsageError("when: name the map whose experts are looked at, like when faithful < 0.1 over prompt")
        if self.by not in BY:
            raise UsageError(f"when {self.map} by {self.by}: give one of {', '.join(BY)}")
        if self.last is not None and not 1 <= self.last <= MAX_LAST:
            raise UsageError(f"when: over last {self.last}: give 1 to {MAX_LAST} tokens")

    @property
    def limit(self) -> float:
        """The number that is compared with."""
        limit = self.above if self.below is None else self.below
        assert limit is not None
        return limit

    @property
    def of_prompt(self) -> bool:
        """Whether it is decided once, when the prompt was read."""
        return self.measure == "routing" and self.last is None

    def holds(self, value: float) -> bool:
        """Whether a measured value is beyond the limit; NaN never is."""
        return value > self.above if self.below is None and self.above is not None else value < self.limit


@dataclass(frozen=True)
class Where:
    """The tokens of a text in which a rule can be in force.

    A token is steered where it is read: the logits that the answer's first token is drawn from are those of the
    prompt's last token, `prompt[-1:]`. `phase` None: all tokens. Of the tokens of the phase those are kept that come
    after the first appearance of the text or token `after`, and up to the first appearance of `until`, the token that
    completes it included. Of these, `start` to `stop` is a window as in a slice of Python (negative numbers: from the
    end, in the prompt alone), and of the window every `every`-th token, the first included.

    Raises UsageError.
    """

    phase: Phase | None = None
    start: int = 0
    stop: int | None = None
    after: str | int | None = None
    until: str | int | None = None
    every: int = 1
    when: Condition | None = None

    def __post_init__(self) -> None:
        """Check that the fields go together."""
        if self.phase is not None and self.phase not in PHASES:
            raise UsageError(f"{self.phase!r} is no phase; give {', '.join(PHASES)} or {EVERYWHERE}")
        place = self.phase or EVERYWHERE
        for number in (self.start, self.stop):
            if number is not None and abs(number) > MAX_TOKENS:
                raise UsageError(f"{place}[...]: {number} is no number of tokens")
            if number is not None and number < 0 and self.phase != "prompt":
                raise UsageError(
                    f"{place}[...]: {number} counts from the end, which only the prompt has; count from the start"
                )
        if self.stop is not None and self.stop <= self.start and (self.stop < 0) == (self.start < 0):
            raise UsageError(
                f"{place}[{self.start}:{self.stop}]: a window without tokens; the second number is its end"
            )
        if not 1 <= self.every <= MAX_TOKENS:
            raise UsageError(f"every {self.every}: give a whole number from 1 on")
        for name in ("after", "until"):
            mark = getattr(self, name)
            if mark == "" or (isinstance(mark, str) and len(mark) > MAX_TEXT):
                raise UsageError(f"{name}: give a text of 1 to {MAX_TEXT} characters, or a token like #123")
            if isinstance(mark, int) and not 0 <= mark < MAX_TOKENS:
                raise UsageError(f"{name} #{mark}: no number of a token")
        if self.when is not None and self.phase not in ("thinking", "answer"):
            raise UsageError(
                f"when: is known behind the prompt only, and {place} begins with it; "
                "let the rule begin with thinking or answer"
            )


@dataclass(frozen=True)
class RuleSpec:
    """A rule as it was written, before its names are looked up.

    `name` is the name or path of a map or bias file, None: nothing steers there. `choice` are the fields of a choice of
    experts (activate, deactivate, reverse, layers, preset, rank, mode, scale, weights, cap) as they are given.
    """

    where: Where
    name: str | None
    choice: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UsageError for a choice without something to choose from."""
        object.__setattr__(self, "choice", MappingProxyType(dict(self.choice)))
        if self.name is None and self.choice:
            raise UsageError(f"{NONE}: nothing steers there, so there is no {next(iter(self.choice))} to choose")
