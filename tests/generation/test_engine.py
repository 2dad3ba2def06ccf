"""`Engine` against `SteeredLlama` and llama_cpp's own generation: texts, ends, probabilities, routing."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, Request, Sampling, TokenEvent
from steermoe_local.llama import capi
from tests.support import rounding
from tests.support.generation import GREEDY, alone, answer, endless, ends_of, greedy
from tests.support.low_level import F32, Context, identity_of, open_model

pytestmark = pytest.mark.numeric

#
# against llama_cpp's own generation
#


@pytest.mark.parametrize("number", range(4))
def test_greedy_is_what_llama_cpp_says(
    llama: SteeredLlama, open_engine: Any, biases: Any, prompts: Any, number: int
) -> None:
    """A bias is not left behind in the model, nor is one of the model's here."""
    llama.set_bias(biases[1])
    try:
        for prompt in prompts:
            text, _, end = alone(open_engine, prompt, biases[number])
            llama.set_bias(biases[number])
            theirs = llama.create_completion(prompt, max_tokens=24, temperature=0)
            assert text == theirs["choices"][0]["text"]
            assert end.reason == theirs["choices"][0]["finish_reason"]
            assert end.n_prompt == len(prompt)
            assert end.n_generated == theirs["usage"]["completion_tokens"]
    finally:
        llama.set_bias(None)


def test_steering_changes_answers(open_engine: Any, biases: Any, prompts: Any) -> None:
    """Else the tests of this file would show nothing."""
    texts = {tuple(alone(open_engine, prompt, bias)[0] for prompt in prompts) for bias in biases}
    assert len(texts) == len(biases)


def test_long_prompts_go_in_parts(llama: SteeredLlama, open_engine: Any) -> None:
    prompt = llama.tokenize(b"one, 2, three, 4, " * 12)
    assert len(prompt) > 64
    expected = llama.create_completion(prompt, max_tokens=16, temperature=0)["choices"][0]["text"]
    for n_batch, n_ubatch in ((512, 512), (32, 16), (7, 7), (1, 1)):
        with open_engine(n_batch=n_batch, n_ubatch=n_ubatch) as engine:
            text, _, end = answer(engine, greedy(prompt, 16))[0]
            assert text == expected, n_batch
            assert (end.n_prompt, end.n_cached) == (len(prompt), 0)


#
# ends
#


def test_max_tokens(open_engine: Any, prompts: Any) -> None:
    full = alone(open_engine, prompts[3], max_tokens=None)
    assert full[2].reason == "stop"
    n = len(full[1])
    assert n > 3
    for max_tokens in (0, 1, n - 1, n, n + 1):
        text, tokens, end = alone(open_engine, prompts[3], max_tokens=max_tokens)
        assert tokens == full[1][:max_tokens]
        assert text == full[0][: len(text)]
        assert end.reason == ("stop" if max_tokens > n else "length")
        assert end.n_rows == min(n + 1, max(max_tokens, 1))


def test_a_full_context(llama: SteeredLlama, open_engine: Any, prompts: Any) -> None:
    unending = endless(llama)
    with open_engine(n_ctx=40, n_slots=2) as engine:
        assert engine.n_ctx == 40
        requests = [Request(prompt, sampling=unending) for prompt in prompts[:2]]
        for prompt, (_, tokens, end) in zip(prompts, answer(engine, *requests), strict=False):
            assert end.reason == "context"
            assert len(prompt) + len(tokens) == 40, "each slot has n_ctx of its own"
        exact = replace(requests[0], max_tokens=40 - len(prompts[0]))
        assert answer(engine, exact)[0][2].reason == "length"
        full = (prompts[0] * 9)[:40]
        with pytest.raises(UsageError, match=r"40 tokens, but n_ctx is 40; .*-c 296"):
            engine.add(Request(full))
        assert answer(engine, Request(full[1:], sampling=unending))[0][2].n_generated == 1


def test_n_ctx_of_the_training(llama: SteeredLlama, open_engine: Any) -> None:
    with open_engine(n_ctx=0) as engine:
        assert engine.n_ctx == llama._model.n_ctx_train()


def test_stop_strings(open_engine: Any, prompts: Any) -> None:
    full, tokens, _ = alone(open_engine, prompts[3])
    assert len(full) > 6
    for stops in ((full[4:7],), (full[2], full[4:7]), (full[-1],), (full[:2], full[1])):
        ends = {full.find(stop) + len(stop): stop for stop in sorted(stops, key=len)}
        stop = ends[min(ends)]
        text, some, end = alone(open_engine, prompts[3], stop=stops)
        assert text == full[: min(ends) - len(stop)]
        assert (end.reason, end.stop) == ("stop", stop)
        assert some == tokens[: len(some)]
        assert len(some) < len(tokens) or stop == full[-1]
    text, some, end = alone(open_engine, prompts[3], stop=("never said", full[-1] + "!"))
    assert (text, some, end.stop) == (full, tokens, None), "what was held back is given out at the end"
    text, some, end = alone(open_engine, prompts[3], stop=(full[:6] + "!",), max_tokens=3)
    assert full.startswith(text)
    assert len(text) == len(alone(open_engine, prompts[3], max_tokens=3)[0])


def test_special_tokens_are_text_on_demand(llama: SteeredLlama, open_engine: Any, prompts: Any) -> None:
    with open_engine() as engine:
        control = next(token for token in prompts[0] if not engine.token_bytes(token))
        name = engine.token_bytes(control, special=True).decode()
        forced = Sampling(temperature=0, logit_bias={control: 1e6, **dict.fromkeys(ends_of(llama), -np.inf)})
        if control in ends_of(llama):
            pytest.skip("the only control token ends the generation")
        for special, text in ((False, ""), (True, name * 2)):
            request = Request(prompts[0], sampling=forced, max_tokens=2, special=special)
            assert answer(engine, request)[0][:2] == (text, [control] * 2)


#
# sampling
#


def test_seeds(llama: SteeredLlama, open_engine: Any, prompts: Any) -> None:
    hot = replace(endless(llama), temperature=2.0, top_k=0, top_p=1.0, min_p=0.0)
    first = alone(open_engine, prompts[3], sampling=replace(hot, seed=3))
    assert first[2].seed == 3
    assert alone(open_engine, prompts[3], sampling=replace(hot, seed=3))[:2] == first[:2]
    drawn = [alone(open_engine, prompts[3], sampling=hot) for _ in range(3)]
    assert len({end.seed for _, _, end in drawn}) == 3
    assert len({tuple(tokens) for _, tokens, _ in [first, *drawn]}) == 4
    again = alone(open_engine, prompts[3], sampling=replace(hot, seed=drawn[0][2].seed))
    assert again[:2] == drawn[0][:2], "the seed that was drawn is not the one that is reported"


def test_top_k_1_is_greedy(open_engine: Any, prompts: Any) -> None:
    hot = Sampling(temperature=5.0, top_k=1)
    for prompt in prompts:
        assert alone(open_engine, prompt, sampling=hot)[:2] == alone(open_engine, prompt)[:2]


def test_log_probabilities(tiny_f32_path: Path, prompts: Any) -> None:
    prompt = prompts[3]
    with (
        closing(SteeredLlama(tiny_f32_path, n_ctx=64, n_threads=1)) as llama,
        Engine(llama, n_ctx=256, n_threads=1, type_k=F32, type_v=F32) as engine,
    ):
        request = Request(prompt, None, Sampling(temperature=0.7, seed=1), 8, n_probs=3)
        pieces = [event for _, event in engine.generate(request) if isinstance(event, TokenEvent)]
        plain = [event for _, event in engine.generate(replace(request, n_probs=None)) if isinstance(event, TokenEvent)]
        bare = [event for _, event in engine.generate(replace(request, n_probs=0)) if isinstance(event, TokenEvent)]
    tokens = [piece.token for piece in pieces]
    with closing(open_model(tiny_f32_path)) as model, Context(model, type_kv=F32) as context:
        logits = context.decode(prompt + tokens)[len(prompt) - 1 : -1].astype(np.float64)
    allowance = rounding.logprobs(logits, **rounding.TINY)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    for piece, row in zip(pieces, expected, strict=True):
        assert piece.logprob == pytest.approx(row[piece.token], rel=0, abs=allowance)
        assert [token for token, _ in piece.top] == np.argsort(-row)[:3].tolist()
        assert [value for _, value in piece.top] == pytest.approx(np.sort(row)[:-4:-1].tolist(), rel=0, abs=allowance)
    assert [piece.token for piece in plain] == tokens
    assert all(piece.logprob is None and not piece.top for piece in plain)
    assert [piece.logprob for piece in bare] == pytest.approx([piece.logprob for piece in pieces], rel=0, abs=allowance)
    assert not any(piece.top for piece in bare)


def test_a_grammar(open_engine: Any, prompts: Any) -> None:
    text, _, end = alone(open_engine, prompts[0], sampling=replace(GREEDY, grammar='root ::= "(" [0-9] [0-9] ")"'))
    assert text[0] + text[3:] == "()"
    assert text[1:3].isdigit()
    assert end.reason == "stop"


#
# routing
#


@pytest.mark.parametrize("number", range(4))
def test_routing_is_that_of_an_independent_run(
    open_engine: Any, tiny_model: Any, tiny_path: Path, biases: Any, prompts: Any, number: int
) -> None:
    shape = identity_of(tiny_path).shape
    for prompt, max_tokens in ((prompts[3], None), (prompts[1], 3), (prompts[0], 0)):
        _, tokens, end = alone(open_engine, prompt, biases[number], max_tokens=max_tokens)
        ended = end.reason == "stop"
        assert end.n_rows == len(tokens) + ended or max_tokens == 0
        rows = prompt + tokens
        recorder = capi.NativeRecorder(tiny_model.model, 1, shape)
        with Context(tiny_model, recorder=recorder) as context:
            recorder.bind(context.ctx)
            if biases[number] is not None:
                from steermoe_local.llama.steered_llama import native_bias

                capi.attach(context.ctx, native_bias(biases[number]))
            counted = [len(prompt) - 1 <= i < len(prompt) - 1 + end.n_rows for i in range(len(rows))]
            recorder.set_mask([0 if count else -1 for count in counted])
            context.decode(rows)
            counts = np.array(recorder.counts()[0]).reshape(shape)
        recorder.close()
        assert np.array_equal(end.routing, counts)
        assert end.routing.sum() == end.n_rows * shape[0] * identity_of(tiny_path).n_expert_used
        with open_engine(n_batch=7) as engine:
            first = len(prompt) - 1
            for _ in range(2):
                routed = engine.route(rows, biases[number], first, first + end.n_rows)
                assert np.array_equal(routed, counts), "teacher forcing"
            assert engine._slots[0].tokens == rows[: first + end.n_rows]
            assert (
                answer(engine, greedy(prompt, max_tokens, biases[number]))[0][:2]
                == (alone(open_engine, prompt, biases[number], max_tokens=max_tokens)[:2])
            )


def test_recording_can_be_off(open_engine: Any, biases: Any, prompts: Any) -> None:
    with open_engine(record=False) as engine:
        text, tokens, end = answer(engine, greedy(prompts[3], bias=biases[1]))[0]
        assert end.routing is None
        assert engine._context._recorder is None
        assert (text, tokens) == alone(open_engine, prompts[3], biases[1])[:2]
        assert engine.route(prompts[0], None, 2) is None


def test_routing_is_counted_for_those_who_ask(
    open_engine: Any, biases: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that asks, others are not counted; where none asks, nothing is."""
    masks: list[list[int]] = []
    set_mask = capi.NativeRecorder.set_mask
    monkeypatch.setattr(capi.NativeRecorder, "set_mask", lambda own, bins: (masks.append(bins), set_mask(own, bins)))
    expected = [alone(open_engine, prompt, bias) for prompt, bias in zip(prompts[:2], biases[1:3], strict=True)]
    assert masks
    with open_engine(n_slots=2) as engine:
        masks.clear()
        requests = [greedy(prompt, bias=bias) for prompt, bias in zip(prompts[:2], biases[1:3], strict=True)]
        quiet = [replace(request, routing=False) for request in requests]
        for (text, tokens, end), known in zip(answer(engine, *quiet), expected, strict=True):
            assert (text, tokens, end.routing) == (*known[:2], None)
        assert {row for bins in masks for row in bins} == {-1}
        masks.clear()
        counted, uncounted = answer(engine, replace(requests[0], reuse=False), quiet[1])
        assert np.array_equal(counted[2].routing, expected[0][2].routing)
        assert uncounted[2].routing is None
        assert len({row for bins in masks for row in bins} - {-1}) == 1


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 3), (2, 1), (0, 99)])
def test_route_of_no_tokens(open_engine: Any, prompts: Any, first: int, last: int) -> None:
    with open_engine() as engine, pytest.raises(UsageError, match="route: "):
        engine.route(prompts[0], None, first, last)


#
# arguments
#


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": []}, "no tokens"),
        ({"tokens": [1, -1]}, "token -1: "),
        ({"tokens": [10**6]}, "token 1000000: "),
        ({"tokens": range(256)}, "256 tokens, but n_ctx is 256"),
        ({"max_tokens": -1}, "max_tokens: -1"),
        ({"stop": ("a", "")}, "stop: "),
        ({"n_probs": -1}, "n_probs: -1"),
        ({"n_probs": 10**6}, "n_probs: 1000000"),
        ({"sampling": Sampling(grammar="nonsense")}, "grammar: "),
    ],
)
def test_requests_that_are_refused(open_engine: Any, prompts: Any, fields: dict[str, Any], words: str) -> None:
    with open_engine() as engine:
        good = Request(prompts[0])
        with pytest.raises(UsageError) as caught:
            engine.add(replace(good, **fields))
        assert words in str(caught.value)
        assert engine.n_unfinished == 0
        with pytest.raises(UsageError):
            next(engine.generate(replace(good, max_tokens=1), replace(good, **fields)))
        assert engine.n_unfinished == 0, "the good one is left running"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctx": -1}, "n_ctx"),
        ({"n_ctx": 2**31}, "2147483648"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_ubatch": 0}, "n_ubatch"),
        ({"n_threads": 0}, "n_threads"),
        ({"n_slots": 0}, "n_slots: 0 "),
        ({"n_slots": 300}, "n_slots: 300 "),
        ({"n_slots": 9, "n_batch": 8}, "n_slots: 9 is not from 1 to 8 (n_batch"),
    ],
)
def test_engines_that_are_refused(llama: SteeredLlama, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        Engine(llama, **{"n_ctx": 64} | options)
    assert words in str(caught.value)


def test_the_environment_does_not_steer(
    llama: SteeredLlama, open_engine: Any, prompts: Any, biases: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steermoe_local import write_bias

    plain = alone(open_engine, prompts[3])
    write_bias(biases[1], tmp_path / "bias.gguf")
    monkeypatch.setenv("STEERMOE_BIAS", str(tmp_path / "bias.gguf"))
    assert alone(open_engine, prompts[3])[:2] == plain[:2]


def test_context_options(open_engine: Any, prompts: Any) -> None:
    """Flash attention and a quantized memory: the answer is the same, its probabilities are not to the last bit."""

    def ask(**options: Any) -> tuple[str, float]:
        with open_engine(**options) as engine:
            request = greedy(prompts[0], 1, n_probs=0)
            piece = next(event for _, event in engine.generate(request))
            return piece.text, piece.logprob

    found = {
        "off": ask(flash_attn=False),
        "on": ask(flash_attn=True),
        "k": ask(flash_attn=True, type_k=8),
        "k and v": ask(flash_attn=True, type_k=8, type_v=8),
    }
    assert len({text for text, _ in found.values()}) == 1
    assert len({logprob for _, logprob in found.values()}) == 4
    assert ask() == found["off"], "as the model has it"
    assert ask(flash_attn="auto") == found["on"], "the CPU has it"
