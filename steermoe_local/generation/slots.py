"""A place in an engine's context: what it holds, and under which steering that was computed."""

from __future__ import annotations

from collections import abc
from typing import Protocol

from ..errors import UsageError
from ..steering.bias_file import BiasFile
from .context import Attachment, Part, SequenceContext

__all__ = ["Owner", "Sequence"]


class Owner(Protocol):
    """What a sequence asks its engine."""

    def holds(self, sequence: Sequence) -> bool:
        """Is the sequence taken?"""

    def is_busy(self, sequence: Sequence) -> bool:
        """Is it answering?"""

    def release(self, sequence: Sequence) -> None:
        """Cancel what it answers and give its place back."""


class Sequence:
    """A place in an engine's context; made by `Engine.sequence`. All of `tokens` was computed under `steering`."""

    def __init__(self, owner: Owner, context: SequenceContext, place: int) -> None:
        """Not for callers."""
        self.tokens: list[int] = []
        """What is in memory, from the beginning."""
        self.place = place
        self._owner = owner
        self._context = context
        self._steering: BiasFile | None = None
        self._attachment = Attachment.of(None)

    @property
    def steering(self) -> BiasFile | None:
        """What steers this sequence."""
        return self._steering

    def steer(self, bias: BiasFile | None) -> bool:
        """Steer what is computed from now on. True if that changes something: what is in memory is forgotten then.

        Raises ModelMismatchError, ModelError (nothing changes), UsageError (an answer is running).
        """
        self.require_idle()
        attachment = Attachment.of(bias)
        self._context.attach(self.place, attachment)
        changed = attachment.key != self._attachment.key
        if changed:
            self.forget()
        self._attachment, self._steering = attachment, bias
        return changed

    def forget(self) -> None:
        """Empty the memory. Raises UsageError while an answer is running."""
        self.require_idle()
        self.keep(0)

    def close(self) -> None:
        """Cancel what is running, empty the memory and give the place back."""
        self._owner.release(self)

    def require_idle(self) -> None:
        """Raise UsageError for a sequence that is closed or answering."""
        if not self._owner.holds(self):
            raise UsageError("this sequence is closed; take another with Engine.sequence()")
        if self._owner.is_busy(self):
            raise UsageError("this sequence is answering; cancel the request or wait for its end")

    def keep(self, n: int) -> None:
        """Keep the first `n` tokens of the memory, or none if it cannot be cut there."""
        self.tokens = self.tokens[:n]  # first: an interrupt must not leave more tokens here than in memory
        if not self._context.cut(self.place, len(self.tokens)):
            self.tokens = []

    def keep_common(self, tokens: abc.Sequence[int], at_most: int) -> None:
        """Keep what the memory and `tokens` begin with, up to `at_most` tokens."""
        n = 0
        for held, token in zip(self.tokens[:at_most], tokens, strict=False):
            if held != token:
                break
            n += 1
        self.keep(n)

    def part(self, tokens: abc.Sequence[int], *, n_outputs: int, scored: bool = False) -> Part:
        """Tokens to decode behind what is in memory, see `Part`."""
        return Part(self.place, len(self.tokens), tokens, self._attachment, n_outputs, scored)
