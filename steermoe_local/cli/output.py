"""What commands print: JSON, tables, messages and progress bars."""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from .._util.file_kinds import StrPath
from .._util.files import human_duration
from .._util.visible import shortened, visible, visible_json
from .streams import console, echo, put

if TYPE_CHECKING:
    from ..evaluation.reports.document import Table as ReportTable

_MOST = 4_000  # characters of a message or of a fact: they may quote a text of any length
# what differs between messages of one kind: texts in quotes (as repr writes them), numbers
_VALUES = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|\d[\d,.]*")


def say(text: str) -> None:
    """Print a message on stderr."""
    echo(shortened(text, _MOST))


def warn(*warnings: str) -> None:
    """Print warnings on stderr, a line each."""
    for warning in warnings:
        say(f"warning: {visible(warning)}")


def print_lines(text: str = "") -> None:
    """Print a report's line, or lines, on stdout."""
    put(visible(text, lines=True))


def say_written(*paths: StrPath, before: str = "") -> None:
    """Print on stdout which files were written, below the text `before`."""
    print_lines(f"{before}written: {visible(', '.join(map(str, paths)))}")


_WARNING = ("prompts", "files", "downloads")  # loggers of the package whose warnings users see


class _PackageWarnings(logging.Handler):
    """Prints what the package warns of, each warning once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            warn(message)


@contextmanager
def package_warnings() -> Iterator[None]:
    """Meanwhile, warnings of the package (of prompts, files and downloads) go to stderr, each once."""
    logs, handler = [logging.getLogger(f"steermoe.{name}") for name in _WARNING], _PackageWarnings()
    before = [log.propagate for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.propagate = False  # a server logs to the root, too
    try:
        yield
    finally:
        for log, propagated in zip(logs, before, strict=True):
            log.removeHandler(handler)
            log.propagate = propagated


def print_json(data: Any) -> None:
    """Print one JSON document to stdout, in ASCII where that is not UTF-8."""
    unicode = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    put(visible_json(json.dumps(data, ensure_ascii=not unicode, indent=1, default=str)))


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of two columns without lines: a name and its value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(visible(name), visible(shortened(value, _MOST)))
    return table


def print_verdict(text: str) -> None:
    """Print what was found, in plain words, above the figures."""
    console().print(Text(visible(text), style="bold"), "", sep="\n", soft_wrap=True)


def print_reports(tables: Iterable[ReportTable]) -> None:
    """Print the tables of a report, with an empty line between them."""
    out = console()
    for number, table in enumerate(tables):
        out.print(*([""] if number else []), rich_table(table), sep="\n")


def rich_table(table: ReportTable) -> Table:
    """A table of a report for the terminal."""
    title = Text(visible(table.title))
    rich = Table(title=title, title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for number, name in enumerate(table.header):
        rich.add_column(
            Text(visible(name)), justify="left" if number == 0 or name == "note" else "right", overflow="fold"
        )
    for row in table.rows:
        rich.add_row(*(Text(visible(cell)) for cell in row))
    return rich


def print_left_out(skipped: Mapping[str, int]) -> None:
    """Print on stderr how many rows of data were left out, by reason."""
    for reason, n in skipped.items():
        say(f"  {n:,} left out: {visible(reason)}")


class ShowProgress(Protocol):
    """Shows how far work is: see `progress_bar`."""

    def __call__(self, what: str, done: int, total: int, left: float | None = None) -> None:
        """Show `done` of `total` of `what`."""


class TimeLeftColumn(TimeRemainingColumn):
    """The time that is left: as it was given, else by the speed so far."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        if left is None:
            return super().render(task)
        return Text(f"{human_duration(left)} left" if left else "", style="progress.remaining")


@contextmanager
def progress_bar(*, hidden: bool = False) -> Iterator[ShowProgress]:
    """Yield show(what, done, total): a bar on stderr if that is a terminal, else a line now and then.

    Work that knows better than by the speed so far how many seconds all of it will take gives them as `left`.
    """
    time_left = TimeLeftColumn(table_column=Column(no_wrap=True))
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), time_left
    terminal = sys.stderr.isatty()
    with Progress(*columns, console=console(stderr=True), transient=True, disable=hidden or not terminal) as bar:
        tasks: dict[str, Any] = {}
        lines = ProgressLines()

        def show(what: str, done: int, total: int, left: float | None = None) -> None:
            if hidden:
                return
            if not terminal:
                lines.show(what, done, total, left=left)
                return
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total, left=left)
            for name, task in tasks.items():
                if name != what:
                    bar.update(task, visible=False)
            bar.update(tasks[what], completed=done, total=total, visible=True, left=left)

        yield show


class ProgressLines:
    """Progress on a stderr that is no terminal: a line after `first` seconds, then one every `every` seconds.

    A line has what is done, how fast and how long the rest takes at that speed. Work that is done sooner has none; of
    several works, one after the other, each may be short.
    """

    def __init__(
        self, *, first: float = 10.0, every: float = 60.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._first, self._every, self._clock = first, every, clock
        self._what: str | None = None
        self._start = 0.0
        self._next: float | None = None
        self._done = 0

    def show(self, what: str, done: int, total: int, rate: str = "", left: float | None = None) -> None:
        """Count `done` of `total`; `rate` replaces the speed that is computed from them, like "500 tokens/s".

        `left` are the seconds that all of the work still takes, where they are known otherwise than by that speed.
        """
        now = self._clock()
        if what != self._what:  # what an earlier process did, or what came with the first batch, tells no speed
            self._what, self._start, self._done = what, now, done
        if self._next is None:
            self._next = now + self._first
        elif now >= self._next and done < total:
            self._next = now + self._every
            parts = [f"{what}: {done:,} of {total:,} ({100 * done // total}%)"]
            if left is not None:
                parts += [f"about {human_duration(left)} left in all"] if left > 0 else []
            elif rate or now > self._start:
                speed = (done - self._done) / (now - self._start) if now > self._start else 0.0
                parts.append(rate or _speed(speed))
                parts += [f"about {human_duration((total - done) / speed)} left"] if speed else []
            say(", ".join(parts))


def _speed(per_second: float) -> str:
    for unit, seconds in (("s", 1), ("min", 60), ("h", 3600)):
        if per_second * seconds >= 1 or unit == "h":
            break
    return f"{per_second * seconds:,.1f}/{unit}"


class SummedLines:
    """Messages of which many may be alike: the first `shown` of a kind are printed, the others counted.

    Two messages are of one kind if they differ only in what stands in quotes, and in numbers.
    """

    def __init__(self, say: Callable[[str], None], *, shown: int = 3) -> None:
        self._say, self._shown = say, shown
        self._seen: Counter[str] = Counter()

    def add(self, line: str, reason: str) -> None:
        """Print `line`, unless there were `shown` lines with a reason of the same kind before it."""
        kind = _VALUES.sub("…", reason)
        self._seen[kind] += 1
        if self._seen[kind] <= self._shown:
            self._say(line)
        elif self._seen[kind] == self._shown + 1:
            self._say("further ones of this kind are counted")

    def close(self) -> None:
        """Print how many messages of each kind there were, if not all were printed."""
        for kind, n in self._seen.most_common():
            if n > self._shown:
                self._say(f"{n:,} in all: {kind}")
        self._seen.clear()
