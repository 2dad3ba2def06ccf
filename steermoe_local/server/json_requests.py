"""Bodies of requests as values: each is parsed and validated once, a large one in the one thread for such work.

Python code in that thread gives way to the event loop every few milliseconds. More threads would not be quicker, as one
interpreter runs them all, and the event loop would wait for each of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import ValidatorFunctionWrapHandler, WrapValidator

from .api_errors import strict_json, validation_error

_LARGE = 16 * 1024  # bytes of a body that is worth a change of threads: it takes a millisecond or more
_KEY = "steermoe.body"

T = TypeVar("T")


@dataclass(frozen=True)
class _Valid:
    """A value that has passed validation."""

    value: Any


def _once(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    return value.value if isinstance(value, _Valid) else validate(value)


Json = Annotated[T, WrapValidator(_once)]
"""The annotation of a route's parameter that is the body."""


@dataclass
class _Body:
    value: Any
    large: bool
    works: ThreadPoolExecutor


class Bodies:
    """Parses bodies for the routes of class `JsonRoute`."""

    def __init__(self) -> None:
        self._works = ThreadPoolExecutor(1, thread_name_prefix="steermoe-bodies")

    async def parse(self, data: bytes) -> dict[str, Any]:
        """What the scope of a request needs of its body. Raises ApiError for what is not strict JSON."""
        large = len(data) > _LARGE
        value = await _run(self._works, strict_json, data) if large else strict_json(data)
        return {_KEY: _Body(value, large, self._works)}


async def _run(works: ThreadPoolExecutor, function: Callable[..., T], *arguments: Any) -> T:
    return await asyncio.get_running_loop().run_in_executor(works, function, *arguments)


class JsonRoute(APIRoute):
    """A route whose body is parsed already, and is validated in a thread if it is large."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def with_body(request: Request) -> Response:
            body: _Body | None = request.scope.get(_KEY)
            if body is not None:
                request = _ParsedRequest(request.scope, request.receive)
                if body.large and self.body_field is not None:
                    body.value = await _run(body.works, self._validated, body.value)
            return await handle(request)

        return with_body

    def _validated(self, value: Any) -> _Valid:
        """Raises ApiError."""
        assert self.body_field is not None
        found, errors = self.body_field.validate(value, {}, loc=("body",))
        if errors:
            raise validation_error(errors)
        return _Valid(found)


class _ParsedRequest(Request):
    async def json(self) -> Any:
        return self.scope[_KEY].value
