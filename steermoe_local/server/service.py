"""What the routes share: the model's name, what steers, the worker, and how a request is followed to its end."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request

from ..generation.engine import FinishEvent, Sampling
from ..generation.engine import Request as EngineRequest
from .api_errors import ApiError, status_of
from .metrics import Metrics
from .prompting import Prompter
from .registry import NONE, Applied, SteeringRegistry
from .schemas import Generation, SteeringChoice
from .settings import ServerSettings
from .streaming import ClientGone
from .worker import Ticket, Worker

__all__ = ["Followed", "Service"]

log = logging.getLogger("steermoe.server")

_MAX_ANSWERS = 256
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "repeat_last_n",
)


@dataclass
class Followed:
    """A request on its way: what the log and the metrics say at its end."""

    endpoint: str
    model: str
    applied: Applied
    began: float = field(default_factory=time.monotonic)
    finishes: list[FinishEvent] = field(default_factory=list)
    first: float | None = None


class Service:
    """One served model."""

    def __init__(self, worker: Worker, registry: SteeringRegistry, settings: ServerSettings) -> None:
        self.worker, self.registry, self.settings = worker, registry, settings
        self.metrics = Metrics(worker)
        self.created = int(time.time())

    @functools.cached_property
    def _prompter(self) -> Prompter:
        settings = self.settings
        return Prompter(
            self.worker.require_ready(),
            thinking=settings.thinking,
            template_arguments=dict(settings.template_arguments),
        )

    def prompter(self) -> Prompter:
        """Renders and tokenizes. Raises ApiError (503) while there is no model."""
        self.worker.require_ready()
        return self._prompter

    def close(self) -> None:
        """End the threads."""
        if "_prompter" in self.__dict__:
            self._prompter.close()
        self.worker.stop()

    #
    # names
    #

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the model itself."""
        return (self.settings.model, *self.settings.aliases)

    def models(self) -> list[tuple[str, str | None]]:
        """(id, steering) of /v1/models: the model, and MODEL:NAME for each steering that its name is enough for."""
        names = [entry.name for entry in self.registry.entries() if entry.has_numbers]
        own: list[tuple[str, str | None]] = [(name, self.registry.default) for name in self.model_names]
        return (
            own
            + [(f"{self.settings.model}:{name}", name) for name in names]
            + [(f"{self.settings.model}:{NONE}", None)]
        )

    def steering_of_model(self, asked: str) -> str | None:
        """The steering that a model's id stands for, by its name. Raises ApiError (404)."""
        if asked in self.model_names:
            return self.registry.default
        base, colon, suffix = asked.rpartition(":")
        if not colon or base not in self.model_names:
            ids = ", ".join(id_ for id_, _ in self.models())
            raise ApiError.not_found(
                f"model {asked!r} is not served; there are: {ids}", param="model", code="model_not_found"
            )
        return None if suffix == NONE else self.registry.entry(suffix).name

    def _asked(self, request: Generation) -> tuple[str, str | SteeringChoice | None]:
        """(the model's id, the steering) that a request asks for. Raises ApiError."""
        asked = request.model or self.settings.model
        named = self.steering_of_model(asked)
        if "steering" not in request.model_fields_set:
            return asked, named
        if asked not in self.model_names and request.steering != named:
            raise ApiError(
                400,
                f"the model {asked!r} and the field steering both choose; leave one of them out",
                param="steering",
                code="invalid_value",
            )
        return asked, request.steering

    #
    # requests
    #

    def sampling_of(self, request: Generation, grammar: str | None = None) -> Sampling:
        """How tokens are drawn; where the request is silent, by the server's defaults. Raises ApiError, UsageError."""
        given = {name: value for name in _SAMPLING if (value := getattr(request, name)) is not None}
        biases = {int(token): bias for token, bias in (request.logit_bias or {}).items()}
        self.prompter().check_tokens(list(biases), "logit_bias")
        seed = self.settings.sampling.seed
        if request.seed is not None:
            seed = None if request.seed == -1 else request.seed % 0xFFFFFFFF  # llama.cpp: the last one means random
        return replace(self.settings.sampling, **given, seed=seed, grammar=grammar, logit_bias=biases)

    def engine_requests(
        self, request: Generation, first: EngineRequest, prompts: list[list[int]]
    ) -> list[EngineRequest]:
        """The answers that a request asks for, n of each prompt. Raises ApiError."""
        n = request.n or 1
        if n * len(prompts) > _MAX_ANSWERS:
            raise ApiError(400, f"{n * len(prompts)} answers are asked for; at most {_MAX_ANSWERS} at once", param="n")
        n_ctx = self.worker.require_ready().n_ctx
        for tokens in prompts:
            if not tokens:
                raise ApiError(400, "the prompt has no tokens", param="prompt", code="empty_prompt")
            if len(tokens) >= n_ctx:
                raise ApiError(
                    400,
                    f"the prompt has {len(tokens)} tokens, but the context of an answer is {n_ctx}; shorten it, or "
                    "start the server with a larger -c",
                    code="context_length_exceeded",
                )
        seed = first.sampling.seed
        return [
            replace(
                first,
                tokens=tokens,
                # n answers with a seed differ, and each is the same every time
                sampling=replace(first.sampling, seed=None if seed is None else (seed + i) % 0xFFFFFFFF),
            )
            for tokens in prompts
            for i in range(n)
        ]

    async def followed(self, endpoint: str, request: Generation) -> Followed:
        """A request on its way, with what steers it. Raises ApiError, UsageError, ChoiceError."""
        model, wanted = self._asked(request)
        applied = self.registry.ready(wanted)
        if applied is None:
            applied = await asyncio.to_thread(self.registry.resolve, wanted)
        return Followed(endpoint, model, applied)

    def ticket(self, request: Request, requests: list[EngineRequest]) -> Ticket:
        """A ticket with the server's deadline."""
        client = request.client.host if request.client else ""
        return Ticket(client, requests, time.monotonic() + self.settings.timeout)

    def note_first(self, followed: Followed) -> None:
        """Something came; the first time it is the first token."""
        if followed.first is None:
            followed.first = time.monotonic() - followed.began
            self.metrics.first_token(followed.endpoint, followed.applied.label, followed.first)

    #
    # the end of a request
    #

    async def follow(self, followed: Followed, work: Awaitable[Any]) -> Any:
        """Await what answers a request; if it fails, that is counted."""
        try:
            return await work
        except ClientGone:
            self.metrics.failed(followed.endpoint, followed.applied.label, "gone")
            raise
        except Exception as error:
            self.metrics.failed(followed.endpoint, followed.applied.label, str(status_of(error)))
            raise

    def ended(self, followed: Followed, texts: Callable[[], tuple[Any, Any]]) -> None:
        """A request was answered: count it, and write a line to the log; its texts only if asked for."""
        seconds = time.monotonic() - followed.began
        self.metrics.answered(followed.endpoint, followed.applied.label, followed.finishes, seconds)
        counts = usage_of(followed.finishes)
        log.info("%s steering=%s %s %.3fs", followed.endpoint, followed.applied.label, counts, seconds)
        if self.settings.log_prompts:
            prompt, answer = texts()
            log.info("prompt %s answer %s", json.dumps(prompt), json.dumps(answer))  # as JSON: no control characters


def usage_of(finishes: list[FinishEvent]) -> str:
    """Tokens, for the log."""
    n_prompt, n_cached, n_generated = (
        sum(getattr(finish, name) for finish in finishes) for name in ("n_prompt", "n_cached", "n_generated")
    )
    return f"prompt={n_prompt} cached={n_cached} generated={n_generated}"
