"""Replies in the API's form: with the log probabilities of their tokens, and calls of tools."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from .._util.json_text import BODY_LIMITS, parse_json
from ..generation.engine import FinishEvent, TokenEvent
from ..generation.reply import Reply
from ..llama.reasoning import Part
from ..llama.reasoning_styles import ReasoningStyle
from .grammar import ForcedCall
from .tool_calls import CallSplitter, OfferedTools
from .tool_readers import Call

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
    """The part of an answer that one event added. `arguments` are those of a forced call, which has no other text."""

    parts: list[Part]
    entries: list[Entry]
    arguments: str = ""

    @property
    def text(self) -> str:
        """The text of all parts."""
        return "".join(text for _, text in self.parts)


def finish_reason(finish: FinishEvent) -> FinishReason:
    """OpenAI's finish_reason; a full context counts as a length, too."""
    return "stop" if finish.reason == "stop" else "length"


class Answer(Reply):
    """A reply with the tokens of its text, and with reasoning and calls of tools separated from content.

    `call` is a tool call that the answer was forced to be; `calls` are those that the model chose to make.

    Tokens come out with their text: one whose text is held back, because it may belong to a stop string, waits with it,
    and is left out if it does. So chunks join to the same answer however they are cut.
    """

    def __init__(
        self,
        token_bytes: Callable[[int], bytes],
        with_tokens: bool,
        style: ReasoningStyle | None = None,
        call: ForcedCall | None = None,
        tools: OfferedTools | None = None,
    ) -> None:
        """`token_bytes` gives a token's bytes as they are in the text; `tools` are those that may be called."""
        super().__init__(style)
        self.call = call
        self._call_splitter = None if tools is None else CallSplitter(tools)
        self.entries: list[Entry] = []
        self._token_bytes, self._with_tokens = token_bytes, with_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # as the engine's own
        self._n_read = 0  # characters of all tokens so far
        self._waiting: deque[Entry] = deque()

    @property
    def calls(self) -> list[Call]:
        """The calls that the model chose to make; none before the end of the answer."""
        return [] if self._call_splitter is None else self._call_splitter.calls

    def _keep(self, parts: list[Part]) -> list[Part]:
        return super()._keep(parts if self._call_splitter is None else self._call_splitter.feed(parts))

    def flush(self) -> list[Part]:
        """Take what was held back because a marker or a call might come: nothing follows."""
        parts = super().flush()
        return parts if self._call_splitter is None else parts + super()._keep(self._call_splitter.finish())

    def take(self, event: TokenEvent | FinishEvent) -> Chunk:
        """Add an event; returns what became certain by it."""
        parts = self.add(event)
        entries = self._certain_entries(event)
        self.entries += entries
        if self.call is None:
            return Chunk(parts, entries)
        arguments = "".join(text for kind, text in parts if kind == "answer")
        return Chunk([], entries, arguments if self.call.name is not None else "")

    def _certain_entries(self, event: TokenEvent | FinishEvent) -> list[Entry]:
        if self._with_tokens and isinstance(event, TokenEvent) and event.token >= 0:
            self._waiting.append(Entry(event.token, event.logprob, event.top, self._n_read))
            self._n_read += len(self._decoder.decode(self._token_bytes(event.token)))
        everything = self.finish is not None and self.finish.stop is None
        found = []
        while self._waiting and (everything or self._waiting[0].offset < len(self.raw)):
            found.append(self._waiting.popleft())
        return found

    @property
    def reason(self) -> FinishReason:
        """OpenAI's finish_reason."""
        assert self.finish is not None
        reason = finish_reason(self.finish)
        return "tool_calls" if (self.call is not None or self.calls) and reason == "stop" else reason

    def function(self) -> tuple[str, str]:
        """(name, arguments) of the forced call, as far as it came."""
        assert self.call is not None
        text = self.text
        if self.call.name is not None:
            return self.call.name, text
        with suppress(ValueError, KeyError, TypeError):
            chosen = parse_json(text, BODY_LIMITS, strict=False)
            return str(chosen["name"]), json.dumps(chosen["arguments"], ensure_ascii=False)
        begun = _BEGUN_CALL.match(text)  # cut off by max_tokens
        return (begun[1], text[begun.end() :]) if begun else ("", "")
