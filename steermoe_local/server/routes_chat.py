"""POST /v1/chat/completions."""

from __future__ import annotations

import functools
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..generation.engine import FinishEvent
from ..generation.engine import Request as EngineRequest
from .answers import Answer, Chunk, Entry
from .bodies import chat_logprobs
from .generation import GenerationCall
from .json_requests import Json, JsonRoute
from .openapi import ERRORS, STREAMS
from .prompting import ChatPrompt, Prompter
from .schemas_chat import ChatRequest
from .service import Asked, Service


class ChatCall(GenerationCall):
    """A request for answers to a conversation."""

    endpoint = "chat/completions"
    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")
    nothing: ClassVar = {"delta": {}}
    request: ChatRequest

    def __init__(
        self, service: Service, prompter: Prompter, request: ChatRequest, asked: Asked, prompt: ChatPrompt
    ) -> None:
        self.prompt = prompt
        piece = functools.partial(prompter.piece, special=prompt.rendered.has_control_markers)
        style = None if request.reasoning_format == "none" else prompt.rendered.style
        answers = [
            Answer(piece, bool(request.logprobs), style, prompt.call, prompt.tools, bool(request.return_steered))
            for _ in range(request.n or 1)
        ]
        super().__init__(service, prompter, request, asked, answers)
        self.call_ids = [defaultdict[int, str](lambda: f"call_{secrets.token_hex(12)}") for _ in answers]

    def engine_requests(self) -> list[EngineRequest]:
        request, prompt = self.request, self.prompt
        first = EngineRequest(
            prompt.rendered.tokens,
            sampling=self.service.sampling_of(request, prompt.grammar),
            max_tokens=self.service.limit_of(request),
            stop=request.stops,
            n_probs=request.top_logprobs or 0 if request.logprobs else None,
            special=prompt.rendered.has_control_markers,
            bias=self.asked.applied.bias,
            style=prompt.rendered.style,
        )
        return self.service.engine_requests(request, first, [prompt.rendered.tokens])

    def choice(self, index: int) -> dict[str, Any]:
        answer = self.answers[index]
        message: dict[str, Any] = {"role": "assistant", "content": self._echoed + answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.call is not None:
            message["content"] = None
            message["tool_calls"] = [self._tool_call(index)]
        elif answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [self._call(index, n, *call) for n, call in enumerate(answer.calls)]
        choice: dict[str, Any] = {"index": index, "message": message, "finish_reason": answer.reason}
        return choice | {"logprobs": self._logprobs(answer.entries), "seed": self.finishes[index].seed}

    def first_choices(self) -> Iterator[dict[str, Any]]:
        for index, answer in enumerate(self.answers):
            delta: dict[str, Any] = {"role": "assistant", "content": self._echoed if answer.call is None else None}
            if answer.call is not None and answer.call.name is not None:
                delta["tool_calls"] = [{"index": 0, **self._tool_call(index)}]
            yield self.chunk_choice(index, {"delta": delta})

    def next_choices(self, index: int, added: Chunk, finish: FinishEvent | None) -> Iterator[dict[str, Any]]:
        answer = self.answers[index]
        deltas: list[tuple[dict[str, Any], int | None]] = [
            ({"content" if kind == "answer" else "reasoning_content": text}, rule)
            for (kind, text), rule in added.pieces
        ]
        calls: list[dict[str, Any]] = []
        if added.arguments:
            calls.append({"index": 0, "function": {"arguments": added.arguments}})
        if finish is not None and answer.call is not None and answer.call.name is None:
            calls.append({"index": 0, **self._tool_call(index)})
        if finish is not None:
            for n, call in enumerate(answer.calls):
                calls.append({"index": n, **self._call(index, n, call.name, "")})
                calls.append({"index": n, "function": {"arguments": call.arguments}})
        deltas += [({"tool_calls": [call]}, None) for call in calls]
        if added.entries and not deltas:
            deltas.append(({} if answer.call else {"content": ""}, None))
        entries = added.entries
        for delta, rule in deltas:
            yield self.chunk_choice(index, {"delta": delta}, self._logprobs(entries), rule)
            entries = []  # tokens go with the first part of their text

    def offset(self, index: int) -> int:
        return len(self._echoed)

    def texts(self) -> tuple[Any, Any]:
        return self.prompt.rendered.text, [answer.raw for answer in self.answers]

    @property
    def _echoed(self) -> str:
        """The beginning of a message that the answer continues, if the request wants it back."""
        last = self.request.continues
        return last.text if last is not None and self.request.echo else ""

    def _logprobs(self, entries: Sequence[Entry]) -> Any:
        return chat_logprobs(entries, self.prompter.piece) if self.request.logprobs else None

    def _tool_call(self, index: int) -> dict[str, Any]:
        """The forced call of an answer, with the arguments that came so far."""
        return self._call(index, 0, *self.answers[index].function())

    def _call(self, index: int, n: int, name: str, arguments: str) -> dict[str, Any]:
        """The n-th call of an answer."""
        return {"id": self.call_ids[index][n], "type": "function", "function": {"name": name, "arguments": arguments}}


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/chat/completions", tags=["answers"], responses={200: STREAMS, **ERRORS}, response_model=None)
    async def chat_completions(body: Json[ChatRequest], request: Request) -> Response:
        """Answer a conversation through the model's chat template, steered as the request says."""
        prompter = service.prompter()
        asked = await service.asked(body)
        prompt = await prompter.prompted(body, request)
        return await ChatCall(service, prompter, body, asked, prompt).respond(request)

    return routes
