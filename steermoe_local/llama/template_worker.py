"""What the child process does in which chat templates are read and rendered (`template_client` asks it).

A template is a program of strangers: the sandbox of `chat_template` keeps it from the machine, the limits of the child
from its time and memory. Whatever it brings the child to, the parent gets JSON or nothing. Neither NumPy nor llama.cpp
is loaded here.
"""

from __future__ import annotations

import sys
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any

from ..errors import ModelError, PairsError
from .chat_template import ChatTemplate, names_of, one_line
from .locating import Loss, Render, find_losses, knowing_roles, place_target
from .template_date import TemplateDate
from .template_values import unpacked

_WORN = 128 << 10  # kiB; a conversation of 1 MB takes less
_MOST_KEPT = 8  # templates; a program has one or two models

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def _memory() -> int:
    """The most memory that this process has had, in kiB; 0 where it cannot be told."""
    if resource is None:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> 10 if sys.platform == "darwin" else peak


_start = _memory()


class _NoMemory(BaseException):
    """The template took all memory that it may have. No Exception: those of a template are caught, this one is not."""


class _Refusal(Exception):
    """The template raised an error; the text is its message in one line."""


class _Template(ChatTemplate):
    """A template that says what it changes to `notes`, and does not go on without memory."""

    def __init__(self, source: str, tokens: Mapping[str, Any]) -> None:
        self.notes: list[str] = []
        super().__init__(source, tokens)

    def _say(self, warning: str) -> None:
        self.notes.append(warning)

    def render(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> str:
        """As ChatTemplate."""
        try:
            return super().render(messages, **given)
        except MemoryError:
            raise _NoMemory from None


def answer(
    task: str, key: str, source: str | None, tokens: dict[str, Any] | None, most: int, given: dict[str, Any]
) -> dict[str, Any]:
    """The result of a task on the template `key`: {"result": ...}, or one key that says why there is none.

    "unknown": the template is not here, send its source and tokens; "limit": it took too much ("memory", or "text": of
    more than `most` characters); "model", "pairs": the message of such an error; "refused": that of an error of the
    template; "fault": this program's own. With "worn" the process has taken so much memory that it should end.
    """
    found = _answer(task, key, source, tokens, most, given)
    return found | {"worn": True} if _memory() > _start + _WORN else found


def _answer(
    task: str, key: str, source: str | None, tokens: dict[str, Any] | None, most: int, given: dict[str, Any]
) -> dict[str, Any]:
    try:
        if task == "look":
            return {"result": _look(str(source))}
        template = _kept(key, source, tokens)
        if template is None:
            return {"unknown": True}
        template.notes.clear()
        result = _TASKS[task](template, unpacked(given))
        if len(result.get("text", "")) > most:
            return {"limit": "text"}
        return {"result": result | {"notes": list(dict.fromkeys(template.notes))}}
    except (MemoryError, _NoMemory):
        return {"limit": "memory"}
    except PairsError as error:
        return {"pairs": str(error)}
    except ModelError as error:
        return {"limit": "memory"} if isinstance(error.__cause__, MemoryError) else {"model": str(error)}
    except _Refusal as error:
        return {"refused": str(error)}
    except Exception:
        return {"fault": traceback.format_exc()}


_templates: OrderedDict[str, _Template] = OrderedDict()


def _kept(key: str, source: str | None, tokens: dict[str, Any] | None) -> _Template | None:
    if key not in _templates:
        if source is None:
            return None
        _templates[key] = _Template(source, unpacked(tokens))
        if len(_templates) > _MOST_KEPT:
            _templates.popitem(last=False)
    _templates.move_to_end(key)
    return _templates[key]


def _look(source: str) -> dict[str, Any]:
    """Why a text is no template (None: it is one), and the names in it (`TemplateFacts`)."""
    problem = None
    try:
        ChatTemplate(source, {})
    except ModelError as error:
        if isinstance(error.__cause__, MemoryError):
            raise MemoryError from None
        problem = str(error)
    return {"problem": problem} | {kind: sorted(names) for kind, names in names_of(source).items()}


def _rendering(template: _Template, given: Mapping[str, Any]) -> tuple[Render, list[dict[str, Any]]]:
    """Gives the text of messages as the task wants them; and the task's messages."""
    messages = given["messages"]
    day = TemplateDate(date.fromisoformat(given["day"]), given["date_given"])

    def render(messages: list[dict[str, Any]]) -> str:
        try:
            text = template.chat(
                messages,
                add_generation_prompt=given["add_generation_prompt"],
                variables=given["variables"],
                date=day,
            )
            text.encode("utf-8")  # halves of surrogate pairs, which neither a tokenizer nor an answer can hold
            return text
        except Exception as error:  # a template is foreign code and may raise anything
            raise _Refusal(one_line(error)) from error

    return (knowing_roles(render, messages, template.source) if given["knowing_roles"] else render), messages


def _text(template: _Template, given: Mapping[str, Any]) -> dict[str, Any]:
    render, messages = _rendering(template, given)
    text = render([dict(message) for message in messages])
    losses = find_losses(render, messages, text) if given["losses"] else ()
    return {"text": text, "losses": _listed(losses)}


def _place(template: _Template, given: Mapping[str, Any]) -> dict[str, Any]:
    render, messages = _rendering(template, given)
    placed = place_target(render, messages, given["target"], given["special"])
    return {"text": placed.text, "start": placed.start, "end": placed.end, "losses": _listed(placed.losses)}


def _reasoning_field(template: _Template, given: Mapping[str, Any]) -> dict[str, Any]:
    return {"field": template.forms.reasoning_field}


def _listed(losses: Sequence[Loss]) -> list[list[Any]]:
    return [[loss.index, loss.role, loss.whole] for loss in losses]


_TASKS = {"text": _text, "place": _place, "reasoning_field": _reasoning_field}
