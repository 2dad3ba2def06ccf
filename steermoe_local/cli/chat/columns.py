"""Two answers that are made at the same time, shown in two columns or one below the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from rich.cells import chop_cells
from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.text import Text

from ..._util.visible import HarmlessStream
from .printer import REASONING, Printer
from .text import WordWrap

Side = Literal["unsteered", "steered"]
SIDES: tuple[Side, Side] = ("unsteered", "steered")
_MARGIN = 3  # rows of the terminal that the part which still changes leaves free


@dataclass
class _Answer:
    """One side: its lines so far, each with a style; the last one is not complete."""

    width: int
    lines: list[tuple[str, str]] = field(default_factory=lambda: [("", "")])
    kind: str = ""
    finished: bool = False

    def __post_init__(self) -> None:
        self.wrap, self.harmless = WordWrap(lambda: self.width), HarmlessStream()

    def add(self, kind: str, text: str) -> None:
        if kind != self.kind:
            if self.kind:
                self._take(self._rest() + "\n\n")
            self.kind = kind
            text = text.lstrip("\n")
        self._take(self.wrap.feed(self.harmless.feed(text).expandtabs(4)))

    def finish(self) -> None:
        self._take(self._rest())
        self.finished = True

    def _rest(self) -> str:
        return self.wrap.feed(self.harmless.end()) + self.wrap.end()

    def _take(self, text: str) -> None:
        style = REASONING if self.kind == "reasoning" else ""
        for index, part in enumerate(text.split("\n")):
            if index:
                self.lines.append(("", style))
            line = self.lines.pop()[0] + part
            # what the wrap leaves wider than the column: long words and lines of code
            self.lines += [(piece, style) for piece in chop_cells(line, self.width) or [""]]

    @property
    def n_complete(self) -> int:
        """Lines that will not change any more."""
        return len(self.lines) if self.finished else len(self.lines) - 1


class Columns:
    """Two columns. Rows that are complete on both sides stay; those below them are drawn again with every piece."""

    def __init__(self, console: Console, show_reasoning: bool) -> None:
        self._console = console
        self._show_reasoning = show_reasoning
        width = (console.width - 4) // 2  # a blank, a line and a blank between them, and the last column stays free
        self._answers = {side: _Answer(width) for side in SIDES}
        self._line = "\u2502" if console.encoding.startswith("utf") else "|"
        self._n_done = 0  # rows that stay
        self._n_drawn = 0  # rows below them that are on the screen
        self._drawn: list[Any] = []
        console.print(self._row(*((side, "bold") for side in SIDES)))

    def add(self, side: Side, kind: str, text: str) -> None:
        if text and (kind != "reasoning" or self._show_reasoning):
            self._answers[side].add(kind, text)
            self._draw()

    def finish(self, side: Side) -> None:
        self._answers[side].finish()
        self._draw()

    def end(self) -> None:
        for answer in self._answers.values():
            answer.finish()
        self._draw()

    def _draw(self) -> None:
        answers = self._answers.values()
        content = [(answer.finished, *answer.lines) for answer in answers]
        if content == self._drawn:
            return  # a word that is not complete yet
        self._drawn = content
        if self._n_drawn:
            up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * self._n_drawn
            self._console.control(Control(ControlType.CARRIAGE_RETURN, *up))
        n_rows = max(len(answer.lines) for answer in answers)
        n_stay = n_rows if all(a.finished for a in answers) else min(a.n_complete for a in answers if not a.finished)
        for row in range(self._n_done, min(n_stay, n_rows)):
            self._print(row)
        self._n_done = max(self._n_done, min(n_stay, n_rows))
        # no more than fits the screen can be drawn again: of the rest the end
        first = max(self._n_done, n_rows - max(self._console.height - _MARGIN, 1))
        for row in range(first, n_rows):
            self._print(row)
        self._n_drawn = n_rows - first

    def _print(self, row: int) -> None:
        lines = [answer.lines[row] if row < len(answer.lines) else ("", "") for answer in self._answers.values()]
        self._console.print(self._row(*lines), soft_wrap=True)

    def _row(self, left: tuple[str, str], right: tuple[str, str]) -> Text:
        text = Text(left[0], style=left[1])
        text.pad_right(self._answers["unsteered"].width - text.cell_len)
        row = Text.assemble(text, (f" {self._line} ", "dim"), Text(right[0], style=right[1]))
        row.rstrip()
        return row


class Stacked:
    """One below the other: the unsteered answer as it comes, then the steered one."""

    def __init__(self, console: Console, show_reasoning: bool) -> None:
        self._console = console
        self._printers = {side: Printer(console, show_reasoning) for side in SIDES}
        self._waiting: list[tuple[str, str]] = []  # of the steered answer
        self._now: Side | None = None
        self._begin("unsteered")

    def add(self, side: Side, kind: str, text: str) -> None:
        """Show a piece of the side whose turn it is, keep one of the other."""
        if side == self._now:
            self._printers[side].add(kind, text)
        else:
            self._waiting.append((kind, text))

    def finish(self, side: Side) -> None:
        if side == "unsteered":
            self._turn()

    def end(self) -> None:
        if self._now == "unsteered":
            self._turn()
        self._printers["steered"].end()

    def _turn(self) -> None:
        self._printers["unsteered"].end()
        self._console.print()
        self._begin("steered")
        for kind, text in self._waiting:
            self._printers["steered"].add(kind, text)

    def _begin(self, side: Side) -> None:
        self._now = side
        self._console.print(Text(side, style="bold"))
