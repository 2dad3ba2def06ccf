"""Slots: the sequences of an engine's context."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..llama.plan_state import PlanState
from ..llama.tokenizing import common_prefix
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import AnyBias
from .context import Int32, Part, SlotContext

Key = str | None
"""`BiasFile.key` of what was in force at a token, None: nothing."""


class Known(IntEnum):
    """Of which layers the experts that a token selected are known."""

    NOT = 0
    BUT_LAST = 1
    ALL = 2


class Selected(NamedTuple):
    """The experts that a token selected, int16 [n_layer, top_k]; -1: not routed, or not known."""

    experts: npt.NDArray[np.int16]
    known: Known


class Owner(Protocol):
    """What a slot asks its engine."""

    def require_idle(self, slot: Slot) -> None:
        """Raise UsageError unless the slot is reserved and has no request."""

    def release(self, slot: Slot) -> None:
        """Take a reserved slot back."""


class Slot:
    """One sequence of an engine's context: the tokens in its memory, each with the bias that was in force at it.

    The engine assigns its slots to requests. `Engine.slot` reserves one for its caller: only requests that name it
    (`Request.slot`) then use it, so its memory stays. A context manager, which closes it.
    """

    def __init__(self, owner: Owner, context: SlotContext, index: int) -> None:
        self.tokens: list[int] = []
        """What is in memory, from the beginning."""
        # Of each token. After an interrupt they may be longer than `tokens`, never shorter.
        self._keys: list[Key] = []
        self._selected: list[Selected | None] = []
        self.index = index
        self.used = 0  # when it got its last request, by the engine's clock
        self._owner = owner
        self._context = context
        self._bias: AnyBias | None = None

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bias(self) -> AnyBias | None:
        """What steers this slot; None: nothing does."""
        return self._bias

    @property
    def keys(self) -> list[Key]:
        """For each token in memory, the key of the bias that was in force at it; None: unsteered."""
        return self._keys[: len(self.tokens)]

    def steer(self, bias: AnyBias | None) -> bool:
        """Steer what is computed from now on. True if that changes something.

        What is in memory is kept up to the first token that, as a part of a prompt, is computed otherwise from now on.
        Raises ModelMismatchError, ModelError, UsageError (a plan that cannot be followed; closed, or a request is
        running); nothing changes then.
        """
        self._owner.require_idle(self)
        checked = self._context.checked(bias)
        changed = key_of(self._bias) != key_of(checked)
        if changed:
            self.keep(self._still_valid(checked))
        self._bias = checked
        return changed

    def _still_valid(self, bias: AnyBias | None) -> int:
        state = PlanState(bias, None, self._context.text_bytes)
        decisions = state.prompt(self.tokens, ends=False)
        return common_prefix(self._keys, [key_of(decision.bias) for decision in decisions])

    def forget(self) -> None:
        """Empty the memory. Raises UsageError (closed, or a request is running)."""
        self._owner.require_idle(self)
        self.keep(0)

    def close(self) -> None:
        """Abort the request that is running, empty the memory and give the slot back to the engine."""
        self._owner.release(self)

    #
    # for the engine
    #

    def holds(self, tokens: Sequence[int], keys: Sequence[Key], known: Known = Known.NOT) -> int:
        """How many of the tokens are in memory, from the beginning, computed under the biases with these keys.

        Fewer of both may be given. `known`: only those whose experts are known.
        """
        n = common_prefix(self.tokens, tokens)
        n = common_prefix(self._keys[:n], keys)
        if known:
            found = enumerate(self._selected[:n])
            n = next((index for index, one in found if one is None or one.known < known), n)
        return n

    def attach(self, bias: AnyBias | None) -> None:
        """Say what steers it, a bias that was checked; what is in memory is the next request's to judge."""
        self._bias = bias

    def keep(self, n: int) -> None:
        """Keep the first `n` tokens of the memory, or none if it cannot be cut there."""
        self.tokens = self.tokens[:n]  # first: an interrupt must not leave more tokens here than in memory
        if not self._context.cut(self.index, len(self.tokens)):
            self.tokens = []
        # behind the tokens: there must not be fewer of these
        del self._keys[len(self.tokens) :], self._selected[len(self.tokens) :]

    def part(
        self,
        tokens: Sequence[int],
        biases: Sequence[BiasFile | None],
        *,
        n_outputs: int,
        n_counted: int = 0,
        traced: bool = False,
    ) -> Part:
        """Tokens to decode behind what is in memory, see `Part`."""
        return Part(self.index, len(self.tokens), tokens, biases, n_outputs, n_counted, traced)

    def add(self, part: Part, experts: Int32 | None) -> None:
        """Take a part that is in memory now; `experts` [n, n_layer, top_k] are its tokens', if it was traced."""
        n = len(self.tokens)
        # each in one step, and the tokens last: an interrupt may come between any two lines
        self._keys[n:] = [key_of(bias) for bias in part.biases]
        self._selected[n:] = [None] * len(part.tokens) if experts is None else _selected(part, experts)
        self.tokens.extend(part.tokens)

    def experts(self, first: int, last: int) -> Int32 | None:
        """Experts that tokens [first, last) of the memory selected, [n, n_layer, top_k]; None if one is not known."""
        found = [one.experts for one in self._selected[first : min(last, len(self.tokens))] if one is not None]
        return np.stack(found).astype(np.int32) if found and len(found) == last - first else None


def key_of(bias: AnyBias | None) -> Key:
    """The key of a bias or a plan, None for none."""
    return None if bias is None else bias.key


def _selected(part: Part, experts: Int32) -> list[Selected]:
    """What is known of each token; those that are no outputs are not routed by the last layer."""
    n_silent = len(part.tokens) - part.n_outputs
    rows = experts.astype(np.int16)
    return [Selected(row, Known.BUT_LAST if i < n_silent else Known.ALL) for i, row in enumerate(rows)]
