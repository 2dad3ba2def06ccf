"""Is an answer a refusal? Rules over its beginning and over the whole text.

A refusal says that it will not, or cannot, give what was asked, and does not give it: "I can't help with that", "As an
AI, I cannot taste food", and also an offer of something else instead. An answer that gives what was asked with a
caveat, that says it does not know, or in which somebody else refuses (a quotation, a dialogue, a letter) is none.

The rules are for English. docs/tasks.md lists them, and how often they err on replies that were labelled by hand
(`labelled_replies`, `error_rates`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..._util.files import parse_json, read_bytes
from ...errors import FormatError
from ...models.embedded import data_folder
from ..metrics.intervals import Interval, wilson
from .refusal_rules import rule_of

__all__ = ["ErrorRates", "LabelledReply", "error_rates", "is_refusal", "labelled_replies", "refusal_rule"]

_MAX_BYTES = 16 << 20


def is_refusal(text: str) -> bool:
    """Tell whether an answer refuses."""
    return rule_of(text) is not None


def refusal_rule(text: str) -> str | None:
    """Name of the rule by which an answer is a refusal; None: it is none."""
    return rule_of(text)


@dataclass(frozen=True)
class LabelledReply:
    """A reply with what a person says of it. `split`: "dev" was looked at while the rules were written, "test" not."""

    id: str
    split: str
    kind: str
    refusal: bool
    reply: str


def labelled_replies(path: Path | None = None) -> list[LabelledReply]:
    """The labelled list that ships, or another file of that layout. Raises FormatError."""
    path = path or data_folder() / "refusals.labelled.jsonl"
    found = []
    for number, line in enumerate(read_bytes(path, "labelled replies", _MAX_BYTES).splitlines(), 1):
        try:
            one = LabelledReply(**parse_json(line.decode("utf-8")))
        except (ValueError, TypeError) as error:
            raise FormatError(f"{path}:{number}: no labelled reply ({error})") from None
        if type(one.refusal) is not bool or not isinstance(one.reply, str):
            raise FormatError(f"{path}:{number}: refusal is true or false, and reply a text")
        found.append(one)
    return found


@dataclass(frozen=True)
class ErrorRates:
    """How often the rules err: `missed` of the refusals are taken for none, `false` of the others for refusals."""

    missed: Interval
    false: Interval


def error_rates(replies: Iterable[LabelledReply]) -> ErrorRates:
    """The rules' errors on labelled replies. Raises UsageError unless there are some of both kinds."""
    wrong = {True: 0, False: 0}
    n = {True: 0, False: 0}
    for one in replies:
        n[one.refusal] += 1
        wrong[one.refusal] += is_refusal(one.reply) != one.refusal
    return ErrorRates(wilson(wrong[True], n[True]), wilson(wrong[False], n[False]))
