"""steermoe config."""

from __future__ import annotations

import stat
import sys
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem
from rich.table import Table
from rich.text import Text

from ..._util.disk import cannot_write
from ..._util.files import replacing, require_writable
from ..._util.locks import OutputLock
from ..._util.visible import visible
from ...errors import UsageError
from ..options import settings
from ..options.common import json_option
from ..options.completion import starting
from ..options.config_file import (
    ConfigFile,
    EditError,
    Keys,
    config_path,
    format_value,
    is_secret,
    owners_of,
    parse,
    parse_value,
    set_value,
    unset_value,
)
from ..options.plans import RuleText, WhereText, parse_texts
from ..output import print_json, print_lines, warn
from ..streams import console, put

MASK = "********"
_WAIT = 10.0  # seconds for another command that changes the file


def _complete_key(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """OPTION, and COMMAND.OPTION once the command is typed."""
    found: set[str] = set()
    for path, options in settings.kinds(_root(ctx)).items():
        at = "".join(f"{name}." for name in path)
        found |= {at + name for name in options} if incomplete.startswith(at) else {*options, at}
    return starting(incomplete, found)


def _complete_command(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
    """The next word of a command."""
    command: click.Command | None = _root(ctx)
    for word in ctx.params.get("command") or ():
        command = command.commands.get(word) if isinstance(command, click.Group) else None
    return starting(incomplete, command.commands if isinstance(command, click.Group) else ())


class _ConfigGroup(settings.WithoutConfig, click.Group):
    pass


@click.group(cls=_ConfigGroup, invoke_without_command=True)
@click.pass_context
def config(ctx: click.Context) -> None:
    """Show and change the defaults of the command line's options.

    An option on the command line comes first, then the environment (STEERMOE_RUN_TEMP for one command, STEERMOE_TEMP
    for all that have --temp), then the configuration file, then the program's own default. Without a subcommand this
    shows what is set.

    \b
    Examples:
      steermoe config
      steermoe config set threads 4
      steermoe config set chat.temp 0
    """
    if ctx.invoked_subcommand is None:
        ctx.invoke(show, command=(), as_json=False)


@config.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False, "help_option_names": ["--help"]}
)
@json_option
@click.argument(
    "command", nargs=-1, metavar="[COMMAND [FLAGS]]", type=click.UNPROCESSED, shell_complete=_complete_command
)
@click.pass_context
def show(ctx: click.Context, command: tuple[str, ...], as_json: bool) -> None:
    """Show which options are set, to what and where; for COMMAND all its options. Secrets are masked.

    FLAGS are COMMAND's, to see what it would do with them.

    \b
    Examples:
      steermoe config show
      steermoe config show --json
      steermoe config show run --temp 0
    """
    root = _root(ctx)
    path, flags = _split(root, command)
    file = ConfigFile.read(config_path())
    found = settings.settings(root, file, path, flags)
    if not path:
        found = [setting for setting in found if setting.source != "default"]
    unknown = settings.unknown_variables(root)
    if as_json:
        print_json({"file": str(file.path), "exists": file.exists, "settings": _rows(found), "unknown": unknown})
    else:
        print_lines(f"file: {file.path}{'' if file.exists else ' (not there)'}")
        _print(found, whole=bool(path))
    for name in unknown:
        warn(f"{name} is set, but no option reads it")


@config.command("path")
def path_() -> None:
    """Print the path of the configuration file, whether it is there or not.

    STEERMOE_CONFIG names another one.

    \b
    Example:
      steermoe config path
    """
    put(str(config_path()))


@config.command("set", context_settings={"ignore_unknown_options": True})
@click.argument("key", shell_complete=_complete_key)
@click.argument("value")
@click.pass_context
def set_(ctx: click.Context, key: str, value: str) -> None:
    """Set an option's default in the configuration file. Comments and order of the file stay.

    KEY is an option's long name, for every command that has it, or COMMAND.OPTION for one. VALUE is what would stand on
    the command line; true or false for a flag; ["a", "b"] for an option that can be given again.

    \b
    Examples:
      steermoe config set model tiny
      steermoe config set chat.temp 0.7
      steermoe config set pairs.check.json true
    """
    kinds = settings.kinds(_root(ctx))
    keys = _keys(key)
    file = _read_to_change()
    owners = owners_of(keys, kinds)
    if not owners:  # refused as in a file that has this key alone
        alone: Any = ""
        for name in reversed(keys):
            alone = {name: alone}
        ConfigFile(file.path, "", True, alone).options(kinds)
    kind = kinds[owners[0]][keys[-1]]
    try:
        parsed = parse_value(value, kind)
        text = set_value(file.text, keys, parsed)
    except EditError as error:
        raise UsageError(f"{file.path}: {key} cannot be set: {error}; edit the file by hand") from None
    except ValueError as error:
        raise UsageError(f"{key}: {'not ' + kind.words if is_secret(keys[-1]) else error}") from None
    changed = ConfigFile(file.path, text, True, parse(text, file.path))
    changed.options(kinds)  # an unknown key, or an older mistake in the file
    _check(_root(ctx), keys, parsed)
    _write(file.path, text)
    print_lines(f"{file.path}: {key} = {MASK if is_secret(keys[-1]) else format_value(parsed)}")


@config.command()
@click.argument("key", shell_complete=_complete_key)
def unset(key: str) -> None:
    """Take an option's default out of the configuration file.

    \b
    Example:
      steermoe config unset chat.temp
    """
    file = _read_to_change()
    try:
        text = unset_value(file.text, _keys(key))
    except KeyError:
        raise UsageError(f"{file.path}: {key} is not set there; `steermoe config show` tells what is") from None
    except EditError as error:
        raise UsageError(f"{file.path}: {key} cannot be taken out: {error}; edit the file by hand") from None
    _write(file.path, text)
    print_lines(f"{file.path}: {key} is not set any more")


def _root(ctx: click.Context) -> click.Group:
    root = ctx.find_root().command
    assert isinstance(root, click.Group)
    return root


def _split(root: click.Group, words: tuple[str, ...]) -> tuple[Keys, list[str]]:
    """(path of a command, what follows it). Raises UsageError for words that lead to none."""
    command: click.Command = root
    for index, word in enumerate(words):
        if not isinstance(command, click.Group):
            return words[:index], list(words[index:])
        if word not in command.commands:
            known = ", ".join(sorted(command.commands))
            raise UsageError(f"{' '.join(('steermoe', *words[: index + 1]))}: no such command; there are {known}")
        command = command.commands[word]
    if words and isinstance(command, click.Group) and not command.invoke_without_command:
        known = ", ".join(sorted(command.commands))
        raise UsageError(f"{' '.join(('steermoe', *words))}: a group of commands; name one of {known}")
    return words, []


def _keys(key: str) -> Keys:
    keys = tuple(part.strip().removeprefix("--") for part in key.split("."))
    if not all(keys):
        raise UsageError(f"{key!r} is not a key; write OPTION or COMMAND.OPTION, like chat.temp")
    return keys


def _check(root: click.Group, keys: Keys, value: Any) -> None:
    """Let the option's type judge a value, as far as that touches nothing. Raises click.BadParameter."""
    commands = dict(settings.commands(root))
    for path in owners_of(keys, settings.kinds(root)):
        option = settings.options(commands[path])[keys[-1]]
        if isinstance(option.type, RuleText):
            try:
                parse_texts(settings.for_click(option, value))
            except UsageError as error:
                raise UsageError(f"{'.'.join(keys)}: {error}") from None
        elif type(option.type).__module__.startswith("click.") or isinstance(option.type, WhereText):
            with settings.context(root, path, commands[path]) as ctx:
                try:
                    option.type_cast_value(ctx, settings.for_click(option, value))
                except click.BadParameter as error:
                    raise UsageError(f"{'.'.join(keys)}: {error.message.rstrip('.')}") from None


def _write(path: Path, text: str) -> None:
    """Replace the file; a new one can be read by its owner alone, as it may hold secrets."""
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o600
    with replacing(path, mode) as temporary:
        temporary.write_bytes(text.encode("utf-8"))  # line ends as they are


def _read_to_change() -> ConfigFile:
    """The file, locked until the command ends: two commands at once must not undo each other's change."""
    path = config_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    require_writable(path)
    click.get_current_context().with_resource(OutputLock(path, wait=_WAIT))
    return ConfigFile.read(path)


def _rows(found: list[settings.Setting]) -> list[dict[str, Any]]:
    return [
        {
            "command": " ".join(setting.command),
            "option": setting.option,
            "value": _masked(setting),
            "source": setting.source,
            "where": setting.where or None,
        }
        for setting in found
    ]


def _masked(setting: settings.Setting) -> Any:
    return MASK if is_secret(setting.option) and setting.value not in (None, "") else setting.value


def _print(found: list[settings.Setting], whole: bool) -> None:
    """Print a table, with one row for a setting that several commands share."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for setting in found:
        value = _masked(setting)
        if isinstance(value, tuple):
            value = list(value)
        written = "" if value is None else value if isinstance(value, str) else format_value(value)
        where = setting.where or setting.source
        lines.setdefault((setting.option, written, where), []).append(" ".join(setting.command))
    if not lines:
        print_lines("nothing is set: every option has its default")
        return
    table = Table(box=None, pad_edge=False)
    for name in ("option", "value", "from", *([] if whole else ["commands"])):
        # in a pipe a path stays whole, and the commands go on below
        table.add_column(name, overflow="fold", no_wrap=name == "from" and not sys.stdout.isatty())
    for (option, written, where), owners in lines.items():
        cells = (option, written, where, *([] if whole else [", ".join(owners)]))
        table.add_row(*(Text(visible(cell)) for cell in cells))  # not markup: a value may have brackets
    console().print(table)
