"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from ..generation.engine import FinishEvent, TokenEvent
from ..generation.engine import Request as EngineRequest
from .answers import Answer, Chunk, Entry, finish_reason
from .generation import Exchange
from .openapi import ERRORS, STREAMS
from .prompting import Prompter, TextPrompt
from .responses import completion_logprobs
from .schemas import CompletionRequest
from .service import Followed, Service
from .worker import Event

__all__ = ["router"]

_DEFAULT_TOKENS = 16  # OpenAI's


class _Completion(Exchange):
    endpoint = "completions"
    prefix = "cmpl"
    kinds = ("text_completion", "text_completion")
    request: CompletionRequest

    def __init__(
        self,
        service: Service,
        prompter: Prompter,
        request: CompletionRequest,
        followed: Followed,
        prompts: Sequence[TextPrompt],
    ) -> None:
        super().__init__(service, prompter, request, followed)
        self.prompts = prompts
        self.answers = [Answer(self._token_bytes, self._with_tokens) for _ in range(self.n * len(prompts))]
        # The prompt's tokens come with the end of an answer, and they stand before it: nothing can be sent earlier.
        self._held = bool(request.echo) and self._with_tokens

    @property
    def _with_tokens(self) -> bool:
        return self.request.logprobs is not None

    def _token_bytes(self, token: int) -> bytes:
        return self.prompter.piece(token, special=False)

    def _prompt(self, index: int) -> TextPrompt:
        return self.prompts[index // self.n]

    def engine_requests(self) -> list[EngineRequest]:
        request = self.request
        default = self.service.settings.max_tokens or _DEFAULT_TOKENS
        first = EngineRequest(
            [],
            sampling=self.service.sampling_of(request),
            max_tokens=default if request.max_tokens is None else request.max_tokens,
            stop=request.stops,
            n_probs=request.logprobs,
            prompt_probs=request.logprobs if request.echo else None,
            bias=self.followed.applied.bias,
        )
        return self.service.engine_requests(request, first, [prompt.tokens for prompt in self.prompts])

    def take(self, index: int, event: Event) -> Chunk:
        assert not isinstance(event, Exception)
        answer = self.answers[index]
        chunk = answer.take(event)
        if isinstance(event, FinishEvent) and event.end is not None and self._with_tokens:
            # An evaluation that scores a prompt asks for one token more and drops it: it has to be there even if it is
            # the end. It has no text.
            chunk.entries.append(_entry(event.end, len(answer.text)))
            answer.entries.append(chunk.entries[-1])
        return chunk

    def choice(self, index: int) -> dict[str, Any]:
        finish = self.finishes[index]
        answer = self.answers[index]
        choice = _choice(index, self._text(index), self._logprobs(index, answer.entries, finish), finish_reason(finish))
        return choice | {"seed": finish.seed}

    def first_choices(self) -> Iterator[dict[str, Any]]:
        for index in range(len(self.answers)):
            yield _choice(index, self._prompt(index).text if self.request.echo and not self._held else "")

    def next_choices(self, index: int, added: Chunk, finish: FinishEvent | None) -> Iterator[dict[str, Any]]:
        if self._held:
            if finish is not None:
                whole = self.choice(index)
                yield _choice(index, whole["text"], whole["logprobs"])
        elif added.text or added.entries:
            yield _choice(index, added.text, self._logprobs(index, added.entries))

    def last_choice(self, index: int, finish: FinishEvent) -> dict[str, Any]:
        return _choice(index, "", None, finish_reason(finish)) | {"seed": finish.seed}

    def texts(self) -> tuple[Any, Any]:
        return [prompt.text for prompt in self.prompts], [answer.text for answer in self.answers]

    def _text(self, index: int) -> str:
        return (self._prompt(index).text if self.request.echo else "") + self.answers[index].text

    def _logprobs(self, index: int, entries: Sequence[Entry], finish: FinishEvent | None = None) -> Any:
        """Those of an answer's tokens; with `finish` behind the prompt's, if it is echoed."""
        if not self._with_tokens:
            return None
        prompt = self._prompt(index)
        behind = [Entry(e.token, e.logprob, e.top, len(prompt.text) + e.offset) for e in entries]
        before = []
        if finish is not None and self.request.echo:
            before = [_entry(piece, offset) for piece, offset in zip(finish.prompt, prompt.offsets, strict=True)]
        return completion_logprobs([*before, *behind], self.prompter.piece)


def _entry(piece: TokenEvent, offset: int) -> Entry:
    return Entry(piece.token, piece.logprob, piece.top, offset)


def _choice(index: int, text: str, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions", tags=["answers"], responses={200: STREAMS, **ERRORS}, response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts or tokens as they are, steered as the request says."""
        prompter = service.prompter()
        followed = await service.followed(_Completion.endpoint, body)
        prompts = await prompter.run(prompter.texts, body.prompt)
        return await _Completion(service, prompter, body, followed, prompts).respond(request)

    return routes
