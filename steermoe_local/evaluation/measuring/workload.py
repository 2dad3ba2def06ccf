"""What a study will measure, counted beforehand: how many answers and texts, and how many of them are done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Answers and texts that are to be measured, those that are kept from before left out.

    `at_most`: a search, or steerings that turn out to be equal, may need fewer. `what` names the study.
    """

    answers: int
    texts: int = 0
    at_most: bool = False
    what: str = ""

    @property
    def total(self) -> int:
        """Answers and texts."""
        return self.answers + self.texts

    def __add__(self, other: Work) -> Work:
        return Work(
            self.answers + other.answers,
            self.texts + other.texts,
            self.at_most or other.at_most,
            self.what or other.what,
        )

    def __str__(self) -> str:
        n_texts = f" and {self.texts:,} {'text' if self.texts == 1 else 'texts'}" if self.texts else ""
        most = "at most " if self.at_most else ""
        return f"{most}{self.answers:,} {'answer' if self.answers == 1 else 'answers'}{n_texts}"


OnWork = Callable[[Work], None]
"""Called with the work of a study before the first of it is done."""


class Workload:
    """Counts what is measured against what a study expected, so that its progress knows the total from the start.

    `show` is called with (what is measured, done, total), `on_work` with the work of each study, once.
    """

    def __init__(self, show: Callable[[str, int, int], None], on_work: OnWork | None) -> None:
        self._show, self._on_work = show, on_work or (lambda _: None)
        self._what = ""
        self._parts: dict[str, int] = {}  # what is still expected, by part
        self._search = False
        self._done = self._total = 0

    def expect(self, what: str, parts: Mapping[str, Work], *, search: bool = False) -> None:
        """Announce a study of some parts; each is begun once, but those of a `search` as often as it likes."""
        whole = sum(parts.values(), Work(0, 0, search, what))
        self._what, self._done, self._total, self._search = what, 0, whole.total, search
        self._parts = {name: work.total for name, work in parts.items()}
        self._tell(whole)

    def begin(self, part: str, work: Work) -> Callable[[int], None]:
        """Begin a part, of which `work` is to do now. Returns what is called with how many of it are done.

        A part that no study expected is a study of its own.
        """
        if self._search and part in self._parts:
            self._total = max(self._total, self._done + work.total)
        elif part in self._parts:
            self._total += work.total - self._parts.pop(part)
        elif self._parts:  # of the study, but not foreseen
            self._total += work.total
        else:
            self._what, self._done, self._total, self._search = part, 0, work.total, False
            self._tell(work)
        what, before, total = self._what, self._done, self._total
        self._done += work.total

        def show(done: int) -> None:
            self._show(what, before + done, total)

        if work.total:
            show(0)
        return show

    def _tell(self, work: Work) -> None:
        if work.total:
            self._on_work(work)
