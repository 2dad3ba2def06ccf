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
    """What steers one row: the bias, None for none; the index of the rule that steers it; the phase that it is of.

    `rule` is None where nothing steers, and 0 for a bias that is no plan.
    """

    bias: BiasFile | None
    rule: int | None
    phase: Phase


def require_tokens(plan: BiasPlan, n_vocab: int) -> None:
    """Raise UsageError for a rule that waits for a token which is not of the vocabulary: it would never match."""
    for number, rule in enumerate(plan.rules, 1):
        for name in ("after", "until"):
            mark = getattr(rule.where, name)
            if isinstance(mark, int) and mark >= n_vocab:
                raise UsageError(f"rule {number}: {name} #{mark}: the vocabulary has 0 to {n_vocab - 1}")


class PlanState:
    """Decides what steers each row of a text: first those of the prompt, then those of the reply in their order.

    A token of the prompt is steered where it is read. A token of the reply is steered where it is drawn, in the row
    of the token before it; so the row of the prompt's last token is the reply's first, and is decided by `first`. Where
    reasoning may begin or the answer, the row counts as the answer's.

    What conditions look at has to be told before the rows that depend on it are decided: `saw_prompt_routing` when the
    prompt was computed up to its last token, `saw_reply_routing` for each row of the reply, `saw_logits` for the
    distribution that the last token was drawn from, each only where the plan needs it.
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

    def prompt(self, tokens: Sequence[int], *, ends: bool = True) -> list[Decision]:
        """Decide the rows of the prompt's tokens but the last. Called once, before `first`.

        With `ends` False more of the prompt is to come: all rows are decided, and what counts from the prompt's end has
        not begun. Nothing can be decided after that.
        """
        n = len(tokens) - ends
        if not self._rules:
            return [self._same("prompt")] * n
        texts = [self._texts.next(token) for token in tokens]
        decided: list[Decision | None] = [None] * n
        for index, state in enumerate(self._rules):
            decision = self._decision(index, "prompt")
            for at in state.prompt(tokens, texts, ends):
                decided[at] = decided[at] or decision
        unsteered = Decision(None, None, "prompt")
        return [decision or unsteered for decision in decided]

    def first(self) -> Decision:
        """Decide the row of the prompt's last token, which draws the reply's first."""
        return self._of_next()

    def reply(self, token: int) -> tuple[Phase, Decision]:
        """Take the reply's next token: the phase that it is of itself, and the decision of its row."""
        text = self._texts.next(token)
        phase = self._phases.next(text)
        for state in self._rules:
            state.read(token, text, phase)
        return phase, self._of_next()

    def _of_next(self) -> Decision:
        """The decision of the row that draws the next token."""
        phase = self._phases.upcoming
        if not self._rules:
            return self._same(phase)
        for index, state in enumerate(self._rules):
            if state.has_next(phase) and self._holds(state.rule):
                return self._decision(index, phase)
        return Decision(None, None, phase)

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
        """Tell the selected experts of the prompt without its last token, int32 [n_prompt - 1, n_layer, top_k].

        -1: not routed. Of a prompt of one token nothing is known, and no condition on it holds.
        """
        for told in self._of_prompt.values():
            told.mean = float(told.lean.of_tokens(experts).mean()) if len(experts) else float("nan")

    def saw_reply_routing(self, experts: npt.NDArray[np.int32]) -> None:
        """Tell the selected experts of the next rows of the reply, int32 [n, n_layer, top_k]."""
        for told in self._of_reply.values():
            told.append(told.lean.of_tokens(experts))

    def saw_logits(self, logits: Logits) -> None:
        """Tell the logits that the reply's next token is drawn from, float32 [n_vocab].

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
        scores = scores[max(0, len(scores) - self.most) :]
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
        self._index = 0  # tokens of the phase so far, behind `after` and not behind `until`
        self._after = None if where.after is None else _Mark(where.after)
        self._until = None if where.until is None else _Mark(where.until)

    def prompt(self, tokens: Sequence[int], texts: Sequence[str], ends: bool) -> Sequence[int]:
        """Indices of the prompt's rows that the rule's window has; the last token's is not one if the prompt ends."""
        where = self.rule.where
        n = len(tokens) - ends
        if where.phase is None:
            found = [i for i in range(n) if self._reads(tokens[i], texts[i])]
            for token, text in zip(tokens[n:], texts[n:], strict=True):
                self._look(token, text)
            return found
        if where.phase != "prompt":
            return ()
        there: Sequence[int] = range(n)
        if self._after is not None or self._until is not None:
            there = [i for i in range(n) if self._passes(tokens[i], texts[i])]
        start, stop = where.start, where.stop
        if not ends:  # what counts from the end has not begun
            start = len(there) if start < 0 else start
            stop = None if stop is not None and stop < 0 else stop
        return there[start : stop : where.every]

    def has_next(self, phase: Phase) -> bool:
        """Whether the rule's window has the row that draws the next token, of this phase."""
        where = self.rule.where
        return where.phase in (None, phase) and self._within and self._in_window

    def read(self, token: int, text: str, phase: Phase) -> None:
        """Take a token of the reply, of this phase."""
        if self.rule.where.phase in (None, phase):
            self._passes(token, text)

    def _reads(self, token: int, text: str) -> bool:
        """Take a token of the prompt; whether the rule's window has its row."""
        has = self._within and self._in_window
        self._passes(token, text)
        return has

    @property
    def _within(self) -> bool:
        """Whether what comes next is behind `after`, and not behind `until`."""
        return (self._after is None or self._after.found) and not (self._until is not None and self._until.found)

    @property
    def _in_window(self) -> bool:
        where, index = self.rule.where, self._index
        within = index >= where.start and (where.stop is None or index < where.stop)
        return within and (index - where.start) % where.every == 0

    def _passes(self, token: int, text: str) -> bool:
        """Count a token of the phase; whether it is behind `after`, and not behind `until`."""
        passes = self._within
        self._index += passes
        self._look(token, text)
        return passes

    def _look(self, token: int, text: str) -> None:
        """Look for `after` in a token of the phase, and for `until` behind it."""
        if self._after is not None and not self._after.found:
            rest = self._after.feed(token, text)
            if rest and self._until is not None:
                self._until.feed(None, rest)
        elif self._until is not None and not self._until.found:
            self._until.feed(token, text)


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
