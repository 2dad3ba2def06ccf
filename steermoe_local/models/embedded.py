"""The model that ships with the package, and the data that it is tried on."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .._util.package import PACKAGE
from ..errors import UsageError

__all__ = ["TINY", "Behaviour", "behaviours", "data_folder", "embedded_model", "resolve_model", "score_reply"]

TINY = "tiny"

_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred"
)
_WORD = "(" + "|".join(_WORDS.split()) + ")"
# Well formed for a side without being its expected reply: the right behaviour, a wrong answer.
_FORMS: dict[str, tuple[str, str]] = {
    "digits-words": (r"\d+(, \d+)*", rf"{_WORD}(-{_WORD})?(, {_WORD}(-{_WORD})?)*"),
    "refuse-comply": (r"Sorry, .*\.", r"Sure, .*\."),
}
_SIDES = ("positive", "negative")


@dataclass(frozen=True)
class Behaviour:
    """A behaviour planted in the embedded model, with what its card says of it.

    `planted` are the experts, as (layer, expert), that training tied to each side.
    """

    name: str
    positive: str
    negative: str
    pairs: Path
    heldout: Path
    n_activate: int
    n_deactivate: int
    planted_positive: frozenset[tuple[int, int]]
    planted_negative: frozenset[tuple[int, int]]


def data_folder() -> Path:
    """Folder of the embedded model and its pairs and held-out prompts."""
    return PACKAGE / "data"


def embedded_model() -> Path:
    """The model's file."""
    return data_folder() / "tiny-moe.gguf"


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """Path of a model by `tiny` or its path; `shelf.resolve_model` knows further names."""
    if os.fspath(model) == TINY and not Path(TINY).exists():
        return embedded_model()
    return Path(model)


@cache
def card() -> dict[str, Any]:
    """The facts in tiny-moe.json: seed, sizes, planted experts, recommended numbers of experts."""
    data: dict[str, Any] = json.loads((data_folder() / "tiny-moe.json").read_text("utf-8"))
    return data


def behaviours() -> tuple[Behaviour, ...]:
    """The three planted behaviours, in the card's order."""
    sides = {
        "digits-words": ("digits", "words"),
        "document-memory": ("document", "memory"),
        "refuse-comply": ("refuse", "comply"),
    }
    facts = card()
    return tuple(
        Behaviour(
            name=name,
            positive=positive,
            negative=negative,
            pairs=data_folder() / f"{name}.pairs.jsonl",
            heldout=data_folder() / f"{name}.heldout.jsonl",
            n_activate=facts["recommended"][name]["n_activate"],
            n_deactivate=facts["recommended"][name]["n_deactivate"],
            planted_positive=_experts(facts, name, "positive"),
            planted_negative=_experts(facts, name, "negative"),
        )
        for name, (positive, negative) in sides.items()
    )


def behaviour(name: str) -> Behaviour:
    """The planted behaviour of that name. Raises UsageError."""
    for item in behaviours():
        if item.name == name:
            return item
    raise UsageError(
        f"{name!r} is no behaviour of the embedded model; take one of {', '.join(b.name for b in behaviours())}"
    )


def score_reply(behaviour: str, reply: str, positive: str, negative: str) -> tuple[str, bool]:
    """Which side a reply shows ("positive", "negative" or "ill-formed"), and whether it is exactly right.

    Exact is the expected reply of a side. Else digits-words takes any list of numbers in digits or in words, and
    refuse-comply any sentence that begins with "Sorry," or "Sure,"; everything else is ill-formed.
    """
    reply = reply.strip()
    for side, expected in zip(_SIDES, (positive, negative), strict=True):
        if reply == expected:
            return side, True
    for side, form in zip(_SIDES, _FORMS.get(behaviour, ()), strict=False):
        if re.fullmatch(form, reply):
            return side, False
    return "ill-formed", False


def _experts(facts: dict[str, Any], name: str, side: str) -> frozenset[tuple[int, int]]:
    return frozenset((layer, expert) for layer, expert in facts["planted_experts"][name][side])
