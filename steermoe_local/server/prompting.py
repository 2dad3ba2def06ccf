"""From requests to prompts: chat templates, tokens, and grammars that bind the answer."""

from __future__ import annotations

import asyncio
import codecs
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from fastapi import Request

from ..errors import ModelError, PairsError, UsageError
from ..generation.engine import Engine
from ..llama.reasoning_styles import reasoning_style, unknown_reasoning
from ..llama.rendering import RenderedPrompt, Renderer
from ..llama.template_date import AnyDate
from ..llama.template_pool import MOST_CHILDREN, Cancellation, cancellable
from ..llama.thinking import effort_arguments, thinking_arguments
from .api_errors import ApiError
from .grammar import ForcedCall, forced_call, grammar_of_format
from .schemas_chat import ChatRequest, Message
from .streaming import disconnected
from .tool_calls import OfferedTools, offered_tools
from .tool_formats import tool_format
from .turns import Turns

__all__ = ["ChatPrompt", "Prompter", "TextPrompt", "decode_token"]

T = TypeVar("T")

_CHARACTERS_OF_TOKEN = 256  # more than the longest tokens have: a text beyond that cannot fit the context


@dataclass(frozen=True)
class ChatPrompt:
    """A rendered conversation. `grammar` binds the answer; with `call` the answer is a tool call.

    `tools` are those that the model may call, None also if the format of its calls is not known.
    """

    rendered: RenderedPrompt
    grammar: str | None
    call: ForcedCall | None
    tools: OfferedTools | None = None


@dataclass(frozen=True)
class _Bound:
    """The grammar that binds an answer, None without one; the call that it must be."""

    grammar: str | None
    call: ForcedCall | None


@dataclass(frozen=True)
class TextPrompt:
    """A text to continue; `offsets` are the characters at which its tokens begin."""

    text: str
    tokens: list[int]
    offsets: list[int]


class Prompter:
    """Renders and tokenizes for a loaded model, in threads of its own, so that a long text delays no other request.

    One thread does what this process computes. Some others wait for the children in which the template runs, clients in
    turn: a conversation that takes the template long delays no other one. Nobody waits longer than `timeout` seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        thinking: bool,
        template_arguments: dict[str, Any],
        date: AnyDate = None,
        timeout: float = math.inf,
    ) -> None:
        self._engine = engine
        self._renderer: Renderer = engine.renderer
        self._thinking, self._template_arguments, self._date = thinking, template_arguments, date
        self._timeout = timeout
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="steermoe-prompts")
        self._renderings = ThreadPoolExecutor(MOST_CHILDREN, thread_name_prefix="steermoe-templates")
        self._turns = Turns(MOST_CHILDREN)
        self._waits: set[Cancellation] = set()

    def close(self) -> None:
        """End the threads, and what they wait for."""
        for pool in (self._pool, self._renderings):
            pool.shutdown(wait=False, cancel_futures=True)
        for wait in list(self._waits):
            wait.cancel()

    async def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(function, *arguments))

    async def prompted(self, request: ChatRequest, http: Request) -> ChatPrompt:
        """`chat` in the threads, while the client is connected.

        Raises as it, and ApiError: 408 after the timeout, 499 when the client is gone.
        """
        client = http.client.host if http.client else ""
        working = asyncio.ensure_future(self._prompted(request, client))
        watching = asyncio.ensure_future(disconnected(http))
        try:
            limit = None if self._timeout == math.inf else self._timeout
            await asyncio.wait((working, watching), timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                return working.result()
            raise ApiError(499, "the client has closed its connection") if watching.done() else ApiError.late()
        finally:
            working.cancel()
            watching.cancel()

    async def _prompted(self, request: ChatRequest, client: str) -> ChatPrompt:
        bound = await self.run(self._bound, request)
        async with self._turns.turn(client):
            text = await self._rendered(request, bound)
        return await self.run(self._finished, request, bound, text)

    async def _rendered(self, request: ChatRequest, bound: _Bound) -> str:
        """`_render`, which ends when this is cancelled."""
        cancellation = Cancellation()

        def call() -> str:
            with cancellable(cancellation):
                return self._render(request, bound.grammar is not None)

        self._waits.add(cancellation)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._renderings, call)
        except BaseException:
            cancellation.cancel()
            raise
        finally:
            self._waits.discard(cancellation)

    def tokens_of(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Tokens of a text; call it in the prompter's thread. Raises UsageError for a text that cannot be tokenized."""
        return self._renderer.tokenize(text, add_special=add_special, parse_special=parse_special)

    def _require_short(self, text: str) -> str:
        n_ctx = self._engine.n_ctx
        if len(text) > _CHARACTERS_OF_TOKEN * n_ctx:
            raise ApiError(
                400,
                f"the prompt has {len(text)} characters, which cannot fit a context of {n_ctx} tokens; shorten it",
                code="context_length_exceeded",
            )
        return text

    def require_room(self, n_tokens: int) -> None:
        """Raise ApiError for a prompt of so many tokens that no answer fits behind it."""
        n_ctx = self._engine.n_ctx
        if n_tokens >= n_ctx:
            raise ApiError(
                400,
                f"the prompt has {n_tokens} tokens, but the context of an answer is {n_ctx}; shorten it, or "
                "start the server with a larger -c",
                code="context_length_exceeded",
            )

    def piece(self, token: int, *, special: bool = True) -> bytes:
        """Bytes of a token's text."""
        return self._engine.token_bytes(token, special=special)

    @property
    def reasoning(self) -> str | None:
        """What becomes of reasoning: "separated", "unknown" (it stays in the content), or None (there is none)."""
        template = self._renderer.template
        if reasoning_style(template) is not None:
            return "separated"
        return None if unknown_reasoning(template) is None else "unknown"

    @property
    def tool_calls(self) -> str | None:
        """The name of the format in which the model calls tools, None if it is not known: calls stay in the content."""
        found = tool_format(self._renderer.template)
        return None if found is None else found.name

    def check_tokens(self, tokens: Sequence[int], where: str) -> None:
        """Raise ApiError for a number that is not a token, which llama.cpp does not check."""
        n_vocab = self.n_vocab
        bad = next((token for token in tokens if not 0 <= token < n_vocab), None)
        if bad is not None:
            raise ApiError(400, f"{where}: token {bad}, but the vocabulary has 0 to {n_vocab - 1}", param=where)

    @functools.cached_property
    def n_vocab(self) -> int:
        """The size of the vocabulary."""
        return int(self._engine.model.n_vocab())

    @property
    def n_ctx(self) -> int:
        """The most tokens that a prompt and its answer can have together."""
        return self._engine.n_ctx

    @functools.cached_property
    def tokenizer_info(self) -> dict[str, Any]:
        """Special tokens, chat template and sizes, under the names that transformers uses."""
        model = self._engine.model
        ids = {"bos_token": model.token_bos(), "eos_token": model.token_eos()}
        names = {name: None if token == -1 else decode_token(self.piece(token)) for name, token in ids.items()}
        template = self._renderer.template if self._renderer.has_template else None
        size = {"model_max_length": self.n_ctx, "vocab_size": self.n_vocab}
        return names | {"pad_token": names["eos_token"], "chat_template": template} | size

    def texts(self, prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]) -> list[TextPrompt]:
        """The prompts of a completion, tokenized. Raises ApiError."""
        if isinstance(prompts, str):
            return [self._text_prompt(prompts)]
        if isinstance(prompts[0], int):
            return [self._token_prompt([token for token in prompts if isinstance(token, int)])]
        return [
            self._text_prompt(prompt) if isinstance(prompt, str) else self._token_prompt(list(prompt))
            for prompt in prompts
            if not isinstance(prompt, int)
        ]

    def _text_prompt(self, text: str) -> TextPrompt:
        tokens = self.tokens_of(self._require_short(text), add_special=True)
        bos = self._engine.model.token_bos()
        if not tokens and bos != -1:
            tokens = [bos]  # so that an empty text can be continued, as in llama-cpp-python
        return TextPrompt(text, tokens, self._text_offsets(text, tokens))

    def _text_offsets(self, text: str, tokens: Sequence[int]) -> list[int]:
        """Characters of the text at which its tokens begin."""
        try:
            spans = self._renderer.spans(text, tokens, add_special=True)
        except PairsError:  # a tokenizer that changes texts
            return self._offsets(tokens, len(text.encode("utf-8")))
        character_of = [index for index, character in enumerate(text) for _ in character.encode("utf-8")]
        return [(character_of[start] if start < len(character_of) else len(text)) for start, _ in spans]

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of tokens; call it in the prompter's thread. Raises ApiError for a number that is not a token."""
        self.check_tokens(tokens, "tokens")
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", "replace")

    def _token_prompt(self, tokens: list[int]) -> TextPrompt:
        self.check_tokens(tokens, "prompt")
        self.require_room(len(tokens))
        data = b"".join(self.piece(token) for token in tokens)
        return TextPrompt(data.decode("utf-8", "replace"), tokens, self._offsets(tokens, len(data)))

    def _offsets(self, tokens: Sequence[int], n_bytes: int) -> list[int]:
        """Where the tokens begin in a text of `n_bytes` bytes; tokens that the tokenizer added have no length."""
        added = max(0, sum(len(self.piece(token)) for token in tokens) - n_bytes)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offsets, offset = [], 0
        for token in tokens:
            offsets.append(offset)
            data = self.piece(token)
            offset += len(decoder.decode(data[added:]))
            added = max(0, added - len(data))
        return offsets

    def chat(self, request: ChatRequest) -> ChatPrompt:
        """Render and tokenize a conversation.

        Raises ModelError (no chat template), ApiError (the template refuses it; a format that is no grammar).
        """
        bound = self._bound(request)
        return self._finished(request, bound, self._render(request, bound.grammar is not None))

    def _bound(self, request: ChatRequest) -> _Bound:
        """What binds the answer. Raises ApiError."""
        call = forced_call(request)
        return _Bound(call.grammar if call else grammar_of_format(request.response_format), call)

    def _finished(self, request: ChatRequest, bound: _Bound, text: str) -> ChatPrompt:
        """The prompt of a rendered conversation. Raises ApiError."""
        if (last := request.continues) is not None:
            in_answer = bound.grammar is not None or request.continue_final_message == "content"
            self._require_short(text + last.text)
            rendered = self._renderer.continued(text, last.reasoning_content or "", last.text, in_answer=in_answer)
            return self._chat_prompt(request, rendered, bound)
        if bound.grammar is not None:
            # The grammar is of the answer alone, so the prompt ends where the answer begins, also with a template that
            # opens the reasoning in any case. All text is answer then, control tokens that a schema asks for included.
            style = reasoning_style(self._renderer.template, text)
            text += "" if style is None else style.answer_opening(text)
        return self._chat_prompt(request, self._renderer.rendered(self._require_short(text)), bound)

    def _chat_prompt(self, request: ChatRequest, rendered: RenderedPrompt, bound: _Bound) -> ChatPrompt:
        """The prompt with what becomes of the answer's text."""
        if bound.grammar is not None:
            return ChatPrompt(replace(rendered, style=None, has_control_markers=True), bound.grammar, bound.call)
        tools = offered_tools(request, self._renderer.template)
        if tools is not None:  # the markers of calls may be control tokens
            style = rendered.style and replace(rendered.style, keeps_calls=True)
            rendered = replace(rendered, style=style, has_control_markers=True)
        return ChatPrompt(rendered, None, None, tools)

    def _render(self, request: ChatRequest, bound: bool) -> str:
        if not self._renderer.has_template:
            raise ModelError("the model has no chat template, so it cannot chat; use /v1/completions")
        self._renderer.check_template()
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or ()]
        values: dict[str, Any] = {"tools": tools if tools and request.tool_choice != "none" else None}
        if request.tool_choice is not None and values["tools"]:
            choice = request.tool_choice
            values["tool_choice"] = choice if isinstance(choice, str) else choice.model_dump()
        renderer = self._configured(request, bound)
        messages = request.messages[:-1] if request.continues is not None else request.messages
        try:
            return renderer.chat_text([self._message(message) for message in messages], **values)
        except UsageError as error:
            raise ApiError(400, str(error), param="messages", code="invalid_messages") from None

    def _configured(self, request: ChatRequest, bound: bool) -> Renderer:
        """A renderer with the template's variables: the thinking switch, the server's, and the request's."""
        asked = dict(request.chat_template_kwargs or {})
        wanted = request.thinks if request.effort is None else request.effort != "none"
        thinking = (self._thinking if wanted is None else wanted) and not bound
        if wanted is not None:  # the request's wish wins over the server's variables
            template = self._renderer.template
            effort = effort_arguments(template, request.effort) if thinking and request.effort else {}
            asked = thinking_arguments(template, thinking) | effort | asked
        arguments = self._template_arguments | asked
        return self._renderer.configured(thinking=thinking, template_arguments=arguments, date=self._date)

    def _message(self, message: Message) -> dict[str, Any]:
        content: Any = message.text
        if isinstance(message.content, list):  # the template gets them in the form that it takes
            content = [{"type": "text", "text": part.value} for part in message.content if not part.is_reasoning]
        data: dict[str, Any] = {"role": message.role, "content": content}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                data[name] = value
        if message.reasoning_content is not None and (field := self._renderer.reasoning_field):
            data[field] = message.reasoning_content  # as llama-server does for gpt-oss and LFM2.5
        if message.tool_calls:
            data["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in message.tool_calls
            ]
        return data


def decode_token(data: bytes) -> str:
    """A token's text; bytes that are not UTF-8 are escaped as OpenAI does."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
