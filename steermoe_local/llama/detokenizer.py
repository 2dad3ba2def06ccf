"""Streams the bytes of tokens as text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable


class TextStream:
    """Incremental text of an answer.

    The joined text and `stop` do not depend on how the bytes are split. Bytes that are not UTF-8 become U+FFFD. The
    text ends before the stop string that is complete first (of several that end at one position, the longest).
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        """`stops` are the stop strings, none of them empty."""
        self.stop: str | None = None  # the stop string that was found
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # may be the beginning of a stop string

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """Add bytes; return the text that is now certain, "" once a stop string was found.

        `final`: no bytes follow, so text that was held back is returned as well.
        """
        if self.stop is not None:
            return ""
        text = self._decoder.decode(data, final)
        if not self._stops:
            return text
        text = self._held + text
        found = self._first_stop(text)
        if found is not None:
            start, self.stop = found
            self._held = ""
            return text[:start]
        keep = 0 if final else possible_beginning(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(ends)[1:] if ends else None


def possible_beginning(text: str, wanted: Collection[str]) -> int:
    """Length of the longest suffix of a text that one of the wanted texts begins with."""
    longest = min(len(text), max(map(len, wanted), default=0))
    for length in range(longest, 0, -1):
        if any(one.startswith(text[-length:]) for one in wanted):
            return length
    return 0
