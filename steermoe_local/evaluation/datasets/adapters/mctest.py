"""MCTest: children's stories with multiple choice, of its own two files or of the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...._util.records import clean_text
from ....errors import FormatError
from ....pairs.prompts import PromptItem
from ..adapter import BuildOptions, Row, Skipped, needed
from ..multiple_choice import MultipleChoiceAdapter
from ..sources import text_lines

__all__ = ["MCTest"]

_MARK = re.compile(r"^(?:one|multiple):\s*", re.IGNORECASE)  # before the questions
_CELLS = 3 + 4 * 5  # id, properties, story; four questions with four choices each
_LETTERS = "ABCD"


class MCTest(MultipleChoiceAdapter):
    """MCTest: story, question, answer_options, answer; or a .tsv with its answers in a file that ends in .ans."""

    name = "mctest"
    what = "stories with multiple choice: a control"
    source = "mc500.test.tsv with mc500.test.ans, or hub:sagnikrayc/mctest@refs/convert/parquet:mc500/test"
    columns = (("story", "question", "answer_options", "answer"),)
    positive = "the right choice"

    def rows(self, path: Path, column: str | None = None, answers: Path | None = None) -> Iterator[Row]:
        return _tsv_rows(path, answers) if path.suffix == ".tsv" else super().rows(path, column, answers)

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        question = row.get("question")
        if isinstance(question, Mapping):
            question = question.get("question")
        question = _MARK.sub("", clean_text(question) or "")
        if not question:
            raise Skipped("no question")
        story = _unescaped(needed(row, "story", "story"))
        yield self.item(options, row, story, question, row.get("answer_options"), row.get("answer"))


def _unescaped(story: str) -> str:
    """A story with its tabs and newlines, which are written out, as they would end a cell or a line."""
    return story.replace("\\newline", "\n").replace("\\tab", "\t")


def _tsv_rows(path: Path, answers: Path | None) -> Iterator[Row]:
    """A row for each question of an MCTest .tsv; {} for a line with another number of cells. Raises FormatError."""
    key = answers or path.with_suffix(".ans")
    if answers is None and not key.exists():
        raise FormatError(f"{path}: {key.name}, its answers, is not there; name the file with --answers")
    letters = [line.split("\t") for line in text_lines(key)]
    stories = list(text_lines(path))
    if len(letters) != len(stories):
        raise FormatError(
            f"{key}: answers to {len(letters)} stories, {path} has {len(stories)}; take the file that belongs to it"
        )
    for number, (line, right) in enumerate(zip(stories, letters, strict=True), 1):
        cells = line.split("\t")
        if len(right) != 4 or not set(right) <= set(_LETTERS):
            raise FormatError(f"{key}:{number}: not four letters from A to D with tabs between them")
        if len(cells) != _CELLS:
            yield {}
            continue
        for n in range(4):
            question, *choices = cells[3 + 5 * n : 8 + 5 * n]
            yield {
                "id": f"{cells[0]}.{n + 1}",
                "story": _unescaped(cells[2]),
                "question": question,
                "answer_options": dict(zip(_LETTERS, choices, strict=True)),
                "answer": right[n],
            }
