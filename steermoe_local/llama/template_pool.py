"""The child processes in which chat templates run, their limits, and how a wait for them is cancelled."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from .._util.children import ChildError, Limits, Worker
from ..errors import ModelError, UsageError

SECONDS_VARIABLE = "STEERMOE_TEMPLATE_SECONDS"

MOST_CHILDREN = 4
"""How many templates run at once."""

_NICENESS = 5  # four templates that compute without end must not keep the server from its CPU
_MOST_BYTES = 256 << 20  # of an answer: 6 for each of 32 million characters, and more


@dataclass(frozen=True)
class TemplateLimits:
    """What a chat template may take for one task, such as a request's conversation with all that is found out of it.

    cpu_seconds: CPU time. seconds: time until the child is ended in any case, also by a busy machine. memory: bytes of
    address space. Every archived template of llama.cpp renders a conversation of 1 MB in 0.4 s and 60 MB. Systems
    without such limits (Windows; macOS for memory) have the deadline alone.
    """

    cpu_seconds: int = 5
    seconds: float = 20.0
    memory: int = 512 << 20

    @classmethod
    def from_environment(cls) -> TemplateLimits:
        """The limits, with the CPU time of STEERMOE_TEMPLATE_SECONDS. Raises UsageError."""
        asked = os.environ.get(SECONDS_VARIABLE)
        if not asked:
            return cls()
        try:
            seconds = float(asked)
            if not 1 <= seconds <= 86400:
                raise ValueError
        except ValueError:
            raise UsageError(f"{SECONDS_VARIABLE}: {asked[:40]!r} is no number of seconds from 1 to 86400") from None
        return cls(cpu_seconds=math.ceil(seconds), seconds=4 * seconds)


class Cancelled(Exception):
    """A wait for a template was cancelled."""


class Cancellation:
    """Cancels what one thread waits for (`cancellable`) from another one. It can be done once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._worker: Worker | None = None
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """Was it cancelled?"""
        return self._cancelled

    def cancel(self) -> None:
        """End the wait: the thread gets Cancelled, and the child that works for it ends."""
        with self._lock:
            self._cancelled = True
            if self._worker is not None:
                self._worker.interrupt()

    @contextlib.contextmanager
    def waiting_for(self, worker: Worker) -> Iterator[None]:
        """While the thread waits for this worker. Raises Cancelled."""
        with self._lock:
            if self._cancelled:
                raise Cancelled
            self._worker = worker
        try:
            yield
        finally:
            with self._lock:
                self._worker = None


_cancellation: ContextVar[Cancellation | None] = ContextVar("template cancellation", default=None)


@contextlib.contextmanager
def cancellable(cancellation: Cancellation) -> Iterator[None]:
    """Let what this thread asks of templates inside be cancelled."""
    token = _cancellation.set(cancellation)
    try:
        yield
    finally:
        _cancellation.reset(token)


class TemplatePool:
    """Some children of which each works on one task at a time, so that a slow one does not delay the others.

    They are started when they are needed, and kept. After a task without an answer a new one is started.
    """

    def __init__(self, limits: TemplateLimits | None = None, most_children: int = MOST_CHILDREN) -> None:
        self._given_limits = limits
        self._most_children = most_children
        self._begin()

    def _begin(self) -> None:
        self._process_id = os.getpid()
        self._free = threading.Condition()
        self._idle: list[Worker] = []
        self._n_workers = 0
        self._waiting: set[int] = set()  # threads

    @functools.cached_property
    def limits(self) -> TemplateLimits:
        """The limits of each task. Raises UsageError for nonsense in the environment."""
        return self._given_limits or TemplateLimits.from_environment()

    def ask(self, *request: Any) -> dict[str, Any]:
        """What `template_worker.answer` gives for a request.

        Raises ModelError (a limit was reached), Cancelled, RecursionError (values that are nested too deeply).
        """
        cancellation = _cancellation.get() or Cancellation()
        with self._lent(cancellation) as worker, cancellation.waiting_for(worker):
            thread = threading.get_ident()
            self._waiting.add(thread)
            try:
                found: dict[str, Any] = worker.ask(*request, seconds=self.limits.seconds)
            except ChildError as error:
                if cancellation.cancelled:
                    raise Cancelled from None
                raise self.too_much("time" if error.timed_out or error.out_of_cpu else "memory") from None
            finally:
                self._waiting.discard(thread)
            if "limit" in found or found.get("worn"):
                worker.stop()  # what ran out of memory is not relied on, and memory that was used up not given back
        if "limit" in found:
            raise self.too_much(str(found["limit"]))
        return found

    @property
    def waits(self) -> bool:
        """Does the calling thread wait for a child? For the handler of a signal, which may then interrupt it."""
        return threading.get_ident() in self._waiting

    def too_much(self, what: str) -> ModelError:
        """The error of a template that takes too much "time" or "memory", or makes too much "text"."""
        cure = "do without it: steermoe run --raw, or plain texts as the sides of pairs"
        if what == "time":
            seconds = self.limits.cpu_seconds
            problem = f"takes too long (more than {seconds} seconds)"
            cure += f"; or give it more seconds by {SECONDS_VARIABLE}"
        elif what == "text":
            problem = "makes a text out of all proportion to the messages"
        else:
            problem = f"takes too much memory (more than {self.limits.memory >> 20} MiB), or crashes Python"
        return ModelError(f"the model's chat template {problem}; {cure}")

    def close(self) -> None:
        """End the children that have nothing to do."""
        with self._free:
            idle, self._idle = self._idle, []
            self._n_workers -= len(idle)
        for worker in idle:
            worker.stop()

    @contextlib.contextmanager
    def _lent(self, cancellation: Cancellation) -> Iterator[Worker]:
        """A worker that is nobody else's meanwhile. Raises Cancelled."""
        if self._process_id != os.getpid():
            self._begin()  # after a fork the children are the other process's
        free = self._free
        with free:
            while not self._idle and self._n_workers >= self._most_children:
                free.wait(0.1)
                if cancellation.cancelled:
                    raise Cancelled
            if self._idle:
                worker = self._idle.pop()  # the one that worked last: it has the template
            else:
                worker = self._new()
                self._n_workers += 1
        try:
            yield worker
        finally:
            if cancellation.cancelled:
                worker.stop()  # or its dying child would fail the next task
            with free:
                self._idle.append(worker)
                free.notify()

    def _new(self) -> Worker:
        from .template_worker import answer  # late: the commands that need no template load no Jinja

        limits = Limits(
            memory=self.limits.memory, cpu_seconds=self.limits.cpu_seconds, file_bytes=0, niceness=_NICENESS
        )
        return Worker(answer, limits, most_bytes=_MOST_BYTES)


@functools.cache
def default_pool() -> TemplatePool:
    """The children of this process."""
    return TemplatePool()
