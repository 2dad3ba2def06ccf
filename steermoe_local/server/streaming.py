"""Waiting for events of the engine while the client may disconnect, and server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..generation.engine import FinishEvent, TokenEvent
from .api_errors import as_api_error
from .worker import Ticket, Worker

Events = list[tuple[int, TokenEvent | FinishEvent]]

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection."""


async def disconnected(request: Request) -> None:
    """Wait until the client has closed its connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Answers:
    """The events of a ticket while its client is connected. Whoever makes it closes it, which cancels the rest."""

    def __init__(self, worker: Worker, ticket: Ticket, request: Request) -> None:
        """Raises ApiError when the ticket cannot be queued."""
        self._worker, self.ticket = worker, ticket
        worker.submit(ticket)
        self._watching = asyncio.ensure_future(self._watch(request))

    def close(self) -> None:
        """Cancel what has not finished."""
        self._watching.cancel()
        self._worker.cancel(self.ticket)

    async def next(self) -> Events:
        """Wait for the events since the last call. Raises ClientGone, and the error that ended an answer."""
        events: Events = []
        for index, event in await self.ticket.next():
            if isinstance(event, Exception):
                raise event
            events.append((index, event))
        return events

    async def _watch(self, request: Request) -> None:
        await disconnected(request)
        self.ticket.put([(0, ClientGone())])  # among the events, the only thing that is waited for


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make one each time


def sse(data: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: " + _encode(data).encode() + b"\n\n"


def named_sse(data: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object, under the name that is its `type`."""
    return f"event: {data['type']}\n".encode() + sse(data)


def _error_body(error: Exception) -> list[dict[str, Any]]:
    return [as_api_error(error).body()]


class EventStream(Response):
    """Sends server-sent events as they come, and closes `answers` in the end, also after an error."""

    media_type = "text/event-stream"

    def __init__(
        self,
        answers: Answers,
        first: Iterator[dict[str, Any]],
        rest: AsyncIterator[list[dict[str, Any]]],
        *,
        encode: Callable[[dict[str, Any]], bytes] = sse,
        failed: Callable[[Exception], Iterable[dict[str, Any]]] = _error_body,
        end: bytes = DONE,
    ) -> None:
        """`first` is sent at once, then each list of `rest`, which may be empty, in one write.

        An error in `rest` becomes the events of `failed`: the status was sent before.
        """
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers, self._first, self._rest = answers, first, rest
        self._encode, self._failed, self._end = encode, failed, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def body(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            await body(b"".join(map(self._encode, self._first)))
            async for together in self._rest:
                if data := b"".join(map(self._encode, together)):
                    await body(data)
            await body(self._end, more=False)
        except (ClientGone, OSError):  # disconnected
            pass
        except Exception as error:
            await body(b"".join(map(self._encode, self._failed(error))), more=False)
        finally:
            self._answers.close()
