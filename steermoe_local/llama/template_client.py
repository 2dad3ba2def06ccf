"""Chat templates as the package has them: read and rendered in child processes, within limits.

A template comes with a model file and is a program of strangers: a loop may take years, a filter all memory, and a deep
expression may crash Python's own compiler. A child (`template_worker`, in the `template_pool`) can be ended. What comes
back is JSON, and is checked here.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, PairsError
from .locating import Loss, Placed
from .template_date import CLOCK, TemplateDate, date_variables
from .template_pool import TemplatePool, default_pool
from .template_values import packed

_log = logging.getLogger("steermoe.prompts")

_MOST_SOURCE = 1 << 20  # characters of a template; the longest of llama.cpp's archive has 17,000

# A text has at most this many characters, and so many for each byte of what was given.
_MOST_OWN, _MOST_EACH, _MOST_TEXT = 1 << 20, 16, 32 << 20


class TemplateRefusal(Exception):
    """The template raised an error; the text is its message in one line."""


@dataclass(frozen=True)
class TemplateFacts:
    """What a template's text says without being rendered.

    `problem` is why it cannot be used, in one line; None: it can. `variables` are read and not set by it, `fields`
    are attributes and keys that it reads of any value, `guarded` variables that it can do without.
    """

    problem: str | None = None
    variables: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    guarded: frozenset[str] = frozenset()


@functools.lru_cache(maxsize=64)
def template_facts(source: str, pool: TemplatePool | None = None) -> TemplateFacts:
    """Look at a template."""
    if not source:
        return TemplateFacts()
    if len(source) > _MOST_SOURCE:
        return TemplateFacts(
            f"the model's chat template has {len(source)} characters, more than the {_MOST_SOURCE} that are read; "
            "do without it: steermoe run --raw, or plain texts as the sides of pairs"
        )
    try:
        found = _result((pool or default_pool()).ask("look", "", source, {}, 0, {}))
        problem = found["problem"]
        names = [frozenset(map(str, found[kind])) for kind in ("variables", "fields", "guarded")]
        return TemplateFacts(None if problem is None else str(problem), *names)
    except ModelError as error:
        return TemplateFacts(str(error))


def template_problem(source: str) -> str | None:
    """Why a text is no chat template, in one line; None: it is one."""
    return template_facts(source).problem


def template_names(source: str) -> tuple[frozenset[str], frozenset[str]]:
    """Variables that a template reads and does not set, and the attributes and keys that it reads of any value.

    None of either for a template that cannot be read.
    """
    facts = template_facts(source)
    return facts.variables, facts.fields


def template_variables(source: str) -> frozenset[str]:
    """Variables that a template reads and does not set; none for one that cannot be read."""
    return template_names(source)[0]


class BoundedTemplate:
    """A chat template that is rendered in a child process. `tokens` are variables such as `bos_token`.

    What it changes in messages it says once, as a warning of the logger "steermoe.prompts".

    All methods raise ModelError when the template reaches a limit (`TemplateLimits`), TemplateRefusal when it raises an
    error, and Cancelled. The constructor raises ModelError for a text that is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any], pool: TemplatePool | None = None) -> None:
        self._facts = template_facts(source, pool)
        if self._facts.problem is not None:
            raise ModelError(self._facts.problem)
        self.source = source
        self._tokens = packed(tokens)
        self._key = hashlib.sha256(json.dumps([source, self._tokens]).encode("ascii")).hexdigest()
        self._pool = pool or default_pool()
        self._said: set[str] = set()

    def text(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        date: TemplateDate,
        knowing_roles: bool = True,
    ) -> str:
        """The text of messages in the form that the template takes (`ChatTemplate.chat`).

        With `knowing_roles` a developer's messages are a system's where the template does not know the role.
        """
        given = _given(messages, add_generation_prompt, variables, date, knowing_roles) | {"losses": False}
        return _text(self._ask("text", given))

    def text_and_losses(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        date: TemplateDate,
    ) -> tuple[str, tuple[Loss, ...]]:
        """The same, and what text of messages the template leaves out."""
        given = _given(messages, add_generation_prompt, variables, date, True) | {"losses": True}
        found = self._ask("text", given)
        return _text(found), _losses(found)

    def placed(
        self,
        messages: Sequence[Mapping[str, Any]],
        target: str,
        special: Collection[str],
        *,
        variables: Mapping[str, Any],
        date: TemplateDate,
    ) -> Placed:
        """The text of messages, and where the target is in it (`locating.place_target`). Raises PairsError."""
        given = _given(messages, False, variables, date, True) | {"target": target, "special": list(special)}
        found = self._ask("place", given)
        return Placed(_text(found), int(found["start"]), int(found["end"]), _losses(found))

    @functools.cached_property
    def reasoning_field(self) -> str | None:
        """Field of a message in which the template reads its reasoning, if it is not `reasoning_content`."""
        field = self._ask("reasoning_field", {})["field"]
        return None if field is None else str(field)

    def reads(self, date: TemplateDate) -> bool:
        """Does the date come into what this template renders, at least of some messages?"""
        facts = self._facts
        return CLOCK in facts.variables or bool(date_variables(facts.variables, facts.guarded, date))

    def _ask(self, task: str, given: Mapping[str, Any]) -> dict[str, Any]:
        try:
            values = packed(given)
            most = min(_MOST_OWN + _MOST_EACH * _size(values), _MOST_TEXT)
            answer = self._pool.ask(task, self._key, None, None, most, values)
            if answer.get("unknown"):
                answer = self._pool.ask(task, self._key, self.source, self._tokens, most, values)
        except RecursionError:
            raise TemplateRefusal("nested too deeply") from None
        found = _result(answer)
        for note in found["notes"]:
            if note not in self._said:
                self._said.add(note)
                _log.warning(note)
        return found


def _given(
    messages: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
    date: TemplateDate,
    knowing_roles: bool,
) -> dict[str, Any]:
    return {
        "messages": list(messages),
        "add_generation_prompt": add_generation_prompt,
        "variables": variables,
        "day": date.day.isoformat(),
        "date_given": date.given,
        "knowing_roles": knowing_roles,
    }


def _size(value: Any) -> int:
    """Characters of the texts in a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(len(key) + _size(item) for key, item in value.items())
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _result(answer: Any) -> dict[str, Any]:
    """The result of an answer. Raises the error that it tells of."""
    if "pairs" in answer:
        raise PairsError(str(answer["pairs"]))
    if "model" in answer:
        raise ModelError(str(answer["model"]))
    if "refused" in answer:
        raise TemplateRefusal(str(answer["refused"]))
    if "fault" in answer:
        raise RuntimeError(f"in the child process of chat templates: {answer['fault']}")
    result: dict[str, Any] = answer["result"]
    return result


def _text(found: Mapping[str, Any]) -> str:
    return str(found["text"])


def _losses(found: Mapping[str, Any]) -> tuple[Loss, ...]:
    return tuple(Loss(int(index), str(role), bool(whole)) for index, role, whole in found["losses"])
