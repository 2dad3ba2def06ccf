"""Pairs of the embedded model whose prompts differ, to fit conditions on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from steermoe_local import Message, Pair
from steermoe_local.models.embedded import behaviour
from steermoe_local.pairs.pairs import load_pairs

ANSWER = "done"


@cache
def prompts(name: str) -> tuple[str, ...]:
    """The different prompts of a behaviour's pairs."""
    sides = [pair.positive for pair in load_pairs(behaviour(name).pairs)]
    return tuple(dict.fromkeys(side[0].content for side in sides if not isinstance(side, str)))


def of_prompts(positive: Sequence[str], negative: Sequence[str]) -> list[Pair]:
    """A pair of each two prompts, all with the same reply."""

    def side(prompt: str) -> tuple[Message, Message]:
        return Message("user", prompt), Message("assistant", ANSWER)

    return [
        Pair(f"p{i}", side(one), side(two), ANSWER, ANSWER)
        for i, (one, two) in enumerate(zip(positive, negative, strict=True))
    ]


def kinds_of_prompts(n: int, first: int = 0) -> list[Pair]:
    """Questions about numbers on the positive sides, requests for secrets on the negative ones; n up to 49."""
    return of_prompts(prompts("digits-words")[first : first + n], prompts("refuse-comply")[first : first + n])


def alike(n: int, seed: int) -> list[Pair]:
    """Requests for secrets on both sides, at random; n up to 60."""
    drawn = random.Random(seed).sample(prompts("refuse-comply"), 2 * n)
    return of_prompts(drawn[:n], drawn[n:])
