"""POST /v1/completions."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..generation.engine import FinishEvent, TokenEvent
from ..generation.engine import Request as EngineRequest
from ..llama.reasoning import Part
from .answers import Answer, Chunk, Entry
from .bodies import completion_logprobs
from .generation import GenerationCall
from .json_requests import Json, JsonRoute
from .openapi import ERRORS, STREAMS
from .prompting import Prompter, TextPrompt
from .schemas import CompletionRequest
from .service import Asked, Service

_DEFAULT_TOKENS = 16  # OpenAI's


class _CompletionCall(GenerationCall):
    endpoint = "completions"
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")
    nothing: ClassVar = {"text": ""}
    request: CompletionRequest

    def __init__(
        self,
        service: Service,
        prompter: Prompter,
        request: CompletionRequest,
        asked: Asked,
        prompts: Sequence[TextPrompt],
    ) -> None:
        piece = functools.partial(prompter.piece, special=False)
        self.prompts = prompts
        self.prompt_of = [prompt for prompt in prompts for _ in range(request.n or 1)]  # by answer
        self._with_tokens = request.logprobs is not None
        answers = [Answer(piece, self._with_tokens, with_rules=bool(request.return_steered)) for _ in self.prompt_of]
        super().__init__(service, prompter, request, asked, answers)
        # The prompt's tokens come with the end of an answer, but stand before it: nothing can be sent earlier.
        self._held = bool(request.echo) and self._with_tokens

    def engine_requests(self) -> list[EngineRequest]:
        request = self.request
        first = EngineRequest(
            [],
            sampling=self.service.sampling_of(request),
            max_tokens=self.service.limit_of(request, _DEFAULT_TOKENS),
            stop=request.stops,
            n_probs=request.logprobs,
            prompt_probs=request.logprobs if request.echo else None,
            bias=self.asked.applied.bias,
        )
        return self.service.engine_requests(request, first, [prompt.tokens for prompt in self.prompts])

    def take(self, index: int, event: TokenEvent | FinishEvent) -> Chunk:
        chunk, answer = super().take(index, event), self.answers[index]
        if isinstance(event, FinishEvent) and event.end is not None and self._with_tokens:
            # An evaluation that scores a prompt asks for one token more and drops it: it has to be there even if it is
            # the end. It has no text.
            chunk.entries.append(_entry(event.end, len(answer.text)))
            answer.entries.append(chunk.entries[-1])
        return chunk

    def choice(self, index: int) -> dict[str, Any]:
        answer, finish = self.answers[index], self.finishes[index]
        choice: dict[str, Any] = {"index": index, "text": self._echoed(index) + answer.text}
        choice["logprobs"] = self._logprobs(index, answer.entries, finish)
        return choice | {"finish_reason": answer.reason, "seed": finish.seed}

    def first_choices(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.answers)):
            yield self.chunk_choice(index, {"text": "" if self._held else self._echoed(index)})

    def next_choices(self, index: int, added: Chunk, finish: FinishEvent | None) -> Iterator[dict[str, Any]]:
        if self._held:
            if finish is not None:
                whole, steered = self.choice(index), self.answers[index].steered
                text = whole["text"] if steered is None else self._echoed(index)
                yield self.chunk_choice(index, {"text": text}, whole["logprobs"])
                for text, rule in () if steered is None else steered.pieces(self.answers[index].text):
                    yield self.chunk_choice(index, {"text": text}, None, rule)
        elif added.parts or added.entries:
            logprobs = self._logprobs(index, added.entries)
            for (_, text), rule in added.pieces or [(Part("answer", ""), None)]:
                yield self.chunk_choice(index, {"text": text}, logprobs, rule)
                logprobs = self._logprobs(index, ())  # tokens go with the first part of their text

    def offset(self, index: int) -> int:
        return len(self._echoed(index))

    def texts(self) -> tuple[Any, Any]:
        return [prompt.text for prompt in self.prompts], [answer.text for answer in self.answers]

    def _echoed(self, index: int) -> str:
        return self.prompt_of[index].text if self.request.echo else ""

    def _logprobs(self, index: int, entries: Sequence[Entry], finish: FinishEvent | None = None) -> Any:
        """Those of an answer's tokens; with `finish` after the prompt's, if it is echoed."""
        if not self._with_tokens:
            return None
        prompt = self.prompt_of[index]
        after = [replace(entry, offset=len(prompt.text) + entry.offset) for entry in entries]
        before = []
        if finish is not None and self.request.echo:
            before = [_entry(token, offset) for token, offset in zip(finish.prompt, prompt.offsets, strict=True)]
        return completion_logprobs([*before, *after], self.prompter.piece)


def _entry(event: TokenEvent, offset: int) -> Entry:
    return Entry(event.token, event.logprob, event.top, offset)


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter(route_class=JsonRoute)

    @routes.post("/v1/completions", tags=["answers"], responses={200: STREAMS, **ERRORS}, response_model=None)
    async def completions(body: Json[CompletionRequest], request: Request) -> Response:
        """Continue texts or tokens as they are, steered as the request says."""
        prompter = service.prompter()
        asked = await service.asked(body)
        prompts = await prompter.run(prompter.texts, body.prompt)
        return await _CompletionCall(service, prompter, body, asked, prompts).respond(request)

    return routes
