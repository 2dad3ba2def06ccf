"""/v1/models, /health, /metrics, and the tokenizer's addresses."""

from __future__ import annotations

import functools
import json
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from .json_requests import Json, JsonRoute
from .openapi import ERRORS
from .prompting import decode_token
from .schemas import DetokenizeRequest, TokenizeRequest
from .service import Service

_TEXT = {"description": "Prometheus' text format.", "content": {"text/plain": {"schema": {"type": "string"}}}}

_json = functools.partial(json.dumps, ensure_ascii=False)


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.head("/health", include_in_schema=False)  # `wget --spider`, load balancers
    @routes.get("/health", tags=["server"], responses={503: ERRORS[503]})
    async def health() -> Response:
        """Is the model loaded, and how busy is it? 200 with status "ok", else 503."""
        worker = service.worker
        slots = {"total": worker.n_slots, "busy": worker.n_running}
        body = {"status": worker.state, "slots": slots, "waiting": worker.n_waiting}
        return JSONResponse(body, 200 if worker.state == "ok" else 503)

    @routes.get("/metrics", tags=["server"], responses={200: _TEXT, 401: ERRORS[401]}, response_class=Response)
    def metrics() -> Response:  # in a thread: it takes milliseconds with many steerings
        """Requests, tokens, queue and times by steering, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def model(id_: str, name: str | None) -> dict[str, Any]:
        engine = service.worker.require_ready()
        meta: dict[str, Any] = {"n_ctx": engine.n_ctx, "n_vocab": engine.model.n_vocab()}
        if engine.identity is not None:
            meta |= engine.identity.to_dict()
        meta |= {"reasoning": service.prompter().reasoning, "tool_calls": service.prompter().tool_calls}
        return {
            "id": id_,
            "object": "model",
            "created": service.created,
            "owned_by": "steermoe-local",
            "steering": name,
            "meta": meta,
        }

    @routes.get("/v1/models", tags=["server"], responses={401: ERRORS[401], 503: ERRORS[503]})
    async def models() -> dict[str, Any]:
        """The model, and MODEL:NAME for each steering that is ready by its name."""
        return {"object": "list", "data": [model(id_, name) for id_, name in service.models()]}

    @routes.get("/v1/models/{model_id:path}", tags=["server"], responses={k: ERRORS[k] for k in (401, 404, 503)})
    async def one_model(model_id: str) -> dict[str, Any]:
        """One of them."""
        service.worker.require_ready()
        return model(model_id, service.steering_of_model(model_id))

    @routes.post("/tokenize", tags=["tokens"], responses=ERRORS, response_model=dict[str, Any])
    async def tokenize(body: Json[TokenizeRequest]) -> Response:
        """Tokens of a text, as llama-server and vLLM give them."""
        prompter = service.prompter()
        text, add_special = body.text

        def answer() -> Response:  # made in the thread as a whole: a text may have a million tokens
            tokens = prompter.tokens_of(text, add_special=add_special, parse_special=body.parse_special)
            # token by token: one call for all of them would not give way to the event loop
            shown = functools.cache(lambda token: _json({"id": token, "piece": decode_token(prompter.piece(token))}))
            listed = ", ".join(shown(token) if body.with_pieces else str(token) for token in tokens)
            size = _json({"count": len(tokens), "max_model_len": prompter.n_ctx})
            return Response(f'{{"tokens": [{listed}], {size[1:]}', media_type="application/json")

        return await prompter.run(answer)

    @routes.post("/detokenize", tags=["tokens"], responses=ERRORS)
    async def detokenize(body: Json[DetokenizeRequest]) -> dict[str, str]:
        """The text of tokens, under llama-server's name and vLLM's."""
        prompter = service.prompter()
        text = await prompter.run(prompter.text_of, body.tokens)
        return {"content": text, "prompt": text}

    @routes.get("/tokenizer_info", tags=["tokens"], responses={k: ERRORS[k] for k in (401, 503)})
    async def tokenizer_info() -> dict[str, Any]:
        """What evaluation harnesses ask for, which then need no tokenizer of their own (vLLM's address)."""
        return service.prompter().tokenizer_info

    return routes
