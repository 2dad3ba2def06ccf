"""What the commands share: options, printing, progress, and the one place where errors become messages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..embedded import resolve_model
from ..errors import SteerMoEError, UsageError

F = TypeVar("F", bound=Callable[..., Any])

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class SteerMoEGroup(click.Group):
    """A group whose commands fail with one line: what is wrong, where, and the cure."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; translate the package's errors into a message and an exit status."""
        try:
            return super().invoke(ctx)
        except UsageError as error:
            _fail(str(error), EXIT_USAGE)
        except SteerMoEError as error:
            _fail(str(error), EXIT_ERROR)
        except BrokenPipeError:
            # The reader went away (`steermoe map show M | head`); nothing more can be said on stdout.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_ERROR)
        except (KeyboardInterrupt, click.Abort):
            _fail("interrupted", EXIT_INTERRUPTED)


def _fail(message: str, status: int) -> None:
    click.echo(f"error: {message}", err=True)
    sys.exit(status)


class ModelPath(click.ParamType):  # type: ignore[type-arg, unused-ignore] # generic only in newer click
    """A GGUF file, or `tiny` for the embedded model."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Resolve the name; whether the file is a model is the command's to find out."""
        return resolve_model(value)


def model_option(command: F) -> F:
    """-m, as llama.cpp names it."""
    return click.option(
        "-m",
        "--model",
        type=ModelPath(),
        required=True,
        envvar="STEERMOE_MODEL",
        metavar="MODEL",
        help="GGUF file, or `tiny` for the embedded model.",
    )(command)


def llama_options(command: F) -> F:
    """Flags of a llama.cpp context, under its names."""
    for option in reversed(
        [
            click.option("-t", "--threads", type=click.IntRange(1), help="Threads.  [default: by the number of cores]"),
            click.option(
                "-ngl",
                "--n-gpu-layers",
                type=int,
                default=0,
                show_default=True,
                help="Layers kept on the GPU, -1 for all.",
            ),
            click.option(
                "-b",
                "--batch-size",
                type=click.IntRange(1),
                default=512,
                show_default=True,
                help="Tokens of one decode.",
            ),
            click.option(
                "-ub",
                "--ubatch-size",
                type=click.IntRange(1),
                default=512,
                show_default=True,
                help="Tokens computed at once.",
            ),
            click.option("--verbose", is_flag=True, help="Let llama.cpp log to stderr."),
        ]
    ):
        command = option(command)
    return command


def json_option(command: F) -> F:
    """--json."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def print_json(data: Any) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(data, ensure_ascii=False, indent=1, default=str))


def console(stderr: bool = False) -> Console:
    """A rich console that neither wraps nor colours when it is not a terminal."""
    wide = not (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, highlight=False, width=160 if wide else None, soft_wrap=False)


def facts_table(rows: list[tuple[str, str]]) -> Table:
    """Two columns without lines: a name and its value."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yield show(what, done, total), a bar on stderr if that is a terminal, else nothing."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show
