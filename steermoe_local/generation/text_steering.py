"""What steers each token of one text, decided as far as it is known while the text is read."""

from __future__ import annotations

from typing import Literal, NamedTuple

from ..errors import UsageError
from ..llama.plan_state import PlanState
from ..llama.reasoning_styles import ReasoningStyle
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import AnyBias, BiasPlan
from .context import Logits, SlotContext
from .slots import Key, Known, Slot, key_of


class Mark(NamedTuple):
    """What is told of a token of a reply: the rule under which it was drawn, None for none; its phase under a plan."""

    rule: int | None = None
    phase: Literal["thinking", "answer"] | None = None


UNSTEERED = Mark()


class TextSteering:
    """Decides the bias of each token's row of a text under a bias or a plan.

    `tokens` is the text so far, the caller's list, to which a reply's tokens are added; those before index `n_prompt`
    are the prompt. The first `n_decided` of them have a bias. A token of the reply is steered where it is drawn, in the
    row of the token before it (`PlanState`), so the prompt's last row is the reply's first. Under a plan with
    conditions a row of the reply is decided when what its conditions look at was computed, and told by `saw`.
    """

    def __init__(
        self,
        context: SlotContext,
        bias: AnyBias | None,
        style: ReasoningStyle | None,
        tokens: list[int],
        n_prompt: int | None = None,
        *,
        trace: bool = False,
    ) -> None:
        """`bias` was checked. `n_prompt` None: all tokens are the prompt. `trace`: the experts of all are wanted.

        Raises UsageError for a prompt without tokens or longer than the text.
        """
        self._n_prompt = len(tokens) if n_prompt is None else n_prompt
        if not 0 < self._n_prompt <= len(tokens):
            raise UsageError(f"n_prompt: {self._n_prompt} is not from 1 to the {len(tokens)} tokens of the text")
        self.biases: list[BiasFile | None] = []
        self.keys: list[Key] = []
        self._tokens, self._trace = tokens, trace
        self._uniform = None if isinstance(bias, BiasPlan) else bias
        self._plan: PlanState | None = None
        self._new_plan = (lambda: PlanState(bias, style, context.text_bytes)) if isinstance(bias, BiasPlan) else None
        self._mark = UNSTEERED if self._uniform is None else Mark(0)
        self._rule: int | None = None  # of the last row that was decided
        self._first = self._n_prompt - 1  # the first row of the reply
        self._knows_prompt = not self._first  # its routing; of no row it is told that nothing is known
        self._n_routed = self._first  # rows whose routing was told, with the prompt
        self._n_seen = 0  # tokens before the one whose distribution was told last
        self._begun = False

    def begin(self) -> None:
        """Decide what can be decided before anything is computed. Further calls do nothing."""
        if self._begun:
            return
        self.biases, self.keys = [], []
        if self._new_plan is not None:
            self._plan = self._new_plan()  # anew after an interrupt: its state cannot be used twice
            self.biases = [decision.bias for decision in self._plan.prompt(self._tokens[: self._n_prompt])]
            self.keys = [key_of(bias) for bias in self.biases]
        self.decide()
        self._begun = True

    @property
    def n_decided(self) -> int:
        """How many tokens' rows have a bias, or none, for certain."""
        return len(self.biases)

    def n_steered_given(self, n_given: int) -> int:
        """How many of the first `n_given` tokens are of the reply and steered where they would have been drawn."""
        return sum(bias is not None for bias in self.biases[self._first : n_given - 1])

    @property
    def known(self) -> Known:
        """What must be known of tokens in memory to use them."""
        if self._trace:
            return Known.ALL
        return Known.BUT_LAST if self._plan is not None and self._plan.needs_prompt_routing else Known.NOT

    @property
    def mark(self) -> Mark:
        """What is told of the last token whose row was decided; nothing under a plan before the reply."""
        return self._mark

    @property
    def rule(self) -> int | None:
        """The rule of the last row that was decided, None for none."""
        return self._mark.rule if self._new_plan is None else self._rule

    def decide(self) -> None:
        """Decide the rows of the tokens that were added, as far as that is possible."""
        plan, n_new = self._plan, len(self._tokens) - len(self.biases)
        if plan is None:
            self.biases += [self._uniform] * n_new
            self.keys += [key_of(self._uniform)] * n_new
            return
        for index in range(len(self.biases), len(self._tokens)):
            if not self._can_decide(plan, index):
                return
            if index == self._first:
                decision = plan.first()
            else:
                phase, decision = plan.reply(self._tokens[index])
                assert phase != "prompt"
                self._mark = Mark(self._rule, phase)
            self._rule = decision.rule
            self.biases.append(decision.bias)
            self.keys.append(key_of(decision.bias))

    def _can_decide(self, plan: PlanState, index: int) -> bool:
        """Whether all was told that conditions on a row of the reply look at; its first is behind no drawn token."""
        return (
            (self._knows_prompt or not plan.needs_prompt_routing)
            and (self._n_routed == index or not plan.needs_reply_routing)
            and (self._n_seen == index or index == self._first or not plan.needs_logits)
        )

    def reusable(self, slot: Slot, at_most: int) -> int:
        """How many tokens of a slot's memory can be used, at most `at_most`; the rest has to be computed."""
        self.begin()
        plan = self._plan
        n = self._held(slot, at_most)
        if plan is not None and plan.needs_prompt_routing and n == self._first and not self._knows_prompt:
            self._see_prompt(plan, slot)
            self.decide()
            n = self._held(slot, at_most)
        return n

    def _held(self, slot: Slot, at_most: int) -> int:
        plan = self._plan
        if plan is not None and plan.needs_reply_routing:
            at_most = min(at_most, self._first)
        if plan is not None and plan.needs_logits and self._first < self.n_decided < len(self._tokens):
            at_most = min(at_most, self.n_decided - 1)  # those of the last one are looked at
        return min(slot.holds(self._tokens, self.keys, self.known), at_most)

    def wants_logits(self, end: int) -> bool:
        """Whether the logits of the token before index `end` are looked at."""
        return self._plan is not None and self._plan.needs_logits and self._n_prompt <= end == self.n_decided

    def wants_experts(self, end: int) -> bool:
        """Whether the experts of tokens up to index `end` are looked at, in this request or the next of its kind."""
        plan = self._plan
        if plan is None:
            return self._trace
        return self._trace or plan.needs_prompt_routing or (plan.needs_reply_routing and end > self._first)

    def saw(self, slot: Slot, logits: Logits | None) -> None:
        """Tell what the slot holds now, and the logits of its last token if it was an output; decides by it."""
        plan, end = self._plan, len(slot.tokens)
        if plan is None or end < self._first:
            return
        if plan.needs_prompt_routing and not self._knows_prompt:
            self._see_prompt(plan, slot)
        if plan.needs_reply_routing and end > self._n_routed:
            experts = slot.experts(self._n_routed, end)
            assert experts is not None, "traced, see wants_experts"
            plan.saw_reply_routing(experts)
            self._n_routed = end
        if plan.needs_logits and logits is not None and end > self._first:
            plan.saw_logits(logits)
            self._n_seen = end
        self.decide()

    def _see_prompt(self, plan: PlanState, slot: Slot) -> None:
        experts = slot.experts(0, self._first)
        assert experts is not None, "traced, see wants_experts and known"
        plan.saw_prompt_routing(experts)
        self._knows_prompt = True
