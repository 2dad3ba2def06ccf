"""The experts that each token selected, as SGLang gives them (`return_routed_experts`), and what they may take.

`sglext.routed_experts` is base64 of little-endian int32 [tokens, layers, experts used], C order. The tokens are those
of prompt and answer from `routed_experts_start_len` on, without the last: it was drawn and never read. Layers without
a router have -1.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..generation.engine import Engine, FinishEvent
from ..generation.engine import Request as EngineRequest
from .api_errors import ApiError

MAX_BYTES = 64 << 20
"""Most bytes of int32 that a request may ask for, all of its answers together."""
MAX_BYTES_AT_ONCE = 256 << 20
"""Most bytes of all requests that are not at their end."""

_FIELD = "return_routed_experts"


def sglext(finish: FinishEvent, start: int | None) -> dict[str, Any]:
    """The field sglext of an answer, from token `start` on; no field if its experts are not known."""
    if finish.experts is None:
        return {}
    experts = np.ascontiguousarray(finish.experts[start or 0 :], dtype="<i4")
    return {"sglext": {"routed_experts": base64.b64encode(experts.tobytes()).decode("ascii")}}


class ExpertTraces:
    """Bounds the memory of all traces: requests reserve the most that theirs can take, before they are queued."""

    def __init__(self) -> None:
        self.n_bytes = 0
        """Bytes that are reserved now."""

    def reserve(self, requests: Sequence[EngineRequest], engine: Engine) -> Callable[[], None]:
        """Reserve what the answers to these requests can take at most. Returns what gives it back, once.

        Raises ApiError: 400 for more than a request may have, 429 as long as others have too much.
        """
        identity = engine.identity
        if identity is None:
            raise ApiError(400, f"{_FIELD}: the model has no experts; leave it out", param=_FIELD, code="invalid_value")
        n_tokens = sum(_most_tokens(request, engine.n_ctx) for request in requests)
        n_bytes = 4 * n_tokens * identity.n_layer * identity.n_expert_used
        if n_bytes > MAX_BYTES:
            raise ApiError(
                400,
                f"{_FIELD}: up to {n_tokens} tokens of {identity.n_layer} layers take {_mib(n_bytes)} MiB, and "
                f"{_mib(MAX_BYTES)} are the most; ask for fewer tokens (max_tokens) or answers, or shorten the prompt",
                param=_FIELD,
                code="too_large",
            )
        if self.n_bytes + n_bytes > MAX_BYTES_AT_ONCE:
            raise ApiError.busy(
                f"{_FIELD}: requests that are not at their end take {_mib(self.n_bytes)} of {_mib(MAX_BYTES_AT_ONCE)} "
                "MiB; come again later, or ask for fewer tokens (max_tokens)",
                code="too_many_traces",
                retry_after=5,
            )
        self.n_bytes += n_bytes
        reserved = [n_bytes]

        def give_back() -> None:
            while reserved:
                self.n_bytes -= reserved.pop()

        return give_back


def _most_tokens(request: EngineRequest, n_ctx: int) -> int:
    room = max(0, n_ctx - len(request.tokens))
    return len(request.tokens) + (room if request.max_tokens is None else min(room, request.max_tokens))


def _mib(n_bytes: int) -> int:
    return -(-n_bytes // (1 << 20))


class Then(Response):
    """A response, and what is done when it was sent, or its client is gone."""

    def __init__(self, response: Response, done: Callable[[], None]) -> None:
        super().__init__(status_code=response.status_code)
        self._response, self._done = response, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            self._done()
