"""The behaviours that the small model is measured on: contrast pairs, held-out prompts, and known answers.

A base model continues texts, so a prompt is a passage and an answer is what comes after it. Pairs have one prompt and
two continuations, and come from the corpus's part `heldout`; prompts come from `test`, whose pages are others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from typing import Any

from .passages import CODE, LIST, PROSE, Passage, cut, spread, translated, untranslated

MAX_TOKENS = 24
ANSWER = 85  # characters: about what MAX_TOKENS tokens are
PROMPT = 240  # characters, at most
TARGET = 110  # characters of a continuation
LEAST_BEFORE = 20  # characters before a number
GAP = "\n\n"  # begins a paragraph; part of the continuation, for the tokenizer joins it with blanks that follow

_NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_IN_DIGITS = {word: str(value) for value, word in enumerate(_NUMBERS, 2)}
_IN_WORDS = {digits: word for word, digits in _IN_DIGITS.items()}
_WORDS = "|".join(_IN_DIGITS)
_NUMBER = re.compile(rf"(?<=[a-z,] )(?P<number>{_WORDS}|[0-9]{{1,4}})(?=[ .,][^0-9])")


@dataclass(frozen=True)
class Prompt:
    """A prompt; `group` says what kind of text it is, which is what the unsteered model would mostly go on with."""

    text: str
    group: str
    document: str


@dataclass(frozen=True)
class TwoSided:
    """A prompt and the two ways in which it goes on."""

    prompt: str
    positive: str
    negative: str
    document: str


@dataclass(frozen=True)
class Behaviour:
    """How a behaviour is measured; `neutral` names the text that it should leave alone."""

    name: str
    positive: str
    negative: str
    scorer: str
    pairs: Callable[[Sequence[Passage]], list[TwoSided]]
    prompts: Callable[[Sequence[Passage]], list[Prompt]]
    known: Callable[[Sequence[Passage]], tuple[list[str], list[str]]]
    """Answers whose side is known: positive ones and negative ones."""
    neutral: str = "prose"
    options: dict[str, Any] = field(default_factory=dict)

    def labels(self) -> tuple[str, str]:
        """What the scorer calls the two sides."""
        return ("right", "wrong") if self.scorer == "regex" else (self.positive, self.negative)


def _short(found: Iterable[Passage], **fields: str) -> list[Passage]:
    """Passages with these fields that can be a prompt."""
    return [p for p in found if len(p.text) <= PROMPT and all(getattr(p, k) == v for k, v in fields.items())]


def _goes_on(passage: Passage) -> str:
    return GAP + cut(passage.text, TARGET)


def _answer(passage: Passage) -> str:
    return GAP + cut(passage.text, ANSWER)


# languages


def _language(name: str, code: str) -> Behaviour:
    def both(found: Sequence[Passage]) -> list[tuple[Passage, Passage]]:
        return [(en, other) for en, other in translated(found, code) if en.form == other.form == PROSE]

    def pairs(found: Sequence[Passage]) -> list[TwoSided]:
        made = []
        of_page: dict[str, list[tuple[Passage, Passage]]] = {}
        for english, other in both(found):
            of_page.setdefault(english.page, []).append((english, other))
        for page, rows in of_page.items():
            for before, after in zip([rows[-1], *rows], rows, strict=False):
                # the prompt is in either language, in turn
                prompt = before[len(made) % 2].text
                if len(prompt) <= PROMPT and before is not after:
                    made.append(TwoSided(prompt, _goes_on(after[1]), _goes_on(after[0]), page))
        return made

    def prompts(found: Sequence[Passage]) -> list[Prompt]:
        made = [
            Prompt(p.text, "english" if p.language == "en" else name, p.page)
            for language in ("en", code)
            for kind in ("help", "man", "book")
            for p in _short(found, kind=kind, language=language, form=PROSE)
        ]
        return made + [Prompt(p.text, "neutral", p.page) for p in untranslated(found, code) if len(p.text) <= PROMPT]

    def known(found: Sequence[Passage]) -> tuple[list[str], list[str]]:
        prose = [p for p in found if p.form == PROSE and p.kind in ("help", "man", "book")]
        one, two = ([_answer(p) for p in prose if p.language == language] for language in (code, "en"))
        return one, two

    options = {"positive": name, "negative": "english"}
    return Behaviour(name, name, "english", "language", pairs, prompts, known, "code-italian", options)


# forms of one document


def _forms(name: str, form: str, pattern: str, kinds: tuple[str, ...]) -> Behaviour:
    """A form against running text, both in English and of the same documents."""

    def of_kinds(found: Sequence[Passage], wanted: str) -> list[Passage]:
        return [p for p in found if p.kind in kinds and p.language == "en" and p.form == wanted]

    def pairs(found: Sequence[Passage]) -> list[TwoSided]:
        made = []
        documents: dict[str, tuple[list[Passage], list[Passage]]] = {}
        for index, wanted in enumerate((form, PROSE)):
            for p in of_kinds(found, wanted):
                documents.setdefault(p.document, ([], []))[index].append(p)
        for document, (ones, others) in documents.items():
            for (before, one), (before_other, other) in zip(pairwise(ones), pairwise(others), strict=False):
                prompt = (before, before_other)[len(made) % 2].text
                if len(prompt) <= PROMPT:
                    made.append(TwoSided(prompt, _goes_on(one), _goes_on(other), document))
        return made

    def prompts(found: Sequence[Passage]) -> list[Prompt]:
        groups = ((form, name), (PROSE, PROSE))
        return [
            Prompt(p.text, group, p.document)
            for wanted, group in groups
            for p in of_kinds(found, wanted)
            if len(p.text) <= PROMPT
        ]

    def known(found: Sequence[Passage]) -> tuple[list[str], list[str]]:
        # code of source files, which is known to be code whatever its layout
        ones = [p for p in found if p.kind == CODE] if form == CODE else of_kinds(found, form)
        return [_answer(p) for p in ones], [_answer(p) for p in of_kinds(found, PROSE)]

    return Behaviour(name, name, "prose", "regex", pairs, prompts, known, options={"pattern": pattern})


# manual pages and help


def _manual() -> Behaviour:
    sides = ("man", "help")

    def of(found: Sequence[Passage], kind: str) -> list[Passage]:
        return [p for p in found if p.kind == kind and p.language == "en" and len(p.text) >= 40]

    def pairs(found: Sequence[Passage]) -> list[TwoSided]:
        # of other documents than the prompt: neither continuation is the one that was written
        rng = random.Random(0)
        manual, help_page = (spread(of(found, kind), lambda p: p.document, rng) for kind in sides)
        prompts = [_short(one) for one in (manual[::-1], help_page[::-1])]
        return [
            TwoSided(prompts[i % 2][i].text, _goes_on(one), _goes_on(other), one.document)
            for i, (one, other) in enumerate(zip(manual, help_page, strict=False))
            if i < len(prompts[i % 2])
        ]

    def prompts(found: Sequence[Passage]) -> list[Prompt]:
        return [Prompt(p.text, kind, p.document) for kind in sides for p in of(found, kind) if len(p.text) <= PROMPT]

    def known(found: Sequence[Passage]) -> tuple[list[str], list[str]]:
        one, two = ([_answer(p) for p in of(found, kind)] for kind in sides)
        return one, two

    pattern = r"(?m)^ {7,}\S|^[A-Z][A-Z ]{3,}$"
    return Behaviour("manual", "manual", "help", "regex", pairs, prompts, known, "code-italian", {"pattern": pattern})


# numbers


def _numbers(found: Sequence[Passage]) -> Iterator[tuple[Passage, re.Match[str]]]:
    """The numbers in English running text, with enough text in front of them."""
    for p in found:
        if p.language == "en" and p.form in (PROSE, LIST):
            for match in _NUMBER.finditer(p.text):
                if match.start() >= LEAST_BEFORE:
                    yield p, match


def _digits() -> Behaviour:
    def both(match: re.Match[str], n: int) -> tuple[str, str]:
        """The text from the number on, with it in digits and in words."""
        number, rest = match["number"], match.string[match.end() :]
        rest = cut(rest, n)
        return f" {_IN_DIGITS.get(number, number)}{rest}", f" {_IN_WORDS.get(number, number)}{rest}"

    def before(match: re.Match[str]) -> str:
        text = match.string[: match.start() - 1]
        return text if len(text) <= PROMPT else text[-PROMPT:].split(" ", 1)[1]

    def of_both(found: Sequence[Passage]) -> list[tuple[Passage, re.Match[str]]]:
        """Those that are as usual in words as in digits: from two to twelve, and something is counted."""
        numbers = _IN_DIGITS.keys() | _IN_WORDS.keys()
        return [
            (p, match)
            for p, match in _numbers(found)
            if match["number"] in numbers and re.match(" [a-z]{3,}", match.string[match.end() :])
        ]

    def pairs(found: Sequence[Passage]) -> list[TwoSided]:
        return [TwoSided(before(match), *both(match, 12), p.document) for p, match in of_both(found)]

    def prompts(found: Sequence[Passage]) -> list[Prompt]:
        return [
            Prompt(before(match), "digits" if match["number"].isdigit() else "words", p.document)
            for p, match in _numbers(found)
        ]

    def known(found: Sequence[Passage]) -> tuple[list[str], list[str]]:
        rows = [both(match, ANSWER) for _, match in of_both(found)]
        return [one for one, _ in rows], [two for _, two in rows]

    return Behaviour("digits", "digits", "words", "digits-or-words", pairs, prompts, known)


LIST_PATTERN = r"(?m)^[ \t]*(?:[*+\u2022-]|\d{1,3}[.)])[ \t]+\S"
CODE_PATTERN = (
    r"(?m)^(?: {4,}|\t+)(?![ \t]*(?:[*\u2022-]|\d+[.)])[ \t])\S|[;{}][ \t]*$"
    r"|^[ \t]*(?:#include|import|def|class|return|>>>|\$)[ \t]"
)
MARKDOWN = ("documentation", "help", "book")

BEHAVIOURS = (
    _language("german", "de"),
    _language("french", "fr"),
    _language("spanish", "es"),
    _forms("code", CODE, CODE_PATTERN, MARKDOWN),
    _forms("list", LIST, LIST_PATTERN, MARKDOWN),
    _manual(),
    _digits(),
)


def chosen_pairs(behaviour: Behaviour, found: Sequence[Passage], n: int, seed: int) -> list[TwoSided]:
    """At most `n` pairs, of as many documents as there are, none twice."""
    rng = random.Random(f"{seed} pairs {behaviour.name}")
    rows = list(dict.fromkeys(row for row in behaviour.pairs(found) if row.positive.strip() != row.negative.strip()))
    return spread(rows, lambda row: row.document, rng)[:n]


def chosen_prompts(behaviour: Behaviour, found: Sequence[Passage], n: int, seed: int) -> list[Prompt]:
    """At most `n` prompts, the groups in turn, so that the first ones are of all groups, none twice."""
    rng = random.Random(f"{seed} prompts {behaviour.name}")
    unique = {prompt.text: prompt for prompt in behaviour.prompts(found)}.values()
    groups = list(dict.fromkeys(prompt.group for prompt in unique))
    rows = [spread([p for p in unique if p.group == group], lambda p: p.document, rng) for group in groups]
    turns = [prompt for turn in zip_longest(*rows) for prompt in turn if prompt is not None]
    return turns[:n]


def known_answers(
    behaviour: Behaviour, found: Sequence[Passage], n: int, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """At most `n` answers of each side, none twice."""
    rng = random.Random(f"{seed} known {behaviour.name}")
    chosen = []
    for side in behaviour.known(found):
        unique = list(dict.fromkeys(side))
        rng.shuffle(unique)
        chosen.append(tuple(unique[:n]))
    return chosen[0], chosen[1]
