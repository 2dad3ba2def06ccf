"""Rules of a steering plan: where in a text a steering is in force, and under which condition.

One rule has two forms with the same fields: a line of text for people (plan_text.py) and an object for programs
(plan_objects.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

from .._util.json_text import quoted
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
MAX_TOKENS = 1 << 31
MAX_LAST = 4096
"""Most tokens of an answer that a condition looks back to."""
MAX_TEXT = 1000
"""Most characters of the text of `after` or `until`."""
MAX_EXPERTS = 999_999_999
"""The largest number of experts that a rule can name."""

CHOICE: dict[str, tuple[type, ...]] = {
    "activate": (int,),
    "deactivate": (int,),
    "reverse": (bool,),
    "layers": (str,),
    "preset": (str,),
    "rank": (str,),
    "mode": (str,),
    "scale": (int, float),
    "weights": (str,),
    "cap": (int, float),
}
"""What a rule can choose of a map, with the types of the values."""


def shown(value: object) -> str:
    """A value from outside for messages: short, its control characters escaped."""
    if isinstance(value, str):
        return quoted(value, 40)
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, (list, tuple)):
        return "a list"
    if isinstance(value, int) and value.bit_length() > 64:  # Python refuses to print very long ones
        return f"a whole number of {value.bit_length()} bits"
    return quoted(str(value), 40)[1:-1]


def is_of(value: object, types: tuple[type, ...]) -> bool:
    """Whether a value has one of these types; a truth value is no number."""
    return isinstance(value, types) and (type(value) is not bool or bool in types)


def is_finite(value: float) -> bool:
    """Whether a number is finite as a float; whole numbers can have any length."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _require_text(text: str, what: str, *, name: bool = False) -> None:
    """Raise UsageError for a text that no UTF-8 file holds, and for a name that is none."""
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(
                f"{what} {shown(text)}: half of a surrogate pair, which is no text; leave it out"
            ) from None
    if name and "\0" in text:
        raise UsageError(f"{what} {shown(text)}: a NUL character, which no name has; leave it out")


@dataclass(frozen=True)
class Condition:
    """What must hold for a rule to be in force.

    `measure` "routing": the mean, over the tokens of a span, of the sum of the map's scores `by` over the experts that
    a token selects (`RoutingLean`). The span is the prompt without its last token (`last` None), or the last `last`
    rows of the reply; before there are so many the condition does not hold. "entropy" (nats) and "margin" (nats, the
    log-probability of the likeliest token less that of the second) are of the distribution that the reply's last token
    was drawn from; before the first one the condition does not hold. Just one of `below` and `above` is given. `map` is
    the name of the map as it was written.

    Raises UsageError.
    """

    measure: Measure
    below: float | None = None
    above: float | None = None
    map: str = ""
    by: str = "rd"
    last: int | None = None

    def __post_init__(self) -> None:
        """Check that the fields go together; limits become floats."""
        if self.measure not in get_args(Measure):
            raise UsageError(f"when: {shown(self.measure)} is none of {', '.join(get_args(Measure))}")
        if (self.below is None) == (self.above is None):
            raise UsageError("when: give one limit, below (<) or above (>)")
        if not is_finite(self.limit):
            raise UsageError(f"when: {shown(self.limit)} is no limit; give a finite number")
        name = "above" if self.below is None else "below"
        object.__setattr__(self, name, float(self.limit) + 0.0)  # + 0: -0 and 0 are one
        if self.measure != "routing":
            if self.map or self.last is not None or self.by != "rd":
                raise UsageError(f"when {self.measure}: is of the next token alone; leave out the map and over")
            return
        if not self.map:
            raise UsageError("when: name the map whose experts are looked at, like when faithful < 0.1 over prompt")
        _require_text(self.map, "when", name=True)
        if self.by not in BY:
            raise UsageError(f"when {shown(self.map)} by {shown(self.by)}: give one of {', '.join(BY)}")
        if self.last is not None and not 1 <= self.last <= MAX_LAST:
            raise UsageError(f"when: over last {shown(self.last)}: give 1 to {MAX_LAST} tokens")

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

    A token of the reply is steered where it is drawn: while the token before it is computed, whose logits it is drawn
    from. So the prompt's last token is computed under the rule of the reply's first; the prompt's other tokens are
    steered where they are read, and the phase "prompt" has these. `phase` None: all tokens. Of the tokens of the phase
    those are kept that come behind the token which completes the first appearance of the text or token `after`, and up
    to the token, included, which completes the first appearance of `until` behind that. Of these, `start` to `stop` is
    a window as in a slice of Python (negative numbers: from the end, in the prompt alone), and of the window every
    `every`-th token, the first included.

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
            raise UsageError(f"{shown(self.phase)} is no phase; give {', '.join(PHASES)} or {EVERYWHERE}")
        place = self.phase or EVERYWHERE
        for number in (self.start, self.stop):
            if number is not None and abs(number) > MAX_TOKENS:
                raise UsageError(f"{place}[...]: {shown(number)} is no number of tokens; give at most {MAX_TOKENS}")
            if number is not None and number < 0 and self.phase != "prompt":
                raise UsageError(
                    f"{place}[...]: {number} counts from the end, which only the prompt has; count from the start"
                )
        ended = self.stop is not None and self.stop <= self.start and (self.stop < 0) == (self.start < 0)
        if ended or self.stop == 0:
            raise UsageError(
                f"{place}[{self.start}:{self.stop}]: a window without tokens; the second number is its end"
            )
        if not 1 <= self.every <= MAX_TOKENS:
            raise UsageError(f"every {shown(self.every)}: give a whole number from 1 on, at most {MAX_TOKENS}")
        for name in ("after", "until"):
            mark = getattr(self, name)
            if isinstance(mark, str):
                _require_text(mark, name)
                if not 1 <= len(mark) <= MAX_TEXT:
                    raise UsageError(f"{name}: give a text of 1 to {MAX_TEXT} characters, or a token like #123")
            elif mark is not None and not 0 <= mark < MAX_TOKENS:
                raise UsageError(f"{name} #{shown(mark)}: no number of a token")
        if self.when is not None and self.phase not in ("thinking", "answer"):
            raise UsageError(
                f"when: is known behind the prompt only, and {place} begins with it; "
                "let the rule begin with thinking or answer"
            )

    @property
    def nameless(self) -> Where:
        """The same without what a condition on routing calls its map and scores, which are to be told beside it."""
        if self.when is None or self.when.measure != "routing":
            return self
        return replace(self, when=replace(self.when, map="MAP", by="rd"))


@dataclass(frozen=True)
class RuleSpec:
    """A rule as it was written, before its names are looked up.

    `name` is the name or path of a map or bias file, None: nothing steers there. `choice` are the fields of a choice of
    experts (those of `CHOICE`) as they are given.
    """

    where: Where
    name: str | None
    choice: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the name and the types of the choice; what is None is left out. Raises UsageError."""
        given = {name: value for name, value in self.choice.items() if value is not None}
        object.__setattr__(self, "choice", MappingProxyType(given))
        if self.name is None and given:
            raise UsageError(f"{NONE}: nothing steers there, so there is no {next(iter(given))} to choose")
        if self.name is not None:
            _require_text(self.name, "map", name=True)
            if not self.name:
                raise UsageError(f"what steers there? give the name of a map, or {NONE}")
            if self.name == NONE:
                raise UsageError(f"a map called {NONE}: cannot be told from no steering; give its path, like ./{NONE}")
        for name, value in given.items():
            if name not in CHOICE:
                raise UsageError(f"{shown(name)}: nothing that a rule chooses; there are {', '.join(CHOICE)}")
            if not is_of(value, CHOICE[name]):
                raise UsageError(f"{name}: {shown(value)} is of the wrong type")
            if isinstance(value, str):
                _require_text(value, name)
                if not value:
                    raise UsageError(f"{name}: is empty; give it, or leave it out")
            elif name in ("activate", "deactivate") and not 0 <= value <= MAX_EXPERTS:
                raise UsageError(f"{name}: {shown(value)} is no number of experts")
            elif not is_finite(value) and (name != "cap" or value != math.inf):
                raise UsageError(f"{name}: {shown(value)} is no number of logits; give a finite one")
