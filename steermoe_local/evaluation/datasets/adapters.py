"""Items as the rows of known data sets give them: prompts, answers, choices.

Prompts are laid out as the paper's released notebook lays out its faithfulness examples: document, question, a line
that asks for the answer alone. docs/task-builders.md says what is known of each data set's own protocol.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .adapter_parts import (
    ASK,
    BuildOptions,
    Draft,
    Drafts,
    LeftOut,
    Row,
    clean_text,
    clean_texts,
    document_prompt,
    needed,
    parsed,
    row_id,
    sides,
    with_aliases,
)

__all__ = ["CONFLICT", "UNKNOWN", "cf_triviaqa", "counterfactual", "mctest", "mquake", "phrases", "requests"]

# The phrases that FaithEval's published script takes. "unanswerable" is the word of the data's own `answers` and of the
# paper (arXiv 2509.09660). The first one is what the instruction asks for.
UNKNOWN = ("unknown", "unanswerable", "no answer", "no information", "not", "unclear")
CONFLICT = (
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

_ASK_LETTER = "Letter of the Answer Only:"
_MARK = re.compile(r"^(?:one|multiple):\s*", re.IGNORECASE)  # before MCTest's questions
_ESCAPES = {"\\newline": "\n", "\\tab": "\t"}  # in MCTest's stories


#
# multiple choice
#


def _choice_item(options: BuildOptions, row: Row, document: str, question: str, choices: Any, key: Any) -> Draft:
    labels, texts = _labelled(choices)
    if len(set(texts)) < len(texts):
        raise LeftOut("a choice stands twice")
    name = clean_text(key)
    if name is None or (name not in labels and name not in texts):
        raise LeftOut("the answer is none of the choices")
    right = labels.index(name) if name in labels else texts.index(name)
    letters = string.ascii_uppercase[: len(texts)]
    listed = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    if options.answer_as == "free":
        others = [text for text in texts if text != texts[right]]
        prompt = document_prompt(options, document, question, *listed)
        return Draft(row_id(row), prompt, sides([texts[right]], others))
    if options.answer_as == "text":
        return Draft(row_id(row), document_prompt(options, document, question), {"choices": texts, "answer": right})
    prompt = document_prompt(options, document, question, *listed, ask=_ASK_LETTER)
    return Draft(row_id(row), prompt, {"choices": list(letters), "answer": right, "texts": texts})


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
        raise LeftOut("choices that are no list and no object")
    if not 2 <= len(texts) <= len(string.ascii_uppercase):
        raise LeftOut("not 2 to 26 choices")
    labels = labels[: len(texts)] if texts is choices else labels
    if len(labels) != len(texts):
        raise LeftOut("choices that are no list and no object")
    found = [(clean_text(label), clean_text(text)) for label, text in zip(labels, texts, strict=True)]
    if not all(label and text for label, text in found):
        raise LeftOut("an empty choice")
    return [str(label) for label, _ in found], [str(text) for _, text in found]


def counterfactual(row: Row, options: BuildOptions) -> Iterator[Draft]:
    """FaithEval-Counterfactual: context, question, choices, answerKey."""
    document, question = needed(row, "context", "document"), needed(row, "question", "question")
    key = row.get("answerKey") if clean_text(row.get("answerKey")) else row.get("answer")
    yield _choice_item(options, row, document, question, row.get("choices"), key)


def mctest(row: Row, options: BuildOptions) -> Iterator[Draft]:
    """MCTest: story, question, answer_options, answer."""
    question = row.get("question")
    if isinstance(question, Mapping):
        question = question.get("question")
    question = _MARK.sub("", clean_text(question) or "")
    if not question:
        raise LeftOut("no question")
    story = needed(row, "story", "story")
    for escaped, character in _ESCAPES.items():
        story = story.replace(escaped, character)
    yield _choice_item(options, row, story, question, row.get("answer_options"), row.get("answer"))


#
# a phrase that says what is wrong with the document
#


def phrases(words: tuple[str, ...], ask: str) -> Drafts:
    """FaithEval's other two, context and question: `ask` says which phrase is wanted, any of `words` is right."""

    def drafts(row: Row, options: BuildOptions) -> Iterator[Draft]:
        document, question = needed(row, "context", "document"), needed(row, "question", "question")
        answers = list(words[:1] if options.match == "strict" else words)
        yield Draft(row_id(row), document_prompt(options, document, question, ask=f"{ask}\n{ASK}"), {"answer": answers})

    return drafts


#
# facts that were changed
#


def cf_triviaqa(row: Row, options: BuildOptions) -> Iterator[Draft]:
    """CF-TriviaQA: question_text, paragraph_text, annotation.answer[].paragraph_reference.string."""
    document, question = needed(row, "paragraph_text", "document"), needed(row, "question_text", "question")
    found = parsed(row.get("annotation"))
    answers: list[str] = []
    for one in found["answer"] if isinstance(found, Mapping) and isinstance(found.get("answer"), list) else []:
        reference = one.get("paragraph_reference") if isinstance(one, Mapping) else None
        answers += clean_texts(reference.get("string")) if isinstance(reference, Mapping) else []
    if not answers:
        raise LeftOut("no answer")
    yield Draft(row_id(row), document_prompt(options, document, question), {"answer": list(dict.fromkeys(answers))})


def mquake(row: Row, options: BuildOptions) -> Iterator[Draft | LeftOut]:
    """MQuAKE: requested_rewrite, questions, answer, new_answer, their aliases, single_hops and new_single_hops."""
    edits = parsed(row.get("requested_rewrite"))
    if not isinstance(edits, list) or not edits or not all(isinstance(edit, Mapping) for edit in edits):
        raise LeftOut("no edited fact")
    if options.hops == "multi":
        yield from _multi_hop(row, edits, options)
        return
    name = row_id(row)
    for place, edit in enumerate(edits, 1):
        try:
            yield _single_hop(row, edit, f"{name}.{place}" if name else "", options)
        except LeftOut as reason:
            yield reason


def _single_hop(row: Row, edit: Row, name: str, options: BuildOptions) -> Draft:
    new_text, old_text = _target(edit, "target_new"), _target(edit, "target_true")
    new = with_aliases(new_text, _hop_aliases(parsed(row.get("new_single_hops")), new_text))
    old = with_aliases(old_text, _hop_aliases(parsed(row.get("single_hops")), old_text))
    if new_text in old:
        raise LeftOut("the new answer is the old one")
    question = needed(edit, "question", "question")
    return Draft(name, document_prompt(options, _fact(edit), question), sides(new, old))


def _multi_hop(row: Row, edits: Sequence[Row], options: BuildOptions) -> Iterator[Draft]:
    document = ". ".join(_fact(edit) for edit in edits) + "."
    extended = parsed(row.get("answer_extended"))  # further old answers, which MQuAKE-T has
    old = with_aliases(
        needed(row, "answer", "answer"), [*clean_texts(parsed(row.get("answer_alias"))), *clean_texts(extended)]
    )
    new = with_aliases(needed(row, "new_answer", "answer"), parsed(row.get("new_answer_alias")))
    questions, name = clean_texts(parsed(row.get("questions"))), row_id(row)
    if not questions:
        raise LeftOut("no question")
    if new[0] in old:
        raise LeftOut("the new answer is the old one")
    for place, question in enumerate(questions if options.all_questions else questions[:1], 1):
        yield Draft(f"{name}.{place}" if name else "", document_prompt(options, document, question), sides(new, old))


def _fact(edit: Row) -> str:
    """An edited fact as a sentence without its full stop."""
    statement, subject = needed(edit, "prompt", "edited fact"), needed(edit, "subject", "edited fact")
    return f"{statement.replace('{}', subject)} {_target(edit, 'target_new')}"


def _target(edit: Row, name: str) -> str:
    value = edit.get(name)
    return needed(value if isinstance(value, Mapping) else {"str": value}, "str", "answer")


def _hop_aliases(hops: Any, answer: str) -> list[str]:
    """What a single hop calls its answer besides."""
    for hop in hops if isinstance(hops, list) else []:
        if isinstance(hop, Mapping) and clean_text(hop.get("answer")) == answer:
            return clean_texts(hop.get("answer_alias"))
    return []


#
# lists of prompts
#


def requests(*columns: str) -> Drafts:
    """Prompts in one of the columns, the first that a row has."""

    def drafts(row: Row, _: BuildOptions) -> Iterator[Draft]:
        prompt = next((text for name in columns if (text := clean_text(row.get(name)))), None)
        if prompt is None:
            raise LeftOut("no prompt")
        # of the other columns only what groups results; AdvBench's `target`, say, is an answer that nobody needs here
        kept = {name: text for name in ("category", "source") if (text := clean_text(row.get(name)))}
        yield Draft(row_id(row), prompt, kept)

    return drafts
