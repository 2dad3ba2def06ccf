"""llama-cpp-python's chat completions (`create_chat_completion`), rendered as everything else in this package is."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import capi
from .template_client import BoundedTemplate, TemplateRefusal
from .template_date import AnyDate, template_date

if not TYPE_CHECKING:
    capi.llama_cpp()  # sets the library path, so it comes before other imports of llama_cpp
from llama_cpp import llama_chat_format


class _Template:
    """What a formatter asks for its prompts, with the interface of jinja2's `Template`.

    The template is compiled when it is first needed: a model whose template is none can still continue texts.
    """

    def __init__(self, source: str, tokens: Mapping[str, str], date: AnyDate) -> None:
        self._source, self._tokens, self._date = source, tokens, date

    @functools.cached_property
    def _compiled(self) -> BoundedTemplate:
        return BoundedTemplate(self._source, self._tokens)

    def render(
        self,
        *,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        strftime_now: Any,
        raise_exception: Any,
        **variables: Any,
    ) -> str:
        """The prompt. Raises ModelError for a template that is none, UsageError when it refuses the messages."""
        given = {name: value for name, value in variables.items() if value is not None}
        template = self._compiled
        try:
            return template.text(
                messages,
                add_generation_prompt=add_generation_prompt,
                variables=given,
                date=template_date(self._date),
                knowing_roles=False,
            )
        except TemplateRefusal as error:
            raise UsageError(f"the model's chat template refuses this conversation: {error}") from error


@contextmanager
def own_rendering(date: AnyDate) -> Iterator[None]:
    """Let what this thread loads with `llama_cpp.Llama` inside render chats by `BoundedTemplate`.

    `date` is for templates that print one; None: the day of each request.
    """
    thread = threading.get_ident()
    with _patching:
        theirs = llama_chat_format.Jinja2ChatFormatter

        @functools.wraps(theirs)  # with the attributes of the class: its own code asks for them by its name
        def formatter(template: str, eos_token: str, bos_token: str, **keywords: Any) -> Any:
            mine = threading.get_ident() == thread
            made = theirs("" if mine else template, eos_token, bos_token, **keywords)
            if mine:
                tokens = {"eos_token": eos_token, "bos_token": bos_token}
                made.template, made._environment = template, _Template(template, tokens, date)
            return made

        llama_chat_format.Jinja2ChatFormatter = formatter
        try:
            yield
        finally:
            llama_chat_format.Jinja2ChatFormatter = theirs


_patching = threading.RLock()
