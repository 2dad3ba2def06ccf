"""From the deltas of a chat's answer to the output items of a response, and to the events of its stream."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["in_progress", "completed", "incomplete"]
Event = dict[str, Any]

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}


@dataclass
class _OpenItem:
    """The item that deltas are added to."""

    kind: Literal["message", "reasoning", "function_call"]
    index: int  # among the output items
    call_id: str = ""
    name: str = ""
    namespace: str | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    id: str = ""

    def __post_init__(self) -> None:
        self.id = f"{_PREFIXES[self.kind]}_{secrets.token_hex(24)}"

    @property
    def text(self) -> str:
        """The text, or the arguments, so far."""
        return "".join(self.texts)

    @property
    def part(self) -> dict[str, Any]:
        """The only part of its content."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def item(self, status: Status) -> dict[str, Any]:
        """The item as it is now; one in progress has no text, which comes in events of its own."""
        head = {"id": self.id, "type": self.kind, "status": status}
        content = [] if status == "in_progress" else [self.part]
        if self.kind == "message":
            return head | {"role": "assistant", "content": content}
        if self.kind == "reasoning":
            return head | {"summary": [], "content": content, "encrypted_content": None}
        call = head | {"call_id": self.call_id, "name": self.name}
        if self.namespace is not None:
            call["namespace"] = self.namespace
        return call | {"arguments": "" if status == "in_progress" else self.text}


class ResponseEvents:
    """The output of one response as it grows. Each method returns the events that tell of what it changed.

    Sequence numbers count all events of the response.
    """

    def __init__(self, namespaces: Mapping[str, str | None] | None = None) -> None:
        """`namespaces`: those of the functions that have one."""
        self.output: list[dict[str, Any]] = []
        self._namespaces = dict(namespaces or {})
        self._open: _OpenItem | None = None
        self._call: int | None = None  # number of the call that is open
        self._waiting: list[dict[str, Any]] = []  # log probabilities whose text has not come
        self._n_events = 0

    def event(self, kind: str, **fields: Any) -> Event:
        """An event with the next sequence number."""
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}

    def add(self, delta: Mapping[str, Any], logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[Event]:
        """Add a delta of the message, with the log probabilities of its tokens."""
        if reasoning := delta.get("reasoning_content"):
            yield from self._text("reasoning", reasoning)
        else:
            self._waiting += logprobs
        if content := delta.get("content"):
            yield from self._text("message", content)
        for call in delta.get("tool_calls") or ():
            yield from self._call_delta(call)

    def finish(self, complete: bool) -> Iterator[Event]:
        """End the output; `complete` False: it was cut off, and so was its last item."""
        last_kind = self._open.kind if self._open else None
        answered = last_kind in ("message", "function_call") or any(i["type"] != "reasoning" for i in self.output)
        if not answered and (complete or last_kind is None):
            yield from self._begin("message")  # an empty answer is one
        yield from self._end("completed" if complete else "incomplete")

    def _text(self, kind: Literal["message", "reasoning"], text: str) -> Iterator[Event]:
        if self._open is None or self._open.kind != kind:
            yield from self._begin(kind)
        assert self._open is not None
        self._open.texts.append(text)
        if kind == "reasoning":
            yield self._event_of_part("response.reasoning_text.delta", delta=text)
        else:
            logprobs, self._waiting = self._waiting, []
            self._open.logprobs += logprobs
            yield self._event_of_part("response.output_text.delta", delta=text, logprobs=logprobs)

    def _call_delta(self, call: Mapping[str, Any]) -> Iterator[Event]:
        function = call.get("function") or {}
        number = call.get("index", 0)
        if self._open is None or self._open.kind != "function_call" or number != self._call:
            yield from self._begin("function_call", call_id=call.get("id") or "", name=function.get("name") or "")
            self._call = number
        if arguments := function.get("arguments"):
            assert self._open is not None
            self._open.texts.append(arguments)
            yield self._event_of_item("response.function_call_arguments.delta", delta=arguments)

    def _begin(
        self, kind: Literal["message", "reasoning", "function_call"], call_id: str = "", name: str = ""
    ) -> Iterator[Event]:
        yield from self._end("completed")
        opened = _OpenItem(kind, len(self.output), call_id, name, self._namespaces.get(name))
        self._open = opened
        yield self.event("response.output_item.added", output_index=opened.index, item=opened.item("in_progress"))
        if kind != "function_call":
            yield self._event_of_part("response.content_part.added", part=opened.part)

    def _end(self, status: Status) -> Iterator[Event]:
        """End the open item, if any."""
        opened = self._open
        if opened is None:
            return
        if opened.kind == "function_call":
            yield self._event_of_item("response.function_call_arguments.done", arguments=opened.text)
        else:
            if opened.kind == "message":
                opened.logprobs += self._waiting
                self._waiting = []
                logprobs = list(opened.logprobs)
                yield self._event_of_part("response.output_text.done", text=opened.text, logprobs=logprobs)
            else:
                yield self._event_of_part("response.reasoning_text.done", text=opened.text)
            yield self._event_of_part("response.content_part.done", part=opened.part)
        item = opened.item(status)
        self.output.append(item)
        self._open = None
        yield self.event("response.output_item.done", output_index=opened.index, item=item)

    def _event_of_item(self, kind: str, **fields: Any) -> Event:
        assert self._open is not None
        return self.event(kind, item_id=self._open.id, output_index=self._open.index, **fields)

    def _event_of_part(self, kind: str, **fields: Any) -> Event:
        return self._event_of_item(kind, content_index=0, **fields)


class ReasoningCount:
    """How many tokens of an answer are reasoning, its markers included."""

    def __init__(self) -> None:
        self._kind = ""
        self._undecided = 0  # tokens whose text has not come yet
        self.n = 0

    def add(self, n_tokens: int, kinds: Sequence[str]) -> None:
        """Add tokens, and the kinds of the parts that came with them."""
        self._undecided += n_tokens
        for kind in kinds:
            self._kind = kind
        if self._kind:
            if self._kind == "reasoning":
                self.n += self._undecided
            self._undecided = 0
