"""A request, and the events that answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ..llama.reasoning_styles import ReasoningStyle
from ..llama.sampling import Sampling
from ..steering.bias_plan import AnyBias
from .context import Int32, Int64
from .slots import Slot

Reason = Literal["stop", "length", "context", "grammar", "cancelled"]


@dataclass(frozen=True)
class TokenEvent:
    """A token of the answer, with the text that is certain now: "" while a character or a stop string is incomplete.

    `token` is the token that was drawn, -1 where only held back text is given out. `logprob` is the natural logarithm
    of its probability before any sampler, `top` the likeliest (token, logprob); both only with `Request.n_probs`.

    `rule` is the index of the plan's rule under which the token was drawn, 0 under a bias for all tokens, None: it was
    drawn unsteered. `phase` is told under a plan alone. Both are of the token; the text may be that of others, too.
    """

    text: str
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rule: int | None = None
    phase: Literal["thinking", "answer"] | None = None


@dataclass(frozen=True)
class FinishEvent:
    """How an answer ended.

    `reason`: "stop" (an end-of-generation token, a stop string, the end of the grammar), "length" (max_tokens),
    "context" (n_ctx is full), "grammar" (it cannot be followed further) or "cancelled". `n_cached` of the `n_prompt`
    tokens were in memory already. `n_generated` counts the answer's tokens without the one that ends the generation.
    `prompt_seconds` run from the first decode to the first token, `seconds` from there on. `stop` is the stop string
    that was found.

    `routing` [n_layer, n_expert] counts the selections of the `n_rows` rows whose logits were drawn from: the prompt's
    last token and the answer's, up to the one before the last draw. None without a recorder, or if not asked for.

    `n_steered` of the answer's tokens were drawn under a rule that steers; tokens of the answer that the prompt had
    (`Request.n_prompt`) count as if drawn. `experts`, int32 [n_prompt - 1 + n_rows, n_layer, top_k], are those that
    each token selected that was read, the likeliest first as the router has them, -1: the layer does not route; only
    if `Request.trace` asked for them. Of a cancelled request they are those of the tokens that were read, None if none
    was.

    `end` is the end-of-generation token, if one was drawn. `prompt` are the prompt's tokens from `Request.prompt_from`
    on, with the probabilities that the model gave them (none for the first of all), if `Request.prompt_probs` asked
    for them. Both have no text.
    """

    reason: Reason
    n_prompt: int
    n_cached: int
    n_generated: int
    prompt_seconds: float
    seconds: float
    seed: int
    stop: str | None
    routing: Int64 | None = field(default=None, compare=False)
    n_rows: int = 0
    end: TokenEvent | None = field(default=None, compare=False)
    prompt: tuple[TokenEvent, ...] = field(default=(), compare=False)
    n_steered: int = 0
    experts: Int32 | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Request:
    """An answer that is asked for.

    `tokens` is the whole prompt; what of it the slot holds already is not computed again. `bias` steers it, a plan from
    token to token; None: nothing does. For a plan `style` says how the reply marks its reasoning, and the tokens from
    index `n_prompt` on, if it is given, are the first of the reply. `max_tokens` None: up to the end of generation or
    of n_ctx. `stop`: strings that end the answer and are left out of it. `n_probs`: how many of the likeliest tokens
    are named with their log probabilities, the drawn token's besides; None: no log probabilities. `prompt_probs`: the
    same for the prompt's tokens from index `prompt_from` on; what the slot holds is used for those before them alone.
    `special`: control tokens are part of the text. `slot`: a slot of the caller's own (`Engine.slot`); None: the engine
    takes one. Without `reuse` the whole prompt is computed, whatever the slot holds. Without `routing` the selections
    of experts are not counted, which is faster. `trace`: the experts of every token are wanted
    (`FinishEvent.experts`); each token then costs an output.
    """

    tokens: Sequence[int]
    bias: AnyBias | None = None
    sampling: Sampling = field(default_factory=Sampling)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    n_probs: int | None = None
    special: bool = False
    prompt_probs: int | None = None
    prompt_from: int = 0
    slot: Slot | None = None
    reuse: bool = True
    routing: bool = True
    style: ReasoningStyle | None = None
    n_prompt: int | None = None
    trace: bool = False


Event = TokenEvent | FinishEvent
