"""The models that ship with the package; of `tiny` also the pairs and the held-out prompts."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .._util.package import PACKAGE
from ..errors import UsageError
from ..pairs.number_pairs import ONES, TENS

TINY = "tiny"
_FILES = {TINY: "tiny-moe.gguf"}  # the models that ship: what -m calls them, and their files

_WORD = "(" + "|".join((*ONES, *TENS, "hundred")) + ")"
# Accepted as a side's behaviour although the answer is wrong.
_FORMS: dict[str, tuple[str, str]] = {
    "digits-words": (r"\d+(, \d+)*", rf"{_WORD}(-{_WORD})?(, {_WORD}(-{_WORD})?)*"),
    "refuse-comply": (r"Sorry, .*\.", r"Sure, .*\."),
}


@dataclass(frozen=True)
class Behaviour:
    """A behaviour that training planted in the embedded model, as its card describes it.

    `planted_positive` and `planted_negative` are the experts, as (layer, expert), that were tied to each side.
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


def embedded_models() -> dict[str, Path]:
    """The files of all models that ship, by the names that -m accepts, `tiny` first."""
    return {name: data_folder() / file for name, file in _FILES.items()}


def embedded_model() -> Path:
    """The file of `tiny`."""
    return embedded_models()[TINY]


@cache
def card() -> dict[str, Any]:
    """The facts in tiny-moe.json: seed, sizes, planted experts, recommended numbers of experts."""
    data: dict[str, Any] = json.loads((data_folder() / "tiny-moe.json").read_text("utf-8"))
    return data


def behaviours() -> tuple[Behaviour, ...]:
    """The three planted behaviours, in the card's order."""
    recommended, planted = card()["recommended"], card()["planted_experts"]
    return tuple(
        Behaviour(
            name=name,
            positive=name.split("-")[0],
            negative=name.split("-")[1],
            pairs=data_folder() / f"{name}.pairs.jsonl",
            heldout=data_folder() / f"{name}.heldout.jsonl",
            n_activate=recommended[name]["n_activate"],
            n_deactivate=recommended[name]["n_deactivate"],
            planted_positive=frozenset((layer, expert) for layer, expert in planted[name]["positive"]),
            planted_negative=frozenset((layer, expert) for layer, expert in planted[name]["negative"]),
        )
        for name in ("digits-words", "document-memory", "refuse-comply")
    )


def behaviour(name: str) -> Behaviour:
    """The planted behaviour of that name. Raises UsageError."""
    for item in behaviours():
        if item.name == name:
            return item
    known = ", ".join(item.name for item in behaviours())
    raise UsageError(f"{name!r} is no behaviour of the embedded model; take one of {known}")


def score_reply(behaviour: str, reply: str, positive: str, negative: str) -> tuple[str, bool]:
    """Return the side that a reply shows ("positive", "negative" or "ill-formed") and whether it is exactly right.

    Exact is the expected reply of a side. Else digits-words takes any list of numbers in digits or in words, and
    refuse-comply any sentence that begins with "Sorry," or "Sure,"; everything else is ill-formed.
    """
    reply = reply.strip()
    expected = {"positive": positive, "negative": negative}
    for side, text in expected.items():
        if reply == text:
            return side, True
    for side, form in zip(expected, _FORMS.get(behaviour, ()), strict=False):
        if re.fullmatch(form, reply):
            return side, False
    return "ill-formed", False
