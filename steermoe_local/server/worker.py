"""The thread that owns the engine: requests come in from asyncio, events go back to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from ..errors import NativeError
from ..generation.engine import Engine, FinishEvent, Request, TokenEvent
from .api_errors import ApiError
from .fair_queue import FairQueue

log = logging.getLogger("steermoe.server")

Event = TokenEvent | FinishEvent | Exception
Events = list[tuple[int, TokenEvent | FinishEvent]]  # index of the request

_EVENTS_TOGETHER = 64  # the event loop takes them in, or writes them, within a millisecond or two


@dataclass(eq=False)
class Ticket:
    """A client's request: one request of the engine or several, whose events come out of `next` in order.

    `client` is who takes turns with others. The deadline is in the worker's clock (time.monotonic). Those of a ticket
    that is not `streamed` come some at a time: the first token, what ends an answer, and in between many together.
    """

    client: str
    requests: list[Request]
    deadline: float
    streamed: bool = True
    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    cancelled: bool = field(default=False, init=False)
    begun: bool = field(default=False, init=False)  # something was sent

    _events: list[tuple[int, Event]] = field(default_factory=list, init=False)
    _waiting: asyncio.Future[None] | None = field(default=None, init=False)

    def put(self, events: list[tuple[int, Event]]) -> None:
        """Add events, in the thread of the event loop; `next` returns also for none."""
        self._events += events
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    async def next(self) -> Events:
        """The next events, some that came; none after `put` of none. For one caller at a time.

        Raises the error that ended an answer, behind the events before it.
        """
        if not self._events:
            self._waiting = self.loop.create_future()
            await self._waiting
        elif len(self._events) > _EVENTS_TOGETHER:  # a client that did not read for a while: others have their turn
            await asyncio.sleep(0)
        events: Events = []
        for index, event in self._events[:_EVENTS_TOGETHER]:
            if isinstance(event, Exception):
                if events:
                    break
                raise event
            events.append((index, event))
        del self._events[: len(events)]
        return events


Outgoing = dict[Ticket, list[tuple[int, Event]]]
State = Literal["loading", "ok", "failed", "stopping", "stopped"]


@dataclass(eq=False)
class _Entry:
    """A request of a ticket, waiting for its turn or handed to the engine; `error` is sent instead of its end."""

    ticket: Ticket
    index: int
    error: Exception | None = None


class Worker:
    """Owns the engine in a thread of its own, and decides whose request it begins when one of its slots is free.

    Any thread may ask. What fails in one request ends that request and nothing else.
    """

    def __init__(
        self,
        load: Callable[[], AbstractContextManager[Engine]],
        *,
        queue_limit: int = 64,
        on_state: Callable[[State], None] | None = None,
        on_busy: Callable[[bool], None] | None = None,
    ) -> None:
        """`load` makes the engine, in the thread. `queue_limit` requests may wait. `on_state` gets every new state.

        `on_busy` is told whether there are requests, each time that changes; it must return at once and ask nothing of
        the worker.
        """
        self._load = load
        self._queue_limit = queue_limit
        self._on_state = on_state
        self._on_busy = on_busy
        self._busy = False
        self._wake = threading.Condition()
        self._queue: FairQueue[_Entry] = FairQueue()
        self._cancels: list[Ticket] = []
        self._running: dict[Request, _Entry] = {}
        self._outgoing: Outgoing = {}
        self._due: set[Ticket] = set()  # of the outgoing ones, those that are sent with the next step
        self._thread = threading.Thread(target=self._run, name="steermoe-engine", daemon=True)
        self.engine: Engine | None = None
        self.n_slots = 0
        """How many answers can be decoded at once."""
        self.state: State = "loading"
        self.error: BaseException | None = None

    def start(self) -> None:
        """Start the thread, which loads the model."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End all requests, free the engine and end the thread."""
        with self._wake:
            if self.state not in ("failed", "stopped"):
                self._set("stopping")
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, ticket: Ticket) -> None:
        """Queue a ticket. Raises ApiError: 429 when too many wait, 503 when there is no engine."""
        with self._wake:
            self.require_ready()
            n_waiting = self._queue.n_groups
            n_free = max(0, self.n_slots - self.n_running)
            if n_waiting + 1 > self._queue_limit + n_free:
                raise ApiError.busy(
                    f"{n_waiting} requests wait already; come again later",
                    code="queue_full",
                    retry_after=max(1, min(60, n_waiting // max(1, self.n_slots))),
                )
            for index in range(len(ticket.requests)):
                self._queue.put(ticket.client, ticket, _Entry(ticket, index))
            self._wake.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket; no more of its events are sent. What runs ends with the next step."""
        with self._wake:
            if not ticket.cancelled:
                ticket.cancelled = True
                self._cancels.append(ticket)
                self._wake.notify_all()

    def require_ready(self) -> Engine:
        """The engine. Raises ApiError (503) while there is none."""
        if self.engine is not None and self.state == "ok":
            return self.engine
        messages = {"loading": "the model is being loaded", "failed": "the model could not be loaded"}
        raise ApiError.busy(
            messages.get(self.state, "the server is stopping"), status=503, code=self.state, retry_after=2
        )

    @property
    def n_running(self) -> int:
        """Answers that are being decoded."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Requests that wait, whole or in part."""
        with self._wake:
            return self._queue.n_groups

    #
    # in the thread
    #

    def _set(self, state: State) -> None:
        self.state = state
        if self._on_state:
            self._on_state(state)

    def _run(self) -> None:
        try:
            with self._load() as engine:
                self._serve(engine)
        except BaseException as error:  # reported by the thread that started this one
            if self.engine is not None:
                log.error("the engine's thread failed", exc_info=error)
            self.error = error
        finally:
            with self._wake:
                self.engine = None
                self._set("failed" if self.error else "stopped")
            self._end_all(ApiError.stopping())

    def _serve(self, engine: Engine) -> None:
        engine.prepare_grammars()
        with self._wake:
            self.engine, self.n_slots = engine, engine.n_slots
            if self.state == "loading":
                self._set("ok")
        while self._wait():
            self._round(engine)
        self._end_all(ApiError.stopping())

    def _wait(self) -> bool:
        """Sleep until there is something to do. False: the worker stops."""
        with self._wake:
            while self.state == "ok" and not self._queue.n_groups and not self._cancels and not self.n_running:
                self._tell_busy(False)
                self._wake.wait()
            self._tell_busy(self.state == "ok")
            return self.state == "ok"

    def _tell_busy(self, busy: bool) -> None:
        if busy != self._busy and self._on_busy:
            self._on_busy(busy)
        self._busy = busy

    def _round(self, engine: Engine) -> None:
        """Take requests, compute one step, send its events."""
        self._take_cancels(engine)
        self._end_late(engine)
        self._fill(engine)
        if self._running:
            for request, event in self._step(engine):
                self._take(request, event)
        self._send()

    def _step(self, engine: Engine) -> list[tuple[Request, TokenEvent | FinishEvent]]:
        try:
            return engine.step()
        except Exception as error:
            log.error("decoding failed: %s", error)
            for entry in self._running.values():
                entry.error = entry.error or NativeError(f"decoding failed: {error}")
            events = engine.step()  # reports what was lost as cancelled
            engine.forget()
            return events

    def _take(self, request: Request, event: TokenEvent | FinishEvent) -> None:
        entry = self._running[request]
        if not isinstance(event, FinishEvent):
            if entry.error is None:
                self._say(entry, event)
            return
        del self._running[request]
        self._say(entry, entry.error or event)

    def _say(self, entry: _Entry, event: Event) -> None:
        ticket = entry.ticket
        if ticket.cancelled:
            return
        events = self._outgoing.setdefault(ticket, [])
        events.append((entry.index, event))
        at_once = ticket.streamed or not ticket.begun or not isinstance(event, TokenEvent)
        if at_once or len(events) >= _EVENTS_TOGETHER:
            self._due.add(ticket)

    def _send(self) -> None:
        """Send what is due after a step, in one call: each wakes the event loop, for which it needs Python's lock."""
        loops: dict[asyncio.AbstractEventLoop, Outgoing] = {}
        for ticket in self._due:
            ticket.begun = True
            loops.setdefault(ticket.loop, {})[ticket] = self._outgoing.pop(ticket)
        self._due.clear()
        for loop, some in loops.items():
            with contextlib.suppress(RuntimeError):  # it is closed: nobody listens
                loop.call_soon_threadsafe(_deliver, some)

    def _take_cancels(self, engine: Engine) -> None:
        with self._wake:
            cancels, self._cancels = self._cancels, []
            for ticket in cancels:
                self._queue.drop(ticket.client, ticket)
                self._outgoing.pop(ticket, None)
        self._abort(engine, set(cancels), None)

    def _abort(self, engine: Engine, tickets: set[Ticket], error: Exception | None) -> None:
        for request, entry in self._running.items():
            if entry.ticket in tickets:
                entry.error = entry.error or error
                engine.abort(request)

    def _end_late(self, engine: Engine) -> None:
        now = time.monotonic()
        with self._wake:
            late = {e.ticket for e in (*self._running.values(), *self._queue) if e.ticket.deadline < now}
            dropped = [entry for ticket in late for entry in self._queue.drop(ticket.client, ticket)]
        if not late:
            return
        error = ApiError.late()
        for entry in dropped:
            self._say(entry, error)
        self._abort(engine, late, error)

    def _fill(self, engine: Engine) -> None:
        """Hand over what waits, as far as there are free slots."""
        while True:
            with self._wake:  # first: with every step something runs, but seldom something waits
                entry = self._queue.get() if self._queue.n_groups and engine.n_free else None
            if entry is None:
                return
            request = entry.ticket.requests[entry.index]
            try:
                engine.add(request)
            except Exception as error:  # this request's own fault, or at least only its own end
                self._say(entry, error)
            else:
                self._running[request] = entry

    def _end_all(self, error: Exception) -> None:
        """Send an error to everyone who waits or is being answered."""
        with self._wake:
            waiting = list(iter(self._queue.get, None))
        for entry in (*waiting, *self._running.values()):
            self._say(entry, error)
        self._running.clear()
        self._send()


def _deliver(outgoing: Outgoing) -> None:
    for ticket, events in outgoing.items():
        ticket.put(events)
