"""Changes one value of a TOML text and leaves every other byte as it is, comments included.

The result is parsed again and compared with what was meant, so that a text that is written in an unusual way is refused
rather than spoiled.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

__all__ = ["EditError", "set_value", "table_and_key", "unset_value"]

Keys = tuple[str, ...]

_BARE = r"[A-Za-z0-9_-]+"
_PART = rf"(?:{_BARE}|\"[^\"\\]*\"|'[^']*')"
_DOTTED = rf"{_PART}(?:[ \t]*\.[ \t]*{_PART})*"
_HEADER = re.compile(rf"[ \t]*\[[ \t]*({_DOTTED})[ \t]*\][ \t]*(?:#.*)?")
_KEY = re.compile(rf"[ \t]*({_DOTTED})[ \t]*=")


class EditError(ValueError):
    """The text is written in a way that is not changed here."""


def table_and_key(text: str) -> Iterator[tuple[int, Keys, Keys]]:
    """(line number from 1, table, key) of the lines that open a table (then the key is empty) or have a key.

    A line within a string of several lines may look like one; who needs to be sure parses the text.
    """
    table: Keys = ()
    for number, line in enumerate(text.split("\n"), 1):
        if match := _HEADER.fullmatch(line.rstrip("\r")):
            table = _keys(match[1])
            yield number, table, ()
        elif match := _KEY.match(line):
            yield number, table, _keys(match[1])


def set_value(text: str, keys: Keys, value: Any) -> str:
    """The text with `keys` set to `value`, in its table. Raises EditError."""
    wanted = copy.deepcopy(tomllib.loads(text))
    table = wanted
    for name in keys[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise EditError(f"{name} is a value, not a table")
    table[keys[-1]] = value
    lines = text.split("\n")
    places = list(table_and_key(text))
    written = format_value(value)
    at = next((number - 1 for number, where, key in places if where + key == keys and key), None)
    if at is not None:
        start, comment = _split_comment(lines[at])
        lines[at] = f"{start[: start.index('=')].rstrip()} = {written}{comment}"
    else:
        new = f"{_written(keys[-1:])} = {written}"
        header = next((number for number, where, key in places if where == keys[:-1] and not key), None)
        if keys[:-1] and header is None:
            body = "\n".join(lines).rstrip("\n")
            lines = [*(f"{body}\n".split("\n") if body else []), f"[{_written(keys[:-1])}]", new, ""]
        else:
            first = header or 0
            following = (number - 1 for number, _, key in places if not key and number > first)
            end = next(following, len(lines))
            while end > first and not lines[end - 1].strip():
                end -= 1
            lines.insert(end, new)
            if not header and end + 1 < len(lines) and lines[end + 1].strip():
                lines.insert(end + 1, "")
    return _checked("\n".join(lines), wanted)


def unset_value(text: str, keys: Keys) -> str:
    """The text without `keys`. Raises KeyError if they are not there, EditError."""
    wanted = copy.deepcopy(tomllib.loads(text))
    table = wanted
    for name in keys[:-1]:
        table = table[name]
        if not isinstance(table, dict):
            raise KeyError(name)
    del table[keys[-1]]
    at = next((number - 1 for number, where, key in table_and_key(text) if where + key == keys and key), None)
    if at is None:
        raise EditError("it is not on a line of its own")
    lines = text.split("\n")
    del lines[at]
    return _checked("\n".join(lines), wanted)


def format_value(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written((key,))} = {format_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _checked(text: str, wanted: dict[str, Any]) -> str:
    """An empty table may stay where its last value went."""
    try:
        same = _without_empty(tomllib.loads(text)) == _without_empty(wanted)
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        raise EditError("it is written over several lines, or in a way of its own")
    if text and not text.endswith("\n"):
        text += "\n"
    return text


def _without_empty(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    kept = {key: _without_empty(value) for key, value in data.items()}
    return {key: value for key, value in kept.items() if value != {}}


def _split_comment(line: str) -> tuple[str, str]:
    """(key and value, comment with the blanks before it) of a line whose value ends on it."""
    for at in [*(i for i, character in enumerate(line) if character == "#"), len(line)]:
        try:
            tomllib.loads(line[:at])
        except tomllib.TOMLDecodeError:
            continue
        value = line[:at].rstrip()
        return value, line[len(value) :]
    raise EditError("it is written over several lines")


def _keys(dotted: str) -> Keys:
    return tuple(part.strip("\"'") for part in re.findall(_PART, dotted))


def _written(keys: Keys) -> str:
    return ".".join(key if re.fullmatch(_BARE, key) else json.dumps(key) for key in keys)
