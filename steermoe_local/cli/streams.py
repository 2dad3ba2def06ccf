"""stdout and stderr: where text leaves for a terminal, and where what a terminal would obey is taken out of it.

Everything that commands print passes it: `console` for tables and styled text, `put` for results, `echo` for messages.
On a terminal, `settle_streams` also puts a guard on `sys.stdout` and `sys.stderr`, for what writes to them by itself.

Tables and messages are filtered wherever they go: a log that someone looks at later is no safer than a terminal. What
is data for another program (answers, paths, scripts) goes into a pipe or a file as it is.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from .._util.visible import harmless, visible


def settle_streams() -> None:
    """Make stdout and stderr safe to print anything on.

    A character that their encoding does not have is shown as an escape, instead of failing; on a terminal, what others
    write to them is filtered. On Windows a pipe and a file get UTF-8, as everywhere: its own code page lacks most of
    what models write. Where the program was started without one, writing to stdout is an error, and messages go
    nowhere.
    """
    _settle_closed()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if sys.platform == "win32" and isinstance(stream, io.TextIOWrapper) and not stream.isatty():
            if "PYTHONIOENCODING" not in os.environ:
                stream.reconfigure(encoding="utf-8")
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
        if isinstance(stream, io.TextIOWrapper) and not isinstance(stream, GuardedStream) and stream.isatty():
            setattr(sys, name, GuardedStream(stream))


def _settle_closed() -> None:
    """Occupy the descriptors 0 to 2: the next file that is opened would become stdout, and be written to as such."""
    if sys.stdout is not None and sys.stderr is not None:
        return
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(_Closed(), "utf-8", "backslashreplace", write_through=True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8", errors="replace")  # noqa: SIM115 # until the end


class _Closed(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        raise OSError(errno.EBADF, "stdout is closed")


class GuardedStream(io.TextIOWrapper):
    """A stream to a terminal that takes out what the terminal would obey.

    `terminal` is the stream without that, for what this program draws itself.
    """

    def __init__(self, terminal: io.TextIOWrapper) -> None:
        terminal.flush()
        # nothing is held back here, so that the order of what is written to both streams stays
        super().__init__(terminal.buffer, terminal.encoding, terminal.errors, line_buffering=True, write_through=True)
        self.terminal = terminal

    def write(self, text: str, /) -> int:
        """Write the text as `visible` has it; tabs and the ends of lines stay."""
        shown = "\t".join(visible(part, lines=True) for part in text.replace("\r\n", "\n").split("\t"))
        super().write(shown)
        return len(text)

    def isatty(self) -> bool:
        """Whether the other stream is a terminal."""
        return self.terminal.isatty()

    def reconfigure(self, **settings: Any) -> None:
        """Change the settings of both streams."""
        self.terminal.reconfigure(**settings)
        super().reconfigure(**settings)


def _unguarded(stream: TextIO) -> TextIO:
    return stream.terminal if isinstance(stream, GuardedStream) else stream


class TextConsole(Console):
    """A rich console that shows texts as they are: no markup, no emoji names, no links, nothing a terminal obeys.

    What it draws itself (colours, the lines of a progress bar) are styles and control segments, never text.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **settings})

    def render_str(self, text: str, **settings: Any) -> Text:
        """A text, as wide as it will be shown."""
        return super().render_str(visible(text, lines=True), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The segments of a renderable, their texts filtered. Everything that is printed passes here."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
                continue
            # marks: a segment may be a piece of an answer, in which nobody knows yet what they stand beside
            text, style = visible(segment.text, lines=True, marks=True), segment.style
            if style is not None and style.link:
                style = style.update_link(None)
            yield segment if text == segment.text and style is segment.style else Segment(text, style)


def console(stderr: bool = False, **settings: Any) -> TextConsole:
    """A console that neither wraps nor colours when it is not a terminal; `settings` are rich's."""
    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() else 160
    return TextConsole(**{"file": _unguarded(stream), "stderr": stderr, "width": wide, **settings})


def echo(text: str) -> None:
    """Write a message to stderr: lines, without what a terminal would obey.

    One that cannot be written (a full disk, a reader that is gone) changes neither the work nor its exit status.
    """
    with contextlib.suppress(OSError):
        click.echo(visible(text, lines=True), err=True)


def put(text: str = "", *, end: str = "\n", dim: bool = False) -> None:
    """Write a result to stdout at once: on a terminal without what it would obey, else every character as it is.

    `dim`: in faint letters, where colours are wanted.
    """
    terminal = sys.stdout.isatty()
    shown = harmless(text) if terminal else text
    if dim and terminal and not os.environ.get("NO_COLOR"):
        shown = click.style(shown, dim=True)
    # color: click takes escape sequences out of what goes into a pipe, unless told otherwise
    click.echo(shown + end, file=_unguarded(sys.stdout), nl=False, color=None if terminal else True)


def ask(text: str, *, stderr: bool = False) -> None:
    """Write what stands before the cursor where something is typed."""
    stream = sys.stderr if stderr else sys.stdout
    stream.write(visible(text))
    stream.flush()
