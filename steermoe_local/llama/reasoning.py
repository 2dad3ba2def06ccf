"""Splits streamed text into reasoning and answer by the markers of the model's chat template."""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["reasoning", "answer"]


class Part(NamedTuple):
    """A piece of a reply, without the markers of reasoning."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Tags:
    """Markers around the reasoning at the beginning of a reply and, optionally, around the answer after it."""

    opening: str
    closing: str
    answer_opening: str = ""
    answer_closing: str = ""


# The pairs that chat templates of models in GGUF form use; where both have a "<think>", the longer entry comes first.
_TAGS = (
    Tags("<think>", "</think>", "<answer>", "</answer>"),  # Hunyuan
    Tags("<think>", "</think>", "<response>", "</response>"),  # ERNIE
    Tags("<think>", "</think>"),  # Qwen3, DeepSeek, GLM, MiniMax, ...
    Tags("<thinking>", "</thinking>"),
    Tags("<seed:think>", "</seed:think>"),
    Tags("[THINK]", "[/THINK]"),  # Magistral
    Tags("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Cohere
)

# OpenAI's harmony format (gpt-oss): <|start|>ROLE<|channel|>CHANNEL<|message|>TEXT<|end|>, the last one <|return|>.
_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_HARMONY = (_START, _CHANNEL, _MESSAGE, *_ENDS, "<|constrain|>")
_ROLE = "assistant"
_LONGEST_HEADER = 200  # characters; a longer one is text of a model that left the format


@dataclass(frozen=True)
class ReasoningStyle:
    """How a model marks its reasoning: by `tags`, or by harmony's channels if that is None.

    `prefix` is the part of the reply that the prompt already ends with: a template may open the reasoning itself.
    """

    tags: Tags | None
    prefix: str = ""

    @property
    def markers(self) -> tuple[str, ...]:
        """All marker texts. Those that are control tokens must be detokenized (`Request.special`)."""
        if self.tags is None:
            return _HARMONY
        tags = self.tags
        return tuple(filter(None, (tags.opening, tags.closing, tags.answer_opening, tags.answer_closing)))


def reasoning_style(template: str, prompt: str = "") -> ReasoningStyle | None:
    """The reasoning style of a chat template, None if no known markers are in it; `prompt` is the rendered prompt.

    A reply to a prompt that ends with the opening marker begins inside the reasoning.
    """
    if _CHANNEL in template and _MESSAGE in template:
        start = prompt.rfind(_START)
        return ReasoningStyle(None, prompt[start:] if start >= 0 else "")
    for tags in _TAGS:
        known = tags.opening in template or tags.closing in template
        if known and (not tags.answer_opening or tags.answer_opening in template):
            return ReasoningStyle(tags, tags.opening if prompt.rstrip().endswith(tags.opening) else "")
    return None


class ReasoningSplitter:
    """Splits a streamed reply. The joined parts do not depend on how the text is cut into pieces.

    Markers and the blank space around tags are left out, nothing else: an opening tag after the beginning of the answer
    is text, and a reply that leaves its format is answer.
    """

    def __init__(self, style: ReasoningStyle | None) -> None:
        """`style` None: everything is answer."""
        self._machine = None if style is None else (_Harmony() if style.tags is None else _Tagged(style.tags))
        if style is not None and style.prefix:
            self.feed(style.prefix)

    def feed(self, text: str) -> list[Part]:
        """Add text; return the parts that are certain, in order. Text that may become a marker is held back."""
        if self._machine is None:
            return [Part("answer", text)] if text else []
        self._machine.held += text
        return _merged(self._machine.run(last=False))

    def finish(self) -> list[Part]:
        """End the reply: return the parts that were held back."""
        return [] if self._machine is None else _merged(self._machine.run(last=True))


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
        self._state: Literal["start", "reasoning", "between", "answer"] = "start"
        self._fresh = True  # no text of the current part was yielded yet

    def run(self, last: bool) -> Iterator[tuple[Kind, str]]:
        going = True
        while going:
            if self._state in ("start", "between"):
                going = self._before(last)
            elif self._state == "reasoning":
                going = yield from self._inside("reasoning", self._tags.closing, last)
            else:
                going = yield from self._inside("answer", self._tags.answer_closing, last)

    def _before(self, last: bool) -> bool:
        """Look for a marker that opens a part; False: more text is needed."""
        text = self.held.lstrip()
        states = {self._tags.opening: "reasoning", self._tags.answer_opening: "answer"}
        for marker in filter(None, states):
            if text.startswith(marker):
                self._enter("reasoning" if states[marker] == "reasoning" else "answer", text[len(marker) :])
                return True
        if not last and any(marker.startswith(text) for marker in states if marker):
            return False
        blank_is_text = self._state == "start"
        self._enter("answer", self.held if blank_is_text else text)
        self._fresh = False
        return True

    def _inside(self, kind: Kind, closing: str, last: bool) -> Generator[tuple[Kind, str], None, bool]:
        """Yield the text of a part up to its closing marker; return whether more can be parsed."""
        if self._fresh:
            self.held = self.held.lstrip()
        end = self.held.find(closing) if closing else -1
        if end >= 0:
            yield kind, self.held[:end].rstrip()
            self._enter("between" if kind == "reasoning" else "answer", self.held[end + len(closing) :])
            self._fresh = kind == "reasoning"
            return True
        if not closing:
            certain = self.held
        elif last:
            certain = self.held.rstrip() if kind == "reasoning" else self.held
        else:
            certain = self.held[: len(self.held) - _partial(self.held, (closing,))].rstrip()
        yield kind, certain
        self._fresh = self._fresh and not certain
        self.held = "" if last else self.held[len(certain) :]
        return False

    def _enter(self, state: Literal["reasoning", "between", "answer"], rest: str) -> None:
        self._state, self.held, self._fresh = state, rest, True


class _Harmony:
    """Parser of harmony: header up to <|message|>, text up to an end marker; the header's channel gives its kind."""

    def __init__(self) -> None:
        self.held = ""
        self._header: str | None = ""  # None: inside a text
        self._kind: Kind = "answer"
        self._given: set[Kind] = set()
        self._parted = True  # the current text needs no blank line before it

    def run(self, last: bool) -> Iterator[tuple[Kind, str]]:
        while True:
            found = _first(self.held, _HARMONY)
            if found is None:
                break
            start, marker = found
            yield from self._text(self.held[:start])
            self.held = self.held[start + len(marker) :]
            yield from self._marker(marker)
        keep = 0 if last else _partial(self.held, _HARMONY)
        certain = self.held[: len(self.held) - keep]
        self.held = self.held[len(certain) :]
        yield from self._text(certain)
        if last:
            yield from self._leave_header()

    def _text(self, text: str) -> Iterator[tuple[Kind, str]]:
        if self._header is not None:
            self._header += text
            if len(self._header) <= _LONGEST_HEADER:
                return
            text, self._header = self._header.removeprefix(_ROLE), None
            self._begin("answer")
        if text:
            yield self._kind, text if self._parted else "\n\n" + text
            self._given.add(self._kind)
            self._parted = True

    def _marker(self, marker: str) -> Iterator[tuple[Kind, str]]:
        if marker == _MESSAGE:
            if self._header is not None:
                channel = re.search(r"<\|channel\|>\s*(\w+)", self._header)
                self._header = None
                self._begin("answer" if channel is None or channel[1] == "final" else "reasoning")
        elif marker in (_START, *_ENDS):
            yield from self._leave_header()
            self._header = ""
        else:  # <|channel|>, also of a model that forgot the <|start|>, and <|constrain|>
            self._header = (self._header or "") + marker

    def _leave_header(self) -> Iterator[tuple[Kind, str]]:
        """End a header without <|message|>: without a channel it is an answer of a model that left the format."""
        header, self._header = self._header, None
        if header and _CHANNEL not in header and header.removeprefix(_ROLE).strip():
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


def _partial(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest suffix of the text that is a prefix of a marker."""
    longest = max(len(marker) for marker in markers) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-n:]) for marker in markers):
            return n
    return 0
