"""What commands print: JSON, tables, messages and progress bars."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..evaluation.reports.document import Table as ReportTable

# Pictures of control characters: a text of somebody else's file must not move the cursor of a terminal.
_VISIBLE = {code: 0x2400 + code for code in range(32)} | {127: 0x2421} | dict.fromkeys(range(128, 160), 65533)
_VISIBLE_LINES = {code: picture for code, picture in _VISIBLE.items() if code != 10}


def say(text: str) -> None:
    """Print a message on stderr."""
    click.echo(text, err=True)


def warn(*warnings: str) -> None:
    """Print warnings on stderr, a line each."""
    for warning in warnings:
        say(f"warning: {warning}")


class _PromptWarnings(logging.Handler):
    """Prints what rendering warns of, each warning once."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._said:
            self._said.add(message)
            warn(message)


@contextmanager
def prompt_warnings() -> Iterator[None]:
    """Meanwhile, warnings of what is changed in prompts for a chat template's sake go to stderr, each once."""
    log, handler = logging.getLogger("steermoe.prompts"), _PromptWarnings()
    log.addHandler(handler)
    before, log.propagate = log.propagate, False  # a server logs to the root, too
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.propagate = before


def visible(text: str, *, lines: bool = False) -> str:
    """The text with its control characters replaced by pictures of them; with `lines`, line ends stay."""
    return text.translate(_VISIBLE_LINES if lines else _VISIBLE)


def print_json(data: Any) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(data, ensure_ascii=False, indent=1, default=str))


def console(stderr: bool = False) -> Console:
    """A rich console that neither wraps nor colours when it is not a terminal."""
    wide = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=160 if wide else None, soft_wrap=False)


def facts_table(rows: Iterable[tuple[str, str]]) -> Table:
    """A table of two columns without lines: a name and its value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def print_reports(tables: Iterable[ReportTable]) -> None:
    """Print the tables of a report, with an empty line between them."""
    out = console()
    for number, table in enumerate(tables):
        out.print(*([""] if number else []), rich_table(table), sep="\n")


def rich_table(table: ReportTable) -> Table:
    """A table of a report for the terminal."""
    rich = Table(title=Text(table.title), title_justify="left", box=None, pad_edge=False, caption_justify="left")
    for number, name in enumerate(table.header):
        rich.add_column(Text(name), justify="left" if number == 0 or name == "note" else "right", overflow="fold")
    for row in table.rows:
        rich.add_row(*map(Text, row))
    return rich


def print_left_out(skipped: Mapping[str, int]) -> None:
    """Print on stderr how many rows of data were left out, by reason."""
    for reason, n in skipped.items():
        say(f"  {n:,} left out: {visible(reason)}")


@contextmanager
def progress_bar(*, hidden: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Yield show(what, done, total), a bar on stderr if that is a terminal, else nothing."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    disable = hidden or not sys.stderr.isatty()
    with Progress(*columns, console=console(stderr=True), transient=True, disable=disable) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
