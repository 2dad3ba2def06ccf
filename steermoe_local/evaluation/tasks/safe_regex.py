"""Regular expressions of somebody else's, searched for in a process of their own that is ended when it takes too long.

Python's `re` backtracks: "(a+)+b" takes years on some dozen letters, and nothing in a thread can stop it. A child that
reads a request a line and answers each costs some microseconds a search, and can be killed.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading

__all__ = ["MAX_TEXT", "SECONDS", "TooSlowError", "search"]

SECONDS = 5.0
"""How long a search may take."""
MAX_TEXT = 20_000
"""Characters of a text that are searched; what is behind them is not looked at."""

_CHILD = """
import json, re, sys
for line in sys.stdin:
    pattern, flags, text = json.loads(line)
    found = re.compile(pattern, flags).search(text)
    print(json.dumps(None if found is None else [found.group(1) if found.re.groups else found.group()]), flush=True)
"""


class TooSlowError(Exception):
    """A search was ended."""


class _Searcher:
    """The child, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def search(self, pattern: re.Pattern[str], text: str, seconds: float) -> tuple[bool, str]:
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            timer = threading.Timer(seconds, process.kill)
            timer.start()
            try:
                process.stdin.write(json.dumps([pattern.pattern, int(pattern.flags), text]) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except OSError:
                line = ""
            except BaseException:  # an interrupt: its answer would be taken for the next one's
                self._stop()
                raise
            finally:
                timer.cancel()
            if not line:
                self._stop()
                raise TooSlowError
        found = json.loads(line)
        return (False, "") if found is None else (True, found[0] or "")

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._stop()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _CHILD],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="ascii",  # JSON writes nothing else
            )
            atexit.register(self._stop)
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        atexit.unregister(self._stop)
        if process is not None:
            process.kill()
            with process:  # waits, and closes the pipes
                pass


_searcher = _Searcher()


def search(pattern: re.Pattern[str], text: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Does a pattern occur in the beginning of a text, and what did it find: its first group if it has one, or all.

    Raises TooSlowError after `seconds`.
    """
    return _searcher.search(pattern, text[:MAX_TEXT], seconds)
