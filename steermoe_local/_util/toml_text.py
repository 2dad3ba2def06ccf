"""Parsing of TOML in time and memory linear in its size, within limits."""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_TOML = 1 << 20  # characters
_MAX_PARTS = 64  # of a key: tomllib takes the square of them, in time and memory
_FLOAT_BITS = 1023  # every whole number of so many bits is finite as a float
_PART = r"""(?:[\w-]++|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?)"""
_KEY = re.compile(rf"{_PART}(?:[ \t]*+\.[ \t]*+{_PART})*+")
_POSITION = re.compile(r" \(at line (\d+), column \d+\)| \(at end of document\)")


class TomlError(ValueError):
    """A text that is no TOML, or more than is read; `line` counts from 1, None if it is not known."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def parse_toml(text: str) -> dict[str, Any]:
    """Parse a TOML document. Raises TomlError, whose text is short."""
    if len(text) > MAX_TOML:
        raise TomlError(f"larger than {MAX_TOML >> 10} KiB")
    if text.count(".") >= _MAX_PARTS:
        for key in _KEY.finditer(text):
            if key[0].count(".") >= _MAX_PARTS and len(re.findall(_PART, key[0])) > _MAX_PARTS:
                line = text.count("\n", 0, key.start()) + 1
                raise TomlError(f"a key of more than {_MAX_PARTS} parts between dots", line)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        position = _POSITION.search(str(error))
        line = int(position[1]) if position and position[1] else text.count("\n") + 1
        raise TomlError(_POSITION.sub("", str(error)).rstrip(".")[:200], line) from None
    except RecursionError:
        raise TomlError("nested too deeply") from None
    except ValueError as error:  # a number that Python does not convert, because it takes the square of its digits
        raise TomlError(str(error).partition(";")[0][:200]) from None
    _check_numbers(table)
    return table


def _check_numbers(table: dict[str, Any]) -> None:
    """Raise TomlError for a whole number beyond a float: hexadecimal ones may have any length."""
    pending: list[Any] = [table]
    while pending:
        value = pending.pop()
        if isinstance(value, (dict, list)):
            pending.extend(value.values() if isinstance(value, dict) else value)
        elif isinstance(value, int) and value.bit_length() > _FLOAT_BITS:
            raise TomlError(f"a whole number of {value.bit_length()} bits")
