"""FaithEval's three data sets: documents against common knowledge, without the answer, and with contradictions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...._util.records import clean_text
from ....pairs.prompts import PromptItem
from ..adapter import ASK, BuildOptions, DatasetAdapter, Row, document_prompt, needed, row_id
from ..multiple_choice import MultipleChoiceAdapter

__all__ = ["Counterfactual", "Inconsistent", "Unanswerable"]


class Counterfactual(MultipleChoiceAdapter):
    """FaithEval-Counterfactual: context, question, choices, answerKey."""

    name = "faitheval-counterfactual"
    what = "documents against common knowledge, multiple choice"
    source = "hub:Salesforce/FaithEval-counterfactual-v1.0:test"
    columns = (("context", "question", "choices", "answerKey"), ("context", "question", "choices", "answer"))

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        document, question = needed(row, "context", "document"), needed(row, "question", "question")
        answer = row.get("answerKey") if clean_text(row.get("answerKey")) else row.get("answer")
        yield self.item(options, row, document, question, row.get("choices"), answer)


class _Phrase(DatasetAdapter):
    """FaithEval's other two, context and question: the right answer is one of the phrases that say what is wrong.

    The first of `phrases` is what the instruction asks for, the others are those of FaithEval's published script.
    """

    columns = (("context", "question"),)
    takes = ("instruction", "match")
    negative = "answers"
    condition: str
    phrases: tuple[str, ...]

    def scoring(self, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        """As FaithEval's script, which finds a phrase also inside a word ("conflicts", "cannot")."""
        return "contains", {"normalize": "squad", "words": False}

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        document, question = needed(row, "context", "document"), needed(row, "question", "question")
        ask = f"If the document {self.condition}, say {self.phrases[0]!r}.\n{ASK}"
        answers = list(self.phrases[:1] if options.match == "strict" else self.phrases)
        yield PromptItem(row_id(row), document_prompt(options, document, question, ask=ask), extra={"answer": answers})


class Unanswerable(_Phrase):
    """FaithEval-Unanswerable."""

    name = "faitheval-unanswerable"
    what = "documents without the answer; the model has to say so"
    source = "hub:Salesforce/FaithEval-unanswerable-v1.0:test"
    positive = "says that the document does not tell"
    condition = "does not give the answer"
    # "unanswerable" is the word of the data's own `answers` and of the paper (arXiv 2509.09660)
    phrases = ("unknown", "unanswerable", "no answer", "no information", "not", "unclear")


class Inconsistent(_Phrase):
    """FaithEval-Inconsistent."""

    name = "faitheval-inconsistent"
    what = "documents that contradict themselves; the model has to say so"
    source = "hub:Salesforce/FaithEval-inconsistent-v1.0:test"
    positive = "says that the document contradicts itself"
    condition = "contradicts itself about the answer"
    phrases = (
        "conflict",
        "conflicting",
        "multiple answers",
        "two answers",
        "2 answers",
        "disagreement",
        "inconsistent",
        "inconsistency",
        "contradictory",
        "contradiction",
    )
