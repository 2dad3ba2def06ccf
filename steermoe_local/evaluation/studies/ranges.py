"""Lists of numbers as a person writes them: `0,5,10`, `0..200:20`, `hard,2,4`."""

from __future__ import annotations

import math
import re

from ...errors import UsageError

__all__ = ["MOST", "parse_numbers", "parse_strengths"]

MOST = 10_000
"""Most numbers that a list may come to."""

_NUMBER = r"[0-9]{1,9}"
_RANGE = re.compile(rf"({_NUMBER})(?:\.\.({_NUMBER})(?::({_NUMBER}))?)?")


def parse_numbers(text: str, what: str = "numbers") -> tuple[int, ...]:
    """Whole numbers from 0 up, each once, in the order in which they stand: "0,5" or "0..200:20".

    `a..b:step` goes from a to b, b included if a step ends there; `a..b` goes by 1. Parts stand between commas.

    Raises UsageError; `what` begins its message.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"{what}: {part.strip()!r} in {text!r} is not like 5 or 0..200:20")
        first, last, step = (int(group) if group else None for group in match.groups())
        assert first is not None  # the pattern has it
        if step == 0:
            raise UsageError(f"{what}: {part.strip()!r}: a step of 0 never ends; give 1 or more")
        if last is not None and last < first:
            raise UsageError(f"{what}: {part.strip()!r} is empty; write the smaller number first")
        numbers = range(first, (first if last is None else last) + 1, step or 1)
        if len(found) + len(numbers) > MOST:
            raise UsageError(f"{what}: {text!r} are more than {MOST} numbers; take larger steps")
        found.update(dict.fromkeys(numbers))
    return tuple(found)


def parse_strengths(text: str, what: str = "strength") -> tuple[float | None, ...]:
    """Strengths in their order, each once: `hard` is the hard rule (None), numbers are logits of the soft rule.

    Raises UsageError; `what` begins its message.
    """
    found: dict[float | None, None] = {}
    for part in (part.strip() for part in text.split(",")):
        if part == "hard":
            found[None] = None
            continue
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not part.isascii() or "_" in part:
            raise UsageError(f"{what}: {part!r} in {text!r} is neither `hard` nor a number of logits like 2.5")
        if number == 0:
            raise UsageError(f"{what}: a strength of 0 steers nothing; leave it out")
        found[number] = None
    return tuple(found)
