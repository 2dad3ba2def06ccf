"""Searches for users' regular expressions in a child process that is killed when a search takes too long.

`re` backtracks: "(a+)+b" takes years on some dozen letters, and no thread can stop it. A child process answers a
request in microseconds, can be killed, and its memory can be limited.

The package `regex`, which has a time limit of its own, does not do it: the limit holds for matching alone, and it
compiles "(?:(?:(?:a?){1000}){1000}){1000}b" for 22 s into 4 GiB (`re` takes none). It also reads valid patterns of `re`
otherwise: "a{e}" is a fuzzy match, and 30,468 characters are words to one and not to the other.
"""

from __future__ import annotations

import atexit
import json
import re
import subprocess
import sys
import threading

SECONDS = 5.0
"""The time limit of a search."""
MAX_TEXT = 20_000
"""How many characters of a text are searched; the rest is ignored."""

_CHILD = """
import json, re, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, OSError, ValueError):
    pass
for line in sys.stdin:
    pattern, flags, text = json.loads(line)
    found = re.compile(pattern, flags).search(text)
    print(json.dumps(None if found is None else [found.group(1) if found.re.groups else found.group()]), flush=True)
"""


class TooSlowError(Exception):
    """A search exceeded its time or its memory."""


class _Searcher:
    """The child process, started when it is needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        atexit.register(self._stop)

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
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with process:  # waits, and closes the pipes
                pass


_searcher = _Searcher()


def search(pattern: re.Pattern[str], text: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Whether a pattern occurs in the first MAX_TEXT characters of a text, and its first group, or all if it has none.

    Raises TooSlowError after `seconds`.
    """
    return _searcher.search(pattern, text[:MAX_TEXT], seconds)
