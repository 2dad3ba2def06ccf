"""The chat templates of the pinned llama.cpp tree, rendered as transformers renders them."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import SandboxedEnvironment

from tests.support.paths import BUILD

FOLDER = BUILD / "llama.cpp" / "models" / "templates"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))

BOS, EOS = "<BOS>", "<EOS>"


class _Generation(Extension):
    """{% generation %}...{% endgeneration %} marks what an assistant wrote; here it is its text."""

    tags: ClassVar = {"generation"}

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, **options: Any) -> str:
    # llama.cpp's filter takes generators
    return json.dumps(value, default=list, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _today(form: str) -> str:
    return datetime.date(2026, 1, 2).strftime(form)


@functools.cache
def _environment() -> jinja2.Environment:
    environment = SandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _today}
    return environment


@functools.cache
def source(name: str) -> str:
    """The text of a template."""
    return (FOLDER / f"{name}.jinja").read_text("utf-8")


@functools.cache
def _compiled(name: str) -> jinja2.Template:
    return _environment().from_string(source(name))


def render(name: str, messages: Sequence[dict[str, Any]], *, answer: bool, **variables: Any) -> str:
    """A conversation through a template, to be answered or not. Raises what the template raises."""
    messages = [dict(message) for message in messages]
    return _compiled(name).render(
        messages=messages, add_generation_prompt=answer, bos_token=BOS, eos_token=EOS, **variables
    )
