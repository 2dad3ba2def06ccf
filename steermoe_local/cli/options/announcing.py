"""What a command says before long work: how much there is, what makes it shorter, and soon how long it takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..._util.files import human_duration
from ..output import say

Show = Callable[[str, int, int], None]


class Announcer:
    """Says on stderr how much work there is, and after `first` seconds of it how long it takes at their speed.

    `shorter` are the options that make it shorter, as one writes them. Calling it wraps what shows the progress.
    """

    def __init__(
        self,
        shorter: str = "",
        *,
        first: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        print_line: Callable[[str], None] = say,
    ) -> None:
        self._shorter, self._first, self._clock, self._print = shorter, first, clock, print_line
        self._what: str | None = None  # the work that was announced and not timed yet
        self._start: tuple[float, int] | None = None
        self._most = ""

    def announce(self, what: str, amount: object, *, at_most: bool = False) -> None:
        """Say how much there is to do of `what`, as it is named in the progress; `at_most`: it may be less."""
        shorter = f" (shorter with {self._shorter})" if self._shorter else ""
        self._print(f"{what}: {amount}{shorter}")
        self._what, self._start, self._most = what, None, "at most " if at_most else ""

    def timed(self, show: Show) -> Show:
        """`show`, which soon says once how long the announced work takes."""

        def shown(what: str, done: int, total: int) -> None:
            show(what, done, total)
            if what != self._what:
                return
            now = self._clock()
            if self._start is None:
                self._start = now, done
                return
            seconds, n = now - self._start[0], done - self._start[1]
            if seconds >= self._first and n and done < total:
                self._what = None
                left, first = human_duration(seconds / n * (total - done)), human_duration(seconds)
                self._print(f"{what}: {self._most}about {left} left on this machine, by the first {first}")

        return shown
