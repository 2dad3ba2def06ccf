"""MQuAKE: changed facts of Wikidata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...._util.records import clean_text
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
    sides,
)

__all__ = ["MQuAKE"]

_SHORTEST_ALIAS = 3  # characters; "IT" for Italy is in every other sentence


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
        found = _multi_hop(row, edits, options) if options.hops == "multi" else _single_hops(row, edits, options)
        name = row_id(row)
        for number, one in enumerate(found, 1):
            if isinstance(one, Skipped):
                yield one
                continue
            document, question, extra = one
            yield PromptItem(
                f"{name}.{number}" if name else "", document_prompt(options, document, question), extra=extra
            )


_Parts = tuple[str, str, dict[str, Any]]
"""Document, question and the scorer's fields of an item."""


def _single_hops(row: Row, edits: Sequence[Row], _: BuildOptions) -> Iterator[_Parts | Skipped]:
    for edit in edits:
        try:
            new_text, old_text = _target(edit, "target_new"), _target(edit, "target_true")
            new = _with_aliases(new_text, _hop_aliases(parsed(row.get("new_single_hops")), new_text))
            old = _with_aliases(old_text, _hop_aliases(parsed(row.get("single_hops")), old_text))
            if new_text in old:
                raise Skipped("the new answer is the old one")
            question = needed(edit, "question", "question")
            yield _fact(edit), question, sides(new, old)
        except Skipped as reason:
            yield reason


def _multi_hop(row: Row, edits: Sequence[Row], options: BuildOptions) -> Iterator[_Parts]:
    document = ". ".join(_fact(edit) for edit in edits) + "."
    extended = parsed(row.get("answer_extended"))  # further old answers, which MQuAKE-T has
    old = _with_aliases(
        needed(row, "answer", "answer"), [*clean_texts(parsed(row.get("answer_alias"))), *clean_texts(extended)]
    )
    new = _with_aliases(needed(row, "new_answer", "answer"), parsed(row.get("new_answer_alias")))
    questions = clean_texts(parsed(row.get("questions")))
    if not questions:
        raise Skipped("no question")
    if new[0] in old:
        raise Skipped("the new answer is the old one")
    for question in questions if options.all_questions else questions[:1]:
        yield document, question, sides(new, old)


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
