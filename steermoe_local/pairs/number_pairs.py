"""Pairs of digits against words, made from a seed: the same small task, answered "3, 4, 5" and "three, four, five"."""

from __future__ import annotations

import random
from collections.abc import Iterator

from ..errors import UsageError
from .builders import chat_pair
from .pairs import Pair

_MAX_REPEATS = 2000  # tasks in a row that were there before: no more are to be expected
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
ONES, TENS = _WORDS.split()[:20], _WORDS.split()[20:]
_STEPS = {1: "", 2: " in steps of two", 5: " in steps of five", 10: " in steps of ten"}


def number_word(n: int) -> str:
    """A number from 0 to 9999 in English words, e.g. "three hundred and twelve"."""
    if not 0 <= n <= 9999:
        raise UsageError(f"{n}: not a number from 0 to 9999")
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{ONES[n % 10]}" if n % 10 else "")
    unit, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    joint = " and " if n % unit < 100 else " "
    return f"{number_word(n // unit)} {name}" + (joint + number_word(n % unit) if n % unit else "")


def number_pairs(*, seed: int = 0, largest: int = 100) -> Iterator[Pair]:
    """Small tasks answered in digits against words, with numbers up to `largest` (10 to 9999), until none is new."""
    if not 10 <= largest <= 9999:
        raise UsageError(f"largest number {largest}: not from 10 to 9999")
    draw = random.Random(seed)
    tasks = (_counting, _neighbour, _sum, _difference)
    prompts: set[str] = set()
    repeats = 0
    while repeats < _MAX_REPEATS:
        prompt, answer = draw.choice(tasks)(draw, largest)
        repeats += 1
        if prompt in prompts:
            continue
        repeats = 0
        prompts.add(prompt)
        digits, words = (", ".join(map(form, answer)) for form in (str, number_word))
        yield chat_pair(f"numbers-{len(prompts)}", prompt, digits, words)


def _counting(draw: random.Random, largest: int) -> tuple[str, list[int]]:
    step = draw.choice([step for step in _STEPS if step * 2 <= largest])
    length = draw.randint(3, min(8, largest // step + 1))
    first = draw.randint(0, largest - step * (length - 1))
    numbers = [first + step * i for i in range(length)]
    if draw.random() < 0.3:
        numbers.reverse()
    how = "Count" if numbers[0] < numbers[-1] else "Count down"
    return f"{how} from {number_word(numbers[0])} to {number_word(numbers[-1])}{_STEPS[step]}.", numbers


def _neighbour(draw: random.Random, largest: int) -> tuple[str, list[int]]:
    n = draw.randint(1, largest - 1)
    word, answer = draw.choice((("after", n + 1), ("before", n - 1)))
    return f"Which number comes {word} {number_word(n)}?", [answer]


def _sum(draw: random.Random, largest: int) -> tuple[str, list[int]]:
    a = draw.randint(0, largest)
    b = draw.randint(0, largest - a)
    return f"What is {number_word(a)} plus {number_word(b)}?", [a + b]


def _difference(draw: random.Random, largest: int) -> tuple[str, list[int]]:
    a = draw.randint(0, largest)
    b = draw.randint(0, a)
    return f"What is {number_word(a)} minus {number_word(b)}?", [a - b]
