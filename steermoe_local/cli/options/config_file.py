"""The configuration file: defaults for the command line's options, in TOML.

Keys are long names of options. At the top they hold for every command that has them, in a table like `[chat]` or
`[pairs.check]` for that command, which overrides the top. The caller says which commands and options there are.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from ..._util.file_kinds import require_kind
from ..._util.files import read_bytes
from ..._util.json_text import quoted
from ..._util.toml_text import MAX_TOML, TomlError, parse_toml
from ...errors import FormatError, UsageError

ENVIRONMENT = "STEERMOE_CONFIG"
_MARKED = 64 << 10  # characters of a file in which tomlkit, which takes a second for so many, looks for a line
_SECRET = re.compile(r"(^|-)(token|key|secret|password)$")


@dataclass(frozen=True)
class OptionKind:
    """What an option takes. `many`: it can be given again. `shared`: a key at the top of the file holds for it."""

    what: Literal["flag", "integer", "number", "text", "table", "any"]
    many: bool = False
    shared: bool = True

    @property
    def words(self) -> str:
        """What a value must be, for messages."""
        names = {
            "flag": "true or false",
            "integer": "a whole number",
            "number": "a number",
            "text": "a text in quotes",
            "table": "a table",
            "any": "a text or a number",
        }
        return names[self.what] + (", or a list of them" if self.many else "")

    def accepts(self, value: Any) -> bool:
        """Tell whether a value of the file can be one of this option."""
        if isinstance(value, list):
            one = OptionKind(self.what)
            return (self.many or self.what == "any") and all(one.accepts(v) and type(v) is not list for v in value)
        types: dict[str, tuple[type, ...]] = {
            "flag": (bool,),
            "integer": (int,),
            "number": (int, float),
            "text": (str,),
            "table": (dict, str),
            "any": (str, int, float),
        }
        return isinstance(value, types[self.what]) and (self.what == "flag") == isinstance(value, bool)


Keys = tuple[str, ...]
"""Names of tables and of a key in the last of them: ("pairs", "check", "limit")."""
Commands = Mapping[Keys, Mapping[str, OptionKind]]
"""The options of every command by its path, like ("pairs", "check"), and their long names without the dashes."""


@dataclass(frozen=True)
class Entry:
    """A value of the file, and its keys there."""

    value: Any
    keys: Keys


def config_path() -> Path:
    """Path of the configuration file: STEERMOE_CONFIG, or config.toml in the platform's configuration folder."""
    if named := os.environ.get(ENVIRONMENT):
        return Path(os.path.expanduser(named))
    from platformdirs import user_config_dir

    return Path(user_config_dir("steermoe", appauthor=False)) / "config.toml"


def is_secret(name: str) -> bool:
    """Tell whether an option's value must not be shown."""
    return _SECRET.search(name) is not None


@dataclass(frozen=True)
class ConfigFile:
    """A configuration file as it was read; a file that is not there is an empty one."""

    path: Path
    text: str
    exists: bool
    data: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Read the file. Raises UsageError if it cannot be read or is no TOML, with the line."""
        if not path.exists():
            return cls(path, "", False, {})
        try:
            require_kind(path, "the configuration")
            text = read_bytes(path, "the configuration", MAX_TOML).decode("utf-8-sig")
        except FormatError as error:
            raise UsageError(str(error)) from error
        except UnicodeDecodeError as error:
            raise UsageError(f"{path}: byte {error.start} is not UTF-8; save the configuration as UTF-8") from None
        return cls(path, text, True, parse(text, path))

    def options(self, commands: Commands) -> dict[Keys, dict[str, Entry]]:
        """What the file says for each command. Raises UsageError for what no command knows, and for wrong types."""
        found: dict[Keys, dict[str, Entry]] = {path: {} for path in commands}
        self._read_table(self.data, (), commands, found)
        return {path: entries for path, entries in found.items() if entries}

    def line(self, keys: Keys) -> int | None:
        """The line number of a key, or of a table's header; None if it is not found."""
        return _line(self.text, keys)

    def where(self, keys: Keys) -> str:
        """The file and the line of a key, for messages."""
        line = self.line(keys)
        return f"{self.path}, line {line}" if line else str(self.path)

    def _refuse(self, keys: Keys, value: Any, commands: Commands) -> NoReturn:
        """Raise UsageError for a key that no command knows."""
        *at, key = keys
        if key.startswith("-"):
            self._fail(keys, f"{_name(keys)}: options stand without their dashes here; write {key.lstrip('-')}")
        elsewhere = sorted(".".join(path) for path, options in commands.items() if key in options)
        if elsewhere and at:
            self._fail(
                keys, f"{_name(keys)}: {_command(tuple(at))} has no --{key}; it belongs to {', '.join(elsewhere)}"
            )
        if elsewhere:
            self._fail(keys, f"{key}: means different things; put it into a table, like [{elsewhere[0]}]")
        below = [path for path in commands if path[: len(at)] == tuple(at)]
        if isinstance(value, dict):
            names = {path[len(at)] for path in below if len(path) > len(at)}
            self._fail(keys, f"[{'.'.join(keys)}]: no such command{_nearest(key, names)}")
        self._fail(keys, f"{_name(keys)}: no such option{_nearest(key, {n for path in below for n in commands[path]})}")

    def _read_table(self, table: Mapping[str, Any], at: Keys, commands: Commands, found: Any) -> None:
        below: list[tuple[str, Any]] = []
        for key, value in table.items():
            here = (*at, key)
            if isinstance(value, dict) and any(path[: len(here)] == here for path in commands):
                below.append((key, value))
                continue
            owners = owners_of(here, commands)
            if not owners:
                self._refuse(here, value, commands)
            for path in owners:
                kind = commands[path][key]
                if not kind.accepts(value):
                    shown = "a secret" if is_secret(key) else _shown(value)
                    self._fail(
                        here, f"{_name(here)} = {shown} is not {kind.words}, as --{key} of {_command(path)} needs"
                    )
                found[path].pop(key, None)  # the entry that overrides the others comes last
                found[path][key] = Entry(value, here)
        for key, value in below:  # after the keys: the table of a command overrides those above it
            self._read_table(value, (*at, key), commands, found)

    def _fail(self, keys: Keys, message: str) -> NoReturn:
        raise UsageError(f"{self.where(keys)}: {message}")


def owners_of(keys: Keys, commands: Commands) -> list[Keys]:
    """The commands that a key of the file holds for."""
    at, name = keys[:-1], keys[-1]
    return [
        path
        for path, options in commands.items()
        if path[: len(at)] == at and name in options and (options[name].shared or path == at)
    ]


def parse(text: str, path: Path) -> dict[str, Any]:
    """Parse TOML. Raises UsageError with the line."""
    try:
        return parse_toml(text)
    except TomlError as error:
        where = path if error.line is None else f"{path}, line {error.line}"
        raise UsageError(f"{where}: not TOML: {error}; a line is KEY = VALUE or [COMMAND]") from None


def parse_value(text: str, kind: OptionKind) -> Any:
    """The value of an option from its text on the command line. Raises ValueError if it cannot be one."""
    if kind.what == "text" and not kind.many:
        return text
    try:
        value: Any = parse_toml(f"value = {text}")["value"]
    except TomlError:
        value = text
    if kind.many and kind.accepts([value]):
        value = [value]
    if not kind.accepts(value):
        raise ValueError(f"{quoted(text)} is not {kind.words}")
    return value


#
# changing a file: tomlkit, which leaves comments and the rest of the text as they are
#


class EditError(ValueError):
    """The text is written in a way that is not changed here."""


def set_value(text: str, keys: Keys, value: Any) -> str:
    """The text with `keys` set to `value`. Raises EditError."""

    def change(document: Any, new_table: Callable[[bool], Any]) -> None:
        table = document
        for depth, name in enumerate(keys[:-1], 1):
            if name not in table:
                table[name] = new_table(depth < len(keys) - 1)
            table = table[name]
            if not isinstance(table, dict):
                raise EditError(f"{name} is a value, not a table")
        if isinstance(table.get(keys[-1]), dict):
            raise EditError(f"{keys[-1]} is a table, not a value")
        table[keys[-1]] = value

    import tomlkit

    return _edited(text, lambda data: change(data, lambda _: {}), lambda d: change(d, lambda s: tomlkit.table(s)))


def unset_value(text: str, keys: Keys) -> str:
    """The text without `keys`. Raises KeyError if they are not there, EditError."""

    def change(document: Any) -> None:
        table = document
        for name in keys[:-1]:
            table = table[name]
            if not isinstance(table, dict):
                raise KeyError(name)
        del table[keys[-1]]

    return _edited(text, change, change)


def format_value(value: Any) -> str:
    """A value as TOML."""
    import tomlkit

    if isinstance(value, dict):
        table = tomlkit.inline_table()
        table.update(value)
        return table.as_string()
    return str(tomlkit.item(value).as_string())


def _edited(text: str, change_data: Callable[[Any], None], change_document: Callable[[Any], None]) -> str:
    """The text after a change, checked against the changed data. Raises EditError, and what the changes raise."""
    import tomlkit

    wanted = tomllib.loads(text)
    change_data(wanted)
    try:
        document = tomlkit.parse(text if text.endswith("\n") else f"{text}\n" * bool(text))
        change_document(document)
        changed = tomlkit.dumps(document)
        same = tomllib.loads(changed) == wanted
    except EditError:
        raise
    except Exception as error:  # whatever tomlkit cannot do with an unusual text
        raise EditError(f"it is written in a way of its own ({type(error).__name__})") from error
    if not same:
        raise EditError("it is written in a way of its own")
    return changed


@functools.lru_cache(maxsize=256)
def _line(text: str, keys: Keys) -> int | None:
    """The line number of a key, or of a table's header: the line of a mark that is put there."""
    if len(text) > _MARKED:
        return None
    import tomlkit
    from tomlkit.items import AoT, InlineTable, Table

    mark = "steermoe-looks-for-this-line"
    try:
        document: Any = tomlkit.parse(text)
        table = functools.reduce(lambda found, name: found[name], keys[:-1], document)
        item = table[keys[-1]]
        while isinstance(item, Table) and item.is_super_table():  # it has no header of its own
            item = next(iter(item.values()))
        if isinstance(item, Table):
            item.trivia.comment = f"#{mark}"
        elif isinstance(item, InlineTable) or not isinstance(item, (dict, AoT)):
            table[keys[-1]] = mark
        before, found, _ = tomlkit.dumps(document).partition(mark)
    except Exception:  # a message without a line is better than none
        return None
    return before.count("\n") + 1 if found else None


#
# words
#


def _name(keys: Keys) -> str:
    return f"[{'.'.join(keys[:-1])}] {keys[-1]}" if len(keys) > 1 else keys[0]


def _command(path: Keys) -> str:
    return " ".join(("steermoe", *path))


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name.replace("_", "-").lower(), sorted(known), n=1, cutoff=0.5)
    return f"; is it {close[0]}?" if close else "; `steermoe config show COMMAND` lists what a command takes"


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, bool) else str(value).lower()
    return text if len(text) <= 40 else text[:37] + "..."
