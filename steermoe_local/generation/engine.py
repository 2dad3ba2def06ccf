"""Answers of a model in several sequences at once, each under a steering of its own, in one llama.cpp context."""

from __future__ import annotations

import functools
from collections import abc
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..identity import ModelIdentity
from ..llama.rendering import Renderer
from ..llama.sampling import Sampling
from ..llama.steered_llama import SteeredLlama
from .context import SequenceContext
from .requests import Event, FinishEvent, Request, Run, TokenEvent
from .slots import Sequence

__all__ = ["Engine", "FinishEvent", "TokenEvent", "Request", "Sampling", "Sequence"]

_COUNTED_ROWS = 64  # outputs of a sequence in one decode: each has logits over the whole vocabulary
_LOGITS_AT_ONCE = 1 << 25  # floats of all outputs in one decode of `logits`: 128 MiB


class Engine:
    """A llama.cpp context of its own on the weights of a `SteeredLlama`, whose own context is not touched.

    A context manager. It belongs to one thread at a time. After an exception out of `step` (a KeyboardInterrupt, say)
    all that ran ends as "cancelled" with the next step; the sequences stay usable.
    """

    def __init__(
        self,
        model: SteeredLlama,
        *,
        n_ctx: int,
        n_sequences: int = 1,
        n_batch: int = 512,
        n_ubatch: int = 512,
        n_threads: int | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        flash_attn: bool | Literal["auto"] | None = None,
        record: bool = True,
        force: bool = False,
    ) -> None:
        """Make the context.

        Args:
            model: whose weights are used; it must live longer. Its other settings (RoPE, offloading, ...) hold, too.
            n_ctx: tokens of prompt and answer in each sequence; 0: as many as the model was trained with.
            n_sequences: how many sequences can be taken.
            n_batch: most tokens of one step. n_ubatch, type_k, type_v: as in `llama_cpp.Llama`.
            n_threads, flash_attn: None as `model` has them.
            record: count the routing of answers. Nothing is installed otherwise, or when the model has no experts.
            force: accept biases whose router hash is another one, as long as the shape fits.

        Raises UsageError, ModelError (a model that does not generate text), NativeError (no memory for the context).
        """
        self.model = model
        self.force = force
        self._context = SequenceContext(
            model,
            n_ctx=n_ctx,
            n_sequences=n_sequences,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            record=record,
            force=force,
        )
        self._sequences: list[Sequence | None] = [None] * n_sequences
        self._runs: list[Run] = []
        self._events: list[tuple[Request, Event]] = []
        self._computing: list[Run] = []  # of a step that has not come to its end
        self._closed = False

    def __enter__(self) -> Engine:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the context."""
        self.close()

    def close(self) -> None:
        """Free the context. What is running is dropped, and all sequences are closed."""
        self._closed = True
        self._runs.clear()
        self._sequences = [None] * len(self._sequences)
        self._context.close()

    @property
    def n_ctx(self) -> int:
        """How many tokens a sequence holds."""
        return self._context.n_ctx

    @property
    def n_sequences(self) -> int:
        """How many sequences there are, taken or not."""
        return len(self._sequences)

    @property
    def identity(self) -> ModelIdentity | None:
        """Whose biases fit; None for a model without experts."""
        return self._context.identity

    @property
    def n_running(self) -> int:
        """Requests that are not at their end."""
        return len(self._runs)

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Renders and tokenizes; see `Renderer.configured` for thinking. Raises ModelError without a tokenizer."""
        return Renderer(self._context.model)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of a token's text; none for a control token unless `special`."""
        return self._context.token_bytes(token, special)

    def sequence(self) -> Sequence:
        """Take a free sequence, unsteered and empty. Raises UsageError when all are taken."""
        if self._closed:
            raise UsageError("the engine is closed; make another")
        for place, taken in enumerate(self._sequences):
            if taken is None:
                sequence = Sequence(self, self._context, place)
                sequence.keep(0)
                self._sequences[place] = sequence
                return sequence
        raise UsageError(f"all {len(self._sequences)} sequences are taken; close one or raise n_sequences")

    def holds(self, sequence: Sequence) -> bool:
        """Is the sequence one of this engine's, and not closed?"""
        return any(taken is sequence for taken in self._sequences)

    def is_busy(self, sequence: Sequence) -> bool:
        """Is the sequence answering?"""
        return any(run.request.sequence is sequence for run in self._runs)

    def release(self, sequence: Sequence) -> None:
        """Cancel what the sequence answers (the next step says so), empty it and give its place back."""
        if not self.holds(sequence):
            return
        for run in self._runs.copy():
            if run.request.sequence is sequence:
                self._end(run)
        sequence.keep(0)
        self._sequences[sequence.place] = None

    def add(self, request: Request) -> None:
        """Answer a request along with those that run, from the next step on.

        Raises UsageError (a prompt that does not fit, a busy sequence, impossible arguments).
        """
        if not self.holds(request.sequence):
            raise UsageError("the sequence is closed or of another engine; take one with Engine.sequence()")
        request.sequence.require_idle()
        self._runs.append(Run(request, self._context))

    def cancel(self, request: Request) -> None:
        """End a request: the next step reports `FinishEvent("cancelled")`. What its sequence holds stays valid."""
        for run in self._runs:
            if run.request is request:
                run.cancelled = True

    def step(self) -> list[tuple[Request, Event]]:
        """Compute one round: the next token of every answer, and a part of the prompts that are not in memory yet.

        Returns what came of it, in order. Raises NativeError.
        """
        for run in self._computing:  # the last step did not come to its end: nobody knows how far
            run.cancelled = True
        self._computing = self._runs.copy()
        for run in self._runs.copy():
            if run.cancelled:
                self._end(run)
            elif not run.begun:
                run.begin()
        runs = self._runs.copy()
        wanted = [run.n_next(_COUNTED_ROWS) for run in runs]
        sizes = _shares(wanted, self._context.n_batch)
        parts = []
        for run, size in zip(runs, sizes, strict=True):
            sequence = run.request.sequence
            start = len(sequence.tokens)
            at_end = size == run.n_missing
            tokens = run.wanted[start : start + size]
            parts.append(sequence.part(tokens, n_outputs=int(at_end), scored=run.scores_next))
        for index, logits in self._context.decode(parts):
            run = runs[index]
            if parts[index].scored:
                run.score(parts[index], self._context.scores(parts[index]))
            run.request.sequence.tokens.extend(parts[index].tokens)
            if logits is not None:
                self._take(run, run.advance(logits))
        self._computing = []
        events, self._events = self._events, []
        return events

    def generate(self, *requests: Request) -> abc.Generator[tuple[int, Event]]:
        """Run until these requests are done; yields (index of the request, what came). Closing it cancels them.

        What comes for other requests meanwhile is given out by the next `step`. Raises UsageError, NativeError.
        """
        places = {request: index for index, request in enumerate(requests)}
        waiting = set(requests)
        try:
            for request in requests:
                self.add(request)
            while waiting:
                events = self.step()
                self._events = [event for event in events if event[0] not in places]
                for request, event in events:
                    if request in places:
                        if isinstance(event, FinishEvent):
                            waiting.discard(request)
                        yield places[request], event
        finally:
            self._runs = [run for run in self._runs if run.request not in waiting]
            self._events = [event for event in self._events if event[0] not in places]

    def route(
        self, sequence: Sequence, tokens: abc.Sequence[int], first: int, last: int | None = None
    ) -> npt.NDArray[np.int64] | None:
        """Put given tokens through a sequence (teacher forcing) and count the routing of tokens [first, last).

        With `tokens` = prompt + answer, `first` = n_prompt - 1 and `last` = `first` + `FinishEvent.n_rows` these are
        the rows of `FinishEvent.routing`. Returns [n_layer, n_expert], None without a recorder. The tokens stay in
        memory. Raises UsageError, NativeError.
        """
        sequence.require_idle()
        last = len(tokens) if last is None else last
        if not 0 <= first < last <= min(len(tokens), self.n_ctx):
            raise UsageError(f"route: no tokens {first} to {last} in {len(tokens)}, or n_ctx {self.n_ctx} is too small")
        tokens = self._context.checked_tokens(tokens[:last])
        sequence.keep_common(tokens, first)
        before = self._context.counts(sequence.place)
        while (start := len(sequence.tokens)) < last:
            counted = start >= first
            end = min(start + _COUNTED_ROWS, last) if counted else first
            end = min(end, start + self._context.n_batch)
            part = sequence.part(tokens[start:end], n_outputs=end - start if counted else 0)
            for _ in self._context.decode([part]):
                sequence.tokens.extend(part.tokens)
        after = self._context.counts(sequence.place)
        return None if before is None or after is None else after - before

    def logits(
        self, sequences: abc.Sequence[Sequence], tokens: abc.Sequence[int], first: int = 0
    ) -> abc.Generator[tuple[int, npt.NDArray[np.float32]]]:
        """Put the same tokens through several sequences, each under its own steering (teacher forcing).

        Yields (start, logits), logits [n_sequences, n, n_vocab] of the tokens [start, start + n) from `first` to the
        last one but one: those of token i are about token i + 1. The tokens stay in memory, and nothing of what is
        there is used. Raises UsageError, NativeError.
        """
        for sequence in sequences:
            sequence.require_idle()
        tokens = self._context.checked_tokens(tokens[:-1])
        if not sequences or not 0 <= first < len(tokens) <= self.n_ctx:
            raise UsageError(f"logits: no tokens behind {first} of {len(tokens)}, or n_ctx {self.n_ctx} is too small")
        room = self._context.n_batch // len(sequences)
        if not room:
            raise UsageError(f"logits: n_batch {self._context.n_batch} is below {len(sequences)} sequences; raise it")
        scored = max(1, _LOGITS_AT_ONCE // (self._context.n_vocab * len(sequences)))
        for sequence in sequences:
            sequence.keep(0)
        start = 0
        while start < len(tokens):
            counted = max(start, first)
            end = min(start + room, counted + scored, len(tokens))
            n_outputs = max(0, end - counted)
            parts = [sequence.part(tokens[start:end], n_outputs=n_outputs) for sequence in sequences]
            found = [np.empty((0, 0), np.float32)] * len(parts)
            for index, last in self._context.decode(parts):
                if last is not None:
                    found[index] = np.stack(list(self._context.outputs(parts[index])))
                sequences[index].tokens.extend(parts[index].tokens)
            if n_outputs:
                yield counted, np.stack(found)
            start = end

    def _end(self, run: Run) -> None:
        self._take(run, run.finish("cancelled"))

    def _take(self, run: Run, events: list[Event]) -> None:
        self._events += [(run.request, event) for event in events]
        if isinstance(events[-1], FinishEvent):
            self._runs.remove(run)


def _shares(missing: list[int], room: int) -> list[int]:
    """How many tokens each run computes in a round of `room`: short rests whole, long ones evenly what is left."""
    shares = [0] * len(missing)
    order = sorted(range(len(missing)), key=lambda index: missing[index])
    for n_left, index in zip(range(len(order), 0, -1), order, strict=True):
        shares[index] = min(missing[index], room // n_left)
        room -= shares[index]
    return shares
