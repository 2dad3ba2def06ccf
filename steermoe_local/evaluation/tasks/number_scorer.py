"""The scorer of numbers in digits against numbers in words."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from ...pairs.prompts import PromptItem
from .tasks import ILL_FORMED, Score, Scorer, asked

_MAX_CHARACTERS = 20_000
_UNITS = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_LARGE = "hundred thousand million billion trillion"
_WORD = "(?:" + "|".join(f"{_UNITS} {_TEENS} {_TENS} {_LARGE}".split()) + ")"
# "twenty-three" and "two hundred and five" are one number each
_IN_WORDS = re.compile(rf"\b{_WORD}(?:(?:-|\s+(?:and\s+)?){_WORD})*\b", re.IGNORECASE)
# not the digits of names: B12, COVID-19, H2O
_IN_DIGITS = re.compile(r"(?<![A-Za-z0-9])(?<![A-Za-z]-)[0-9]+(?:[.,:][0-9]+)*")
_LIST_MARK = re.compile(r"^[ \t]*[0-9]+[.)][ \t]+(?=\S)", re.MULTILINE)
# "one" that counts nothing: "the one that", "one of them", "no one"
_PRONOUN = re.compile(
    r"\b(?:the|this|that|each|every|any|no|some|which|another|other|first|last|next|only)\s+one\b"
    r"|\bone\s+(?:of|another|can|cannot|could|may|might|must|should|would|day)\b|\bone['\u2019]s\b",
    re.IGNORECASE,
)
# a year that only says when: "in 1969", "as of 2023", "since 1990"
_YEAR = re.compile(r"\b(?:in|of|since|until|before|after|by|during|year)\s+(?:1[0-9]{3}|20[0-9]{2})\b", re.IGNORECASE)


def numbers_in(text: str) -> tuple[int, int]:
    """How many numbers a text has in digits, and how many in words (English).

    The marks of a numbered list do not count ("1. ...", on two lines at least), nor does "one" where it counts nothing.
    """
    digits, words = _forms(text)
    return len(digits), len(words)


def _forms(text: str) -> tuple[list[str], list[str]]:
    """The numbers of a text in digits, and those in words, in lower case with single blanks."""
    marks = _LIST_MARK.findall(text)
    digits = _IN_DIGITS.findall(_LIST_MARK.sub("", text) if len(marks) > 1 else text)
    words = [" ".join(found.lower().split()) for found in _IN_WORDS.findall(_PRONOUN.sub(" ", text))]
    return digits, words


def _without(found: list[str], known: list[str]) -> list[str]:
    """What of `found` is not in `known`, each as often as it stands there."""
    return list((Counter(found) - Counter(known)).elements())


@dataclass(frozen=True)
class DigitsOrWords(Scorer):
    """1 if most numbers of the answer are in digits, 0 if most are in words; neither is ill-formed.

    Numbers that the question has in the same form are an echo of it and do not count, nor do years that only say when;
    where nothing else is in the answer, they count.
    """

    def score(self, item: PromptItem, text: str) -> Score:
        text = text[:_MAX_CHARACTERS]
        question = _forms(asked(item)[:_MAX_CHARACTERS])
        whole = _forms(text)
        dated = _forms(_YEAR.sub(" ", text))
        for forms in (dated, whole):
            own = tuple(_without(found, known) for found, known in zip(forms, question, strict=True))
            if any(own):
                return _majority(len(own[0]), len(own[1]))
        return _majority(len(whole[0]), len(whole[1]))


def _majority(digits: int, words: int) -> Score:
    if digits == words:
        return Score(0.0, ILL_FORMED)
    return Score(1.0, "digits") if digits > words else Score(0.0, "words")
