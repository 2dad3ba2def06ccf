"""What the layouts share: options, what an item is made of, and reading of rows that nobody checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from ...errors import UsageError
from ...pairs.prompts import PromptItem
from ..tasks.scorers import make_scorer
from ..tasks.tasks import Scorer

__all__ = [
    "ANSWER_AS",
    "ASK",
    "HOPS",
    "MATCH",
    "BuildOptions",
    "Draft",
    "Drafts",
    "LeftOut",
    "Row",
    "clean_text",
    "clean_texts",
    "document_prompt",
    "needed",
    "parsed",
    "row_id",
    "sides",
    "with_aliases",
]

Row = Mapping[str, Any]

ANSWER_AS = ("letter", "text", "free")
MATCH = ("lenient", "strict")
HOPS = ("single", "multi")

ASK = "Final Answer Only:"
"""The last line of a prompt, as in the paper's notebook."""
_SHORTEST_ALIAS = 3  # characters; "IT" for Italy is in every other sentence
_LONGEST_ID = 200


class LeftOut(Exception):
    """Why a row, or a part of it, gives no item."""


class Draft(NamedTuple):
    """An item before it is checked; an id of "" stands for the row's number."""

    id: str
    prompt: str
    extra: dict[str, Any]


@dataclass(frozen=True)
class BuildOptions:
    """What can be chosen; each layout takes some of it (`Layout.takes`), and None stands for its default.

    `closed_book`: leave the document out. `instruction`: the last lines of the prompt instead of the layout's own; "":
    none. `answer_as` (multiple choice): "letter" compares the probabilities of the choices' letters, "text" of their
    texts, "free" lets the model write. `match`: "lenient" takes any of the phrases, "strict" the first alone. `hops`:
    "single" asks for an edited fact, "multi" for what follows from all of a case. `all_questions`: also the paraphrases
    of a multi-hop question. `max_chars`: longest item. Raises UsageError.
    """

    closed_book: bool = False
    instruction: str | None = None
    answer_as: str | None = None
    match: str | None = None
    hops: str | None = None
    all_questions: bool = False
    max_chars: int = 200_000

    def __post_init__(self) -> None:
        """Check the values."""
        for name, allowed in (("answer_as", ANSWER_AS), ("match", MATCH), ("hops", HOPS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UsageError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        if self.max_chars < 1:
            raise UsageError("max_chars: not a number from 1 up")
        if self.all_questions and self.hops != "multi":
            raise UsageError("all_questions: an edited fact has one question; take hops multi")


Drafts = Callable[[Row, BuildOptions], Iterator[Draft | LeftOut]]
"""Makes the items of a row. Raises LeftOut for a row that gives none; yields it for one of several items."""


def clean_text(value: Any) -> str | None:
    """A text without outer blanks, or a whole number as one; None for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**15 else None
    if not isinstance(value, str):
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return None
    return value.strip() or None


def parsed(value: Any) -> Any:
    """A value; that of a CSV file's cell which holds a JSON list or object."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def needed(row: Any, name: str, what: str) -> str:
    """A text of a row; raises LeftOut, which says `what` is not there."""
    text = clean_text(row.get(name)) if isinstance(row, Mapping) else None
    if text is None:
        raise LeftOut(f"no {what}")
    return text


def clean_texts(value: Any) -> list[str]:
    """Texts of a text or a list, each once; what is none is dropped."""
    values = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(text for one in values if (text := clean_text(one)) is not None))


def row_id(row: Row) -> str:
    """What the data calls the row, "" if it does not."""
    names = ("id", "qid", "question_id", "case_id")
    return next((text[:_LONGEST_ID] for name in names if (text := clean_text(row.get(name)))), "")


def document_prompt(options: BuildOptions, document: str, question: str, *lines: str, ask: str = ASK) -> str:
    """Document, question, further lines and the instruction, each on a line of its own."""
    last = ask if options.instruction is None else options.instruction
    parts = [] if options.closed_book else [f"Document: {document}"]
    return "\n".join([*parts, f"Question: {question}", *lines, *([last] if last.strip() else [])])


@cache
def _contains() -> Scorer:
    return make_scorer("contains")


def sides(answers: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
    """`answer`, and `negative` without what would be found in a right answer as well ("York" in "New York")."""
    scorer, every = _contains(), " | ".join(" ".join(answer.split()) for answer in answers)
    found = every.casefold()

    def occurs(text: str) -> bool:  # the scorer's patterns are slow to compile, and hardly any occurs
        if " ".join(text.split()).casefold() not in found:
            return False
        return scorer.score(PromptItem("", "?", extra={"answer": text}), every).value > 0

    kept = [text for text in others if not occurs(text)]
    return {"answer": list(answers)} | ({"negative": kept} if kept else {})


def with_aliases(answer: str, aliases: Any) -> list[str]:
    """An answer and what it is called besides."""
    return list(dict.fromkeys([answer, *(text for text in clean_texts(aliases) if len(text) >= _SHORTEST_ALIAS)]))
