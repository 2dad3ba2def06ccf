"""Tells in which of two phases each token of a target is."""

from __future__ import annotations

from typing import Any

from ..errors import UsageError
from ..llama.phases import PhaseTracker, TokenTexts
from ..llama.reasoning_styles import START, ReasoningStyle, reasoning_style
from ..llama.rendering import Prompt
from ..llama.tokenizing import token_bytes
from ..maps.map_phases import THINKING, PhaseSplit


class TargetPhases:
    """Tells in which of the two phases of a split each token of a target is."""

    def __init__(self, split: PhaseSplit, template: str, vocab: Any) -> None:
        """`template` is the model's chat template, "" if it has none. Raises UsageError if it marks no reasoning."""
        self._split, self._vocab = split, vocab
        self._bytes: dict[int, bytes] = {}
        self._style = reasoning_style(template) if split.first is None else None
        if split.first is None and self._style is None:
            raise UsageError(
                f"phase {THINKING}: the model's chat template marks no reasoning that is known; "
                "split the targets by their tokens, like first:16"
            )

    def __call__(self, prompt: Prompt) -> list[int]:
        """0 or 1 for each token of the target."""
        if self._split.first is not None:
            return [int(index >= self._split.first) for index in range(len(prompt.target))]
        assert self._style is not None
        texts = TokenTexts(self._token_bytes)
        pieces = [texts.next(token) for token in prompt.tokens]
        first = prompt.target[0]
        before = "".join(pieces[:first])
        tracker = PhaseTracker(self._style)
        tracker.next(before[_reply_start(before, "".join(pieces[first:]), self._style) :])
        found = [tracker.next(piece) for piece in pieces[first:]]
        return [int(found[index - first] == "answer") for index in prompt.target]

    def _token_bytes(self, token: int) -> bytes:
        if token not in self._bytes:
            self._bytes[token] = token_bytes(self._vocab, token, special=True)
        return self._bytes[token]


def _reply_start(before: str, target: str, style: ReasoningStyle) -> int:
    """Where, in the text before a target, the message begins that the target is in, as far as markers tell.

    That is the last marker that opens reasoning, or a message; without one, and where the target itself begins with it,
    the reply is taken to begin with the target.
    """
    opening = START if style.tags is None else style.tags.opening
    found = before.rfind(opening)
    return len(before) if found < 0 or target.lstrip().startswith(opening) else found
