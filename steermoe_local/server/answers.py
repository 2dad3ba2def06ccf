"""An answer as it comes in: text that is certain, tokens with their log probabilities, reasoning and calls of tools."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from ..generation.engine import FinishEvent, TokenEvent
from ..llama.reasoning import Kind, Part, ReasoningSplitter, ReasoningStyle
from .grammar import ForcedCall

__all__ = ["Answer", "ChatAnswer", "Chunk", "Entry", "finish_reason"]

_BEGUN_CALL = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*')

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Entry:
    """A token with its log probability; `offset` is where its text begins, in characters of the answer."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    offset: int


@dataclass
class Chunk:
    """What an event adds to an answer."""

    text: str = ""
    entries: list[Entry] = field(default_factory=list)


class Answer:
    """The text of one answer, and the tokens behind it.

    Tokens come out with their text: one whose text is held back, because it may belong to a stop string, waits with it,
    and is left out if it does. So chunks join to the same answer however they are cut.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], with_tokens: bool) -> None:
        """`token_bytes` gives a token's bytes as they stand in the text."""
        self._token_bytes, self._with_tokens = token_bytes, with_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # as the engine's own
        self._n_read = 0  # characters of all tokens so far
        self._waiting: deque[Entry] = deque()
        self.text = ""
        self.entries: list[Entry] = []
        self.finish: FinishEvent | None = None

    def take(self, event: TokenEvent | FinishEvent) -> Chunk:
        """Add an event; returns what became certain by it."""
        chunk = Chunk()
        if isinstance(event, TokenEvent):
            chunk.text = event.text
            self.text += event.text
            if self._with_tokens and event.token >= 0:
                self._waiting.append(Entry(event.token, event.logprob, event.top, self._n_read))
                self._n_read += len(self._decoder.decode(self._token_bytes(event.token)))
        else:
            self.finish = event
        everything = self.finish is not None and self.finish.stop is None
        while self._waiting and (everything or self._waiting[0].offset < len(self.text)):
            chunk.entries.append(self._waiting.popleft())
        self.entries += chunk.entries
        return chunk


def finish_reason(finish: FinishEvent) -> FinishReason:
    """OpenAI's reason: a full context is a length, too."""
    return "stop" if finish.reason == "stop" else "length"


@dataclass
class ChatDelta:
    """What an event adds to a chat's answer. `arguments` are those of a forced call."""

    parts: list[Part]
    entries: list[Entry]
    arguments: str = ""


class ChatAnswer:
    """An answer of a chat: its reasoning told from its content, or the arguments of a forced call."""

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        with_tokens: bool,
        style: ReasoningStyle | None,
        call: ForcedCall | None,
    ) -> None:
        self.answer = Answer(token_bytes, with_tokens)
        self._splitter = ReasoningSplitter(style)
        self.call = call
        self.texts: dict[Kind, str] = {"reasoning": "", "answer": ""}

    def take(self, event: TokenEvent | FinishEvent) -> ChatDelta:
        """Add an event."""
        chunk = self.answer.take(event)
        parts = self._splitter.feed(chunk.text) if chunk.text else []
        if isinstance(event, FinishEvent):
            parts += self._splitter.finish()
        for kind, text in parts:
            self.texts[kind] += text
        if self.call is None:
            return ChatDelta(parts, chunk.entries)
        given = "".join(text for kind, text in parts if kind == "answer")
        return ChatDelta([], chunk.entries, given if self.call.name is not None else "")

    @property
    def finish(self) -> FinishEvent | None:
        """How it ended."""
        return self.answer.finish

    @property
    def reason(self) -> FinishReason:
        """How it ended, in OpenAI's words."""
        assert self.finish is not None
        reason = finish_reason(self.finish)
        return "tool_calls" if self.call is not None and reason == "stop" else reason

    def function(self) -> tuple[str, str]:
        """(name, arguments) of the forced call, as far as it came."""
        assert self.call is not None
        text = self.texts["answer"]
        if self.call.name is not None:
            return self.call.name, text
        with suppress(ValueError, KeyError, TypeError):
            chosen = json.loads(text)
            return str(chosen["name"]), json.dumps(chosen["arguments"], ensure_ascii=False)
        begun = _BEGUN_CALL.match(text)  # cut off by max_tokens
        return (begun[1], text[begun.end() :]) if begun else ("", "")
