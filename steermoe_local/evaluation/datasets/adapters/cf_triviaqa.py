"""CF-TriviaQA: questions of TriviaQA with paragraphs that answer them otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ....pairs.prompts import PromptItem
from ..adapter import (
    DOCUMENT_OPTIONS,
    BuildOptions,
    DatasetAdapter,
    Row,
    Skipped,
    clean_texts,
    document_prompt,
    needed,
    parsed,
    row_id,
)

__all__ = ["CfTriviaQA"]


class CfTriviaQA(DatasetAdapter):
    """CF-TriviaQA: question_text, paragraph_text, annotation.answer[].paragraph_reference.string."""

    name = "cf-triviaqa"
    what = "TriviaQA's questions with paragraphs that answer them otherwise"
    source = "har_dataset.jsonl of google-research-datasets/cf_triviaqa"
    columns = (("question_text", "paragraph_text", "annotation"),)
    takes = DOCUMENT_OPTIONS

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        document, question = needed(row, "paragraph_text", "document"), needed(row, "question_text", "question")
        found = parsed(row.get("annotation"))
        answers: list[str] = []
        for one in found["answer"] if isinstance(found, Mapping) and isinstance(found.get("answer"), list) else []:
            reference = one.get("paragraph_reference") if isinstance(one, Mapping) else None
            answers += clean_texts(reference.get("string")) if isinstance(reference, Mapping) else []
        if not answers:
            raise Skipped("no answer")
        yield PromptItem(
            row_id(row), document_prompt(options, document, question), extra={"answer": list(dict.fromkeys(answers))}
        )
