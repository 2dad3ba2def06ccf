"""Scorers of an answer's form: digits or words, a side of the embedded model's behaviours, a refusal."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import FormatError
from ...models.embedded import behaviours, score_reply
from ...pairs.prompts import PromptItem
from .matching import ILL_FORMED, one_of, texts_of, where
from .refusals import is_refusal
from .tasks import Score, Scorer

__all__ = ["DigitsOrWords", "Refusal", "Sides", "numbers_in"]

_UNITS = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_LARGE = "hundred thousand million billion trillion"
_WORD = "(?:" + "|".join(f"{_UNITS} {_TEENS} {_TENS} {_LARGE}".split()) + ")"
# "twenty-three" and "two hundred and five" are one number each
_IN_WORDS = re.compile(rf"\b{_WORD}(?:(?:-|\s+(?:and\s+)?){_WORD})*\b", re.IGNORECASE)
_IN_DIGITS = re.compile(r"(?<![A-Za-z])[0-9]+(?:[.,:][0-9]+)*")
_LIST_MARK = re.compile(r"^[ \t]*[0-9]+[.)][ \t]+(?=\S)", re.MULTILINE)
# "one" that counts nothing: "the one that", "one of them", "no one"
_PRONOUN = re.compile(
    r"\b(?:the|this|that|each|every|any|no|some|which|another|other|first|last|next|only)\s+one\b"
    r"|\bone\s+(?:of|another|can|could|may|might|must|should|would|day)\b|\bone['\u2019]s\b",
    re.IGNORECASE,
)


def numbers_in(text: str) -> tuple[int, int]:
    """How many numbers a text has in digits, and how many in words (English).

    The marks of a numbered list do not count ("1. ...", on two lines at least), nor is "one" where it counts nothing.
    """
    marks = _LIST_MARK.findall(text)
    digits = len(_IN_DIGITS.findall(_LIST_MARK.sub("", text) if len(marks) > 1 else text))
    return digits, len(_IN_WORDS.findall(_PRONOUN.sub(" ", text)))


@dataclass(frozen=True)
class DigitsOrWords(Scorer):
    """1 if most numbers of the answer are in digits, 0 if most are in words; neither is ill-formed."""

    def score(self, item: PromptItem, text: str) -> Score:
        digits, words = numbers_in(text)
        if digits == words:
            return Score(0.0, ILL_FORMED)
        return Score(1.0, "digits") if digits > words else Score(0.0, "words")


@dataclass(frozen=True)
class Sides(Scorer):
    """Which side of one of the embedded model's behaviours an answer shows (`embedded.score_reply`).

    `behaviour`: the behaviour whose other forms of reply also count, besides the item's `positive` and `negative`; "":
    none.
    """

    behaviour: str = ""

    def __post_init__(self) -> None:
        one_of("behaviour", self.behaviour, ("", *(known.name for known in behaviours())))

    def check(self, item: PromptItem) -> None:
        for name in ("positive", "negative"):
            if len(texts_of(item, name, needed=True)) > 1:
                raise FormatError(f"{where(item)}: {name}: a list; write one text")

    def score(self, item: PromptItem, text: str) -> Score:
        positive, negative = (texts_of(item, name, needed=True)[0] for name in ("positive", "negative"))
        label, _ = score_reply(self.behaviour, text, positive, negative)
        return Score(float(label == "positive"), label)


@dataclass(frozen=True)
class Refusal(Scorer):
    """1 if the answer is a refusal by the rules of `refusals`; an empty one is ill-formed."""

    def score(self, item: PromptItem, text: str) -> Score:
        if not text.strip():
            return Score(0.0, ILL_FORMED)
        return Score(1.0, "refused") if is_refusal(text) else Score(0.0, "complied")
