"""Renders prompts with a model's chat template, tokenizes them, and locates the tokens of a target."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, PairsError, UsageError
from ..pairs.pairs import Message, Side, last_exact_run, locate_target, target_tokens
from . import capi
from .loaded_model import open_model
from .reasoning_styles import ReasoningStyle, reasoning_style
from .thinking import thinking_arguments
from .tokenizing import tokenize

# Variables that Renderer gives to every template.
_OWN_ARGUMENTS = {"messages", "add_generation_prompt", "bos_token", "eos_token", "raise_exception", "strftime_now"}
_OWN_ARGUMENTS |= {"functions", "function_call", "tools", "tool_choice"}


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt as the model reads it, to be answered.

    `add_special`: the tokenizer puts its own tokens around the text. `style`: how the answer marks its reasoning, None:
    not at all. `has_control_markers`: control tokens are part of the answer's text, since markers in it are some.
    """

    text: str
    tokens: list[int]
    add_special: bool = False
    style: ReasoningStyle | None = None
    has_control_markers: bool = False


@dataclass(frozen=True)
class Prompt:
    """Tokens of one side of a pair up to the end of its target, and the indices of the target's tokens."""

    tokens: list[int]
    target: list[int]


@dataclass(frozen=True)
class LocatedTarget:
    """One side of a pair, rendered: text, byte range [start, end) of the target in it, tokens.

    `tokens` are those of the whole text, `target` the indices of the target's. `as_paper`: whether the rule of
    the paper's code (the last exact run of the target's own tokens) finds the same tokens; None: it finds none.
    """

    text: str
    start: int
    end: int
    tokens: list[int]
    target: list[int]
    as_paper: bool | None

    @property
    def n_needed(self) -> int:
        """Number of tokens up to the target's last one; later ones are not decoded."""
        return self.target[-1] + 1


class Renderer:
    """Renders and tokenizes for one loaded model (llama_cpp's `LlamaModel`).

    `thinking` sets the template's switch for thinking, if it has one; `template_arguments` are further variables for
    the template and win over the switch. Raises UsageError for variables that the renderer sets itself, ModelError for
    a model without a tokenizer.
    """

    def __init__(
        self, model: Any, *, thinking: bool = False, template_arguments: Mapping[str, Any] | None = None
    ) -> None:
        lib = capi.llama_cpp()
        if lib.llama_vocab_type(model.vocab) == lib.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp aborts on a text
            raise ModelError("the model has no tokenizer; only a model with a vocabulary reads texts")
        self._configure(thinking, template_arguments)
        self._model = model
        self._metadata: dict[str, str] = model.metadata()
        self._formatter: Any = None
        self._control: list[str] | None = None
        self._bytes: dict[int, bytes] = {}  # of the tokens seen so far

    def text(self, side: Side, *, generation_prompt: bool = False) -> str:
        """Text of the prompt: a plain text unchanged, messages through the model's chat template.

        `generation_prompt` adds the header of the assistant's turn. Raises PairsError when the model has no template,
        or the template refuses the messages.
        """
        if isinstance(side, str):
            return side
        if not self.has_template:
            raise PairsError("the model has no chat template; write the pairs' sides as plain texts")
        try:
            return self._render([message.to_dict() for message in side], generation_prompt)
        except Exception as error:  # a template is foreign code and may raise anything
            raise PairsError(f"the model's chat template refuses these messages: {error}") from error

    def render(self, prompt: str | Sequence[Message]) -> RenderedPrompt:
        """A text that is continued as it is, or a conversation that is answered.

        Raises ModelError (no template), UsageError (the template refuses the messages).
        """
        if isinstance(prompt, str):
            return RenderedPrompt(prompt, self.tokenize(prompt, add_special=True), add_special=True)
        return self.rendered(self.chat_text([message.to_dict() for message in prompt]))

    def rendered(self, text: str) -> RenderedPrompt:
        """A conversation whose text `chat_text` made, to be answered."""
        style = reasoning_style(self.template, text)
        has_control_markers = style is not None and self.any_control(style.markers)
        return RenderedPrompt(text, self.tokenize(text, add_special=False), False, style, has_control_markers)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Text of a conversation; each message has `role`, `content` and other fields that the template reads.

        `variables` (such as `tools`) go to the template besides `template_arguments`. Raises ModelError when the model
        has no template, UsageError when the template refuses the messages.
        """
        self.require_template()
        try:
            return self._render([dict(message) for message in messages], True, **variables)
        except Exception as error:  # as above
            raise UsageError(f"the model's chat template refuses this conversation: {_one_line(error)}") from error

    def require_template(self) -> None:
        """Raise ModelError when the model has no chat template."""
        if not self.has_template:
            raise ModelError(
                "the model has no chat template, so it cannot chat; have it continue a text with steermoe run --raw"
            )

    def _render(self, messages: list[dict[str, Any]], generation_prompt: bool, **variables: Any) -> str:
        formatter = self._chat_formatter(generation_prompt)
        return str(formatter(messages=messages, **variables, **self.template_arguments).prompt)

    def check_template(self) -> None:
        """Raise ModelError for a chat template that is no template."""
        self._chat_formatter(True)

    def configured(self, *, thinking: bool, template_arguments: Mapping[str, Any] | None = None) -> Renderer:
        """Another renderer of the same model. Raises UsageError, as the constructor."""
        other = copy.copy(self)
        other._configure(thinking, template_arguments)
        return other

    def _configure(self, thinking: bool, template_arguments: Mapping[str, Any] | None) -> None:
        if taken := sorted(_OWN_ARGUMENTS & set(template_arguments or {})):
            raise UsageError(f"template variables: {', '.join(taken)}: given by the program; leave them out")
        self._thinking = thinking
        self._template_arguments = dict(template_arguments or {})

    @property
    def has_template(self) -> bool:
        """Has the model a chat template?"""
        return "tokenizer.chat_template" in self._metadata

    @property
    def template(self) -> str:
        """The model's chat template, "" if it has none."""
        return self._metadata.get("tokenizer.chat_template", "")

    def prompt(self, side: Side, target: str) -> Prompt:
        """Tokens up to the target's last one, and the indices of the target's tokens.

        Attention is causal: later tokens cannot change the target's routing, so they are cut off.
        Raises PairsError when the target cannot be located.
        """
        found = self.located(side, target)
        return Prompt(found.tokens[: found.n_needed], found.target)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables that the template gets: its switches for thinking, and those given to the constructor."""
        switches = thinking_arguments(self.template, self._thinking)
        return switches | self._template_arguments

    def located(self, side: Side, target: str) -> LocatedTarget:
        """Render one side and find its target. Raises PairsError when it cannot be located."""
        text = self.text(side)
        # A chat template writes the beginning-of-text token itself, a plain text does not.
        tokens = self.tokenize(text, add_special=isinstance(side, str))
        pieces = self._pieces(tokens, text.encode("utf-8"))
        # "end" must not be found inside "<|im_end|>", unless the target names that token itself
        special = [name for name in self._control_tokens() if name not in target]
        start, end = locate_target(text, side, target, special)
        alone = self.tokenize(target, add_special=False)
        chosen = target_tokens(pieces, start, end, tokens, alone)
        if not chosen:
            raise PairsError(f"target {target!r}: the tokenizer leaves nothing of it")
        run = last_exact_run(tokens, alone)
        return LocatedTarget(text, start, end, tokens, chosen, None if run is None else list(run) == chosen)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Tokens of a text; with `parse_special` the names of special tokens in it become those tokens.

        Raises UsageError for a word of hundreds of thousands of characters, ResourceError (no memory for a long one).
        """
        pre = self._metadata.get("tokenizer.ggml.pre", "")
        return tokenize(self._model, text, pre=pre, add_special=add_special, parse_special=parse_special)

    def any_control(self, texts: Collection[str]) -> bool:
        """Is a control token in one of the texts? Those are detokenized only on request."""
        return any(name and name in text for text in texts for name in self._control_tokens())

    def _control_tokens(self) -> list[str]:
        """Texts of the vocabulary's control tokens, such as "<|im_end|>"."""
        if self._control is None:
            lib, vocab = capi.llama_cpp(), self._model.vocab
            self._control = [
                lib.llama_vocab_get_text(vocab, token).decode("utf-8", "replace")
                for token in range(lib.llama_vocab_n_tokens(vocab))
                if lib.llama_vocab_get_attr(vocab, token) & lib.LLAMA_TOKEN_ATTR_CONTROL
            ]
        return self._control

    def _pieces(self, tokens: list[int], text: bytes) -> list[bytes]:
        """Bytes of each token, so that they join to the text."""
        for token in set(tokens) - self._bytes.keys():
            self._bytes[token] = token_bytes(self._model, token, special=True)
        pieces = [self._bytes[token] for token in tokens]
        added = b"".join(pieces).find(text) if text else 0
        if added > 0:  # a BOS token or a blank that the tokenizer put before the text
            for index, piece in enumerate(pieces):
                cut = min(added, len(piece))
                pieces[index] = piece[cut:]
                added -= cut
                if not added:
                    break
        if not b"".join(pieces).startswith(text):
            raise PairsError(
                "the tokenizer changes this text, so the target cannot be located by its bytes; "
                "use another wording, without unusual blanks or characters"
            )
        return pieces

    def _chat_formatter(self, generation_prompt: bool) -> Any:
        if self._formatter is None:
            from llama_cpp.llama_chat_format import Jinja2ChatFormatter

            eos, bos = self._model.token_eos(), self._model.token_bos()
            try:
                self._formatter = Jinja2ChatFormatter(
                    template=self.template,
                    eos_token=self._model.token_get_text(eos) if eos != -1 else "",
                    bos_token=self._model.token_get_text(bos) if bos != -1 else "",
                )
            except Exception as error:
                raise ModelError(f"the model's chat template cannot be read: {_one_line(error)}") from error
        self._formatter.add_generation_prompt = generation_prompt
        return self._formatter


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def token_bytes(model: Any, token: int, special: bool) -> bytes:
    """Bytes of a token of a `LlamaModel`; a control token has some only if `special`."""
    size = 64
    while True:
        buffer = ctypes.create_string_buffer(size)
        n = capi.llama_cpp().llama_token_to_piece(model.vocab, token, buffer, size, 0, special)
        if n >= 0:
            return buffer.raw[:n]
        size = -n


def vocabulary(path: str | os.PathLike[str], *, verbose: bool = False) -> AbstractContextManager[Any]:
    """Load only the vocabulary and metadata of a GGUF file, enough to render and tokenize (`LlamaModel`).

    Raises ModelError.
    """
    return open_model(path, verbose=verbose, vocab_only=True)


@contextlib.contextmanager
def vocabulary_renderer(
    path: str | os.PathLike[str],
    *,
    thinking: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> Iterator[Renderer]:
    """A renderer for a model of which only the vocabulary is loaded. Raises ModelError, UsageError."""
    with vocabulary(path, verbose=verbose) as model:
        yield Renderer(model, thinking=thinking, template_arguments=template_arguments)
