"""Builders of the behaviours: pairs of one prompt and two answers, and held-out prompts."""

from __future__ import annotations

from collections.abc import Callable

from common import MAX_TARGET, Built, asking_short, bank, general_questions, lines
from fact_pairs import document
from number_pairs import digits, steps
from record_pairs import json_or_prose
from style_pairs import formal, hedged, in_role


def concise() -> Built:
    pairs = []
    for index, (question, short, sentence, more, _) in enumerate(bank()):
        # the short side is a few words or one sentence
        positive = short if index % 3 or len(sentence) > 90 else sentence
        negative = f"{sentence} {more}"
        pairs.append((question, positive, negative if len(negative) <= MAX_TARGET else more))
    heldout = [{"prompt": text} for text in lines("heldout-facts.txt")]
    heldout += [{"prompt": text, "limit": 25} for text in lines("heldout-advice.txt")[:45]]
    return Built(pairs, heldout)


def german() -> Built:
    pairs = [
        (asking_short(question) if index % 2 else question, german, sentence)
        for index, (question, _, sentence, _, german) in enumerate(bank())
    ]
    return Built(pairs, [{"prompt": asking_short(text)} for text in general_questions()[:104]])


BUILDERS: dict[str, Callable[[], Built]] = {
    "concise": concise,
    "formal": formal,
    "digits": digits,
    "json": json_or_prose,
    "german": german,
    "step-by-step": steps,
    "hedged": hedged,
    "document": document,
    "in-role": in_role,
}
