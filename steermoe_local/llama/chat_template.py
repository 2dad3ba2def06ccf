"""A chat template compiled with the settings that transformers gives Jinja, in a sandbox.

The sandbox keeps a template from the machine, not from its time and memory: the package comes here in a child process
alone (`template_worker`), and the rest of it asks `template_client`.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment

from ..errors import ModelError
from .template_date import CLOCK, TemplateDate, date_variables, template_date
from .template_messages import MessageForms, Messages, merged_system

_log = logging.getLogger("steermoe.prompts")

_MOST = 1 << 24  # elements or characters that an operator may make at once


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}`, by which transformers marks what an assistant says; here its text alone counts."""

    tags = {"generation"}  # noqa: RUF012 # jinja2 declares it so

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment, in which `append` and `pop` of lists work, as in llama.cpp (templates of Kimi-K2).

    What is appended to is the template's own, or a copy. A list gets no longer than a `range` may be, so that no loop
    over a list that it extends runs for ever. No operator makes a value that fills the memory.
    """

    intercepted_binops = frozenset(("*", "**", "%"))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """May a template read this attribute?"""
        return (isinstance(obj, list) and attr in ("append", "pop")) or super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls. Raises SecurityError for a list that gets too long."""
        own = getattr(obj, "__self__", None)
        if isinstance(own, list) and getattr(obj, "__name__", "") == "append" and len(own) >= MAX_RANGE:
            raise SecurityError(f"a list of more than {MAX_RANGE} elements")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an intercepted operator. Raises SecurityError for one that would be too large."""
        for one, other in ((left, right), (right, left)):
            if operator == "*" and isinstance(one, int) and isinstance(other, (str, list, tuple)):
                _require_small(one * len(other))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            _require_small(abs(left).bit_length() * right)
        if operator == "%" and isinstance(left, str):
            _require_small(max(map(int, re.findall(r"\d{1,18}", left)), default=0))  # widths
        return super().call_binop(context, operator, left, right)


def _require_small(size: int) -> None:
    if size > _MOST:
        raise SecurityError(f"a value of {size} elements or bits")


class _Lenient(_Sandbox):
    """The sandbox with llama.cpp's view of what is undefined or none: nothing, in a sum with a text."""

    intercepted_binops = _Sandbox.intercepted_binops | {"+"}

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The sum of two values."""
        for one, other in ((left, right), (right, left)) if operator == "+" else ():
            if (one is None or isinstance(one, jinja2.Undefined)) and isinstance(other, str):
                return other
        return super().call_binop(context, operator, left, right)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers writes it, without escapes for HTML; a generator (of `map`, `select`) becomes a list."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys, default=_as_list
    )


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Iterable) and not isinstance(value, (jinja2.Undefined, bytes)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


@functools.cache
def _environment(lenient: bool = False) -> _Sandbox:
    environment = (_Lenient if lenient else _Sandbox)(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.ChainableUndefined if lenient else jinja2.Undefined,
        optimized=False,  # nothing of a template runs while it is only looked at
        extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


class ChatTemplate:
    """A compiled chat template. `tokens` are variables such as `bos_token`.

    What it changes in messages it says once, as a warning of the logger "steermoe.prompts".

    Raises ModelError for a text that is no template.
    """

    def __init__(self, source: str, tokens: Mapping[str, Any]) -> None:
        self.source = source
        self._tokens = dict(tokens)
        self._said: set[str] = set()
        try:
            self._compiled = _environment().from_string(source)
        except Exception as error:  # a template is foreign code, and may bring Python's compiler to any error
            raise ModelError(
                f"the model's chat template cannot be read: {one_line(error)}; do without it: steermoe run --raw, or "
                "plain texts as the sides of pairs"
            ) from error

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        date: TemplateDate,
    ) -> str:
        """The text of messages, which are first brought into the form that the template takes.

        System messages that it refuses go in front of the user's next one, as in llama.cpp. Raises whatever the
        template does.
        """

        def rendered(attempt: Sequence[Mapping[str, Any]], other_arguments: bool = False) -> str:
            fitted = self.forms.fitted(attempt, other_arguments=other_arguments)
            return self.render(fitted, add_generation_prompt=add_generation_prompt, variables=variables, date=date)

        merged = merged_system(messages)
        if merged is not None and self.forms.refuses_system:
            messages = merged
            self._say(
                "the model's chat template takes no system message; it is put in front of the user's next message, as "
                "llama-server does"
            )
        try:
            return rendered(messages)
        except Exception:
            # the probe of calls does not see all that a template may do with arguments
            if any(message.get("tool_calls") for message in messages):
                with contextlib.suppress(Exception):
                    return rendered(messages, other_arguments=True)
            raise

    def _say(self, warning: str) -> None:
        if warning not in self._said:
            self._said.add(warning)
            _log.warning(warning)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        date: TemplateDate,
    ) -> str:
        """The text of messages as they are. The template's clock stands at the beginning of `date`.

        Raises whatever the template does.
        """
        strftime_now = datetime.datetime.combine(date.day, datetime.time()).strftime
        names = names_of(self.source)
        variables = {**date_variables(names["variables"], names["guarded"], date), **variables}

        values = {**self._tokens, CLOCK: strftime_now, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            return self._compiled.render(values, messages=copy.deepcopy(messages))
        except (jinja2.UndefinedError, TypeError):
            # where transformers gives up, as llama.cpp does it
            try:
                return self._lenient.render(values, messages=messages)
            except MemoryError:
                raise
            except Exception:
                pass
            raise

    @functools.cached_property
    def _lenient(self) -> jinja2.Template:
        return _environment(lenient=True).from_string(self.source)

    @functools.cached_property
    def forms(self) -> MessageForms:
        """In which form the template takes messages."""
        today = template_date(None)

        def render(messages: Messages, tools: list[dict[str, Any]] | None) -> str:
            variables = {"tools": tools} if tools else {}
            return self.render(messages, add_generation_prompt=True, variables=variables, date=today)

        return MessageForms(render)


@functools.lru_cache(maxsize=64)
def names_of(source: str) -> dict[str, frozenset[str]]:
    """Names in a template; none of any for one that cannot be read.

    "variables": those that it reads and does not set; "fields": attributes and keys that it reads of any value;
    "guarded": variables that it can do without: it asks whether they are defined, or gives them a default.
    """
    try:
        tree = _environment().parse(source)
        variables = frozenset(meta.find_undeclared_variables(tree))
    except MemoryError:
        raise
    except Exception:  # whoever renders it reports the error
        return dict.fromkeys(("variables", "fields", "guarded"), frozenset())
    fields: set[Any] = {node.attr for node in tree.find_all(nodes.Getattr)}
    fields |= {node.arg.value for node in tree.find_all(nodes.Getitem) if isinstance(node.arg, nodes.Const)}
    asked = [*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter)]
    guards = ("defined", "undefined", "default", "d")
    guarded = frozenset(node.node.name for node in asked if node.name in guards and isinstance(node.node, nodes.Name))
    return {
        "variables": variables,
        "fields": frozenset(field for field in fields if isinstance(field, str)),
        "guarded": guarded,
    }


def one_line(error: Exception) -> str:
    """The message of an error of a template, shortened to one line."""
    if isinstance(error, RecursionError):  # Python has several messages, by the place where it gives up
        return "nested too deeply"
    text = " ".join(str(error).split())[:300].encode("utf-8", "replace").decode("utf-8")
    return text or type(error).__name__
