"""The last line of defence: what nobody expected ends with one line, or with the traceback if that is wanted.

Errors that are raised on purpose have their messages in `program`. This module has the rest: exceptions of any other
type, also in threads, in finalizers and in the tasks of an event loop, and what libraries log or warn of.
"""

from __future__ import annotations

import _thread
import contextlib
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from .._util.visible import shortened, visible
from .output import say

EXIT_ERROR, EXIT_INTERRUPTED = 1, 130
VARIABLE = "STEERMOE_DEBUG"
OPTION = "--debug"

_MOST = 500  # characters of an exception's message
_MOST_LINE = 4_000  # of a log
_MOST_TRACEBACK = 100_000
_CURE = f"this is a mistake in steermoe; {OPTION} shows where, please report it"
_OFF = ("", "0", "false", "f", "no", "n", "off")  # as click reads the variable of a flag

_wanted = False


def debug(on: bool = True) -> None:
    """Show tracebacks from now on, or no longer."""
    global _wanted
    _wanted = on


def debugging() -> bool:
    """Whether tracebacks are to be shown: after `debug()`, or by the variable, which counts before options are read."""
    return _wanted or os.environ.get(VARIABLE, "").strip().lower() not in _OFF


def in_one_line(error: BaseException) -> str:
    """The type of an exception and its message, of bounded length."""
    try:
        message = str(error)
    except Exception:  # a message that cannot be made is no reason to have none
        message = ""
    return visible(shortened(": ".join(filter(None, [type(error).__name__, message])), _MOST))


def traceback_of(error: BaseException) -> str:
    """The lines of a traceback, of bounded length."""
    return shortened("".join(traceback.format_exception(error)), _MOST_TRACEBACK).rstrip("\n")


def report(error: BaseException, where: str = "") -> None:
    """Print an unexpected exception: one line, behind the traceback if that is wanted."""
    if debugging():
        for line in traceback_of(error).splitlines():
            say(visible(line))
    # a memory that is full, or a recursion without end, may meet this line as well
    with contextlib.suppress(OSError, MemoryError, RecursionError):
        say(f"error: unexpected{where and ' ' + where}: {in_one_line(error)}; {_CURE}")


@contextlib.contextmanager
def last_resort() -> Iterator[None]:
    """End the program with a line and an exit status for whatever comes out of the inside."""
    try:
        yield
    except KeyboardInterrupt:
        say("error: interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except MemoryError:
        say("error: out of memory; close other programs, or take a smaller model or context (-c)")
        sys.exit(EXIT_ERROR)
    except Exception as error:
        report(error)
        sys.exit(EXIT_ERROR)


def install_hooks() -> None:
    """Give this process one line for exceptions outside of `last_resort`, and for libraries' logs and warnings."""
    sys.excepthook = _uncaught
    sys.unraisablehook = _unraisable
    threading.excepthook = _in_thread
    warnings.showwarning = _python_warning
    if not logging.getLogger().handlers:
        log_to_stderr()


def log_to_stderr(form: str = "%(levelname)s: %(message)s") -> None:
    """Write warnings and errors that are logged to stderr, a line each."""
    handler = logging.StreamHandler(_Stderr())
    handler.setFormatter(LineFormatter(form))
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    for other in [other for other in root.handlers if isinstance(other.formatter, LineFormatter)]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)


class LineFormatter(logging.Formatter):
    """Log records in one line each, whatever they quote; a traceback only if that is wanted, its lines indented."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or lines."""
        info, cached = record.exc_info, record.exc_text
        record.exc_info = record.exc_text = None
        level, record.levelname = record.levelname, record.levelname.lower()
        try:
            most = _MOST_LINE if record.levelno > logging.INFO else sys.maxsize  # --log-prompts has them whole
            line = visible(shortened(super().format(record), most))
        finally:
            record.exc_info, record.exc_text, record.levelname = info, cached, level
        error = info[1] if info else None
        if error is None:
            return line
        line = f"{line}: {in_one_line(error)}"
        if not debugging():
            return line
        return "\n".join([line, *(f"  {visible(part)}" for part in traceback_of(error).splitlines())])


class _Stderr:
    """What sys.stderr is at the moment: a progress bar replaces it while it is drawn."""

    def write(self, text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(text)

    def flush(self) -> None:
        if sys.stderr is not None:
            sys.stderr.flush()


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        say("error: interrupted")
    else:
        report(error)


def _in_thread(arguments: threading.ExceptHookArgs) -> None:
    error = arguments.exc_value
    if error is not None and not isinstance(error, SystemExit):
        report(error, "in a thread")


def _unraisable(arguments: sys.UnraisableHookArgs) -> None:
    """An exception of a finalizer or of a callback from C, which nobody can catch."""
    error = arguments.exc_value
    if isinstance(error, KeyboardInterrupt):  # it meant the program, not the finalizer, and would be lost here as well
        again = threading.Timer(0.05, _thread.interrupt_main)
        again.daemon = True
        again.start()
    elif error is not None and (debugging() or not isinstance(error, BrokenPipeError)):  # stdout's, at the end
        report(error, "and ignored")


def _python_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    say(f"warning: {category.__name__}: {visible(shortened(str(message), _MOST))}")
