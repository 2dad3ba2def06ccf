"""The model that ships with the package, and the data that it is tried on."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .errors import UsageError

__all__ = ["TINY", "Behaviour", "behaviours", "data_folder", "resolve_model"]

TINY = "tiny"


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
    return Path(__file__).parent / "data"


def resolve_model(model: str | os.PathLike[str]) -> Path:
    """Path of a model as the command line names it: `tiny` is the embedded one, else a path."""
    if os.fspath(model) == TINY and not Path(TINY).exists():
        return data_folder() / "tiny-moe.gguf"
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


def _experts(facts: dict[str, Any], name: str, side: str) -> frozenset[tuple[int, int]]:
    return frozenset((layer, expert) for layer, expert in facts["planted_experts"][name][side])
