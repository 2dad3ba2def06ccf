"""What kind of answer a short text is, and its words in one spelling, so that two answers can be compared.

Both follow plain rules for English; in other languages most answers are a name, a word, a phrase or a longer text.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

from .number_pairs import ONES, TENS

_MONTHS = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_FILLERS = frozenset(("a", "an", "the", "of", "in", "on", "at", "to", "for", "by", "and"))
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_IRREGULAR = {"first": 1, "second": 2, "third": 3, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
_CARDINALS = {word: n for n, word in enumerate(ONES)} | {word: 10 * n for n, word in enumerate(TENS, 2)}
_NUMBERS = (
    _CARDINALS
    | {f"{word}th": n for word, n in _CARDINALS.items()}
    | {f"{word[:-1]}ieth": n for word, n in _CARDINALS.items() if word.endswith("y")}
    | _IRREGULAR
)
_SHORT = {month[:3]: month for month in _MONTHS} | {day[:3]: day for day in _DAYS} | {"sept": "september"}
# the letters behind an ordinal number; a number with its point and its thousands' commas; a sign for a word; letters
_TOKEN = re.compile(r"(?<=\d)(?:st|nd|rd|th)\b|\d{1,3}(?:,\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|[%$€£¥]|[^\W\d_]+")
_ACCENTS = re.compile("[\u0300-\u036f]+")
_ORDINAL = frozenset(("st", "nd", "rd", "th"))
_SIGNS = {"%": "percent", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_MONEY = frozenset((*_SIGNS.values(), "cent", "rupee", "franc")) - {"percent"}
_LONGEST_PART = 5  # number words: three hundred and five thousand, six
_MOST_DIGITS = 18  # longer ones are compared as they are written
_SMALL = _FILLERS | {"de", "la", "le", "du", "van", "von", "der", "den", "y", "&"}

_OPENING = "\"'(\u201c\u2018"

_YEAR = re.compile(r"(?:(?:in|about|around|circa|c\.)\s+)?(?:1[0-9]{3}|20[0-9]{2})(?:'?s)?", re.IGNORECASE | re.ASCII)
_DATED = re.compile(rf"\b(?:{'|'.join(name.capitalize() for name in (*_MONTHS, *_DAYS))})s?\b")
_COUNTED = re.compile(r"\bhow (?:many|much)\b", re.IGNORECASE)
_ASKED = re.compile(r"\b(who|whom|whose|where)\b", re.IGNORECASE)

KINDS = (
    "yes or no",
    "year",
    "date",
    "percentage",
    "amount of money",
    "number",
    "quantity",
    "name of somebody",
    "name of a place",
    "name",
    "word",
    "phrase",
    "longer text",
)
"""The kinds of `answer_kind`, in the order in which they are tried."""
NAMES = frozenset(kind for kind in KINDS if kind.startswith("name"))


def answer_kind(answer: str, question: str) -> str:
    """One of `KINDS`, the first that fits.

    A year is one from 1000 to 2099, unless the question asks how many; a date names a month or a day of the week; a
    percentage and an amount of money hold a number; a quantity begins with a number, which a number is alone. In a name
    every word begins with a capital letter or a digit, small ones such as "of" left out; the question's who or where
    tells whose it is. A phrase has two to four words.
    """
    words = canonical_words(answer)
    numbers = [word for word in words if _is_number(word)]
    if words in (["yes"], ["no"]):
        return "yes or no"
    if _YEAR.fullmatch(answer) and not _COUNTED.search(question):
        return "year"
    if _DATED.search(answer):
        return "date"
    if numbers and ("percent" in words or words[-2:] == ["per", "cent"]):
        return "percentage"
    if numbers and not _MONEY.isdisjoint(words):
        return "amount of money"
    if numbers and words[0] == numbers[0]:
        return "number" if len(numbers) == len(words) else "quantity"
    written = answer.split()
    large = [word for word in written if word.lower() not in _SMALL]
    if large and all(word.lstrip(_OPENING)[:1].isupper() or word[:1].isdigit() for word in large):
        asked = _ASKED.search(question)
        if asked is None:
            return "name"
        return "name of a place" if asked[1].lower() == "where" else "name of somebody"
    return "word" if len(written) == 1 else "phrase" if len(written) <= 4 else "longer text"


def canonical_words(text: str, *, parts: bool = False) -> list[str]:
    """The words of a text in one spelling: "The 2nd of Sept., 1,200 cats" is ["2", "september", "1200", "cat"].

    Letters lose case and accents. Numbers are written in digits, also those in words, which are put together ("two
    hundred and five" is "205"); with `parts`, the numbers that they are made of stand behind them. Articles and words
    such as "of" are left out, unless nothing else is there; so is a plural's "s". Months and days are written in full.
    """
    folded = _ACCENTS.sub("", unicodedata.normalize("NFKD", text)).casefold().replace("per cent", "percent")
    together = _with_parts if parts else _together
    words: list[str] = []
    run: list[_Number] = []  # number words and numbers in a row
    for match in _TOKEN.finditer(folded):
        if match[0] in _ORDINAL and folded[match.start() - 1 : match.start()].isdecimal():
            continue
        number = _number(match[0])
        if number is None and match[0] == "and" and run and run[-1].joins:
            continue  # two hundred and five
        if number is None:
            words += [*together(run), _spelled(match[0])]
            run = []
        else:
            run.append(number)
    words += together(run)
    return [word for word in words if word not in _FILLERS] or words


@dataclass(frozen=True)
class _Number:
    """A number of a text. A `scale` is a hundred, a thousand, ...; other number words have their size in `word`."""

    text: str
    value: int | Fraction | None = None
    scale: bool = False
    word: bool = False

    @property
    def joins(self) -> bool:
        """Whether a smaller number word behind it may belong to it, as in "twenty one" and "two hundred five"."""
        return self.scale or (self.word and self.value in range(20, 100))


def _number(token: str) -> _Number | None:
    if token in _SCALES:
        return _Number(str(_SCALES[token]), _SCALES[token], scale=True)
    if token in _NUMBERS:
        return _Number(str(_NUMBERS[token]), _NUMBERS[token], word=True)
    if not _is_number(token):
        return None
    plain = token.replace(",", "")
    if len(plain) > _MOST_DIGITS:
        return _Number(plain)
    value = Fraction(plain) if "." in plain else int(plain)
    return _Number(str(value), value)


def _spelled(token: str) -> str:
    token = _SIGNS.get(token, token)
    if len(token) > 3 and token.endswith("s") and not token.endswith("ss"):
        token = token[:-1]
    return _SHORT.get(token, token)


def _is_number(word: str) -> bool:
    return word[:1].isdecimal()


def _with_parts(run: list[_Number]) -> list[str]:
    """The numbers of a run and of its parts: in "two million and three million", three million is one of them."""
    if not any(number.word or number.scale for number in run):
        return [number.text for number in run]
    lengths = range(1, min(_LONGEST_PART, len(run) - 1) + 1)
    parts = (_together(run[at : at + n]) for n in lengths for at in range(len(run) - n + 1))
    return list(chain(_together(run), *parts))


def _together(run: list[_Number]) -> list[str]:
    """The numbers that a run means: two, hundred, five are 205, and 3, 4 are two numbers."""
    found: list[str] = []
    total: int | Fraction = 0  # of the thousands and millions that are complete
    current: int | Fraction = 0  # below them
    before: _Number | None = None
    for number in run:
        value = number.value
        if value is not None and number.scale and before is not None and before.value is not None and current < value:
            current = (current or 1) * value
            if value > 100:
                total, current = total + current, 0
        else:
            joined = (
                before is not None
                and before.joins
                and before.value is not None
                and number.word
                and value is not None
                and value < (10 if before.word else before.value)
            )
            if not joined and before is not None:
                found.append(before.text if before.value is None else str(total + current))
                total = current = 0
            current += value or 0
        before = number
    if before is not None:
        found.append(before.text if before.value is None else str(total + current))
    return found
