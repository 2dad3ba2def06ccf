"""Builders of the behaviours: pairs of one prompt and two answers, and held-out prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MATERIAL = Path(__file__).resolve().parent / "material"
MAX_TARGET = 400  # characters


@dataclass(frozen=True)
class Built:
    """`pairs`: (prompt, positive answer, negative answer); `heldout`: fields of the held-out items."""

    pairs: list[tuple[str, str, str]]
    heldout: list[dict[str, Any]]


def lines(name: str) -> list[str]:
    """The lines of a file of the material that are neither empty nor a comment."""
    text = (MATERIAL / name).read_text("utf-8")
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#")]


def bank() -> list[list[str]]:
    """(question, short answer, sentence, further sentences, the sentence in German)."""
    return [line.split(" | ") for line in lines("bank.txt")]


def general_questions() -> list[str]:
    """Held-out questions of facts and of advice, in turn."""
    return [text for both in zip(lines("heldout-facts.txt"), lines("heldout-advice.txt"), strict=True) for text in both]


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
    pairs = [(question, german, sentence) for question, _, sentence, _, german in bank()]
    return Built(pairs, [{"prompt": text} for text in general_questions()[:104]])


BUILDERS: dict[str, Callable[[], Built]] = {"concise": concise, "german": german}
