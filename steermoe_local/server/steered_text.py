"""Which characters of an answer were steered, and by which rule of the plan."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable
from typing import Any

from ..llama.reasoning import Kind, Part, Stretch

_Run = tuple[int | None, int]
"""A rule and a number of characters."""


class SteeredText:
    """Follows the characters of an answer from its tokens to its parts.

    A character belongs to the token that completes it, and has the rule under which this token was drawn; None: it was
    drawn unsteered. Rules are numbered from 0, in the order of the plan.
    """

    def __init__(self) -> None:
        self.spans: dict[Kind, list[dict[str, int]]] = {"reasoning": [], "answer": []}
        """The steered stretches of both texts so far: {"rule", "start", "end"}, in characters, without overlap."""
        self.token_rules: list[int | None] = []
        """The rule of each token that was drawn."""
        self._ends: list[int] = []  # of the stretches of one rule in the text as it was drawn
        self._rules: list[int | None] = []
        self._waiting: dict[Kind, deque[_Run]] = {"reasoning": deque(), "answer": deque()}
        self._n_given: dict[Kind, int] = {"reasoning": 0, "answer": 0}

    def drew(self, rule: int | None, n_characters: int) -> None:
        """Add a token that completes so many characters."""
        self.token_rules.append(rule)
        if not n_characters:
            return
        end = n_characters + (self._ends[-1] if self._ends else 0)
        if self._rules and self._rules[-1] == rule:
            self._ends[-1] = end
        else:
            self._ends.append(end)
            self._rules.append(rule)

    def split(self, stretches: Iterable[Stretch]) -> None:
        """Tell where the next parts stand in the text as it was drawn."""
        for kind, end, n in stretches:
            self._waiting[kind].extend(self._between(max(0, end - n), end))

    def _between(self, start: int, end: int) -> Iterable[_Run]:
        index = bisect_right(self._ends, start)
        while start < end and index < len(self._ends):
            stop = min(end, self._ends[index])
            yield self._rules[index], stop - start
            start, index = stop, index + 1
        if start < end:  # of bytes that no token completes: the last token's
            yield self.token_rules[-1] if self.token_rules else None, end - start

    def skip(self, kind: Kind, n: int) -> None:
        """Leave out the next characters of a kind: they are none of the answer's text."""
        for _ in self._take(kind, n):
            pass

    def cut(self, parts: Iterable[Part]) -> list[tuple[Part, int | None]]:
        """The parts, cut where the rule changes, with the rule of each."""
        found: list[tuple[Part, int | None]] = []
        for kind, text in parts:
            start = 0
            for rule, n in self._take(kind, len(text)):
                piece = text[start : start + n]
                start += n
                if found and found[-1][1] == rule and found[-1][0].kind == kind:
                    found[-1] = (Part(kind, found[-1][0].text + piece), rule)
                else:
                    found.append((Part(kind, piece), rule))
                self._mark(kind, rule, n)
        return found

    def _take(self, kind: Kind, n: int) -> Iterable[_Run]:
        waiting = self._waiting[kind]
        while n:
            rule, length = waiting.popleft() if waiting else (None, n)
            if length > n:
                waiting.appendleft((rule, length - n))
                length = n
            n -= length
            yield rule, length

    def _mark(self, kind: Kind, rule: int | None, n: int) -> None:
        start = self._n_given[kind]
        self._n_given[kind] = end = start + n
        spans = self.spans[kind]
        if rule is None:
            return
        if spans and spans[-1]["end"] == start and spans[-1]["rule"] == rule:
            spans[-1]["end"] = end
        else:
            spans.append({"rule": rule, "start": start, "end": end})

    def pieces(self, text: str) -> Iterable[tuple[str, int | None]]:
        """The answer's text, cut where the rule changes, with the rule of each piece."""
        at = 0
        for span in self.spans["answer"]:
            if at < span["start"]:
                yield text[at : span["start"]], None
            yield text[span["start"] : span["end"]], span["rule"]
            at = span["end"]
        if at < len(text):
            yield text[at:], None

    def fields(self, offset: int = 0) -> dict[str, Any]:
        """The fields of a choice; `offset` is where the answer begins in its content."""
        moved = [
            {"rule": span["rule"], "start": span["start"] + offset, "end": span["end"] + offset}
            for span in self.spans["answer"]
        ]
        return {"steered": moved} | (
            {"steered_reasoning": self.spans["reasoning"]} if self._n_given["reasoning"] else {}
        )
