"""Waiting for events of the engine while the client may disconnect, and server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from typing import Any, Protocol

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .worker import Events, Ticket, Worker

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
        self._worker, self.ticket, self._gone = worker, ticket, False
        worker.submit(ticket)
        self._watching = asyncio.ensure_future(self._watch(request))

    def close(self) -> None:
        """Cancel what has not finished."""
        self._watching.cancel()
        self._worker.cancel(self.ticket)

    async def next(self) -> Events:
        """Wait for the next events. Raises ClientGone, and the error that ended an answer."""
        events = await self.ticket.next()
        if self._gone:  # whatever was there for it
            raise ClientGone
        return events

    async def _watch(self, request: Request) -> None:
        await disconnected(request)
        self._gone = True
        self.ticket.put([])  # it is the only thing that is waited for


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps would make one each time


def sse(data: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object."""
    return b"data: " + _encode(data).encode() + b"\n\n"


class Frame:
    """A server-sent event but for one text in it: what is the same in many is encoded once."""

    PLACEHOLDER = secrets.token_hex(16)
    """Stands where the text will be; no client can know it."""

    def __init__(self, event: bytes) -> None:
        """`event` has the placeholder as a JSON string, once."""
        self._before, self._after = event.split(_encode(self.PLACEHOLDER).encode())

    def of(self, text: str) -> bytes:
        """The event with a text."""
        return self._before + _encode(text).encode() + self._after


def named_sse(data: dict[str, Any]) -> bytes:
    """A server-sent event with a JSON object, under the name that is its `type`."""
    return f"event: {data['type']}\n".encode() + sse(data)


class Streamed(Protocol):
    """A request whose answer is sent as a stream: what is written of it."""

    async def next(self, answers: Answers) -> Events:
        """Wait for events. Raises as `Answers.next`."""

    def begin(self) -> bytes:
        """What is sent before all events."""

    def add(self, events: Events) -> bytes:
        """What the events add; b"" if nothing is certain by them."""

    @property
    def is_complete(self) -> bool:
        """Whether all answers have come to their end."""

    def end(self) -> bytes:
        """What is sent behind all events."""

    def fail(self, error: Exception) -> bytes:
        """What is sent instead of the rest after an error: the status was sent before."""


class EventStream(Response):
    """Sends server-sent events as they come, and closes `answers` in the end, also after an error."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, first: Events, streamed: Streamed) -> None:
        """`first` are events that came already. What comes together is written together."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers, self._first, self._streamed = answers, first, streamed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        streamed = self._streamed
        try:
            data = streamed.begin() + streamed.add(self._first)
            while not streamed.is_complete:
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                data = streamed.add(await streamed.next(self._answers))
            data += streamed.end()
        except (ClientGone, OSError):  # disconnected
            return
        except Exception as error:
            data = streamed.fail(error)
        finally:
            self._answers.close()
        with contextlib.suppress(OSError):
            await send({"type": "http.response.body", "body": data, "more_body": False})
