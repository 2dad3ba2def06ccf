"""Searches for users' regular expressions in a child process that is killed when a search takes too long.

`re` backtracks: "(a+)+b" takes years on some dozen letters, and no thread can stop it. A child process answers a
request in microseconds, can be killed, and its memory can be limited.

The package `regex`, which has a time limit of its own, does not do it: the limit holds for matching alone, and it
compiles "(?:(?:(?:a?){1000}){1000}){1000}b" for 22 s into 4 GiB (`re` takes none). It also reads valid patterns of `re`
otherwise: "a{e}" is a fuzzy match, and 30,468 characters are words to one and not to the other.
"""

from __future__ import annotations

import re

from ..._util.children import ChildError, Limits, Worker

SECONDS = 5.0
"""The time limit of a search."""
MAX_TEXT = 20_000
"""How many characters of a text are searched; the rest is ignored."""


class TooSlowError(Exception):
    """A search exceeded its time or its memory."""


def _search(pattern: str, flags: int, text: str) -> str | None:
    """In the child: the first group, or all if there is none; None without a match."""
    found = re.compile(pattern, flags).search(text)
    return None if found is None else ((found.group(1) if found.re.groups else found.group()) or "")


_worker = Worker(_search, Limits(memory=1 << 30, cpu_seconds=60))


def search(pattern: re.Pattern[str], text: str, seconds: float = SECONDS) -> tuple[bool, str]:
    """Whether a pattern occurs in the first MAX_TEXT characters of a text, and its first group, or all if it has none.

    Raises TooSlowError after `seconds`.
    """
    try:
        found = _worker.ask(pattern.pattern, int(pattern.flags), text[:MAX_TEXT], seconds=seconds)
    except ChildError:
        raise TooSlowError from None
    return (False, "") if found is None else (True, found)
