"""Splits streamed text into reasoning and answer by the markers of the model's chat template."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from typing import Literal, NamedTuple

from .detokenizer import possible_beginning
from .reasoning_styles import MESSAGE, START, Channels, ReasoningStyle, Tags

Kind = Literal["reasoning", "answer"]
Place = Literal["start", "reasoning", "between", "answer"]

_ROLE = "assistant"
_LONGEST_HEADER = 200  # characters; a longer one is text of a model that left the format


class Part(NamedTuple):
    """A piece of a reply, without the markers of reasoning."""

    kind: Kind
    text: str


class Stretch(NamedTuple):
    """Where a piece of a part stands in the reply as it was fed: its `n` characters end at `end`, of all so far."""

    kind: Kind
    end: int
    n: int


_Piece = tuple[Kind, str, int]
"""A piece of a part, and how many of the characters that were fed come behind it."""


class ReasoningSplitter:
    """Splits a streamed reply. The joined parts do not depend on how the text is cut into pieces.

    Markers and the blank space around tags are left out, nothing else: an opening tag after the beginning of the answer
    is text, and a reply that leaves its format is answer.
    """

    def __init__(self, style: ReasoningStyle | None) -> None:
        """`style` None: everything is answer."""
        self.stretches: list[Stretch] = []
        """Where the parts that the last call returned stand in the reply."""
        self._n_fed = 0
        self._machine: _Tagged | _Channelled | None = None
        if style is not None and style.channels is not None:
            self._machine = _Channelled(style.channels, style.keeps_calls)
        elif style is not None and style.tags is not None:
            self._machine = _Tagged(style.tags)
        if style is not None and style.prefix:
            self.feed(style.prefix)
            self._n_fed = 0  # it stands before the reply

    @property
    def place(self) -> Place:
        """Where the text so far ends: "start", reasoning may still come; "between", it has ended, and no answer yet."""
        return "answer" if self._machine is None else self._machine.place

    @property
    def answers_next(self) -> bool:
        """Whether text of the answer may come next, with no marker before it."""
        return self._machine is None or self._machine.answers_next

    def feed(self, text: str) -> list[Part]:
        """Add text; return the parts that are certain, in order. Text that may become a marker is held back."""
        self._n_fed += len(text)
        if self._machine is None:
            return self._parts([("answer", text, 0)])
        self._machine.held += text
        return self._parts(self._machine.run(last=False))

    def finish(self) -> list[Part]:
        """End the reply: return the parts that were held back."""
        return self._parts([] if self._machine is None else self._machine.run(last=True))

    def _parts(self, pieces: Iterable[_Piece]) -> list[Part]:
        self.stretches = []
        parts: list[tuple[Kind, str]] = []
        for kind, text, behind in pieces:
            parts.append((kind, text))
            self.stretches.append(Stretch(kind, self._n_fed - behind, len(text)))
        return _merged(parts)


def split_reasoning(text: str, style: ReasoningStyle | None) -> tuple[str, str]:
    """(reasoning, answer) of a whole reply."""
    splitter = ReasoningSplitter(style)
    parts = splitter.feed(text) + splitter.finish()
    reasoning, answer = ("".join(text for kind, text in parts if kind == wanted) for wanted in ("reasoning", "answer"))
    return reasoning, answer


class _Tagged:
    """Parser of: blank space, [reasoning, blank space], answer."""

    def __init__(self, tags: Tags) -> None:
        self.held = ""
        self._tags = tags
        self.place: Place = "start"
        self._fresh = True  # no text of the current part was yielded yet
        # Markers before a part, and the state behind them; None: the state stays. A reply without reasoning may begin
        # with its end.
        states: dict[str, Place | None] = {
            tags.header: None,
            tags.opening: "reasoning",
            tags.closing: "between",
            tags.answer_opening: "answer",
        }
        self._states = {marker: state for marker, state in states.items() if marker}
        self._ends: dict[Kind, tuple[str, ...]] = {
            "reasoning": (tags.closing,),
            "answer": tuple(filter(None, (tags.answer_closing, tags.ending))),
        }

    @property
    def answers_next(self) -> bool:
        return self.place in ("between", "answer") or (self.place == "start" and not self.held.strip())

    def run(self, last: bool) -> Iterator[_Piece]:
        going = True
        while going:
            if self.place == "start" or self.place == "between":
                going = self._before(last)
            else:
                going = yield from self._inside(self.place, last)

    def _before(self, last: bool) -> bool:
        """Look for a marker that opens a part; False: more text is needed."""
        text = self.held.lstrip()
        for marker, state in self._states.items():
            if marker == self._tags.closing and self.place == "between":
                continue
            if text.startswith(marker):
                self._enter(state or self.place, text[len(marker) :])
                return True
        if not last and any(marker.startswith(text) for marker in self._states):
            return False
        blank_is_text = self.place == "start"
        self._enter("answer", self.held if blank_is_text else text)
        self._fresh = False
        return True

    def _inside(self, kind: Kind, last: bool) -> Generator[_Piece, None, bool]:
        """Yield the text of a part up to its closing marker; return whether more can be parsed."""
        if self._fresh:
            self.held = self.held.lstrip()
        closings = self._ends[kind]
        found = _first(self.held, closings)
        if found is not None:
            end, closing = found
            text = self.held[:end].rstrip()
            yield kind, text, len(self.held) - len(text)
            self._enter("between" if kind == "reasoning" else "answer", self.held[end + len(closing) :])
            self._fresh = kind == "reasoning"
            return True
        if not closings:
            certain = self.held
        elif last:
            certain = self.held.rstrip() if kind == "reasoning" else self.held
        else:
            certain = self.held[: len(self.held) - possible_beginning(self.held, closings)].rstrip()
        yield kind, certain, len(self.held) - len(certain)
        self._fresh = self._fresh and not certain
        self.held = "" if last else self.held[len(certain) :]
        return False

    def _enter(self, state: Place, rest: str) -> None:
        self.place, self.held, self._fresh = state, rest, True


class _Channelled:
    """Parser of messages with headers up to <|message|> and text up to an end marker; the header gives the kind."""

    def __init__(self, channels: Channels, keeps_calls: bool) -> None:
        self.held = ""
        self._channels, self._keeps_calls = channels, keeps_calls
        self._header: str | None = ""  # None: inside a text
        self._kind: Kind = "answer"
        self._in_call = False
        self._given: set[Kind] = set()
        self._parted = True  # the current text needs no blank line before it

    @property
    def place(self) -> Place:
        """In a header that follows reasoning, or nothing, more reasoning may come."""
        if self._kind == "answer" and (self._header is None or "answer" in self._given):
            return "answer"
        return "reasoning" if self._header is None else "start"

    @property
    def answers_next(self) -> bool:
        return self.place == "answer"

    def run(self, last: bool) -> Iterator[_Piece]:
        markers = self._channels.all_markers
        while True:
            found = _first(self.held, markers)
            if found is None:
                break
            start, marker = found
            text, self.held = self.held[:start], self.held[start:]
            yield from self._text(text)
            self.held = self.held[len(marker) :]
            yield from self._marker(marker)
        keep = 0 if last else possible_beginning(self.held, markers)
        certain = self.held[: len(self.held) - keep]
        self.held = self.held[len(certain) :]
        yield from self._text(certain)
        if last:
            yield from self._leave_header()

    def _text(self, text: str) -> Iterator[_Piece]:
        """Take text that ends where `held` begins."""
        if self._header is not None:
            self._header += text
            if len(self._header) <= _LONGEST_HEADER:
                return
            text, self._header = self._header.removeprefix(_ROLE), None
            self._begin("answer")
        if text:
            yield self._kind, text if self._parted else "\n\n" + text, len(self.held)
            self._given.add(self._kind)
            self._parted = True

    def _marker(self, marker: str) -> Iterator[_Piece]:
        channels = self._channels
        if marker == MESSAGE:
            if self._header is not None:
                header, self._header = self._header, None
                self._in_call = self._keeps_calls and re.search(channels.is_call, header) is not None
                is_answer = not re.search(channels.known, header) or re.search(channels.is_answer, header)
                self._begin("answer" if is_answer or self._in_call else "reasoning")
                if self._in_call:
                    self._parted = True
                    yield self._kind, START + header + MESSAGE, len(self.held)
        elif marker == START or marker in channels.ends:
            if self._in_call and marker != START:
                yield self._kind, marker, len(self.held)
            self._in_call = False
            yield from self._leave_header()
            self._header = ""
        else:  # <|channel|>, also of a model that forgot the <|start|>, and <|constrain|>
            self._header = (self._header or "") + marker

    def _leave_header(self) -> Iterator[_Piece]:
        """End a header without <|message|>: if it says no kind it is an answer of a model that left the format."""
        header, self._header = self._header, None
        if header and not re.search(self._channels.known, header) and header.removeprefix(_ROLE).strip():
            self._begin("answer")
            yield from self._text(header.removeprefix(_ROLE))

    def _begin(self, kind: Kind) -> None:
        self._kind, self._parted = kind, kind not in self._given


def _merged(parts: Iterable[tuple[Kind, str]]) -> list[Part]:
    """Join neighbouring parts of a kind and drop empty ones."""
    merged: list[Part] = []
    for kind, text in parts:
        if merged and merged[-1][0] == kind:
            merged[-1] = Part(kind, merged[-1].text + text)
        elif text:
            merged.append(Part(kind, text))
    return merged


def _first(text: str, markers: tuple[str, ...]) -> tuple[int, str] | None:
    """Position of the first marker in a text, and the marker."""
    found = [(text.find(marker), marker) for marker in markers]
    return min(((start, marker) for start, marker in found if start >= 0), default=None)
