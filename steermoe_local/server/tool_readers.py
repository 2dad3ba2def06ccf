"""Readers of tool calls in the text of a reply: JSON between markers, marked parameters, calls as in a program."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

Schemas = Mapping[str, Mapping[str, Any]]
"""The JSON Schema of each tool's parameters, by the tool's name."""


class Call(NamedTuple):
    """A call of a tool; `arguments` is a JSON object as text."""

    name: str
    arguments: str


class NotACall(Exception):
    """A text that looks like a call is none."""


Reader = Callable[[str, int, Schemas], tuple[list[Call], int]]
"""Gets a text and the position where calls begin; returns them and the position behind them. Raises NotACall,
ValueError, SyntaxError, RecursionError, MemoryError."""

_Value = Callable[[str, Mapping[str, Any], "str | None"], Any]


#
# JSON, between markers
#


def _call(name: Any, arguments: Any) -> Call:
    if isinstance(arguments, str) and arguments.strip():
        arguments = json.loads(arguments)  # some models write the object as a text
    arguments = {} if arguments in (None, "") else arguments
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise NotACall
    return Call(name, _text_of(arguments))


def _text_of(value: Any) -> str:
    """JSON as clients read it. Raises ValueError for what it has no form of, such as NaN."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _named(value: Any) -> Call:
    """{"name": ..., "arguments": ...}, with the keys that models use."""
    if not isinstance(value, dict):
        raise NotACall
    value = value.get("function") if isinstance(value.get("function"), dict) else value
    name = value.get("name", value.get("tool_name"))
    return _call(name, value.get("arguments", value.get("parameters", {})))


def keyed_call(value: Any) -> Call:
    """{name: arguments}."""
    if not isinstance(value, dict) or len(value) != 1:
        raise NotACall
    ((name, arguments),) = value.items()
    return _call(name, arguments)


def _matched(pattern: re.Pattern[str], text: str, position: int) -> re.Match[str]:
    """The pattern's match at a position. Raises NotACall."""
    found = pattern.match(text, position)
    if found is None:
        raise NotACall
    return found


def _read_json(
    head: re.Pattern[str],
    tail: re.Pattern[str],
    one: Callable[[Any], Call],
    text: str,
    position: int,
    schemas: Schemas,
) -> tuple[list[Call], int]:
    found = _matched(head, text, position)
    value, end = json.JSONDecoder(strict=False).raw_decode(text, found.end())
    name = found.groupdict().get("name")
    if name is not None:
        calls = [_call(name.strip(), value)]
    else:
        calls = [one(item) for item in value] if isinstance(value, list) else [one(value)]
    return calls, _matched(tail, text, end).end()


def json_calls(head: str, tail: str, one: Callable[[Any], Call] = _named) -> Reader:
    """Calls with JSON between what `head` and `tail` match; the group `name` in `head` is the tool's name, if any."""
    return partial(_read_json, re.compile(rf"\s*{head}\s*", re.DOTALL), re.compile(rf"\s*{tail}\s*"), one)


#
# a marker for each parameter
#


def _typed(text: str, schema: Mapping[str, Any], kind: str | None) -> Any:
    """The value of a parameter, by its marker (`kind`) or else by the tool's schema; what fits neither is a text."""
    if kind in ("true", "string") or (kind is None and schema.get("type") == "string"):
        return text
    for parse in (json.loads, ast.literal_eval):  # some templates print Python values
        try:
            value = parse(text.strip())
            _text_of(value)  # a set is no JSON
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        return value
    return text


def _read_marked(
    head: re.Pattern[str],
    parameter: re.Pattern[str],
    tail: re.Pattern[str],
    value: _Value,
    text: str,
    position: int,
    schemas: Schemas,
) -> tuple[list[Call], int]:
    found = _matched(head, text, position)
    name, end = found["name"].strip(), found.end()
    properties = schemas.get(name, {}).get("properties")
    arguments: dict[str, Any] = {}
    while (one := parameter.match(text, end)) is not None:
        schema = properties.get(one["key"]) if isinstance(properties, dict) else None
        kind = one.groupdict().get("kind")
        arguments[one["key"]] = value(one["value"], schema if isinstance(schema, dict) else {}, kind)
        end = one.end()
    return [_call(name, arguments)], _matched(tail, text, end).end()


def marked_calls(head: str, parameter: str, tail: str, value: _Value = _typed) -> Reader:
    """Calls whose parameters have markers: groups `name` in `head`; `key`, `value` and maybe `kind` in `parameter`."""
    before, one, behind = (
        re.compile(pattern, re.DOTALL) for pattern in (rf"\s*{head}\s*", rf"\s*{parameter}", rf"\s*{tail}\s*")
    )
    return partial(_read_marked, before, one, behind, value)


def read_cdata(text: str, schema: Mapping[str, Any], kind: str | None) -> Any:
    """The value of a parameter that may stand in <![CDATA[...]]>."""
    inner = re.fullmatch(r"<!\[CDATA\[(.*)\]\]>", text, re.DOTALL)
    return _typed(inner[1] if inner else text, schema, kind)


MINIMAX = "]<]minimax[>["
_ELEMENT = re.compile(rf"\s*{re.escape(MINIMAX)}<(?P<tag>[^<>/]+)>")


def read_elements(text: str, schema: Mapping[str, Any], kind: str | None) -> Any:
    """MiniMax-M3's values: elements in elements, <item> for those of a list."""
    if _ELEMENT.match(text) is None:
        return _typed(text, schema, kind)
    children: list[tuple[str, Any]] = []
    position = 0
    while (opened := _ELEMENT.match(text, position)) is not None:
        tag = opened["tag"]
        end, position = _closing(text, opened.end(), tag)
        of_child = schema.get("items") if tag == "item" else (schema.get("properties") or {}).get(tag)
        children.append(
            (tag, read_elements(text[opened.end() : end], of_child if isinstance(of_child, dict) else {}, None))
        )
    if text[position:].strip():
        raise NotACall
    return [value for _, value in children] if all(tag == "item" for tag, _ in children) else dict(children)


def _closing(text: str, position: int, tag: str) -> tuple[int, int]:
    """(where the element's closing tag begins, where it ends); elements of the same name may be inside."""
    depth = 1
    for found in re.finditer(rf"{re.escape(MINIMAX)}<(/?){re.escape(tag)}>", text[position:]):
        depth += -1 if found[1] else 1
        if depth == 0:
            return position + found.start(), position + found.end()
    raise NotACall


#
# calls as in a programming language
#

_PYTHON = re.compile(r"\s*<\|tool_call_start\|>(.*?)<\|tool_call_end\|>\s*", re.DOTALL)
_CONSTANTS = {"true": True, "false": False, "null": None, "none": None}


def read_python(text: str, position: int, schemas: Schemas) -> tuple[list[Call], int]:
    """[name(key=value, ...), ...], as LFM2 writes calls; JSON in its place is read too."""
    found = _matched(_PYTHON, text, position)
    inner = found[1].strip()
    if inner.startswith(("[{", "{")):
        value = json.loads(inner)
        return [_named(item) for item in (value if isinstance(value, list) else [value])], found.end()
    tree = ast.parse(inner, mode="eval").body
    return [_python_call(node) for node in (tree.elts if isinstance(tree, ast.List) else [tree])], found.end()


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or any(word.arg is None for word in node.keywords):
        raise NotACall
    return _call(ast.unparse(node.func), {str(word.arg): _python_value(word.value) for word in node.keywords})


def _python_value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in _CONSTANTS:
        return _CONSTANTS[node.id.lower()]
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {
            str(ast.literal_eval(key)): _python_value(value)
            for key, value in zip(node.keys, node.values, strict=True)
            if key is not None
        }
    return ast.literal_eval(node)


_GEMMA_HEAD = re.compile(r"\s*<\|tool_call>\s*call:(?P<name>[^\s{]+)\s*(?=\{)")
_GEMMA_TAIL = re.compile(r"\s*<tool_call\|>\s*")
_GEMMA_QUOTE = '<|"|>'
_GEMMA_KEY = re.compile(r"\s*([^\s:,{}\[\]]+)\s*:")
_GEMMA_WORD = re.compile(r"[^\s,{}\[\]]+")


def read_gemma(text: str, position: int, schemas: Schemas) -> tuple[list[Call], int]:
    """call:name{key:value, ...} with texts between <|"|>, as Gemma 4 writes calls."""
    head = _matched(_GEMMA_HEAD, text, position)
    arguments, end = _gemma_value(text, head.end())
    return [_call(head["name"], arguments)], _matched(_GEMMA_TAIL, text, end).end()


def _gemma_text(text: str, position: int) -> tuple[str, int]:
    start = position + len(_GEMMA_QUOTE)
    end = text.index(_GEMMA_QUOTE, start)
    return text[start:end], end + len(_GEMMA_QUOTE)


def _gemma_value(text: str, position: int) -> tuple[Any, int]:
    position = _behind_blanks(text, position)
    if text.startswith(_GEMMA_QUOTE, position):
        return _gemma_text(text, position)
    opening = text[position : position + 1]
    if opening and opening in "{[":
        closing = "}" if opening == "{" else "]"
        members: dict[str, Any] = {}
        items: list[Any] = []
        position = _behind_blanks(text, position + 1)
        while not text.startswith(closing, position):
            if opening == "{":
                key, position = _gemma_key(text, position)
                members[key], position = _gemma_value(text, position)
            else:
                item, position = _gemma_value(text, position)
                items.append(item)
            position = _behind_blanks(text, position)
            if text.startswith(",", position):
                position = _behind_blanks(text, position + 1)
            elif not text.startswith(closing, position):
                raise NotACall
        return (members if opening == "{" else items), position + 1
    word = _matched(_GEMMA_WORD, text, position)
    if word[0].lower() in _CONSTANTS:
        return _CONSTANTS[word[0].lower()], word.end()
    return json.loads(word[0]), word.end()


def _gemma_key(text: str, position: int) -> tuple[str, int]:
    if text.startswith(_GEMMA_QUOTE, position):
        key, position = _gemma_text(text, position)
        position = _behind_blanks(text, position)
        if not text.startswith(":", position):
            raise NotACall
        return key, position + 1
    found = _matched(_GEMMA_KEY, text, position)
    return found[1], found.end()


def _behind_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position
