"""What a chat shows: answers as they come, side by side or alone, notes, errors and tables.

`TerminalScreen` is for a person: colours where the terminal has them, lines broken between words. `PlainScreen` is for
pipes: answers and tables on stdout as they are, everything else on stderr.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol, TypeVar

from rich.console import Console, RenderableType
from rich.text import Text

from ..._util.visible import visible
from ...generation.engine import FinishEvent
from ..streams import TextConsole, echo, put
from ..streams import console as new_console
from .columns import SIDES, Columns, Side, Stacked
from .printer import ERASE_LINE, Printer

if TYPE_CHECKING:
    from collections.abc import Generator

    from ...generation.chat import Part

T = TypeVar("T")
SIDE_BY_SIDE_WIDTH = 80  # narrower terminals get one answer below the other


class Screen(Protocol):
    """Where a chat shows things. `show_reasoning` can be changed at any time."""

    show_reasoning: bool

    def note(self, text: str, *, lines: bool = False) -> None:
        """Say what happened, or what applies from now on, in one line; with `lines`, the text's own line ends stay."""

    def error(self, text: str) -> None:
        """Say what went wrong."""

    def table(self, *parts: RenderableType) -> None:
        """Show what was asked for."""

    def gap(self) -> None:
        """Leave a line empty for the eye, where there is one."""

    def answer(self, stream: Generator[Part | FinishEvent]) -> FinishEvent | None:
        """Show an answer while it is made; None when it was stopped by Ctrl-C."""

    def compare(self, stream: Generator[tuple[Side, Part | FinishEvent]]) -> dict[Side, FinishEvent]:
        """Show two answers while they are made; the ends that were reached."""


def speed(finish: FinishEvent) -> str:
    """How fast a prompt was read and an answer written: "12 prompt tokens (8 kept), 310.0 t/s; 45 tokens, 28.1 t/s"."""
    kept = f" ({finish.n_cached} kept)" if finish.n_cached else ""
    read = _rate(finish.n_prompt - finish.n_cached, finish.prompt_seconds)
    # the first token comes out of the prompt's last row
    written = _rate(finish.n_rows - 1, finish.seconds)
    prompt = f"{finish.n_prompt} prompt token{'s' * (finish.n_prompt != 1)}{kept}{read}"
    return f"{prompt}; {finish.n_generated} token{'s' * (finish.n_generated != 1)}{written}"


def _rate(n: int, seconds: float) -> str:
    return f", {n / seconds:.1f} t/s" if n > 0 and seconds > 0 else ""


@contextlib.contextmanager
def _interruptible(stream: Generator[T]) -> Iterator[None]:
    """Ctrl-C ends what is inside, and the stream is closed in any case."""
    with contextlib.closing(stream), contextlib.suppress(KeyboardInterrupt):
        yield


class TerminalScreen:
    """A terminal, also one without colours or without cursor movement (TERM=dumb)."""

    def __init__(self, show_reasoning: bool = True, console: Console | None = None) -> None:
        self.show_reasoning = show_reasoning
        if console is None:
            # rich takes a terminal that cannot move its cursor for 80 columns wide
            width = shutil.get_terminal_size().columns if new_console().is_dumb_terminal else None
            console = new_console(width=width)
        self.console = console

    def note(self, text: str, *, lines: bool = False) -> None:
        self.console.print(Text(visible(text, lines=lines), style="dim"))

    def error(self, text: str) -> None:
        line = Text("error: ", style="bold red")
        self.console.print(line.append(visible(text), style="not bold"))

    def table(self, *parts: RenderableType) -> None:
        self.console.print(*parts, sep="\n")

    def gap(self) -> None:
        self.console.print()

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """Show what takes its time, as long as it takes."""
        line = visible(text)[: self.console.width - 1]  # one line, to be erased
        self.console.print(Text(line, style="dim"), end="")
        try:
            yield
        finally:
            if self.console.is_dumb_terminal:
                self.console.print()
            else:
                self.console.control(ERASE_LINE)

    def answer(self, stream: Generator[Part | FinishEvent]) -> FinishEvent | None:
        """Show an answer while it is made, reasoning dim or hidden."""
        finish: FinishEvent | None = None
        printer = Printer(self.console, self.show_reasoning)
        with _interruptible(stream):
            for item in stream:
                if isinstance(item, FinishEvent):
                    finish = item
                else:
                    printer.add(item.kind, item.text)
        printer.end()
        return finish

    def compare(self, stream: Generator[tuple[Side, Part | FinishEvent]]) -> dict[Side, FinishEvent]:
        """Show two answers in two columns, or on a narrow or dumb terminal one below the other."""
        ends: dict[Side, FinishEvent] = {}
        if self.console.width < SIDE_BY_SIDE_WIDTH or self.console.is_dumb_terminal:
            view: Columns | Stacked = Stacked(self.console, self.show_reasoning)
        else:
            view = Columns(self.console, self.show_reasoning)
        with _interruptible(stream):
            for side, item in stream:
                if isinstance(item, FinishEvent):
                    ends[side] = item
                    view.finish(side)
                else:
                    view.add(side, item.kind, item.text)
        view.end()
        return ends


class PlainScreen:
    """No terminal: answers and tables on stdout without any escape sequence, notes and errors on stderr."""

    def __init__(self, show_reasoning: bool = False) -> None:
        self.show_reasoning = show_reasoning
        self._console = TextConsole(color_system=None, force_terminal=False, width=100)

    def note(self, text: str, *, lines: bool = False) -> None:
        echo(visible(text, lines=lines))

    def error(self, text: str) -> None:
        echo(f"error: {visible(text)}")

    def table(self, *parts: RenderableType) -> None:
        with self._console.capture() as text:
            self._console.print(*parts, sep="\n")
        self._write("".join(f"{line.rstrip()}\n" for line in text.get().splitlines()))

    def gap(self) -> None:
        """Leave nothing: every line of stdout is of an answer or a table."""

    def answer(self, stream: Generator[Part | FinishEvent]) -> FinishEvent | None:
        """Write an answer while it is made; reasoning only if it is to be shown."""
        finish: FinishEvent | None = None
        kind = ""
        with contextlib.closing(stream):
            for item in stream:
                if isinstance(item, FinishEvent):
                    finish = item
                elif item.text and (item.kind == "answer" or self.show_reasoning):
                    text = item.text.lstrip("\n") if kind != item.kind else item.text
                    self._write("\n\n" + text if kind and kind != item.kind else text)
                    kind = item.kind
        self._write("\n")
        return finish

    def compare(self, stream: Generator[tuple[Side, Part | FinishEvent]]) -> dict[Side, FinishEvent]:
        """Write two answers, one after the other."""
        ends: dict[Side, FinishEvent] = {}
        texts: dict[Side, str] = dict.fromkeys(SIDES, "")
        with contextlib.closing(stream):
            for side, item in stream:
                if isinstance(item, FinishEvent):
                    ends[side] = item
                elif item.kind == "answer":
                    texts[side] += item.text
        for side in SIDES:
            self._write(f"{side}:\n{texts[side].strip()}\n")
        return ends

    def _write(self, text: str) -> None:
        put(text, end="")
