"""One chat template on one vocabulary, loaded without weights, and what must hold of its renderings and targets."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import TypeAdapter

from steermoe_local.detection.pair_check import Checker
from steermoe_local.errors import PairsError
from steermoe_local.llama.rendering import Renderer, vocabulary_renderer
from steermoe_local.pairs.pairs import Message, Pair
from steermoe_local.server.prompting import Prompter
from steermoe_local.server.schemas_chat import ChatRequest
from tests.integration.rehearsal import oracles
from tests.integration.rehearsal.archive import templates
from tests.integration.rehearsal.conversations import PLAIN, RENDERINGS, TARGETS
from tests.integration.rehearsal.families import family, fitted
from tests.integration.rehearsal.gguf_files import Vocabulary, write_vocabulary
from tests.integration.rehearsal.oracles import Refused

_REQUEST = TypeAdapter(ChatRequest)


@dataclass
class Desk:
    """A template, its file and the renderers of it."""

    name: str
    template: str
    vocab: Vocabulary
    path: Path
    renderer: Renderer
    plain: bool = False  # the right renderings without transformers

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        name: str,
        folder: Path,
        vocab: str | Vocabulary = "",
        template: str | None = None,
        plain: bool = False,
    ) -> Iterator[Desk]:
        """Write and load the file; by default the archive's template on the vocabulary of its family."""
        template = templates()[name] if template is None else template
        found = vocab if isinstance(vocab, Vocabulary) else fitted(vocab or family(name), template)
        path = write_vocabulary(folder / f"{name}-{found.name}.gguf", found, template)
        with vocabulary_renderer(path) as renderer:
            yield cls(name, template, found, path, renderer, plain)
        path.unlink()

    @property
    def model(self) -> Any:
        """llama_cpp's `LlamaModel`."""
        return self.renderer._model

    #
    # the right values
    #

    def expected(self, messages: oracles.Messages, **variables: Any) -> str:
        """transformers' rendering, with the thinking switch of the renderer. Raises Refused."""
        texts = {f"{kind}_token": self.vocab.text(kind) for kind in ("bos", "eos")}
        day = self.today()
        return oracles.rendered(
            self.template, messages, on=day, plain=self.plain, **texts, **self.renderer.template_arguments, **variables
        )

    def today(self) -> date:
        """The day that the templates are told."""
        return date.today()

    @property
    def refuses_all(self) -> bool:
        """Does the template need variables that only llama.cpp gives it?"""
        return self.refuses(RENDERINGS["one question"][0])

    def refuses_system(self) -> bool:
        """Does the template refuse a system message?"""
        return not self.refuses_all and self.refuses(RENDERINGS["a system message"][0])

    def refuses(self, messages: oracles.Messages) -> bool:
        """Does the template refuse a conversation?"""
        try:
            self.expected(messages)
        except Refused:
            return True
        return False

    def right_messages(self, messages: oracles.Messages) -> oracles.Messages:
        """The messages as the template must get them: system merged where it is refused, developer where unknown."""
        found = list(messages)
        if found[0]["role"] == "developer":
            try:
                text = self.expected(found, add_generation_prompt=True)
            except Refused:
                text = ""
            # a template that takes any role would show the text too, under a role that its model was not trained on
            if "developer" not in self.template or found[0]["content"] not in text:
                found[0] = dict(found[0]) | {"role": "system"}
        if found[0]["role"] == "system" and self.refuses_system():
            return oracles.merged(found) or found
        return found

    #
    # checks; each raises AssertionError with what differs
    #

    def right_prompt(self, case: str) -> str:
        """transformers' rendering of a request. Raises Refused."""
        messages, tools = RENDERINGS[case]
        right = self.right_messages(messages)
        try:
            return self.expected(_parsed(right), add_generation_prompt=True, tools=tools)
        except Refused:
            return self.expected(right, add_generation_prompt=True, tools=tools)  # arguments as a text

    def refuses_request(self, case: str) -> bool:
        """Does the template refuse a request, in transformers' environment?"""
        try:
            self.right_prompt(case)
        except Refused:
            return True
        return False

    def knows_no_tools(self) -> bool:
        """Does the template say that it takes no role of tools?"""
        try:
            self.right_prompt("a tool round")
        except Refused as refused:
            return refused.said
        return False

    def check_rendering(self, case: str) -> None:
        """A request's prompt is transformers' rendering of it, and so are its tokens' bytes.

        What transformers refuses llama.cpp may render: see test_answers.
        """
        try:
            text = self.right_prompt(case)
        except Refused:
            return
        found = self.prompt(*RENDERINGS[case])
        assert found.text == text, f"{case}: another text than transformers': {_difference(found.text, text)}"
        oracles.offsets(self.model, found.tokens, found.text)

    def prompt(self, messages: oracles.Messages, tools: Any = None) -> Any:
        """The prompt of a chat request, as the server makes it."""
        engine = SimpleNamespace(renderer=self.renderer, model=self.model, n_ctx=1 << 20)
        prompter = Prompter(engine, thinking=False, template_arguments={})  # type: ignore[arg-type]
        body = {"model": "m", "messages": list(messages)} | ({"tools": tools} if tools else {})
        try:
            return prompter.chat(_REQUEST.validate_python(body)).rendered
        finally:
            prompter.close()

    def check_target(self, case: str) -> None:
        """A target is at the bytes where a sentinel comes out, and its tokens are those that share a byte with it.

        Where the template drops or changes the text, it must not be located.
        """
        messages, target = TARGETS[case]
        side = tuple(Message(message["role"], message["content"]) for message in messages)
        right = self.right_messages(messages)
        render = self._own if self.refuses_all else self.expected
        try:
            text = render(right)
            where = oracles.place(render, right, target)
        except Refused:
            text, where = "", None
        if where is None or self.unreadable(text):
            try:
                found = self.renderer.located(side, target)
            except PairsError:
                return
            raise AssertionError(f"{case}: the template drops {target!r}, and it is found at {found.start}")
        found = self.renderer.located(side, target)
        assert found.text == text, f"{case}: {_difference(found.text, text)}"
        assert (found.start, found.end) == where, f"{case}: at {found.start}, right is {where[0]}"
        tokens = oracles.tokens_at(self.model, found.tokens, text, where)
        assert list(found.target) == tokens, f"{case}: tokens {list(found.target)}, right are {tokens}"

    def unreadable(self, text: str) -> bool:
        """Has the vocabulary no tokens for a part of the text? Only a Unigram one may."""
        unknown = self.vocab.scalars.get("tokenizer.ggml.unknown_token_id")
        return self.vocab.model == "t5" and unknown in self.renderer.tokenize(text, add_special=False)

    def _own(self, messages: oracles.Messages) -> str:
        try:
            return self.renderer.text(tuple(Message(message["role"], message["content"]) for message in messages))
        except PairsError as error:
            raise Refused(str(error)) from error

    def own_text(self) -> str:
        """The product's rendering of a question."""
        return self.renderer.chat_text(RENDERINGS["one question"][0])

    def check_plain(self, case: str) -> None:
        """The same for a plain text."""
        text, target = PLAIN[case]
        if self.unreadable(text):
            with pytest.raises(PairsError):
                self.renderer.located(text, target)
            return
        found = self.renderer.located(text, target)
        where = oracles.place_in_text(text, target)
        assert (found.start, found.end) == where
        tokens = oracles.tokens_at(self.model, found.tokens, text, where)
        assert list(found.target) == tokens, f"{case}: tokens {list(found.target)}, right are {tokens}"

    def lost(self) -> list[str]:
        """Messages of a conversation that the template leaves out, by their text; [] where it refuses it."""
        messages = _LOSSES
        try:
            text = self.expected(self.right_messages(messages))
        except Refused:
            return []
        return [message["content"] for message in messages if message["content"] not in text]

    def check_losses(self) -> None:
        """A message that the template leaves out is named by `pairs check`."""
        side = tuple(Message(message["role"], message["content"]) for message in _LOSSES)
        pair = Pair("lossy", side, side, "grapes", "grapes")
        lost = [text for text in self.lost() if "grapes" not in text]
        if not lost:
            return
        with Checker(self.path) as checker:
            checked = checker.check(pair)
        said = [*checked.problems(), *((s, w) for s, w in checked.warnings() if "both sides" not in w)]
        assert said, f"lost without a word: {lost}"

    def check_thinking(self) -> None:
        """With thinking off no block of thoughts is left open unless it is known; its markers are known."""
        messages = RENDERINGS["one question"][0]
        if self.refuses_all:
            return
        for thinking in (False, True):
            renderer = self.renderer.configured(thinking=thinking)
            text = renderer.chat_text(messages)
            rendered = renderer.rendered(text)
            opened = open_marker(text)
            if opened:
                assert rendered.style is not None, f"the prompt ends inside {opened}, which is unknown"
                assert rendered.style.prefix, f"the prompt ends inside {opened}, which is not seen"
        known = [marker for marker, _ in THOUGHTS if marker in self.template]
        if known:
            assert rendered.style is not None, f"{known[0]} is unknown"

    def check_date(self) -> None:
        """A template that prints the day prints the one that is asked for."""
        one, two = date(2024, 2, 29), date(2025, 12, 1)
        if not self.dated():
            return
        messages = RENDERINGS["one question"][0]
        texts = [self.on(day).chat_text(messages) for day in (one, two)]
        assert texts[0] != texts[1]
        texts_ = {f"{kind}_token": self.vocab.text(kind) for kind in ("bos", "eos")}
        for day, text in zip((one, two), texts, strict=True):
            variables = texts_ | self.renderer.template_arguments
            right = oracles.rendered(self.template, messages, on=day, add_generation_prompt=True, **variables)
            assert text == right, f"{day}: {_difference(text, right)}"

    def on(self, day: date) -> Renderer:
        """A renderer that tells templates another day."""
        return self.renderer.configured(thinking=False, date=day)  # type: ignore[call-arg]

    def dated(self) -> bool:
        """Does the template print the day?"""
        messages = RENDERINGS["one question"][0]
        texts = {f"{kind}_token": self.vocab.text(kind) for kind in ("bos", "eos")}
        days = (date(2024, 2, 29), date(2025, 12, 1))
        if self.refuses_all:
            return False
        return len({oracles.rendered(self.template, messages, on=day, **texts) for day in days}) == 2


_LOSSES = [
    {"role": "system", "content": "You like sour plums."},
    {"role": "user", "content": "Name a fruit with a skin."},
    {"role": "assistant", "content": "Ripe bananas have one."},
    {"role": "user", "content": "Another one, please."},
    {"role": "assistant", "content": "Sweet grapes."},
]

# Opening and closing markers of thoughts in the archive's templates.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<mm:think>", "</mm:think>"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|think|>", "<|end|>"),
)


def open_marker(prompt: str) -> str:
    """The marker of thoughts that a prompt ends inside of; "" if it does not."""
    tail = prompt[-200:]
    return next((o for o, c in THOUGHTS if prompt.rfind(o) > prompt.rfind(c) and tail.rstrip().endswith(o)), "")


def _parsed(messages: oracles.Messages) -> list[dict[str, Any]]:
    found = []
    for message in messages:
        copied = dict(message)
        if calls := copied.get("tool_calls"):
            copied["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
                for call in calls
            ]
        found.append(copied)
    return found


def _difference(found: str, right: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(found, right, strict=False)) if a != b), min(len(found), len(right)))
    return f"{found[max(0, at - 40) : at + 40]!r}, right is {right[max(0, at - 40) : at + 40]!r}"


def names() -> Sequence[str]:
    """All templates."""
    return list(templates())
