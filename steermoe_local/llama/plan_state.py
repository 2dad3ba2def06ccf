"""What steers each token of one text under a plan, decided token by token as the text is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..maps.routing_lean import RoutingLean
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import AnyBias, BiasPlan, BiasRule
from ..steering.plan_rules import MAX_LAST, Condition, Phase
from .phases import PhaseTracker, TokenTexts
from .reasoning_styles import ReasoningStyle
from .sampling import log_softmax

Logits = npt.NDArray[np.float32]


class Decision(NamedTuple):
    """What steers one token: the bias, None for none; the index of the rule that says so, None for none; the phase."""

    bias: BiasFile | None
    rule: int | None
    phase: Phase


class PlanState:
    """Decides what steers each token of a text: first those of the prompt, then those of the reply in their order.

    What conditions look at has to be told before the tokens that depend on it are decided: `saw_prompt_routing` when
    the prompt was computed, `saw_reply_routing` for each token of the reply, `saw_logits` for the distribution that
    the next token is drawn from, each only where the plan needs it.
    """

    def __init__(self, plan: AnyBias | None, style: ReasoningStyle | None, token_bytes: Callable[[int], bytes]) -> None:
        """`token_bytes` gives a token's bytes, those of control tokens included."""
        rules = plan.rules if isinstance(plan, BiasPlan) else ()
        self._uniform = None if isinstance(plan, BiasPlan) else plan
        self._rules = [_RuleState(rule) for rule in rules]
        self._texts = TokenTexts(token_bytes)
        self._phases = PhaseTracker(style)
        self._leans = {rule.lean.digest: rule.lean for rule in rules if rule.lean is not None}
        self._of_prompt: dict[str, float] = {}
        self._of_reply: dict[str, deque[float]] = {digest: deque(maxlen=MAX_LAST) for digest in self._leans}
        self._next: dict[str, float] = {}  # entropy and margin of the next token
        self.needs_logits = isinstance(plan, BiasPlan) and plan.needs_logits
        self.needs_prompt_routing = isinstance(plan, BiasPlan) and plan.needs_routing_of_prompt
        self.needs_reply_routing = any(
            rule.lean is not None and rule.where.when is not None and not rule.where.when.of_prompt for rule in rules
        )

    @property
    def reads_ahead(self) -> bool:
        """Whether tokens of a given reply can be decided before those in front of them are computed."""
        return not (self.needs_logits or self.needs_reply_routing)

    def prompt(self, tokens: Sequence[int], *, ends: bool = True) -> list[Decision]:
        """Decide the tokens of the prompt. Called once, before the reply.

        With `ends` False more of the prompt is to come, and what counts from its end has not begun.
        """
        if not self._rules:
            return [Decision(self._uniform, None, "prompt")] * len(tokens)
        texts = [self._texts.next(token) for token in tokens]
        matches = [rule.prompt(tokens, texts, ends) for rule in self._rules]
        return [self._decision([match[i] for match in matches], "prompt") for i in range(len(tokens))]

    def reply(self, token: int) -> Decision:
        """Decide the reply's next token."""
        if not self._rules:
            return Decision(self._uniform, None, self._phases.next(self._texts.next(token)))
        text = self._texts.next(token)
        phase = self._phases.next(text)
        return self._decision([rule.next(token, text, phase) and self._holds(rule) for rule in self._rules], phase)

    def _decision(self, matches: Sequence[bool], phase: Phase) -> Decision:
        first = next((index for index, match in enumerate(matches) if match), None)
        return Decision(None if first is None else self._rules[first].rule.bias, first, phase)

    def _holds(self, state: _RuleState) -> bool:
        when, lean = state.rule.where.when, state.rule.lean
        if when is None:
            return True
        value = self._next.get(when.measure) if lean is None else self._lean_value(when, lean)
        return value is not None and when.holds(value)

    def _lean_value(self, when: Condition, lean: RoutingLean) -> float | None:
        if when.last is None:
            return self._of_prompt.get(lean.digest)
        scores = self._of_reply[lean.digest]
        return None if len(scores) < when.last else float(np.mean(list(scores)[-when.last :]))

    def saw_prompt_routing(self, experts: npt.NDArray[np.int32]) -> None:
        """Tell the selected experts of the whole prompt, int32 [n_prompt, n_layer, top_k]; -1: not routed."""
        if not len(experts):
            raise UsageError("the prompt has no tokens; give at least one")
        self._of_prompt = {digest: float(lean.of_tokens(experts).mean()) for digest, lean in self._leans.items()}

    def saw_reply_routing(self, experts: npt.NDArray[np.int32]) -> None:
        """Tell the selected experts of the next tokens of the reply, int32 [n, n_layer, top_k]."""
        for digest, lean in self._leans.items():
            self._of_reply[digest].extend(lean.of_tokens(experts).tolist())

    def saw_logits(self, logits: Logits) -> None:
        """Tell the logits that the next token is drawn from, float32 [n_vocab]."""
        logprobs = log_softmax(logits)
        second, first = np.partition(logprobs, -2)[-2:] if len(logprobs) > 1 else (-np.inf, logprobs[0])
        finite = logprobs[np.isfinite(logprobs)]
        self._next = {
            "entropy": float(-(np.exp(finite) * finite).sum()),
            "margin": float(first - second),
        }


class _RuleState:
    """Counts where in its phase a rule is."""

    def __init__(self, rule: BiasRule) -> None:
        self.rule = rule
        where = rule.where
        self._index = 0  # tokens of the phase behind `after` so far
        self._after = None if where.after is None else _Mark(where.after)
        self._until = None if where.until is None else _Mark(where.until)

    def prompt(self, tokens: Sequence[int], texts: Sequence[str], ends: bool) -> list[bool]:
        """Whether the rule's window has each token of the prompt."""
        where = self.rule.where
        if where.phase is None:
            return [self.next(token, text, "prompt") for token, text in zip(tokens, texts, strict=True)]
        matches = [False] * len(tokens)
        if where.phase == "prompt":
            there = [i for i, token in enumerate(tokens) if self._passes(token, texts[i])]
            start, stop = where.start, where.stop
            if not ends:
                start = len(there) if start < 0 else start
                stop = None if stop is not None and stop < 0 else stop
            for i in there[start : stop : where.every]:
                matches[i] = True
        return matches

    def next(self, token: int, text: str, phase: Phase) -> bool:
        """Whether the rule's window has the next token."""
        where = self.rule.where
        if (where.phase is not None and where.phase != phase) or not self._passes(token, text):
            return False
        index = self._index
        self._index += 1
        within = index >= where.start and (where.stop is None or index < where.stop)
        return within and (index - where.start) % where.every == 0

    def _passes(self, token: int, text: str) -> bool:
        """Whether a token of the phase is behind `after`, and not behind `until`."""
        behind = self._after is None or self._after.found
        ended = self._until is not None and self._until.found
        for mark in (self._after, self._until):
            if mark is not None:
                mark.feed(token, text)
        return behind and not ended


class _Mark:
    """Looks for a text or a token in the tokens of a phase."""

    def __init__(self, mark: str | int) -> None:
        self.found = False
        self._mark = mark
        self._seen = ""  # as much of the end of the text as the mark may begin in

    def feed(self, token: int, text: str) -> None:
        if self.found:
            return
        if isinstance(self._mark, int):
            self.found = token == self._mark
            return
        self._seen += text
        self.found = self._mark in self._seen
        self._seen = self._seen[max(0, len(self._seen) - len(self._mark) + 1) :]
