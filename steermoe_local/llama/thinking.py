"""Switches by which chat templates turn thinking on and off, and how much of it they ask for."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, TypeVar

from . import capi


@dataclass(frozen=True)
class Switch:
    """A variable of chat templates, and its values for thinking on and off; None: it is left out.

    The entry counts for a template that reads the variable and in which the regular expression `where` is found.
    """

    variable: str
    on: Any
    off: Any
    where: str = ""


# Of a variable's entries the first whose `where` is found counts.
SWITCHES = (
    Switch("enable_thinking", True, False),  # Qwen3, GLM, SmolLM3, Nemotron 3, gemma-4, ...
    Switch("thinking", True, False),  # DeepSeek, Granite, Kimi-K3
    Switch("thinking_mode", "enabled", "disabled", where="['\"]disabled['\"]"),  # MiniMax-M3
    Switch("thinking_budget", None, 0),  # Seed-OSS
    Switch("reasoning_effort", "high", "no_think", where="['\"]no_think['\"]"),  # Hy3, which does not think by default
    Switch("reasoning_effort", None, "none", where="['\"]none['\"]"),  # Cohere 2
    Switch("reasoning_effort", None, "low"),  # gpt-oss: "low" is the least; Solar: "low" closes the block at once
    Switch("reasoning_strength", None, "low"),  # Muse: as gpt-oss
)


@dataclass(frozen=True)
class Effort:
    """A variable that says how much a model thinks, and the values it takes, from little to much; () takes any."""

    variable: str
    levels: tuple[str, ...] = ()
    where: str = ""


EFFORTS = (
    Effort("reasoning_effort", ("low", "high"), where="['\"]no_think['\"]"),  # Hy3
    Effort("reasoning_effort"),
    Effort("reasoning_strength"),
    Effort("thinking_effort", ("low", "high", "max")),  # Kimi-K3
)

_SCALE = ("minimal", "low", "medium", "high", "xhigh", "max")  # OpenAI's names, and max

E = TypeVar("E", Switch, Effort)

# Fields of an assistant's message that hold reasoning.
_FIELDS = {"reasoning_content", "reasoning", "thinking", "thoughts"}


def thinking_arguments(template: str, thinking: bool) -> dict[str, Any]:
    """The variables by which a chat template turns thinking on or off; {} when it reads none of those known."""
    arguments = {}
    for entry in _of_template(template, SWITCHES):
        value = entry.on if thinking else entry.off
        if value is not None:
            arguments[entry.variable] = value
    return arguments


def effort_arguments(template: str, effort: str) -> dict[str, Any]:
    """The variables by which a chat template is told how much to think, in the values that it takes.

    Of fixed values the one nearest to `effort` is taken, of two the greater one.
    """
    return {entry.variable: _nearest(effort, entry.levels) for entry in _of_template(template, EFFORTS)}


def mentions_reasoning(template: str) -> bool:
    """Whether a chat template has a switch for thinking, or reads the reasoning of an assistant's message."""
    variables, fields = _names(template)
    return bool(_FIELDS & fields or {entry.variable for entry in (*SWITCHES, *EFFORTS)} & variables)


def _of_template(template: str, table: tuple[E, ...]) -> list[E]:
    variables, _ = _names(template)
    found: dict[str, E] = {}
    for entry in table:
        if entry.variable in variables and entry.variable not in found and re.search(entry.where, template):
            found[entry.variable] = entry
    return list(found.values())


def _nearest(effort: str, levels: tuple[str, ...]) -> str:
    if not levels or effort in levels or effort not in _SCALE:
        return effort
    wanted = _SCALE.index(effort)
    return min(reversed(levels), key=lambda level: abs(_SCALE.index(level) - wanted))


@functools.cache
def _names(template: str) -> tuple[frozenset[str], frozenset[str]]:
    """(undeclared variables, attributes and keys that are read); nothing of a template that cannot be parsed."""
    capi.llama_cpp()  # sets the library path, so it comes before other imports of llama_cpp
    import jinja2
    from jinja2 import meta, nodes
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    extensions = [Jinja2ChatFormatter.IgnoreGenerationTags, "jinja2.ext.loopcontrols"]
    try:
        tree = jinja2.Environment(extensions=extensions).parse(template)
        variables = frozenset(meta.find_undeclared_variables(tree))
        fields = {node.attr for node in tree.find_all(nodes.Getattr)}
        fields |= {node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)}
    except (jinja2.TemplateSyntaxError, RecursionError):
        return frozenset(), frozenset()  # rendering reports the error
    return variables, frozenset(field for field in fields if isinstance(field, str))
