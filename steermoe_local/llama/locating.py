"""Finds where the texts of messages are in a rendered conversation.

A search would find a short text in the template's own markup as well, or in another message. So the conversation is
rendered once more with marks in the messages' texts: what is left without the marks must be the rendering itself, and
the marks say what is where. A text whose mark does not come out is one that the template leaves out.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import PairsError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[list[dict[str, Any]]], str]
"""Gives the text of messages; raises whatever the chat template does."""

_Offset = tuple[int, int]
"""(index of a message, characters of its content before the mark)."""

_MOST_ALONE = 16  # marks that are rendered one by one: hundreds would take minutes
_DIGITS = str.maketrans("0123456789", "abcdefghij")


@dataclass(frozen=True)
class Loss:
    """A message whose text is not in the rendering: all of it (`whole`), or a part."""

    index: int
    role: str
    whole: bool

    def __str__(self) -> str:
        what = "leaves out" if self.whole else "leaves out or changes a part of"
        return f"the model's chat template {what} the text of message {self.index + 1} ({self.role})"


@dataclass(frozen=True)
class Placed:
    """A rendered conversation, the bytes [start, end) of the target in it, and what the template left out."""

    text: str
    start: int
    end: int
    losses: tuple[Loss, ...]


def place_target(render: Render, messages: Messages, target: str, special: Collection[str] = ()) -> Placed:
    """Render messages and find the target: its last occurrence in the last message that contains it.

    `special` lists the texts of special tokens (such as "<|im_end|>"), in which nothing is found. Raises PairsError
    when the rendering does not hold the target there, and what `render` raises.
    """
    text = render([dict(message) for message in messages])
    carrier, first = _occurrence(messages, target, special)
    last = first + len(target)
    others = [index for index in range(len(messages)) if index != carrier and _content(messages[index]).strip()]
    found = _positions(
        render, messages, text, [(carrier, first), (carrier, last), *(_middle(messages, i) for i in others)]
    )
    start = end = None
    if found is not None:
        (start, end), rest = found[:2], found[2:]
        ok = [
            at is not None and _is_there(messages, text, _middle(messages, index), at)
            for index, at in zip(others, rest, strict=True)
        ]
        doubtful = [index for index, is_found in zip(others, ok, strict=True) if not is_found]
        if start is None or not _is_there(messages, text, (carrier, first), start):
            doubtful.append(carrier)
    else:
        doubtful = [*others, carrier]
        start, end = _edges(render, messages, text, (carrier, first), target)
    if start is None or end is None or text[start:end] != target:
        raise _not_rendered(messages[carrier], carrier, target)
    losses = _losses(render, messages, text, sorted(doubtful))
    n_before = len(text[:start].encode("utf-8"))
    return Placed(text, n_before, n_before + len(target.encode("utf-8")), tuple(losses))


def find_losses(render: Render, messages: Messages, text: str) -> list[Loss]:
    """The messages whose text is not in `text`, their rendering. Contents without text are not looked at."""
    indices = [index for index, message in enumerate(messages) if _content(message).strip()]
    marks = [_middle(messages, index) for index in indices]
    found = _positions(render, messages, text, marks) or [None] * len(marks)
    doubtful = [
        mark[0] for mark, at in zip(marks, found, strict=True) if at is None or not _is_there(messages, text, mark, at)
    ]
    return _losses(render, messages, text, doubtful)


def knowing_roles(render: Render, messages: Messages, template: str) -> Render:
    """`render`, with a developer's messages as system messages where the template does not render these as they are."""
    developers = [index for index, message in enumerate(messages) if message.get("role") == "developer"]
    if not developers:
        return render
    if "developer" in template:
        own = [dict(message) for message in messages]
        try:
            losses = find_losses(render, own, render(own))
        except Exception:  # a template is foreign code and may raise anything
            losses = [Loss(developers[0], "developer", True)]
        if not any(loss.whole and loss.index in developers for loss in losses):
            return render

    def as_system(messages: list[dict[str, Any]]) -> str:
        return render([m | {"role": "system"} if m.get("role") == "developer" else m for m in messages])

    return as_system


def find_in_text(text: str, target: str, special: Collection[str] = ()) -> tuple[int, int]:
    """Byte offsets [start, end) of the target's last occurrence in a plain text, outside of `special` tokens' texts.

    Raises PairsError when it is not there.
    """
    start = _last(text, target, special)
    if start < 0:
        raise PairsError(f"target {_quote(target)} is only in the text of a special token; use another target")
    n_before = len(text[:start].encode("utf-8"))
    return n_before, n_before + len(target.encode("utf-8"))


def _occurrence(messages: Messages, target: str, special: Collection[str]) -> _Offset:
    for index in reversed(range(len(messages))):
        start = _last(_content(messages[index]), target, special)
        if start >= 0:
            return index, start
    raise PairsError(f"target {_quote(target)} is in no message, or only in the text of a special token")


def _last(text: str, target: str, special: Collection[str]) -> int:
    """Character at which the last occurrence outside of special tokens starts, -1 without one."""
    for mark in special:
        if mark and mark in text and mark not in target:
            text = text.replace(mark, "\0" * len(mark))
    return text.rfind(target) if target else -1


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message; of one in parts the first text that is not blank."""
    content = message.get("content")
    if isinstance(content, list):
        number = _text_part(content)
        content = None if number is None else content[number]["text"]
    return content if isinstance(content, str) else ""


def _set_content(message: dict[str, Any], text: str) -> None:
    content = message["content"]
    if isinstance(content, list):
        number = _text_part(content)
        message["content"] = [part | {"text": text} if i == number else part for i, part in enumerate(content)]
    else:
        message["content"] = text


def _text_part(parts: Sequence[Any]) -> int | None:
    for number, part in enumerate(parts):
        text = part.get("text") if isinstance(part, dict) else None
        if isinstance(text, str) and text.strip():
            return number
    return None


def _middle(messages: Messages, index: int) -> _Offset:
    """A mark amid the message's text, so that tests of its beginning and its end come out as without."""
    content = _content(messages[index])
    return index, len(content) - len(content.lstrip()) + len(content.strip()) // 2


def _positions(render: Render, messages: Messages, text: str, marks: Sequence[_Offset]) -> list[int | None] | None:
    """Where in the rendering `text` the marked positions are, the last ones of a message that is rendered twice.

    None in the list: the mark is not rendered. None instead of it: the template renders other things with the marks.
    """
    known = [text, *map(_content, messages)]
    # A template may escape the ones and replace the others.
    for names in (_private_names, _letter_names):
        found = _positions_of(names(len(marks), known), render, messages, text, marks)
        if found is not None:
            return found
    return None


def _positions_of(
    names: Sequence[str], render: Render, messages: Messages, text: str, marks: Sequence[_Offset]
) -> list[int | None] | None:
    marked = [dict(message) for message in messages]
    for number, (index, offset) in sorted(enumerate(marks), key=lambda mark: mark[1], reverse=True):
        content = _content(marked[index])
        _set_content(marked[index], content[:offset] + names[number] + content[offset:])
    try:
        rendered = render(marked)
    except Exception:  # a template is foreign code and may raise anything
        return None
    pieces = re.split(f"({'|'.join(names)})", rendered) if names else [rendered]
    if "".join(pieces[::2]) != text:
        return None
    positions: dict[str, int] = {}
    at = 0
    for piece, name in zip(pieces[::2], pieces[1::2], strict=False):
        at += len(piece)
        positions[name] = at
    return [positions.get(name) for name in names]


def _private_names(n: int, known: Sequence[str]) -> list[str]:
    """Marks of one character each that Unicode leaves to private use, and that none of the texts has."""
    characters = (chr(point) for point in range(0x100000, 0x10FFFE))
    return [c for c, _ in zip((c for c in characters if not any(c in text for text in known)), range(n), strict=False)]


def _letter_names(n: int, known: Sequence[str]) -> list[str]:
    """Marks of ASCII letters with a beginning that none of the texts has."""
    fence = "Zqx"
    while any(fence in text for text in known):
        fence += "q"
    return [f"{fence}{str(number).translate(_DIGITS)}{fence}" for number in range(n)]


def _is_there(messages: Messages, text: str, mark: _Offset, at: int) -> bool:
    """Is the whole text of the message around the mark's position, but for white space?"""
    index, offset = mark
    content = _content(messages[index])
    begin = at - offset + len(content) - len(content.lstrip())
    if begin >= 0 and text.startswith(content.strip(), begin):
        return True
    before = (text[i] for i in range(at - 1, -1, -1))
    behind = (text[i] for i in range(at, len(text)))
    return _begins(before, reversed(content[:offset])) and _begins(behind, content[offset:])


def _begins(text: Iterable[str], wanted: Iterable[str]) -> bool:
    """Does a text begin with another one, but for white space?"""
    letters = (letter for letter in text if not letter.isspace())
    return all(next(letters, "") == letter for letter in wanted if not letter.isspace())


def _edges(render: Render, messages: Messages, text: str, first: _Offset, target: str) -> tuple[int | None, int | None]:
    """Where the target starts and ends in the rendering; (None, None) if that cannot be told."""
    index, offset = first
    found = _positions(render, messages, text, [first, (index, offset + len(target))])
    if found is not None:
        return found[0], found[1]
    # other letters instead of the target, for templates that count or cut
    letters = _private_names(1, [text, *map(_content, messages)])[0] * len(target)
    changed = [dict(message) for message in messages]
    content = _content(changed[index])
    _set_content(changed[index], content[:offset] + letters + content[offset + len(target) :])
    with contextlib.suppress(Exception):  # a template is foreign code and may raise anything
        rendered = render(changed)
        if letters in rendered and rendered.replace(letters, target) == text:
            at = rendered[: rendered.rindex(letters)].replace(letters, target)
            return len(at), len(at) + len(target)
    if target == target.strip():  # otherwise a blank may be the template's own
        for inside in dict.fromkeys((len(target) // 2, 0, len(target), 1, len(target) - 1)):
            mark = (index, offset + inside)
            found = _positions(render, messages, text, [mark])
            if found is not None and (place := found[0]) is not None and _is_there(messages, text, mark, place):
                return place - inside, place - inside + len(target)
    return None, None


def _losses(render: Render, messages: Messages, text: str, indices: Sequence[int]) -> list[Loss]:
    """Of the messages at `indices` those whose text is lost."""
    offsets = {index: _trials(_content(messages[index])) for index in indices}
    whole: dict[int, bool] = {}  # of the messages that a mark could be put into
    for number in range(max(map(len, offsets.values()), default=0)):
        marks = [(index, own[number]) for index, own in offsets.items() if number < len(own)]
        for (index, offset), at in _each_position(render, messages, text, marks):
            if at is not None and _is_there(messages, text, (index, offset), at):
                del offsets[index]
                continue
            content = _content(messages[index])
            # beside a mark at an edge no text need be
            has_part = at is not None and bool(content[:offset].strip() and content[offset:].strip())
            whole[index] = not has_part and whole.get(index, True)
    return [
        Loss(index, str(messages[index].get("role")), whole.get(index, True))
        for index, own in offsets.items()
        if own and (index in whole or _content(messages[index]).strip() not in text)
    ]


def _trials(content: str) -> list[int]:
    """Where marks are tried in a text; nowhere in a blank one."""
    begin = len(content) - len(content.lstrip())
    length = len(content.strip())
    offsets = [length * part // 8 for part in (4, 0, 8, 1, 2, 3, 5, 6, 7)]
    return [begin + offset for offset in dict.fromkeys((*offsets, length - 1, min(1, length)))] if length else []


def _each_position(
    render: Render, messages: Messages, text: str, marks: Sequence[_Offset]
) -> Iterator[tuple[_Offset, int | None]]:
    """The marks with their positions, of one rendering if that can be. Marks that change other things are left out."""
    found = _positions(render, messages, text, marks)
    if found is not None:
        yield from zip(marks, found, strict=True)
    elif len(marks) > 1:
        for mark in marks[:_MOST_ALONE]:
            yield from _each_position(render, messages, text, [mark])


def _not_rendered(message: Mapping[str, Any], index: int, target: str) -> PairsError:
    cure = "a target that it keeps" if target == target.strip() else "a target without outer blanks"
    return PairsError(
        f"target {_quote(target)} of message {index + 1} ({message.get('role')}) is not rendered: the chat template "
        f"changes or leaves out this text; use {cure}, or a pair of plain texts"
    )


def _quote(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
