"""What steers each token of one text under a plan, decided token by token as the text is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..maps.routing_lean import RoutingLean
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import AnyBias, BiasPlan, BiasRule
from ..steering.plan_rules import Measure, Phase
from .phases import PhaseTracker, TokenTexts
from .reasoning_styles import ReasoningStyle

Logits = npt.NDArray[np.float32]


class Decision(NamedTuple):
    """What steers one token: the bias, None for none; the index of the rule that steers it; the token's phase.

    `rule` is None where nothing steers, and 0 for a bias that is no plan.
    """

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
        self._of_prompt = {
            rule.lean.digest: _PromptLean(rule.lean)
            for rule in rules
            if rule.lean is not None and rule.where.when is not None and rule.where.when.of_prompt
        }
        self._of_reply: dict[str, _LastTokens] = {}
        for rule in rules:
            if rule.lean is not None and rule.where.when is not None and rule.where.when.last is not None:
                known = self._of_reply.get(rule.lean.digest)
                if known is None or known.most < rule.where.when.last:
                    self._of_reply[rule.lean.digest] = _LastTokens(rule.lean, rule.where.when.last)
        self._next: dict[Measure, float] = {
            rule.where.when.measure: np.nan
            for rule in rules
            if rule.where.when is not None and rule.where.when.measure != "routing"
        }
        self.needs_logits = bool(self._next)
        self.needs_prompt_routing = bool(self._of_prompt)
        self.needs_reply_routing = bool(self._of_reply)

    @property
    def reads_ahead(self) -> bool:
        """Whether tokens of a given reply can be decided before those in front of them are computed."""
        return not (self.needs_logits or self.needs_reply_routing)

    def prompt(self, tokens: Sequence[int]) -> list[Decision]:
        """Decide the tokens of the prompt. Called once, before the reply."""
        if not self._rules:
            return [self._same("prompt")] * len(tokens)
        texts = [self._texts.next(token) for token in tokens]
        decided: list[Decision | None] = [None] * len(tokens)
        for index, state in enumerate(self._rules):
            decision = self._decision(index, "prompt")
            for at in state.prompt(tokens, texts):
                decided[at] = decided[at] or decision
        unsteered = Decision(None, None, "prompt")
        return [decision or unsteered for decision in decided]

    def reply(self, token: int) -> Decision:
        """Decide the reply's next token."""
        text = self._texts.next(token)
        phase = self._phases.next(text)
        if not self._rules:
            return self._same(phase)
        first: int | None = None
        for index, state in enumerate(self._rules):  # all of them: each counts its tokens
            if state.next(token, text, phase) and first is None and self._holds(state.rule):
                first = index
        return Decision(None, None, phase) if first is None else self._decision(first, phase)

    def _same(self, phase: Phase) -> Decision:
        return Decision(self._uniform, None if self._uniform is None else 0, phase)

    def _decision(self, index: int, phase: Phase) -> Decision:
        bias = self._rules[index].rule.bias
        return Decision(bias, None if bias is None else index, phase)

    def _holds(self, rule: BiasRule) -> bool:
        when = rule.where.when
        if when is None:
            return True
        if rule.lean is None:
            return when.holds(self._next.get(when.measure, np.nan))
        digest = rule.lean.digest
        return when.holds(self._of_prompt[digest].mean if when.last is None else self._of_reply[digest].mean(when.last))

    def saw_prompt_routing(self, experts: npt.NDArray[np.int32]) -> None:
        """Tell the selected experts of the whole prompt, int32 [n_prompt, n_layer, top_k]; -1: not routed."""
        if not len(experts):
            raise UsageError("the prompt has no tokens; give at least one")
        for told in self._of_prompt.values():
            told.mean = float(told.lean.of_tokens(experts).mean())

    def saw_reply_routing(self, experts: npt.NDArray[np.int32]) -> None:
        """Tell the selected experts of the next tokens of the reply, int32 [n, n_layer, top_k]."""
        for told in self._of_reply.values():
            told.append(told.lean.of_tokens(experts))

    def saw_logits(self, logits: Logits) -> None:
        """Tell the logits that the next token is drawn from, float32 [n_vocab].

        With NaN or +infinity among them there is no distribution, and no condition on it holds.
        """
        for measure in self._next:
            self._next[measure] = entropy(logits) if measure == "entropy" else margin(logits)


def entropy(logits: Logits) -> float:
    """Entropy of the softmax of logits [n_vocab], in nats; NaN if they have none."""
    shifted = logits.astype(np.float64)
    largest = shifted.max()
    if not np.isfinite(largest):
        return float("nan")
    shifted -= largest
    weights = np.exp(shifted)
    total = weights.sum()
    shifted[weights == 0] = 0  # where -infinity times 0 would be NaN
    return float(np.log(total) - (weights * shifted).sum() / total)  # no BLAS: its bits depend on its threads


def margin(logits: Logits) -> float:
    """Log-probability of the likeliest token less that of the second, in nats; NaN if logits [n_vocab] have none."""
    if len(logits) < 2 or not np.isfinite(logits.max()):
        return float("inf") if len(logits) == 1 and np.isfinite(logits[0]) else float("nan")
    second, first = np.partition(logits, -2)[-2:].astype(np.float64)
    return float(first - second)


class _PromptLean:
    """How the prompt's routing leans; NaN until it is told."""

    def __init__(self, lean: RoutingLean) -> None:
        self.lean = lean
        self.mean = float("nan")


class _LastTokens:
    """Scores of the last tokens of a reply."""

    def __init__(self, lean: RoutingLean, most: int) -> None:
        """At most the last `most` are asked for."""
        self.lean = lean
        self.most = most
        self._scores = np.empty(max(1024, 2 * most))  # the last of them are at its end, moved when it is full
        self._n = 0

    def append(self, scores: npt.NDArray[np.float64]) -> None:
        scores = scores[-self.most :]
        if self._n + len(scores) > len(self._scores):
            kept = min(self._n, self.most)
            self._scores[:kept] = self._scores[self._n - kept : self._n]
            self._n = kept
        self._scores[self._n : self._n + len(scores)] = scores
        self._n += len(scores)

    def mean(self, n: int) -> float:
        """Mean of the last `n`; NaN if there are fewer. Summed anew, so that it depends on these alone."""
        return float(self._scores[self._n - n : self._n].sum() / n) if n <= self._n else float("nan")


class _RuleState:
    """Counts where in its phase a rule is."""

    def __init__(self, rule: BiasRule) -> None:
        self.rule = rule
        where = rule.where
        self._index = 0  # tokens of the phase behind `after` so far
        self._after = None if where.after is None else _Mark(where.after)
        self._until = None if where.until is None else _Mark(where.until)

    def prompt(self, tokens: Sequence[int], texts: Sequence[str]) -> Sequence[int]:
        """Indices of the prompt's tokens that the rule's window has."""
        where = self.rule.where
        if where.phase is None:
            return [i for i, token in enumerate(tokens) if self.next(token, texts[i], "prompt")]
        if where.phase != "prompt":
            return ()
        there: Sequence[int] = range(len(tokens))
        if self._after is not None or self._until is not None:
            there = [i for i, token in enumerate(tokens) if self._passes(token, texts[i])]
        return there[where.start : where.stop : where.every]

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
        """Whether a token of the phase is behind `after`, and not behind `until`, which is looked for behind it."""
        behind = self._after is None or self._after.found
        ended = self._until is not None and self._until.found
        if self._after is not None and not behind:
            rest = self._after.feed(token, text)
            if rest and self._until is not None:
                self._until.feed(None, rest)  # a token can complete both
        elif self._until is not None and not ended:
            self._until.feed(token, text)
        return behind and not ended


class _Mark:
    """Looks for a text or a token in the tokens of a phase."""

    def __init__(self, mark: str | int) -> None:
        self.found = False
        self._mark = mark
        self._seen = ""  # as much of the end of the text as the mark may begin in

    def feed(self, token: int | None, text: str) -> str:
        """Read a token, or the end (`token` None) of one's text; returns what follows the mark if that is found."""
        if isinstance(self._mark, int):
            self.found = token == self._mark
            return ""
        self._seen += text
        start = self._seen.find(self._mark)
        self.found = start >= 0
        if self.found:
            return self._seen[start + len(self._mark) :]
        self._seen = self._seen[max(0, len(self._seen) - len(self._mark) + 1) :]
        return ""
