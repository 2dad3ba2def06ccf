"""Results as plain JSON values, and read back."""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def plain(value: DataclassInstance, without: Collection[str] = ()) -> dict[str, Any]:
    """A dataclass as a dictionary, in the order of its fields, `without` some; all in it, too.

    Tuples become lists, paths the names of their files. A field's metadata may name another key as "json".
    """
    found = {field.metadata.get("json", field.name): getattr(value, field.name) for field in fields(value)}
    return {name: _plain(part) for name, part in found.items() if name not in without}


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value.name if isinstance(value, Path) else value


def from_plain(kind: Any, data: Any) -> Any:
    """The value of type `kind` of which `plain` made `data`; keys that the dataclass does not have are ignored."""
    arguments = typing.get_args(kind)
    if data is None or kind is Any:
        return data
    if isinstance(kind, types.UnionType):
        return from_plain(next(part for part in arguments if part is not types.NoneType), data)
    if is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        keys = {field.name: field.metadata.get("json", field.name) for field in fields(kind)}
        found = {name: from_plain(hints[name], data[key]) for name, key in keys.items() if key in data}
        return typing.cast(Any, kind)(**found)
    if isinstance(data, Mapping):
        return {name: from_plain(arguments[1], part) for name, part in data.items()}
    if isinstance(data, list):
        return tuple(from_plain(arguments[0], part) for part in data)
    return Path(data) if kind is Path else data
