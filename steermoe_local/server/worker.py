"""The thread that owns the engine: requests come in from asyncio, events go back to it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from ..errors import NativeError
from ..generation.engine import Engine, FinishEvent, Request, Sequence, TokenEvent
from .api_errors import ApiError
from .fair_queue import FairQueue
from .jobs import Event, Job, Ticket

__all__ = ["Worker"]

log = logging.getLogger("steermoe.server")

Outgoing = dict[Ticket, list[tuple[int, Event]]]
State = Literal["loading", "ok", "failed", "stopping", "stopped"]

_SIMILAR = 0.1  # of a prompt that a sequence must hold to be taken for it (llama-server: --slot-prompt-similarity)


@dataclass(eq=False)
class _Waiting:
    ticket: Ticket
    index: int


@dataclass(eq=False)
class _Slot:
    """A sequence and what it answers."""

    sequence: Sequence
    ticket: Ticket | None = None
    index: int = 0
    request: Request | None = None
    error: Exception | None = None
    used: int = 0


class Worker:
    """Owns the engine in a thread of its own, and decodes what is asked for in one batch.

    Who may ask: any thread. What fails in one request ends that request and nothing else.
    """

    def __init__(
        self,
        load: Callable[[], AbstractContextManager[Engine]],
        *,
        queue_limit: int = 64,
        on_state: Callable[[State], None] | None = None,
    ) -> None:
        """`load` makes the engine, in the thread. `queue_limit` requests may wait. `on_state` hears of a new state."""
        self._load = load
        self._queue_limit = queue_limit
        self._on_state = on_state
        self._wake = threading.Condition()
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._cancels: list[Ticket] = []
        self._slots: list[_Slot] = []
        self._clock = 0
        self._outgoing: Outgoing = {}
        self._thread = threading.Thread(target=self._run, name="steermoe-engine", daemon=True)
        self.engine: Engine | None = None
        self.state: State = "loading"
        self.error: BaseException | None = None

    def start(self) -> None:
        """Begin to load."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> None:
        """End everything that runs or waits, free the engine and end the thread."""
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
            n_free = sum(slot.ticket is None for slot in self._slots)
            if n_waiting + 1 > self._queue_limit + n_free:
                raise ApiError.busy(
                    f"{n_waiting} requests wait already; come again later",
                    code="queue_full",
                    retry_after=max(1, min(60, n_waiting // max(1, self.n_slots))),
                )
            for index in range(len(ticket.jobs)):
                self._queue.put(ticket.client, ticket, _Waiting(ticket, index))
            self._wake.notify_all()

    def cancel(self, ticket: Ticket) -> None:
        """End a ticket: nobody hears of it any more. What runs ends with the next step."""
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
    def n_slots(self) -> int:
        """How many answers are decoded at once."""
        return len(self._slots)

    @property
    def n_running(self) -> int:
        """Answers that are being decoded."""
        return sum(slot.ticket is not None for slot in self._slots)

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
        except BaseException as error:  # the thread that started us tells it
            if self.engine is not None:
                log.error("the engine's thread failed", exc_info=error)
            self.error = error
        finally:
            with self._wake:
                self.engine = None
                self._set("failed" if self.error else "stopped")
            self._end_all(ApiError.busy("the server is stopping", status=503, code="stopping", retry_after=5))

    def _serve(self, engine: Engine) -> None:
        self._slots = [_Slot(engine.sequence()) for _ in range(engine.n_sequences)]
        with self._wake:
            self.engine = engine
            if self.state == "loading":
                self._set("ok")
        while self._wait():
            self._round(engine)
        self._end_all(ApiError.busy("the server is stopping", status=503, code="stopping", retry_after=5))

    def _wait(self) -> bool:
        """Sleep until there is something to do; False: stop."""
        with self._wake:
            while self.state == "ok" and not self._queue.n_groups and not self._cancels and not self.n_running:
                self._wake.wait()
            return self.state == "ok"

    def _round(self, engine: Engine) -> None:
        """Take in, decode one step, give out."""
        self._take_cancels(engine)
        self._end_late(engine)
        self._fill(engine)
        if self.n_running:
            for request, event in self._step(engine):
                self._take(request, event)
        self._send()

    def _step(self, engine: Engine) -> list[tuple[Request, TokenEvent | FinishEvent]]:
        try:
            return engine.step()
        except Exception as error:
            log.error("decoding failed: %s", error)
            for slot in self._slots:
                if slot.ticket is not None:
                    slot.error = slot.error or NativeError(f"decoding failed: {error}")
            events = engine.step()  # reports what was lost as cancelled
            for slot in self._slots:
                if slot.ticket is None:
                    slot.sequence.forget()
            return events

    def _take(self, request: Request, event: TokenEvent | FinishEvent) -> None:
        slot = next(slot for slot in self._slots if slot.request is request)
        ticket = slot.ticket
        assert ticket is not None
        if not isinstance(event, FinishEvent):
            if slot.error is None:
                self._say(ticket, slot.index, event)
            return
        error, index = slot.error, slot.index
        slot.ticket = slot.request = slot.error = None
        self._say(ticket, index, error or event)

    def _say(self, ticket: Ticket, index: int, event: Event) -> None:
        if not ticket.cancelled:
            self._outgoing.setdefault(ticket, []).append((index, event))

    def _send(self) -> None:
        """Hand over what a step brought, in one call: each wakes the event loop, for which it needs Python's lock."""
        outgoing, self._outgoing = self._outgoing, {}
        loops: dict[asyncio.AbstractEventLoop, Outgoing] = {}
        for ticket, events in outgoing.items():
            loops.setdefault(ticket.loop, {})[ticket] = events
        for loop, some in loops.items():
            with contextlib.suppress(RuntimeError):  # it is closed: nobody listens
                loop.call_soon_threadsafe(_deliver, some)

    def _take_cancels(self, engine: Engine) -> None:
        with self._wake:
            cancels, self._cancels = self._cancels, []
            for ticket in cancels:
                self._queue.drop(ticket.client, ticket)
        for ticket in cancels:
            self._cancel_running(engine, ticket, None)

    def _cancel_running(self, engine: Engine, ticket: Ticket, error: Exception | None) -> None:
        for slot in self._slots:
            if slot.ticket is ticket and slot.request is not None:
                slot.error = slot.error or error
                engine.cancel(slot.request)

    def _end_late(self, engine: Engine) -> None:
        """End what is over its time."""
        now = time.monotonic()
        late = {slot.ticket for slot in self._slots if slot.ticket is not None and slot.ticket.deadline < now}
        with self._wake:
            late |= {waiting.ticket for waiting in self._queue if waiting.ticket.deadline < now}
            dropped = [waiting for ticket in late for waiting in self._queue.drop(ticket.client, ticket)]
        if not late:
            return
        error = ApiError(
            408,
            "the request took longer than the server's --timeout; ask for fewer tokens, or raise it",
            kind="timeout_error",
            code="timeout",
            headers={"x-should-retry": "false"},  # a retry would take as long
        )
        for waiting in dropped:
            self._say(waiting.ticket, waiting.index, error)
        for ticket in late:
            self._cancel_running(engine, ticket, error)

    def _fill(self, engine: Engine) -> None:
        """Begin what waits, as far as there are free sequences."""
        while free := [slot for slot in self._slots if slot.ticket is None]:
            with self._wake:
                waiting = self._queue.get()
            if waiting is None:
                return
            try:
                self._begin(engine, free, waiting)
            except Exception as error:  # this request's own fault, or at least only its own end
                self._say(waiting.ticket, waiting.index, error)

    def _begin(self, engine: Engine, free: list[_Slot], waiting: _Waiting) -> None:
        job = waiting.ticket.jobs[waiting.index]
        slot = self._best(free, job)
        slot.sequence.steer(job.bias)
        request = Request(
            slot.sequence,
            job.tokens,
            sampling=job.sampling,
            max_tokens=job.max_tokens,
            stop=job.stop,
            n_probs=job.n_probs,
            prompt_probs=job.prompt_probs,
            special=job.special,
        )
        engine.add(request)
        self._clock += 1
        slot.ticket, slot.index, slot.request, slot.used = waiting.ticket, waiting.index, request, self._clock

    def _best(self, free: list[_Slot], job: Job) -> _Slot:
        """The sequence that holds most of the prompt under the same steering; else an empty one, else the oldest."""

        def shared(slot: _Slot) -> int:
            if slot.sequence.steering is not job.bias:  # equal ones are one object (registry.py)
                return 0
            return _common(slot.sequence.tokens, job.tokens)

        best = max(free, key=shared)
        if shared(best) > _SIMILAR * len(job.tokens):
            return best
        return min(free, key=lambda slot: (bool(slot.sequence.tokens), slot.used))

    def _end_all(self, error: Exception) -> None:
        """Tell everyone who waits or is being answered."""
        with self._wake:
            waiting = list(iter(self._queue.get, None))
        for item in waiting:
            self._say(item.ticket, item.index, error)
        for slot in self._slots:
            if slot.ticket is not None:
                self._say(slot.ticket, slot.index, error)
                slot.ticket = slot.request = None
        self._send()


def _common(held: list[int], tokens: list[int]) -> int:
    """How many tokens both begin with."""
    n = min(len(held), len(tokens))
    if held[:n] == tokens[:n]:
        return n
    return next(index for index in range(n) if held[index] != tokens[index])


def _deliver(outgoing: Outgoing) -> None:
    for ticket, events in outgoing.items():
        ticket.events.put_nowait(events)
