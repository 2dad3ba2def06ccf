"""uvicorn's HTTP protocol with deadlines, a bound on connections, errors in OpenAI's form, and half-closed clients.

uvicorn has one timeout, for idle connections, and one limit, beyond which everything gets 503. What is overridden and
read here of its `H11Protocol` is held by tests/server/test_uvicorn.py, which says what changed when uvicorn does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from .api_errors import ApiError
from .connections import Connections, State
from .http_limits import LimitedConnection
from .peers import Ends, bound_rest, ends_of, keep_watch, not_taken
from .security import App, Message, Receive, Scope, Send, refuse
from .settings import ServerSettings

_LINGER_SECONDS = 2.0  # for a client to read the answer that ends its connection while it still sends
_TAKEN_BYTES = 8 * 1024  # what a client must take of an answer in each period of `write_seconds`: 30 short events
_REST_PERIODS = 10  # of `write_seconds`, in which a client takes what is in the kernel when its connection is closed
_SENT_AHEAD = 128 * 1024  # bytes that the kernel keeps for a client that does not read


class GuardedProtocol(H11Protocol):
    """One connection of a client."""

    conn: LimitedConnection

    def __init__(
        self, *, settings: ServerSettings, open_connections: Connections, reserved: bool = False, **of_uvicorn: Any
    ) -> None:
        """`reserved`: one of the reserve from the beginning. Further arguments are uvicorn's."""
        super().__init__(**of_uvicorn)
        self.conn = LimitedConnection()
        self.app = told_when_stopped(self.app)
        self.reserved = reserved
        self.state, self.since, self.address = State.IDLE, self.loop.time(), ""
        self.ends: Ends | None = None
        self._settings, self._open_connections = settings, open_connections
        self._phase, self._phase_state = "", State.IDLE
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None
        self._discarding = self._half_closed = False
        self._n_probes = 0

    #
    # what asyncio calls
    #

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` comes whenever a client does not take all
        found = transport.get_extra_info("socket")
        with contextlib.suppress(OSError):
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SENT_AHEAD)
        keep_watch(found)
        if self.client is not None and self.server is not None and self.server[1] is not None:
            self.address = self.client[0]
            self.ends = ends_of(self.client, (self.server[0], self.server[1]))
        self._open_connections.add(self)
        if self.reserved:
            self.app = reserved_for_health(self.app)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open_connections.remove(self)
        bound_rest(self.transport.get_extra_info("socket"), _REST_PERIODS * self._settings.write_seconds)
        for timer in (self._deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()

    def data_received(self, data: bytes) -> None:
        if not self._discarding:
            super().data_received(data)
            self._watch()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection, if the client has ended its side of it and waits for an answer."""
        if self._discarding or self.transport.is_closing():
            return False
        if self._phase == "answering":
            self._half_closed = True
            self._open_connections.half_closed(self)
            return True
        if self._phase in ("header", "body") and (self._phase == "body" or self.conn.has_begun):
            self._refuse(ApiError(400, f"the connection ended before the {self._phase} did", code="incomplete_request"))
        return False

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_deadline is None:
            self._await_reader(self._not_taken() + _TAKEN_BYTES)
        self._note(State.UNREAD)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
        self._note(self._phase_state)

    #
    # what uvicorn calls
    #

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._half_closed and self.cycle.response_complete:  # no further request was in the pipeline
            self.transport.close()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or too large."""
        error = self.conn.refused
        status = error.error_status_hint if error is not None else 400
        kinds = {414: "address_too_long", 431: "header_too_large", 501: "not_implemented", 505: "http_version"}
        text = str(error or msg).partition(": bytearray(")[0]  # without what the client sent
        self._refuse(ApiError(status, f"the request is refused: {text}", code=kinds.get(status, "invalid_http")))

    def shutdown(self) -> None:
        """Close the connection now, or after the answer that is being given."""
        if self._phase == "body":
            self._refuse(ApiError.stopping())
        elif self._phase == "answering":
            self.cycle.keep_alive = False
        else:
            self.transport.close()

    #
    # deadlines
    #

    def _watch(self) -> None:
        """See what the connection is doing, and begin that phase's deadline if it has just begun."""
        if self.transport.is_closing() or self._discarding:
            return
        phase = self._current()
        if phase == self._phase:
            return
        self._phase = phase
        settings = self._settings
        whole = settings.timeout + settings.body_seconds + settings.write_seconds
        deadlines: dict[str, tuple[State, float | None, Callable[[], None]]] = {
            "idle": (State.IDLE, None, self.abort),  # uvicorn's timer
            "header": (State.IDLE, settings.header_seconds, self._header_is_late),
            "body": (State.BODY, settings.body_seconds + 2 * _LINGER_SECONDS, self.abort),  # BodyGuard answers before
            "rest": (State.BODY, _LINGER_SECONDS, self.abort),
            "answering": (State.ANSWERING, whole, self.abort),
        }
        self._phase_state, seconds, late = deadlines[phase]
        self._note(State.UNREAD if self.flow.write_paused else self._phase_state)
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None if seconds is None else self.loop.call_later(seconds, late)

    def _current(self) -> str:
        if self.cycle is not None and not self.cycle.response_complete:
            return "body" if self.cycle.more_body else "answering"
        if self.conn.their_state is not h11.IDLE:
            return "rest"  # of a body that was answered before it was read
        return "header" if self.cycle is None or self.conn.has_begun else "idle"

    def _note(self, state: State) -> None:
        if state is not self.state:
            self.state, self.since = state, self.loop.time()

    def _header_is_late(self) -> None:
        if not self.conn.has_begun:
            self.transport.close()
            return
        seconds = self._settings.header_seconds
        self._refuse(
            ApiError(
                408, f"the header did not come within {seconds:g} seconds", kind="timeout_error", code="slow_header"
            )
        )

    def _await_reader(self, left: int) -> None:
        """End the connection if its client does not take what it is sent; it had not taken `left` bytes before."""
        now = self._not_taken()
        if now > left - _TAKEN_BYTES:
            self.abort()
        else:
            self._write_deadline = self.loop.call_later(self._settings.write_seconds, self._await_reader, now)

    def _not_taken(self) -> int:
        """Bytes of the answer on their way to the client. The kernel takes new ones in large portions only."""
        return self.transport.get_write_buffer_size() + not_taken(self.transport.get_extra_info("socket"))

    #
    # ends
    #

    def abort(self) -> None:
        """End the connection at once, with a reset: the kernel, too, drops what was not sent."""
        no_linger = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
        with contextlib.suppress(OSError):
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_linger)
        self.transport.abort()

    def look(self, there: bool | None) -> None:
        """Take note of whether a client that ended its side is there; ask it, in HTTP's way, where that is not seen."""
        if there is False:
            self.abort()
        elif there is None and self._n_probes < 2 and self._phase == "answering" and not self.cycle.response_started:
            # A client that is gone resets the connection, and the second writing fails. Others ignore it. Those of
            # HTTP/1.0 do not know it: the kernel's probes find them, when their end has forgotten the connection.
            if self.scope["http_version"] == "1.1":
                event = h11.InformationalResponse(status_code=100, headers=[], reason="Continue")
                self.transport.write(self.conn.send(event))
            self._n_probes += 1

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error and end the connection; it waits a moment for a client that is still sending."""
        if self.transport.is_closing():
            return
        cycle = self.cycle if self.cycle is not None and not self.cycle.response_complete else None
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.abort()  # an answer has begun
            return
        if cycle is not None:
            cycle.disconnected = True  # the application sends no other answer
            cycle.message_event.set()
        body = json.dumps(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
        events = (
            h11.Response(
                status_code=error.status,
                headers=list((headers | error.headers).items()),
                reason=STATUS_PHRASES[error.status],
            ),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self._discarding = True
        self.flow.resume_reading()
        with contextlib.suppress(OSError):
            self.transport.write_eof()
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(_LINGER_SECONDS, self.abort)


def told_when_stopped(app: App) -> App:
    """The application, whose unanswered requests get 503 when they are cancelled as the server stops."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await app(scope, receive, noting)
        except asyncio.CancelledError:
            if not started:
                await refuse(ApiError.stopping(), send)

    return run


def reserved_for_health(app: App) -> App:
    """The application for a connection of the reserve: /health, an error for all else, and one answer."""

    async def run(scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        if scope["path"] == "/health" and scope["method"] in ("GET", "HEAD"):
            return await app(scope, receive, closing)
        text = "all connections of this server are taken; come again later"
        await refuse(ApiError.busy(text, status=503, code="too_many_connections", retry_after=2), closing)

    return run
