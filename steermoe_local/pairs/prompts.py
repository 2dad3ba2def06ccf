"""Prompt files, for answering many prompts: JSON Lines or plain lines of text.

JSON Lines, one object a line:

    {"id": "q1", "prompt": "Count to three.", "system": "Be brief."}
    {"id": "q2", "messages": [{"role": "user", "content": "Count to three."}]}

`id` (a text or a whole number, once in the file; by default "line-N", N counted from 1) and `system` are optional.
Other fields are copied into the answer, so that a reference answer stays with its question. In a plain text file every
line that is not blank is a prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .._util.files import StrPath, parse_json
from .._util.records import lines
from ..errors import FormatError
from .pairs import Message, Side, parse_messages

_MAX_LINE = 64 << 20
_FIELDS = ("id", "prompt", "messages", "system")
_ONE = 'write {"prompt": "..."} or {"messages": [...]}'


@dataclass(frozen=True)
class PromptItem:
    """One prompt: `content` is the user's text or a whole conversation, `line` its line in the file, from 1.

    `extra` has the fields that are not known here. Raises FormatError for an empty prompt or two system messages.
    """

    id: str | int
    content: Side
    system: str = ""
    line: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.content:
            raise FormatError("messages: empty" if isinstance(self.content, tuple) else "prompt: empty")
        if self.system and isinstance(self.content, tuple) and self.content[0].role == "system":
            raise FormatError("system: the messages begin with a system message already; leave one out")

    def messages(self, system: str = "") -> tuple[Message, ...]:
        """The conversation, begun by `system` unless the item has a system message of its own."""
        said = (Message("user", self.content),) if isinstance(self.content, str) else self.content
        system = self.system or ("" if said[0].role == "system" else system)
        return (Message("system", system), *said) if system else said


def load_prompts(path: StrPath) -> list[PromptItem]:
    """Read and check a whole file of prompts.

    A name that ends in .jsonl is JSON Lines, one in .txt is text; others are JSON Lines if they begin with "{".
    Raises FormatError, which names the file and the line.
    """
    kinds = {".jsonl": True, ".txt": False}
    try:
        with open(path, "rb") as file:
            return read_prompts(file, str(path), kinds.get(Path(path).suffix.lower()))
    except OSError as error:
        raise FormatError(f"{path}: cannot be read as prompts: {error.strerror or error}; check the path") from error


def read_prompts(file: BinaryIO, name: str, as_json: bool | None = None) -> list[PromptItem]:
    """The prompts of an open file, JSON Lines if `as_json` (None: if it begins with "{"). `name` starts the messages.

    Raises FormatError.
    """
    items: list[PromptItem] = []
    seen: dict[str, int] = {}
    for number, text in lines(file, name, _MAX_LINE, error=FormatError):
        if not text.strip():
            continue
        if as_json is None:
            as_json = text.lstrip().startswith("{")
        try:
            item = _item(text, number) if as_json else PromptItem(f"line-{number}", text.rstrip("\r\n"), line=number)
        except FormatError as error:
            raise FormatError(f"{name}:{number}: {error}") from None
        first = seen.setdefault(str(item.id), number)
        if first != number:
            raise FormatError(
                f"{name}:{number}: id: {item.id!r} is already the id of line {first}; give each prompt its own"
            )
        items.append(item)
    if not items:
        raise FormatError(f"{name}: no prompts in it; write one a line")
    return items


def prompts_digest(items: Iterable[PromptItem]) -> str:
    """SHA-256 (hex) over the prompts and their ids, in their order; the layout of the file does not count."""
    digest = hashlib.sha256()
    for item in items:
        content = item.content if isinstance(item.content, str) else [m.to_dict() for m in item.content]
        line = json.dumps([item.id, content, item.system, item.extra], ensure_ascii=False, sort_keys=True)
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def _item(text: str, number: int) -> PromptItem:
    try:
        data = parse_json(text)
        json.dumps(data, allow_nan=False)  # a number that is too large was read as infinity
    except ValueError as error:
        raise FormatError(f"not JSON ({error}); write one JSON object a line") from None
    if not isinstance(data, dict):
        raise FormatError(f"not a JSON object; {_ONE}")
    if ("prompt" in data) == ("messages" in data):
        raise FormatError(f"{'both' if 'prompt' in data else 'neither'} prompt and messages; {_ONE}")
    name = data.get("id", f"line-{number}")
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise FormatError(f"id: {name!r} is neither a text nor a whole number")
    system = data.get("system") or ""
    if not isinstance(system, str):
        raise FormatError("system: not a text")
    content = data.get("prompt")
    if "messages" in data:
        if not isinstance(data["messages"], list):
            raise FormatError('messages: not a list; write [{"role": "user", "content": "..."}]')
        content = parse_messages(data["messages"], "messages")
    elif not isinstance(content, str):
        raise FormatError("prompt: not a text")
    extra = {key: value for key, value in data.items() if key not in _FIELDS}
    return PromptItem(name, content, system, number, extra)
