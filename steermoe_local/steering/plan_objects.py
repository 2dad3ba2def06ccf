"""The object form of the rules of a steering plan, as JSON and TOML have it.

    {"phase": "answer", "tokens": [0, 32], "every": 2, "map": "careful", "deactivate": 20}
    {"phase": "answer", "after": "Answer:", "map": "faithful", "deactivate": 50,
     "when": {"map": "faithful", "below": 0.1, "over": "prompt"}}
    {"phase": "thinking", "map": null}

`when` is {"map", "by", "over": "prompt" or a number of last tokens} or {"measure": "entropy" or "margin"}, with `below`
or `above`. A rule is also read in its text form (plan_text.py) wherever an object may stand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UsageError, prefixed
from .plan_rules import CHOICE, EVERYWHERE, MAX_RULES, NONE, Condition, RuleSpec, Where, is_of, shown
from .plan_text import parse_rule, require_short
from .rules import json_cap

_INTEGER, _REAL = (int,), (int, float)
WHERE: dict[str, tuple[type, ...]] = {
    "phase": (str,),
    "tokens": (list, tuple),
    "after": (str, int),
    "until": (str, int),
    "every": _INTEGER,
    "when": (Mapping,),
}
"""The fields that say where a rule is in force, with the types of the values."""
_CHOICE = CHOICE | {"cap": (*CHOICE["cap"], str)}  # "inf", as JSON has no infinity
_WHEN: dict[str, tuple[type, ...]] = {
    "measure": (str,),
    "map": (str,),
    "by": (str,),
    "below": _REAL,
    "above": _REAL,
    "over": (str, int),
}


def rules_from(data: object) -> list[RuleSpec]:
    """Read a list of rules, each an object, a text, or read already. Raises UsageError, which names the rule by its
    number.
    """
    if isinstance(data, str) or not isinstance(data, Sequence):
        raise UsageError("rules: give a list of rules, objects or texts")
    if not 1 <= len(data) <= MAX_RULES:
        raise UsageError(f"rules: a plan has 1 to {MAX_RULES} rules, not {len(data)}")
    return [rule if isinstance(rule, RuleSpec) else rule_from(rule, number) for number, rule in enumerate(data, 1)]


def rule_from(data: object, number: int | None = None) -> RuleSpec:
    """Read one rule, an object or a text. Raises UsageError, which names the rule by `number`."""
    if isinstance(data, str):
        return parse_rule(data, number)
    with prefixed("rule" if number is None else f"rule {number}"):
        if not isinstance(data, Mapping):
            raise UsageError("give an object, or a text like answer: formal +8 -8")
        return require_short(_rule(data))


def _rule(data: Mapping[str, Any]) -> RuleSpec:
    given = _checked(data, WHERE | _CHOICE | {"map": (str,)})
    if "map" not in data:
        raise UsageError("map: name the map or bias file that steers there, or give null for no steering")
    where: dict[str, Any] = {name: given.pop(name) for name in WHERE if name in given}
    if where.get("phase") == EVERYWHERE:
        del where["phase"]
    if "tokens" in where:
        where |= _window(where.pop("tokens"))
    if "when" in where:
        where["when"] = _condition(where["when"])
    name = given.pop("map", None)
    if given.get("cap") == "inf":
        given["cap"] = math.inf
    elif isinstance(given.get("cap"), str):
        raise UsageError('cap: give a number of logits, or "inf"')
    return RuleSpec(Where(**where), None if name == NONE else name, given)


def _window(tokens: Sequence[Any]) -> dict[str, Any]:
    if len(tokens) != 2 or type(tokens[0]) is not int or type(tokens[1]) not in (int, type(None)):
        raise UsageError("tokens: give [from, to], two whole numbers, or null for to")
    return {"start": tokens[0], "stop": tokens[1]}


def _condition(data: Mapping[str, Any]) -> Condition:
    given = _checked(data, _WHEN, "when.")
    over = given.pop("over", None)
    if over is not None and given.setdefault("measure", "routing") != "routing":
        raise UsageError(f"when.over: {shown(given['measure'])} is of the next token alone; leave it out")
    if type(over) is int:
        given["last"] = over
    elif over not in (None, "prompt"):
        raise UsageError('when.over: give "prompt", or how many last tokens of the reply')
    if over is None and given.setdefault("measure", "routing") == "routing":
        raise UsageError('when.over: is missing; give "prompt", or how many last tokens of the reply')
    return Condition(**given)


def _checked(data: Mapping[str, Any], types: Mapping[str, tuple[type, ...]], where: str = "") -> dict[str, Any]:
    """The fields that are not null. Raises UsageError for unknown ones and for wrong types."""
    for name, value in data.items():
        if name not in types:
            raise UsageError(f"{where}{shown(name)}: not a field of a rule; there are {', '.join(types)}")
        if value is not None and not is_of(value, types[name]):
            raise UsageError(f"{where}{name}: {shown(value)} is of the wrong type")
    return {name: value for name, value in data.items() if value is not None}


def rule_to_dict(rule: RuleSpec) -> dict[str, Any]:
    """The object form of a rule, without what is as if it was left out; `rule_from` reads it back."""
    where, when = rule.where, rule.where.when
    data: dict[str, Any] = {"phase": where.phase or EVERYWHERE}
    if where.start or where.stop is not None:
        data["tokens"] = [where.start, where.stop]
    data |= {name: getattr(where, name) for name in ("after", "until") if getattr(where, name) is not None}
    if where.every != 1:
        data["every"] = where.every
    if when is not None:
        data["when"] = _condition_dict(when)
    choice = {name: json_cap(value) if name == "cap" else value for name, value in rule.choice.items()}
    return data | {"map": rule.name} | choice


def _condition_dict(when: Condition) -> dict[str, Any]:
    limit = {"below": when.below} if when.above is None else {"above": when.above}
    if when.measure != "routing":
        return {"measure": when.measure, **limit}
    return {"map": when.map, "by": when.by, **limit, "over": "prompt" if when.last is None else when.last}
