"""What the builders share: what they build, and reading of the material."""

from __future__ import annotations

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


def asking_short(question: str) -> str:
    """The question with a request for a short answer."""
    return f"{question} Answer in one or two sentences."
