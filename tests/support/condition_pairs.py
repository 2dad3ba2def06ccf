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
    """Questions about numbers on the positive sides, requests for secrets on the negative ones; first + n up to 120."""
    return of_prompts(prompts("digits-words")[first : first + n], prompts("refuse-comply")[first : first + n])


def alike(n: int, seed: int) -> list[Pair]:
    """Requests for secrets on both sides, at random; n up to 60."""
    drawn = random.Random(seed).sample(prompts("refuse-comply"), 2 * n)
    return of_prompts(drawn[:n], drawn[n:])


def facts(seed: int = 0) -> list[tuple[str, str]]:
    """(document, question) of prompts with a document, in a random order."""
    found = [tuple(prompt.split(" Question: ")) for prompt in prompts("document-memory")]
    random.Random(seed).shuffle(found)
    return [(document, question) for document, question in found]


def with_and_without_documents() -> list[Pair]:
    """A question with its document, and without."""
    half = facts()[:60]
    return of_prompts(
        [f"{text} Question: {asked}" for text, asked in half], [f"Question: {asked}" for _, asked in half]
    )


def right_and_wrong_documents() -> list[Pair]:
    """A question below the document that answers it, and below another one, which stands in this pair alone."""
    asked, others = facts()[:60], facts()[60:]
    return of_prompts(
        [f"{text} Question: {question}" for text, question in asked],
        [f"{other} Question: {question}" for (_, question), (other, _) in zip(asked, others, strict=True)],
    )


def two_facts_and_one() -> list[Pair]:
    """A question below a document of two facts, and another one below a document of one."""
    long = [f"{text} Question: {asked}" for text, asked in facts() if text.count("The ") > 1]
    short = [f"{text} Question: {asked}" for text, asked in facts() if text.count("The ") == 1]
    n = min(len(long), len(short))
    return of_prompts(long[:n], short[:n])
