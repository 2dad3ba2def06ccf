"""POST /v1/responses and the responses that are kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..generation.engine import FinishEvent, TokenEvent
from .answers import Chunk
from .api_errors import ApiError, as_api_error
from .bodies import steering_info
from .json_requests import Json, JsonRoute
from .openapi import ERRORS, STREAMS
from .prompting import ChatPrompt, Prompter
from .response_events import Event, ReasoningCount, ResponseEvents
from .response_items import chat_request, own_items, renamed
from .response_store import ResponseStore
from .routes_chat import ChatCall
from .schemas_chat import ChatRequest
from .schemas_responses import ResponsesRequest
from .service import Asked, Service
from .streaming import named_sse
from .worker import Events

log = logging.getLogger("steermoe.server")


class _ResponseCall(ChatCall):
    """A chat whose answer is given as a response: the deltas of its message become items and events."""

    endpoint = "responses"
    prefix = "resp"
    kinds = ("response", "response")

    def __init__(
        self,
        service: Service,
        prompter: Prompter,
        request: ChatRequest,
        asked: Asked,
        prompt: ChatPrompt,
        wanted: ResponsesRequest,
        items: Sequence[Any],
        store: ResponseStore,
    ) -> None:
        """`request` means the same as `wanted`, and `items` are its conversation."""
        super().__init__(service, prompter, request, asked, prompt)
        self.wanted, self.items, self.store = wanted, items, store
        self.events = ResponseEvents({name: namespace for name, (_, namespace) in wanted.functions.items()})
        self.reasoning = ReasoningCount()
        self._finished: dict[str, Any] | None = None
        self._unsent: list[Event] = []
        for kind in ("response.created", "response.in_progress"):
            self._unsent.append(self.events.event(kind, response=self._response("in_progress")))
        for choice in self.first_choices():
            self._unsent += self.events.add(choice["delta"])

    def take(self, index: int, event: TokenEvent | FinishEvent) -> Chunk:
        chunk = super().take(index, event)
        finish = event if isinstance(event, FinishEvent) else None
        n_tokens = 1 if isinstance(event, TokenEvent) and event.token >= 0 else 0
        self.reasoning.add(n_tokens, [kind for kind, _ in chunk.parts])
        for choice in self.next_choices(index, chunk, finish):
            self._unsent += self.events.add(choice["delta"], (choice["logprobs"] or {}).get("content") or ())
        if finish is not None:
            self._unsent += self.events.finish(complete=self.answers[index].reason != "length")
        return chunk

    def _end(self) -> None:
        super()._end()
        self._finished = self._whole()
        if self.wanted.store is not False:
            kept = {name: value for name, value in self._finished.items() if name != "sglext"}  # may be very long
            self.store.keep(kept, self.items)

    #
    # what is sent
    #

    def begin(self) -> bytes:
        return self._sent()

    def add(self, events: Events) -> bytes:
        self._take_all(events)
        return self._sent()

    def end(self) -> bytes:
        self._end()
        body = self._body()
        return named_sse(self.events.event(f"response.{body['status']}", response=body))

    def fail(self, error: Exception) -> bytes:
        told = as_api_error(error)
        code = {400: "invalid_prompt", 429: "rate_limit_exceeded"}.get(told.status, "server_error")
        self._unsent += self.events.finish(complete=False)
        failed = self._response("failed") | {"error": {"code": code, "message": str(told)}}
        self._unsent.append(self.events.event("error", code=told.code, message=str(told), param=told.param))
        self._unsent.append(self.events.event("response.failed", response=failed))
        return self._sent()

    def _sent(self) -> bytes:
        events, self._unsent = self._unsent, []
        return b"".join(map(named_sse, events))

    def _body(self) -> dict[str, Any]:
        """The finished response; what is kept is what is sent."""
        assert self._finished is not None
        return self._finished

    def _whole(self) -> dict[str, Any]:
        finish = self.finishes[0]
        facts: dict[str, Any] = {"completed_at": int(time.time()), "usage": self._response_usage(finish)}
        facts |= {"seed": finish.seed} | self.sglext(finish)
        if (steered := self.answers[0].steered) is not None:
            facts |= steered.fields()
        if self.answers[0].reason == "length":
            cut = {"incomplete_details": {"reason": "max_output_tokens"}, "completed_at": None}
            return self._response("incomplete") | facts | cut | self._facts(finish)
        return self._response("completed") | facts | self._facts(finish)

    def _response_usage(self, finish: FinishEvent) -> dict[str, Any]:
        n_new = finish.n_prompt - finish.n_cached
        return {
            "input_tokens": finish.n_prompt,
            "input_tokens_details": {"cached_tokens": finish.n_cached, "cache_write_tokens": n_new},
            "output_tokens": finish.n_generated,
            "output_tokens_details": {"reasoning_tokens": self.reasoning.n},
            "total_tokens": finish.n_prompt + finish.n_generated,
        }

    def _response(self, status: str) -> dict[str, Any]:
        """The response as it is now, with what it was asked for."""
        wanted, sampling = self.wanted, self.service.sampling_of(self.request)
        reasoning, text = wanted.reasoning, wanted.text
        choice = wanted.tool_choice
        return {
            "id": f"{self.prefix}_{self.head.id}",
            "object": "response",
            "created_at": self.head.created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "background": False,
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "model": self.head.model,
            "output": list(self.events.output),
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": wanted.previous_response_id,
            "prompt_cache_key": wanted.prompt_cache_key,
            "reasoning": {"effort": reasoning.effort if reasoning else None, "summary": None},
            "safety_identifier": wanted.safety_identifier,
            "service_tier": "default",
            "store": wanted.store is not False,
            "temperature": sampling.temperature,
            "text": {
                "format": _given(text.format) if text and text.format else {"type": "text"},
                "verbosity": text.verbosity if text else None,
            },
            "tool_choice": (choice if isinstance(choice, str) else _given(choice)) if choice else "auto",
            "tools": wanted.shown_tools,
            "top_logprobs": wanted.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": wanted.user,
            "metadata": wanted.metadata or {},
            "steering": steering_info(self.asked.applied),
        }


def _given(value: Any) -> dict[str, Any]:
    """The JSON that was sent."""
    return dict(value.model_dump(by_alias=True, exclude_unset=True))


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=JsonRoute)
    store = ResponseStore()

    async def as_chat(prompter: Prompter, body: ResponsesRequest) -> tuple[list[Any], ChatRequest]:
        items = store.conversation(body.previous_response_id, own_items(body))
        return items, await prompter.run(chat_request, body, items)

    async def prompted(prompter: Prompter, chat: ChatRequest, request: Request) -> ChatPrompt:
        try:
            return await prompter.prompted(chat, request)
        except ApiError as error:
            raise renamed(error) from None

    @routes.post("/v1/responses", tags=["answers"], responses={200: STREAMS, **ERRORS}, response_model=None)
    async def responses(body: Json[ResponsesRequest], request: Request) -> Response:
        """Answer a conversation of items, steered as the request says; the form of OpenAI's newer clients."""
        prompter = service.prompter()
        items, chat = await as_chat(prompter, body)
        asked = await service.asked(chat)
        prompt = await prompted(prompter, chat, request)
        if body.left_out:
            log.warning("responses: tools that this server does not have are left out: %s", ", ".join(body.left_out))
        return await _ResponseCall(service, prompter, chat, asked, prompt, body, items, store).respond(request)

    @routes.post("/v1/responses/input_tokens", tags=["tokens"], responses=ERRORS)
    async def input_tokens(body: Json[ResponsesRequest], request: Request) -> dict[str, Any]:
        """How many tokens the prompt of a response has."""
        prompter = service.prompter()
        _, chat = await as_chat(prompter, body)
        prompt = await prompted(prompter, chat, request)
        return {"object": "response.input_tokens", "input_tokens": len(prompt.rendered.tokens)}

    @routes.get("/v1/responses/{response_id}", tags=["answers"], responses=ERRORS)
    async def response(response_id: str) -> dict[str, Any]:
        """A response that is kept in memory."""
        return store.body(response_id)

    @routes.delete("/v1/responses/{response_id}", tags=["answers"], responses=ERRORS)
    async def delete_response(response_id: str) -> dict[str, Any]:
        """Forget a response."""
        store.delete(response_id)
        return {"id": response_id, "object": "response", "deleted": True}

    return routes
