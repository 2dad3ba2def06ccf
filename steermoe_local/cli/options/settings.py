"""Defaults of options from the environment and the configuration file, for any tree of commands."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from ...errors import UsageError
from .config_file import ConfigFile, Entry, Keys, OptionKind, config_path
from .groups import long_names

PREFIX = "STEERMOE"
# read by the library, or by this program before its options: never names of options of all commands
_TAKEN = {
    *("STEERMOE_LIB_PATH", "STEERMOE_FORCE", "STEERMOE_CONFIG", "STEERMOE_DEBUG", "STEERMOE_JUDGE_API_KEY"),
    *("STEERMOE_TEMPLATE_SECONDS", "STEERMOE_CACHE_DIR"),
}


class WithoutConfig:
    """Mixin of commands that run even if the configuration file is broken, like those that repair it."""


@dataclass(frozen=True)
class Setting:
    """The value of an option, and where it comes from: "flag", "environment", "file" or "default"."""

    command: Keys
    option: str
    value: Any
    source: str
    where: str = ""


def commands(group: click.Group, at: Keys = ()) -> Iterator[tuple[Keys, click.Command]]:
    """All commands below a group that can be started, and their paths."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from commands(command, (*at, name))
        if not isinstance(command, click.Group) or command.invoke_without_command:
            yield (*at, name), command


def options(command: click.Command) -> dict[str, click.Option]:
    """A command's options by their long names without dashes."""
    found: dict[str, click.Option] = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.expose_value and not parameter.is_eager:
            found |= dict.fromkeys(long_names(parameter), parameter)
    return found


def kind(option: click.Option) -> OptionKind:
    """What values an option takes."""
    many = option.multiple or option.nargs != 1
    shared = option.allow_from_autoenv

    def of(what: Any) -> OptionKind:
        return OptionKind(what, many, shared)

    if option.is_flag and option.is_bool_flag:
        return of("flag")
    if option.count or isinstance(option.type, click.types.IntParamType):
        return of("integer")
    if isinstance(option.type, click.types.FloatParamType):
        return of("number")
    if isinstance(option.type, (click.Choice, click.Path, click.File, click.types.StringParamType)):
        return of("text")
    return of("table" if option.type.name == "json" else "any")


def kinds(root: click.Group) -> dict[Keys, dict[str, OptionKind]]:
    """The options of all commands that the configuration file may set."""
    return {path: {name: kind(option) for name, option in options(command).items()} for path, command in commands(root)}


def name_variables(root: click.Group) -> None:
    """Give every option its environment variables, the nearest first: STEERMOE_RUN_TEMP, then STEERMOE_TEMP.

    An option that has a variable already keeps it in front of the last. One with `allow_from_autoenv=False` means
    something else than its namesakes and gets the name with its command alone.
    """
    for path, command in commands(root):
        for option in set(options(command).values()):
            option.envvar = _variables(path, option)


def _variables(path: Keys, option: click.Option) -> list[str]:
    given = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    names = long_names(option)
    own = [_variable((*path, name)) for name in names]
    of_all = [_variable((name,)) for name in names if option.allow_from_autoenv]
    return list(dict.fromkeys([*own, *given, *(name for name in of_all if name not in _TAKEN)]))


def _variable(parts: Keys) -> str:
    return "_".join((PREFIX, *parts)).replace("-", "_").upper()


def read_config() -> ConfigFile:
    """The configuration file of this run. Raises UsageError if it is no TOML, or is named and not there."""
    path = config_path()
    found = ConfigFile.read(path)
    if not found.exists and os.environ.get("STEERMOE_CONFIG"):
        raise UsageError(f"{path}: STEERMOE_CONFIG names a file that is not there; create it or unset the variable")
    return found


def default_map(root: click.Group) -> dict[str, Any]:
    """What the configuration file says, as click takes it. Raises UsageError for a file that cannot be used."""
    result: dict[str, Any] = {}
    by_path = dict(commands(root))
    for path, entries in read_config().options(kinds(root)).items():
        here = result
        for name in path:
            here = here.setdefault(name, {})
        for name, entry in entries.items():
            option = options(by_path[path])[name]
            if option.name is not None:
                here[option.name] = for_click(option, entry.value)
    return result


def for_click(option: click.Option, value: Any) -> Any:
    """A value of the file as the option's type converts it: types of our own take texts."""
    if option.multiple or option.nargs != 1:
        return value if isinstance(value, list) else [value]
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value) if kind(option).what == "any" else value


def variable_of(option: click.Parameter) -> str | None:
    """The environment variable that an option's value comes from, if one is set."""
    names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or ()
    return next((name for name in names if os.environ.get(name)), None)


def provenance(ctx: click.Context, parameter: click.Parameter) -> str:
    """Where a value that was not typed comes from, for messages about it."""
    source = ctx.get_parameter_source(parameter.name) if parameter.name else None
    if source == ParameterSource.ENVIRONMENT:
        return f" (from the environment: {variable_of(parameter)})"
    if source == ParameterSource.DEFAULT_MAP and isinstance(ctx.find_root().command, click.Group):
        root: Any = ctx.find_root().command
        path = tuple(ctx.command_path.split()[len(ctx.find_root().command_path.split()) :])
        config = read_config()
        entry = _entry(parameter, config.options(kinds(root)).get(path, {}))
        return f" (from {config.where(entry.keys) if entry else config.path})"
    return ""


def provenance_of(name: str) -> str:
    """`provenance` of a parameter of the command that runs, by its name; "" outside of commands."""
    ctx = click.get_current_context(silent=True)
    found = next((parameter for parameter in ctx.command.params if parameter.name == name), None) if ctx else None
    return provenance(ctx, found) if ctx is not None and found is not None else ""


def _entry(option: click.Parameter, entries: dict[str, Entry]) -> Entry | None:
    names = long_names(option)
    return next((entries[name] for name in reversed(entries) if name in names), None)  # as click takes them: the last


def settings(root: click.Group, config: ConfigFile, path: Keys = (), args: Sequence[str] = ()) -> list[Setting]:
    """All options of a command with their values, were it started with `args`; without a path, of all commands.

    Raises UsageError, click.UsageError.
    """
    entries = config.options(kinds(root))
    found: list[Setting] = []
    for at, command in commands(root):
        if path in ((), at):
            with context(root, at, command) as ctx:
                found += _command_settings(at, ctx, config, entries.get(at, {}), args)
    return found


def context(root: click.Group, path: Keys, command: click.Command) -> click.Context:
    """A context to look at a command's options in; nothing is started."""
    return click.Context(command, info_name=" ".join((PREFIX.lower(), *path)), **root.context_settings)


def _command_settings(
    path: Keys, ctx: click.Context, config: ConfigFile, entries: dict[str, Entry], args: Sequence[str]
) -> Iterator[Setting]:
    by_name = options(ctx.command)
    names = {option: name for name, option in reversed(by_name.items())}  # the first of an option's names
    typed = ctx.command.make_parser(ctx).parse_args(args=list(args))[0] if args else {}
    for option in dict.fromkeys(by_name.values()):
        name = names[option]
        entry = _entry(option, entries)
        if option.name in typed:
            yield Setting(path, name, _typed(ctx, option, typed[option.name]), "flag")
        elif variable := variable_of(option):
            value = _typed(ctx, option, option.value_from_envvar(ctx))
            yield Setting(path, name, value, "environment", variable)
        elif entry is not None:
            yield Setting(path, name, entry.value, "file", config.where(entry.keys))
        else:
            default = option.to_info_dict()["default"]
            yield Setting(path, name, None if callable(default) else default, "default")


def _typed(ctx: click.Context, option: click.Option, value: Any) -> Any:
    """A text as the option's type reads it, unless it is a type of our own, which may look for files."""
    if not type(option.type).__module__.startswith("click."):
        return value
    try:
        converted = option.type_cast_value(ctx, value)
    except click.BadParameter:
        return value
    return str(converted) if isinstance(converted, os.PathLike) else converted


def unknown_variables(root: click.Group) -> list[str]:
    """STEERMOE_* variables that are set and that nothing reads, so that a misspelt one is seen."""
    known = option_variables(root) | _TAKEN
    return sorted(name for name in os.environ if name.startswith(f"{PREFIX}_") and name not in known)


def option_variables(root: click.Group) -> set[str]:
    """Names of the environment variables that options read."""
    name_variables(root)
    return {name for _, command in commands(root) for o in options(command).values() for name in o.envvar or ()}
