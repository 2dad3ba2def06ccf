"""A request, the events that answer it, and its state."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..llama.detokenizer import TextStream
from ..llama.grammars import GrammarLimitError
from ..llama.sampling import Sampler, Sampling, log_softmax
from ..steering.bias_file import BiasFile
from .context import Part, SlotContext
from .slots import Slot

Int64 = npt.NDArray[np.int64]
Logits = npt.NDArray[np.float32]
Reason = Literal["stop", "length", "context", "grammar", "cancelled"]


@dataclass(frozen=True)
class TokenEvent:
    """A token of the answer, with the text that is certain now: "" while a character or a stop string is incomplete.

    `token` is the token that was drawn, -1 where only held back text is given out. `logprob` is the natural logarithm
    of its probability before any sampler, `top` the likeliest (token, logprob); both only with `Request.n_probs`.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class FinishEvent:
    """How an answer ended.

    `reason`: "stop" (an end-of-generation token, a stop string, the end of the grammar), "length" (max_tokens),
    "context" (n_ctx is full), "grammar" (it cannot be followed further) or "cancelled". `n_cached` of the `n_prompt`
    tokens were in memory already. `n_generated` counts the answer's tokens without the one that ends the generation.
    `prompt_seconds` run from the first decode to the first token, `seconds` from there on. `stop` is the stop string
    that was found.

    `routing` [n_layer, n_expert] counts the selections of the `n_rows` rows whose logits were drawn from: the prompt's
    last token and the answer's, up to the one before the last draw. None without a recorder, or if not asked for.

    `end` is the end-of-generation token, if one was drawn. `prompt` are the prompt's tokens from `Request.prompt_from`
    on, with the probabilities that the model gave them (none for the first of all), if `Request.prompt_probs` asked
    for them. Both have no text.
    """

    reason: Reason
    n_prompt: int
    n_cached: int
    n_generated: int
    prompt_seconds: float
    seconds: float
    seed: int
    stop: str | None
    routing: Int64 | None = field(default=None, compare=False)
    n_rows: int = 0
    end: TokenEvent | None = field(default=None, compare=False)
    prompt: tuple[TokenEvent, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class Request:
    """An answer that is asked for.

    `tokens` is the whole prompt; what of it the slot holds already is not computed again. `bias` steers it, None:
    nothing does. `max_tokens` None: up to the end of generation or of n_ctx. `stop`: strings that end the answer and
    are left out of it. `n_probs`: how many of the likeliest tokens are named with their log probabilities, the drawn
    token's besides; None: no log probabilities. `prompt_probs`: the same for the prompt's tokens from index
    `prompt_from` on; what the slot holds is used for those before them alone. `special`: control tokens are part of the
    text. `slot`: a slot of the caller's own (`Engine.slot`); None: the engine takes one. Without `reuse` the whole
    prompt is computed, whatever the slot holds. Without `routing` the selections of experts are not counted, which is
    faster.
    """

    tokens: Sequence[int]
    bias: BiasFile | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_probs: int | None = None
    special: bool = False
    prompt_probs: int | None = None
    prompt_from: int = 0
    slot: Slot | None = None
    reuse: bool = True
    routing: bool = True


Event = TokenEvent | FinishEvent


class RequestState:
    """How far a request is. `wanted` is the prompt and the answer so far; `slot` is None while it waits for one."""

    def __init__(self, request: Request, context: SlotContext) -> None:
        """Raises UsageError, ModelMismatchError, ModelError for a request that cannot be carried out."""
        self.wanted = context.checked_tokens(request.tokens)
        n_prompt, n_ctx, n_vocab = len(self.wanted), context.n_ctx, context.n_vocab
        if not n_prompt:
            raise UsageError("the prompt has no tokens; give at least one")
        if n_prompt >= n_ctx:
            raise UsageError(
                f"the prompt has {n_prompt} tokens, but n_ctx is {n_ctx}; "
                f"raise it (-c {n_prompt + 256}) or shorten the prompt"
            )
        if request.max_tokens is not None and request.max_tokens < 0:
            raise UsageError(f"max_tokens: {request.max_tokens} is not at least 0; leave it out for no limit")
        if not all(request.stop):
            raise UsageError("stop: a stop string is empty; leave it out")
        for name, number in (("n_probs", request.n_probs), ("prompt_probs", request.prompt_probs)):
            if number is not None and not 0 <= number <= n_vocab:
                raise UsageError(f"{name}: {number} is not from 0 to {n_vocab}")
        if not 0 <= request.prompt_from < n_prompt:
            raise UsageError(f"prompt_from: {request.prompt_from} is not from 0 to {n_prompt - 1}")
        self.request = request
        self.bias = context.checked(request.bias)
        self.slot = request.slot
        self.begun = False
        self._context = context
        self._sampler: Sampler | None = None
        if request.sampling.grammar is not None or request.sampling.logit_bias:
            self._sampler = self._new_sampler()  # what can be refused is refused now; else in `begin`: many may wait
        self._text = TextStream(request.stop)
        self._n_prompt = n_prompt
        self._n_cached = self._n_generated = self._n_rows = 0
        self._counts_before: Int64 | None = None
        self._prompt: list[TokenEvent] = []
        self._end: TokenEvent | None = None
        self._start = self._answer_start = 0.0

    def _new_sampler(self) -> Sampler:
        context = self._context
        sampling = self.request.sampling
        return Sampler(context.model.vocab, sampling, self.wanted, context.n_ctx, lambda: context.guided_tokenizer)

    @property
    def n_missing(self) -> int:
        """Tokens that are not in memory yet."""
        return len(self.wanted) - self._n_held

    @property
    def _n_held(self) -> int:
        assert self.slot is not None
        return len(self.slot.tokens)

    @property
    def scores_next(self) -> bool:
        """Whether the probabilities of the prompt's tokens that come next are wanted."""
        return self._scores_prompt and self._n_held >= self._first_scored

    def n_next(self, n_scored: int) -> int:
        """How many tokens may be computed next; at most `n_scored` where probabilities are wanted."""
        if not self._scores_prompt:
            return self.n_missing
        return min(self.n_missing, n_scored) if self.scores_next else self._first_scored - self._n_held

    @property
    def _scores_prompt(self) -> bool:
        """Whether the prompt is being computed, and its tokens' probabilities are wanted."""
        return self.request.prompt_probs is not None and not self._n_rows

    @property
    def _first_scored(self) -> int:
        """The first token whose logits are wanted: they are about the next one."""
        return max(0, self.request.prompt_from - 1)

    def part(self, n_tokens: int) -> Part:
        """The next `n_tokens` tokens for a decode."""
        slot, start = self.slot, self._n_held
        assert slot is not None
        tokens = self.wanted[start : start + n_tokens]
        last = start + n_tokens == len(self.wanted)
        return slot.part(tokens, n_outputs=int(last), scored=self.scores_next, counted=self.request.routing)

    def score(self, part: Part, scores: Iterator[Logits]) -> None:
        """Take the logits of a part of the prompt; each token's are those for the next one."""
        if not part.start and not self.request.prompt_from:
            self._prompt.append(TokenEvent("", self.wanted[0]))
        for index, logits in enumerate(scores, part.start + 1):
            self._prompt.append(_token_event("", self.wanted[index], logits, self.request.prompt_probs))

    def begin(self) -> None:
        """Steer the slot, and keep what its memory shares with the prompt; the last token is always computed."""
        slot = self.slot
        assert slot is not None
        self._start = time.perf_counter()
        self._sampler = self._sampler or self._new_sampler()
        slot.attach(self.bias)
        most = self._first_scored if self._scores_prompt else self._n_prompt - 1
        slot.keep_common(self.wanted, most if self.request.reuse else 0)
        self._counts_before = self._context.counts(slot.index) if self.request.routing else None
        self._n_cached = len(slot.tokens)
        self.begun = True

    def advance(self, logits: Logits) -> list[Event]:
        """Draw a token by the logits behind `wanted`; returns its events, a `FinishEvent` last if that is the end."""
        request, sampler = self.request, self._sampler
        assert sampler is not None
        if not self._n_rows:
            self._answer_start = time.perf_counter()
        self._n_rows += 1
        if request.max_tokens == 0:
            return self.finish("length")
        try:
            token = sampler.sample(logits)
            if token is None or self._context.is_end(token):
                self._end = None if token is None else _token_event("", token, logits, request.n_probs)
                return self.finish("stop")
            sampler.accept(token)
        except GrammarLimitError:  # of this request alone
            return self.finish("grammar")
        self.wanted.append(token)
        self._n_generated += 1
        reason: Reason | None = None
        if self._n_generated == request.max_tokens:
            reason = "length"
        elif len(self.wanted) == self._context.n_ctx:
            reason = "context"
        text = self._text.feed(self._context.token_bytes(token, request.special))
        if self._text.stop is not None:
            reason = "stop"
        event = _token_event(text, token, logits, request.n_probs)
        return [event, *self.finish(reason)] if reason else [event]

    def finish(self, reason: Reason) -> list[Event]:
        """End it: the text that was held back, and the `FinishEvent`."""
        rest = self._text.feed(b"", final=True)
        now = time.perf_counter()
        answer_start = self._answer_start or now
        before = self._counts_before
        after = None if before is None or self.slot is None else self._context.counts(self.slot.index)
        seed = self.request.sampling.seed or 0  # of one that was ended before its turn
        if self._sampler is not None:
            seed = self._sampler.seed
            self._sampler.close()
        finish = FinishEvent(
            reason=reason,
            n_prompt=self._n_prompt,
            n_cached=self._n_cached,
            n_generated=self._n_generated,
            prompt_seconds=answer_start - self._start if self.begun else 0.0,
            seconds=now - answer_start,
            seed=seed,
            stop=self._text.stop,
            routing=None if after is None or before is None else after - before,
            n_rows=self._n_rows,
            end=self._end,
            prompt=tuple(self._prompt),
        )
        return [TokenEvent(rest, -1), finish] if rest else [finish]


def _token_event(text: str, token: int, logits: Logits, n_probs: int | None) -> TokenEvent:
    if n_probs is None:
        return TokenEvent(text, token)
    logprobs = log_softmax(logits)
    # of equal ones the first, without sorting a whole vocabulary
    likely = np.flatnonzero(logprobs >= np.partition(logprobs, -n_probs)[-n_probs]) if n_probs else np.arange(0)
    best = likely[np.argsort(-logprobs[likely], kind="stable")][:n_probs]
    return TokenEvent(text, token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))
