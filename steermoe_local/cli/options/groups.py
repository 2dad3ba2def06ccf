"""Groups of options that commands share, and where the value of an option comes from."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar, cast

import click
from click.core import ParameterSource

from ..._util.windows import as_typed

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]

_NEAREST_FIRST = (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT, ParameterSource.DEFAULT_MAP)
# Options that change nothing about a result, or are secret.
_NOT_REPEATED = {"output", "resume", "restart", "as_json", "hf_token", "verbose"}


#
# groups
#


MODEL, PROMPT, OWN, STEERING = "Model", "Prompt", "Options", "Steering"
SAMPLING, MEASUREMENT, OUTPUT, COMPUTING = "Sampling", "Measurement", "Output", "Computing"
HEADINGS = (MODEL, PROMPT, OWN, STEERING, SAMPLING, MEASUREMENT, OUTPUT, COMPUTING)
"""Headings of the pages of --help, in their order; options of a command that says nothing else stand under OWN."""


_PLACE = "steermoe_place"  # an attribute of parameters


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an option stands in help: under which of `HEADINGS`, and whether only --help-all shows it."""

    heading: str = OWN
    rare: bool = False


def place(parameter: click.Parameter) -> Place:
    """The place of a parameter in help, as its group says."""
    return getattr(parameter, _PLACE, Place())


def option(*names: str, value: Any = None, **attributes: Any) -> Any:
    """A field of a dataclass that is an option of the command line; the arguments are those of `click.option`.

    The field has the option's default, or `value` where that is a text to be parsed. `option_group` makes the options
    of a dataclass from such fields.
    """
    empty = False if attributes.get("is_flag") else () if attributes.get("multiple") else None
    default = attributes.get("default", empty) if value is None else value
    return dataclasses.field(default=default, metadata={"option": (names, attributes)})


def field_options(kind: Any) -> list[Decorator]:
    """The options of a dataclass's fields, in their order."""
    found = ((field.name, field.metadata.get("option")) for field in dataclasses.fields(kind))
    return [click.option(*given[0], name, **given[1]) for name, given in found if given]


def together(
    *options: Decorator,
    heading: str | Mapping[str, str] | None = None,
    common: Collection[str] | None = None,
) -> Callable[[F], F]:
    """A decorator that gives a command several options, in this order, and their place in its help.

    `heading` is one of `HEADINGS`, or one for each parameter by its name, "" for the others; None: OWN. `common` are
    the parameters that --help shows, the others are shown by --help-all; None: all of them. Options that have a place
    keep it.
    """

    def decorate(command: F) -> F:
        wrapped: Any = command
        n_before = len(getattr(command, "__click_params__", ()))
        for give in reversed(options):
            wrapped = give(wrapped)
        if heading is not None or common is not None:
            headings = {"": heading} if isinstance(heading, str) else heading or {}
            for parameter in wrapped.__click_params__[n_before:]:
                _put(parameter, headings, common is not None and parameter.name not in common)
        return cast(F, wrapped)

    return decorate


def in_help(headings: Mapping[str, str] | None = None, *, rare: Collection[str] = ()) -> Callable[[F], F]:
    """A decorator that gives a command's options that have no place in help one, like `together`.

    `rare` are the parameters that only --help-all shows. It stands above the options.
    """

    def decorate(command: F) -> F:
        for parameter in getattr(command, "__click_params__", ()):
            _put(parameter, headings or {}, parameter.name in rare)
        return command

    return decorate


def _put(parameter: Any, headings: Mapping[str, str], rare: bool) -> None:
    if not hasattr(parameter, _PLACE):
        setattr(parameter, _PLACE, Place(headings.get(parameter.name, headings.get("", OWN)), rare))


def option_group(
    make: Callable[..., Any],
    argument: str | None = None,
    options: Iterable[Decorator] | None = None,
    takes: Iterable[str] = (),
    heading: str | Mapping[str, str] | None = None,
    common: Collection[str] | None = None,
) -> Callable[[F], F]:
    """A decorator that gives a command some options, and passes it what `make` makes of their values.

    `make` is a dataclass whose fields are options, or a function with `options`. It is called with the values of the
    options, and with the arguments `takes`, which other groups give to the command. Its result becomes the command's
    `argument`; without one, it is a dict of arguments. `heading` and `common` are those of `together`.
    """
    given = list(field_options(make) if options is None else options)

    def decorate(command: F) -> F:
        names = set(takes)

        @functools.wraps(command)
        def with_group(**arguments: Any) -> Any:
            made = make(**{name: arguments.pop(name) for name in names & set(arguments)})
            return command(**arguments, **(made if argument is None else {argument: made}))

        n_before = len(getattr(command, "__click_params__", ()))
        wrapped: Any = together(*given, heading=heading, common=common)(with_group)
        names.update(parameter.name for parameter in wrapped.__click_params__[n_before:])
        return cast(F, wrapped)

    return decorate


class RenamedOption(click.Option):
    """An option with `old_names`, which still work but are not shown in help, messages and completions."""

    def __init__(self, *arguments: Any, old_names: tuple[str, ...], **attributes: Any) -> None:
        super().__init__(*arguments, **attributes)
        self.old_names = old_names

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parser of the command line take the old names, too."""
        names = self.opts
        self.opts = [*names, *self.old_names]
        try:
            super().add_to_parser(parser, ctx)
        finally:
            self.opts = names


def long_names(parameter: click.Parameter) -> list[str]:
    """The long names of an option without their dashes, old ones last."""
    names = [*parameter.opts, *getattr(parameter, "old_names", ())]
    return [name.removeprefix("--") for name in names if name.startswith("--")]


#
# sources
#


def rank(name: str) -> int:
    """How near the value of a parameter was given: 0 on the command line, then environment, configuration, default."""
    source = click.get_current_context().get_parameter_source(name)
    return _NEAREST_FIRST.index(source) if source in _NEAREST_FIRST else len(_NEAREST_FIRST)


def is_given(name: str) -> bool:
    """Whether a parameter was given on the command line."""
    return rank(name) == 0


def is_default(name: str) -> bool:
    """Whether a parameter has its default value."""
    return rank(name) == len(_NEAREST_FIRST)


def command_line() -> str:
    """The command line that repeats this run: arguments, and all options that differ from their defaults, no secret."""
    context = click.get_current_context()
    words = ["steermoe", *context.command_path.split()[1:]]
    arguments = [parameter.name for parameter in context.command.params if isinstance(parameter, click.Argument)]
    words += [_typed(value) for name in arguments if name and (value := context.params.get(name)) is not None]
    for parameter in context.command.params:
        name = parameter.name or ""
        if not isinstance(parameter, click.Option) or name in _NOT_REPEATED or is_default(name):
            continue
        value = context.params.get(name)
        if value is None or value == ():
            continue
        shown = next((text for text in parameter.opts if text.startswith("--")), parameter.opts[0])
        if parameter.is_flag:
            if value or parameter.secondary_opts:
                words.append(shown if value else parameter.secondary_opts[0])
            continue
        for part in value if parameter.multiple else (value,):
            words += [shown, _typed(part)]
    return as_typed([*words, "-o", "OUT"] if any(p.name == "output" for p in context.command.params) else words)


def _typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, tuple):
        return ",".join("=".join(part) if isinstance(part, tuple) else str(part) for part in value)
    return str(value)
