"""Slots: the sequences of an engine's context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..llama.tokenizing import common_prefix
from ..steering.bias_file import BiasFile
from .context import Part, SlotContext


class Owner(Protocol):
    """What a slot asks its engine."""

    def require_idle(self, slot: Slot) -> None:
        """Raise UsageError unless the slot is reserved and has no request."""

    def release(self, slot: Slot) -> None:
        """Take a reserved slot back."""


class Slot:
    """One sequence of an engine's context: the tokens in its memory, and the bias under which all were computed.

    The engine assigns its slots to requests. `Engine.slot` reserves one for its caller: only requests that name it
    (`Request.slot`) then use it, so its memory stays. A context manager, which closes it.
    """

    def __init__(self, owner: Owner, context: SlotContext, index: int) -> None:
        self.tokens: list[int] = []
        """What is in memory, from the beginning."""
        self.index = index
        self.used = 0  # when it got its last request, by the engine's clock
        self._owner = owner
        self._context = context
        self._bias: BiasFile | None = None

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def bias(self) -> BiasFile | None:
        """What steers this slot; None: nothing does."""
        return self._bias

    def steer(self, bias: BiasFile | None) -> bool:
        """Steer what is computed from now on. True if that changes something: the memory is emptied then.

        Raises ModelMismatchError, ModelError (nothing changes), UsageError (closed, or a request is running).
        """
        self._owner.require_idle(self)
        return self.attach(self._context.checked(bias))

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

    def holds(self, tokens: Sequence[int], bias: BiasFile | None) -> int:
        """How many of the tokens are in memory, from the beginning, computed under this bias."""
        return common_prefix(self.tokens, tokens) if _key(self._bias) == _key(bias) else 0

    def attach(self, bias: BiasFile | None) -> bool:
        """`steer` with a bias that was checked."""
        changed = _key(self._bias) != _key(bias)
        if changed:
            self.keep(0)
        self._bias = bias
        return changed

    def keep(self, n: int) -> None:
        """Keep the first `n` tokens of the memory, or none if it cannot be cut there."""
        self.tokens = self.tokens[:n]  # first: an interrupt must not leave more tokens here than in memory
        if not self._context.cut(self.index, len(self.tokens)):
            self.tokens = []

    def keep_common(self, tokens: Sequence[int], at_most: int) -> None:
        """Keep what the memory and `tokens` begin with, up to `at_most` tokens."""
        self.keep(common_prefix(self.tokens[:at_most], tokens))

    def part(self, tokens: Sequence[int], *, n_outputs: int, scored: bool = False, counted: bool = True) -> Part:
        """Tokens to decode behind what is in memory, see `Part`."""
        return Part(self.index, len(self.tokens), tokens, self._bias, n_outputs, scored, counted)


def _key(bias: BiasFile | None) -> str | None:
    return None if bias is None else bias.key
