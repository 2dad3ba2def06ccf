"""Renders prompts with a model's chat template, tokenizes them, and locates the tokens of a target."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..errors import ModelError, PairsError, SteerMoEError, UsageError
from ..pairs.pairs import Message, Side, last_exact_run
from . import capi, prefill
from .aligning import Aligner, Span, tokens_in_span
from .loaded_model import open_model
from .locating import find_in_text
from .reasoning_styles import ReasoningStyle, reasoning_style
from .special_tokens import SpecialTokens
from .template_client import BoundedTemplate, TemplateRefusal, template_variables
from .template_date import AnyDate, TemplateDate, template_date
from .thinking import thinking_arguments
from .tokenizing import tokenize

_log = logging.getLogger("steermoe.prompts")

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
    `losses` says what texts of messages the chat template leaves out: recording refuses such a side. `notes` are
    further warnings.
    """

    text: str
    start: int
    end: int
    tokens: list[int]
    target: list[int]
    as_paper: bool | None
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def n_needed(self) -> int:
        """Number of tokens up to the target's last one; later ones are not decoded."""
        return self.target[-1] + 1


class Renderer:
    """Renders and tokenizes for one loaded model (llama_cpp's `LlamaModel`).

    `thinking` sets the template's switch for thinking, if it has one; `template_arguments` are further variables for
    the template and win over the switch. `date` is for templates that print one; None: that of today, which stays as it
    was when the renderer was made.

    What is changed for the template's sake is said once, as a warning of the logger "steermoe.prompts".

    Raises UsageError for variables that the renderer sets itself, ModelError for a model without a tokenizer.
    """

    def __init__(
        self,
        model: Any,
        *,
        thinking: bool = False,
        template_arguments: Mapping[str, Any] | None = None,
        date: AnyDate = None,
    ) -> None:
        lib = capi.llama_cpp()
        if lib.llama_vocab_type(model.vocab) == lib.LLAMA_VOCAB_TYPE_NONE:  # llama.cpp aborts on a text
            raise ModelError("the model has no tokenizer; only a model with a vocabulary reads texts")
        self._configure(thinking, template_arguments, template_date(date))
        self._model = model
        self._metadata: dict[str, str] = model.metadata()
        self._special = SpecialTokens(model)
        self._aligner = Aligner(model, self._metadata)
        self._said: set[str] = set()  # shared with `configured` ones
        self._compiled: list[BoundedTemplate] = []  # the template, once it is needed; shared with `configured` ones

    def text(self, side: Side, *, generation_prompt: bool = False) -> str:
        """Text of the prompt: a plain text unchanged, messages through the model's chat template.

        `generation_prompt` adds the header of the assistant's turn. Raises PairsError when the model has no template,
        or the template refuses the messages, or cannot be read.
        """
        if isinstance(side, str):
            return side
        messages: list[dict[str, Any]] = [message.to_dict() for message in side]
        template = self._side_template()
        with _refusals(PairsError, "these messages"):
            return template.text(
                messages,
                add_generation_prompt=generation_prompt,
                variables=self.template_arguments,
                date=self._date,
            )

    def _side_template(self) -> BoundedTemplate:
        """The template for the sides of pairs. Raises PairsError."""
        if not self.has_template:
            raise PairsError("the model has no chat template; write the pairs' sides as plain texts")
        try:
            return self._chat_template
        except ModelError as error:
            raise PairsError(str(error)) from error

    def render(self, prompt: str | Sequence[Message]) -> RenderedPrompt:
        """A text that is continued as it is, or a conversation that is answered; the assistant's message at its end,
        if it ends so, is continued.

        Raises ModelError (no template), UsageError (the template refuses the messages).
        """
        if isinstance(prompt, str):
            return RenderedPrompt(prompt, self.tokenize(prompt, add_special=True), add_special=True)
        messages = [message.to_dict() for message in prompt]
        if not messages or messages[-1]["role"] != "assistant":
            return self.rendered(self.chat_text(messages))
        last = messages.pop()
        return self.continued(self.chat_text(messages), last.get("reasoning_content") or "", last["content"])

    def continued(self, text: str, reasoning: str, content: str, *, in_answer: bool = False) -> RenderedPrompt:
        """A conversation whose text `chat_text` made, and the beginning of its answer, to be continued (`prefill`).

        Raises UsageError for reasoning alone if its markers are not known.
        """
        style = reasoning_style(self.template, text)
        text, prefix = prefill.continued(text, style, reasoning, content, in_answer=in_answer)
        found = self.rendered(text)
        if prefix is None or found.style is None:
            return found
        return dataclasses.replace(found, style=dataclasses.replace(found.style, prefix=prefix))

    def rendered(self, text: str) -> RenderedPrompt:
        """A conversation whose text `chat_text` made, to be answered."""
        style = reasoning_style(self.template, text)
        has_control_markers = style is not None and self.any_control(style.markers)
        return RenderedPrompt(text, self.tokenize(text, add_special=False), False, style, has_control_markers)

    def chat_text(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Text of a conversation; each message has `role`, `content` and other fields that the template reads.

        Content is a text or a list of parts; arguments of calls are a text or an object. The template gets them in the
        form that it takes. `variables` (such as `tools`) go to the template besides `template_arguments`, None is left
        out. A developer's message becomes a system message where the template does not know the role. What text the
        template leaves out is said once.

        Raises ModelError when the model has no template, or one that is none, UsageError when the template refuses the
        messages.
        """
        self.require_template()
        template = self._chat_template
        given = {name: value for name, value in variables.items() if value is not None}
        with _refusals(UsageError, "this conversation"):
            text, losses = template.text_and_losses(
                messages,
                add_generation_prompt=True,
                variables={**given, **self.template_arguments},
                date=self._date,
            )
        for loss in losses:
            # templates drop an earlier reply's reasoning by design, and write a tool's result as they need it
            if loss.whole or loss.role in ("system", "developer", "user"):
                self._say(str(loss))
        return text

    def require_template(self) -> None:
        """Raise ModelError when the model has no chat template."""
        if not self.has_template:
            raise ModelError(
                "the model has no chat template, so it cannot chat; have it continue a text with steermoe run --raw"
            )

    def _say(self, warning: str) -> None:
        """Log a warning once."""
        if warning not in self._said:
            self._said.add(warning)
            _log.warning(warning)

    def check_template(self) -> None:
        """Raise ModelError for a chat template that is no template."""
        _ = self._chat_template

    @property
    def reasoning_field(self) -> str | None:
        """Field of a message in which the template wants its reasoning, where that is not `reasoning_content`."""
        return self._chat_template.reasoning_field

    @property
    def date(self) -> str | None:
        """The date that the template may print, as YYYY-MM-DD; None for a template that reads none."""
        # one that cannot be read prints nothing
        reads = bool(template_variables(self.template)) and self._chat_template.reads(self._date)
        return self._date.day.isoformat() if reads else None

    @property
    def date_given(self) -> bool:
        """Did a user name the date?"""
        return self._date.given

    def configured(
        self,
        *,
        thinking: bool,
        template_arguments: Mapping[str, Any] | None = None,
        date: AnyDate = None,
    ) -> Renderer:
        """Another renderer of the same model; `date` None: that of today. Raises UsageError, as the constructor."""
        other = copy.copy(self)
        other._configure(thinking, template_arguments, template_date(date))
        return other

    def _configure(self, thinking: bool, template_arguments: Mapping[str, Any] | None, date: TemplateDate) -> None:
        if taken := sorted(_OWN_ARGUMENTS & set(template_arguments or {})):
            raise UsageError(f"template variables: {', '.join(taken)}: given by the program; leave them out")
        self._thinking = thinking
        self._template_arguments = dict(template_arguments or {})
        self._date = date

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
        Raises PairsError when the target cannot be located, or the template leaves out text of a message.
        """
        found = self.located(side, target)
        if found.losses:
            raise PairsError(f"{'; '.join(found.losses)}: write a pair whose text it keeps, or a pair of plain texts")
        for note in found.notes:
            self._say(note)
        return Prompt(found.tokens[: found.n_needed], found.target)

    @property
    def template_arguments(self) -> dict[str, Any]:
        """Variables that the template gets: its switches for thinking, and those given to the constructor."""
        switches = thinking_arguments(self.template, self._thinking)
        return switches | self._template_arguments

    def located(self, side: Side, target: str) -> LocatedTarget:
        """Render one side and find its target. Raises PairsError when it cannot be located."""
        losses: tuple[str, ...] = ()
        notes = self._special.spelled(side)
        special = self._special.control
        if isinstance(side, str):
            text, (start, end) = side, find_in_text(side, target, special)
        else:
            messages = [message.to_dict() for message in side]
            template = self._side_template()
            with _refusals(PairsError, "these messages"):
                placed = template.placed(messages, target, special, variables=self.template_arguments, date=self._date)
            text, start, end = placed.text, placed.start, placed.end
            losses = tuple(map(str, placed.losses))
        # A chat template writes the beginning-of-text token itself, a plain text does not.
        add_special = isinstance(side, str)
        tokens, doubled = self._tokens(text, add_special=add_special)
        spans = self.spans(text, tokens, add_special=add_special)
        chosen = tokens_in_span(spans, start, end)
        if not chosen:
            raise PairsError(f"target {target!r}: the tokenizer leaves nothing of it")
        run = last_exact_run(tokens, self.tokenize(target, add_special=False))
        # the blank that some tokenizers put before every text is not the target's
        as_paper = None if run is None else chosen in (list(run), list(run)[1:])
        return LocatedTarget(text, start, end, tokens, chosen, as_paper, losses, (*notes, *doubled))

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Tokens of a text; with `parse_special` the names of special tokens in it become those tokens.

        Where a text itself begins or ends with the tokens that the tokenizer puts around it, they stand there once.

        Raises UsageError for a word of hundreds of thousands of characters, ResourceError (no memory for a long one).
        """
        tokens, doubled = self._tokens(text, add_special=add_special, parse_special=parse_special)
        for note in doubled:
            self._say(note)
        return tokens

    def spans(self, text: str, tokens: Sequence[int], *, add_special: bool) -> list[Span]:
        """The bytes [start, end) of a text that each of its tokens covers; start == end for one that was added.

        `tokens` are those of `tokenize`, with special tokens parsed. Raises PairsError for a text that the tokenizer
        changes.
        """
        return self._aligner.spans(text.encode("utf-8"), tokens, add_special=add_special)

    def _tokens(self, text: str, *, add_special: bool, parse_special: bool = True) -> tuple[list[int], list[str]]:
        """The tokens of `tokenize`, and warnings of what stood there twice."""
        pre = self._metadata.get("tokenizer.ggml.pre", "")
        tokens = tokenize(self._model, text, pre=pre, add_special=add_special, parse_special=parse_special)
        return self._special.once(tokens) if add_special else (tokens, [])

    def any_control(self, texts: Collection[str]) -> bool:
        """Is a control token in one of the texts? Those are detokenized only on request."""
        return any(name and name in text for text in texts for name in self._special.control)

    @property
    def _chat_template(self) -> BoundedTemplate:
        if not self._compiled:
            tokens = self._special_tokens()
            if "additional_special_tokens" in template_variables(self.template):
                # in the order of the vocabulary: a GGUF file does not hold transformers' list
                named = set(tokens.values())
                tokens["additional_special_tokens"] = [name for name in self._special.control if name not in named]
            self._compiled.append(BoundedTemplate(self.template, tokens))
        return self._compiled[0]

    def _special_tokens(self) -> dict[str, Any]:
        """Texts of the model's special tokens by the names that transformers gives them."""
        lib, vocab = capi.llama_cpp(), self._model.vocab
        tokens: dict[str, Any] = {"bos_token": "", "eos_token": ""}
        for name, function in (
            ("bos_token", lib.llama_vocab_bos),
            ("eos_token", lib.llama_vocab_eos),
            ("pad_token", lib.llama_vocab_pad),
            ("sep_token", lib.llama_vocab_sep),
            ("mask_token", lib.llama_vocab_mask),
        ):
            if (token := function(vocab)) != -1:
                tokens[name] = self._special.text(token)
        if (unknown := self._metadata.get("tokenizer.ggml.unknown_token_id", "")).isdecimal():
            tokens["unk_token"] = self._special.text(int(unknown))
        return tokens


@contextlib.contextmanager
def _refusals(error: type[SteerMoEError], what: str) -> Iterator[None]:
    """Raise `error` when the template refuses a conversation, of which the message says `what`."""
    try:
        yield
    except TemplateRefusal as why:
        raise error(f"the model's chat template refuses {what}: {why}") from why


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
    date: AnyDate = None,
    verbose: bool = False,
) -> Iterator[Renderer]:
    """A renderer for a model of which only the vocabulary is loaded. Raises ModelError, UsageError."""
    with vocabulary(path, verbose=verbose) as model:
        yield Renderer(model, thinking=thinking, template_arguments=template_arguments, date=date)
