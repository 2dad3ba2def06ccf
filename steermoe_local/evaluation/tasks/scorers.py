"""The scorers, by name (`SCORERS`); those of a behaviour's style and form, and the judge, have modules of their own.

A scorer is a frozen dataclass whose fields are its options, so that type, default and meaning of an option are in one
place. To add one: write the class and name it in SCORERS. docs/tasks.md says for each which fields an item needs.
"""

from __future__ import annotations

import math
import os
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_type_hints

from ..._util.files import parse_json, read_bytes
from ...errors import FormatError, UsageError
from ...models.embedded import behaviours, score_reply
from ...pairs.prompts import PromptItem
from .form_scorers import JsonOrProse, Language
from .judge import Judge
from .number_scorer import DigitsOrWords
from .refusals import is_refusal
from .safe_regex import TooSlowError, search
from .style_scorers import Formality, Hedging, Length, Role, Steps
from .tasks import ILL_FORMED, Choice, Score, Scorer

_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _where(item: PromptItem) -> str:
    """An item in a message: its id, and its line where it has one."""
    return f"item {item.id}" + (f" (line {item.line})" if item.line and item.id != f"line-{item.line}" else "")


def _one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise UsageError for a value that is not allowed."""
    if value not in (names := tuple(allowed)):
        raise UsageError(f"{name}: {value!r} is not one of {', '.join(names)}")


def _texts_of(item: PromptItem, name: str, *, needed: bool = False) -> tuple[str, ...]:
    """A field that holds a text or a list of texts. Raises FormatError."""
    value = item.extra.get(name)
    if value is None and not needed:
        return ()
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        what = "missing" if value is None else "neither a text nor a list of texts"
        raise FormatError(f'{_where(item)}: {name}: {what}; write "{name}": "Paris", or ["Paris", "paris"]')
    return tuple(texts)


def _negatives(item: PromptItem) -> tuple[str, ...]:
    """The other side's answers: `negative` and `not_answer`."""
    return (*_texts_of(item, "negative"), *_texts_of(item, "not_answer"))


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
        for text in (*_texts_of(item, "answer", needed=True), *_negatives(item)):
            if not self._form(text):  # it would be found everywhere
                raise FormatError(f"{_where(item)}: {text!r} is empty when it is normalized; take another normalize")

    def score(self, item: PromptItem, text: str) -> Score:
        answer = self._form(text)
        right, others = _texts_of(item, "answer", needed=True), _negatives(item)
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
        _one_of("normalize", self.normalize, ("none", "strip", "squad"))

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
        _one_of("normalize", self.normalize, ("none", "squad"))

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
        if _negatives(item) and not _texts_of(item, "answer"):
            raise FormatError(f"{_where(item)}: answer: missing beside negative; give both or neither")

    def score(self, item: PromptItem, text: str) -> Score:
        """1 if it is found; "too-slow" for a pattern whose search is ended."""
        try:
            matched, found = search(self._of(item), text)
        except TooSlowError:
            return Score(0.0, "too-slow")
        if not matched:
            return Score(0.0, "wrong")
        right, others = _texts_of(item, "answer"), _negatives(item)
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
            raise FormatError(
                f'{_where(item)}: pattern: missing; write "pattern": "[0-9]+", or give the option pattern'
            )
        try:
            return self._compiled(pattern)
        except ValueError as error:
            raise FormatError(f"{_where(item)}: {error}") from None

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(pattern, re.IGNORECASE if self.ignore_case else 0)
        except (re.error, OverflowError, RecursionError) as error:  # "(", "a{99999999999}", ten thousand brackets
            shown = repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
            reason = str(error) or "too deeply nested"
            raise ValueError(f"pattern: {shown} is no regular expression: {reason}") from None


@dataclass(frozen=True)
class MultipleChoice(Scorer):
    """The likeliest of the item's `choices` after the prompt is its `answer`; nothing is generated.

    `prefix` is put before each choice and counts as part of it (" " after a plain prompt that ends in a word).
    `normalize`: "none" compares summed log-probabilities; "tokens", "characters" and "bytes" divide by the choice's
    length, so that short ones have no advantage. `other`: label of a choice that `negative` names.
    """

    kind = "choices"

    prefix: str = ""
    normalize: str = "none"
    other: str = "other"

    def __post_init__(self) -> None:
        _one_of("normalize", self.normalize, ("none", "tokens", "characters", "bytes"))

    def check(self, item: PromptItem) -> None:
        texts = self._texts(item)
        right, others = self._indices(item, "answer", texts), self._indices(item, "negative", texts)
        if not right:
            raise FormatError(f"{_where(item)}: answer: missing; name a choice by its number from 0, letter or text")
        if set(right) & set(others):
            raise FormatError(f"{_where(item)}: negative: names a choice that is right as well")

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        return tuple(self.prefix + text for text in self._texts(item))

    def right_choices(self, item: PromptItem) -> tuple[int, ...]:
        return tuple(self._indices(item, "answer", self._texts(item)))

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        """1 if the likeliest one is right; of equal ones the first is taken, as argmax does."""
        texts = self._texts(item)
        values = [choice.logprob / self._length(text, choice) for text, choice in zip(texts, choices, strict=True)]
        if not all(math.isfinite(value) for value in values):
            return Score(0.0, "ill-formed")
        best = values.index(max(values))
        if best in self._indices(item, "answer", texts):
            return Score(1.0, "right")
        return Score(0.0, self.other if best in self._indices(item, "negative", texts) else "wrong")

    def _length(self, text: str, choice: Choice) -> int:
        lengths = {"none": 1, "tokens": max(1, choice.n_tokens), "characters": len(text)}
        return lengths[self.normalize] if self.normalize in lengths else len(text.encode("utf-8"))

    def _texts(self, item: PromptItem) -> list[str]:
        texts = item.extra.get("choices")
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            what = "missing" if texts is None else "not a list of two texts at least"
            raise FormatError(f'{_where(item)}: choices: {what}; write "choices": ["Paris", "Rome"], "answer": 0')
        if len(set(texts)) < len(texts):
            raise FormatError(f"{_where(item)}: choices: one stands twice; a tie has no winner")
        return texts

    def _indices(self, item: PromptItem, name: str, texts: list[str]) -> list[int]:
        """Indices of the choices that a field names: by number from 0, by text, or by letter."""
        value = item.extra.get(name)
        named = [] if value is None else value if isinstance(value, list) else [value]
        indices = []
        for one in named:
            if type(one) is int and 0 <= one < len(texts):
                indices.append(one)
            elif isinstance(one, str) and one in texts:
                indices.append(texts.index(one))
            elif isinstance(one, str) and len(one) == 1 and one in string.ascii_uppercase[: len(texts)]:
                indices.append(string.ascii_uppercase.index(one))
            else:
                raise FormatError(
                    f"{_where(item)}: {name}: {one!r} is none of the {len(texts)} choices; "
                    "name one by its number from 0, its letter or its text"
                )
        return indices


@dataclass(frozen=True)
class Sides(Scorer):
    """Which side of one of the embedded model's behaviours an answer shows (`embedded.score_reply`).

    `behaviour`: the behaviour whose other forms of reply also count, besides the item's `positive` and `negative`; "":
    none.
    """

    behaviour: str = ""

    def __post_init__(self) -> None:
        _one_of("behaviour", self.behaviour, ("", *(known.name for known in behaviours())))

    def check(self, item: PromptItem) -> None:
        for name in ("positive", "negative"):
            if len(_texts_of(item, name, needed=True)) > 1:
                raise FormatError(f"{_where(item)}: {name}: a list; write one text")

    def score(self, item: PromptItem, text: str) -> Score:
        positive, negative = (_texts_of(item, name, needed=True)[0] for name in ("positive", "negative"))
        label, _ = score_reply(self.behaviour, text, positive, negative)
        return Score(float(label == "positive"), label)


@dataclass(frozen=True)
class Refusal(Scorer):
    """1 if the answer is a refusal by the rules of `refusals`; an empty one is ill-formed."""

    def score(self, item: PromptItem, text: str) -> Score:
        if not text.strip():
            return Score(0.0, ILL_FORMED)
        return Score(1.0, "refused") if is_refusal(text) else Score(0.0, "complied")


SCORERS: dict[str, type[Any]] = {
    "exact": Exact,
    "contains": Contains,
    "regex": Regex,
    "choice": MultipleChoice,
    "digits-or-words": DigitsOrWords,
    "length": Length,
    "formality": Formality,
    "hedging": Hedging,
    "steps": Steps,
    "language": Language,
    "json": JsonOrProse,
    "role": Role,
    "sides": Sides,
    "refusal": Refusal,
    "judge": Judge,
}
"""The scorers by name."""


def make_scorer(name: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer of that name. Raises UsageError for an unknown name or option, and for an impossible value."""
    kinds = _kinds(name)
    given = {key: _typed(name, key, value, _kind(name, kinds, key)) for key, value in (options or {}).items()}
    try:
        scorer: Scorer = SCORERS[name](**given)
    except UsageError as error:
        raise UsageError(f"scorer {name}: {error}") from None
    return scorer


def option_names(name: str) -> tuple[str, ...]:
    """The options of a scorer. Raises UsageError for an unknown name."""
    return tuple(_kinds(name))


def parse_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Options of a scorer from texts like "ignore_case=false" of a command line, each converted to its option's type.

    "prompt=@FILE" reads the text from a file. Raises UsageError, FormatError.
    """
    kinds = _kinds(name)
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"scorer option {text!r}: write KEY=VALUE")
        if key in found:
            raise UsageError(f"scorer {name}: {key}: given twice")
        found[key] = _parsed(name, key, value, _kind(name, kinds, key))
    return found


def _kinds(name: str) -> dict[str, type]:
    if name not in SCORERS:
        raise UsageError(f"{name!r} is no scorer; take one of {', '.join(SCORERS)}")
    hints = get_type_hints(SCORERS[name])
    return {field.name: hints[field.name] for field in fields(SCORERS[name])}


def _kind(name: str, kinds: Mapping[str, type], key: str) -> type:
    if key not in kinds:
        has = f"it has {', '.join(kinds)}" if kinds else "it has none"
        raise UsageError(f"scorer {name}: {key!r} is no option; {has}")
    return kinds[key]


def _parsed(name: str, key: str, text: str, kind: type) -> Any:
    if kind is not str:
        try:
            return _typed(name, key, parse_json(text), kind)
        except ValueError:
            return _typed(name, key, text, kind)
    if key != "prompt" or not text.startswith("@"):
        return text
    try:
        return read_bytes(os.path.expanduser(text[1:]), "a judge's prompt", 1 << 20).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(f"{text[1:]}: not UTF-8; save the file as UTF-8") from None


def _typed(name: str, key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"scorer {name}: {key}: {value!r} is not {_KINDS[kind]}")
    return value
