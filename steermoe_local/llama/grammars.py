"""Grammars that bind what is sampled: GBNF by llama.cpp, Lark and JSON Schema by llguidance."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import NativeError, UsageError
from . import capi
from .grammar_bounds import GUIDED as GUIDED
from .tokenizing import token_bytes

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

Logits = npt.NDArray[np.float32]

# A request's schema must not block the server: below llguidance's own limits, which allow seconds for one token.
_LIMITS = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 100_000,
    "max_items_in_row": 10_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 200_000,
    "verbose_errors": False,
}


class GrammarLimitError(NativeError):
    """A grammar cannot be followed to its end: too large, or the vocabulary cannot spell what comes next."""


class GbnfGrammar:
    """A grammar in GBNF with a rule "root", by llama.cpp's sampler."""

    def __init__(self, grammar: str, vocab: Any) -> None:
        """Raises UsageError for an invalid one."""
        lib = capi.llama_cpp()
        self._free = lib.llama_sampler_free  # kept: modules are gone when the interpreter ends
        self._array = lib.llama_token_data_array()
        capi.take_log_error()  # older failures are not this grammar's
        self._sampler: Any = lib.llama_sampler_init_grammar(vocab, grammar.encode(), b"root")
        if not self._sampler:
            reason = capi.take_log_error() or "no reason given"
            raise UsageError(f"grammar: llama.cpp refuses it ({reason}); give rules in GBNF, one of them root")

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        lib = capi.llama_cpp()
        single = lib.llama_token_data(token, 1, 0)
        self._array.data = ctypes.pointer(single)
        self._array.size, self._array.selected, self._array.sorted = 1, -1, False
        lib.llama_sampler_apply(self._sampler, ctypes.byref(self._array))
        return bool(single.logit != -np.inf)

    def restrict(self, array: Any, logits: Logits) -> None:
        """Set the logits of all tokens that may not come next to -inf: those of `array`, llama.cpp's candidates."""
        capi.llama_cpp().llama_sampler_apply(self._sampler, ctypes.byref(array))

    def accept(self, token: int) -> None:
        """Advance by a token."""
        capi.llama_cpp().llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        """Free the sampler."""
        sampler, self._sampler = self._sampler, None
        if sampler:
            self._free(sampler)


class GuidedGrammar:
    """A grammar of llguidance: Lark, with `%json` for a JSON Schema.

    Unlike one in GBNF it never takes a control token for the text of its name, and bytes that are no text not for text.
    """

    def __init__(self, grammar: str, tokenizer: LLTokenizer) -> None:
        """Raises UsageError for an invalid one."""
        self._matcher = _matcher(grammar, tokenizer)
        if reason := self._matcher.get_error():
            raise UsageError(f"grammar: llguidance refuses it ({' '.join(reason.split())[:300]})")
        self._ends = frozenset(tokenizer.eos_tokens)
        self._bits = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)

    def allows(self, token: int) -> bool:
        """Whether the token may come next."""
        if token in self._ends:
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.validate_tokens([token]) == 1)

    def restrict(self, array: Any, logits: Logits) -> None:
        """Set the logits of all tokens that may not come next to -inf. Raises GrammarLimitError."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little")
        logits[allowed[: len(logits)] == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Advance by a token. Raises GrammarLimitError."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:200]
            raise GrammarLimitError(f"the grammar cannot be followed further ({reason}); simplify it")

    def close(self) -> None:
        """Nothing is held outside of the object."""


def open_grammar(grammar: str, vocab: Any, tokenizer: Callable[[], LLTokenizer]) -> GbnfGrammar | GuidedGrammar:
    """A grammar at its beginning; `tokenizer` is called for one of llguidance. Raises UsageError for an invalid one."""
    return GuidedGrammar(grammar, tokenizer()) if grammar.startswith(GUIDED) else GbnfGrammar(grammar, vocab)


def why_refused(grammar: str) -> str | None:
    """Why llguidance cannot follow a grammar, None if it can; without a model.

    `grammar` is Lark (`GUIDED`), or llguidance's JSON, whose reasons are those of a JSON Schema alone.
    """
    matcher = _matcher(grammar, _byte_tokenizer())
    if not matcher.is_error():
        matcher.compute_bitmask()  # limits of the first step
    return matcher.get_error() or None


def _matcher(grammar: str, tokenizer: LLTokenizer) -> LLMatcher:
    llguidance = _llguidance()
    matcher: LLMatcher = llguidance.LLMatcher(
        tokenizer, grammar, log_level=0, limits=llguidance.LLParserLimits(**_LIMITS)
    )
    return matcher


def guided_tokenizer(vocab: Any) -> LLTokenizer:
    """The vocabulary of a model for llguidance; takes a second for a large one, so keep it.

    A token stands for the bytes that it adds to an answer; control tokens add none, and no grammar allows them.
    """
    lib = capi.llama_cpp()
    n_vocab = lib.llama_vocab_n_tokens(vocab)
    ends = [token for token in range(n_vocab) if lib.llama_vocab_is_eog(vocab, token)]
    texts = [token_bytes(vocab, token, special=False) for token in range(n_vocab)]
    return _tokenizer(texts, ends)


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    return _tokenizer([bytes([byte]) for byte in range(256)], [])


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokens: Sequence[bytes], end: int) -> None:
        self.tokens = list(tokens)
        self.eos_token_id, self.bos_token_id = end, None
        self.special_token_ids: list[int] = []
        self._by_text = {text: token for token, text in enumerate(tokens) if text and text[0] != 0xFF}
        self._longest = max(map(len, self._by_text), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that the grammar leaves no choice in: the longest first, which join to it in any vocabulary.

        What no token spells is left out.
        """
        tokens, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                if (token := self._by_text.get(text[start:end])) is not None:
                    tokens.append(token)
                    break
            start = end
        return tokens


def _tokenizer(texts: Sequence[bytes], ends: Sequence[int]) -> LLTokenizer:
    """`ends` may be empty: a grammar's end then allows no token."""
    llguidance = _llguidance()
    tokens = list(texts)
    if not ends:
        ends = [len(tokens)]
        tokens.append(b"")
    for end in ends:
        tokens[end] = b"\xff<end>"  # llguidance's mark of a token that is no text
    wrapper = llguidance.TokenizerWrapper(_Vocabulary(tokens, ends[0]))
    slices = llguidance.LLTokenizer.json_slices()
    tokenizer: LLTokenizer = llguidance.LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=list(ends), slices=slices)
    return tokenizer


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UsageError("a format needs llguidance; run pip install steermoe-local again") from None
    return llguidance
