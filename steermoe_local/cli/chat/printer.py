"""Prints an answer on a terminal while it is generated."""

from __future__ import annotations

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from ..._util.visible import HarmlessStream
from .text import WordWrap

REASONING = "dim italic"
ERASE_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))


class Printer:
    """Prints one answer on a terminal, part by part; reasoning dim, or hidden."""

    def __init__(self, console: Console, show_reasoning: bool) -> None:
        self._console = console
        self._show_reasoning = show_reasoning
        self._wrap, self._filter = self._new_wrap(), HarmlessStream()
        self._kind = ""
        self._thinking = False  # the line "thinking ..." is shown in place of hidden reasoning
        self._at_start = True  # of a line

    def add(self, kind: str, text: str) -> None:
        """Show a part of the answer."""
        if not text:
            return
        if kind == "reasoning" and not self._show_reasoning:
            if not self._thinking:
                self._print("thinking ...", REASONING)
                self._thinking = True
            return
        if kind != self._kind:
            self._change(kind)
            text = text.lstrip("\n")
        self._print(self._wrap.feed(self._filter.feed(text)), REASONING if kind == "reasoning" else "")

    def end(self) -> None:
        """Show what was held back, and end the line."""
        self._finish_part()
        self._clear_thinking()
        if not self._at_start:
            self._print("\n", "")

    def _change(self, kind: str) -> None:
        """Begin with the reasoning or the answer, with an empty line between them."""
        self._clear_thinking()
        if self._kind:
            self._finish_part()
            self._print("\n" if self._at_start else "\n\n", "")
        self._kind, self._wrap = kind, self._new_wrap()

    def _finish_part(self) -> None:
        rest = self._wrap.feed(self._filter.end()) + self._wrap.end()
        self._print(rest, REASONING if self._kind == "reasoning" else "")

    def _clear_thinking(self) -> None:
        if self._thinking:
            self._thinking = False
            if self._console.is_dumb_terminal:
                self._print("\n", "")
            else:
                self._console.control(ERASE_LINE)
                self._at_start = True

    def _print(self, text: str, style: str) -> None:
        if text:
            self._console.print(Text(text, style=style), end="", soft_wrap=True)
            self._at_start = text.endswith("\n")

    def _new_wrap(self) -> WordWrap:
        return WordWrap(lambda: max(self._console.width - 1, 1))
