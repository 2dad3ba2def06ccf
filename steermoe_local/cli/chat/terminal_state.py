"""The state of the terminal while a chat runs, the signals that end it, and loading in between."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from ..failures import EXIT_INTERRUPTED

T = TypeVar("T")
END_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")
"""Signals that end a chat in order; the last is Windows', of a console that is closed."""


class TerminalState:
    """Between two prompts: what is typed ahead is kept for the next one, and not shown in the middle of an answer.

    A context manager. The terminal gets its old state back however the program ends, also by SIGTERM or SIGHUP, which
    end it in order with the status that shells give to that.
    """

    def __init__(self, *, quiet: bool = True) -> None:
        """Without `quiet`, typing is shown as ever."""
        self._stack = contextlib.ExitStack()
        self._quiet = quiet
        self._in_chat = False

    def __enter__(self) -> TerminalState:
        if self._quiet:
            self._stack.callback(_quiet_input())
        self._stack.enter_context(handling(END_SIGNALS, _leave))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def load(self, work: Callable[[], T]) -> T:
        """Run what cannot be interrupted, in a thread. The first time, Ctrl-C ends the program at once.

        Later on, in the middle of a chat, it takes effect when the work is done: KeyboardInterrupt.
        """
        done: list[T] = []
        failed: list[BaseException] = []
        interrupted = False

        def run() -> None:
            try:
                done.append(work())
            except BaseException as error:
                failed.append(error)

        def interrupt(number: int, frame: Any) -> None:
            nonlocal interrupted
            if not self._in_chat:
                self._end_at_once(descriptor, "error: interrupted\n", EXIT_INTERRUPTED)
            if not interrupted:
                os.write(descriptor, b"\nthe load cannot be stopped; the old model comes back after it\n")
            interrupted = True

        def end(number: int, frame: Any) -> None:
            self._end_at_once(descriptor, "", 128 + number)

        # llama_cpp silences the streams while it loads; messages go to the terminal itself
        descriptor = os.dup(sys.stderr.fileno())
        thread = threading.Thread(target=run, daemon=True)
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            stack.enter_context(handling(("SIGINT",), interrupt))
            stack.enter_context(handling(END_SIGNALS, end))
            thread.start()
            while thread.is_alive():
                thread.join(0.2)  # a timeout, as without one Windows does not notice Ctrl-C
        self._in_chat = True
        if failed:
            raise failed[0]
        if interrupted:
            raise KeyboardInterrupt
        return done[0]

    def _end_at_once(self, descriptor: int, message: str, status: int) -> None:
        """End without cleaning up: a thread is in the middle of native code."""
        self._stack.close()
        with contextlib.suppress(OSError):
            os.write(descriptor, message.encode())
        os._exit(status)


def _quiet_input() -> Callable[[], None]:
    """Stop the terminal from showing what is typed; returns how to undo that."""
    try:
        import termios
    except ImportError:  # Windows
        return lambda: None
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    quiet: list[Any] = [*before]
    quiet[0] &= ~termios.ICRNL  # Enter stays Enter: a line feed would be Ctrl-J
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)

    def undo() -> None:
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSANOW, before)

    return undo


@contextlib.contextmanager
def handling(names: Iterable[str], handler: Callable[[int, Any], Any]) -> Iterator[None]:
    """Handle signals so, as far as the system has them."""
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]  # no system has all
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _leave(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def one_interrupt() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt once; more of them do not disturb the cleaning up."""
    pending = True

    def interrupt(number: int, frame: Any) -> None:
        nonlocal pending
        if pending:
            pending = False
            raise KeyboardInterrupt

    with handling(("SIGINT",), interrupt):
        yield
