"""What a name of a steering can have stood for at a time, from the times at which clients registered and deleted it."""

from __future__ import annotations

import bisect
import functools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steermoe_local import BiasFile
from tests.support.steered_server import bias_of


@dataclass(frozen=True)
class Choice:
    """Numbers of experts of a shipped map, hard or (with `scale`) soft."""

    map: str
    activate: int
    deactivate: int
    reverse: bool = False
    scale: float | None = None

    @property
    def fields(self) -> dict[str, Any]:
        """The choice as a request's `steering`."""
        soft = {} if self.scale is None else {"mode": "soft", "scale": self.scale}
        return {"map": self.map} | self.numbers | soft

    @property
    def numbers(self) -> dict[str, Any]:
        """What of it a request can change."""
        return {"activate": self.activate, "deactivate": self.deactivate, "reverse": self.reverse}

    @functools.cached_property
    def bias(self) -> BiasFile:
        """The bias, built without a server."""
        return bias_of(self.fields)


@dataclass(frozen=True)
class Content:
    """What a name stands for: a map with numbers, or (not `is_map`) a bias file, which takes no other numbers."""

    choice: Choice
    is_map: bool

    def chosen(self, changes: Choice | None = None) -> Choice | None:
        """The choice with the numbers of `changes`; None: they cannot be changed."""
        if changes is None:
            return self.choice
        if not self.is_map:
            return None
        scale = self.choice.scale if changes.scale is None else changes.scale
        return replace(changes, map=self.choice.map, scale=scale)


@dataclass(frozen=True)
class Change:
    """A name got another content (None: it was deleted) at some moment from `start` to `end`, in one clock."""

    name: str
    start: float
    end: float
    content: Content | None


class History:
    """All changes of all names; at the beginning there is none."""

    def __init__(self, changes: Iterable[Change]) -> None:
        by_name: defaultdict[str, list[Change]] = defaultdict(list)
        for change in changes:
            by_name[change.name].append(change)
        self._by_end = {name: sorted(found, key=lambda change: change.end) for name, found in by_name.items()}
        self._ends = {name: [change.end for change in found] for name, found in self._by_end.items()}
        # the latest start of all that had ended by then: what ended before it was certainly replaced
        self._latest = {name: _running_maximum([c.start for c in found]) for name, found in self._by_end.items()}
        self._longest = max((c.end - c.start for found in self._by_end.values() for c in found), default=0.0)

    def possible(self, name: str, start: float, end: float) -> set[Content | None]:
        """What the name may have stood for at a moment from `start` to `end`; None: nothing, it was not there."""
        ends = self._ends.get(name, [])
        n_before = bisect.bisect_left(ends, start)
        since = self._latest[name][n_before - 1] if n_before else float("-inf")
        found: set[Content | None] = set() if n_before else {None}
        for change in self._by_end.get(name, [])[bisect.bisect_left(ends, since) :]:
            if change.end > end + self._longest:
                break
            if change.start < end:
                found.add(change.content)
        return found


def _running_maximum(values: Sequence[float]) -> list[float]:
    found: list[float] = []
    for value in values:
        found.append(max(value, found[-1]) if found else value)
    return found
