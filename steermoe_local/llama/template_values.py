"""Values for chat templates on their way to the child process: JSON, and what JSON has no form of, tagged."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError

# The one key of an object that stands for another value: no text of a user begins so.
_TAG = "\0value"
_DATES = {kind.__name__: kind for kind in (datetime.datetime, datetime.date, datetime.time)}


def packed(value: Any) -> Any:
    """The value as JSON has it, which `unpacked` makes the same value of again.

    Raises UsageError for a value that cannot be given to another process, RecursionError for nesting without end.
    """
    kind = type(value)
    if value is None or kind in (str, int, float, bool):
        return value
    if kind is list:
        return [packed(item) for item in value]
    if isinstance(value, Mapping):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: packed(item) for key, item in value.items()}
        return {_TAG: ["dict", [[packed(key), packed(item)] for key, item in value.items()]]}
    if isinstance(value, (list, tuple, set, frozenset)):
        name = next(base.__name__ for base in (list, tuple, set, frozenset) if isinstance(value, base))
        items = [packed(item) for item in value]
        return items if name == "list" else {_TAG: [name, items]}
    for base in (str, int, float):  # their subclasses, such as members of enumerations
        if isinstance(value, base):
            return base.__str__(value) if base is str else base(value)
    for name, date in _DATES.items():
        if isinstance(value, date):
            return {_TAG: [name, value.isoformat()]}
    raise UsageError(
        f"variables of a chat template: {kind.__name__} is no text, number, date, list or object; give one of these"
    )


def unpacked(value: Any) -> Any:
    """The value of which `packed` made this."""
    if isinstance(value, list):
        return [unpacked(item) for item in value]
    if not isinstance(value, dict):
        return value
    if _TAG not in value:
        return {key: unpacked(item) for key, item in value.items()}
    name, content = value[_TAG]
    if name in _DATES:
        return _DATES[name].fromisoformat(content)
    if name == "dict":
        return {unpacked(key): unpacked(item) for key, item in content}
    return {"tuple": tuple, "set": set, "frozenset": frozenset}[name](map(unpacked, content))
