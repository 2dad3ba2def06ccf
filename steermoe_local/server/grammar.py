"""Response formats and forced tool calls as grammars, by llama-cpp-python's converter from JSON Schema."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from .api_errors import ApiError
from .schemas_chat import ChatRequest, ResponseFormat, Tool, ToolChoice

_MAX_SCHEMA = 64 * 1024  # characters of JSON
_MAX_DEPTH = 24
_MAX_GRAMMAR = 512 * 1024
# The converter writes repetitions out, nested ones of a regular expression as their product.
_MAX_PATTERN = 200
_MAX_REPEATS = 1000
_MAX_ALL_REPEATS = 4000
_REPEATS = ("minItems", "maxItems", "minLength", "maxLength")
_PATTERN_TOKEN = re.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\{(?P<least>\d*)(?:,(?P<most>\d*))?\}|.", re.DOTALL)


class ForcedCall:
    """A tool call that the answer must be: of one function (`name`), or of any of several (`name` None)."""

    def __init__(self, tools: list[Tool]) -> None:
        self._tools = tools
        self.name = tools[0].function.name if len(tools) == 1 else None

    @property
    def grammar(self) -> str:
        """The grammar of the arguments, or of {"name", "arguments"} if the model chooses. Raises ApiError."""
        if self.name is not None:
            return grammar_of_schema(self._parameters(self._tools[0]), "tools")
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": self._parameters(tool)},
                "required": ["name", "arguments"],
            }
            for tool in self._tools
        ]
        return grammar_of_schema({"anyOf": calls}, "tools")

    @staticmethod
    def _parameters(tool: Tool) -> dict[str, Any]:
        return tool.function.parameters or {"type": "object"}


def forced_call(request: ChatRequest) -> ForcedCall | None:
    """The tool call that a request's tool_choice forces, if any."""
    tools = request.tools or []
    if isinstance(request.tool_choice, ToolChoice):
        name = request.tool_choice.function.name
        return ForcedCall([next(tool for tool in tools if tool.function.name == name)])
    return ForcedCall(tools) if request.tool_choice == "required" else None


def grammar_of_format(format_: ResponseFormat | None) -> str | None:
    """The grammar of a response_format, None for plain text. Raises ApiError."""
    if format_ is None or format_.type == "text":
        return None
    if format_.json_schema is not None:
        return grammar_of_schema(format_.json_schema.schema_, "response_format.json_schema.schema")
    if format_.schema_ is not None:
        return grammar_of_schema(format_.schema_, "response_format.schema")
    from llama_cpp.llama_grammar import JSON_GBNF

    return str(JSON_GBNF)


def grammar_of_schema(schema: dict[str, Any], where: str) -> str:
    """Convert a JSON Schema to GBNF. Raises ApiError for one that is too large, or that the converter refuses."""
    if _repeats(schema, where, 0) > _MAX_ALL_REPEATS:
        raise _refused(where, f"more than {_MAX_ALL_REPEATS} repetitions in all")
    text = json.dumps(schema)
    if len(text) > _MAX_SCHEMA:
        raise _refused(where, f"larger than {_MAX_SCHEMA >> 10} KiB")
    return _convert(text, where)


@lru_cache(maxsize=64)
def _convert(text: str, where: str) -> str:
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        grammar = json_schema_to_gbnf(text)
    except RecursionError:
        raise _refused(where, "it refers to itself too deeply") from None
    except Exception as error:  # the converter asserts, and stumbles over what is no schema
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise _refused(where, reason) from None
    if len(grammar) > _MAX_GRAMMAR:
        raise _refused(where, "its grammar is too large")
    return str(grammar)


def _repeats(value: Any, where: str, depth: int) -> int:
    """The sum of a schema's repetitions. Raises ApiError for a schema whose grammar would be large or slow."""
    if depth > _MAX_DEPTH:
        raise _refused(where, f"nested deeper than {_MAX_DEPTH} levels")
    total = 0
    if isinstance(value, dict):
        for name in _REPEATS:
            number = value.get(name)
            if isinstance(number, int | float):
                if not 0 <= number <= _MAX_REPEATS:
                    raise _refused(where, f"{name}: {number} is not from 0 to {_MAX_REPEATS}")
                total += int(number)
        if isinstance(pattern := value.get("pattern"), str):
            total += _repeats_of_pattern(pattern, where)
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return total + sum(_repeats(item, where, depth + 1) for item in inner)


def _repeats_of_pattern(pattern: str, where: str) -> int:
    """The number of items of a regular expression with its repetitions written out.

    Raises ApiError for too many, and for up to n repetitions of something of varying length, like (a{0,9}){0,9}: a text
    divides into them in many ways, and following all of them takes llama.cpp minutes per token.
    """
    if len(pattern) > _MAX_PATTERN:
        raise _refused(where, f"pattern: longer than {_MAX_PATTERN} characters")
    groups: list[list[tuple[int, bool]]] = [[]]  # (size, varies) of the items of each open group
    for token in _PATTERN_TOKEN.finditer(pattern):
        text = token[0]
        if text == "(":
            groups.append([])
        elif text == ")" and len(groups) > 1:
            items = groups.pop()
            groups[-1].append((sum(size for size, _ in items), any(varies for _, varies in items)))
        elif text in ("*", "+", "?") or token["least"] is not None:
            size, varies = groups[-1].pop() if groups[-1] else (1, False)
            if token["least"] is not None:
                least = int(token["least"] or 0)
                most = least if token["most"] is None else int(token["most"] or least)
                if most > 1 and varies:
                    raise _refused(where, f"pattern: {text} repeats what varies in length itself")
                size, varies = size * max(least, most, 1), least != most or token["most"] == ""
                if size > _MAX_REPEATS:
                    raise _refused(where, f"pattern: {text} makes more than {_MAX_REPEATS} repetitions")
            groups[-1].append((size, varies or text in ("*", "+", "?")))
        else:
            groups[-1].append((1, False))
    return sum(size for items in groups for size, _ in items)


def _refused(where: str, reason: str) -> ApiError:
    return ApiError(400, f"{where}: cannot be made a grammar: {reason}", param=where, code="invalid_schema")
