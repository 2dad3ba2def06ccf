"""The scorers by name.

A scorer is a frozen dataclass whose fields are its options, so that type, default and meaning of an option are in one
place. To add one: write the class and name it in SCORERS. docs/tasks.md says for each which fields an item needs.
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
    """The scorer of that name. Raises UsageError for an unknown name or option, and for an impossible value."""
    kinds = _kinds(name)
    given = {key: _typed(name, key, value, _kind(name, kinds, key)) for key, value in (options or {}).items()}
    try:
        scorer: Scorer = SCORERS[name](**given)
    except UsageError as error:
        raise UsageError(f"scorer {name}: {error}") from None
    return scorer


def option_names(name: str) -> tuple[str, ...]:
    """The options of a scorer. Raises UsageError for an unknown name."""
    return tuple(_kinds(name))


def parse_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Options of a scorer from texts like "ignore_case=false" of a command line, each converted to its option's type.

    "prompt=@FILE" reads the text from a file. Raises UsageError, FormatError.
    """
    kinds = _kinds(name)
    found: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"scorer option {text!r}: write KEY=VALUE")
        if key in found:
            raise UsageError(f"scorer {name}: {key}: given twice")
        found[key] = _parsed(name, key, value, _kind(name, kinds, key))
    return found


def _kinds(name: str) -> dict[str, type]:
    if name not in SCORERS:
        raise UsageError(f"{name!r} is no scorer; take one of {', '.join(SCORERS)}")
    hints = get_type_hints(SCORERS[name])
    return {field.name: hints[field.name] for field in fields(SCORERS[name])}


def _kind(name: str, kinds: Mapping[str, type], key: str) -> type:
    if key not in kinds:
        has = f"it has {', '.join(kinds)}" if kinds else "it has none"
        raise UsageError(f"scorer {name}: {key!r} is no option; {has}")
    return kinds[key]


def _parsed(name: str, key: str, text: str, kind: type) -> Any:
    if kind is not str:
        try:
            return _typed(name, key, parse_json(text), kind)
        except ValueError:
            return _typed(name, key, text, kind)
    if key != "prompt" or not text.startswith("@"):
        return text
    try:
        return read_bytes(text[1:], "a judge's prompt", 1 << 20).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise FormatError(f"{text[1:]}: not UTF-8; save the file as UTF-8") from None


def _typed(name: str, key: str, value: Any, kind: type) -> Any:
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise UsageError(f"scorer {name}: {key}: {value!r} is not {_KINDS[kind]}")
    return value
