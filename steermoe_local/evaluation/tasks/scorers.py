"""Scorers by name: what makes an answer right, refused, in digits, ...

A scorer is a frozen dataclass whose fields are its options, so that an option has its type, its default and its meaning
in one place. docs/tasks.md says for each which fields an item needs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from ..._util.files import parse_json, read_bytes
from ...errors import FormatError, UsageError
from .choices import MultipleChoice
from .forms import DigitsOrWords, Refusal, Sides
from .judge import Judge
from .matching import Contains, Exact, Regex
from .tasks import Scorer

__all__ = ["SCORERS", "make_scorer", "option_names", "parse_options"]

SCORERS: dict[str, type[Any]] = {
    "exact": Exact,
    "contains": Contains,
    "regex": Regex,
    "choice": MultipleChoice,
    "digits-or-words": DigitsOrWords,
    "sides": Sides,
    "refusal": Refusal,
    "judge": Judge,
}
_KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def make_scorer(name: str, options: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer of that name. Raises UsageError for a name, an option or a value that there is not."""
    kinds = _kinds(name)
    given = dict(options or {})
    for key, value in given.items():
        kind = _kind(name, kinds, key)
        if kind is float and type(value) is int:
            given[key] = float(value)
        elif type(value) is not kind:
            raise UsageError(f"scorer {name}: {key}: {value!r} is not {_KINDS[kind]}")
    try:
        scorer: Scorer = SCORERS[name](**given)
    except UsageError as error:
        raise UsageError(f"scorer {name}: {error}") from None
    return scorer


def option_names(name: str) -> tuple[str, ...]:
    """The options of a scorer. Raises UsageError for a name that there is not."""
    return tuple(_kinds(name))


def parse_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Options of a scorer from texts like "ignore_case=false", as a command line has them; each by its option's type.

    "prompt=@FILE" is the text of a file. Raises UsageError, FormatError.
    """
    kinds = _kinds(name)
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"scorer option {text!r}: write KEY=VALUE")
        if key in found:
            raise UsageError(f"scorer {name}: {key}: given twice")
        found[key] = _value(name, key, value, _kind(name, kinds, key))
    return found


def _kinds(name: str) -> dict[str, type]:
    """Type of each option."""
    if name not in SCORERS:
        raise UsageError(f"{name!r} is no scorer; take one of {', '.join(SCORERS)}")
    hints = get_type_hints(SCORERS[name])
    return {field.name: hints[field.name] for field in fields(SCORERS[name])}


def _kind(name: str, kinds: Mapping[str, type], key: str) -> type:
    if key not in kinds:
        has = f"it has {', '.join(kinds)}" if kinds else "it has none"
        raise UsageError(f"scorer {name}: {key!r} is no option; {has}")
    return kinds[key]


def _value(name: str, key: str, text: str, kind: type) -> Any:
    if kind is str:
        if key != "prompt" or not text.startswith("@"):
            return text
        try:
            return read_bytes(text[1:], "a judge's prompt", 1 << 20).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise FormatError(f"{text[1:]}: not UTF-8; save the file as UTF-8") from None
    try:
        value = parse_json(text)
    except ValueError:
        value = text
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"scorer {name}: {key}: {text!r} is not {_KINDS[kind]}")
    return value
