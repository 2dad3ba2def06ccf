"""Tasks: prompts and how their answers are scored.

A task file is a file of prompts (`steermoe_local.pairs.prompts`) whose further fields are what the scorer
needs of each item. Its first line may be a head:

    {"task": {"name": "capitals", "scorer": "contains", "max_tokens": 16, "positive": "right", "negative": "wrong"}}
    {"id": "1", "prompt": "What is the capital of France?", "answer": "Paris"}
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..._util.file_kinds import PROMPTS, SAFETY, TASK, require_kind
from ..._util.files import StrPath, parse_json, read_bytes
from ...errors import FormatError, UsageError
from ...pairs.prompts import PromptItem, prompts_digest, read_prompts

_MAX_BYTES = 1 << 30
_MAX_HEAD = 1 << 20
_HEAD = ("name", "scorer", "options", "max_tokens", "stop", "system", "raw", "positive", "negative", "license")
_HEAD_KINDS: dict[str, type] = {"options": dict, "max_tokens": int, "stop": list, "raw": bool}  # others are texts
_KIND_WORDS = {
    dict: "an object",
    int: "a whole number",
    list: "a list of texts, none of them empty",
    bool: "true or false",
    str: "a text",
}


ILL_FORMED = "ill-formed"
"""Label of an answer on neither side."""


@dataclass(frozen=True)
class Score:
    """The score of an answer: 1 shows the task's positive side, 0 does not; values between are grades.

    `label` says what was found ("positive", "negative", "ill-formed", "right", ...). An "ill-formed" answer is on
    neither side: it counts as 0, and reports list it separately. Raises UsageError for a value outside 0 to 1.
    """

    value: float
    label: str

    def __post_init__(self) -> None:
        if not 0 <= self.value <= 1:
            raise UsageError(f"score {self.value} is not from 0 to 1")


def asked(item: PromptItem) -> str:
    """The text of the user's last message of an item; of one without such a message, that of the last."""
    if isinstance(item.content, str):
        return item.content
    return next((one.content for one in reversed(item.content) if one.role == "user"), item.content[-1].content)


@dataclass(frozen=True)
class Choice:
    """One of an item's possible continuations: its text, and the model's log-probability of it (natural, summed)."""

    text: str
    logprob: float
    n_tokens: int


class Scorer(Protocol):
    """Scores the answers of a task; made by `scorers.make_scorer`. Subclasses define the methods of their kind."""

    kind: Literal["text", "choices"] = "text"
    """What is scored: a generated text, or the log-probabilities of the item's choices."""
    n_parallel: int = 0
    """How many answers may be scored at once in threads of their own, for scorers that wait; 0: in the caller's."""

    def check(self, item: PromptItem) -> None:
        """Raise FormatError for an item without what the scorer needs; the message names the field and the cure."""

    def score(self, item: PromptItem, text: str) -> Score:
        """Score a generated answer (kind "text")."""
        raise NotImplementedError

    def choices(self, item: PromptItem) -> tuple[str, ...]:
        """Texts whose log-probability after the prompt is needed (kind "choices")."""
        raise NotImplementedError

    def right_choices(self, item: PromptItem) -> tuple[int, ...]:
        """Indices of the choices that are right (kind "choices")."""
        raise NotImplementedError

    def score_choices(self, item: PromptItem, choices: tuple[Choice, ...]) -> Score:
        """Score the choices by their log-probabilities (kind "choices")."""
        raise NotImplementedError


@dataclass(frozen=True)
class Task:
    """Prompts with what their scorer needs.

    `scorer` is a name that `scorers.make_scorer` knows and `options` are its arguments. `positive` and `negative` say
    in words what the values 1 and 0 mean. `raw`: prompts are continued as they are, without the chat template.
    `max_tokens` and `stop` limit an answer. `source`: the file it was read from, or its builtin name.

    Raises UsageError for a task without items, with an id twice, or impossible numbers.
    """

    name: str
    items: tuple[PromptItem, ...]
    scorer: str
    options: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    system: str = ""
    raw: bool = False
    positive: str = ""
    negative: str = ""
    license: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(self.items))
        object.__setattr__(self, "stop", tuple(self.stop))
        if not self.items:
            raise UsageError(f"task {self.name}: no items; give at least one")
        twice = [name for name, n in Counter(str(item.id) for item in self.items).items() if n > 1]
        if twice:
            raise UsageError(f"task {self.name}: the id {twice[0]!r} stands twice; give each item its own")
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise UsageError(f"task {self.name}: max_tokens: {self.max_tokens!r} is not a whole number from 1 up")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise UsageError(f"task {self.name}: stop: holds what is not a text, or is empty")

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of items, scorer and settings; name, source and formatting of the file do not count."""
        head = [self.scorer, dict(self.options), self.max_tokens, list(self.stop), self.system, self.raw]
        text = json.dumps(head, sort_keys=True, ensure_ascii=False) + prompts_digest(self.items)
        return hashlib.sha256(text.encode("utf-8")).hexdigest()

    def first(self, n: int | None) -> Task:
        """The task with its first `n` items; None: all. Raises UsageError for less than one."""
        if n is not None and n < 1:
            raise UsageError(f"task {self.name}: {n} items are none; give a number from 1 up")
        return self if n is None or n >= len(self.items) else replace(self, items=self.items[:n])


def load_task(
    path: StrPath, *, scorer: str | None = None, options: Mapping[str, Any] | None = None, max_tokens: int | None = None
) -> Task:
    """Read a task file. `scorer` with its `options`, and `max_tokens`, override the head.

    Raises FormatError, which names file and line; UsageError when neither head nor `scorer` names a scorer.
    """
    require_kind(path, "a task", TASK, PROMPTS, SAFETY)
    data = read_bytes(path, "a task", _MAX_BYTES).removeprefix(b"\xef\xbb\xbf")
    begin = len(data) - len(data.lstrip(b"\n\r \t"))
    end = data.find(b"\n", begin)
    end = len(data) if end < 0 else end
    number = 1 + data[:begin].count(b"\n")
    head = _head(data[begin : min(end, begin + _MAX_HEAD)], f"{path}:{number}")
    if head is not None:
        data = data[:begin] + data[end:]  # an empty line instead: the others keep their numbers
        if not data.strip():
            raise FormatError(f"{path}: a head and no items; write one a line below it")
    # a text file has no answers, so there is nothing to score by but the text itself (a refusal, say)
    as_json = {".jsonl": True, ".txt": False}.get(Path(path).suffix.lower())
    items = read_prompts(io.BytesIO(data), str(path), as_json)
    fields = overridden(head or {}, scorer, options, max_tokens)
    if "scorer" not in fields:
        raise UsageError(
            f"{path}: how are the answers scored? give --scorer NAME, or begin the file with "
            '{"task": {"scorer": NAME}}'
        )
    fields.setdefault("name", Path(path).stem)
    return Task(**fields, items=tuple(items), source=str(path))


def overridden(
    fields: Mapping[str, Any], scorer: str | None, options: Mapping[str, Any] | None, max_tokens: int | None
) -> dict[str, Any]:
    """Fields of a task with another scorer and its options, further options, or another limit; None keeps them."""
    changed = dict(fields)
    if scorer is not None:
        changed |= {"scorer": scorer, "options": dict(options or {})}
    elif options:
        changed["options"] = {**changed.get("options", {}), **options}
    if max_tokens is not None:
        changed["max_tokens"] = max_tokens
    return changed


def _head(line: bytes, where: str) -> dict[str, Any] | None:
    """The fields of a task file's head; None if the line is no head. Raises FormatError, which begins with `where`."""
    try:
        data = parse_json(line.decode("utf-8"))
        json.dumps(data, allow_nan=False)  # a number that is too large was read as infinity
    except ValueError:
        return None  # reading it as an item gives the error
    if not isinstance(data, dict) or "task" not in data or "prompt" in data or "messages" in data:
        return None
    head = data["task"]
    if others := sorted(set(data) - {"task"}):
        raise FormatError(f'{where}: {others[0]}: unknown beside task; a head is {{"task": {{...}}}}')
    if not isinstance(head, dict):
        raise FormatError(f'{where}: task: not an object; write {{"task": {{"scorer": "contains"}}}}')
    if unknown := sorted(set(head) - set(_HEAD)):
        raise FormatError(f"{where}: task.{unknown[0]}: unknown; it may have {', '.join(_HEAD)}")
    for key, value in head.items():
        kind = _HEAD_KINDS.get(key, str)
        fits = type(value) is kind
        if fits and isinstance(value, list):
            fits = all(isinstance(text, str) and text for text in value)
        if not fits:
            raise FormatError(f"{where}: task.{key}: not {_KIND_WORDS[kind]}")
    if head.get("max_tokens", 1) < 1:
        raise FormatError(f"{where}: task.max_tokens: not a whole number from 1 up")
    if "base_url" in head.get("options", {}):
        raise FormatError(
            f"{where}: task.options.base_url: a task file may not say whom answers are sent to; leave it out, and give "
            "it yourself: --scorer-option base_url=..."
        )
    for key in ("name", "scorer"):
        if not head.get(key, "x").strip():
            raise FormatError(f"{where}: task.{key}: empty; give it or leave it out")
    return head
