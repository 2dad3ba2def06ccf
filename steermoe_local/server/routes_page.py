"""What the page asks beyond the API: Markdown as a tree of elements. Programs have no use for it."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import StringConstraints

from .._util import markdown
from .._util.children import ChildError, Limits, Worker
from .api_errors import ApiError
from .json_requests import Json, JsonRoute
from .schemas_base import Body
from .service import Service

# Texts of the greatest length that are made to be slow take 0.5 to 2 seconds (tests/_util/test_markdown.py).
_LIMITS = Limits(memory=512 << 20, cpu_seconds=5, file_bytes=0, niceness=5)
_SECONDS = 15.0  # until the child is ended in any case, also by a busy machine
_MOST_WAITING = 16


class MarkdownRequest(Body):
    """A text that a model wrote, or a part of one."""

    text: Annotated[str, StringConstraints(max_length=markdown.MOST_CHARACTERS)]


class _Reader:
    """The child process that reads Markdown, for one text after the other."""

    def __init__(self) -> None:
        self._worker = Worker(markdown.answer, _LIMITS)
        self._turn = asyncio.Lock()  # here, so that those who wait take no threads
        self._n_waiting = 0

    async def read(self, text: str) -> dict[str, Any]:
        """The tree of a text. Raises ApiError."""
        if self._n_waiting >= _MOST_WAITING:
            raise ApiError.busy("too many texts wait to be read", code="busy", retry_after=1)
        self._n_waiting += 1
        try:
            async with self._turn:
                found: dict[str, Any] = await asyncio.to_thread(self._worker.ask, text, seconds=_SECONDS)
        except ChildError:
            found = {"limit": "it takes too much time or memory"}
        finally:
            self._n_waiting -= 1
        if "limit" in found:
            raise ApiError(400, f"no tree of this text: {found['limit']}", param="text", code="too_complex")
        return found

    def close(self) -> None:
        """End the child."""
        self._worker.stop()


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=JsonRoute, include_in_schema=False)
    reader = _Reader()
    service.at_end(reader.close)

    @routes.post("/page/markdown")
    async def blocks(body: Json[MarkdownRequest]) -> dict[str, Any]:
        """The blocks of a text; `_util/markdown.py` says of what they are made."""
        return await reader.read(body.text)

    return routes
