"""The loop of a chat: read a message or a command, do it, and go on whatever happens."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from enum import Enum
from pathlib import Path

import click

from ...errors import SteerMoEError
from ...steering.plan import AnySteering
from ..streams import ask
from .commands import ALIASES, COMMANDS, Leave, completions, perform
from .lines import PROMPT, BasicReader, PipeReader, Reader, is_block, joined
from .screen import PlainScreen, Screen, TerminalScreen
from .session import ChatFlags, Loaded, Session
from .terminal_state import TerminalState


class TerminalKind(Enum):
    """Where a chat runs: a terminal, one that can only print (TERM=dumb), or none."""

    TERMINAL = "terminal"
    DUMB = "dumb"
    PIPE = "pipe"

    @classmethod
    def here(cls) -> TerminalKind:
        """What this process has: both ends must be a terminal."""
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return cls.PIPE
        return cls.DUMB if os.environ.get("TERM", "").lower() in ("dumb", "unknown") else cls.TERMINAL


def run_chat(
    flags: ChatFlags,
    model: Path,
    kind: TerminalKind,
    *,
    system: str | None,
    steering: AnySteering | None,
    prompt: str | None,
    show_reasoning: bool | None,
    show_speed: bool,
    keep_history: bool,
) -> None:
    """Chat until there is nothing more to read. `show_reasoning` None: on a terminal. Raises SteerMoEError."""
    with contextlib.ExitStack() as stack:
        screen: Screen
        if kind is TerminalKind.PIPE:
            screen = PlainScreen(bool(show_reasoning))
            session = Session(flags, screen, lambda load: load(), show_speed=show_speed)
        else:
            sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # a terminal that lacks a character
            state = stack.enter_context(TerminalState(quiet=kind is TerminalKind.TERMINAL))
            terminal_screen = screen = TerminalScreen(show_reasoning is not False)

            def load(work: Callable[[], Loaded]) -> Loaded:
                with terminal_screen.waiting("loading the model ..."):
                    return state.load(work)

            session = Session(flags, screen, load, show_speed=show_speed)
        stack.callback(session.close)
        session.open(model, system, steering)
        reader = _reader(session, kind, keep_history)
        if kind is not TerminalKind.PIPE:
            _greet(session)
        if prompt is not None:
            if kind is not TerminalKind.PIPE:
                screen.note(f"{PROMPT}{prompt}", lines=True)
            session.say(prompt)
        _converse(session, reader, kind)


def _converse(session: Session, reader: Reader, kind: TerminalKind) -> None:
    typed = not isinstance(reader, PipeReader)
    while True:
        try:
            try:
                line = reader.read()
            except KeyboardInterrupt:
                if kind is TerminalKind.PIPE:
                    raise
                session.screen.note("Ctrl-D or /quit leaves")
                continue
            _take(session, line, typed=typed)
        except (EOFError, Leave):
            return
        except SteerMoEError as error:
            if not session.is_open:
                raise
            session.screen.error(str(error))
        except click.ClickException as error:  # /model: what the option's type says
            session.screen.error(error.format_message())
        except KeyboardInterrupt:
            if kind is TerminalKind.PIPE or not session.is_open:
                raise
            session.screen.note("interrupted")


def _take(session: Session, line: str, *, typed: bool) -> None:
    """One message or command, as it was typed, or as a line of a pipe."""
    text = joined(line) if typed else line
    if not text.strip():
        if session.may_ask_again:
            session.regenerate()
        return
    if text.startswith("/") and not (typed and is_block(line)):
        if not text.startswith("//"):
            perform(session, text)
            return
        text = text[1:]
    session.say(text)


def _reader(session: Session, kind: TerminalKind, keep_history: bool) -> Reader:
    if kind is TerminalKind.PIPE:
        if sys.stdin.isatty():  # only the output is none: someone types, and has to see that it is their turn
            return BasicReader(_prompt_on_stderr)
        return PipeReader()
    if kind is TerminalKind.DUMB:
        return BasicReader(_prompt_on_stdout)
    from .prompt import CommandCompleter, PromptReader, history_file, open_history

    helps = {name: command.help for name, command in COMMANDS.items()}
    helps |= {alias: f"as /{name}" for alias, name in ALIASES.items()}
    completer = CommandCompleter(helps, lambda name, typed: completions(session, name, typed))
    history = open_history(history_file() if keep_history else None, session.screen.note)
    return PromptReader(completer, history)


def _prompt_on_stdout(text: str) -> None:
    ask(text)


def _prompt_on_stderr(text: str) -> None:
    ask(text, stderr=True)


def _greet(session: Session) -> None:
    loaded, screen = session.loaded, session.screen
    facts = loaded.facts
    experts = f", {facts.n_expert} experts, top-{facts.n_expert_used}" if facts.is_moe else ", no experts"
    screen.note(
        f"{facts.name or loaded.path.stem}: {facts.architecture}, {facts.n_layer} layers{experts}; "
        f"context {loaded.engine.n_ctx} tokens"
    )
    if session.chat.steering is not None:
        session.say_steering()
    screen.note("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
