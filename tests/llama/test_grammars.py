"""Grammars of llguidance over a real vocabulary: what is sampled under them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from steermoe_local import UsageError
from steermoe_local.llama import capi, grammars
from steermoe_local.llama.grammars import GrammarLimitError, GuidedGrammar, guided_tokenizer, why_refused
from steermoe_local.llama.sampling import Sampler, Sampling
from steermoe_local.llama.tokenizing import token_bytes
from tests.support.drawing import PLAIN


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Any) -> Any:
    return guided_tokenizer(tiny_model.vocab)


def of_schema(schema: Any) -> str:
    return f"%llguidance {{}}\nstart: %json {json.dumps(schema)}"


def sampled(tiny_model: Any, tokenizer: Any, grammar: str, seed: int, most: int = 400) -> bytes | None:
    """The bytes that random logits give under a grammar; None if it came to no end."""
    sampler = Sampler(tiny_model.vocab, Sampling(**PLAIN, seed=seed, grammar=grammar), [1], 512, lambda: tokenizer)
    rng, text = np.random.default_rng(seed), b""
    for _ in range(most):
        token = sampler.sample(rng.normal(size=tiny_model.n_vocab()).astype(np.float32))
        assert token is not None
        if capi.llama_cpp().llama_vocab_is_eog(tiny_model.vocab, token):
            return text
        sampler.accept(token)
        text += token_bytes(tiny_model.vocab, token, False)
    return None


SHORT = {"enum": ["one\ntwo", "<|end|>", 'é"\\', "😀", 12.5, None, {"a": [True]}]}


def test_random_logits_give_a_value(tiny_model: Any, tokenizer: Any) -> None:
    texts = [sampled(tiny_model, tokenizer, of_schema(SHORT), seed) for seed in range(60)]
    values = [json.loads(text) for text in texts if text is not None]
    assert len(values) > 30  # of the rest some are all space
    assert all(value in SHORT["enum"] for value in values)
    assert "<|end|>" in values, "the text of a control token, spelled by others"


def test_a_mask_agrees_with_single_tokens(tiny_model: Any, tokenizer: Any) -> None:
    grammar = GuidedGrammar('%llguidance {"no_forcing": true}\nstart: "{\\"" /[a-c\\n]{1,3}/ "\\"}" | "12"', tokenizer)
    n_vocab = tiny_model.n_vocab()
    ends = {token for token in range(n_vocab) if capi.llama_cpp().llama_vocab_is_eog(tiny_model.vocab, token)}
    steps = 0
    while True:
        logits = np.zeros(n_vocab, np.float32)
        grammar.restrict(None, logits)
        allowed = set(np.flatnonzero(np.isfinite(logits)).tolist())
        assert allowed == {token for token in range(n_vocab) if grammar.allows(token)}
        texts = {token: token_bytes(tiny_model.vocab, token, False) for token in allowed - ends}
        assert all(texts.values()), "a control token"
        if allowed <= ends:
            break
        steps += 1
        grammar.accept(min(allowed - ends))
    assert allowed == ends
    assert steps > 1


@pytest.mark.parametrize("grammar", ["%llguidance {}\nstart: (", "%llguidance {}\nbegin: /a/", of_schema({"not": {}})])
def test_a_bad_grammar(tiny_model: Any, grammar: str) -> None:
    with pytest.raises(UsageError, match="grammar: llguidance refuses it"):
        Sampler(tiny_model.vocab, Sampling(grammar=grammar), [1], 64)
    assert why_refused(grammar)


def test_a_vocabulary_that_cannot_spell_it() -> None:
    """The grammar goes on, and no token does."""
    poor = GuidedGrammar('%llguidance {}\nstart: "ab"', grammars._tokenizer([b"a", b"x"], []))
    logits = np.zeros(2, np.float32)
    poor.restrict(None, logits)
    assert np.isfinite(logits).tolist() == [True, False]
    poor.accept(0)
    with pytest.raises(GrammarLimitError, match="cannot be followed"):
        poor.restrict(None, logits)


def test_without_llguidance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(UsageError, match="run pip install steermoe-local again"):
        why_refused("%llguidance {}\nstart: /a/")
