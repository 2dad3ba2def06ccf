"""Editing of a message with prompt_toolkit: several lines, history, completion."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from ..._util.visible import visible
from .lines import CONTINUATION, PROMPT, encodable, is_unfinished
from .terminal_state import END_SIGNALS, handling

# A command's name, and what was typed behind it -> what may stand there; None: any path.
Words = Callable[[str, str], Iterable[str] | None]


class CommandCompleter(Completer):
    """Completes commands, and what follows them."""

    def __init__(self, names: dict[str, str], words: Words) -> None:
        """Take each command's name, without the slash, with a line about it."""
        self._names = names
        self._words = words
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:
        """Completions at the cursor; none outside of a command."""
        text = document.text_before_cursor
        if not text.startswith("/") or text.startswith("//") or "\n" in text:
            return
        name, blank, rest = text[1:].partition(" ")
        if not blank:
            for command, text in self._names.items():
                if command.startswith(name):
                    yield Completion(command, -len(name), display=f"/{command}", display_meta=text)
            return
        words = self._words(name, rest)
        for word in words or ():
            if word.startswith(rest) and word != rest:
                yield Completion(word, -len(rest), display=visible(word))
        if words is None or "/" in rest or os.sep in rest or rest.startswith("~"):
            for path in self._paths.get_completions(Document(rest), complete_event):
                yield Completion(path.text, path.start_position, display=visible(path.display_text))


class PromptReader:
    """A terminal with prompt_toolkit."""

    def __init__(self, completer: Completer, history: History) -> None:
        bindings = KeyBindings()

        @bindings.add("enter")
        def _enter(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if is_unfinished(buffer.text):
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        @bindings.add("c-j")
        def _newline(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-c")
        @bindings.add("<sigint>")
        def _interrupt(event: KeyPressEvent) -> None:
            # Raised from `read`; the line stays on the screen, as in a shell.
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        self._ending: SystemExit | None = None
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("class:prompt", PROMPT)]),
            multiline=True,
            prompt_continuation=lambda width, number, wrapped: "" if wrapped else CONTINUATION,
            completer=completer,
            complete_while_typing=Condition(self._in_command),
            reserve_space_for_menu=6,
            history=history,
            key_bindings=bindings,
            enable_suspend=True,
            style=Style.from_dict({"prompt": "bold"}),
        )

    def _in_command(self) -> bool:
        return self._session.default_buffer.text.startswith("/")

    def read(self) -> str:
        """One message, edited. Ctrl-C at a line that is not empty drops it."""
        try:
            with handling(END_SIGNALS, self._leave):
                # set_exception_handler: asyncio logs what goes wrong in a task; prompt_toolkit would print tracebacks
                text: str = self._session.prompt(set_exception_handler=False)
            if self._ending is not None:  # the message was complete before the signal took effect
                raise self._ending
        except BaseException as error:
            if self._ending is not None:  # a terminal that was closed also ends the input
                raise self._ending from None
            if isinstance(error, KeyboardInterrupt) and self._session.default_buffer.text.strip():
                return ""
            raise
        return encodable(text)

    def _leave(self, number: int, frame: Any) -> None:
        """End the program from `read`. Raised in one of prompt_toolkit's tasks, it would be printed as an error."""
        self._ending = ending = SystemExit(128 + number)
        app = self._session.app
        if app.loop is None or not app.is_running:
            raise ending

        def leave() -> None:
            if app.future is not None and not app.future.done():
                app.exit(exception=ending)

        app.loop.call_soon_threadsafe(leave)


def history_file() -> Path:
    """The file of the history: chat_history in the platform's folder for a program's state."""
    import platformdirs

    return platformdirs.user_state_path("steermoe", appauthor=False) / "chat_history"


def open_history(path: Path | None, warn: Callable[[str], None]) -> History:
    """The history in a file that only its owner can read; None, or a file that cannot be written: of this chat only."""
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_RDWR, 0o600))
    except OSError as error:
        warn(f"{path}: no history is kept: {error.strerror or error}; --no-history leaves it out")
        return InMemoryHistory()
    return _History(path)


class _History(FileHistory):
    """A history file; what cannot be written to it (a full disk, say) is no reason to end the chat."""

    def store_string(self, string: str) -> None:
        with contextlib.suppress(OSError):
            super().store_string(encodable(string))
