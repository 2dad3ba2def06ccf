"""The real program in a pseudo-terminal: what is typed, and what stands on the screen."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pexpect
import pyte

PROGRAM = [str(Path(sys.executable).with_name("steermoe"))]
PATIENCE = 60.0  # seconds; a slow machine, not a normal one
FAINT = "8b91a0"
"""Colour, in hex digits, that faint text (SGR 2) has on a `Terminal.screen`."""
# what prompt_toolkit tells a terminal when it begins to edit a line
_PROMPT_BEGINS = "\x1b[?2004h"


class Silent(AssertionError):
    """The program said nothing for too long."""


class Ended(AssertionError):
    """The program ended before what was waited for."""


class _Screen(pyte.HistoryScreen):  # type: ignore[misc] # pyte has no types
    """A screen that answers the program's questions (where is the cursor?), as a terminal does."""

    def __init__(self, columns: int, rows: int, answer: Callable[[str], None]) -> None:
        super().__init__(columns, rows, history=5000, ratio=0.5)
        self._answer = answer

    def write_process_input(self, data: str) -> None:
        self._answer(data)

    def select_graphic_rendition(self, *codes: int, **options: Any) -> None:
        """As pyte does, which does not know faint text."""
        super().select_graphic_rendition(*codes, **options)
        if 2 in codes and not {38, 48} & {*codes}:  # there a 2 says how a colour is given
            self.cursor.attrs = self.cursor.attrs._replace(fg=FAINT)


class Terminal:
    """A program that was started in a terminal of `columns` x `rows`.

    `raw` is everything that it wrote, `chunks` the same in the pieces that came.
    """

    def __init__(
        self,
        *arguments: Any,
        columns: int = 100,
        rows: int = 40,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        program: list[str] = PROGRAM,
    ) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "COLORTERM")}
        environment |= {"TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **(env or {})}
        command = [*program, *map(str, arguments)]
        self.child = pexpect.spawn(
            command[0],
            command[1:],
            env=environment,
            cwd=None if cwd is None else str(cwd),
            dimensions=(rows, columns),
            timeout=PATIENCE,
            encoding="utf-8",
            codec_errors="replace",
        )
        self.child.delaybeforesend = None
        self.chunks: list[str] = []
        self.screen = _Screen(columns, rows, self._answer)
        self._stream = pyte.Stream(self.screen)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.close(force=True)

    def _answer(self, data: str) -> None:
        if self.child.isalive():
            self.child.send(data)

    @property
    def raw(self) -> str:
        return "".join(self.chunks)

    @property
    def text(self) -> str:
        """What stands on the screen and above it, without the blanks at the ends of lines."""
        above = ["".join(line[x].data for x in range(self.screen.columns)) for line in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip("\n")

    @property
    def n_prompts(self) -> int:
        """How often the program asked for a message."""
        return self.raw.count(_PROMPT_BEGINS)

    def read(self) -> str:
        """What the program writes next. Raises Ended, Silent."""
        try:
            chunk: str = self.child.read_nonblocking(65536, timeout=PATIENCE)
        except pexpect.EOF:
            raise Ended(f"the program ended; the screen:\n{self.text}") from None
        except pexpect.TIMEOUT:
            raise Silent(f"nothing for {PATIENCE} s; the screen:\n{self.text}") from None
        self.chunks.append(chunk)
        self._stream.feed(chunk)
        return chunk

    def until(self, happened: Callable[[], bool]) -> None:
        """Read until something has happened."""
        while not happened():
            self.read()

    def prompt(self, n: int | None = None) -> None:
        """Read until the n-th prompt (default: the first) waits for a message."""
        n = 1 if n is None else n
        self.until(lambda: self.n_prompts >= n and self.line == "> ")

    @property
    def line(self) -> str:
        """The cursor's line, up to it."""
        cursor = self.screen.cursor
        return self.screen.display[cursor.y][: cursor.x]

    def type(self, text: str) -> None:
        """Type, without Enter, and wait until it stands there."""
        before = self.line
        self.child.send(text)
        self.until(lambda: self.line == (before + text)[-len(self.line) :] and self.line != before)

    def say(self, text: str) -> str:
        """Type a message or command, and wait for the next prompt; returns what was written between."""
        n, start = self.n_prompts, len(self.raw)
        self.child.send(text + "\r")
        self.prompt(n + 1)
        return plain(self.raw[start:])

    def end(self) -> int:
        """Read to the end; returns the exit status, negative for a signal."""
        try:
            while True:
                self.read()
        except Ended:
            self.child.wait()  # not close(): the terminal can still be asked about its state
        return -self.child.signalstatus if self.child.exitstatus is None else self.child.exitstatus


_ESCAPE = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[()][A-Z0-9]|\x1b[=>]")


def plain(raw: str) -> str:
    """What was written, without escape sequences."""
    return _ESCAPE.sub("", raw).replace("\r", "")
