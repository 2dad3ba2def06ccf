"""Drawing tokens and joining their bytes to text, without a context."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import UsageError
from steermoe_local.llama import capi
from steermoe_local.llama.detokenizer import TextStream
from steermoe_local.llama.sampling import RANDOM_SEED, Sampler, Sampling, log_softmax
from tests.support.drawing import LIKELY, PLAIN, draw


def draws(vocab: Any, logits: Any, n: int = 400, prompt: tuple[int, ...] = (), **options: Any) -> list[int]:
    return draw(vocab, logits, Sampling(**PLAIN | {"seed": 5} | options), n, prompt)


def shares(tokens: list[int]) -> dict[int, float]:
    return {token: tokens.count(token) / len(tokens) for token in LIKELY}


def expected(temperature: float = 1.0, among: int = 4) -> dict[int, float]:
    weights = {token: p ** (1 / temperature) for token, p in list(LIKELY.items())[:among]}
    return {token: weights.get(token, 0.0) / sum(weights.values()) for token in LIKELY}


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, expected()),
        ({"temperature": 2.0}, expected(2.0)),
        ({"temperature": 0.5}, expected(0.5)),
        ({"top_k": 2}, expected(among=2)),
        ({"top_p": 0.79}, expected(among=2)),
        ({"top_p": 0.81}, expected(among=3)),
        ({"min_p": 0.2}, expected(among=3)),
        ({"min_p": 0.5}, expected(among=2)),
        # filters come before the temperature: hot as it is, the tail stays out
        ({"min_p": 0.5, "temperature": 50.0}, expected(50.0, among=2)),
        ({"top_k": 1, "temperature": 50.0}, expected(among=1)),
        ({"temperature": 0}, expected(among=1)),
        ({"logit_bias": {300: -math.inf, 301: -math.inf, 302: -math.inf}}, {300: 0, 301: 0, 302: 0, 303: 1}),
        ({"logit_bias": {301: math.log(10)}}, {300: 0.5 / 3.7, 301: 3 / 3.7, 302: 0.15 / 3.7, 303: 0.05 / 3.7}),
    ],
)
def test_shares(vocab: Any, logits: Any, options: dict[str, Any], wanted: dict[int, float]) -> None:
    found = shares(draws(vocab, logits, 3000, **options))
    for token, share in wanted.items():
        assert found[token] == pytest.approx(share, abs=0.03), (token, found)
        if share in (0, 1):
            assert found[token] == share


def test_seeds(vocab: Any, logits: Any) -> None:
    tokens = draws(vocab, logits, seed=7)
    assert draws(vocab, logits, seed=7) == tokens
    assert draws(vocab, logits, seed=8) != tokens
    drawn = [Sampler(vocab, Sampling(), [1], 64).seed for _ in range(8)]
    assert len(set(drawn)) == 8
    assert all(0 <= seed < RANDOM_SEED for seed in drawn)


@pytest.mark.parametrize(
    "options",
    [{"repeat_penalty": 1e6}, {"presence_penalty": 50.0}, {"frequency_penalty": 50.0}],
)
def test_penalties_look_back(vocab: Any, logits: Any, options: dict[str, Any]) -> None:
    greedy = {"temperature": 0.0, **options}
    raised = logits + 1e4  # a penalty divides positive logits
    assert draws(vocab, raised, 4, **greedy) == [300, 301, 302, 303], "the answer's own tokens count"
    assert draws(vocab, raised, 1, prompt=(300, 301), **greedy) == [302], "so do the prompt's"
    assert draws(vocab, raised, 1, prompt=(300, *[9] * 64), **greedy) == [300], "but only the last 64"
    assert draws(vocab, raised, 1, prompt=(300, 9, 9), repeat_last_n=2, **greedy) == [300]
    assert draws(vocab, raised, 1, prompt=(300, 9, 9), repeat_last_n=3, **greedy) == [301]
    assert draws(vocab, raised, 2, prompt=(300,), repeat_last_n=0, **greedy) == [300, 300]
    assert draws(vocab, raised, 1, prompt=(300, *[9] * 63), repeat_last_n=-1, **greedy) == [301], "-1: n_ctx tokens"


def test_the_grammar_decides(tiny_model: Any) -> None:
    """Every text that a grammar allows, and nothing else; its end ends the draw."""
    vocab = tiny_model.vocab
    flat = np.zeros(tiny_model.n_vocab(), np.float32)
    texts = set()
    for seed in range(60):
        sampler = Sampler(vocab, Sampling(**PLAIN, seed=seed, grammar='root ::= "ab" [0-2] | "é"'), [1], 64)
        data = b""
        for _ in range(9):
            token = sampler.sample(flat)
            if token is None or tiny_model.token_eos() == token:
                break
            sampler.accept(token)
            data += tiny_model.detokenize([token], special=True)
        texts.add(data.decode())
    assert texts == {"ab0", "ab1", "ab2", "é"}


def test_a_grammar_keeps_the_shares(tiny_model: Any) -> None:
    """Where the first choice breaks the grammar, the second is drawn from what it allows."""
    digits = {
        token: b for token in range(tiny_model.n_vocab()) if (b := tiny_model.detokenize([token])) in (b"1", b"2")
    }
    assert len(digits) == 2
    first, second = digits
    flat = np.full(tiny_model.n_vocab(), -1e4, np.float32)
    flat[[first, second, 300]] = math.log(0.3), math.log(0.1), math.log(0.6)
    n_first = 0
    for seed in range(400):
        token = Sampler(tiny_model.vocab, Sampling(**PLAIN, seed=seed, grammar="root ::= [0-9]"), [1], 64).sample(flat)
        assert token in digits
        n_first += token == first
    assert n_first / 400 == pytest.approx(0.75, abs=0.06)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_is_allowed(tiny_model: Any, temperature: float) -> None:
    """The grammar is at its end, and what would end the generation is banned."""
    lib = capi.llama_cpp()
    n_vocab = tiny_model.n_vocab()
    ends = [token for token in range(n_vocab) if lib.llama_vocab_is_eog(tiny_model.vocab, token)]
    banned = dict.fromkeys(ends, -math.inf)
    sampling = Sampling(**PLAIN | {"temperature": temperature}, seed=1, grammar='root ::= "7"', logit_bias=banned)
    sampler = Sampler(tiny_model.vocab, sampling, [1], 64)
    flat = np.zeros(n_vocab, np.float32)
    token = sampler.sample(flat)
    assert tiny_model.detokenize([token]) == b"7"
    sampler.accept(token)
    assert sampler.sample(flat) is None
    everything = Sampling(temperature=temperature, logit_bias=dict.fromkeys(range(n_vocab), -math.inf))
    assert Sampler(tiny_model.vocab, everything, [1], 64).sample(flat) is None


def test_what_a_model_must_not_say(vocab: Any, logits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's own list of tokens (tokenizer.ggml.suppress_tokens) holds besides the caller's."""

    def suppress(_: Any, n: Any) -> Any:
        n._obj.value = 2
        return (ctypes.c_int32 * 2)(300, 302)

    monkeypatch.setattr(capi.llama_cpp(), "llama_vocab_get_suppress_tokens", suppress)
    assert set(draws(vocab, logits)) == {301, 303}
    assert set(draws(vocab, logits, logit_bias={300: 9.0, 303: -math.inf})) == {301}


@pytest.mark.parametrize("grammar", ["root ::= (", "start ::= [a-z]", "root ::= root [a-z]"])
def test_a_bad_grammar(vocab: Any, grammar: str) -> None:
    with pytest.raises(UsageError, match=r"grammar: .*GBNF"):
        Sampler(vocab, Sampling(grammar=grammar), [1], 64)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": -1}, "top_k: -1"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"min_p": -1}, "min_p: -1"),
        ({"repeat_penalty": 0}, "repeat_penalty: 0"),
        ({"repeat_penalty": math.inf}, "repeat_penalty: inf"),
        ({"repeat_last_n": -2}, "repeat_last_n: -2"),
        ({"presence_penalty": math.nan}, "presence_penalty: nan"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty: -inf"),
        ({"seed": -1}, "seed: -1"),
        ({"seed": RANDOM_SEED}, "seed: 4294967295"),
        ({"grammar": " "}, "grammar: empty"),
        ({"logit_bias": {1: math.nan}}, "logit_bias: nan for token 1"),
        ({"logit_bias": {1: math.inf}}, "logit_bias: inf for token 1"),
    ],
)
def test_values_outside_their_ranges(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_bias_for_no_token(vocab: Any, token: int) -> None:
    with pytest.raises(UsageError, match=f"logit_bias: token {token}, "):
        Sampler(vocab, Sampling(logit_bias={token: 1.0}), [1], 64)


def test_log_softmax() -> None:
    logits = np.array([1000, 1001, -np.inf, 999], np.float32)
    probabilities = np.exp(log_softmax(logits))
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities == pytest.approx(np.exp([-1.0, 0, -np.inf, -2]) / np.exp([-1.0, 0, -np.inf, -2]).sum())


@given(st.lists(st.floats(-50, 50), min_size=2, max_size=6))
def test_log_softmax_of_several_rows(row: list[float]) -> None:
    found = log_softmax(np.array([row, row[::-1]], dtype=np.float32))
    np.testing.assert_allclose(np.exp(found).sum(axis=-1), 1)
    np.testing.assert_allclose(found[0], found[1][::-1], atol=1e-9)


#
# text
#


def streamed(parts: list[bytes], stops: tuple[str, ...]) -> tuple[str, str | None]:
    stream = TextStream(stops)
    text = "".join(stream.feed(part) for part in parts) + stream.feed(b"", final=True)
    assert not stream.feed(b"x", final=True) or stream.stop is None
    return text, stream.stop


def wanted(data: bytes, stops: tuple[str, ...]) -> tuple[str, str | None]:
    """The same by looking at every beginning of the whole text."""
    text = data.decode("utf-8", "replace")
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


letters = st.text("abé€🙂\n", max_size=12)
anything = st.one_of(letters.map(str.encode), st.binary(max_size=12))


@given(anything, st.lists(letters.filter(bool), max_size=3), st.data())
def test_any_split_gives_the_same_text(data: bytes, stops: list[str], source: st.DataObject) -> None:
    cuts = source.draw(st.lists(st.integers(0, len(data)), max_size=6).map(sorted))
    parts = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    assert streamed(parts, tuple(stops)) == wanted(data, tuple(stops))


def test_text_comes_as_soon_as_it_is_certain() -> None:
    stream = TextStream(["</s>", "END"])
    assert stream.feed("é".encode()[:1]) == ""
    assert stream.feed("é".encode()[1:]) == "é"
    assert stream.feed(b"a < b <") == "a < b "
    assert stream.feed(b"/") == ""
    assert stream.feed(b"p> E") == "</p> "
    assert stream.feed(b"N") == ""
    assert stream.feed(b"D of") == ""
    assert stream.stop == "END"
    assert stream.feed(b"more", final=True) == ""
