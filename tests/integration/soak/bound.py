"""Requests whose answers a grammar binds, or which offer tools, and what of their answers must not change."""

from __future__ import annotations

import json
from typing import Any

from tests.support.names_in_use import CHOICES, QUESTIONS

_SCHEMAS: dict[str, Any] = {
    "number": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
    },
    "word": {"type": "object", "properties": {"w": {"enum": ["four", "4", "ten", "10"]}}, "required": ["w"]},
}
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"enum": [1, 2, 3, 4]}, "b": {"enum": [6, 7]}},
            "required": ["a", "b"],
        },
    },
}


def _bound() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for number, choice in enumerate((None, CHOICES[0], CHOICES[1], CHOICES[4])):
        common: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "cache_prompt": number % 2 == 0}
        common |= {"steering": None if choice is None else choice.fields}
        common |= {"messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}]}
        for name, schema in _SCHEMAS.items():
            form = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
            found[f"{name} {number}"] = common | {"response_format": form}
        found[f"tool {number}"] = common | {"tools": [_TOOL], "tool_choice": "required"}
        found[f"tools {number}"] = common | {"tools": [_TOOL]}
    return found


BOUND = _bound()


def said(body: dict[str, Any]) -> str:
    """The answer's content and calls, without ids."""
    message = body["choices"][0]["message"]
    calls = [call["function"] for call in message.get("tool_calls") or ()]
    return json.dumps([message["content"], calls, body["choices"][0]["finish_reason"]])
