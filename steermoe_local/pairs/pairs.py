"""Contrastive prompt pairs and the spans of text whose tokens are counted.

One pair a line (JSONL):

    {"id": "...", "positive": [{"role": "user", "content": "..."}, ...], "negative": [...],
     "positive_target": "...", "negative_target": "..."}

`positive` shows the behaviour, `negative` its opposite (x1 and x2 of arXiv 2509.09660). A side is a list of chat
messages, or one string, which is used unchanged, without a chat template. `id` is optional. The names `messages_0`,
`messages_1`, `messages_0_target` and `messages_1_target` are accepted for the two sides and targets.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._util.file_kinds import PAIRS, require_kind
from .._util.files import StrPath, parse_json, replacing
from .._util.records import lines
from .._util.regular_files import open_regular
from ..errors import PairsError

SIDES = ("positive", "negative")
_FIELDS = (*SIDES, "positive_target", "negative_target")
_OTHER_NAMES = {
    "messages_0": "positive",
    "messages_1": "negative",
    "messages_0_target": "positive_target",
    "messages_1_target": "negative_target",
}
_MAX_LINE = 1 << 28


@dataclass(frozen=True)
class Message:
    """One chat message."""

    role: str
    content: str

    def to_dict(self) -> dict[str, str]:
        """Return the message as llama_cpp and chat templates take it."""
        return {"role": self.role, "content": self.content}


Side = tuple[Message, ...] | str
"""Chat messages, or a text that gets no chat template."""


@dataclass(frozen=True)
class Pair:
    """Two prompts that differ in one behaviour, each with the text whose tokens count.

    Raises PairsError when a side or target is empty, the sides are of different kinds, or a target
    does not occur in its side.
    """

    id: str
    positive: Side
    negative: Side
    positive_target: str
    negative_target: str

    def __post_init__(self) -> None:
        if isinstance(self.positive, str) != isinstance(self.negative, str):
            raise PairsError("positive, negative: one is text, one is messages; use one kind")
        for name, (side, target) in zip(SIDES, self.sides(), strict=True):
            if not side:
                raise PairsError(f"{name}: empty; give messages or text")
            if not target:
                raise PairsError(f"{name}_target: empty; name the text whose tokens count")
            if _carrier(side, target) is None:
                raise PairsError(
                    f"{name}_target: {_quote(target)} does not occur in {name}; "
                    "copy the target from the text letter by letter"
                )

    def sides(self) -> tuple[tuple[Side, str], tuple[Side, str]]:
        """Return ((positive, positive_target), (negative, negative_target))."""
        return (
            (self.positive, self.positive_target),
            (self.negative, self.negative_target),
        )

    def margin_problem(self) -> str | None:
        """Why the pair has no log-probability margin of its positive over its negative target; None where it has one.

        A margin compares two answers to one prompt: what stands in front of the target must be the same on both sides,
        and not empty, and the targets must differ. The sentence names the cure.
        """
        prompts = [_before(side, target) for side, target in self.sides()]
        same_target = self.positive_target == self.negative_target
        if prompts[0] != prompts[1]:
            return (
                "the sides have different prompts and one target, so there are no two answers to compare; make pairs "
                "of one prompt and two answers (of SQuAD: steermoe pairs faithfulness --choices)"
                if same_target
                else "the prompts in front of the targets differ; put both answers behind the same prompt"
            )
        if same_target:
            return "both targets are the same text; give two answers that differ"
        if not any(content for _, content in prompts[0]):
            return "nothing stands in front of the targets; begin both sides with the prompt that they answer"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the pair as the JSON object of its line."""
        return {"id": self.id, **_content(self)}


class PairsFile(Collection[Pair]):
    """The pairs of a file, read again for each iteration, so that memory holds one at a time.

    The file is read once to check all of it, to count the pairs and to compute `digest` (see `pairs_digest`). What
    cannot be read twice, such as a pipe, is kept in memory. Raises PairsError with the file, the line and the field.
    """

    def __init__(self, path: StrPath) -> None:
        self.path = path
        self._kept: list[Pair] | None = None if Path(path).is_file() else []
        self._n_pairs = 0
        digest = hashlib.sha256()
        for pair in _unique_pairs(path):
            if self._kept is not None:
                self._kept.append(pair)
            digest.update(_line(pair))
            self._n_pairs += 1
        if not self._n_pairs:
            raise PairsError(f"{path}: no pairs in it; write one JSON object a line")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return self._n_pairs

    def __contains__(self, pair: object) -> bool:
        return any(pair == other for other in self)

    def __iter__(self) -> Iterator[Pair]:
        """Read the file once more. Raises PairsError at its end if it has changed."""
        if self._kept is not None:
            yield from self._kept
            return
        digest = hashlib.sha256()
        for _, pair in _read_pairs(self.path):
            digest.update(_line(pair))
            yield pair
        if digest.hexdigest() != self.digest:
            raise PairsError(f"{self.path}: was changed while it was read; start again")


def load_pairs(path: StrPath) -> list[Pair]:
    """Read a pairs file. A pair without an id gets "line-N", N counted from 1.

    Raises PairsError, which names the file, the line and the field.
    """
    pairs = list(_unique_pairs(path))
    if not pairs:
        raise PairsError(f"{path}: no pairs in it; write one JSON object a line")
    return pairs


def save_pairs(
    pairs: Iterable[Pair], path: StrPath, *, allow_empty: bool = True, why_none: Callable[[], str] | None = None
) -> int:
    """Write a pairs file, one pair a line as they come, under the field names of this package; returns their number.

    Raises UsageError, StorageError when the file cannot be written, PairsError without a pair if not `allow_empty`;
    `why_none` then says why there is none.
    """
    n = 0
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for pair in pairs:
            file.write(json.dumps(pair.to_dict(), ensure_ascii=False) + "\n")
            n += 1
        if not n and not allow_empty:
            reason = f" ({why_none()})" if why_none else ""
            raise PairsError(f"{path}: not written, there is no pair to write{reason}; check the data and the options")
    return n


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """SHA-256 (hex) over the pairs' content in their order.

    Ids and the layout of the file do not count: they change nothing that is counted.
    """
    if isinstance(pairs, PairsFile):
        return pairs.digest
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(_line(pair))
    return digest.hexdigest()


def in_fixed_order(pairs: Iterable[Pair]) -> list[Pair]:
    """The pairs in the order of the SHA-256 of their content: a shuffle that the order in the file does not change."""
    return sorted(pairs, key=lambda pair: hashlib.sha256(_line(pair)).digest())


def last_exact_run(token_ids: Sequence[int], target_ids: Sequence[int]) -> range | None:
    """Positions of the last exact run of `target_ids`, as the paper's own code finds the target.

    None without a run, which happens when the tokenizer merges across the target's edges.
    """
    ids, wanted = list(token_ids), list(target_ids)
    # as letters of two texts, backwards: the search in texts is linear, whatever repeats in them
    letters = {token: chr(number) for number, token in enumerate(dict.fromkeys(ids))}
    if not wanted or not letters.keys() >= set(wanted):
        return None
    text, part = ("".join(letters[token] for token in reversed(tokens)) for tokens in (ids, wanted))
    if (behind := text.find(part)) < 0:
        return None
    end = len(ids) - behind
    return range(end - len(wanted), end)


def _read_pairs(path: StrPath) -> Iterator[tuple[int, Pair]]:
    """(number of the line, pair) of every line that is not blank."""
    require_kind(path, "a pairs file", PAIRS, error=PairsError)
    try:
        with open_regular(path, streams=True, fifos=True) as file:
            for number, text in lines(file, path, _MAX_LINE):
                try:
                    yield number, parse_pair(parse_json(text), f"line-{number}")
                except PairsError as error:
                    raise PairsError(f"{path}:{number}: {error}") from None
                except ValueError as error:
                    raise PairsError(f"{path}:{number}: not JSON ({error}); write one JSON object a line") from None
    except OSError as error:
        raise PairsError(
            f"{path}: cannot be read as a pairs file: {error.strerror or error}; check the path"
        ) from error


def _unique_pairs(path: StrPath) -> Iterator[Pair]:
    """The pairs; raises PairsError when an id repeats."""
    first_seen: dict[bytes, int] = {}  # by a hash: ids may be long, and there may be millions
    for number, pair in _read_pairs(path):
        key = hashlib.blake2b(pair.id.encode("utf-8"), digest_size=16).digest()
        first = first_seen.setdefault(key, number)
        if first != number:
            raise PairsError(
                f"{path}:{number}: id: {pair.id!r} is already the id of line {first}; give each pair its own"
            )
        yield pair


def _line(pair: Pair) -> bytes:
    """The bytes of a pair that the digest covers."""
    line = json.dumps(_content(pair), ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return line.encode("utf-8") + b"\n"


def _content(pair: Pair) -> dict[str, Any]:
    def plain(side: Side) -> Any:
        return side if isinstance(side, str) else [message.to_dict() for message in side]

    return {
        "positive": plain(pair.positive),
        "negative": plain(pair.negative),
        "positive_target": pair.positive_target,
        "negative_target": pair.negative_target,
    }


def _carrier(side: Side, target: str) -> int | None:
    contents = (side,) if isinstance(side, str) else tuple(m.content for m in side)
    return next((i for i in reversed(range(len(contents))) if target in contents[i]), None)


def _before(side: Side, target: str) -> tuple[tuple[str, str], ...]:
    """(role, content) of what stands in front of the target: its last occurrence in the last message that holds it."""
    messages = (("", side),) if isinstance(side, str) else tuple((m.role, m.content) for m in side)
    carrier = _carrier(side, target)
    assert carrier is not None  # a pair has its targets
    role, content = messages[carrier]
    return (*messages[:carrier], (role, content[: content.rindex(target)]))


def parse_pair(data: Any, default_id: str) -> Pair:
    """A pair from the JSON value of a line, with this package's field names or the notebook's. Raises PairsError."""
    if not isinstance(data, dict):
        raise PairsError("not a JSON object; write one pair as {...} a line")
    fields: dict[str, Any] = {}
    for key, value in data.items():
        name = _OTHER_NAMES.get(key, key)
        if name not in (*_FIELDS, "id"):
            raise PairsError(f"{key}: unknown field; remove it (known: id, {', '.join(_FIELDS)})")
        if name in fields:
            raise PairsError(f"{key}: stands for {name}, which is given too; remove one")
        fields[name] = value
    for name in _FIELDS:
        if name not in fields:
            raise PairsError(f"{name}: missing; a pair needs {', '.join(_FIELDS)}")
    for name in ("positive_target", "negative_target"):
        if not isinstance(fields[name], str):
            raise PairsError(f"{name}: not a string; name the text whose tokens count")
    pair_id = fields.pop("id", default_id)
    if not isinstance(pair_id, str) or not pair_id:
        raise PairsError("id: not a string, or empty; write a name or leave it out")
    for name in SIDES:
        fields[name] = _parse_side(fields[name], name)
    return Pair(pair_id, **fields)


def _parse_side(data: Any, name: str) -> Side:
    if not isinstance(data, str | list):
        raise PairsError(f"{name}: neither a list of messages nor a string")
    return data if isinstance(data, str) else parse_messages(data, name)


def parse_messages(data: list[Any], name: str) -> tuple[Message, ...]:
    """Chat messages from a JSON list; `name` starts the messages. Raises PairsError."""
    messages = []
    for index, item in enumerate(data):
        where = f"{name}[{index}]"
        if not isinstance(item, dict) or set(item) != {"role", "content"}:
            raise PairsError(f'{where}: write {{"role": ..., "content": ...}}, nothing more')
        for key, value in item.items():
            if not isinstance(value, str):
                raise PairsError(f"{where}.{key}: not a string; only text messages are read")
        if not item["role"]:
            raise PairsError(f"{where}.role: empty; write user, assistant or system")
        messages.append(Message(**item))
    return tuple(messages)


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
