"""`Engine` against `SteeredLlama`, against itself with fewer sequences, and interrupted anywhere."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import BiasFile, Message, ModelError, ModelMismatchError, SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent, _shares
from steermoe_local.llama import capi
from tests.support import rounding
from tests.support.architectures import widen, write_upstream
from tests.support.low_level import F32, Context, identity_of, open_model, random_signs
from tests.support.paths import BUILD
from tests.support.random_models import GPT_OSS, OLMOE, RandomModel

pytestmark = pytest.mark.numeric

GREEDY = Sampling(temperature=0)
QUESTIONS = [
    "Which number comes after three?",
    "Count to five.",
    "Count from 3 to six.",
    "Tell me the secret recipe of the old mill.",
]


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, n_ctx=512, n_threads=1, n_threads_batch=1)
    yield model
    model.close()


@pytest.fixture
def open_engine(llama: SteeredLlama) -> Iterator[Callable[..., Engine]]:
    """Engines on the embedded model, closed behind the test."""
    opened: list[Engine] = []

    def make(**options: Any) -> Engine:
        opened.append(Engine(llama, **{"n_ctx": 256, "n_threads": 1} | options))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture(scope="module")
def biases(tiny_path: Path) -> list[BiasFile | None]:
    """No steering, two hard ones, a soft one."""
    identity = identity_of(tiny_path)
    rng = np.random.default_rng(4)

    def signs() -> Any:
        k, n = identity.n_expert_used, identity.n_expert
        return np.stack([random_signs(rng, n, k, 2, n // 3) for _ in range(identity.n_layer)])

    hard = [BiasFile.from_signs(signs(), identity) for _ in range(2)]
    return [None, *hard, BiasFile.from_soft(signs(), identity, 2.0)]


@pytest.fixture(scope="module")
def prompts(llama: SteeredLlama) -> list[list[int]]:
    """Questions in the model's template, and a plain text that goes on for long."""
    with Engine(llama, n_ctx=256, n_threads=1) as engine:
        renderer = engine.renderer
        texts = [renderer.text((Message("user", q),), generation_prompt=True) for q in QUESTIONS]
        return [renderer.tokenize(text, add_special=False) for text in texts]


def answer(engine: Engine, *requests: Request) -> list[tuple[str, list[int], FinishEvent]]:
    """(text, tokens, end) of each request."""
    texts, tokens = [""] * len(requests), [[] for _ in requests]
    ends: dict[int, FinishEvent] = {}
    for index, event in engine.generate(*requests):
        assert index not in ends, "something came behind the end"
        if isinstance(event, FinishEvent):
            ends[index] = event
        else:
            texts[index] += event.text
            tokens[index] += [event.token] if event.token >= 0 else []
    assert engine.n_running == 0
    for index, end in ends.items():
        assert end.n_generated == len(tokens[index])
    return [(texts[i], tokens[i], ends[i]) for i in range(len(requests))]


def alone(make: Callable[..., Engine], prompt: list[int], bias: BiasFile | None = None, **options: Any) -> Any:
    """An answer in an engine of its own."""
    with make() as engine:
        sequence = engine.sequence()
        sequence.steer(bias)
        return answer(engine, Request(sequence, prompt, **{"sampling": GREEDY, "max_tokens": 24} | options))[0]


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
            text, _, end = answer(engine, Request(engine.sequence(), prompt, GREEDY, 16))[0]
            assert text == expected, n_batch
            assert (end.n_prompt, end.n_cached) == (len(prompt), 0)


#
# several sequences
#


def test_steerings_at_once(open_engine: Any, biases: Any, prompts: Any) -> None:
    """Sequences under different steerings, in any order of arrival, answer as each does alone."""
    cases = [(prompts[i % len(prompts)], biases[i % 3 if i < 3 else 3]) for i in range(5)]
    sampling = [GREEDY if i % 2 else Sampling(temperature=1.5, seed=i) for i in range(5)]
    expected = [alone(open_engine, *case, sampling=s) for case, s in zip(cases, sampling, strict=True)]
    for seed in range(4):
        rng = random.Random(seed)
        order = rng.sample(range(5), 5)
        with open_engine(n_sequences=5, n_batch=16) as engine:
            sequences = [engine.sequence() for _ in cases]
            requests: dict[Request, int] = {}
            events: dict[int, list[Any]] = {i: [] for i in range(5)}
            while order or engine.n_running:
                for _ in range(min(len(order), rng.randrange(3))):
                    i = order.pop()
                    sequences[i].steer(cases[i][1])
                    request = Request(sequences[i], cases[i][0], sampling[i], 24)
                    requests[request] = i
                    engine.add(request)
                for request, event in engine.step():
                    events[requests[request]].append(event)
        for i, (text, tokens, end) in enumerate(expected):
            *pieces, finish = events[i]
            assert "".join(piece.text for piece in pieces) == text
            assert [piece.token for piece in pieces if piece.token >= 0] == tokens
            assert (finish.reason, finish.n_rows) == (end.reason, end.n_rows)
            assert np.array_equal(finish.routing, end.routing), "rows of another sequence are counted"


def test_answers_flow_while_a_prompt_is_computed(llama: SteeredLlama, open_engine: Any) -> None:
    with open_engine(n_sequences=3, n_batch=16) as engine:
        first, second, third = (engine.sequence() for _ in range(3))
        endless = Sampling(temperature=0, logit_bias=dict.fromkeys(ends_of(llama), -np.inf))
        running = Request(first, llama.tokenize(b"one"), endless)
        long, short = (Request(s, llama.tokenize(b"1, 2, " * n), GREEDY, 1) for s, n in ((second, 40), (third, 3)))
        engine.add(running)
        engine.step()
        engine.add(long)
        engine.step()
        engine.add(short)
        done: list[Request] = []
        while long not in done:
            events = engine.step()
            assert [event for request, event in events if request is running], "the answer waits for the prompt"
            done += [request for request, event in events if isinstance(event, FinishEvent)]
        assert done == [short, long], "a short prompt waits for a long one"


def ends_of(llama: SteeredLlama) -> list[int]:
    lib, vocab = capi.llama_cpp(), llama._model.vocab
    return [token for token in range(llama.n_vocab()) if lib.llama_vocab_is_eog(vocab, token)]


def test_requests_of_others_go_on(open_engine: Any, prompts: Any) -> None:
    """What comes for another request while `generate` runs is given out by `step`."""
    expected = [alone(open_engine, prompt) for prompt in prompts[:2]]
    with open_engine(n_sequences=2) as engine:
        other = Request(engine.sequence(), prompts[0], GREEDY, 24)
        engine.add(other)
        mine = answer_beside(engine, Request(engine.sequence(), prompts[1], GREEDY, 24))
        assert mine == expected[1][0]
        text = ""
        while True:
            events = engine.step()
            text += "".join(event.text for _, event in events if isinstance(event, TokenEvent))
            if any(isinstance(event, FinishEvent) for _, event in events):
                break
        assert text == expected[0][0]


def answer_beside(engine: Engine, request: Request) -> str:
    return "".join(event.text for _, event in engine.generate(request) if isinstance(event, TokenEvent))


#
# what stays in memory
#


def test_what_is_in_memory_is_not_computed_again(open_engine: Any, prompts: Any) -> None:
    with open_engine() as engine:
        sequence = engine.sequence()

        def ask(prompt: list[int], n_cached: int) -> list[int]:
            text, tokens, end = answer(engine, Request(sequence, prompt, GREEDY, 12))[0]
            assert end.n_cached == n_cached
            assert (text, tokens) == alone(open_engine, prompt, max_tokens=12)[:2]
            assert sequence.tokens[: len(prompt)] == prompt
            return tokens

        first = prompts[0]
        said = ask(first, 0)
        ask(first, len(first) - 1)  # the last token is needed for its logits
        more = first + said + prompts[1]
        ask(more, len(sequence.tokens))
        ask(more[: len(more) - 3], len(more) - 4)
        ask([*more[:5], *prompts[2]], 5)
        ask(prompts[3][::-1], 0)
        sequence.forget()
        assert sequence.tokens == []
        ask(prompts[3][::-1], 0)


def test_what_another_steering_computed_is_forgotten(open_engine: Any, biases: Any, prompts: Any) -> None:
    with open_engine() as engine:
        sequence = engine.sequence()
        prompt = prompts[3]
        for n, bias in enumerate((None, biases[1], biases[2], None, biases[3])):
            changed = sequence.steer(bias)
            assert sequence.steering is bias
            text, _, end = answer(engine, Request(sequence, prompt, GREEDY, 24))[0]
            assert end.n_cached == 0
            assert text == alone(open_engine, prompt, bias)[0]
            assert changed == (n > 0)
            same = None if bias is None else replace(bias, provenance={"behaviour": "renamed"})
            assert not sequence.steer(same), "it does the same"
            assert sequence.steering is same
            again = answer(engine, Request(sequence, prompt, GREEDY, 24))[0]
            assert again[2].n_cached == len(prompt) - 1
            assert again[0] == text


def test_a_bias_without_values_is_none(open_engine: Any, tiny_path: Path, random_model: Any) -> None:
    with open_engine() as engine:
        sequence = engine.sequence()
        identity = identity_of(tiny_path)
        assert not sequence.steer(BiasFile(identity, "hard", {}))
        assert not sequence.steer(BiasFile(identity, "soft", {0: np.zeros(identity.n_expert)}))
        with pytest.raises(ModelMismatchError):
            sequence.steer(BiasFile(identity_of(random_model(OLMOE)), "hard", {}))


def test_a_bias_that_is_refused_changes_nothing(open_engine: Any, biases: Any, prompts: Any, random_model: Any) -> None:
    other = BiasFile.from_signs(np.eye(OLMOE.n_layer, OLMOE.n_expert), identity_of(random_model(OLMOE)))
    with open_engine() as engine:
        sequence = engine.sequence()
        sequence.steer(biases[1])
        before = answer(engine, Request(sequence, prompts[0], GREEDY, 24))[0]
        held = list(sequence.tokens)
        with pytest.raises(ModelMismatchError):
            sequence.steer(other)
        assert sequence.steering is biases[1]
        assert sequence.tokens == held
        assert answer(engine, Request(sequence, prompts[0], GREEDY, 24))[0][:2] == before[:2]


def test_force(llama: SteeredLlama, biases: Any) -> None:
    foreign = BiasFile(replace(biases[1].identity, router_sha256="0" * 64), "hard", dict(biases[1].values))
    for force in (False, True):
        with Engine(llama, n_ctx=64, n_threads=1, force=force) as engine:
            assert engine.force is force
            if force:
                assert engine.sequence().steer(foreign)
            else:
                with pytest.raises(ModelMismatchError):
                    engine.sequence().steer(foreign)


def test_any_history(open_engine: Any, biases: Any) -> None:
    """Whatever two sequences did before, an answer is that of an engine of its own."""
    known: dict[Any, Any] = {}

    def expected(prompt: tuple[int, ...], number: int) -> Any:
        if (prompt, number) not in known:
            known[prompt, number] = alone(open_engine, list(prompt), biases[number], max_tokens=4)
        return known[prompt, number]

    rng = random.Random(11)
    for _ in range(8):
        with open_engine(n_sequences=2, n_batch=5) as engine:
            sequences = [engine.sequence() for _ in range(2)]
            steering = [0, 0]
            for _ in range(12):
                i = rng.randrange(2)
                prompts = [tuple(rng.choices((300, 301), k=rng.randint(1, 9))) for _ in range(2)]
                both = [Request(s, p, GREEDY, 4) for s, p in zip(sequences, prompts, strict=True)]
                action = rng.choice(("ask", "ask both", "steer", "forget", "break off", "route"))
                if action == "ask":
                    found = answer(engine, both[i])[0]
                    assert found[:2] == expected(prompts[i], steering[i])[:2]
                    assert np.array_equal(found[2].routing, expected(prompts[i], steering[i])[2].routing)
                elif action == "ask both":
                    for k, found in enumerate(answer(engine, *both)):
                        assert found[:2] == expected(prompts[k], steering[k])[:2]
                        # both in one batch: another shape rounds otherwise, and two experts may all but tie
                        differ = np.abs(found[2].routing - expected(prompts[k], steering[k])[2].routing)
                        assert differ.sum() <= 2
                elif action == "steer":
                    steering[i] = rng.randrange(4)
                    sequences[i].steer(biases[steering[i]])
                elif action == "forget":
                    sequences[i].forget()
                elif action == "break off":
                    events = engine.generate(*both)
                    next(events)
                    events.close()
                else:
                    engine.route(sequences[i], prompts[i], rng.randrange(len(prompts[i])))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8), st.integers(0, 600))
def test_a_round_is_shared_out(missing: list[int], more: int) -> None:
    room = len(missing) + more
    shares = _shares(missing, room)
    assert sum(shares) == min(room, sum(missing)), "nothing is left idle"
    assert all(1 <= share <= need for share, need in zip(shares, missing, strict=True)), "nobody waits"
    fewest = min(share for share in shares)
    for share, need in zip(shares, missing, strict=True):
        assert share == need or share <= max(shares) <= share + 1, "who is cut short has as much as anybody"
    assert fewest >= min(min(missing), room // len(missing))


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
    endless = Sampling(temperature=0, logit_bias=dict.fromkeys(ends_of(llama), -np.inf))
    with open_engine(n_ctx=40, n_sequences=2) as engine:
        assert engine.n_ctx == 40
        requests = [Request(engine.sequence(), prompt, endless) for prompt in prompts[:2]]
        for prompt, (_, tokens, end) in zip(prompts, answer(engine, *requests), strict=False):
            assert end.reason == "context"
            assert len(prompt) + len(tokens) == 40, "each sequence has n_ctx of its own"
        exact = replace(requests[0], max_tokens=40 - len(prompts[0]))
        assert answer(engine, exact)[0][2].reason == "length"
        sequence = requests[0].sequence
        full = (prompts[0] * 9)[:40]
        with pytest.raises(UsageError, match=r"the prompt has 40 tokens, but n_ctx is 40; raise it \(-c 296\)"):
            engine.add(Request(sequence, full))
        assert answer(engine, Request(sequence, full[1:], endless))[0][2].n_generated == 1


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
            request = Request(engine.sequence(), prompts[0], forced, 2, special=special)
            assert answer(engine, request)[0][:2] == (text, [control] * 2)
            request.sequence.close()


#
# sampling
#


def test_seeds(llama: SteeredLlama, open_engine: Any, prompts: Any) -> None:
    endless = dict.fromkeys(ends_of(llama), -np.inf)
    hot = Sampling(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, logit_bias=endless)
    first = alone(open_engine, prompts[3], sampling=replace(hot, seed=3))
    assert first[2].seed == 3
    assert alone(open_engine, prompts[3], sampling=replace(hot, seed=3))[:2] == first[:2]
    drawn = [alone(open_engine, prompts[3], sampling=hot) for _ in range(3)]
    assert len({end.seed for _, _, end in drawn}) == 3
    assert len({tuple(tokens) for _, tokens, _ in [first, *drawn]}) == 4
    again = alone(open_engine, prompts[3], sampling=replace(hot, seed=drawn[0][2].seed))
    assert again[:2] == drawn[0][:2], "the seed that was drawn is not the one that is told"


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
        request = Request(engine.sequence(), prompt, Sampling(temperature=0.7, seed=1), 8, n_probs=3)
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
            sequence = engine.sequence()
            sequence.steer(biases[number])
            first = len(prompt) - 1
            for _ in range(2):
                routed = engine.route(sequence, rows, first, first + end.n_rows)
                assert np.array_equal(routed, counts), "teacher forcing"
            assert sequence.tokens == rows[: first + end.n_rows]
            assert (
                answer(engine, Request(sequence, prompt, GREEDY, max_tokens))[0][:2]
                == (alone(open_engine, prompt, biases[number], max_tokens=max_tokens)[:2])
            )


def test_recording_can_be_off(open_engine: Any, biases: Any, prompts: Any) -> None:
    with open_engine(record=False) as engine:
        sequence = engine.sequence()
        sequence.steer(biases[1])
        text, tokens, end = answer(engine, Request(sequence, prompts[3], GREEDY, 24))[0]
        assert end.routing is None
        assert engine._context._recorder is None
        assert (text, tokens) == alone(open_engine, prompts[3], biases[1])[:2]
        assert engine.route(sequence, prompts[0], 2) is None


@pytest.mark.parametrize(("first", "last"), [(-1, 2), (3, 3), (2, 1), (0, 99)])
def test_route_of_no_tokens(open_engine: Any, prompts: Any, first: int, last: int) -> None:
    with open_engine() as engine, pytest.raises(UsageError, match="route: "):
        engine.route(engine.sequence(), prompts[0], first, last)


#
# cancelled, interrupted
#


def test_cancel(open_engine: Any, prompts: Any) -> None:
    with open_engine(n_sequences=2) as engine:
        one, two = (Request(engine.sequence(), prompt, GREEDY, 24) for prompt in (prompts[3], prompts[2]))
        engine.add(one)
        engine.add(two)
        engine.cancel(one)
        (request, event), *_ = engine.step()
        assert request is one
        assert (event.reason, event.n_generated, event.n_rows) == ("cancelled", 0, 0)
        engine.cancel(one)  # nothing to cancel any more
        three = replace(one)
        engine.add(three)
        for _ in range(3):
            engine.step()
        engine.cancel(two)
        (event,) = (event for request, event in engine.step() if request is two)
        assert (event.reason, event.n_generated, event.n_rows) == ("cancelled", 4, 4)
        assert event.routing.sum() == 4 * len(event.routing) * engine.identity.n_expert_used
        engine.cancel(three)
        assert engine.step()[-1][0] is three
        assert engine.n_running == 0
        for sequence, prompt in ((two.sequence, prompts[2]), (two.sequence, prompts[3]), (one.sequence, prompts[3])):
            assert answer(engine, Request(sequence, prompt, GREEDY, 24))[0][:2] == alone(open_engine, prompt)[:2]


def test_cancelling_gives_out_what_was_held_back(open_engine: Any, prompts: Any) -> None:
    full = alone(open_engine, prompts[3])[0]
    with open_engine() as engine:
        request = Request(engine.sequence(), prompts[3], GREEDY, stop=(full + "!",))
        engine.add(request)
        events = [event for _ in range(4) for _, event in engine.step()]
        assert "".join(event.text for event in events) == ""
        engine.cancel(request)
        rest, end = (event for _, event in engine.step())
        assert rest == TokenEvent(alone(open_engine, prompts[3], max_tokens=4)[0], -1)
        assert (end.reason, end.n_generated) == ("cancelled", 4)


def test_a_closed_iterator_cancels(open_engine: Any, prompts: Any) -> None:
    with open_engine() as engine:
        sequence = engine.sequence()
        for n in (1, 2, 5):
            events = engine.generate(Request(sequence, prompts[3], GREEDY))
            for _ in range(n):
                next(events)
            with pytest.raises(UsageError, match="this sequence is answering"):
                engine.add(Request(sequence, prompts[0]))
            events.close()
            assert engine.n_running == 0
            assert sequence.tokens[: len(prompts[3])] == prompts[3]
            assert engine.step() == []
            for prompt in (prompts[3], prompts[0]):
                assert answer(engine, Request(sequence, prompt, GREEDY, 24))[0][:2] == alone(open_engine, prompt)[:2]


PARTS = ("engine", "_answers", "_sequences", "_context", "_sampling", "_detokenizer", "_native")


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line that the engine runs; `lines` are those that it came by."""

    def __init__(self, at: int | None) -> None:
        self.lines: list[tuple[str, int]] = []
        self._at = at

    def __enter__(self) -> Interrupt:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _call(self, frame: Any, event: str, _: Any) -> Any:
        path = Path(frame.f_code.co_filename)
        callers = {frame.f_code.co_name, frame.f_back.f_code.co_name}
        wanted = path.parent.name == "steermoe_local" and path.stem in PARTS
        return self._line if wanted and "__del__" not in callers else None  # a finaliser cannot raise

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self._at:
                raise KeyboardInterrupt
        return self._line


def test_an_interrupt_anywhere_leaves_everything_valid(open_engine: Any, biases: Any, prompts: Any) -> None:
    """Ctrl-C can come between any two lines; what a sequence says it holds is in memory all the same."""
    lib = capi.llama_cpp()
    hot = Sampling(temperature=1.5, seed=2, repeat_penalty=1.1)
    expected = [alone(open_engine, prompts[i], biases[i], sampling=hot, max_tokens=3)[:2] for i in (0, 1)]
    with open_engine(n_sequences=2, n_batch=8) as engine:
        sequences = [engine.sequence() for _ in range(2)]

        def requests() -> list[Request]:
            return [Request(s, p, hot, 3, stop=("zzz",)) for s, p in zip(sequences, prompts, strict=False)]

        def ask() -> None:
            for i, sequence in enumerate(sequences):
                sequence.steer(biases[1 - i])  # something to forget
                sequence.steer(biases[i])
            list(engine.generate(*requests()))

        ask()  # what is only done once
        with Interrupt(None) as whole:
            ask()
        rng, n_raised = random.Random(6), 0
        for line in sorted(set(whole.lines)):  # each once, somewhere on the way
            at = rng.choice([i for i, passed in enumerate(whole.lines, 1) if passed == line])
            with Interrupt(at):
                try:
                    ask()
                except KeyboardInterrupt:
                    n_raised += 1
            while engine.n_running:  # only if it came while the iterator was being closed
                engine.step()
            assert engine.step() == [], "something is left of what was given up"
            memory = engine._context._memory
            for sequence in sequences:
                assert lib.llama_memory_seq_pos_max(memory, sequence.place) + 1 >= len(sequence.tokens), at
            for i, sequence in enumerate(sequences):
                sequence.steer(biases[i])
            found = answer(engine, *requests())
            assert [case[:2] for case in found] == expected, at
            for i, (_, _, end) in enumerate(found):
                assert end.routing.sum() == end.n_rows * len(end.routing) * engine.identity.n_expert_used, (at, i)
        assert n_raised > 0.95 * len(set(whole.lines)) > 120


@pytest.mark.parametrize("number", range(3))
def test_an_interrupt_behind_a_change_of_steering(
    open_engine: Any, biases: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The library is steered by the new bias, and nobody was told."""
    from steermoe_local.generation import context

    real = context._native.attach_sequence

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with open_engine() as engine:
        sequence = engine.sequence()
        sequence.steer(biases[number])
        answer(engine, Request(sequence, prompts[3], GREEDY, 2))
        with monkeypatch.context() as patch:
            patch.setattr(context._native, "attach_sequence", interrupted)
            with pytest.raises(KeyboardInterrupt):
                sequence.steer(biases[3])
        assert sequence.steering is biases[number]
        found = answer(engine, Request(sequence, prompts[3], GREEDY, 24))[0]
        expected = alone(open_engine, prompts[3], biases[number])
        assert found[:2] == expected[:2]
        assert np.array_equal(found[2].routing, expected[2].routing)


def test_a_failed_decode(open_engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ran ends as cancelled, and the sequences can be used."""
    with open_engine(n_sequences=2) as engine:
        requests = [Request(engine.sequence(), prompt, GREEDY, 24) for prompt in prompts[:2]]
        engine.add(requests[0])
        engine.step()
        engine.add(requests[1])
        with monkeypatch.context() as patch:
            patch.setattr(capi.llama_cpp(), "llama_decode", lambda *_: -3)
            with pytest.raises(capi.NativeError, match="llama_decode failed with -3"):
                engine.step()
        ends = [(request, event.reason) for request, event in engine.step() if isinstance(event, FinishEvent)]
        assert ends == [(requests[0], "cancelled"), (requests[1], "cancelled")]
        for request, found in zip(requests, answer(engine, *requests), strict=True):
            assert found[:2] == alone(open_engine, list(request.tokens))[:2]


#
# places and arguments
#


def test_sequences_are_taken_and_given_back(open_engine: Any, biases: Any, prompts: Any) -> None:
    with open_engine(n_sequences=2) as engine, open_engine() as another:
        one, two = engine.sequence(), engine.sequence()
        assert engine.n_sequences == 2
        with pytest.raises(UsageError, match="all 2 sequences are taken; close one or raise n_sequences"):
            engine.sequence()
        one.steer(biases[1])
        running = Request(one, prompts[3], GREEDY)
        engine.add(running)
        engine.step()
        for refused in (one.forget, lambda: one.steer(None), lambda: engine.route(one, prompts[0], 1)):
            with pytest.raises(UsageError, match="this sequence is answering; cancel the request"):
                refused()
        one.close()
        one.close()
        assert one.tokens == []
        assert [event.reason for _, event in engine.step() if isinstance(event, FinishEvent)] == ["cancelled"]
        for refused in (one.forget, lambda: one.steer(None), lambda: engine.add(running)):
            with pytest.raises(UsageError, match="closed"):
                refused()
        three = engine.sequence()
        assert three.steering is None
        assert three.tokens == []
        assert answer(engine, Request(three, prompts[0], GREEDY, 24))[0][:2] == alone(open_engine, prompts[0])[:2]
        with pytest.raises(UsageError, match="another engine"):
            another.add(Request(two, prompts[0]))
    with pytest.raises(UsageError, match="closed"):
        two.forget()
    with pytest.raises(UsageError, match="the engine is closed"):
        engine.sequence()
    assert engine.step() == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": []}, "the prompt has no tokens"),
        ({"tokens": [1, -1]}, "token -1: the vocabulary has 0 to "),
        ({"tokens": [10**6]}, "token 1000000: the vocabulary has 0 to "),
        ({"tokens": range(256)}, "the prompt has 256 tokens, but n_ctx is 256"),
        ({"max_tokens": -1}, "max_tokens: -1 is not at least 0"),
        ({"stop": ("a", "")}, "stop: a stop string is empty"),
        ({"n_probs": -1}, "n_probs: -1 is not from 0 to "),
        ({"n_probs": 10**6}, "n_probs: 1000000 is not from 0 to "),
        ({"sampling": Sampling(grammar="nonsense")}, "grammar: llama.cpp refuses it"),
    ],
)
def test_requests_that_are_refused(open_engine: Any, prompts: Any, fields: dict[str, Any], words: str) -> None:
    with open_engine() as engine:
        good = Request(engine.sequence(), prompts[0])
        with pytest.raises(UsageError) as caught:
            engine.add(replace(good, **fields))
        assert words in str(caught.value)
        assert engine.n_running == 0
        with pytest.raises(UsageError):
            next(engine.generate(replace(good, max_tokens=1), replace(good, **fields)))
        assert engine.n_running == 0, "the good one is left running"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"n_ctx": -1}, "n_ctx at least 0"),
        ({"n_ctx": 2**31}, "more than llama.cpp can count"),
        ({"n_batch": 0}, "n_batch, n_ubatch and n_threads must be at least 1"),
        ({"n_ubatch": 0}, "at least 1"),
        ({"n_threads": 0}, "at least 1"),
        ({"n_sequences": 0}, "n_sequences: 0 is not from 1 to 256"),
        ({"n_sequences": 300}, "n_sequences: 300 is not from 1 to 256"),
        ({"n_sequences": 9, "n_batch": 8}, r"n_sequences: 9 is not from 1 to 8 (n_batch"),
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
            request = Request(engine.sequence(), prompts[0], GREEDY, 1, n_probs=0)
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


#
# other models
#

DENSE = RandomModel("qwen3", n_layer=2, n_dense=2, n_expert=0, k=0)


def compare_with_alone(
    path: Path, n_prompts: tuple[int, ...] = (30, 7, 70), kept: float = 0.5, **options: Any
) -> list[list[int]]:
    """Three sequences at once, then the texts continued, then cut back to `kept` of them and continued: as alone.

    Returns `n_cached` of the last two.
    """
    model = SteeredLlama(path, n_ctx=32, n_threads=1, n_threads_batch=1, **options)
    rng = np.random.default_rng(8)
    n_vocab = model.n_vocab()
    settings: dict[str, Any] = {"n_ctx": 700, "n_batch": 64, "n_ubatch": 16, "n_threads": 1}

    def fresh(prompt: list[int]) -> list[int]:
        with Engine(model, **settings) as engine:
            return answer(engine, Request(engine.sequence(), prompt, GREEDY, 6))[0][1]

    found: list[list[int]] = []
    texts = [rng.integers(0, n_vocab, n).tolist() for n in n_prompts]
    said: list[list[int]] = []
    with Engine(model, n_sequences=3, **settings) as engine:
        sequences = [engine.sequence() for _ in n_prompts]
        for change in ("", "continued", "cut"):
            for i, text in enumerate(texts):
                more = rng.integers(0, n_vocab, 5).tolist()
                place = int(len(text) * kept)
                if change == "continued":
                    texts[i] = text + said[i] + more
                if change == "cut":
                    texts[i] = [*text[:place], (text[place] + 1) % n_vocab, *more]
            answers = answer(engine, *(Request(s, t, GREEDY, 6) for s, t in zip(sequences, texts, strict=True)))
            said = [tokens for _, tokens, _ in answers]
            assert said == [fresh(text) for text in texts], change
            found.append([end.n_cached for _, _, end in answers])
    model.close()
    return found[1:]


def test_a_dense_model(random_model: Any) -> None:
    path = random_model(DENSE)
    continued, cut = compare_with_alone(path)
    assert continued == [35, 12, 75]
    assert cut == [20, 9, 40]
    model = SteeredLlama(path, n_ctx=32, n_threads=1)
    with Engine(model, n_ctx=64, n_threads=1) as engine:
        assert engine.identity is None
        sequence = engine.sequence()
        text, tokens, end = answer(engine, Request(sequence, [1, 2, 3], GREEDY, 4))[0]
        assert (text, len(tokens), end.routing) == ("", 4, None)
        assert engine.route(sequence, [1, 2, 3], 1) is None
        foreign = BiasFile.from_signs(np.eye(4, 16), identity_of(random_model(OLMOE)))
        with pytest.raises((ModelMismatchError, ModelError)):
            sequence.steer(foreign)
        with pytest.raises(ModelError, match="no tokenizer"):
            _ = engine.renderer
    model.close()


@pytest.mark.parametrize(
    ("swa_full", "kept", "n_kept"), [(True, 0.5, 305), (False, 0.5, 0), (False, 0.7, 0), (False, 0.95, 580)]
)
def test_a_sliding_window(random_model: Any, swa_full: bool, kept: float, n_kept: int) -> None:
    """gpt-oss looks back on 128 tokens: where some of them are gone, the text is computed again."""
    continued, cut = compare_with_alone(random_model(GPT_OSS), (30, 7, 600), kept, swa_full=swa_full)
    assert continued == [35, 12, 605]
    assert cut[2] == n_kept


@pytest.mark.parametrize("arch", ["lfm2moe", "qwen3next", "kimi-linear", "minimax-01", "deepseek4", "llama4"])
def test_other_kinds_of_memory(tool: Any, tmp_path: Path, arch: str) -> None:
    """Recurrent states cannot be cut: such a sequence begins again, and says so."""
    tool("test-llama-archs", "-h")  # skips or fails when it is not built
    upstream = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, arch)
    continued, cut = compare_with_alone(widen(upstream[0], tmp_path / "wide.gguf"), (20, 7, 30))
    assert continued == [25, 12, 35]
    assert cut == ([15, 9, 20] if arch == "llama4" else [0, 0, 0])


def test_a_state_and_a_window(tool: Any, tmp_path: Path) -> None:
    """Where the state says that nothing is cut, nothing has left the window."""
    tool("test-llama-archs", "-s", 1, "-a", "^lfm2$", "-o", tmp_path)
    continued, cut = compare_with_alone(tmp_path / "lfm2-dense.gguf")
    assert continued == [35, 12, 75]
    assert cut == [0, 0, 0]


def test_models_that_do_not_write(tool: Any, tmp_path: Path, llama: SteeredLlama, monkeypatch: Any) -> None:
    lib = capi.llama_cpp()
    for name, value, words in (
        ("llama_model_has_encoder", True, "model has an encoder"),
        ("llama_model_has_decoder", False, "does not write from left to right"),
        ("llama_get_memory", None, "keeps no memory of a text"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(lib, name, lambda *_, value=value: value)
            with pytest.raises(ModelError, match=words):
                Engine(llama, n_ctx=64)
    tool("test-llama-archs", "-h")
    upstream = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, "llada-moe")
    diffusion = SteeredLlama(upstream[0], n_ctx=32, n_threads=1)
    with pytest.raises(ModelError, match="this llada-moe model does not write from left to right"):
        Engine(diffusion, n_ctx=64)
    diffusion.close()
