"""Messages from where no line can be edited by the program, and what a message of several lines looks like."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Protocol

from ...errors import FormatError

PROMPT, CONTINUATION = "> ", ". "
QUOTES = '"""'
_MAX_LINE = 16 << 20  # characters of one message from a pipe


class Reader(Protocol):
    """Gives one message at a time."""

    def read(self) -> str:
        """The next message as it was typed. Raises EOFError when there is none, KeyboardInterrupt for Ctrl-C."""


def is_block(text: str) -> bool:
    r"""Does the message begin with \"\"\", so that it goes on to the next of them?"""
    return text.lstrip().startswith(QUOTES)


def is_unfinished(text: str) -> bool:
    """Do more lines belong to the message, as a block is open or its last line ends with a backslash?"""
    if is_block(text):
        stripped = text.strip()
        return len(stripped) < 2 * len(QUOTES) or not stripped.endswith(QUOTES)
    return text.endswith("\\")


def joined(text: str) -> str:
    """The message itself: without the marks of a block, and without the backslashes at the ends of lines."""
    if is_block(text):
        return text.strip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n").strip()


def encodable(text: str) -> str:
    """The text without halves of surrogate pairs, which stand for bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")


class BasicReader:
    """A terminal that cannot move its cursor (TERM=dumb), or only the input is one: lines as the system gives them."""

    def __init__(self, prompt: Callable[[str], None]) -> None:
        self._prompt = prompt

    def read(self) -> str:
        text = ""
        while True:
            self._prompt(CONTINUATION if text else PROMPT)
            line = sys.stdin.buffer.readline(_MAX_LINE).decode("utf-8", "replace")
            if not line:
                if text:
                    return text
                raise EOFError
            text += line.removesuffix("\n").removesuffix("\r")  # as Windows' console ends lines
            if not is_unfinished(text):
                return text
            text += "\n"


class PipeReader:
    """No terminal: every line is a message."""

    def __init__(self) -> None:
        self._number = 0

    def read(self) -> str:
        """The next line. Raises FormatError for one that is no UTF-8, or too long."""
        raw = sys.stdin.buffer.readline(_MAX_LINE + 1)
        self._number += 1
        if not raw:
            raise EOFError
        if len(raw) > _MAX_LINE:
            raise FormatError(
                f"stdin:{self._number}: a line of more than {_MAX_LINE >> 20} MiB; write one message a line"
            )
        try:
            return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError:
            raise FormatError(f"stdin:{self._number}: not UTF-8; save the text as UTF-8") from None
