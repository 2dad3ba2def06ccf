"""Calls of tools that a model chose to make, told from the content of its answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..llama.detokenizer import possible_beginning
from ..llama.reasoning import Part
from .schemas_chat import ChatRequest
from .tool_formats import ToolFormat, tool_format
from .tool_readers import Call, Schemas


@dataclass(frozen=True)
class OfferedTools:
    """The tools that a model may call, and the format of its calls; `most` is the largest number of calls, if any."""

    format: ToolFormat
    schemas: Schemas
    most: int | None = None


def offered_tools(request: ChatRequest, template: str) -> OfferedTools | None:
    """The tools that an answer may call; None: there are none, or the format of the template's calls is not known."""
    if not request.tools or request.tool_choice not in (None, "auto"):
        return None
    format_ = tool_format(template)
    if format_ is None:
        return None
    schemas = {tool.function.name: tool.function.parameters or {} for tool in request.tools}
    return OfferedTools(format_, schemas, 1 if request.parallel_tool_calls is False else None)


class CallSplitter:
    """Splits the text of a streamed answer into content and calls.

    The result does not depend on how the text is cut. What begins like a call is held back to the end, and is content
    if it is none; blank space before a call is left out.
    """

    def __init__(self, tools: OfferedTools) -> None:
        self.calls: list[Call] = []
        self._tools = tools
        self._held = ""
        self._in_calls = False
        self._begun = False  # text of the answer was seen

    @property
    def held(self) -> str:
        """Text of the answer that may belong to a call."""
        return self._held

    def feed(self, parts: Iterable[Part]) -> list[Part]:
        """Add parts of a reply; returns those that are certain, without calls."""
        return [Part(kind, certain) for kind, text in parts if (certain := self._certain(kind, text))]

    def finish(self) -> list[Part]:
        """End the answer: `calls` are complete then. Returns what was held back and is content."""
        text, self._held = self._held, ""
        if not self._in_calls:
            return [Part("answer", text)] if text else []
        blank = len(text) - len(text.lstrip())
        calls, rest = self._tools.format.calls(text[blank:], self._tools.schemas)
        self.calls = calls[: self._tools.most]
        content = rest.strip() if calls else text
        return [Part("answer", content)] if content else []

    def _certain(self, kind: str, text: str) -> str:
        if kind != "answer":
            return text
        self._held += text
        if self._in_calls:
            return ""
        format_ = self._tools.format
        if format_.bare and not self._begun:
            begin = self._held.lstrip()[:1]
            if begin == "{":
                self._in_calls = True
            if begin in ("", "{"):
                return ""
        self._begun = self._begun or bool(self._held.strip())
        starts = [start for opening in format_.openings if (start := self._held.find(opening)) >= 0]
        if starts:
            self._in_calls = True
            certain = self._held[: min(starts)].rstrip()
        else:
            certain = self._held[: len(self._held) - possible_beginning(self._held, format_.openings)].rstrip()
        self._held = self._held[len(certain) :]
        return certain
