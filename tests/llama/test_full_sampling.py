"""llama.cpp's further samplers: each against what its definition says of four tokens, and off by default."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import UsageError
from steermoe_local.llama import capi
from steermoe_local.llama.full_sampling import DEFAULT_ORDER, SAMPLERS, FullSampling, sampler_names
from steermoe_local.llama.sampling import Sampler, Sampling
from tests.support.drawing import LIKELY, PLAIN, draw

N_DRAWN = 1500


def drawn(vocab: Any, logits: Any, **options: Any) -> set[int]:
    return set(draw(vocab, logits, FullSampling(**PLAIN | {"seed": 5} | options), N_DRAWN))


def test_off_by_default(vocab: Any, logits: Any) -> None:
    """Nothing asked for: token for token what `Sampling` draws."""
    noise = logits + np.random.default_rng(1).normal(0, 3, len(logits)).astype(np.float32)
    for options in ({}, PLAIN, {"repeat_penalty": 1.3}, {"temperature": 0.0}, {"temperature": 3.0, "top_k": 3}):
        plain = Sampling(**options | {"seed": 11})
        assert draw(vocab, noise, FullSampling(**asdict(plain)), 60) == draw(vocab, noise, plain, 60)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # the two tokens nearest to the entropy of 1.14 nats: -log p is 0.69, 1.20, 1.90, 3.00
        ({"typical_p": 0.2, "top_k": 4}, {301}),
        ({"typical_p": 0.5, "top_k": 4}, {300, 301}),
        # standard deviation of the four logits: 0.86; the likeliest two are 0.51 apart
        ({"top_n_sigma": 0.7, "top_k": 4, "samplers": ("top_k", "top_n_sigma")}, {300, 301}),
        # the tokens of 0.1 and more but the least likely of them go
        ({"xtc_probability": 1.0, "xtc_threshold": 0.1}, {302, 303}),
        ({"xtc_probability": 1.0, "xtc_threshold": 0.6}, {300, 301, 302, 303}),
        ({"top_p": 0.1, "min_keep": 3}, {300, 301, 302}),
        ({"min_p": 0.9, "min_keep": 2}, {300, 301}),
        # only what is named is applied
        ({"top_k": 1, "samplers": ("temperature",)}, {300, 301, 302, 303}),
        ({"top_k": 1, "samplers": ("top_k",)}, {300}),
    ],
)
def test_what_can_be_drawn(vocab: Any, logits: Any, options: dict[str, Any], wanted: set[int]) -> None:
    assert drawn(vocab, logits, **options) == wanted


def test_a_filter_behind_the_temperature(vocab: Any, logits: Any) -> None:
    """The order decides: heat first evens out what min_p compares."""
    hot: dict[str, Any] = {"temperature": 50.0, "min_p": 0.5, "top_k": 4}
    assert drawn(vocab, logits, **hot) == {300, 301}
    assert drawn(vocab, logits, **hot, samplers=("top_k", "temperature", "min_p")) == {300, 301, 302, 303}


def test_a_dynamic_temperature(vocab: Any, logits: Any) -> None:
    """At an entropy of 1.14 of log(4) nats, with exponent 1, it is 0.82 of the way from 0.1 to 9.9."""

    def share(**options: Any) -> float:
        tokens = draw(vocab, logits, FullSampling(**PLAIN | {"seed": 5, "top_k": 4} | options), 4000)
        return tokens.count(300) / len(tokens)

    entropy = -sum(p * math.log(p) for p in LIKELY.values()) / math.log(4)
    heat = 0.1 + 9.8 * entropy
    weights = [p ** (1 / heat) for p in LIKELY.values()]
    assert share(temperature=5.0, dynatemp_range=4.9) == pytest.approx(weights[0] / sum(weights), abs=0.03)
    assert share(temperature=1.0) == pytest.approx(0.5, abs=0.03)


def test_dry_breaks_a_loop(vocab: Any, logits: Any) -> None:
    """The prompt has 9 8 7 300 before: after 9 8 7 the token 300 would repeat it."""
    loop: dict[str, Any] = {"temperature": 0.0, "dry_multiplier": 5.0, "dry_allowed_length": 1}
    prompt = (9, 8, 7, 300, 5, 9, 8, 7)

    def first(**options: Any) -> int:
        return draw(vocab, logits, FullSampling(**PLAIN | loop | options), 1, prompt)[0]

    assert first() == 301
    assert first(dry_multiplier=0.0) == 300
    assert first(dry_penalty_last_n=4) == 300, "it does not look back that far"
    assert first(dry_penalty_last_n=-1) == 301, "-1: n_ctx tokens"
    assert first(dry_allowed_length=4) == 300, "a repetition of three tokens is allowed"


def test_mirostat(vocab: Any, tiny_model: Any) -> None:
    """A small target surprise draws likely tokens, a large one does not; other filters are not applied."""
    spread = (-1.2 * np.log(np.arange(1, tiny_model.n_vocab() + 1))).astype(np.float32)  # as Zipf's law, which it fits
    for version in (1, 2):
        means = []
        for tau in (1.0, 8.0):
            sampling = FullSampling(temperature=1.0, top_k=1, mirostat=version, mirostat_tau=tau, seed=3)
            means.append(float(np.mean(draw(vocab, spread, sampling, 300))))
        assert means[0] * 2 < means[1], means


def test_adaptive_p(vocab: Any, logits: Any) -> None:
    """Tokens near the target probability are preferred to the likeliest one."""

    def share(target: float, token: int) -> float:
        options: dict[str, Any] = {"top_k": 4, "samplers": ("top_k", "adaptive_p"), "adaptive_target": target}
        return draw(vocab, logits, FullSampling(**PLAIN | options, seed=5), 500).count(token) / 500

    assert share(-1.0, 303) == pytest.approx(0.05, abs=0.04), "off"
    assert share(0.05, 303) > 0.3
    assert share(0.5, 300) > share(0.05, 300)


def test_ends_are_ignored(vocab: Any, tiny_model: Any) -> None:
    lib = capi.llama_cpp()
    ends = [token for token in range(tiny_model.n_vocab()) if lib.llama_vocab_is_eog(vocab, token)]
    values = np.zeros(tiny_model.n_vocab(), np.float32)
    values[ends] = 50
    assert drawn(vocab, values, top_k=len(ends)) <= set(ends)
    assert not drawn(vocab, values, top_k=len(ends), ignore_eos=True) & set(ends)


def test_nothing_is_left(vocab: Any, logits: Any) -> None:
    """A grammar at its end with all ends banned: no token, whatever the samplers."""
    for options in ({}, {"typical_p": 0.5}, {"mirostat": 1}, {"mirostat": 2}, {"samplers": ("adaptive_p",)}):
        sampling = FullSampling(**PLAIN | options, seed=1, ignore_eos=True, grammar='root ::= "7"')
        sampler = Sampler(vocab, sampling, (), 64)
        token = sampler.sample(logits)
        assert token is not None
        sampler.accept(token)
        assert sampler.sample(logits) is None


def test_names_of_samplers() -> None:
    assert sampler_names("".join(SAMPLERS.values())) == tuple(SAMPLERS)
    for spelled in ("top-k", "topk", "TOP_K"):
        assert sampler_names([spelled]) == ("top_k",)
    assert sampler_names(["temp", "typ", "typical_p", "nucleus"]) == ("temperature", "typ_p", "typ_p", "top_p")
    for wrong in (["top_k", "nonsense"], "kz", ["infill"]):
        with pytest.raises(UsageError, match="samplers: "):
            sampler_names(wrong)
    assert DEFAULT_ORDER[-1] == "temperature"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"typical_p": 1.5}, "typical_p: 1.5"),
        ({"xtc_probability": -1}, "xtc_probability: -1"),
        ({"mirostat": 3}, "mirostat: 3"),
        ({"mirostat_tau": math.nan}, "mirostat_tau: nan"),
        ({"dry_penalty_last_n": -2}, "dry_penalty_last_n: -2"),
        ({"dry_multiplier": 1.0, "dry_sequence_breakers": ("",)}, "dry_sequence_breakers: "),
        ({"samplers": ("nonsense",)}, "samplers: 'nonsense'"),
        ({"temperature": -1}, "temperature: -1"),
    ],
)
def test_values_outside_their_ranges(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        FullSampling(**options)
    assert words in str(caught.value)


NUMBERS = st.sampled_from([0.0, 1e-9, 0.1, 0.5, 1.0])
LARGE = st.sampled_from([0.0, 1e-9, 0.5, 1.0, 3.0, 1e6])
ANY: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from([0.0, 1e-6, 1.0, 10.0]),
    "top_k": st.sampled_from([0, 1, 40, 10**6]),
    "top_p": NUMBERS,
    "min_p": NUMBERS,
    "typical_p": NUMBERS,
    "xtc_probability": NUMBERS,
    "xtc_threshold": NUMBERS,
    "top_n_sigma": LARGE,
    "dynatemp_range": LARGE,
    "dynatemp_exponent": LARGE,
    "dry_multiplier": LARGE,
    "dry_base": LARGE,
    "dry_allowed_length": st.sampled_from([0, 2, 2**31 - 1]),
    "dry_penalty_last_n": st.sampled_from([-1, 0, 3, 2**31 - 1]),
    "dry_sequence_breakers": st.lists(st.sampled_from(["\n", ":", "three", "é" * 20]), max_size=3).map(tuple),
    "mirostat": st.sampled_from([0, 0, 1, 2]),
    "mirostat_tau": LARGE,
    "mirostat_eta": LARGE,
    "adaptive_target": st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
    "adaptive_decay": st.sampled_from([0.0, 0.5, 0.99]),
    "min_keep": st.sampled_from([0, 1, 5, 2**31 - 1]),
    "ignore_eos": st.booleans(),
    "repeat_penalty": st.sampled_from([1.0, 0.001, 10.0]),
    "samplers": st.none() | st.lists(st.sampled_from(list(SAMPLERS)), max_size=12).map(tuple),
    "grammar": st.sampled_from([None, 'root ::= "7" | "one"', "root ::= [a-z ]+"]),
}


@settings(max_examples=150)
@given(st.fixed_dictionaries({}, optional=ANY), st.sampled_from(["spread", "peak", "flat", "banned"]))
def test_any_values_within_their_ranges(vocab: Any, tiny_model: Any, options: dict[str, Any], kind: str) -> None:
    """Each draw is a token or None: what llama.cpp computes of extreme values stays inside its arrays."""
    n_vocab = tiny_model.n_vocab()
    values = np.random.default_rng(1).normal(0, 4, n_vocab).astype(np.float32)
    if kind == "peak":
        values[7] = 1e4
    elif kind == "flat":
        values[:] = 0
    elif kind == "banned":
        values[:] = -np.inf
    sampler = Sampler(vocab, FullSampling(**options, seed=3), (1, 2, 3, 1, 2), 64)
    for _ in range(4):
        token = sampler.sample(values)
        if token is None or capi.llama_cpp().llama_vocab_is_eog(vocab, token):
            break
        assert 0 <= token < n_vocab
        sampler.accept(token)
    sampler.close()
