"""What the routes share: the worker, the names of model and steerings, and how requests become those of the engine."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..generation.engine import Request as EngineRequest
from ..generation.engine import Sampling
from .api_errors import ApiError
from .learn_jobs import LearnJobs
from .metrics import Metrics
from .prompting import Prompter
from .registered import NONE, Applied
from .registry import SteeringRegistry
from .routed_experts import ExpertTraces
from .schemas import Generation, Wanted
from .settings import ServerSettings
from .worker import Worker

_MAX_ANSWERS = 256


@dataclass(frozen=True)
class Asked:
    """What a request for answers names: the model's id, and what steers; `began` is when it came (time.monotonic)."""

    model: str
    applied: Applied
    began: float


class Service:
    """One served model, for the routes."""

    def __init__(
        self, worker: Worker, registry: SteeringRegistry, settings: ServerSettings, jobs: LearnJobs | None = None
    ) -> None:
        self.worker, self.registry, self.settings, self.jobs = worker, registry, settings, jobs
        self.metrics = Metrics(worker)
        self.traces = ExpertTraces()
        self.created = int(time.time())
        self._at_end: list[Callable[[], None]] = [] if jobs is None else [jobs.close]

    @functools.cached_property
    def _prompter(self) -> Prompter:
        settings = self.settings
        return Prompter(
            self.worker.require_ready(),
            thinking=settings.thinking,
            template_arguments=dict(settings.template_arguments),
            date=settings.date,
            timeout=settings.timeout,
        )

    def prompter(self) -> Prompter:
        """The renderer and tokenizer of prompts. Raises ApiError (503) while there is no model."""
        self.worker.require_ready()
        return self._prompter

    def at_end(self, work: Callable[[], None]) -> None:
        """Let something be done when the server ends."""
        self._at_end.append(work)

    def close(self) -> None:
        """End the threads."""
        for work in self._at_end:
            work()
        if "_prompter" in self.__dict__:
            self._prompter.close()
        self.worker.stop()
        self.registry.close()

    #
    # names
    #

    @property
    def model_names(self) -> tuple[str, ...]:
        """The names of the model itself."""
        return (self.settings.model, *self.settings.aliases)

    def models(self) -> list[tuple[str, str | None]]:
        """(id, steering) of /v1/models: the model, and MODEL:NAME for each steering that needs no numbers."""
        own = [(name, self.registry.default) for name in self.model_names]
        names = [(entry.name, entry.name) for entry in self.registry.entries() if entry.has_numbers]
        return own + [(f"{self.settings.model}:{name}", steering) for name, steering in (*names, (NONE, None))]

    def steering_of_model(self, asked: str) -> str | None:
        """The name of the steering that a model's id stands for. Raises ApiError (404)."""
        if asked in self.model_names:
            return self.registry.default
        base, colon, suffix = asked.rpartition(":")
        if not colon or base not in self.model_names:
            ids = ", ".join(id_ for id_, _ in self.models())
            raise ApiError.not_found(
                f"model {asked!r} is not served; there are: {ids}", param="model", code="model_not_found"
            )
        return None if suffix == NONE else self.registry.entry(suffix).name

    def _named(self, request: Generation) -> tuple[str, Wanted | None]:
        """(the model's id, the steering) that a request asks for. Raises ApiError."""
        asked = request.model or self.settings.model
        if asked not in self.model_names and ":" not in asked:
            asked = self.settings.model  # the one model answers, and says so, as llama-server does
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
        """The request's sampling, with the server's defaults for what it leaves out. Raises ApiError, UsageError."""
        biases = request.biases
        self.prompter().check_tokens(list(biases), "logit_bias")
        seed = self.settings.sampling.seed
        if request.seed is not None:
            seed = None if request.seed == -1 else request.seed % 0xFFFFFFFF  # llama.cpp: the last one means random
        return request.sampling(self.settings.sampling, seed=seed, grammar=grammar, logit_bias=biases)

    def limit_of(self, request: Generation, default: int | None = None) -> int | None:
        """The most tokens of an answer, None for no limit; the server's or `default` if the request does not say."""
        if request.max_tokens is None:
            return self.settings.max_tokens or default
        return None if request.max_tokens == -1 else request.max_tokens

    def engine_requests(
        self, request: Generation, first: EngineRequest, prompts: list[list[int]]
    ) -> list[EngineRequest]:
        """The engine requests of all answers, n of each prompt, like `first`. Raises ApiError."""
        n = request.n or 1
        if n * len(prompts) > _MAX_ANSWERS:
            raise ApiError(400, f"{n * len(prompts)} answers are asked for; at most {_MAX_ANSWERS} at once", param="n")
        for tokens in prompts:
            if not tokens:
                raise ApiError(400, "the prompt has no tokens", param="prompt", code="empty_prompt")
            self.prompter().require_room(len(tokens))
            if request.return_routed_experts and (request.routed_experts_start_len or 0) > len(tokens):
                raise ApiError(
                    400,
                    f"routed_experts_start_len: {request.routed_experts_start_len} is behind the prompt, which has "
                    f"{len(tokens)} tokens",
                    param="routed_experts_start_len",
                    code="invalid_value",
                )
        seed = first.sampling.seed
        return [
            replace(
                first,
                tokens=tokens,
                reuse=request.cache_prompt is not False,
                routing=bool(request.routing),
                trace=bool(request.return_routed_experts),
                # n answers with a seed differ, and each is the same every time
                sampling=replace(first.sampling, seed=None if seed is None else (seed + i) % 0xFFFFFFFF),
            )
            for tokens in prompts
            for i in range(n)
        ]

    async def asked(self, request: Generation) -> Asked:
        """What a request names, with its bias built. Raises ApiError, UsageError, ChoiceError."""
        model, wanted = self._named(request)
        applied = self.registry.ready(wanted)
        if applied is None:
            applied = await asyncio.to_thread(self.registry.resolve, wanted)
        return Asked(model, applied, time.monotonic())
