"""Phases of a reply, token by token: thinking, then the answer, as the model's reasoning format marks them."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from ..steering.plan_rules import Phase
from .reasoning import ReasoningSplitter
from .reasoning_styles import ReasoningStyle


class PhaseTracker:
    """Tells the phase of each token of a reply as it comes.

    The tokens of the markers that begin and end the reasoning belong to the thinking, and so does text at the beginning
    of a reply while it may still become such a marker. What follows the end of the reasoning is answer. Without a
    reasoning style all of a reply is.
    """

    def __init__(self, style: ReasoningStyle | None) -> None:
        self._splitter = ReasoningSplitter(style)

    @property
    def upcoming(self) -> Phase:
        """The phase of the token that comes next, as far as it is known: where reasoning may begin, the answer."""
        return "answer" if self._splitter.answers_next else "thinking"

    def next(self, text: str) -> Phase:
        """The phase of the reply's next token, whose text this is, with those of control tokens."""
        before = self._splitter.place
        self._splitter.feed(text)
        after = self._splitter.place
        ended = before in ("between", "answer") and after != "reasoning"
        return "answer" if after == "answer" or ended else "thinking"


class TokenTexts:
    """Texts of tokens, one after the other: a character belongs to the token that completes it."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, token: int) -> str:
        """The text that the next token adds."""
        return self._decoder.decode(self._token_bytes(token))
