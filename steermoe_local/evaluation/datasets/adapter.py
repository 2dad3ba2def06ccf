"""The base of all data set adapters, and what they share: options, the form of prompts, reading of unchecked rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from ..._util import records
from ..._util.json_text import parse_json
from ...errors import UsageError
from ...pairs.prompts import PromptItem
from ..tasks.scorers import make_scorer
from ..tasks.tasks import Scorer
from .sources import source_rows

Row = Mapping[str, Any]

ANSWER_AS = ("letter", "text", "free")
MATCH = ("lenient", "strict")
HOPS = ("single", "multi")

ASK = "Final Answer Only:"
"""The last line of a prompt, as in the paper's notebook."""
DOCUMENT_OPTIONS = ("closed_book", "instruction")
"""`DatasetAdapter.takes` of a data set whose prompts are made by `document_prompt`."""
_LONGEST_ID = 200


class Skipped(Exception):
    """Why a row, or a part of it, gives no item."""


@dataclass(frozen=True)
class BuildOptions:
    """Options of adapters; each adapter takes some (`DatasetAdapter.takes`); None is its default.

    `closed_book`: leave the document out. `instruction`: the last lines of the prompt instead of the adapter's own; "":
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
        for name, allowed in (("answer_as", ANSWER_AS), ("match", MATCH), ("hops", HOPS)):
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise UsageError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        if self.max_chars < 1:
            raise UsageError("max_chars: not a number from 1 up")
        if self.all_questions and self.hops != "multi":
            raise UsageError("all_questions: an edited fact has one question; take hops multi")


class DatasetAdapter:
    """Turns the rows of one data set into task items. An adapter sets the attributes below and defines `items`.

    `what` and `source` say in words what is asked and where the data is found. `columns`: sets of columns of which a
    file must have one. `takes`: names of the `BuildOptions` that apply. `requests`: a list of prompts, whose column can
    be named by the caller; `texts`: it may be a plain list without columns. The rest as in `Task`.
    """

    name: str
    what: str
    source: str
    columns: tuple[tuple[str, ...], ...]
    takes: tuple[str, ...] = ()
    requests = False
    texts = False
    max_tokens = 64
    positive = "the document's answer"
    negative = "another answer"

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem | Skipped]:
        """The items of a row; an id of "" is replaced by the row's number.

        Raises Skipped for a row that gives none; yields it for one of several items.
        """
        raise NotImplementedError

    def scoring(self, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        """Name and options of the scorer."""
        return "contains", {}

    def rows(self, path: Path, column: str | None = None, answers: Path | None = None) -> Iterator[Row]:
        """The rows of a file; see `builders.dataset_rows`."""
        if answers is not None:
            raise UsageError(f"{path}: --answers is for MCTest's .tsv; other files hold their answers")
        for row in source_rows(path, self.columns if column is None else ((column,),), texts=self.texts):
            yield {**row, self.columns[0][0]: row.get(column)} if column and row else row

    def check(self, options: BuildOptions) -> None:
        """Raise UsageError for options that do not apply."""
        for option in fields(options):
            if option.name in (*self.takes, "max_chars") or getattr(options, option.name) == option.default:
                continue
            taken = ", ".join(map(_flag, self.takes)) or "none of these options"
            raise UsageError(f"layout {self.name}: takes no {_flag(option.name)}; it takes {taken}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def parsed(value: Any) -> Any:
    """A value as it is, but a text that holds a JSON list or object (a cell of a CSV file) parsed."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return parse_json(value, strict=False)
    except ValueError:
        return value


def clean_text(value: Any) -> str | None:
    """As `records.clean_text`, but a whole number is a text as well."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**15 else None
    return records.clean_text(value)


def needed(row: Any, name: str, what: str) -> str:
    """A text of a row. Raises Skipped, which says that there is no `what`."""
    text = clean_text(row.get(name)) if isinstance(row, Mapping) else None
    if text is None:
        raise Skipped(f"no {what}")
    return text


def clean_texts(value: Any) -> list[str]:
    """Texts of a text or a list, each once; other values are dropped."""
    values = value if isinstance(value, list | tuple) else [value]
    return list(dict.fromkeys(text for one in values if (text := clean_text(one)) is not None))


def row_id(row: Row) -> str:
    """The id of a row in its data set, "" if it has none."""
    names = ("id", "qid", "question_id", "case_id")
    return next((text[:_LONGEST_ID] for name in names if (text := clean_text(row.get(name)))), "")


def document_prompt(options: BuildOptions, document: str, question: str, *lines: str, ask: str = ASK) -> str:
    """Document, question, further lines and the instruction, each on a line of its own.

    This is the form of the faithfulness examples in the paper's released notebook.
    """
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

    def occurs(text: str) -> bool:
        if " ".join(text.split()).casefold() not in found:
            return False  # the scorer's patterns are slow to compile, and hardly any text occurs
        return scorer.score(PromptItem("", "?", extra={"answer": text}), every).value > 0

    kept = [text for text in others if not occurs(text)]
    return {"answer": list(answers)} | ({"negative": kept} if kept else {})
