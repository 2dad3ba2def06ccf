"""Multiple choice by log-probability."""

from __future__ import annotations

import math
import string
from dataclasses import dataclass

from ...errors import FormatError
from ...pairs.prompts import PromptItem
from .matching import one_of, where
from .tasks import Choice, Score, Scorer

__all__ = ["MultipleChoice"]


@dataclass(frozen=True)
class MultipleChoice(Scorer):
    """The likeliest of the item's `choices` after the prompt is its `answer`; nothing is generated.

    `prefix` is put before each choice and counts as part of it (" " after a plain prompt that ends in a word).
    `normalize`: "none" compares summed log-probabilities; "tokens", "characters" and "bytes" divide by the choice's
    length, so that short ones have no advantage. `other`: label of a choice that `negative` names.
    """

    kind = "choices"

    prefix: str = ""
    normalize: str = "none"
    other: str = "other"

    def __post_init__(self) -> None:
        one_of("normalize", self.normalize, ("none", "tokens", "characters", "bytes"))

    def check(self, item: PromptItem) -> None:
        texts = self._texts(item)
        right, others = self._indices(item, "answer", texts), self._indices(item, "negative", texts)
        if not right:
            raise FormatError(f"{where(item)}: answer: missing; name a choice by its number from 0, letter or text")
        if set(right) & set(others):
            raise FormatError(f"{where(item)}: negative: names a choice that is right as well")

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        return tuple(self.prefix + text for text in self._texts(item))

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        """1 if the likeliest one is right; of equal ones the first is taken, as argmax does."""
        texts = self._texts(item)
        values = [choice.logprob / self._length(text, choice) for text, choice in zip(texts, choices, strict=True)]
        if not all(math.isfinite(value) for value in values):
            return Score(0.0, "ill-formed")
        best = values.index(max(values))
        if best in self._indices(item, "answer", texts):
            return Score(1.0, "right")
        return Score(0.0, self.other if best in self._indices(item, "negative", texts) else "wrong")

    def _length(self, text: str, choice: Choice) -> int:
        if self.normalize == "none":
            return 1
        if self.normalize == "tokens":
            return max(1, choice.n_tokens)
        return len(text) if self.normalize == "characters" else len(text.encode("utf-8"))

    def _texts(self, item: PromptItem) -> list[str]:
        texts = item.extra.get("choices")
        if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(t, str) and t.strip() for t in texts):
            what = "missing" if texts is None else "not a list of two texts at least"
            raise FormatError(f'{where(item)}: choices: {what}; write "choices": ["Paris", "Rome"], "answer": 0')
        if len(set(texts)) < len(texts):
            raise FormatError(f"{where(item)}: choices: one stands twice; a tie has no winner")
        return texts

    def _indices(self, item: PromptItem, name: str, texts: list[str]) -> list[int]:
        """Indices of the choices that a field names: by number from 0, by text, or by letter."""
        value = item.extra.get(name)
        named = [] if value is None else value if isinstance(value, list) else [value]
        indices = []
        for one in named:
            if type(one) is int and 0 <= one < len(texts):
                indices.append(one)
            elif isinstance(one, str) and one in texts:
                indices.append(texts.index(one))
            elif isinstance(one, str) and len(one) == 1 and one in string.ascii_uppercase[: len(texts)]:
                indices.append(string.ascii_uppercase.index(one))
            else:
                raise FormatError(
                    f"{where(item)}: {name}: {one!r} is none of the {len(texts)} choices; "
                    "name one by its number from 0, its letter or its text"
                )
        return indices
