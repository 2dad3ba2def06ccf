"""Files of conversations: JSON with the messages, the system message, the steering and how tokens are drawn.

    {"format": "steermoe-chat", "version": 1, "model": {...identity...} or null, "created": ..., "tool": ...,
     "system": ... or null, "messages": [{"role": ..., "content": ..., "reasoning_content": ...}, ...],
     "steering": {...} or null, "steering_on": ..., "sampling": {...}, "max_tokens": ... or null}

The messages are the user's and the assistant's in turns. `steering` is `Steering.to_dict`: it names a file and its
digest, and does not hold it. A chat whose steering has a rank, weights or a cap is of version 2; that of a plan,
`SteeringPlan.to_dict`, has `rules`, and the chat is of version 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._util.file_kinds import CHAT, require_kind
from .._util.files import StrPath, parse_json, read_bytes, replacing, timestamp, tool_name
from .._util.json_text import quoted
from ..errors import FormatError, UsageError
from ..identity import ModelIdentity
from ..llama.grammar_bounds import require_of_file
from ..llama.template_date import template_date
from .bounds import MAX_BIASES, MAX_MESSAGES, MAX_TEXT, MAX_TOKEN_ID, MAX_TOKENS
from .engine import Sampling

_FORMAT = "steermoe-chat"
_VERSION = 3
# By the first of these fields that the steering has: older readers would leave it aside.
_VERSIONS = {"rules": 3, "rank": 2, "weights": 2, "cap": 2}
_PATHS = ("map", "bias", "plan")
_MAX_BYTES = 64 << 20
_ROLES = ("user", "assistant")
_FIELDS = {"format", "version", "model", "created", "tool", "system", "messages"}
_FIELDS |= {"steering", "steering_on", "sampling", "max_tokens"}
_OPTIONAL = {"date"}
_INTEGERS = ("top_k", "repeat_last_n", "seed")


@dataclass(frozen=True)
class ChatState:
    """The content of a saved conversation.

    `steering` is `Steering.to_dict` or `SteeringPlan.to_dict`, not opened yet. `date` (YYYY-MM-DD) is the one that the
    chat template printed, if it prints one.
    """

    model: ModelIdentity | None
    system: str | None
    messages: list[dict[str, str]]
    steering: dict[str, Any] | None
    steering_on: bool
    sampling: Sampling
    max_tokens: int | None
    date: str | None = None

    def to_dict(self) -> dict[str, Any]:
        sampling = asdict(self.sampling)
        # JSON has texts as keys only, and no infinity: null bans a token
        biases = self.sampling.logit_bias.items()
        sampling["logit_bias"] = {str(token): None if bias == -float("inf") else bias for token, bias in biases}
        return {
            "format": _FORMAT,
            "version": next((_VERSIONS[name] for name in _VERSIONS if name in (self.steering or ())), 1),
            "model": self.model.to_dict() if self.model else None,
            "created": timestamp(),
            "tool": tool_name(),
            "system": self.system,
            "messages": [dict(message) for message in self.messages],
            "steering": self.steering,
            "steering_on": self.steering_on,
            "sampling": sampling,
            "max_tokens": self.max_tokens,
            **({} if self.date is None else {"date": self.date}),
        }

    @classmethod
    def from_dict(cls, data: object, where: str = "chat") -> ChatState:
        """Check what `to_dict` gives; `where` starts the messages. Raises FormatError."""
        if not isinstance(data, Mapping) or data.get("format") != _FORMAT:
            raise FormatError(f'{where}: not a saved chat (no "format": "{_FORMAT}" in it); check the path')
        if data.get("version") not in range(1, _VERSION + 1):
            raise FormatError(
                f"{where}: a chat of version {_short(data.get('version'))}, this program reads 1 to {_VERSION}; "
                "upgrade steermoe-local"
            )
        if missing := sorted(_FIELDS - set(data)):
            raise FormatError(f"{where}: {missing[0]}: missing; save the chat again")
        if unknown := sorted(str(key) for key in set(data) - _FIELDS - _OPTIONAL):
            raise FormatError(f"{where}: {unknown[0]}: unknown field; remove it")
        for name, kinds in (
            ("system", (str, type(None))),
            ("steering", (dict, type(None))),
            ("steering_on", (bool,)),
            ("messages", (list,)),
            ("sampling", (dict,)),
        ):
            if not isinstance(data[name], kinds):
                raise FormatError(
                    f"{where}: {name}: {_short(data[name])} is not what stands there; save the chat again"
                )
        if data["system"] is not None:
            _require_short(data["system"], f"{where}: system")
        if (date := data.get("date")) is not None:
            try:
                template_date(date if isinstance(date, str) else str(date))
            except UsageError as error:
                raise FormatError(f"{where}: {error}; save the chat again") from None
        return cls(
            model=None if data["model"] is None else ModelIdentity.from_dict(data["model"], f"{where}: model"),
            system=data["system"],
            messages=_messages(data["messages"], where),
            steering=data["steering"],
            steering_on=data["steering_on"],
            sampling=_sampling(data["sampling"], where),
            max_tokens=_max_tokens(data["max_tokens"], where),
            date=date,
        )


def write_chat(state: ChatState, path: StrPath) -> None:
    """Write a conversation. Raises UsageError, StorageError when it cannot be written, or could not be read again."""
    data = state.to_dict()
    try:
        ChatState.from_dict(data)
    except FormatError as error:
        raise UsageError(f"{path}: cannot be written: {str(error).removeprefix('chat: ')}") from None
    text = json.dumps(data, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError:
        cure = "start the chat in a folder whose name is"
        raise UsageError(f"{path}: cannot be written: the path of its map or bias is not UTF-8; {cure}") from None
    with replacing(path) as temporary:
        temporary.write_bytes(encoded)


def with_whole_paths(steering: Mapping[str, Any]) -> dict[str, Any]:
    """What a steering's or a plan's `to_dict` gave, with absolute paths: to be found from any folder."""
    found = dict(steering)
    for name in _PATHS:
        if isinstance(found.get(name), str):
            found[name] = str(Path(found[name]).absolute())
    if "rules" in found:
        found["rules"] = [
            dict(rule) | {name: with_whole_paths(rule[name]) for name in ("steering", "looks_at") if rule.get(name)}
            for rule in found["rules"]
        ]
    return found


def read_chat(path: StrPath) -> ChatState:
    """Read and check a conversation. Raises FormatError, which names the file and the field."""
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise FormatError(f"{path}: not a file; check the path")
    require_kind(path, "a saved chat", CHAT)
    try:
        data = parse_json(read_bytes(path, "a saved chat", _MAX_BYTES).decode("utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: not a saved chat: not JSON ({error})") from None
    return ChatState.from_dict(data, str(path))


def _messages(messages: list[Any], where: str) -> list[dict[str, str]]:
    if len(messages) > MAX_MESSAGES:
        raise FormatError(f"{where}: messages: {len(messages)}, but at most {MAX_MESSAGES} are read; shorten it")
    checked: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        what = f"{where}: messages[{index}]"
        role = _ROLES[index % 2]
        if not isinstance(message, dict) or not all(isinstance(text, str) for text in message.values()):
            raise FormatError(f"{what}: not an object of texts; save the chat again")
        optional = {"reasoning_content"} if role == "assistant" else set()
        if not {"role", "content"} <= set(message) <= {"role", "content"} | optional:
            raise FormatError(f"{what}: has the fields {', '.join(sorted(message))[:80]}; role and content are wanted")
        if message["role"] != role:
            raise FormatError(f"{what}: role {_short(message['role'])}, but user and assistant speak in turns")
        for name, text in message.items():
            _require_short(text, f"{what}.{name}")
        checked.append(dict(message))
    if len(checked) % 2:
        raise FormatError(f"{where}: messages: the last question has no answer; remove it")
    return checked


def _sampling(data: dict[str, Any], where: str) -> Sampling:
    what = f"{where}: sampling"
    if unknown := sorted(set(data) - set(Sampling.__dataclass_fields__)):
        raise FormatError(f"{what}.{unknown[0]}: unknown field; remove it")
    values = dict(data)
    biases = values.pop("logit_bias", {})
    if not isinstance(biases, dict) or len(biases) > MAX_BIASES:
        raise FormatError(f"{what}: logit_bias: not an object of at most {MAX_BIASES} tokens; save the chat again")
    for token, bias in biases.items():
        if not _is_token(token) or type(bias) not in (int, float, type(None)):
            raise FormatError(f"{what}: logit_bias: {_short(token)}: {_short(bias)} is not a token and its bias")
    for name, value in values.items():
        kinds: tuple[type, ...] = (int,) if name in _INTEGERS else (str,) if name == "grammar" else (int, float)
        if type(value) not in kinds and not (value is None and name in ("seed", "grammar")):
            raise FormatError(f"{what}.{name}: {_short(value)} is not what stands there; save the chat again")
    try:
        values["logit_bias"] = {int(token): -float("inf") if b is None else float(b) for token, b in biases.items()}
        sampling = Sampling(**values)
        if sampling.grammar is not None:
            require_of_file(sampling.grammar)
        return sampling
    except UsageError as error:
        raise FormatError(f"{what}: {error}; save the chat again") from None


def _max_tokens(value: object, where: str) -> int | None:
    if value is not None and (type(value) is not int or not 0 <= value <= MAX_TOKENS):
        raise FormatError(f"{where}: max_tokens: {_short(value)} is not a number of tokens; save the chat again")
    return value


def _require_short(text: str, what: str) -> None:
    if len(text) > MAX_TEXT:
        raise FormatError(f"{what}: {len(text)} characters, but at most {MAX_TEXT} are read; shorten it")


def _is_token(text: object) -> bool:
    digits = isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) <= 10
    return digits and int(str(text)) <= MAX_TOKEN_ID


def _short(value: object) -> str:
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, (dict, list)) and value:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
