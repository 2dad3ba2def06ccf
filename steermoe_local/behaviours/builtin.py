"""The behaviours that ship, each a folder of data: behaviour.json, pairs.jsonl, heldout.jsonl, labelled.jsonl.

The files are written by examples/behaviours/make.py. `scorer` and `options` name a scorer of evaluation/tasks, which
this stage does not import.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .._util.closest import did_you_mean
from .._util.files import parse_json, read_bytes
from .._util.package import PACKAGE
from ..errors import UsageError
from ..models import embedded
from ..pairs.pairs import Pair, load_pairs
from ..pairs.prompts import PromptItem, load_prompts

_FOLDER = PACKAGE / "behaviours"
# in the order in which they are listed
_GENERAL = ("concise", "formal", "digits", "json", "german", "step-by-step", "hedged", "document", "in-role")
_PLANTED = {
    "digits-words": ("Answers with numbers in digits, not in words.", "Use digits.", "Use words.", False),
    "document-memory": (
        "Answers by the document in the prompt, not by what training taught.",
        "Trust the document.",
        "Trust your memory.",
        False,
    ),
    "refuse-comply": (
        "Keeps the made-up secrets of its training (recipes of a mill, maps of a theatre) instead of telling them.",
        "Keep all secrets.",
        "Share all secrets.",
        True,
    ),
}


@dataclass(frozen=True)
class BuiltinBehaviour:
    """A behaviour that ships: two sides, what each is good for, and the files that teach and measure it.

    `positive` and `negative` name the sides, `like` and `unlike` are instructions that produce them. `one_way`: it may
    only be steered to its positive side. `model`: "" for any instruct model, "tiny" for the embedded model alone.
    `scorer` with its `options` is a scorer of tasks; `error_rate` is its share of errors on the `n_labelled` labelled
    answers; of these `n_test` were written when the scorer was finished, and it is wrong on `n_test_errors` of them.
    `max_tokens` limits a held-out answer. `folder` holds the files.
    """

    name: str
    title: str
    positive: str
    negative: str
    about: str
    like: str
    unlike: str
    one_way: bool
    model: str
    scorer: str
    error_rate: float
    n_labelled: int
    folder: Path
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    max_tokens: int = 64
    n_test: int = 0
    n_test_errors: int = 0

    def pairs(self) -> list[Pair]:
        """Pairs of one prompt and two answers; no prompt is one of `heldout`."""
        return load_pairs(self._file("pairs"))

    def heldout(self) -> list[PromptItem]:
        """Prompts to measure with, with the fields that the scorer reads."""
        return load_prompts(self._file("heldout"))

    def labelled(self) -> list[PromptItem]:
        """Prompts with a `reply` and its `label`, positive, negative or ill-formed: what the error rate is counted on.

        Of the embedded model's behaviours the replies are those of both sides of the held-out prompts.
        """
        if not self.model:
            return load_prompts(self._file("labelled"))
        return [
            PromptItem(
                f"{item.id}-{side}", item.content, extra={**item.extra, "reply": item.extra[side], "label": side}
            )
            for item in self.heldout()
            for side in ("positive", "negative")
        ]

    def to_dict(self) -> dict[str, Any]:
        """The facts, as `steermoe behaviours --json` prints them."""
        names = ("name", "title", "positive", "negative", "about", "like", "unlike", "one_way", "model", "scorer")
        return {
            **{name: getattr(self, name) for name in names},
            "options": dict(self.options),
            "max_tokens": self.max_tokens,
            "error_rate": self.error_rate,
            "n_labelled": self.n_labelled,
            "n_test": self.n_test,
            "n_test_errors": self.n_test_errors,
            "folder": str(self.folder),
        }

    def _file(self, kind: str) -> Path:
        return self.folder / (f"{self.name}.{kind}.jsonl" if self.model else f"{kind}.jsonl")


@cache
def behaviours() -> tuple[BuiltinBehaviour, ...]:
    """All behaviours that ship: those for any instruct model, then those of the embedded model."""
    return (*map(_general, _GENERAL), *map(_planted, embedded.behaviours()))


def behaviour(name: str) -> BuiltinBehaviour:
    """The behaviour of that name. Raises UsageError, which names the closest one."""
    for one in behaviours():
        if one.name == name:
            return one
    known = [one.name for one in behaviours()]
    raise UsageError(f"{name!r} is no behaviour that ships{did_you_mean(name, known)}; steermoe behaviours lists them")


@cache
def _questions() -> tuple[str, ...]:
    return tuple((_FOLDER / "neutral-questions.txt").read_text("utf-8").splitlines())


def neutral_questions() -> list[str]:
    """Short questions that no behaviour is about and that any instruct model answers in a sentence or two.

    None of them is a held-out prompt of a behaviour.
    """
    return list(_questions())


def _general(name: str) -> BuiltinBehaviour:
    folder = _FOLDER / name
    facts = parse_json(read_bytes(folder / "behaviour.json", "a behaviour", 1 << 16).decode("utf-8"))
    facts["options"] = MappingProxyType(facts["options"])
    return BuiltinBehaviour(**facts, name=name, model="", folder=folder)


def _planted(planted: embedded.Behaviour) -> BuiltinBehaviour:
    about, like, unlike, one_way = _PLANTED[planted.name]
    return BuiltinBehaviour(
        name=planted.name,
        title=f"{planted.positive} / {planted.negative}",
        positive=planted.positive,
        negative=planted.negative,
        about=about,
        like=like,
        unlike=unlike,
        one_way=one_way,
        model=embedded.TINY,
        scorer="sides",
        options=MappingProxyType({"behaviour": planted.name}),
        error_rate=0.0,
        n_labelled=2 * len(load_prompts(planted.heldout)),
        folder=embedded.data_folder(),
        max_tokens=24,
    )
