"""Messages in the form that a chat template takes them: found out by rendering short conversations, as in llama.cpp.

A template says nowhere whether it wants content as a text or as parts, arguments of calls as a text or as an object, or
ids of nine characters. What it renders of a probe does. The source of the rules is llama.cpp's common/jinja/caps.cpp.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .._util.json_text import BODY_LIMITS, parse_json

Messages = list[dict[str, Any]]

# Words that no template has in its own text.
_TEXT, _NAME, _ARGUMENT, _VALUE = "Zqtext", "zqname", "zqargument", "Zqvalue"
_LONG_ID, _SHORT_ID = "call_zq0000000000000000001", "zqcall001"
_ID_CHARACTERS = string.digits + string.ascii_letters


@dataclass(frozen=True)
class CallForm:
    """How a template takes calls of tools: arguments as a text, the empty content of the message, ids of nine."""

    text_arguments: bool = False
    empty: str | None = ""
    short_ids: bool = False

    @property
    def probe_id(self) -> str:
        """An id of a probe's call."""
        return _SHORT_ID if self.short_ids else _LONG_ID


class MessageForms:
    """What a template takes; `render` gives the text of messages and tools, or raises whatever the template does."""

    def __init__(self, render: Callable[[Messages, list[dict[str, Any]] | None], str]) -> None:
        self._render = render
        self._takes: dict[tuple[str, bool], bool] = {}

    @functools.cached_property
    def refuses_system(self) -> bool:
        """Does the template raise an error for a system message, and render the user's text without it?"""
        for parts in (False, True):
            if self.takes("user", parts=parts):
                content = [_part(_TEXT)] if parts else _TEXT
                return self._rendered([_message("system", content), _message("user", content)]) is None
        return False

    def takes(self, role: str, *, parts: bool) -> bool:
        """Does content of this role, as a text or as parts, come into the rendering?"""
        if (role, parts) not in self._takes:
            content = [_part(_TEXT)] if parts else _TEXT
            rendered = self._rendered(self._probe(_message(role, content)))
            # parts that a template prints as Python or JSON has them are not taken
            self._takes[role, parts] = rendered is not None and _TEXT in rendered and f": '{_TEXT}'" not in rendered
            if parts and rendered is not None and f'"text": "{_TEXT}"' in rendered:
                self._takes[role, parts] = False
        return self._takes[role, parts]

    def _probe(self, message: dict[str, Any]) -> Messages:
        user = _message("user", "x")
        if message["role"] == "user":
            return [message]
        if message["role"] == "assistant":
            return [user, message, user]
        if message["role"] == "tool":
            return [user, _calling(self.calls), _result(self.calls, message["content"])]
        return [message, user]

    @functools.cached_property
    def calls(self) -> CallForm:
        """How the template takes calls of tools; the usual way, if it renders none."""
        forms = [
            CallForm(text, empty, short) for short in (False, True) for empty in ("", None) for text in (False, True)
        ]
        return next((form for form in forms if self._renders_calls(form)), CallForm())

    @functools.cached_property
    def reasoning_field(self) -> str | None:
        """Field of a message in which the template reads its reasoning, if it is not `reasoning_content`.

        It is looked for in a message that calls a tool: of others many templates leave it out.
        """
        form = self.calls
        for name in ("reasoning_content", "thinking", "reasoning"):
            thought = _calling(form) | {name: _TEXT}
            rendered = self._rendered([_message("user", "x"), thought, _result(form, "x")])
            if rendered is not None and _TEXT in rendered:
                return None if name == "reasoning_content" else name
        return None

    def _renders_calls(self, form: CallForm) -> bool:
        tool = {"type": "function", "function": {"name": "zqother", "description": "x", "parameters": _PARAMETERS}}
        rendered = self._rendered([_message("user", "x"), _calling(form), _result(form, "x")], [tool])
        if rendered is None or not all(word in rendered for word in (_NAME, _ARGUMENT, _VALUE)):
            return False
        # an object printed as Python has it, a text escaped into another one
        return str({_ARGUMENT: _VALUE}) not in rendered and f'\\"{_ARGUMENT}' not in rendered

    def _rendered(self, messages: Messages, tools: list[dict[str, Any]] | None = None) -> str | None:
        try:
            return self._render(copy.deepcopy(messages), tools)
        except Exception:  # a template is foreign code and may raise anything
            return None

    def fitted(self, messages: Sequence[Mapping[str, Any]], *, other_arguments: bool = False) -> Messages:
        """A copy of the messages in the template's form; with `other_arguments` those of calls in the other one."""
        fitted = [copy.deepcopy(dict(message)) for message in messages]
        has_calls = any(message.get("tool_calls") for message in fitted)
        form = self.calls if has_calls else CallForm()
        as_text = form.text_arguments != other_arguments
        for message in fitted:
            for call in message.get("tool_calls") or ():
                function = call.get("function") if isinstance(call, dict) else None
                if isinstance(function, dict) and "arguments" in function:
                    function["arguments"] = _arguments(function["arguments"], as_text)
            if message.get("content") is None:
                message["content"] = form.empty if message.get("tool_calls") else ""
            else:
                message["content"] = self._content(str(message.get("role", "")), message["content"])
        if form.short_ids:
            _shorten_ids(fitted)
        return fitted

    def _content(self, role: str, content: Any) -> Any:
        if isinstance(content, list):
            text_parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            texts = [text for text in text_parts if isinstance(text, str)]
            if len(texts) == len(content) and not self.takes(role, parts=True):
                return "\n".join(texts)
        elif isinstance(content, str) and not self.takes(role, parts=False) and self.takes(role, parts=True):
            return [_part(content)]
        return content


def merged_system(messages: Sequence[Mapping[str, Any]]) -> Messages | None:
    """The messages with every system message in front of the user's next one, as llama.cpp does it.

    None when there is no system message, or no user's message behind one.
    """
    merged: Messages = []
    waiting: list[Any] = []
    for message in messages:
        if message.get("role") == "system":
            waiting.append(message.get("content"))
        elif message.get("role") == "user" and waiting:
            merged.append({**message, "content": _joined([*waiting, message.get("content")])})
            waiting = []
        else:
            merged.append(dict(message))
    return None if waiting or len(merged) == len(messages) else merged


def _joined(contents: list[Any]) -> Any:
    if all(content is None or isinstance(content, str) for content in contents):
        return "\n".join(content for content in contents if content is not None)
    parts: list[Any] = []
    for content in contents:
        parts += content if isinstance(content, list) else [_part(content or "")]
    return parts


def _message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def _part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


_PARAMETERS = {
    "type": "object",
    "properties": {"x": {"type": "string", "description": "x"}},
    "required": ["x"],
}


def _calling(form: CallForm) -> dict[str, Any]:
    function = {"name": _NAME, "arguments": _arguments({_ARGUMENT: _VALUE}, form.text_arguments)}
    call = {"id": form.probe_id, "type": "function", "function": function}
    return {"role": "assistant", "content": form.empty, "tool_calls": [call]}


def _result(form: CallForm, content: Any) -> dict[str, Any]:
    """What the tool that `_calling` calls gives."""
    return _message("tool", content) | {"tool_call_id": form.probe_id, "name": _NAME}


def _arguments(arguments: Any, as_text: bool) -> Any:
    """Arguments of a call as an object or as a text. No text at all means none; what is no object stays a text."""
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    if as_text:
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    if isinstance(arguments, str):
        try:
            value = parse_json(arguments, BODY_LIMITS, strict=False)
        except ValueError:
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments


def _shorten_ids(messages: Messages) -> None:
    """Give calls and results ids of nine letters and digits, the same to the same id; other ones stay.

    A result without an id gets that of the first call that has no result yet.
    """
    given = [call.get("id") for message in messages for call in message.get("tool_calls") or ()]
    taken = {identifier for identifier in given if _is_short(identifier)}
    names: dict[Any, str] = {}
    unanswered: list[str] = []

    def short(identifier: Any, salt: str) -> str:
        if _is_short(identifier):
            return str(identifier)
        key = identifier or salt
        while key not in names:
            digest = hashlib.sha256(f"{key} {salt}".encode("utf-8", "replace")).digest()
            made = "".join(_ID_CHARACTERS[byte % len(_ID_CHARACTERS)] for byte in digest[:9])
            if made not in taken:
                taken.add(made)
                names[key] = made
            salt += "+"
        return names[key]

    for index, message in enumerate(messages):
        for number, call in enumerate(message.get("tool_calls") or ()):
            call["id"] = short(call.get("id"), f"{index}.{number}")
            unanswered.append(call["id"])
        if message.get("role") == "tool":
            given_id = message.get("tool_call_id")
            fallback = unanswered[0] if unanswered else f"{index}"
            message["tool_call_id"] = short(given_id, "") if given_id else short(fallback, fallback)
            if message["tool_call_id"] in unanswered:
                unanswered.remove(message["tool_call_id"])


def _is_short(identifier: Any) -> bool:
    return isinstance(identifier, str) and len(identifier) == 9 and identifier.isascii() and identifier.isalnum()
