"""Options that several commands have, and types of options."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import click
from click.core import ParameterSource

from ..._util.files import parse_json, require_writable
from ..._util.locks import OutputLock
from ...errors import UsageError
from ...llama.template_date import template_date
from .groups import MODEL, OUTPUT, PROMPT, SAMPLING, Decorator, RenamedOption, option_group, together
from .model import ModelPath
from .system_text import UserPath

T = TypeVar("T")


#
# types
#


class Parsed(click.ParamType, Generic[T]):  # type: ignore[type-arg, unused-ignore] # generic only in newer click
    """A type of options: `parse` makes a `kind` of a text, or raises ValueError with a sentence."""

    def __init__(self, name: str, kind: type[T], parse: Callable[[str], T]) -> None:
        self.name = name
        self._kind, self._parse = kind, parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> T:
        """The value; one that has the type already, as a default may, stays."""
        if isinstance(value, self._kind):
            return value
        try:
            return self._parse(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise ValueError(f"{text!r} has an empty part.")
    return words


def _share(text: str) -> float:
    try:
        share = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise ValueError(f"{text!r} is no share, like 5% or 0.05.")
    return share


def _shares(text: str) -> tuple[float, ...]:
    return () if text.strip() == "none" else tuple(_share(part) for part in text.split(","))


def _seeds(text: str) -> tuple[int, ...]:
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        last = last if dash else first
        fits = all(end.isdecimal() and len(end) < 10 for end in (first, last)) and int(first) <= int(last)
        if not fits or int(last) - int(first) >= 1000:
            raise ValueError(f"{text!r} is no list of seeds, like 0,1,2 or 0-4.")
        seeds += range(int(first), int(last) + 1)
    return tuple(seeds)


def _json_object(text: str) -> dict[str, Any]:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ValueError(f'{text!r} is not a JSON object, like {{"name": true}}.')
    return data


def _date(text: str) -> datetime.date:
    try:
        return template_date(text).day
    except UsageError as error:
        raise ValueError(f"{error}.") from None


PARALLEL: tuple[tuple[str, ...], dict[str, Any]] = (
    ("-np", "--parallel"),
    {
        "type": click.IntRange(1, 256),
        "default": 16,
        "show_default": True,
        "allow_from_autoenv": False,  # `serve` has fewer
        "metavar": "N",
        "help": "Answers decoded at once.",
    },
)
"""Names and attributes of the option of commands that answer many questions."""

WORDS = Parsed[tuple[str, ...]]("words", tuple, _words)
"""Words with commas between them."""
SHARE = Parsed("share", float, _share)
"""A share from 0: 5% or 0.05."""
SHARES = Parsed[tuple[float, ...]]("shares", tuple, _shares)
"""Shares with commas between them, `none` for none."""
SEEDS = Parsed[tuple[int, ...]]("seeds", tuple, _seeds)
"""Whole numbers with commas between them, or ranges like 0-4, in their order."""
FILE = UserPath(path_type=Path)


#
# options
#

json_option = together(
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."), heading=OUTPUT
)

template_options = together(
    click.option(
        "--thinking",
        "--think",
        is_flag=True,
        help="Turn the chat template's switch for thinking on.  [default: off]",
    ),
    click.option(
        "--chat-template-kwargs",
        "template_arguments",
        type=Parsed[dict[str, Any]]("json", dict, _json_object),
        metavar="JSON",
        help="Further variables for the chat template, as in llama.cpp.",
    ),
    click.option(
        "--date",
        type=Parsed("date", datetime.date, _date),
        metavar="YYYY-MM-DD",
        help="Date for chat templates that print one.  [default: today]",
    ),
    heading=PROMPT,
    common=("thinking",),
)
"""--thinking, --chat-template-kwargs and --date."""

hub_offline_option = click.option(
    "--offline", is_flag=True, help="Take hub data from the cache alone, as with HF_HUB_OFFLINE=1."
)
longest_prompt_option = click.option(
    "-c",
    "--ctx-size",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Longest prompt, 0: as the pairs need. Pairs with longer ones are reported and skipped.",
)
seed_option = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything that is drawn.")


def system_option(help: str) -> Decorator:
    """-sys: the system message."""
    return together(
        click.option("-sys", "--system-prompt", "--system", "system_prompt", metavar="TEXT", help=help), heading=PROMPT
    )


stop_option = together(
    click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before this text; may be given again."),
    heading=SAMPLING,
    common=(),
)


def context_option(help: str) -> Decorator:
    """-c: the longest context, None if it is not given."""
    given = click.option("-c", "--ctx-size", type=click.IntRange(0), metavar="N", help=help)
    return together(given, heading=MODEL, common=())


def output_option(help: str, *, required: bool = True, **attributes: Any) -> Decorator:
    """-o: the file or folder that the command writes."""
    given = click.option("-o", "--output", type=FILE, required=required, help=help, **attributes)
    return together(given, heading=OUTPUT)


def meaning_options(
    positive: str = "What the positive side means, in words.",
    negative: str = "What the negative side means, in words.",
    license: str = "Licence of the map, kept in it.",
) -> Decorator:
    """--positive, --negative and --license of a new map; the command gets them as one dict, `meaning`."""
    helps = {"--positive": positive, "--negative": negative, "--license": license}
    options = [click.option(name, default="", help=text) for name, text in helps.items()]
    return option_group(dict, "meaning", options, heading=OUTPUT, common=("positive", "negative"))


def strength_option(name: str, **attributes: Any) -> Decorator:
    """--strength of the soft rule, once called --scale."""
    return click.option("--strength", name, cls=RenamedOption, old_names=("--scale",), **attributes)


def other_model_option(help: str) -> Decorator:
    """-m of a command that only looks things up in a model; the default model of `run` is not taken."""
    return click.option("-m", "--model", type=ModelPath(), allow_from_autoenv=False, metavar="MODEL", help=help)


def maps_folders_option(what: str) -> Decorator:
    """--maps of commands that say which expert maps fit a model."""
    return maps_option("maps_dirs", f"Folder of expert maps to compare with the {what}. Can be given again.")


def maps_option(name: str, help: str) -> Decorator:
    """--maps, which can be given again; the command gets the folders as `name`.

    The environment's is the user's maps folder, which need not exist yet.
    """
    there = UserPath(file_okay=False, exists=True, path_type=Path)

    def check(context: click.Context, parameter: click.Parameter, folders: tuple[Path, ...]) -> tuple[Path, ...]:
        if context.get_parameter_source(name) is ParameterSource.ENVIRONMENT:
            return tuple(folder for folder in folders if folder.is_dir())
        return tuple(Path(os.fsdecode(there.convert(folder, parameter, context))) for folder in folders)

    return click.option(
        "--maps", name, type=UserPath(path_type=Path), callback=check, multiple=True, metavar="DIR", help=help
    )


def reasoning_option(help: str) -> Decorator:
    """--reasoning: whether what the model thinks is shown; `auto` is for terminals alone."""
    choice = click.Choice(["auto", "show", "hide"])
    return together(
        click.option("--reasoning", type=choice, default="auto", show_default=True, help=help),
        heading=OUTPUT,
        common=(),
    )


def selection_options(what: str) -> Decorator:
    """--skip, --limit, --sample and --seed; the command gets them as one argument, `wanted`."""

    def wanted(skip: int, limit: int | None, sample: int | None, seed: int) -> dict[str, Any]:
        if limit is not None and sample is not None:
            raise UsageError(f"--limit takes the first {what}, --sample draws some of all; give one of them")
        return {"skip": skip, "limit": limit, "sample": sample, "seed": seed}

    options = (
        click.option("--skip", type=click.IntRange(0), default=0, help=f"Leave out the first {what}.", metavar="N"),
        click.option("--limit", type=click.IntRange(1), metavar="N", help=f"Take the first {what}.  [default: all]"),
        click.option("--sample", type=click.IntRange(1), metavar="N", help=f"Draw {what} at random instead."),
        seed_option,
    )
    return option_group(wanted, "wanted", options)


def resume_options(
    resume: str = "Go on with an interrupted run.",
    restart: str = "Forget an interrupted run.",
    common: tuple[str, ...] | None = None,
) -> Decorator:
    """--resume and --restart."""
    return together(
        click.option("--resume", is_flag=True, help=resume),
        click.option("--restart", is_flag=True, help=restart),
        heading=OUTPUT,
        common=common,
    )


def lock_output(path: Path, *, folder: bool = False) -> None:
    """Lock an output, a file that can be written there or an existing `folder`, until the command ends.

    Raises UsageError, StorageError, BusyError (another process is writing it).
    """
    if not folder:
        require_writable(path)
    ctx = click.get_current_context()
    locks: dict[str, OutputLock] = ctx.meta.setdefault("steermoe.locks", {})
    real = os.path.realpath(path)
    if real not in locks:
        locks[real] = ctx.with_resource(OutputLock(path))


def require_distinct(*outputs: Path | None) -> None:
    """Raise UsageError if two of a command's outputs are one file, of which the last would be left."""
    given = [path for path in outputs if path is not None]
    places = [os.path.realpath(path) for path in given]
    for number, (path, place) in enumerate(zip(given, places, strict=True)):
        if place in places[:number]:
            what = "the output" if place == places[0] else "another output"
            raise UsageError(f"{path}: is {what} too; name another file")


class Unfinished(Protocol):
    """The partial file of an interrupted run."""

    path: Path

    def exists(self) -> bool:
        """Whether the file is there."""


def check_resume(resume: bool, restart: bool) -> None:
    """Raise UsageError for --resume with --restart."""
    if resume and restart:
        raise UsageError("--resume and --restart exclude each other")


def check_unfinished(kept: Unfinished, resume: bool, restart: bool) -> None:
    """Raise UsageError when an interrupted run is there, without --resume and --restart."""
    if kept.exists() and not resume and not restart:
        raise UsageError(f"{kept.path}: an interrupted run; go on with --resume, or start over with --restart")
