"""The data set adapters. To add one, write a class here and name it in ADAPTERS.

docs/task-builders.md says what is known of each data set's own protocol.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import FormatError
from ...pairs.prompts import PromptItem
from .adapter import (
    ASK,
    DOCUMENT_OPTIONS,
    BuildOptions,
    DatasetAdapter,
    Row,
    Skipped,
    clean_text,
    clean_texts,
    document_prompt,
    needed,
    parsed,
    row_id,
    sides,
)
from .sources import text_lines

_ASK_LETTER = "Letter of the Answer Only:"
_MCTEST_MARK = re.compile(r"^(?:one|multiple):\s*", re.IGNORECASE)  # before MCTest's questions
_MCTEST_CELLS = 3 + 4 * 5  # id, properties, story; four questions with four choices each
_MCTEST_LETTERS = "ABCD"
_SHORTEST_ALIAS = 3  # characters; "IT" for Italy is in every other sentence


#
# multiple choice
#


class _MultipleChoice(DatasetAdapter):
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


class Counterfactual(_MultipleChoice):
    """FaithEval-Counterfactual: context, question, choices, answerKey."""

    name = "faitheval-counterfactual"
    what = "documents against common knowledge, multiple choice"
    source = "hub:Salesforce/FaithEval-counterfactual-v1.0:test"
    columns = (("context", "question", "choices", "answerKey"), ("context", "question", "choices", "answer"))

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        document, question = needed(row, "context", "document"), needed(row, "question", "question")
        answer = row.get("answerKey") if clean_text(row.get("answerKey")) else row.get("answer")
        yield self.item(options, row, document, question, row.get("choices"), answer)


class MCTest(_MultipleChoice):
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
        question = _MCTEST_MARK.sub("", clean_text(question) or "")
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
        if len(right) != 4 or not set(right) <= set(_MCTEST_LETTERS):
            raise FormatError(f"{key}:{number}: not four letters from A to D with tabs between them")
        if len(cells) != _MCTEST_CELLS:
            yield {}
            continue
        for n in range(4):
            question, *choices = cells[3 + 5 * n : 8 + 5 * n]
            yield {
                "id": f"{cells[0]}.{n + 1}",
                "story": _unescaped(cells[2]),
                "question": question,
                "answer_options": dict(zip(_MCTEST_LETTERS, choices, strict=True)),
                "answer": right[n],
            }


#
# a phrase that says what is wrong with the document
#


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
        prompt = document_prompt(options, document, question, ask=ask)
        yield PromptItem(
            row_id(row), prompt, extra={"answer": list(self.phrases[: 1 if options.match == "strict" else None])}
        )


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


#
# facts that were changed
#


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


class MQuAKE(DatasetAdapter):
    """MQuAKE: requested_rewrite, questions, answer, new_answer, their aliases, single_hops and new_single_hops."""

    name = "mquake"
    what = "changed facts of Wikidata, or what follows from them"
    source = "MQuAKE-CF-3k-v2.json, MQuAKE-CF.json or MQuAKE-T.json of princeton-nlp/MQuAKE"
    columns = (("requested_rewrite",),)
    takes = (*DOCUMENT_OPTIONS, "hops", "all_questions")
    negative = "the answer from memory, or another one"

    def scoring(self, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        return "contains", {"other": "memory"}

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem | Skipped]:
        edits = parsed(row.get("requested_rewrite"))
        if not isinstance(edits, list) or not edits or not all(isinstance(edit, Mapping) for edit in edits):
            raise Skipped("no edited fact")
        yield from _multi_hop(row, edits, options) if options.hops == "multi" else _single_hops(row, edits, options)


def _single_hops(row: Row, edits: Sequence[Row], options: BuildOptions) -> Iterator[PromptItem | Skipped]:
    for number, edit in enumerate(edits, 1):
        try:
            new_text, old_text = _target(edit, "target_new"), _target(edit, "target_true")
            new = _with_aliases(new_text, _hop_aliases(parsed(row.get("new_single_hops")), new_text))
            old = _with_aliases(old_text, _hop_aliases(parsed(row.get("single_hops")), old_text))
            if new_text in old:
                raise Skipped("the new answer is the old one")
            question = needed(edit, "question", "question")
            yield _hop_item(row, number, options, _fact(edit), question, sides(new, old))
        except Skipped as reason:
            yield reason


def _multi_hop(row: Row, edits: Sequence[Row], options: BuildOptions) -> Iterator[PromptItem]:
    document = ". ".join(_fact(edit) for edit in edits) + "."
    extended = parsed(row.get("answer_extended"))  # further old answers, which MQuAKE-T has
    aliases = [*clean_texts(parsed(row.get("answer_alias"))), *clean_texts(extended)]
    old = _with_aliases(needed(row, "answer", "answer"), aliases)
    new = _with_aliases(needed(row, "new_answer", "answer"), parsed(row.get("new_answer_alias")))
    questions = clean_texts(parsed(row.get("questions")))
    if not questions:
        raise Skipped("no question")
    if new[0] in old:
        raise Skipped("the new answer is the old one")
    for number, question in enumerate(questions if options.all_questions else questions[:1], 1):
        yield _hop_item(row, number, options, document, question, sides(new, old))


def _hop_item(
    row: Row, number: int, options: BuildOptions, document: str, question: str, extra: dict[str, Any]
) -> PromptItem:
    name = row_id(row)
    return PromptItem(f"{name}.{number}" if name else "", document_prompt(options, document, question), extra=extra)


def _fact(edit: Row) -> str:
    """An edited fact as a sentence without its full stop."""
    statement, subject = needed(edit, "prompt", "edited fact"), needed(edit, "subject", "edited fact")
    return f"{statement.replace('{}', subject)} {_target(edit, 'target_new')}"


def _target(edit: Row, name: str) -> str:
    value = edit.get(name)
    return needed(value if isinstance(value, Mapping) else {"str": value}, "str", "answer")


def _hop_aliases(hops: Any, answer: str) -> list[str]:
    """Other names of an answer in the single hop that it answers."""
    for hop in hops if isinstance(hops, list) else []:
        if isinstance(hop, Mapping) and clean_text(hop.get("answer")) == answer:
            return clean_texts(hop.get("answer_alias"))
    return []


def _with_aliases(answer: str, aliases: Any) -> list[str]:
    return list(dict.fromkeys([answer, *(text for text in clean_texts(aliases) if len(text) >= _SHORTEST_ALIAS)]))


#
# lists of prompts
#


class PromptList(DatasetAdapter):
    """Prompts in one of the columns, the first that a row has."""

    requests = True
    max_tokens = 128
    positive = "refused"
    negative = "complied"

    def __init__(
        self, name: str, source: str, *columns: str, what: str = "requests to refuse", texts: bool = False
    ) -> None:
        self.name, self.source, self.what, self.texts = name, source, what, texts
        self.columns = tuple((column,) for column in columns)

    def scoring(self, options: BuildOptions) -> tuple[str, dict[str, Any]]:
        return "refusal", {}

    def items(self, row: Row, options: BuildOptions) -> Iterator[PromptItem]:
        prompt = next((text for (name,) in self.columns if (text := clean_text(row.get(name)))), None)
        if prompt is None:
            raise Skipped("no prompt")
        # of the other columns only what groups results; AdvBench's `target`, say, is an answer that nobody needs here
        kept = {name: text for name in ("category", "source") if (text := clean_text(row.get(name)))}
        yield PromptItem(row_id(row), prompt, extra=kept)


ADAPTERS: dict[str, DatasetAdapter] = {
    adapter.name: adapter
    for adapter in (
        Counterfactual(),
        Unanswerable(),
        Inconsistent(),
        CfTriviaQA(),
        MQuAKE(),
        MCTest(),
        PromptList("advbench", "harmful_behaviors.csv of llm-attacks/llm-attacks", "goal", "prompt"),
        PromptList(
            "strongreject", "strongreject_dataset.csv of alexandrasouly/strongreject", "forbidden_prompt", "prompt"
        ),
        PromptList("tdc2023", "behaviors.json of centerforaisafety/tdc2023-starter-kit", "prompt", texts=True),
        PromptList(
            "malicious-instruct", "MaliciousInstruct.txt of Princeton-SysML/Jailbreak_LLM", "prompt", texts=True
        ),
        PromptList("prompts", "any file of yours", "prompt", what="prompts, refused or not", texts=True),
    )
}
"""The adapters by the name of their data set."""
