"""Switches by which chat templates turn thinking on and off, and how much of it they ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .template_client import template_names


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


# Variables that say how much a model thinks.
EFFORTS = ("reasoning_effort", "reasoning_strength", "thinking_effort")

_SCALE = ("minimal", "low", "medium", "high", "xhigh", "max")  # OpenAI's names, and max

# Fields of an assistant's message that hold reasoning.
_FIELDS = {"reasoning_content", "reasoning", "thinking", "thoughts"}


def thinking_arguments(template: str, thinking: bool) -> dict[str, Any]:
    """The variables by which a chat template turns thinking on or off; {} when it reads none of those known."""
    variables, _ = template_names(template)
    read: set[str] = set()
    arguments = {}
    for switch in SWITCHES:
        if switch.variable in variables - read and re.search(switch.where, template):
            read.add(switch.variable)
            value = switch.on if thinking else switch.off
            if value is not None:
                arguments[switch.variable] = value
    return arguments


def effort_arguments(template: str, effort: str) -> dict[str, Any]:
    """The variables by which a chat template is told how much to think.

    Of a template that takes certain values alone the one nearest to `effort` is chosen, of two the greater one.
    """
    variables, _ = template_names(template)
    return {name: _nearest(effort, _levels(template, name)) for name in EFFORTS if name in variables}


def mentions_reasoning(template: str) -> bool:
    """Whether a chat template has a switch for thinking, or reads the reasoning of an assistant's message."""
    variables, fields = template_names(template)
    return bool(_FIELDS & fields or {*EFFORTS, *(switch.variable for switch in SWITCHES)} & variables)


def _levels(template: str, variable: str) -> list[str]:
    """The values of OpenAI's scale that a template takes, if it refuses others, from little to much."""
    found = re.search(rf"\b{variable}\s+not\s+in\s*[\[(]([^\])]{{0,400}})[\])]", template)
    values = re.findall(r"['\"](\w+)['\"]", found[1]) if found else []
    return sorted((value for value in values if value in _SCALE), key=_SCALE.index)


def _nearest(effort: str, levels: list[str]) -> str:
    if not levels or effort in levels or effort not in _SCALE:
        return effort
    wanted = _SCALE.index(effort)
    return min(reversed(levels), key=lambda level: abs(_SCALE.index(level) - wanted))
