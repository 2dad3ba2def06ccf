"""Answers of a model to several requests at once, each under a steering of its own, in one llama.cpp context."""

from __future__ import annotations

import functools
from collections.abc import Generator, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..identity import ModelIdentity
from ..llama.reasoning_styles import ReasoningStyle
from ..llama.rendering import Renderer
from ..llama.sampling import Sampling
from ..llama.steered_llama import SteeredLlama
from ..steering.bias_plan import AnyBias
from .context import SlotContext
from .request_state import RequestState
from .requests import Event, FinishEvent, Request, TokenEvent
from .slots import Slot
from .text_steering import TextSteering

__all__ = ["Engine", "FinishEvent", "Request", "Sampling", "Slot", "TokenEvent"]

_COUNTED_ROWS = 64  # outputs of a slot in one decode: each has logits over the whole vocabulary
_LOGITS_AT_ONCE = 1 << 25  # floats of all outputs in one decode of `logits`: 128 MiB
_SIMILAR = 0.1  # of a prompt that a slot must hold to be taken for it (llama-server: --slot-prompt-similarity)


class Engine:
    """Schedules requests over the slots of a llama.cpp context of its own on the weights of a `SteeredLlama`.

    `add` queues a request, `step` gives the slots that are free to those that wait, first come, first served, and
    computes one round for all that have one; `abort` ends one early. A request gets the slot that holds most of its
    prompt, each token computed under the bias that the request wants there; if none holds much of it an empty one, or
    the one least recently used. `generate` does it all for some requests. The model's own context is not touched.

    A context manager. It belongs to one thread at a time. After an exception out of `step` (a KeyboardInterrupt, say)
    all that was computed ends as "cancelled" with the next step; what waits goes on waiting, and the slots stay usable.
    """

    def __init__(
        self,
        model: SteeredLlama,
        *,
        n_ctx: int,
        n_slots: int = 1,
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
            n_ctx: tokens of prompt and answer in each slot; 0: as many as the model was trained with.
            n_slots: how many requests are computed at once.
            n_batch: most tokens of one step. n_ubatch, type_k, type_v: as in `llama_cpp.Llama`.
            n_threads, flash_attn: None as `model` has them.
            record: count the routing of answers. Nothing is installed otherwise, or when the model has no experts.
            force: accept biases whose router hash is another one, as long as the shape fits.

        Raises UsageError, ModelError (a model that does not generate text), NativeError (no memory for the context).
        """
        self.model = model
        self.force = force
        self._context = SlotContext(
            model,
            n_ctx=n_ctx,
            n_slots=n_slots,
            n_batch=n_batch,
            n_ubatch=n_ubatch,
            n_threads=n_threads,
            type_k=type_k,
            type_v=type_v,
            flash_attn=flash_attn,
            record=record,
            force=force,
        )
        self._slots = [Slot(self, self._context, index) for index in range(n_slots)]
        self._reserved: set[Slot] = set()
        self._states: dict[Request, RequestState] = {}  # all that are not at their end, in the order of `add`
        self._events: list[tuple[Request, Event]] = []
        self._computing: list[RequestState] = []  # of a step that has not come to its end
        self._clock = 0
        self._closed = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the context. Requests are dropped, and all reserved slots are closed."""
        self._closed = True
        self._states.clear()
        self._reserved.clear()
        self._context.close()

    @property
    def n_ctx(self) -> int:
        """How many tokens a slot holds."""
        return self._context.n_ctx

    @property
    def n_slots(self) -> int:
        """How many slots there are, reserved ones included."""
        return len(self._slots)

    @property
    def identity(self) -> ModelIdentity | None:
        """Whose biases fit; None for a model without experts."""
        return self._context.identity

    @property
    def n_unfinished(self) -> int:
        """Requests that are not at their end."""
        return len(self._states)

    @property
    def n_waiting(self) -> int:
        """Requests that have no slot yet; all are given one as soon as one is free, at the beginning of a step."""
        return sum(state.slot is None for state in self._states.values())

    @property
    def n_free(self) -> int:
        """How many more requests the next step could begin."""
        return max(0, len(self._free()) - self.n_waiting)

    @functools.cached_property
    def renderer(self) -> Renderer:
        """Renders and tokenizes; see `Renderer.configured` for thinking. Raises ModelError without a tokenizer."""
        return Renderer(self._context.model)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """Bytes of a token's text; none for a control token unless `special`."""
        return self._context.token_bytes(token, special)

    def prepare_grammars(self) -> None:
        """Make what a `Sampling.grammar` of llguidance needs of the vocabulary, else the first one makes it.

        With a large vocabulary it takes over a second, in which no other thread of Python runs.
        """
        self._context.prepare_grammars()

    def check(self, bias: AnyBias | None) -> None:
        """Raise ModelMismatchError or ModelError for a bias or plan that cannot steer this model.

        UsageError for a plan whose conditions this engine can see nothing of, or with a token that the model lacks.
        """
        self._context.checked(bias)

    #
    # slots
    #

    def slot(self) -> Slot:
        """Reserve a slot, unsteered and empty, until it is closed. Raises UsageError when none is free."""
        self._require_open()
        free = self._free()
        if not free or (len(free) == 1 and self.n_waiting):  # what waits must be able to get one
            raise UsageError(f"all {self.n_slots} slots are taken; close one or raise n_slots")
        slot = _least_recently_used(free)
        slot.attach(None)
        slot.keep(0)
        self._reserved.add(slot)
        return slot

    def forget(self) -> None:
        """Empty the memory of all free slots, so that what comes does not depend on what was computed before."""
        for slot in self._free():
            slot.keep(0)

    def require_idle(self, slot: Slot) -> None:
        """Raise UsageError unless the slot is reserved and has no request."""
        if slot not in self._reserved:
            raise UsageError("this slot is closed or of another engine; take one with Engine.slot()")
        if any(state.slot is slot for state in self._states.values()):
            raise UsageError("this slot is answering; abort the request or wait for its end")

    def release(self, slot: Slot) -> None:
        """Close a reserved slot: abort its request, and put an empty one in its place."""
        if slot not in self._reserved:
            return
        for state in [state for state in self._states.values() if state.slot is slot]:
            self._end(state)
        slot.keep(0)
        self._slots[slot.index] = Slot(self, self._context, slot.index)
        self._reserved.discard(slot)

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("the engine is closed; make another")

    def _free(self, least: int = 0) -> list[Slot]:
        """The slots that are neither reserved nor busy. Raises UsageError for less than `least` of them."""
        taken = self._reserved | {state.slot for state in self._states.values()}
        free = [slot for slot in self._slots if slot not in taken]
        if len(free) < least:
            raise UsageError(f"{least} free slots are needed, and of {self.n_slots} {len(free)} are; raise n_slots")
        return free

    #
    # requests
    #

    def add(self, request: Request) -> None:
        """Queue a request; it begins with the step in which a slot is free for it.

        Raises UsageError (a prompt that does not fit, a slot that is closed or busy, impossible arguments),
        ModelMismatchError, ModelError (a bias that does not fit).
        """
        self._require_open()
        if request.slot is not None:
            self.require_idle(request.slot)
        elif len(self._reserved) == len(self._slots):
            raise UsageError(f"all {self.n_slots} slots are taken; close one or raise n_slots")
        if request in self._states:
            raise UsageError("this request is being answered; make another")
        self._states[request] = RequestState(request, self._context)

    def abort(self, request: Request) -> None:
        """End a request: the next step reports `FinishEvent("cancelled")`. What its slot holds stays valid."""
        if request in self._states:
            self._end(self._states[request])

    def step(self) -> list[tuple[Request, Event]]:
        """Give free slots to the requests that wait, and compute one round.

        A round is the next token of every answer, and a part of the prompts that are not in memory yet. Returns its
        events, in order. Raises NativeError.
        """
        for state in self._computing:  # the last step did not come to its end: nobody knows how far
            if self._states.get(state.request) is state:
                self._end(state)
        self._assign()
        states = self._computing = [state for state in self._states.values() if state.slot is not None]
        for state in states:
            if not state.begun:
                state.begin()
        sizes = _shares([state.n_next(_COUNTED_ROWS) for state in states], self._context.n_batch)
        parts = [state.part(size) for state, size in zip(states, sizes, strict=True)]
        for index, logits in self._context.decode(parts):
            self._take(states[index], states[index].read(parts[index], logits))
        self._computing = []
        events, self._events = self._events, []
        return events

    def generate(self, *requests: Request) -> Generator[tuple[int, Event]]:
        """Step until these requests are at their end; yields (index of the request, event). Closing it aborts them.

        Events of other requests are given out by the next `step`. Raises as `add`, and NativeError.
        """
        numbers = {request: index for index, request in enumerate(requests)}
        unfinished = set(requests)
        try:
            for request in requests:
                self.add(request)
            while unfinished:
                events = self.step()
                self._events = [event for event in events if event[0] not in numbers]
                for request, event in events:
                    if request in numbers:
                        if isinstance(event, FinishEvent):
                            unfinished.discard(request)
                        yield numbers[request], event
        finally:
            self._states = {request: state for request, state in self._states.items() if request not in unfinished}
            self._events = [event for event in self._events if event[0] not in numbers]

    def _assign(self) -> None:
        if not self.n_waiting:
            return
        free = self._free()
        for state in self._states.values():
            if not free:
                return
            if state.slot is None:
                slot = _best(free, state.wanted, state.steering)
                free.remove(slot)
                self._clock += 1
                slot.used = self._clock
                state.slot = slot

    def _end(self, state: RequestState) -> None:
        self._take(state, state.finish("cancelled"))

    def _take(self, state: RequestState, events: list[Event]) -> None:
        self._events += [(state.request, event) for event in events]
        if events and isinstance(events[-1], FinishEvent):
            del self._states[state.request]

    #
    # given tokens
    #

    def route(
        self,
        tokens: Sequence[int],
        bias: AnyBias | None,
        first: int,
        last: int | None = None,
        *,
        slot: Slot | None = None,
        n_prompt: int | None = None,
        style: ReasoningStyle | None = None,
    ) -> npt.NDArray[np.int64] | None:
        """Read given tokens under a bias or plan (teacher forcing) and count the routing of tokens [first, last).

        With `tokens` = prompt + answer, `first` = n_prompt - 1 and `last` = `first` + `FinishEvent.n_rows` these are
        the rows of `FinishEvent.routing`. For a plan the tokens from `n_prompt` on are the reply, None: all are prompt,
        and `style` says how it marks its reasoning. Returns [n_layer, n_expert], None without a recorder. The tokens
        stay in the memory of `slot`, None: of a free one. Raises UsageError, ModelMismatchError, ModelError,
        NativeError.
        """
        self._require_open()
        last = len(tokens) if last is None else last
        if not 0 <= first < last <= min(len(tokens), self.n_ctx):
            raise UsageError(f"route: no tokens {first} to {last} in {len(tokens)}, or n_ctx {self.n_ctx} is too small")
        tokens, bias = self._context.checked_tokens(tokens), self._context.checked(bias)
        steering = TextSteering(self._context, bias, style, tokens, n_prompt)
        if slot is None:
            slot = _best(self._free(1), tokens[:last], steering)
        else:
            self.require_idle(slot)
        slot.attach(bias)
        slot.keep(steering.reusable(slot, first))
        before = self._context.counts(slot.index)
        while (start := len(slot.tokens)) < last:
            counted = start >= first
            end = min(start + _COUNTED_ROWS, last) if counted else first
            end = min(end, start + self._context.n_batch, steering.n_decided)
            n = end - start if counted else 0
            part = slot.part(
                tokens[start:end],
                steering.biases[start:end],
                n_outputs=max(n, steering.wants_logits(end)),
                n_counted=n,
                traced=steering.wants_experts(end),
            )
            for _, logits in self._context.decode([part]):
                slot.add(part, self._context.experts)
                steering.saw(slot, logits)
        after = self._context.counts(slot.index)
        return None if before is None or after is None else after - before

    def logits(
        self,
        biases: Sequence[AnyBias | None],
        tokens: Sequence[int],
        first: int = 0,
        *,
        n_prompt: int | None = None,
        style: ReasoningStyle | None = None,
    ) -> Generator[tuple[int, npt.NDArray[np.float32]]]:
        """Read the same tokens under several biases or plans at once (teacher forcing), in as many free slots.

        Yields (start, logits), logits [n_biases, n, n_vocab] of the tokens [start, start + n) from `first` to the last
        one but one: those of token i are about token i + 1. `n_prompt` and `style` are as in `route`; where a plan's
        conditions look at the reply, all are read token by token. Nothing that is in memory is used. Raises UsageError,
        ModelMismatchError, ModelError, NativeError.
        """
        self._require_open()
        tokens = self._context.checked_tokens(tokens)
        n_read = len(tokens) - 1
        if not biases or not 0 <= first < n_read <= self.n_ctx:
            raise UsageError(f"logits: no tokens behind {first} of {n_read}, or n_ctx {self.n_ctx} is too small")
        room = self._context.n_batch // len(biases)
        if not room:
            raise UsageError(f"logits: n_batch {self._context.n_batch} is below {len(biases)} biases; raise it")
        checked = [self._context.checked(bias) for bias in biases]
        steerings = [TextSteering(self._context, bias, style, tokens, n_prompt) for bias in checked]
        slots = self._free(len(biases))[: len(biases)]
        self._reserved.update(slots)  # nobody else's between two items
        try:
            for slot, bias, steering in zip(slots, checked, steerings, strict=True):
                slot.attach(bias)
                slot.keep(0)
                steering.begin()
            scored = max(1, _LOGITS_AT_ONCE // (self._context.n_vocab * len(slots)))
            start = 0
            while start < n_read:
                counted = max(start, first)
                end = min(start + room, counted + scored, n_read, *(steering.n_decided for steering in steerings))
                n_outputs = max(0, end - counted)
                parts = [
                    slot.part(
                        tokens[start:end],
                        steering.biases[start:end],
                        n_outputs=max(n_outputs, steering.wants_logits(end)),
                        traced=steering.wants_experts(end),
                    )
                    for slot, steering in zip(slots, steerings, strict=True)
                ]
                found = [np.empty((0, 0), np.float32)] * len(parts)
                for index, last in self._context.decode(parts):
                    if n_outputs:
                        found[index] = np.stack(list(self._context.outputs(parts[index])))
                    slots[index].add(parts[index], self._context.experts)
                    steerings[index].saw(slots[index], last)
                if n_outputs:
                    yield counted, np.stack(found)
                start = end
        finally:
            self._reserved.difference_update(slots)


def _best(free: Sequence[Slot], tokens: Sequence[int], steering: TextSteering) -> Slot:
    """The slot whose memory has most of the tokens under the same steering; else an empty one, or the oldest."""
    steering.begin()
    held = [slot.holds(tokens, steering.keys, steering.known) for slot in free]
    most = max(held)
    return free[held.index(most)] if most > _SIMILAR * len(tokens) else _least_recently_used(free)


def _least_recently_used(free: Sequence[Slot]) -> Slot:
    return min(free, key=lambda slot: (bool(slot.tokens), slot.used))


def _shares(missing: list[int], room: int) -> list[int]:
    """How many tokens of each request a round of `room` computes: short rests whole, long ones evenly what is left."""
    if sum(missing) <= room:
        return missing
    shares = [0] * len(missing)
    order = sorted(range(len(missing)), key=lambda index: missing[index])
    for n_left, index in zip(range(len(order), 0, -1), order, strict=True):
        shares[index] = min(missing[index], room // n_left)
        room -= shares[index]
    return shares
