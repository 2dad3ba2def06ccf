"""The options of a measurement, and the command line that they come from."""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast, overload

import click
from click.core import ParameterSource

from .common import F, json_option, llama_options, model_option, template_options
from .evaluation_setup import NONE, EvaluationSetup
from .sampling import TRUNCATION
from .steering import steering_options

__all__ = ["Seeds", "evaluation_options", "is_given"]

_ABSENT = {"benign_name": NONE}  # a command without --benign has no such prompts


class Seeds(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """Whole numbers with commas between them, or ranges like 0-4."""

    name = "seeds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """The numbers, in their order."""
        if isinstance(value, tuple):
            return value
        seeds: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            last = last if dash else first
            fits = all(text.isdecimal() and len(text) < 10 for text in (first, last)) and int(first) <= int(last)
            if not fits or int(last) - int(first) >= 1000:
                self.fail(f"{value!r} is no list of seeds, like 0,1,2 or 0-4.", param, ctx)
            seeds += range(int(first), int(last) + 1)
        return tuple(seeds)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option(
        "--task",
        "task_name",
        metavar="TASK",
        help="Task file (docs/tasks.md), or builtin:NAME.  [default: the shipped map's own]",
    ),
    click.option(
        "--scorer", "scorer_name", metavar="NAME", help="How answers are scored.  [default: as the task says]"
    ),
    click.option(
        "--scorer-option",
        "scorer_options",
        multiple=True,
        metavar="KEY=VALUE",
        help="Option of the scorer; may be given again.",
    ),
    click.option(
        "--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.  [default: as the task says]"
    ),
    click.option(
        "-n", "--n-items", type=click.IntRange(1), metavar="N", help="Take the first N items.  [default: all]"
    ),
    click.option(
        "--temp",
        "temperature",
        type=click.FloatRange(0),
        default=0.0,
        show_default=True,
        allow_from_autoenv=False,  # `run` samples by default
        metavar="T",
        help="Temperature of sampling, 0: greedy.",
    ),
    click.option(
        "--top-k",
        type=click.IntRange(0),
        default=40,
        show_default=True,
        metavar="K",
        help="Sample from the k likeliest.",
    ),
    *TRUNCATION,
    click.option(
        "--seeds",
        type=Seeds(),
        default="0",
        show_default=True,
        metavar="LIST",
        help="With --temp: answer each item once for each seed, like 0,1,2 or 0-4.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**32 - 1),
        default=0,
        show_default=True,
        allow_from_autoenv=False,  # not the seed of sampling
        metavar="SEED",
        help="Seed of random draws: bootstrap, controls, splits.",
    ),
    click.option(
        "-np",
        "--parallel",
        type=click.IntRange(1, 256),
        default=16,
        show_default=True,
        allow_from_autoenv=False,  # `serve` has fewer
        metavar="N",
        help="Answers decoded at once.",
    ),
    click.option(
        "-c",
        "--ctx-size",
        type=click.IntRange(0),
        allow_from_autoenv=False,  # as needed, whatever a chat takes
        metavar="N",
        help="Context of each answer in tokens, 0: the model's.  [default: as needed]",
    ),
    click.option(
        "--neutral",
        "neutral_name",
        metavar="FILE",
        help="Neutral text for perplexity and KL, `none` for none.  [default: a shipped one]",
    ),
    click.option(
        "--n-text",
        type=click.IntRange(0),
        default=2000,
        show_default=True,
        metavar="N",
        help="Tokens of it that count, 0: all.",
    ),
    click.option(
        "--benign",
        "benign_name",
        metavar="FILE",
        help="Benign prompts, to count over-refusal, `none` for none.  [default: shipped ones]",
    ),
    click.option(
        "-o",
        "--output",
        type=click.Path(path_type=Path),
        required=True,
        allow_from_autoenv=False,  # no other command's output
        metavar="DIR",
        help="Folder of the results; it is made.",
    ),
    click.option("--resume", is_flag=True, help="Go on with an interrupted run."),
    click.option("--restart", is_flag=True, help="Forget an interrupted run."),
)
# What says nothing of the result, or must not be told.
_NOT_REPEATED = {"output", "resume", "restart", "as_json", "hf_token", "verbose"}


def command_line(context: click.Context) -> str:
    """The command with all options that were given, also by the environment or the configuration; no token."""
    words = ["steermoe", *context.command_path.split()[1:]]
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if not isinstance(option, click.Option) or option.name in _NOT_REPEATED or source == ParameterSource.DEFAULT:
            continue
        value = context.params.get(option.name or "")
        if value is None or value == ():
            continue
        name = next((text for text in option.opts if text.startswith("--")), option.opts[0])
        if option.is_flag:
            if value or option.secondary_opts:
                words.append(name if value else option.secondary_opts[0])
            continue
        for given in value if option.multiple else (value,):
            words += [name, _typed(given)]
    return shlex.join([*words, "-o", "OUT"] if any(p.name == "output" for p in context.command.params) else words)


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ",".join("=".join(part) if isinstance(part, tuple) else str(part) for part in value)
    return str(value)


def is_given(name: str) -> bool:
    """Does this parameter stand on the command line?"""
    return click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE


@overload
def evaluation_options(command: F, *, without: tuple[str, ...] = ()) -> F: ...
@overload
def evaluation_options(command: None = None, *, without: tuple[str, ...] = ()) -> Callable[[F], F]: ...
def evaluation_options(command: F | None = None, *, without: tuple[str, ...] = ()) -> Any:
    """All options of a measurement; the command gets them as one argument, `setup` (EvaluationSetup).

    `without` names parameters (as in EvaluationSetup or SteeringFlags: "activate", "layers", "output", ...) that the
    command does not have; the setup holds their defaults. A command that has such an option in a form of its own must
    give its parameter another name: @click.option("--activate", "activate_counts", ...).
    """
    if command is None:
        return lambda wanted: evaluation_options(wanted, without=without)

    @functools.wraps(command)
    def with_setup(**arguments: Any) -> Any:
        names = [name for name in EvaluationSetup.__dataclass_fields__ if name in arguments]
        values = {name: arguments.pop(name) for name in names}
        line = command_line(click.get_current_context())
        return command(**arguments, setup=EvaluationSetup(**{**_ABSENT, **values}, command=line))

    wrapped: Any = json_option(with_setup)
    wrapped = template_options(llama_options(wrapped))
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    wrapped = model_option(steering_options(wrapped))
    wrapped.__click_params__ = [p for p in wrapped.__click_params__ if p.name not in without]
    return cast(F, wrapped)
