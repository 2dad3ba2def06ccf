"""How far a request is: what of it is in memory, what steers its tokens, what was drawn."""

from __future__ import annotations

import time
from itertools import islice

import numpy as np

from ..errors import UsageError
from ..llama.detokenizer import TextStream
from ..llama.grammars import GrammarLimitError
from ..llama.sampling import Sampler, log_softmax
from .context import Int64, Logits, Part, SlotContext
from .requests import Event, FinishEvent, Reason, Request, TokenEvent
from .text_steering import UNSTEERED, Mark, TextSteering


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
        if request.trace:
            context.require_trace("trace asks for the experts of the tokens")
        self.request = request
        self.bias = context.checked(request.bias)
        self.steering = TextSteering(
            context, self.bias, request.style, self.wanted, request.n_prompt, trace=request.trace
        )
        self.slot = request.slot
        self.begun = False
        self._context = context
        self._sampler: Sampler | None = None
        if request.sampling.grammar is not None or request.sampling.logit_bias:
            self._sampler = self._new_sampler()  # what can be refused is refused now; else in `begin`: many may wait
        self._text = TextStream(request.stop)
        self._n_prompt = n_prompt
        self._n_cached = self._n_generated = self._n_rows = self._n_steered = 0
        self._counts_before: Int64 | None = None
        self._prompt: list[TokenEvent] = []
        self._end: TokenEvent | None = None
        self._start = self._answer_start = 0.0

    def _new_sampler(self) -> Sampler:
        context = self._context
        sampling = self.request.sampling
        return Sampler(context.model.vocab, sampling, self.wanted, context.n_ctx, lambda: context.guided_tokenizer)

    @property
    def _n_held(self) -> int:
        assert self.slot is not None
        return len(self.slot.tokens)

    @property
    def _scores_next(self) -> bool:
        """Whether the probabilities of the prompt's tokens that come next are wanted."""
        return self._scores_prompt and self._n_held >= self._first_scored

    @property
    def _all_outputs(self) -> bool:
        """Whether all tokens that come next are outputs."""
        return self._scores_next or self.request.trace

    def n_next(self, n_outputs: int) -> int:
        """How many tokens may be computed next; at most `n_outputs` where all are outputs."""
        n = self.steering.n_decided - self._n_held
        if self._scores_prompt and not self._scores_next:
            n = min(n, self._first_scored - self._n_held)
        return min(n, n_outputs) if self._all_outputs else n

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
        end = start + n_tokens
        last = end == len(self.wanted)
        return slot.part(
            self.wanted[start:end],
            self.steering.biases[start:end],
            n_outputs=n_tokens if self._all_outputs else int(last or self.steering.wants_logits(end)),
            n_counted=int(last and self.request.routing),
            traced=self.steering.wants_experts(end),
        )

    def read(self, part: Part, logits: Logits | None) -> list[Event]:
        """Take a part that the context has just computed, and the logits of its last token.

        Returns the events of the token that is drawn by them, if no token of the text is missing any more.
        """
        assert self.slot is not None
        last = part.end == len(self.wanted)
        if self._scores_next:
            self._score(part, len(part.tokens) - int(last))
        self.slot.add(part, self._context.experts)
        self.steering.saw(self.slot, logits)
        if not last:
            return []
        assert logits is not None
        return self._draw(logits)

    def _score(self, part: Part, n: int) -> None:
        """Take the logits of the first tokens of a part of the prompt; each token's are those for the next one."""
        if not part.start and not self.request.prompt_from:
            self._prompt.append(TokenEvent("", self.wanted[0]))
        for index, logits in enumerate(islice(self._context.outputs(part), n), part.start + 1):
            self._prompt.append(_token_event("", self.wanted[index], logits, self.request.prompt_probs))

    def begin(self) -> None:
        """Steer the slot, and keep what its memory shares with the prompt; the last token is always computed."""
        slot = self.slot
        assert slot is not None
        self._start = time.perf_counter()
        self._sampler = self._sampler or self._new_sampler()
        slot.attach(self.bias)
        self.steering.begin()
        most = self._first_scored if self._scores_prompt else self._n_prompt - 1
        slot.keep(self.steering.reusable(slot, most) if self.request.reuse else 0)
        self._counts_before = self._context.counts(slot.index) if self.request.routing else None
        self._n_cached = len(slot.tokens)
        self.begun = True

    def _draw(self, logits: Logits) -> list[Event]:
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
                mark = Mark(self.steering.rule)
                self._end = None if token is None else _token_event("", token, logits, request.n_probs, mark)
                return self.finish("stop")
            sampler.accept(token)
        except GrammarLimitError:  # of this request alone
            return self.finish("grammar")
        self.wanted.append(token)
        self.steering.decide()
        mark = self.steering.mark
        self._n_generated += 1
        self._n_steered += mark.rule is not None
        reason: Reason | None = None
        if self._n_generated == request.max_tokens:
            reason = "length"
        elif len(self.wanted) == self._context.n_ctx:
            reason = "context"
        text = self._text.feed(self._context.token_bytes(token, request.special))
        if self._text.stop is not None:
            reason = "stop"
        event = _token_event(text, token, logits, request.n_probs, mark)
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
            n_steered=self._n_steered + self.steering.n_steered_given(self._n_prompt),
            experts=self.slot.experts(0, self._n_held) if self.request.trace and self.begun and self.slot else None,
        )
        return [TokenEvent(rest, -1), finish] if rest else [finish]


def _token_event(text: str, token: int, logits: Logits, n_probs: int | None, mark: Mark = UNSTEERED) -> TokenEvent:
    if n_probs is None:
        return TokenEvent(text, token, rule=mark.rule, phase=mark.phase)
    logprobs = log_softmax(logits)
    # of equal ones the first, without sorting a whole vocabulary
    likely = np.flatnonzero(logprobs >= np.partition(logprobs, -n_probs)[-n_probs]) if n_probs else np.arange(0)
    best = likely[np.argsort(-logprobs[likely], kind="stable")][:n_probs]
    top = tuple((int(i), float(logprobs[i])) for i in best)
    return TokenEvent(text, token, float(logprobs[token]), top, mark.rule, mark.phase)
