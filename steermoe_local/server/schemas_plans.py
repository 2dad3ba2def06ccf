"""The steering of a request: a name, a choice, or the rules of a plan, which steering/ reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    GetJsonSchemaHandler,
    PlainValidator,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from ..errors import UsageError
from ..maps.ranks import RANKS, WEIGHTS
from ..steering.plan_objects import WHERE, rules_from
from ..steering.plan_rules import (
    BY,
    EVERYWHERE,
    MAX_LAST,
    MAX_RULES,
    MAX_TEXT,
    MAX_TOKENS,
    NONE,
    PHASES,
    RuleSpec,
)
from ..steering.plan_text import MAX_RULE, split_rules
from ..steering.presets import PRESETS
from ..steering.rules import RULES
from .schemas_base import NAME_PATTERN

_SHOWN = 400  # characters of a message: the rest is what was sent


@dataclass(frozen=True)
class GivenPlan:
    """The rules of a request, read but not looked up: names are those of registered maps and biases, never paths."""

    rules: tuple[RuleSpec, ...]


def is_name(text: str) -> bool:
    """Whether a text can be a registered name; other texts are rules."""
    return re.fullmatch(NAME_PATTERN, text) is not None


def one_line(error: Exception) -> str:
    """The message of an error that quotes a request, in one line of a few hundred characters."""
    text = str(error)
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}...{text[-_SHOWN // 2 :]}"
    return "".join(c if c.isprintable() else "?" for c in shown)


def _read(value: object) -> GivenPlan:
    if isinstance(value, GivenPlan):
        return value
    try:
        return GivenPlan(tuple(rules_from(value)))
    except UsageError as error:
        raise ValueError(one_line(error).removeprefix("rules: ")) from None


def _read_steering(value: Any, otherwise: ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, GivenPlan | list):
        return _read(value)
    if isinstance(value, str) and not is_name(value):
        rules = split_rules(value) if len(value) <= MAX_RULE else []
        return _read(rules or [value])
    if isinstance(value, dict) and "rules" in value:
        if odd := next((name for name in value if name != "rules"), None):
            raise ValidationError.from_exception_data(
                "GivenPlan", [{"type": "extra_forbidden", "loc": (odd,), "input": None}]
            )
        return _read(value["rules"])
    if isinstance(value, dict) and (odd := next((name for name in WHERE if name in value), None)):
        raise ValueError(f'{odd} is of a rule, which stands in a list, [{{...}}], or in {{"rules": [{{...}}]}}')
    if isinstance(value, bool | int | float):
        raise ValueError(
            'give a name, a choice like {"map": NAME, "activate": 8}, a rule as text, a list of rules, '
            '{"rules": [...]}, or null for no steering'
        )
    return otherwise(value)


#
# the JSON Schema
#


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


def _object(fields: dict[str, Any], required: list[str], description: str) -> dict[str, Any]:
    properties = {name: _or_null(schema) for name, schema in fields.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False} | {
        "description": description
    }


def _words(*words: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(words)}


def _whole(least: int, most: int) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": most}


def rule_schema() -> dict[str, Any]:
    """The JSON Schema of a rule: a text, or an object with the fields of steering/plan_objects.py."""
    name = {"type": "string", "pattern": NAME_PATTERN}
    token = _whole(0, MAX_TOKENS - 1)
    mark = {"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_TEXT}, token]}
    place = {"type": "integer", "minimum": -MAX_TOKENS, "maximum": MAX_TOKENS}
    window = {"type": "array", "prefixItems": [place, _or_null(place)], "minItems": 2, "maxItems": 2}
    condition = {
        "measure": _words("routing", "entropy", "margin"),
        "map": name,
        "by": _words(*BY),
        "below": {"type": "number"},
        "above": {"type": "number"},
        "over": {"anyOf": [_words("prompt"), _whole(1, MAX_LAST)]},
    }
    fields = {
        "phase": _words(*PHASES, EVERYWHERE),
        "tokens": window | {"description": "[from, to) of the phase's tokens."},
        "after": mark,
        "until": mark,
        "every": _whole(1, MAX_TOKENS),
        "when": _object(condition, [], "What must hold; one of below and above."),
        "map": name | {"description": f"A registered map or bias; null or {NONE}: nothing steers there. Never a path."},
        "activate": _whole(0, 1_000_000),
        "deactivate": _whole(0, 1_000_000),
        "reverse": {"type": "boolean"},
        "layers": {"type": "string", "maxLength": 200},
        "preset": _words(*PRESETS),
        "rank": _words(*RANKS),
        "mode": _words(*RULES),
        "scale": {"type": "number", "minimum": 0, "maximum": 1000},
        "weights": _words(*WEIGHTS, NONE),
        "cap": {"anyOf": [{"type": "number", "exclusiveMinimum": 0, "maximum": 1000}, _words("inf")]},
    }
    return {"anyOf": [_text_schema(), _object(fields, ["map"], "A rule of a plan as an object.")]}


def _text_schema() -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": MAX_RULE, "description": "A rule, like answer: formal +8 -8"}


def _rules_schema() -> dict[str, Any]:
    return {"type": "array", "items": rule_schema(), "minItems": 1, "maxItems": MAX_RULES}


class _AndPlans:
    """Adds the forms of a plan to the JSON Schema of the field `steering`."""

    @staticmethod
    def __get_pydantic_json_schema__(core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core_schema)
        rules = {"type": "object", "properties": {"rules": _rules_schema()}, "required": ["rules"]}
        schema["anyOf"] += [_text_schema(), rules | {"additionalProperties": False}, _rules_schema()]
        return schema


class _Rules:
    """The JSON Schema of the field `rules`."""

    @staticmethod
    def __get_pydantic_json_schema__(core_schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return _rules_schema()


OrPlan = (WrapValidator(_read_steering), _AndPlans())
"""What makes the annotation of a field take a plan besides."""
Rules = Annotated[GivenPlan, PlainValidator(_read), _Rules()]
"""The annotation of a field with the rules of a plan."""
