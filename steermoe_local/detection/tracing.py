"""Traces of routing: which experts every single token of a text selects in every layer, and with which weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import NativeError, UsageError
from ..identity import ModelIdentity
from ..llama import capi
from ..llama.loaded_model import can_share, loaded_identity
from ..llama.phases import PhaseTracker, TokenTexts
from ..llama.plan_state import PlanState
from ..llama.reasoning_styles import ReasoningStyle
from ..llama.rendering import Prompt
from ..llama.steered_llama import native_bias
from ..steering.bias_file import BiasFile
from ..steering.bias_plan import AnyBias
from ..steering.plan_rules import PHASES
from .decoding import ContextOptions, GroupDecoder
from .grouping import Group, GroupBuilder

Int8 = npt.NDArray[np.int8]
Int16 = npt.NDArray[np.int16]
Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

SideName = Literal["", "positive", "negative"]
UNSTEERED = -1


@dataclass(frozen=True, eq=False)
class TracedText:
    """A text to be traced: a prompt, a prompt with its answer, or a side of a pair.

    `item` is the index of the prompt or pair in its file, from 0, `id` its id. `tokens` are all tokens, `phases` int8
    their phases as indices of `PHASES`. `rules` int16: the rule of the plan that steers each token where it is read (0
    for a bias that is no plan), -1: nothing does. `target`: the indices of the target's tokens.
    """

    item: int
    id: str
    tokens: Sequence[int]
    phases: Int8
    rules: Int16
    side: SideName = ""
    target: Sequence[int] = ()

    def is_target(self, part: slice) -> npt.NDArray[np.bool_]:
        """Whether each of these tokens is of the target."""
        return np.isin(np.arange(part.start, part.stop), np.asarray(self.target, np.int64))


@dataclass(frozen=True, eq=False)
class TracedTokens:
    """The routing of the tokens [first, first + n) of a text.

    `experts` int32 [n, n_layer, top_k]: what each layer selects, in the order in which the router ranks them, -1 in
    layers without a router. `weights` float32, the same shape: their mixing weights, 0 there. `logits` float32 [n,
    n_layer, n_expert]: the routers' logits before steering, NaN there; None if they were not asked for.
    """

    text: TracedText
    first: int
    experts: Int32
    weights: Float32
    logits: Float32 | None

    def __len__(self) -> int:
        return len(self.experts)

    @property
    def part(self) -> slice:
        """The indices of the tokens in the text."""
        return slice(self.first, self.first + len(self))

    def split(self, n: int) -> Iterator[TracedTokens]:
        """Parts of at most `n` tokens."""
        for start in range(0, len(self), n):
            part = slice(start, start + n)
            logits = None if self.logits is None else self.logits[part]
            yield TracedTokens(self.text, self.first + start, self.experts[part], self.weights[part], logits)


class TraceReader:
    """Reads texts in a context of its own and traces every token; a context manager.

    Short texts share a decode as parallel sequences. What they begin with is computed once where all tokens are steered
    alike. Memory does not grow with the number of texts; the KV cache grows with the longest one.
    """

    def __init__(
        self,
        model: Any,
        bias: AnyBias | None = None,
        options: ContextOptions | None = None,
        *,
        logits: bool = False,
        share_prefixes: bool = True,
        force: bool = False,
    ) -> None:
        """`model` is llama_cpp's `LlamaModel`, `bias` what steers it; `force`: a bias of another router, too.

        Raises ModelError (no experts), ModelMismatchError with the first text (a bias that does not fit).
        """
        self.identity: ModelIdentity = loaded_identity(model)
        self._logits = logits
        self._options = options or ContextOptions()
        rules: Sequence[BiasFile | None] = ()
        if bias is not None:
            rules = [bias] if isinstance(bias, BiasFile) else [rule.bias for rule in bias.rules]
        keys = list(dict.fromkeys(rule.key for rule in rules if rule is not None))
        # of each rule, which bias; one entry more, which is what index -1 finds: unsteered
        rows = [UNSTEERED if rule is None else keys.index(rule.key) for rule in rules]
        self._rows = np.array([*rows, UNSTEERED], np.int32)
        self._biases = [next(rule for rule in rules if rule is not None and rule.key == key) for key in keys]
        self.n_read = 0
        """Texts that are read: several in one decode, before the first of them is given."""
        self._share = share_prefixes and can_share(model) and (bias is None or isinstance(bias, BiasFile))
        self._decoder = GroupDecoder(
            model,
            self.identity.shape,
            self._options,
            biases=[native_bias(each) for each in self._biases],
            force=force,
        )

    def __enter__(self) -> TraceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder.__exit__()

    def read(self, texts: Iterable[TracedText]) -> Iterator[TracedTokens]:
        """Trace texts, in their order; a long one comes in several parts.

        Raises UsageError (a text without tokens, or one that bidirectional attention cannot read in parts),
        ModelMismatchError, ModelError, NativeError.
        """
        n_batch = self._options.n_batch
        builder = GroupBuilder(
            n_rows=n_batch, n_prompts=self._decoder.n_prompts, n_bins=self._decoder.n_bins, share=self._share
        )
        held: list[TracedText] = []
        for text in texts:
            if not len(text.tokens):
                raise UsageError("a text has no tokens; give at least one")
            prompt = Prompt(list(text.tokens), list(range(len(text.tokens))))
            if not builder.add([prompt]):
                yield from self._group(builder.build(), held)
                builder.clear()
                held = []
                builder.add([prompt])
            held.append(text)
        if held:
            yield from self._group(builder.build(), held)

    def _group(self, group: Group, texts: Sequence[TracedText]) -> Iterator[TracedTokens]:
        """Trace the texts of one group: several that one decode holds, or one of any length."""
        owners = np.repeat(np.arange(len(group.tokens)), np.diff(group.ends, prepend=0))
        # a token's row comes behind the rows of the tokens before it, so these are in the order of the text
        rows = [owners[group.sequences == number] for number in range(len(texts))]
        steered = None
        if self._biases:
            steered = np.full(len(group.tokens), UNSTEERED, np.int32)
            for text, mine in zip(texts, rows, strict=True):
                steered[mine] = self._rows[text.rules]
        for part, trace in self._decoder.trace(group, steered, logits=self._logits):
            if part.stop == len(group.tokens):
                self.n_read += len(texts)
            self._check(trace, part.stop - part.start)
            for text, mine in zip(texts, rows, strict=True):
                # several texts are in one part as a whole; of one text, a part follows the other
                own = mine - part.start if len(texts) > 1 else np.arange(part.stop - part.start)
                assert trace.weights is not None
                yield TracedTokens(
                    text,
                    part.start if len(texts) == 1 else 0,
                    trace.experts[own],
                    trace.weights[own],
                    None if trace.logits is None else trace.logits[own],
                )

    def _check(self, trace: capi.Trace, n_tokens: int) -> None:
        """Raise NativeError unless every layer that routes has selected top-k experts for each token."""
        chosen = (trace.experts >= 0).sum(axis=2)
        routes = chosen.any(axis=0)
        if len(trace.experts) != n_tokens or not routes.any():
            raise NativeError("the routing of a text was not recorded; report this")
        if (chosen[:, routes] != self.identity.n_expert_used).any():
            raise NativeError("a token did not select top-k experts in a layer; report this")


def prompt_rules(
    bias: AnyBias | None,
    tokens: Sequence[int],
    style: ReasoningStyle | None,
    token_bytes: Callable[[int], bytes],
    *,
    answered: bool,
) -> Int16:
    """The rule that steers each token of a prompt where it is read, as of `TracedText.rules`.

    The last token, which draws the reply's first, is of the reply if the prompt is `answered`; no condition on routing
    holds there, as nothing is known of it. Else it is of the prompt as the others are.
    """
    state = PlanState(bias, style, token_bytes)
    if answered:
        return rules_of([*(each.rule for each in state.prompt(tokens)), state.first().rule])
    return rules_of(each.rule for each in state.prompt([*tokens, tokens[-1]]))


def rules_of(rules: Iterable[int | None]) -> Int16:
    """Rules as of `TracedText.rules`, of numbers that are None where nothing steers."""
    return np.array([UNSTEERED if rule is None else rule for rule in rules], np.int16)


def phases_of(
    n_prompt: int, reply: Sequence[int], style: ReasoningStyle | None, token_bytes: Callable[[int], bytes]
) -> Int8:
    """The phase of each token of a prompt of `n_prompt` tokens and of its reply, as indices of `PHASES`."""
    tracker, texts = PhaseTracker(style), TokenTexts(token_bytes)
    phases = [tracker.next(texts.next(token)) for token in reply]
    return np.array([PHASES.index("prompt")] * n_prompt + [PHASES.index(phase) for phase in phases], np.int8)
