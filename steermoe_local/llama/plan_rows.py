"""A steering plan in a llama.cpp context: its biases attached to rows, and which one steers each token of a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import BiasPlan
from . import capi
from .plan_state import Decision, PlanState
from .reasoning_styles import ReasoningStyle

UNSTEERED = -1
_SPARE = capi.MAX_ROWS - 1  # a row for tries: plans have far fewer biases

KnownKey = str | None
"""Key of the bias that a token was computed under, "" for none; None: not known, which is like no other."""


class PlanRows:
    """The biases of a plan, attached to rows of a context."""

    def __init__(self, plan: BiasPlan, native: Callable[[BiasFile], capi.NativeBias]) -> None:
        """`native` gives the native form of a bias.

        Raises UsageError for a plan that a `SteeredLlama` cannot follow.
        """
        if plan.needs_routing:
            raise UsageError(
                "SteeredLlama: a condition of the plan looks at the routing of the text, which only an Engine records; "
                "use Engine, or a condition on entropy or margin"
            )
        self.plan = plan
        self._native = [native(bias) for bias in plan.biases]
        self._rows = {bias.key: row for row, bias in enumerate(plan.biases)}

    def attach(self, ctx: Any, force: bool) -> None:
        """Attach the biases in place of all that is attached to a context. On an error nothing has changed.

        Raises ModelMismatchError, ModelError, NativeError.
        """
        for bias in self._native:
            try:
                capi.attach_row(ctx, _SPARE, bias, force)
            finally:
                capi.detach_row(ctx, _SPARE)
        capi.detach(ctx)
        for row, bias in enumerate(self._native):
            capi.attach_row(ctx, row, bias, force)

    def detach(self, ctx: Any) -> None:
        """Take the biases off, and leave the steering of the context itself."""
        for row in range(len(self._native)):
            capi.detach_row(ctx, row)

    def row(self, bias: BiasFile | None) -> int:
        """The row of a bias of the plan."""
        return UNSTEERED if bias is None else self._rows[bias.key]


class PlanRun:
    """What steers each token of one generation where it is read: a prompt, and the reply as it comes.

    A token of the reply is steered where it is drawn, which is where the token before it is read (`PlanState`). `start`
    is the position of the prompt's first token. Positions before it are not of the generation.
    """

    def __init__(
        self,
        rows: PlanRows,
        start: int,
        prompt: Sequence[int],
        style: ReasoningStyle | None,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._rows, self._start = rows, start
        self._state = PlanState(rows.plan, style, token_bytes)
        self._decisions: list[Decision] = self._state.prompt(prompt)
        if prompt:
            self._decisions.append(self._state.first())

    @property
    def keys(self) -> list[KnownKey]:
        """The keys of the biases of the tokens that are decided."""
        return [known_key(decision.bias) for decision in self._decisions]

    @property
    def needs_logits(self) -> bool:
        """Whether what steers where a token of the reply is read depends on the distribution that it was drawn from."""
        return self._state.needs_logits

    def n_decided(self, position: int) -> int:
        """How many tokens from a position on are decided."""
        return max(0, self._start + len(self._decisions) - position)

    def saw_logits(self, logits: npt.NDArray[np.float32]) -> None:
        """Tell the distribution that the reply's next token was drawn from."""
        self._state.saw_logits(logits)

    def decide(self, tokens: Sequence[int], position: int) -> tuple[list[int], list[KnownKey]]:
        """The rows and keys of tokens at a position; those of the reply come in their order, each once."""
        first = position - self._start
        for token in tokens[len(self._decisions) - first :] if first + len(tokens) > len(self._decisions) else ():
            self._decisions.append(self._state.reply(token)[1])
        found = self._decisions[first : first + len(tokens)]
        return [self._rows.row(decision.bias) for decision in found], [known_key(decision.bias) for decision in found]


def known_key(bias: BiasFile | None) -> str:
    """The key of a bias, "" for none."""
    return "" if bias is None else bias.key
