"""A request for answers, from its arrival to its end: what chat/completions and completions have in common."""

from __future__ import annotations

import json
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ..generation.engine import FinishEvent, TokenEvent
from ..generation.engine import Request as EngineRequest
from ..llama.reasoning import Kind, Part
from .answers import Answer, Chunk
from .api_errors import ApiError, as_api_error, status_of
from .bodies import Head, steering_info, timings, usage
from .prompting import Prompter
from .routed_experts import Then, sglext
from .schemas import Generation
from .service import Asked, Service
from .streaming import DONE, Answers, ClientGone, EventStream, Frame, sse
from .worker import Events, Ticket

log = logging.getLogger("steermoe.server")


class GenerationCall(ABC):
    """One request of a client and its answers; the subclasses know the form of their endpoint."""

    endpoint: ClassVar[str]
    prefix: ClassVar[str]  # of ids
    kinds: ClassVar[tuple[str, str]]  # `object` of an answer, and of a chunk
    nothing: ClassVar[dict[str, Any]]  # the text of a chunk that adds none

    def __init__(
        self, service: Service, prompter: Prompter, request: Generation, asked: Asked, answers: list[Answer]
    ) -> None:
        """`answers`: an empty one for each that is asked for, n of each prompt."""
        self.service, self.prompter, self.request, self.asked, self.answers = service, prompter, request, asked, answers
        self.finishes: dict[int, FinishEvent] = {}
        self.head = Head(self.prefix, self.kinds[bool(request.stream)], asked.model)
        self._has_events = False
        # by answer, kind of text and rule; None: it is not sent yet
        self._frames: dict[tuple[int, Kind, int | None], Frame | None] = {}

    #
    # of the subclass
    #

    @abstractmethod
    def engine_requests(self) -> list[EngineRequest]:
        """What the engine is asked for, one request for each answer."""

    @abstractmethod
    def choice(self, index: int) -> dict[str, Any]:
        """A finished answer."""

    @abstractmethod
    def first_choices(self) -> Iterator[dict[str, Any]]:
        """The choices of the chunks that a stream begins with."""

    @abstractmethod
    def next_choices(self, index: int, added: Chunk, finish: FinishEvent | None) -> Iterator[dict[str, Any]]:
        """What an event added, as choices of chunks; `finish` if it was the answer's last."""

    @abstractmethod
    def texts(self) -> tuple[Any, Any]:
        """(prompt, answers) for the log."""

    def offset(self, index: int) -> int:
        """Where an answer begins in the text of its choice, in characters."""
        return 0

    def take(self, index: int, event: TokenEvent | FinishEvent) -> Chunk:
        """Add an event to an answer; returns what it adds."""
        if isinstance(event, FinishEvent):
            self.finishes[index] = event
        return self.answers[index].take(event)

    def chunk_choice(
        self, index: int, content: dict[str, Any], logprobs: Any = None, rule: int | None = None
    ) -> dict[str, Any]:
        """The choice of a chunk that does not end its answer; `rule` steered its text."""
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": None}
        return choice | {"rule": rule} if self.request.stream and self.request.return_steered else choice

    #
    # answering
    #

    async def respond(self, request: Request) -> Response:
        """Ask the engine, and answer."""
        requests = self.engine_requests()
        if not self.request.return_routed_experts:
            return await self._respond(request, requests)
        give_back = self.service.traces.reserve(requests, self.service.worker.require_ready())
        try:
            return Then(await self._respond(request, requests), give_back)
        except BaseException:
            give_back()
            raise

    async def _respond(self, request: Request, requests: list[EngineRequest]) -> Response:
        client = request.client.host if request.client else ""
        deadline = self.asked.began + self.service.settings.timeout
        ticket = Ticket(client, requests, deadline, streamed=bool(self.request.stream))
        try:
            answers = Answers(self.service.worker, ticket, request)
        except ApiError as error:
            self._count_failure(error)
            raise
        try:
            # Also for a stream: what fails before it begins can still be told by a status.
            events = await self.next(answers)
            if self.request.stream:
                return EventStream(answers, events, self)
            self._take_all(events)
            while not self.is_complete:
                self._take_all(await self.next(answers))
            self._end()
            answers.close()
            return JSONResponse(self._body())
        except ClientGone:
            answers.close()
            return Response(status_code=499)
        except BaseException:
            answers.close()
            raise

    def _take_all(self, events: Events) -> None:
        for index, event in events:
            self.take(index, event)

    async def next(self, answers: Answers) -> Events:
        """Wait for events. Raises as `Answers.next`."""
        try:
            events = await answers.next()
        except Exception as error:
            self._count_failure(error)
            raise
        if not self._has_events:
            self._has_events = True
            seconds = time.monotonic() - self.asked.began
            self.service.metrics.first_token(self.endpoint, self.asked.applied.label, seconds)
        return events

    @property
    def is_complete(self) -> bool:
        """Whether all answers have come to their end."""
        return len(self.finishes) == len(self.answers)

    def _count_failure(self, error: Exception) -> None:
        status = "gone" if isinstance(error, ClientGone) else str(status_of(error))
        self.service.metrics.failed(self.endpoint, self.asked.applied.label, status)

    def _end(self) -> None:
        """Count the request, and write a line to the log; its texts only if the server was told to."""
        seconds, label = time.monotonic() - self.asked.began, self.asked.applied.label
        finishes = list(self.finishes.values())
        self.service.metrics.answered(self.endpoint, label, finishes, seconds)
        n_prompt, n_cached, n_generated = (
            sum(getattr(finish, name) for finish in finishes) for name in ("n_prompt", "n_cached", "n_generated")
        )
        counts = f"prompt={n_prompt} cached={n_cached} generated={n_generated}"
        log.info("%s steering=%s %s %.3fs", self.endpoint, label, counts, seconds)
        if self.service.settings.log_prompts:
            prompt, answer = self.texts()
            log.info("prompt %s answer %s", json.dumps(prompt), json.dumps(answer))  # as JSON: no control characters

    #
    # what is sent
    #

    @property
    def _usage(self) -> dict[str, Any]:
        ordered, n = [self.finishes[index] for index in sorted(self.finishes)], self.request.n or 1
        return usage([ordered[start : start + n] for start in range(0, len(ordered), n)])

    def _body(self) -> dict[str, Any]:
        choices = [self.choice(index) | self._further(index) for index in range(len(self.answers))]
        if self.request.routing and len(choices) > 1:
            for index, choice in enumerate(choices):
                choice["routing"] = _routing(self.finishes[index])
        finish = self.finishes[0]
        return self.head.body(choices, usage=self._usage, **self._facts(finish), **self.sglext(finish))

    def _further(self, index: int) -> dict[str, Any]:
        """Fields of a finished answer that only requests for them get."""
        answer = self.answers[index]
        fields: dict[str, Any] = {"tokens": answer.tokens} if self.request.return_tokens else {}
        if answer.steered is not None:
            fields |= answer.steered.fields(self.offset(index))
            if self.request.return_tokens:
                fields["token_rules"] = answer.steered.token_rules
        # as `routing`: beside the choices is that of the first
        return fields | (self.sglext(self.finishes[index]) if len(self.answers) > 1 else {})

    def sglext(self, finish: FinishEvent) -> dict[str, Any]:
        """SGLang's field with the experts of an answer's tokens, if they are asked for."""
        return sglext(finish, self.request.routed_experts_start_len) if self.request.return_routed_experts else {}

    def _facts(self, finish: FinishEvent) -> dict[str, Any]:
        """The fields beside the choices at the end."""
        facts: dict[str, Any] = {"steering": steering_info(self.asked.applied, finish)}
        if self.request.routing:
            facts["routing"] = _routing(finish)
        return facts | {"timings": timings(finish)}

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A chunk; if usage is asked for, all but the last have the field too, as null."""
        if self._includes_usage:
            more.setdefault("usage", None)
        return self.head.body(choices, **more)

    @property
    def _includes_usage(self) -> bool:
        options = self.request.stream_options
        return options is not None and bool(options.include_usage)

    #
    # as a stream
    #

    def begin(self) -> bytes:
        """The events of a stream before all others."""
        info: dict[str, Any] = {"steering": steering_info(self.asked.applied)}
        data = b""
        for choice in self.first_choices():
            data += sse(self._chunk([choice], **info))
            info = {}  # in the first one only
        return data

    def add(self, events: Events) -> bytes:
        """The events of a stream for those of the engine; b"" if nothing is certain by them."""
        return b"".join([self._added(index, event) for index, event in events])

    def end(self) -> bytes:
        """The events at the end of a stream."""
        further = self.sglext(self.finishes[0])
        data = sse(self._chunk([], **further)) if further else b""
        if self._includes_usage:
            data += sse(self._chunk([], usage=self._usage))
        self._end()
        return data + DONE

    def fail(self, error: Exception) -> bytes:
        """The event of an error that ends a stream."""
        return sse(as_api_error(error).body())

    def _added(self, index: int, event: TokenEvent | FinishEvent) -> bytes:
        added = self.take(index, event)
        if isinstance(event, FinishEvent):
            last = self.chunk_choice(index, self.nothing)
            last |= {"finish_reason": self.answers[index].reason, "seed": event.seed}
            last |= self._further(index)
            return self._chunks_of(index, added, event) + sse(self._chunk([last], **self._facts(event)))
        if added.entries or added.arguments or len(added.parts) != 1:
            return self._chunks_of(index, added)
        [(kind, text)] = added.parts  # most tokens are text and nothing else
        key = (index, kind, added.rules[0] if added.rules else None)
        if key not in self._frames:
            event_of = self._chunks_of(index, Chunk([Part(kind, Frame.PLACEHOLDER)], [], rules=added.rules))
            self._frames[key] = Frame(event_of) if event_of else None
        frame = self._frames[key]
        return b"" if frame is None else frame.of(text)

    def _chunks_of(self, index: int, added: Chunk, finish: FinishEvent | None = None) -> bytes:
        return b"".join([sse(self._chunk([choice])) for choice in self.next_choices(index, added, finish)])


def _routing(finish: FinishEvent) -> Any:
    return None if finish.routing is None else finish.routing.tolist()
