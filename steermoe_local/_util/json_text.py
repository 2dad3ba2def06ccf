"""Parsing of JSON from strangers: strict or as data sets write it, in linear time, within limits."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

_LONG = 60  # characters of a text in messages
_FINITE_DIGITS = 308  # every whole number of so many digits is finite as a float
# A text, to its end or to that of the document. Possessive: without an end there is nothing to go back to.
_TEXT = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class JsonLimits:
    """What a document may hold.

    `values` and `containers` (arrays and objects) are of the whole document, `keys` of one object, `key` are the
    characters of one key, `depth` levels of containers in containers, `digits` the characters of one number.
    """

    values: int = 2_000_000
    containers: int = 1_000_000
    keys: int = 100_000
    key: int = 1000
    depth: int = 64
    digits: int = 1000


FILE_LIMITS = JsonLimits()
"""Of files: a map of 100 layers with 512 experts has 52,000 values."""

BODY_LIMITS = JsonLimits(values=1_000_000, containers=100_000, keys=10_000)
"""Of bodies of requests: a prompt of tokens, or a large map, has some hundred thousand values."""


def parse_json(text: str, limits: JsonLimits = FILE_LIMITS, *, strict: bool = True) -> Any:
    """Parse a JSON document in time and memory linear in its size.

    `strict` refuses what `json.loads` lets pass: NaN and Infinity, numbers beyond a float, a key twice in an object,
    half of a surrogate pair. Raises ValueError, whose text is short; the caller adds the file and line.
    """
    n_containers = _check_counts(text, limits)
    try:
        value = json.loads(
            text,
            object_pairs_hook=_StrictObjects(limits) if strict else None,
            parse_constant=_no_constant if strict else None,
            # functions of Python: between two calls other threads get their turn
            parse_int=lambda digits: _whole(digits, limits),
            parse_float=lambda digits: _fraction(digits, limits, strict),
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {limits.depth} levels") from None
    # "\ud800" alone is legal JSON and yields a str that no UTF-8 file can hold
    pairs = strict and (_HALF_PAIR.search(text) is not None or not _is_utf8(text))
    if pairs or n_containers > limits.depth:
        _check_tree(value, limits.depth, pairs)
    return value


def quoted(text: str, most: int = _LONG) -> str:
    """The repr of a text for messages, cut at `most` characters."""
    return repr(text) if len(text) <= most else f"{text[:most]!r}..."


def _check_counts(text: str, limits: JsonLimits) -> int:
    """Raise ValueError before anything is built for too many values; returns an upper bound on the containers."""
    # each value but the first stands behind one of these; inside of texts they are only looked for if there are many
    n_containers = text.count("[") + text.count("{")
    if n_containers + text.count(",") < limits.values and n_containers <= limits.containers:
        return n_containers
    n_values, n_containers = 1, 0
    for n_texts, (start, stop) in enumerate(_outside_texts(text)):
        opened = text.count("[", start, stop) + text.count("{", start, stop)
        n_containers += opened
        n_values += opened + text.count(",", start, stop)
        # two texts for a value: its key, and itself
        if n_values > limits.values or n_texts > 2 * limits.values:
            raise ValueError(f"more than {limits.values} values")
        if n_containers > limits.containers:
            raise ValueError(f"more than {limits.containers} arrays and objects")
    return n_containers


def _outside_texts(text: str) -> Iterable[tuple[int, int]]:
    """[start, stop) of what is not inside of quotes."""
    start = 0
    for found in _TEXT.finditer(text):
        yield start, found.start()
        start = found.end()
    yield start, len(text)


class _StrictObjects:
    """Makes a dictionary of the pairs of an object. Raises ValueError for a key that stands twice or is too long."""

    def __init__(self, limits: JsonLimits) -> None:
        self._limits = limits

    def __call__(self, items: list[tuple[str, Any]]) -> dict[str, Any]:
        limits = self._limits
        if len(items) > limits.keys:
            raise ValueError(f"an object in it has more than {limits.keys} keys")
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            for key, _ in items:
                if key in seen:
                    raise ValueError(f"the key {quoted(key)} stands twice in one object")
                seen.add(key)
        if result and len(longest := max(result, key=len)) > limits.key:
            raise ValueError(f"a key of {len(longest)} characters ({quoted(longest)})")
        return result


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _whole(digits: str, limits: JsonLimits) -> int:
    _check_digits(digits, limits)
    value = int(digits)
    if len(digits) > _FINITE_DIGITS:
        try:
            float(value)
        except OverflowError:
            raise ValueError(f"the number {digits[:_LONG]}... is too large") from None
    return value


def _fraction(digits: str, limits: JsonLimits, strict: bool) -> float:
    _check_digits(digits, limits)
    value = float(digits)
    if strict and math.isinf(value):
        raise ValueError(f"the number {digits[:_LONG]} is too large")
    return value


def _check_digits(digits: str, limits: JsonLimits) -> None:
    if len(digits) > limits.digits:
        raise ValueError(f"a number of {len(digits)} characters; at most {limits.digits} are read")


def _is_utf8(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _check_tree(value: Any, depth: int, pairs: bool) -> None:
    """Raise ValueError for containers nested too deeply and, with `pairs`, for half of a surrogate pair."""
    level = [value]
    for n in range(depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, (dict, list)):
                if n == depth:
                    raise ValueError(f"nested deeper than {depth} levels")
                inner.extend(item.values() if isinstance(item, dict) else item)
                if pairs and isinstance(item, dict):
                    inner.extend(item)
            elif pairs and isinstance(item, str) and not _is_utf8(item):
                raise ValueError("half of a surrogate pair (\\ud800 to \\udfff) stands alone")
        level = inner
