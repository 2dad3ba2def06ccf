"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..generation.engine import FinishEvent
from ..generation.engine import Request as EngineRequest
from .answers import Answer, Chunk, Entry
from .generation import Exchange
from .openapi import ERRORS, STREAMS
from .prompting import ChatPrompt, Prompter
from .responses import chat_logprobs, tool_call
from .schemas_chat import ChatRequest
from .service import Followed, Service
from .worker import Event

__all__ = ["router"]


class _Chat(Exchange):
    endpoint = "chat/completions"
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")
    request: ChatRequest

    def __init__(
        self, service: Service, prompter: Prompter, request: ChatRequest, followed: Followed, prompt: ChatPrompt
    ) -> None:
        super().__init__(service, prompter, request, followed)
        self.prompt = prompt
        self.answers = [
            Answer(self._token_bytes, bool(request.logprobs), prompt.rendered.style, prompt.call) for _ in range(self.n)
        ]
        self.call_ids = [f"call_{secrets.token_hex(12)}" for _ in self.answers]

    def _token_bytes(self, token: int) -> bytes:
        return self.prompter.piece(token, special=self.prompt.rendered.has_control_markers)

    def engine_requests(self) -> list[EngineRequest]:
        request, prompt = self.request, self.prompt
        first = EngineRequest(
            prompt.rendered.tokens,
            sampling=self.service.sampling_of(request, prompt.grammar),
            max_tokens=request.max_completion_tokens or request.max_tokens or self.service.settings.max_tokens,
            stop=request.stops,
            n_probs=request.top_logprobs or 0 if request.logprobs else None,
            special=prompt.rendered.has_control_markers,
            bias=self.followed.applied.bias,
        )
        return self.service.engine_requests(request, first, [prompt.rendered.tokens])

    def take(self, index: int, event: Event) -> Chunk:
        assert not isinstance(event, Exception)
        return self.answers[index].take(event)

    def choice(self, index: int) -> dict[str, Any]:
        answer = self.answers[index]
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.call is not None:
            message["content"] = None
            message["tool_calls"] = [tool_call(answer, self.call_ids[index])]
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": answer.reason}
        return choice | {"logprobs": self._logprobs(answer.entries), "seed": self.finishes[index].seed}

    def first_choices(self) -> Iterator[dict[str, Any]]:
        for index, answer in enumerate(self.answers):
            delta: dict[str, Any] = {"role": "assistant", "content": "" if answer.call is None else None}
            if answer.call is not None and answer.call.name is not None:
                function = {"name": answer.call.name, "arguments": ""}
                call = {"index": 0, "id": self.call_ids[index], "type": "function", "function": function}
                delta["tool_calls"] = [call]
            yield _choice(index, delta)

    def next_choices(self, index: int, added: Chunk, finish: FinishEvent | None) -> Iterator[dict[str, Any]]:
        answer = self.answers[index]
        deltas: list[dict[str, Any]] = [
            {"content" if kind == "answer" else "reasoning_content": text} for kind, text in added.parts
        ]
        if added.arguments:
            deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": added.arguments}}]})
        if finish is not None and answer.call is not None and answer.call.name is None:
            deltas.append({"tool_calls": [{"index": 0, **tool_call(answer, self.call_ids[index])}]})
        if added.entries and not deltas:
            deltas.append({} if answer.call else {"content": ""})
        for place, delta in enumerate(deltas):
            # tokens go with the first part of their text
            yield _choice(index, delta, self._logprobs(added.entries if place == 0 else []))

    def last_choice(self, index: int, finish: FinishEvent) -> dict[str, Any]:
        return _choice(index, {}, finish_reason=self.answers[index].reason) | {"seed": finish.seed}

    def texts(self) -> tuple[Any, Any]:
        return self.prompt.rendered.text, [answer.raw for answer in self.answers]

    def _logprobs(self, entries: Sequence[Entry]) -> Any:
        return chat_logprobs(entries, self.prompter.piece) if self.request.logprobs else None


def _choice(
    index: int, delta: dict[str, Any], logprobs: Any = None, finish_reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", tags=["answers"], responses={200: STREAMS, **ERRORS}, response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation through the model's chat template, steered as the request says."""
        prompter = service.prompter()
        followed = await service.followed(_Chat.endpoint, body)
        prompt = await prompter.run(prompter.chat, body)
        return await _Chat(service, prompter, body, followed, prompt).respond(request)

    return routes
