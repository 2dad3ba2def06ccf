"""Prompt files, for answering many prompts: JSON Lines, a JSON array, CSV or plain lines of text.

JSON Lines, one object a line:

    {"id": "q1", "prompt": "Count to three.", "system": "Be brief."}
    {"id": "q2", "messages": [{"role": "user", "content": "Count to three."}]}

`id` (a text or a whole number, once in the file; by default "line-N", N counted from 1) and `system` are optional.
Other fields are copied into the answer, so that a reference answer stays with its question. A JSON array holds the same
objects, or texts. A CSV file has the columns `prompt` and, optionally, `id`, `system` and others. In a plain text file
every line that is not blank is a prompt.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .._util.file_kinds import PROMPTS, SAFETY, StrPath, refuse_pointer, require_kind
from .._util.files import parse_json
from .._util.records import csv_header, csv_table, lines
from .._util.regular_files import open_regular
from ..errors import FormatError, PairsError
from .pairs import Message, Side, parse_messages

_MAX_BYTES = 256 << 20
_MAX_PROMPTS = 1_000_000
_MAX_LINE = 64 << 20
_MAX_HEADER = 1 << 16  # bytes
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

    A name that ends in .jsonl is JSON Lines, one in .txt is text, one in .csv or .tsv is CSV; others by their content,
    as of `read_prompts`. Raises FormatError, which names the file and the line.
    """
    kinds = {".jsonl": True, ".txt": False}
    as_json = kinds.get(Path(path).suffix.lower())
    if as_json is not False:
        require_kind(path, "a file of prompts", PROMPTS, SAFETY)
    try:
        with open_regular(path, streams=True, fifos=True) as file:
            return read_prompts(file, str(path), as_json)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read as prompts: {error.strerror or error}; check the path") from error


def read_prompts(file: BinaryIO, name: str, as_json: bool | None = None) -> list[PromptItem]:
    """The prompts of an open file, JSON if `as_json`, lines of text if it is False. `name` starts the messages.

    With None, a name that ends in .csv or .tsv is CSV, what begins with "{" is JSON Lines, what is a JSON array is one,
    what has a header with `prompt` among several columns is CSV, and anything else is text. Raises FormatError.
    """
    items: list[PromptItem] = []
    seen: dict[str, int] = {}
    for number, default_id, content in _entries(file, name, as_json):
        try:
            if isinstance(content, str):
                item = PromptItem(default_id, content, line=number)
            else:
                item = _item(content, default_id, number)
        except FormatError as error:
            raise FormatError(f"{name}:{number}: {error}") from None
        first = seen.setdefault(str(item.id), number)
        if first != number:
            raise FormatError(
                f"{name}:{number}: id: {item.id!r} is already the id of line {first}; give each prompt its own"
            )
        items.append(item)
        if len(items) > _MAX_PROMPTS:
            raise FormatError(f"{name}: more than {_MAX_PROMPTS} prompts; split it")
    if not items:
        raise FormatError(f"{name}: no prompts in it; write one a line")
    return items


def _entries(file: BinaryIO, name: str, as_json: bool | None) -> Iterator[tuple[int, str, Any]]:
    """(line, id by default, text or JSON value) of every prompt. Of an array, "line" is the number of the entry."""
    data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise FormatError(f"{name}: larger than {_MAX_BYTES >> 20} MiB; split it")
    start = data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if start == b"[" and as_json is not False and (array := _array(data, name, as_json)) is not None:
        yield from ((number, f"row-{number}", entry) for number, entry in enumerate(array, 1))
        return
    named = as_json is None and Path(name).suffix.lower() in (".csv", ".tsv")
    if named or (as_json is None and start != b"{" and _has_prompt_column(data)):
        yield from _csv_entries(data, name)
        return
    for number, text in lines(io.BytesIO(data), name, _MAX_LINE, error=FormatError):
        if not text.strip():
            continue
        if as_json is None:
            as_json = text.lstrip().startswith("{")
        yield number, f"line-{number}", _parsed(text, f"{name}:{number}") if as_json else text.rstrip("\r\n")


def _array(data: bytes, name: str, as_json: bool | None) -> list[Any] | None:
    """The entries of a file that is one JSON array; None for JSON Lines and for text that only begins with "["."""
    try:
        entries = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None  # reading it by lines names the line
    except ValueError as error:
        if not name.lower().endswith(".json"):
            return None
        raise FormatError(f"{name}: not JSON ({error}); write an array of objects, or one object a line") from None
    if not isinstance(entries, list) or (as_json and not all(isinstance(entry, dict) for entry in entries)):
        return None
    if entries and all(isinstance(entry, dict) and {"role", "content"} <= set(entry) for entry in entries):
        raise FormatError(f'{name}: one conversation, not prompts; write {{"messages": [...]}} on one line')
    return entries


def _has_prompt_column(data: bytes) -> bool:
    """Whether the first line is the header of several columns, one of which is `prompt`."""
    first = data.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0][:_MAX_HEADER]
    try:
        header = csv_header(first.decode("utf-8"), "")
    except (UnicodeDecodeError, FormatError):
        return False
    return any(len(names) > 1 and "prompt" in names for names in header.values())


def _csv_entries(data: bytes, name: str) -> Iterator[tuple[int, str, Any]]:
    refuse_pointer(data, name)
    try:
        text = io.StringIO(data.decode("utf-8-sig"), newline="")
        for line, row in csv_table(text, name, ("prompt",)):
            if not row:
                raise FormatError(f"{name}:{line}: another number of cells than the header; check the quotes")
            # an empty cell is a field that is not there
            yield line, f"line-{line}", {key: cell for key, cell in row.items() if cell or key == "prompt"}
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise FormatError(f"{name}:{line}: not UTF-8; save the file as UTF-8") from None
    except PairsError as error:
        cure = "" if "no column" not in str(error) else "; name the column of the prompts prompt"
        raise FormatError(f"{error}{cure}") from None


def prompts_digest(items: Iterable[PromptItem]) -> str:
    """SHA-256 (hex) over the prompts and their ids, in their order; the layout of the file does not count."""
    digest = hashlib.sha256()
    for item in items:
        content = item.content if isinstance(item.content, str) else [m.to_dict() for m in item.content]
        line = json.dumps([item.id, content, item.system, item.extra], ensure_ascii=False, sort_keys=True)
        digest.update(line.encode("utf-8") + b"\n")
    return digest.hexdigest()


def _parsed(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise FormatError(f"{where}: not JSON ({error}); write one JSON object a line") from None


def _item(data: Any, default_id: str, number: int) -> PromptItem:
    if not isinstance(data, dict):
        raise FormatError(f"not a JSON object; {_ONE}")
    if ("prompt" in data) == ("messages" in data):
        raise FormatError(f"{'both prompt and' if 'prompt' in data else 'neither prompt nor'} messages; {_ONE}")
    name = data.get("id", default_id)
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
