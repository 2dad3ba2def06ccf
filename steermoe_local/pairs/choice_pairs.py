"""Pairs of one prompt and two answers from questions on documents: the document's answer against a wrong one.

The wrong answer is that of another question, of the same kind (`answer_kinds.py`), and certainly not right: no word for
word answer of the document, and none that the data accepts. Such pairs have a log-probability margin, which the paper's
faithfulness pairs do not have (`Pair.margin_problem`).
"""

from __future__ import annotations

import bisect
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from .._util.records import only_text, truth
from .answer_kinds import NAMES, answer_kind, canonical_words
from .builders import Seen, Tally, accepted_answers, chat_pair, document_prompt, drawn_number
from .pairs import Pair

MOST_CHARACTERS = 200
"""Longest answer that is taken, in characters; SQuAD's are shorter but for a few."""
MOST_ANSWERS = 4096
"""Most answers of a kind that are kept to choose from."""
MOST_ACCEPTED = 100
"""Most answers that a question may accept: each is compared with each wrong answer that is tried."""
MOST_DOCUMENT = 1 << 20
"""Longest document and longest question that are taken, in characters: more than models read at once."""
_MOST_TRIED = 512  # answers that are compared with a question's document
_ENOUGH = 8  # wrong answers of which the one nearest in length is taken


@dataclass(frozen=True)
class _Item:
    """A question with its document, the document's answer and all accepted ones."""

    id: str
    context: str
    question: str
    answer: str
    accepted: tuple[str, ...]
    kind: str


class AnswerPool:
    """The answers of a data set by kind, at most `MOST_ANSWERS` of each: those that a seed's numbers put first.

    What is in it depends on the seed and on the set of answers, not on their order.
    """

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._kinds: dict[str, list[tuple[int, str]]] = {}  # ascending

    def add(self, kind: str, answer: str) -> None:
        """Add an answer of a kind; one that is there already changes nothing."""
        kept = self._kinds.setdefault(kind, [])
        entry = (drawn_number(self._seed, answer), answer)
        at = bisect.bisect_left(kept, entry)
        if at < MOST_ANSWERS and kept[at : at + 1] != [entry]:
            kept.insert(at, entry)
            del kept[MOST_ANSWERS:]

    def answers(self, kind: str, start: int) -> Iterator[str]:
        """The answers of a kind, each once, beginning at the place that `start`, any number, falls on."""
        kept = self._kinds.get(kind, [])
        for number in range(len(kept)):
            yield kept[(start + number) % len(kept)][1]


def answer_pool(rows: Iterable[dict[str, Any]], *, seed: int = 0) -> AnswerPool:
    """The answers of `rows` (of `squad_rows`) from which `choice_pairs` takes the wrong ones."""
    pool = AnswerPool(seed)
    for item in _items(rows, Tally()):
        pool.add(item.kind, item.answer)
    return pool


def choice_pairs(
    rows: Iterable[dict[str, Any]],
    tally: Tally,
    pool: AnswerPool,
    *,
    seed: int = 0,
    one_per_document: bool = False,
) -> Iterator[Pair]:
    """A question with its document, answered as the document does against a wrong answer of the same kind.

    `rows` as of `squad_rows`. Both answers stand behind one prompt and are the targets. Which wrong answer a question
    gets depends on the seed, the question, its document and the pool, not on the order of the rows. Of the wrong
    answers that come first, the one nearest in length is taken. Questions without an answer that stands in the
    document, and those for whose answer the pool has no `wrong` one, are left out.
    """
    documents = Seen()
    for item in _items(rows, tally):
        taken = _wrong_answer(item, pool, seed)
        if taken is None:
            tally.skip("no other answer of the same kind is certainly wrong", item.answer)
        elif one_per_document and not documents.add(item.context):
            tally.skip("another question on the document was taken")
        else:
            yield chat_pair(item.id, document_prompt(item.context, item.question), item.answer, taken)


class RightAnswers:
    """What may be a right answer to a question: texts of the document and of the question, and what is accepted."""

    def __init__(self, context: str, question: str, accepted: Collection[str], *, names: bool = False) -> None:
        """`names`: the answers are names, of which one word may stand for the whole."""
        self._names = names
        text, words = _document(context)
        self._texts = text, _folded(question)
        self._words = words.union(canonical_words(question, parts=True))
        self._accepted = [_answer(answer) for answer in accepted]

    def certainly_exclude(self, answer: str) -> bool:
        """Whether an answer is wrong beyond doubt, as far as letters and words tell.

        It is not if it stands in the document or the question, or all of its words do, in any order; and not if it
        stands in an accepted answer or the other way round, or all words of one are words of the other. Words are
        compared by `canonical_words`, so that "4 May" is "May the fourth". Of a name one word is enough.
        """
        text, words = _pooled_answer(answer)
        if any(text in known for known in self._texts) or self._may_be(words, self._words):
            return False
        return not any(
            text in right or right in text or right_words <= words or self._may_be(words, right_words)
            for right, right_words in self._accepted
        )

    def _may_be(self, words: frozenset[str], known: frozenset[str]) -> bool:
        return words <= known or (self._names and not words.isdisjoint(known))


def _folded(text: str) -> str:
    return " ".join(text.casefold().split())


@lru_cache(maxsize=1)  # a data set's questions on one document follow each other
def _document(context: str) -> tuple[str, frozenset[str]]:
    return _folded(context), frozenset(canonical_words(context, parts=True))


def _answer(text: str) -> tuple[str, frozenset[str]]:
    return _folded(text), frozenset(canonical_words(text))


_pooled_answer = lru_cache(maxsize=1 << 14)(_answer)  # those of a pool are short, and are tried again and again


def _wrong_answer(item: _Item, pool: AnswerPool, seed: int) -> str | None:
    right = RightAnswers(item.context, item.question, item.accepted, names=item.kind in NAMES)
    found: list[str] = []
    start = drawn_number(seed, item.context, item.question)
    for number, answer in enumerate(pool.answers(item.kind, start)):
        if len(found) == _ENOUGH or number == _MOST_TRIED:
            break
        if right.certainly_exclude(answer):
            found.append(answer)

    def apart(answer: str) -> tuple[int, int]:
        return abs(len(answer.split()) - len(item.answer.split())), abs(len(answer) - len(item.answer))

    return min(found, key=apart, default=None)


def _items(rows: Iterable[dict[str, Any]], tally: Tally) -> Iterator[_Item]:
    """The questions that their documents answer in so many words; the others are counted as skipped."""
    for row in rows:
        tally.rows += 1
        context, question = only_text(row.get("context")), only_text(row.get("question"))
        if not context or not question:
            tally.skip("no question or no document")
            continue
        if truth(row.get("is_impossible")):
            tally.skip("the document does not answer the question")
            continue
        if max(len(context), len(question)) > MOST_DOCUMENT:
            tally.skip(f"a document or question of more than {MOST_DOCUMENT >> 20} Mi characters")
            continue
        accepted = accepted_answers(row)
        text = " ".join(context.split())
        standing = [answer for answer in accepted if answer in text]
        if not standing:
            tally.skip("no answer that stands in the document", accepted[0] if accepted else None)
        elif len(accepted) > MOST_ACCEPTED:
            tally.skip(f"more than {MOST_ACCEPTED} accepted answers")
        elif len(standing[0]) > MOST_CHARACTERS:
            tally.skip(f"the answer has more than {MOST_CHARACTERS} characters")
        else:
            name = only_text(row.get("id")) or f"row-{tally.rows}"
            kind = answer_kind(standing[0], question)
            yield _Item(name, context, question, standing[0], tuple(accepted), kind)
