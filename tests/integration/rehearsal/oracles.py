"""What is right, written anew: rendering by transformers, places by sentinels, tokens by their bytes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime
from functools import cache
from typing import Any
from unittest import mock

from jinja2.exceptions import SecurityError, TemplateError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEnvironment

from tests.support.low_level import lib

Messages = Sequence[Mapping[str, Any]]
SENTINEL = "qzxjkvwq"


class Refused(Exception):
    """The template refuses the conversation. `said`: by its own words, so that llama.cpp's environment does too."""

    said = False


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


@cache
def _compiled(template: str, mutable: bool, plain: bool) -> Any:
    if plain:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": datetime.now().strftime}
        return environment.from_string(template)
    from transformers.utils import chat_template_utils

    if not mutable:
        return chat_template_utils._compile_jinja_template(template)
    with mock.patch.object(chat_template_utils, "ImmutableSandboxedEnvironment", SandboxedEnvironment):
        return chat_template_utils._compile_jinja_template.__wrapped__(template)  # not the one that is kept


def rendered(
    template: str, messages: Messages, *, on: date | None = None, plain: bool = False, **variables: Any
) -> str:
    """A conversation through transformers' Jinja environment; `plain`: through one with its settings, for `make test`.

    Two kinds of templates are refused there that llama.cpp renders: those that change their lists (Kimi-K2's tool
    rounds), and those that need `tools` undefined, not None, when there are none. They are rendered as llama.cpp does.
    `on`: the day that `strftime_now` tells. Raises Refused.
    """
    values = {"add_generation_prompt": False} | {name: v for name, v in variables.items() if v is not None}
    with _today(None if plain else on):
        try:
            try:
                absent = {"tools": None, "documents": None}
                return str(_compiled(template, False, plain).render(messages=_copied(messages), **(absent | values)))
            except (SecurityError, TypeError, UndefinedError):
                return str(_compiled(template, True, plain).render(messages=_copied(messages), **values))
        except Exception as error:  # a template is foreign code and may raise anything
            refused = Refused(str(error))
            refused.said = type(error) is TemplateError
            raise refused from error


def _copied(messages: Messages) -> list[dict[str, Any]]:
    return [dict(message) for message in messages]


@contextmanager
def _today(day: date | None) -> Any:
    if day is None:
        yield
        return
    from transformers.utils import chat_template_utils

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime(day.year, day.month, day.day, tzinfo=tz)

    with mock.patch.object(chat_template_utils, "datetime", Day):
        yield


def merged(messages: Messages) -> list[dict[str, Any]] | None:
    """The system message as the beginning of the first user turn, as llama.cpp does it; None without one."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return None
    first = dict(messages[1]) | {"content": f"{messages[0]['content']}\n{messages[1]['content']}"}
    return [first, *map(dict, messages[2:])]


def place(render: Callable[[Messages], str], messages: Messages, target: str) -> tuple[int, int] | None:
    """Bytes [start, end) of a target in the rendered text; None where the template drops or changes it.

    That is its last occurrence in the last message that has it. A word that no template knows takes its place there,
    and the text of both renderings must be the same before and behind it.
    """
    carrier = max(index for index, message in enumerate(messages) if target in message["content"])
    before, behind = messages[carrier]["content"].rsplit(target, 1)
    marked = _copied(messages)
    marked[carrier]["content"] = before + SENTINEL + behind
    text, other = render(messages), render(marked)
    if other.count(SENTINEL) != 1:
        return None
    head, tail = other.split(SENTINEL)
    if text != head + target + tail:
        return None
    return len(head.encode()), len((head + target).encode())


def place_in_text(text: str, target: str) -> tuple[int, int]:
    """The last occurrence in a plain text."""
    start = len(text[: text.rindex(target)].encode())
    return start, start + len(target.encode())


def piece(model: Any, token: int) -> bytes:
    """Bytes of a token by llama.cpp, those of control tokens too."""
    buffer = ctypes.create_string_buffer(512)
    n = lib().llama_token_to_piece(model.vocab, token, buffer, len(buffer), 0, True)
    assert n >= 0
    return buffer.raw[:n]


def offsets(model: Any, tokens: Sequence[int], text: str) -> list[tuple[int, int]]:
    """Bytes [start, end) of every token in the text that was tokenized.

    Tokenizers put blanks that the text has not before words (SentencePiece), drop blanks behind special tokens (Phi),
    and add tokens around the text.
    """
    data = text.encode()
    found: list[tuple[int, int]] = []
    at = 0
    for index, token in enumerate(tokens):
        bytes_ = piece(model, token)
        start = at
        for candidate in (bytes_, bytes_.removeprefix(b" ")):
            skipped = at
            while not data.startswith(candidate, skipped) and data[skipped : skipped + 1].isspace():
                skipped += 1
            if candidate and data.startswith(candidate, skipped):
                start, at = skipped, skipped + len(candidate)
                break
        else:
            added = index in (0, len(tokens) - 1) or bytes_.strip() == b""
            assert added, f"token {index} {bytes_!r} is not at {data[at : at + 20]!r}"
        found.append((start, at))
    assert not data[at:].strip(), f"no token for {data[at : at + 40]!r}"
    return found


def tokens_at(model: Any, tokens: Sequence[int], text: str, where: tuple[int, int]) -> list[int]:
    """Indices of the tokens that share a byte with the place."""
    start, end = where
    return [i for i, (low, high) in enumerate(offsets(model, tokens, text)) if low < end and high > start]
