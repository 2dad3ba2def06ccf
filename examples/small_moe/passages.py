"""Passages of the corpus: paragraphs of known kind, language and form, and where an answer's length ends in them."""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

LIST, CODE, PROSE, OTHER = "list", "code", "prose", "other"
_MARK = re.compile(r"[ \t]*(?:[*+\u2022-]|\d{1,3}[.)])[ \t]+\S")
_INDENTED = re.compile(r" {4}|\t")
_CODE = re.compile(r"(?: {4}|\t)+\S")
_WORD = re.compile(r"[^\W\d_]{2,}")
_LEAST_WORDS = 8
Anything = TypeVar("Anything")


@dataclass(frozen=True)
class Passage:
    """A paragraph of a document. Translations of a page have one `page`."""

    text: str
    document: str
    page: str
    kind: str
    language: str
    form: str


def form_of(text: str, kind: str) -> str:
    """The form of a paragraph: a list, code, running text, or something else (a heading, a table, a short line).

    In Markdown, which all but manual pages and sources are, code is what is indented by four blanks.
    """
    lines = text.split("\n")
    if kind == "code":
        return CODE
    if _MARK.match(lines[0]):
        return LIST if _WORD.search(text) else OTHER
    if kind == "man":
        body, indents = [line.strip() for line in lines], {len(line) - len(line.lstrip()) for line in lines}
        if not 7 <= min(indents) == max(indents):
            return OTHER
    elif all(_INDENTED.match(line) for line in lines if line):
        return CODE if _CODE.match(text) else OTHER
    else:
        body = lines
    whole = " ".join(body)
    if whole.startswith(("#", "|", ">", "`")) or whole[-1:] not in ".:!?" or len(_WORD.findall(whole)) < _LEAST_WORDS:
        return OTHER
    # a sentence: mostly words
    return PROSE if sum(map(len, _WORD.findall(whole))) > 0.6 * len(whole) else OTHER


def page_of(identifier: str) -> str:
    """What translations of a page have in common in their ids: all between the package and the language."""
    return identifier.split("/", 1)[1].rsplit("/", 1)[0]


def passages(documents: Iterable[dict[str, str]], part: str) -> list[Passage]:
    """The paragraphs of one part of the corpus, in its order."""
    return [
        Passage(block, d["id"], f"{d['kind']} {page_of(d['id'])}", d["kind"], d["language"], form_of(block, d["kind"]))
        for d in documents
        if d["part"] == part
        for block in d["text"].split("\n\n")
        if block.strip()
    ]


def _of_pages(found: Iterable[Passage], language: str) -> list[tuple[list[Passage], list[Passage]]]:
    """The English passages of each page that there is in both languages, and those in the other language."""
    pages: defaultdict[str, dict[str, list[Passage]]] = defaultdict(lambda: {"en": [], language: []})
    for passage in found:
        if passage.language in ("en", language):
            pages[passage.page][passage.language].append(passage)
    return [(page["en"], page[language]) for page in pages.values() if page["en"] and page[language]]


def translated(found: Iterable[Passage], language: str) -> list[tuple[Passage, Passage]]:
    """(English passage, its translation), of pages that have as many paragraphs in both languages."""
    pages = _of_pages(found, language)
    return [pair for one, two in pages if len(one) == len(two) for pair in zip(one, two, strict=True)]


def untranslated(found: Iterable[Passage], language: str) -> list[Passage]:
    """What a page and its translation have in the same words, so that it has no language: names, commands, numbers."""
    same = []
    for one, two in _of_pages(found, language):
        other = {passage.text for passage in two}
        same += [passage for passage in one if passage.text in other and passage.form != PROSE]
    return same


def cut(text: str, n: int) -> str:
    """The first `n` characters, or fewer, so that no word is cut."""
    if len(text) <= n:
        return text
    shorter = re.match(r"(.*\S)(?=\s)", text[: n + 1], re.DOTALL)
    return shorter.group(1) if shorter else text[:n]


def spread(found: Sequence[Anything], document: Callable[[Anything], str], rng: random.Random) -> list[Anything]:
    """All of them in a random order in which documents come in turn, so that the first ones are of many documents."""
    of_document: defaultdict[str, list[Anything]] = defaultdict(list)
    for one in found:
        of_document[document(one)].append(one)
    names = sorted(of_document)
    rng.shuffle(names)
    queues = [of_document[name] for name in names]
    for queue in queues:
        rng.shuffle(queue)
    return [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
