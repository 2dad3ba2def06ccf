"""Scorers that compare an answer with texts (exact, contains, regex), and what all scorers need to read items."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import FormatError, UsageError
from ...pairs.prompts import PromptItem
from .safe_regex import TooSlowError, search
from .tasks import Score, Scorer

__all__ = ["ILL_FORMED", "Contains", "Exact", "Regex", "one_of", "texts_of", "where"]

ILL_FORMED = "ill-formed"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def where(item: PromptItem) -> str:
    """An item in a message: its id, and its line where it has one."""
    return f"item {item.id}" + (f" (line {item.line})" if item.line and item.id != f"line-{item.line}" else "")


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UsageError for a value that is not allowed."""
    if value not in (names := tuple(allowed)):
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(names)}")


def texts_of(item: PromptItem, name: str, *, needed: bool = False) -> tuple[str, ...]:
    """A field that holds a text or a list of texts. Raises FormatError."""
    value = item.extra.get(name)
    if value is None and not needed:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        what = "missing" if value is None else "neither a text nor a list of texts"
        raise FormatError(f'{where(item)}: {name}: {what}; write "{name}": "Paris", or ["Paris", "paris"]')
    return tuple(texts)


def _negatives(item: PromptItem) -> tuple[str, ...]:
    """The other side's answers: `negative` and `not_answer`."""
    return (*texts_of(item, "negative"), *texts_of(item, "not_answer"))


def _squad(text: str) -> str:
    """A text as SQuAD's evaluation compares it: lower case, without ASCII punctuation and articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", _nfc(text).lower().translate(_PUNCTUATION)).split())


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _side(found: bool, other: bool, has_other: bool, other_label: str) -> Score:
    """The score of an answer with a right answer in it (`found`) or one of the other side's (`other`)."""
    if found and other:
        return Score(0.0, "both")
    if found:
        return Score(1.0, "right")
    if other:
        return Score(0.0, other_label)
    return Score(0.0, ILL_FORMED if has_other else "wrong")


class _Comparing(Scorer):
    """Compares the answer with the item's `answer` and `negative` texts, all in a normalized form."""

    other: str

    def check(self, item: PromptItem) -> None:
        for text in (*texts_of(item, "answer", needed=True), *_negatives(item)):
            if not self._form(text):  # it would be found everywhere
                raise FormatError(f"{where(item)}: {text!r} is empty when it is normalized; take another normalize")

    def score(self, item: PromptItem, text: str) -> Score:
        answer = self._form(text)
        right, others = texts_of(item, "answer", needed=True), _negatives(item)
        return _side(self._any(right, answer), self._any(others, answer), bool(others), self.other)

    def _any(self, texts: Iterable[str], answer: str) -> bool:
        return any(self._matches(self._form(text), answer) for text in texts)

    def _matches(self, text: str, answer: str) -> bool:
        raise NotImplementedError

    def _form(self, text: str) -> str:
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(_Comparing):
    """The whole answer is one of the item's.

    `normalize`: "none", "strip" (outer blanks do not count) or "squad" (as SQuAD's evaluation: lower case, without
    punctuation and articles). `other`: label of an answer that is one of the item's `negative` ones.
    """

    ignore_case: bool = False
    normalize: str = "strip"
    other: str = "other"

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("none", "strip", "squad"))

    def _matches(self, text: str, answer: str) -> bool:
        return text == answer

    def _form(self, text: str) -> str:
        if self.normalize == "squad":
            return _squad(text)
        text = _nfc(text).strip() if self.normalize == "strip" else text
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Contains(_Comparing):
    """One of the item's answers occurs in the answer.

    `words`: not inside a word, so that "art" is not in "heart". `normalize`: "none" or "squad", applied to both.
    `other` as in `Exact`.
    """

    ignore_case: bool = True
    words: bool = True
    normalize: str = "none"
    other: str = "other"

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("none", "squad"))

    def _matches(self, text: str, answer: str) -> bool:
        if not self.words:
            return text in answer
        # a boundary only where the text itself ends in a letter or digit: "C++" has none after it
        before = r"(?<!\w)" if re.match(r"\w", text) else ""
        after = r"(?!\w)" if re.search(r"\w\Z", text) else ""
        return re.search(before + re.escape(text) + after, answer) is not None

    def _form(self, text: str) -> str:
        if self.normalize == "squad":
            return _squad(text)
        text = " ".join(_nfc(text).split())
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Regex(Scorer):
    """A pattern occurs in the answer; with `answer`, what it found (its first group, if it has one) is one of those.

    `pattern` is for all items; an item's own field of that name comes first. `ignore_case` holds for both.
    """

    pattern: str = ""
    ignore_case: bool = False
    other: str = "other"

    def __post_init__(self) -> None:
        if self.pattern:
            try:
                self._compiled(self.pattern)
            except ValueError as error:
                raise UsageError(str(error)) from None

    def check(self, item: PromptItem) -> None:
        self._of(item)
        if _negatives(item) and not texts_of(item, "answer"):
            raise FormatError(f"{where(item)}: answer: missing beside negative; give both or neither")

    def score(self, item: PromptItem, text: str) -> Score:
        """1 if it is found; "too-slow" for a pattern whose search is ended."""
        try:
            matched, found = search(self._of(item), text)
        except TooSlowError:
            return Score(0.0, "too-slow")
        if not matched:
            return Score(0.0, "wrong")
        right, others = texts_of(item, "answer"), _negatives(item)
        if not right:
            return Score(1.0, "right")
        got = self._form(found)
        return _side(got in map(self._form, right), got in map(self._form, others), bool(others), self.other)

    def _form(self, text: str) -> str:
        text = text.strip()
        return text.casefold() if self.ignore_case else text

    def _of(self, item: PromptItem) -> re.Pattern[str]:
        pattern = item.extra.get("pattern", self.pattern)
        if not isinstance(pattern, str) or not pattern:
            raise FormatError(f'{where(item)}: pattern: missing; write "pattern": "[0-9]+", or give the option pattern')
        try:
            return self._compiled(pattern)
        except ValueError as error:
            raise FormatError(f"{where(item)}: {error}") from None

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.IGNORECASE if self.ignore_case else 0)
        except (re.error, OverflowError, RecursionError) as error:  # "(", "a{99999999999}", ten thousand brackets
            shown = repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
            reason = str(error) or "too deeply nested"
            raise ValueError(f"pattern: {shown} is no regular expression: {reason}") from None
