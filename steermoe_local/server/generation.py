"""A request and its answer, whole or in chunks: what chat/completions and completions have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..generation.engine import FinishEvent
from ..generation.engine import Request as EngineRequest
from .api_errors import ApiError
from .prompting import Prompter
from .responses import Head, steering_info, timings, usage
from .schemas import Generation
from .service import Followed, Service
from .streaming import Answers, ClientGone, Events, EventStream
from .worker import Event

__all__ = ["Exchange"]


class Exchange(ABC):
    """One request on its way; the subclass knows the form of its answers."""

    endpoint: str
    prefix: str  # of ids
    kinds: tuple[str, str]  # `object` of an answer, and of a chunk

    def __init__(self, service: Service, prompter: Prompter, request: Generation, followed: Followed) -> None:
        self.service, self.prompter, self.request, self.followed = service, prompter, request, followed
        self.n = request.n or 1  # answers to each prompt
        self.finishes: dict[int, FinishEvent] = {}
        self.head = Head(self.prefix, self.kinds[bool(request.stream)], followed.model)

    #
    # of the subclass
    #

    @abstractmethod
    def engine_requests(self) -> list[EngineRequest]:
        """What is asked for."""

    @abstractmethod
    def take(self, index: int, event: Event) -> Any:
        """Add an event to answer `index`; returns what it adds."""

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """An answer, at its end."""

    @abstractmethod
    def first_choices(self) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""

    @abstractmethod
    def next_choices(self, index: int, added: Any, finish: FinishEvent | None) -> Iterator[dict[str, Any]]:
        """What `take` gave, as choices of chunks; `finish`: it is the end of the answer."""

    @abstractmethod
    def last_choice(self, index: int, finish: FinishEvent) -> dict[str, Any]:
        """The choice of the chunk that says why an answer ended."""

    @abstractmethod
    def texts(self) -> tuple[Any, Any]:
        """(prompt, answers), for a log that wants them."""

    #
    # answering
    #

    async def respond(self, request: Request) -> Response:
        """Ask, and answer."""
        requests = self.engine_requests()
        try:
            answers = Answers(self.service.worker, self.service.ticket(request, requests), request)
        except ApiError as error:
            self.service.metrics.failed(self.endpoint, self.followed.applied.label, str(error.status))
            raise
        try:
            if not self.request.stream:
                while len(self.finishes) < len(requests):
                    for index, event in await self._next(answers):
                        self._take(index, event)
                self._end()
                answers.close()
                return JSONResponse(self._body(len(requests)))
            # Wait for the beginning: what fails before it can still be told by a status.
            first = await self._next(answers)
        except ClientGone:
            answers.close()
            return Response(status_code=499)
        except BaseException:
            answers.close()
            raise
        return EventStream(answers, self._first_chunks(), self._chunks(answers, first, len(requests)))

    async def _next(self, answers: Answers) -> Events:
        events: Events = await self.service.follow(self.followed, answers.next())
        self.service.note_first(self.followed)
        return events

    def _take(self, index: int, event: Event) -> Any:
        if isinstance(event, FinishEvent):
            self.finishes[index] = event
            self.followed.finishes.append(event)
        return self.take(index, event)

    def _end(self) -> None:
        self.service.ended(self.followed, self.texts)

    @property
    def _usage(self) -> dict[str, Any]:
        ordered: Sequence[FinishEvent] = [self.finishes[index] for index in sorted(self.finishes)]
        return usage([ordered[start : start + self.n] for start in range(0, len(ordered), self.n)])

    def _body(self, n_answers: int) -> dict[str, Any]:
        finish = self.finishes[0]
        choices = [self.choice(index) for index in range(n_answers)]
        if self.request.routing and n_answers > 1:
            for index, choice in enumerate(choices):
                choice["routing"] = _routing(self.finishes[index])
        return self.head.body(choices, usage=self._usage, **self._facts(finish))

    def _facts(self, finish: FinishEvent) -> dict[str, Any]:
        """What stands beside the choices at the end."""
        facts: dict[str, Any] = {"steering": steering_info(self.followed.applied, finish.n_cached)}
        if self.request.routing:
            facts["routing"] = _routing(finish)
        return facts | {"timings": timings(finish)}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk; where the numbers of tokens are asked for, all but the last say none."""
        if self._tells_usage:
            more.setdefault("usage", None)
        return self.head.body(choices, **more)

    @property
    def _tells_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    def _first_chunks(self) -> Iterator[dict[str, Any]]:
        info: dict[str, Any] = {"steering": steering_info(self.followed.applied)}
        for choice in self.first_choices():
            yield self._chunk([choice], **info)
            info = {}  # in the first one only

    async def _chunks(self, answers: Answers, first: Events, n_answers: int) -> AsyncIterator[dict[str, Any]]:
        events = first
        while True:
            for index, event in events:
                finish = event if isinstance(event, FinishEvent) else None
                for choice in self.next_choices(index, self._take(index, event), finish):
                    yield self._chunk([choice])
                if finish is not None:
                    yield self._chunk([self.last_choice(index, finish)], **self._facts(finish))
            if len(self.finishes) == n_answers:
                break
            events = await self._next(answers)
        if self._tells_usage:
            yield self._chunk([], usage=self._usage)
        self._end()


def _routing(finish: FinishEvent) -> Any:
    return None if finish.routing is None else finish.routing.tolist()
