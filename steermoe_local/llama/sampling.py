"""Samples the next token with llama.cpp's samplers, in the order of its programs."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from . import capi
from .grammar_bounds import require_bounded
from .grammars import GbnfGrammar, GuidedGrammar, guided_tokenizer, open_grammar

Logits = npt.NDArray[np.float32]

RANDOM_SEED = 0xFFFFFFFF
"""llama.cpp's LLAMA_DEFAULT_SEED: it stands for a seed that is drawn."""

LARGEST = 1e6
"""The most that a parameter may be: llama.cpp computes in float32, whose infinity turns logits into NaN."""

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # struct llama_token_data


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters under llama.cpp's names; temperature 0 is greedy.

    `top_k` 0, `top_p` 1, `min_p` 0, `repeat_penalty` 1 and penalties of 0 switch these samplers off.
    `repeat_last_n` is how many tokens, the prompt's included, the penalties look back; -1: as many as n_ctx. `seed`
    None draws one. `grammar` is in GBNF, with a rule "root", or, beginning with `%llguidance`, in Lark (`grammars.py`).
    `logit_bias` is added to logits by token; -inf bans one.

    Raises UsageError for values outside their ranges.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    grammar: str | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_ranges(
            self,
            temperature=(0, LARGEST),
            top_k=(0, 2**31 - 1),
            top_p=(0, 1),
            min_p=(0, 1),
            repeat_last_n=(-1, 2**31 - 1),
            presence_penalty=(-LARGEST, LARGEST),
            frequency_penalty=(-LARGEST, LARGEST),
        )
        if not 0 < self.repeat_penalty <= LARGEST:
            raise UsageError(
                f"repeat_penalty: {self.repeat_penalty} is not above 0 and up to {LARGEST:g}; 1 switches it off"
            )
        if self.seed is not None and not 0 <= self.seed < RANDOM_SEED:
            raise UsageError(f"seed: {self.seed} is not from 0 to {RANDOM_SEED - 1}; leave it out to draw one")
        if self.grammar is not None:
            if not self.grammar.strip():
                raise UsageError("grammar: empty; leave it out or give rules in GBNF")
            require_bounded(self.grammar)
        for token, bias in self.logit_bias.items():
            if not (abs(bias) <= LARGEST or bias == -math.inf):
                raise UsageError(
                    f"logit_bias: {bias} for token {token} is not from {-LARGEST:g} to {LARGEST:g}, or -inf"
                )

    def chain(self, lib: Any, vocab: Any, n_ctx: int, seed: int) -> tuple[list[Any], int]:
        """The native samplers behind the logit biases, the last of which draws, and how many tokens they look back."""
        penalties, n_look_back = self.penalties(lib, vocab, n_ctx)
        if self.temperature == 0:
            return [*penalties, lib.llama_sampler_init_greedy()], n_look_back
        return [
            *penalties,
            lib.llama_sampler_init_top_k(self.top_k),
            lib.llama_sampler_init_top_p(self.top_p, 1),
            lib.llama_sampler_init_min_p(self.min_p, 1),
            lib.llama_sampler_init_temp(self.temperature),
            lib.llama_sampler_init_dist(seed),
        ], n_look_back

    def penalties(self, lib: Any, vocab: Any, n_ctx: int) -> tuple[list[Any], int]:
        """The native sampler of the penalties, none if they are off, and how many tokens it looks back."""
        penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty)
        # no text is longer than n_ctx, and llama.cpp makes room for all of them
        last_n = n_ctx if self.repeat_last_n == -1 else min(self.repeat_last_n, n_ctx)
        if penalties == (1, 0, 0) or not last_n:
            return [], 0
        n_vocab = lib.llama_vocab_n_tokens(vocab)
        return [lib.llama_sampler_init_penalties(n_vocab, last_n, *penalties)], last_n


def require_ranges(sampling: Sampling, **ranges: tuple[float, float]) -> None:
    """Raise UsageError for a field that is not a finite number within its range."""
    for name, (low, high) in ranges.items():
        value = getattr(sampling, name)
        if not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"{name}: {value} is not {_in_words(value, low, high)}")


def _in_words(value: float, low: float, high: float) -> str:
    if high >= LARGEST:  # the other bound is of no interest
        return f">= {low}" if value < low else f"<= {high:g}"
    return f"from {low} to {high}"


class Sampler:
    """Samples the tokens of one answer. The same seed and the same logits give the same tokens."""

    def __init__(
        self,
        vocab: Any,
        sampling: Sampling,
        prompt: Sequence[int],
        n_ctx: int,
        tokenizer: Callable[[], Any] | None = None,
    ) -> None:
        """The penalties look back on `prompt`. `tokenizer` gives the `guided_tokenizer` of `vocab`; None: one is made.

        Raises UsageError (an invalid grammar or token).
        """
        lib = capi.llama_cpp()
        self._free = lib.llama_sampler_free  # kept: modules are gone when the interpreter ends
        self._chain: Any = None
        self._grammar: GbnfGrammar | GuidedGrammar | None = None
        n_vocab = lib.llama_vocab_n_tokens(vocab)
        self.seed = secrets.randbelow(RANDOM_SEED) if sampling.seed is None else sampling.seed
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._candidates = np.zeros(n_vocab, _TOKEN_DATA)
        self._fields = self._candidates["id"], self._candidates["logit"]  # views: made once, as is the pointer
        self._data = ctypes.cast(self._candidates.ctypes.data, lib.llama_token_data_p)
        self._array = lib.llama_token_data_array()
        if sampling.grammar is not None:
            self._grammar = open_grammar(sampling.grammar, vocab, tokenizer or (lambda: guided_tokenizer(vocab)))
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        for sampler in self._samplers(lib, vocab, n_vocab, sampling, n_ctx):
            lib.llama_sampler_chain_add(self._chain, sampler)
        if self._n_look_back:
            for token in prompt[-self._n_look_back :]:
                lib.llama_sampler_accept(self._chain, token)

    def _samplers(self, lib: Any, vocab: Any, n_vocab: int, sampling: Sampling, n_ctx: int) -> list[Any]:
        """In the order of llama.cpp's common_sampler_init."""
        samplers = []
        if biases := _biases(lib, vocab, n_vocab, sampling):
            samplers.append(bias_sampler(lib, n_vocab, biases))
        chain, self._n_look_back = sampling.chain(lib, vocab, n_ctx, self.seed)
        return samplers + chain

    def sample(self, logits: Logits) -> int | None:
        """Draw a token by its logits, [n_vocab]; None: no token is allowed, as at the end of a grammar.

        Raises GrammarLimitError for a grammar that cannot be followed further.
        """
        lib = capi.llama_cpp()
        token, logit = self._draw(lib, self._fill(logits), self._chain)
        if self._grammar is not None and not self._grammar.allows(token):
            # a grammar is slow to apply to all tokens: done only where the first choice breaks it, as in llama.cpp
            array = self._fill(logits)
            self._grammar.restrict(array, self._fields[1])
            token, logit = self._draw(lib, array, self._chain)
        return None if logit == -math.inf else token

    def accept(self, token: int) -> None:
        """Advance penalties and grammar by the token that `sample` returned (not an end of generation).

        Raises GrammarLimitError.
        """
        lib = capi.llama_cpp()
        if self._grammar is not None:
            self._grammar.accept(token)
        lib.llama_sampler_accept(self._chain, token)

    def _fill(self, logits: Logits) -> Any:
        ids, values = self._fields
        ids[:], values[:] = self._ids, logits
        self._array.data = self._data
        self._array.size, self._array.selected, self._array.sorted = len(self._candidates), -1, False
        return self._array

    @staticmethod
    def _draw(lib: Any, array: Any, chain: Any) -> tuple[int, float]:
        lib.llama_sampler_apply(chain, ctypes.byref(array))
        chosen = array.data[array.selected]
        return int(chosen.id), float(chosen.logit)

    def close(self) -> None:
        """Free the samplers."""
        if self._grammar is not None:
            self._grammar.close()
        chain, self._chain = self._chain, None
        if chain:
            self._free(chain)

    def __del__(self) -> None:
        if hasattr(self, "_grammar"):
            self.close()


def bias_sampler(lib: Any, n_vocab: int, biases: Mapping[int, float]) -> Any:
    """The native sampler that adds `biases`, by token, to the logits."""
    entries = (lib.llama_logit_bias * len(biases))()
    for entry, (token, bias) in zip(entries, biases.items(), strict=True):
        entry.token, entry.bias = token, bias
    return lib.llama_sampler_init_logit_bias(n_vocab, len(biases), entries)


def _biases(lib: Any, vocab: Any, n_vocab: int, sampling: Sampling) -> dict[int, float]:
    """Logit biases by token, including -inf for the tokens that the model's vocabulary suppresses."""
    for token in sampling.logit_bias:
        if not 0 <= token < n_vocab:
            raise UsageError(f"logit_bias: token {token}, but the vocabulary has 0 to {n_vocab - 1}")
    biases = {token: bias for token, bias in sampling.logit_bias.items() if bias}
    n_banned = ctypes.c_int32()
    banned = lib.llama_vocab_get_suppress_tokens(vocab, ctypes.byref(n_banned))
    return biases | {banned[i]: -math.inf for i in range(n_banned.value)}


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Natural logarithms of the probabilities of all tokens, [..., n_vocab], before any sampler."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted
