"""Scorers that compare an answer with texts: exact, contains, regex."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from ...errors import FormatError, UsageError
from ...pairs.prompts import PromptItem
from .safe_regex import TooSlowError, search
from .tasks import Choice, Score

__all__ = ["Contains", "Exact", "Regex", "TextScorer", "one_of", "texts_of"]

ILL_FORMED = "ill-formed"

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class TextScorer:
    """What scorers of a generated text have in common."""

    @property
    def kind(self) -> Literal["text", "choices"]:
        """A generated text is scored."""
        return "text"

    @property
    def n_parallel(self) -> int:
        """In the caller's thread: nothing waits."""
        return 0

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        """A text scorer has none."""
        raise NotImplementedError

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        """A text scorer scores texts."""
        raise NotImplementedError


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


def where(item: PromptItem) -> str:
    """An item in a message: its id, and its line where it has one."""
    return f"item {item.id}" + (f" (line {item.line})" if item.line and item.id != f"line-{item.line}" else "")


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UsageError for a value that is not allowed."""
    if value not in (names := tuple(allowed)):
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(names)}")


def squad(text: str) -> str:
    """A text as SQuAD's evaluation compares it: lower case, without ASCII punctuation and articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", nfc(text).lower().translate(_PUNCTUATION)).split())


def nfc(text: str) -> str:
    """A text whose accents are one with their letters, as most write them."""
    return unicodedata.normalize("NFC", text)


def not_empty(item: PromptItem, texts: Iterable[str], form: Callable[[str], str]) -> None:
    """Raise FormatError for a text of which `form` leaves nothing: it would be found everywhere."""
    for text in texts:
        if not form(text):
            raise FormatError(f"{where(item)}: {text!r} is empty when it is normalized; take another normalize")


def side(found: bool, other: bool, has_other: bool, other_label: str) -> Score:
    """Score an answer in which the right one was found, and the other side's."""
    if found and other:
        return Score(0.0, "both")
    if found:
        return Score(1.0, "right")
    if other:
        return Score(0.0, other_label)
    return Score(0.0, ILL_FORMED if has_other else "wrong")


def negatives(item: PromptItem) -> tuple[str, ...]:
    """What the other side would answer: `negative`, or `not_answer`."""
    return (*texts_of(item, "negative"), *texts_of(item, "not_answer"))


@dataclass(frozen=True)
class Exact(TextScorer):
    """The whole answer is one of the item's.

    `normalize`: "none", "strip" (outer blanks do not count) or "squad" (`squad`). `other`: label of an answer that is
    one of the item's `negative` ones.
    """

    ignore_case: bool = False
    normalize: str = "strip"
    other: str = "other"

    def __post_init__(self) -> None:
        """Check the options."""
        one_of("normalize", self.normalize, ("none", "strip", "squad"))

    def check(self, item: PromptItem) -> None:
        """The item needs `answer`."""
        not_empty(item, (*texts_of(item, "answer", needed=True), *negatives(item)), self._form)

    def score(self, item: PromptItem, text: str) -> Score:
        """1 if it is one of them."""
        answer = self._form(text)
        right, others = texts_of(item, "answer", needed=True), negatives(item)
        return side(answer in map(self._form, right), answer in map(self._form, others), bool(others), self.other)

    def _form(self, text: str) -> str:
        if self.normalize == "squad":
            return squad(text)
        text = nfc(text).strip() if self.normalize == "strip" else text
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Contains(TextScorer):
    """One of the item's answers occurs in the answer.

    `words`: not inside a word, so that "art" is not in "heart". `normalize`: "none" or "squad", which is done to both.
    `other` as in `Exact`.
    """

    ignore_case: bool = True
    words: bool = True
    normalize: str = "none"
    other: str = "other"

    def __post_init__(self) -> None:
        """Check the options."""
        one_of("normalize", self.normalize, ("none", "squad"))

    def check(self, item: PromptItem) -> None:
        """The item needs `answer`."""
        not_empty(item, (*texts_of(item, "answer", needed=True), *negatives(item)), self._form)

    def score(self, item: PromptItem, text: str) -> Score:
        """1 if one of them occurs, and none of the other side."""
        answer = self._form(text)
        right, others = texts_of(item, "answer", needed=True), negatives(item)
        return side(self._any(right, answer), self._any(others, answer), bool(others), self.other)

    def _any(self, texts: Iterable[str], answer: str) -> bool:
        return any(self._in(self._form(text), answer) for text in texts)

    def _in(self, text: str, answer: str) -> bool:
        if not self.words:
            return text in answer
        # a boundary only where the text itself ends in a letter or digit: "C++" ends where it ends
        before = r"(?<!\w)" if re.match(r"\w", text) else ""
        after = r"(?!\w)" if re.search(r"\w\Z", text) else ""
        return re.search(before + re.escape(text) + after, answer) is not None

    def _form(self, text: str) -> str:
        if self.normalize == "squad":
            return squad(text)
        text = " ".join(nfc(text).split())
        return text.casefold() if self.ignore_case else text


@dataclass(frozen=True)
class Regex(TextScorer):
    """A pattern occurs in the answer; with `answer`, what it found (its first group, if it has one) is one of those.

    `pattern` is for all items; an item's own field of that name comes first. `ignore_case` holds for both.
    """

    pattern: str = ""
    ignore_case: bool = False
    other: str = "other"

    def __post_init__(self) -> None:
        """Check the pattern."""
        if self.pattern:
            try:
                self._compiled(self.pattern)
            except re.error as error:
                raise UsageError(f"pattern: {_short(self.pattern)} is no regular expression: {error}") from None

    def check(self, item: PromptItem) -> None:
        """The item needs `pattern`, unless the option gives one."""
        self._of(item)
        if negatives(item) and not texts_of(item, "answer"):
            raise FormatError(f"{where(item)}: answer: missing beside negative; give both or neither")

    def score(self, item: PromptItem, text: str) -> Score:
        """1 if it is found; "too-slow" for a pattern that does not come to an end on this answer."""
        try:
            matched, found = search(self._of(item), text)
        except TooSlowError:
            return Score(0.0, "too-slow")
        if not matched:
            return Score(0.0, "wrong")
        right, others = texts_of(item, "answer"), negatives(item)
        if not right:
            return Score(1.0, "right")
        got = self._form(found)
        return side(got in map(self._form, right), got in map(self._form, others), bool(others), self.other)

    def _form(self, text: str) -> str:
        text = text.strip()
        return text.casefold() if self.ignore_case else text

    def _of(self, item: PromptItem) -> re.Pattern[str]:
        pattern = item.extra.get("pattern", self.pattern)
        if not isinstance(pattern, str) or not pattern:
            raise FormatError(f'{where(item)}: pattern: missing; write "pattern": "[0-9]+", or give the option pattern')
        try:
            return self._compiled(pattern)
        except re.error as error:
            raise FormatError(f"{where(item)}: pattern: {_short(pattern)} is no regular expression: {error}") from None

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.IGNORECASE if self.ignore_case else 0)
        except (OverflowError, RecursionError) as error:  # "a{99999999999}", ten thousand brackets
            raise re.error(str(error) or "too deeply nested") from None


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
