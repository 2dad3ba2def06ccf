"""Replies in the API's form: with the log probabilities of their tokens, and calls of tools."""

from __future__ import annotations

import codecs
import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from .._util.json_text import BODY_LIMITS, parse_json
from ..generation.engine import FinishEvent, TokenEvent
from ..generation.reply import Reply
from ..llama.reasoning import Part
from ..llama.reasoning_styles import ReasoningStyle
from .grammar import ForcedCall
from .steered_text import SteeredText
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
    """The part of an answer that one event added. `arguments` are those of a forced call, which has no other text.

    `rules` are those of the parts, which are cut where the rule changes; empty where nobody asked for them.
    """

    parts: list[Part]
    entries: list[Entry]
    arguments: str = ""
    rules: Sequence[int | None] = ()

    @property
    def pieces(self) -> list[tuple[Part, int | None]]:
        """The parts with their rules."""
        return list(zip(self.parts, self.rules or [None] * len(self.parts), strict=True))

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
        with_rules: bool = False,
    ) -> None:
        """`token_bytes` gives a token's bytes as they are in the text; `tools` are those that may be called."""
        super().__init__(style)
        self.steered = SteeredText() if with_rules else None
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
        if self.steered is not None:
            self.steered.split(self._splitter.stretches)
        return super()._keep(parts if self._call_splitter is None else self._call_splitter.feed(parts))

    def flush(self) -> list[Part]:
        """Take what was held back because a marker or a call might come: nothing follows."""
        parts = super().flush()
        if self._call_splitter is None:
            return parts
        held = self._call_splitter.held
        rest = self._call_splitter.finish()
        if self.steered is not None and rest:
            # text beside calls; what is left of several places has the rules of the first
            self.steered.skip("answer", max(0, held.find(rest[0].text)))
        return parts + super()._keep(rest)

    def take(self, event: TokenEvent | FinishEvent) -> Chunk:
        """Add an event; returns what became certain by it."""
        n_characters = 0
        if isinstance(event, TokenEvent) and event.token >= 0 and (self._with_tokens or self.steered is not None):
            n_characters = len(self._decoder.decode(self._token_bytes(event.token)))
            if self.steered is not None:
                self.steered.drew(event.rule, n_characters)
        parts = self.add(event)
        entries = self._certain_entries(event, n_characters)
        self.entries += entries
        if self.call is None and self.steered is not None:
            marked = self.steered.cut(parts)
            return Chunk([part for part, _ in marked], entries, rules=[rule for _, rule in marked])
        if self.call is None:
            return Chunk(parts, entries)
        arguments = "".join(text for kind, text in parts if kind == "answer")
        return Chunk([], entries, arguments if self.call.name is not None else "")

    def _certain_entries(self, event: TokenEvent | FinishEvent, n_characters: int) -> list[Entry]:
        if self._with_tokens and isinstance(event, TokenEvent) and event.token >= 0:
            self._waiting.append(Entry(event.token, event.logprob, event.top, self._n_read))
            self._n_read += n_characters
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
