"""What adapters of multiple-choice data sets share."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import Any

from ..._util.records import clean_text
from ...pairs.prompts import PromptItem
from .adapter import (
    DOCUMENT_OPTIONS,
    BuildOptions,
    DatasetAdapter,
    Row,
    Skipped,
    document_prompt,
    parsed,
    row_id,
    sides,
)

__all__ = ["MultipleChoiceAdapter"]

_ASK_LETTER = "Letter of the Answer Only:"


class MultipleChoiceAdapter(DatasetAdapter):
    """Items with choices, of which the model names the letter, takes the likeliest text, or writes an answer."""

    takes = (*DOCUMENT_OPTIONS, "answer_as")
    negative = "another choice"

    def scoring(self, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        if options.answer_as == "free":
            return "contains", {"other": "another choice"}
        return "choice", {"normalize": "characters"} if options.answer_as == "text" else {}

    def item(
        self, options: BuildOptions, row: Row, document: str, question: str, choices: Any, answer: Any
    ) -> PromptItem:
        """The item of a question; `answer` is the label or the text of one of the choices. Raises Skipped."""
        labels, texts = _labelled(choices)
        if len(set(texts)) < len(texts):
            raise Skipped("a choice stands twice")
        name = clean_text(answer)
        if name is None or (name not in labels and name not in texts):
            raise Skipped("the answer is none of the choices")
        right = labels.index(name) if name in labels else texts.index(name)
        letters = string.ascii_uppercase[: len(texts)]
        listed = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
        extra: dict[str, Any]
        if options.answer_as == "free":
            prompt = document_prompt(options, document, question, *listed)
            extra = sides([texts[right]], [text for text in texts if text != texts[right]])
        elif options.answer_as == "text":
            prompt = document_prompt(options, document, question)
            extra = {"choices": texts, "answer": right}
        else:
            prompt = document_prompt(options, document, question, *listed, ask=_ASK_LETTER)
            extra = {"choices": list(letters), "answer": right, "texts": texts}
        return PromptItem(row_id(row), prompt, extra=extra)


def _labelled(choices: Any) -> tuple[list[str], list[str]]:
    """Labels and texts of choices: {"label": [...], "text": [...]}, {"A": ...}, or a list of either or of texts."""
    choices = parsed(choices)
    if isinstance(choices, Mapping) and {"label", "text"} <= set(choices):
        labels, texts = choices["label"], choices["text"]
    elif isinstance(choices, Mapping):
        labels, texts = list(choices), list(choices.values())
    elif isinstance(choices, list) and all(isinstance(one, Mapping) for one in choices):
        labels, texts = [one.get("label") for one in choices], [one.get("text") for one in choices]
    else:
        labels, texts = list(string.ascii_uppercase), choices
    if not isinstance(labels, list) or not isinstance(texts, list):
        raise Skipped("choices that are no list and no object")
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise Skipped("not 2 to 26 choices")
    labels = labels[: len(texts)] if texts is choices else labels
    if len(labels) != len(texts):
        raise Skipped("choices that are no list and no object")
    found = [(clean_text(label), clean_text(text)) for label, text in zip(labels, texts, strict=True)]
    if not all(label and text for label, text in found):
        raise Skipped("an empty choice")
    return [str(label) for label, _ in found], [str(text) for _, text in found]
