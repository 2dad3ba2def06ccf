"""Which tokens a plan steers in an answer, against a loop that names the bias of each token by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.llama import capi
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.llama.sampling import log_softmax
from tests.support.generation import GREEDY, alone, answer, endless, greedy
from tests.support.low_level import identity_of, open_model, random_signs
from tests.support.placed import plan
from tests.support.random_models import STEERABLE
from tests.support.token_loop import TokenLoop

pytestmark = pytest.mark.numeric

N = 14  # tokens of an answer
COMMA = ","

# name: rules of (where, number of the bias), and by hand the number of the bias in the row of a prompt's i-th token,
# n of them without the last, and in the row that draws an answer's j-th token, where `before` is the text so far
Rules = list[tuple[str, int]]
ByHand = tuple[Callable[[int, int], int], Callable[[int, str], int]]
CASES: dict[str, tuple[Rules, ByHand]] = {
    "answer": ([("answer", 1)], (lambda i, n: 0, lambda j, before: 1)),
    "prompt": ([("prompt", 1)], (lambda i, n: 1, lambda j, before: 0)),
    "the prompt's end": (
        [("prompt[-1:]", 2), ("answer", 1)],
        (lambda i, n: 2 if i == n - 1 else 0, lambda j, before: 1),
    ),
    "all but the first": ([("answer[1:]", 1)], (lambda i, n: 0, lambda j, before: int(j > 0))),
    "a window": ([("answer[2:5]", 2)], (lambda i, n: 0, lambda j, before: 2 if 2 <= j < 5 else 0)),
    "the first match": (
        [("answer[4:6]", 0), ("answer[0:8]", 1), ("all", 3)],
        (lambda i, n: 3, lambda j, before: 0 if 4 <= j < 6 else 1 if j < 8 else 3),
    ),
    "every third": ([("answer every 3", 3)], (lambda i, n: 0, lambda j, before: 0 if j % 3 else 3)),
    "windows of the prompt": (
        [("prompt[:-4]", 2), ("prompt[-4:-2]", 1), ("answer[1:] every 2", 2)],
        (lambda i, n: 2 if i < n - 4 else 1 if i < n - 2 else 0, lambda j, before: 2 if j % 2 else 0),
    ),
    "after a text": ([(f'answer after "{COMMA}"', 1)], (lambda i, n: 0, lambda j, before: int(COMMA in before))),
    "until a text": ([(f'answer until "{COMMA}"', 1)], (lambda i, n: 0, lambda j, before: int(COMMA not in before))),
    "a window behind a text": (
        [(f'answer[1:3] after "{COMMA}"', 2)],
        (lambda i, n: 0, lambda j, before: -1),  # by the loop itself, see below
    ),
}


@pytest.fixture(scope="module")
def loop(tiny_model: Any, tiny_path: Path) -> Iterator[TokenLoop]:
    with TokenLoop(tiny_model, identity_of(tiny_path)) as loop:
        yield loop


def told(engine: Engine, request: Request) -> tuple[list[TokenEvent], FinishEvent]:
    """The events of the drawn tokens, and the end."""
    events = [event for _, event in engine.generate(request)]
    *_, finish = events
    assert isinstance(finish, FinishEvent)
    return [event for event in events if isinstance(event, TokenEvent) and event.token >= 0], finish


def by_hand(name: str, llama: SteeredLlama, prompt: list[int], tokens: list[int]) -> list[int]:
    """The number of the bias in each row: of the prompt's tokens but the last, then those that draw the answer's."""
    of_prompt, of_answer = CASES[name][1]
    n = len(prompt) - 1
    numbers = [of_prompt(i, n) for i in range(n)]
    texts = [llama.detokenize([token], special=True).decode() for token in tokens]
    if name == "a window behind a text":
        first = next(j for j in range(len(tokens)) if COMMA in "".join(texts[:j]))
        return numbers + [2 if first + 1 <= j < first + 3 else 0 for j in range(len(tokens))]
    return numbers + [of_answer(j, "".join(texts[:j])) for j in range(len(tokens))]


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_steered_as_by_hand(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, name: str
) -> None:
    steering = plan(*((where, biases[number]) for where, number in CASES[name][0]))
    prompt = prompts[2]
    with open_engine() as engine:
        request = Request(prompt, steering, endless(llama), N, n_probs=0)
        events, finish = told(engine, request)
        tokens = [event.token for event in events]
        numbers = by_hand(name, llama, prompt, tokens)
        assert set(numbers) - {0}, "nothing is steered"
        own = [biases[number] for number in numbers]
        rules = [rule for rule, (_, number) in enumerate(CASES[name][0]) if number]
        # what was told of each token, and what the slot says
        first = len(prompt) - 1
        assert [event.rule is not None for event in events] == [bias is not None for bias in own[first:]]
        assert {event.rule for event in events} <= {*rules, None}
        assert {event.phase for event in events} == {"answer"}
        assert finish.n_steered == sum(bias is not None for bias in own[first:])
        assert engine._slots[0].keys == [None if bias is None else bias.key for bias in own]
        # every token was drawn from the logits of a text that was steered like this, in the same shapes
        read = loop.one_by_one([*prompt, *tokens[:-1]], own, len(prompt))
        for event, logits in zip(events, read.logits, strict=True):
            assert event.logprob == float(log_softmax(logits)[event.token])
        rows = read.experts[first:]
        counts = np.zeros_like(finish.routing)
        for layer in range(rows.shape[1]):
            np.add.at(counts[layer], rows[:, layer].ravel(), 1)
        assert np.array_equal(finish.routing, counts)
        # teacher forcing, all in one decode
        ((start, found),) = engine.logits([steering], [*prompt, *tokens], n_prompt=len(prompt))
        assert start == 0
        assert np.array_equal(found[0], loop.at_once([*prompt, *tokens[:-1]], own).logits)
        routed = engine.route([*prompt, *tokens], steering, first, n_prompt=len(prompt))
        assert routed.sum() == (N + 1) * finish.routing.sum() / N
        routed = engine.route([*prompt, *tokens], steering, first, first + N, n_prompt=len(prompt))
        assert np.abs(routed - finish.routing).sum() <= 4, "but for the rounding of other shapes"


def test_the_first_token_is_drawn_from_the_prompt(open_engine: Any, loop: TokenLoop, biases: Any, prompts: Any) -> None:
    """In the row of its last token, which is the answer's first; the others are read unsteered, bit for bit."""
    prompt = prompts[2]

    def first(bias: Any) -> float:
        with open_engine() as engine:
            (event, *_), _ = told(engine, greedy(prompt, 1, bias, n_probs=0))
            assert event.logprob is not None
            return event.logprob

    unsteered = first(None)
    for bias in biases[1:]:
        own = [None] * (len(prompt) - 1) + [bias]
        alone = float(log_softmax(loop.one_by_one(prompt, own, len(prompt)).logits[0]).max())
        assert first(plan(("answer", bias))) == alone != unsteered
        assert first(plan(("answer[1:]", bias))) == unsteered
        assert first(plan(("prompt", bias))) not in (alone, unsteered, first(bias))


@pytest.mark.parametrize("opened", [False, True])
def test_thinking_and_answer(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, opened: bool
) -> None:
    """The markers belong to the thinking, and a prompt may have opened it already."""
    style = reasoning_style("<think></think>")  # where it may begin, the answer may
    if opened:
        style = replace(style, prefix="<think>\n")
    start = "" if opened else "<think>"
    grammar = f'root ::= "{start}\\nplus one\\n</think>\\n\\n4, 5"'
    rules = [("thinking[1:]", biases[1]), ("answer", biases[2])]
    with open_engine() as engine:
        request = Request(prompts[0], plan(*rules), Sampling(temperature=0, grammar=grammar), style=style, n_probs=0)
        events, _ = told(engine, request)
    text = ""
    own = [None] * (len(prompts[0]) - 1)
    for j, event in enumerate(events):
        assert event.phase == ("answer" if "</think>" in text else "thinking"), text
        expected = 1 if "</think>" in text or (not j and not opened) else 0 if j else None
        assert event.rule == expected, text
        own.append(None if expected is None else biases[expected + 1])
        text += llama.detokenize([event.token], special=True).decode()
    assert {event.phase for event in events} == {"thinking", "answer"}
    tokens = [event.token for event in events]
    read = loop.one_by_one([*prompts[0], *tokens[:-1]], own, len(prompts[0]))
    assert [event.logprob for event in events] == [
        float(log_softmax(row)[token]) for row, token in zip(read.logits, tokens, strict=True)
    ]
    with open_engine() as engine:  # the same when it is given
        ((_, found),) = engine.logits([plan(*rules)], [*prompts[0], *tokens], n_prompt=len(prompts[0]), style=style)
    assert np.array_equal(found[0], loop.at_once([*prompts[0], *tokens[:-1]], own).logits)


@pytest.mark.parametrize("name", STEERABLE)
def test_other_models(random_model: Any, name: str) -> None:
    """Every token of the prompt and of the answer names its bias, whatever the router does with it."""
    path = random_model(STEERABLE[name])
    identity = identity_of(path)
    rng = np.random.default_rng(5)
    k, n_expert = identity.n_expert_used, identity.n_expert

    def signs() -> Any:
        return np.stack([random_signs(rng, n_expert, k, 1, n_expert // 3) for _ in range(identity.n_layer)])

    one, two = BiasFile.from_signs(signs(), identity), BiasFile.from_soft(signs(), identity, 3.0)
    steering = plan(("prompt[2:] every 3", one), ("answer[1:4]", two), ("all every 4", two))
    prompt = rng.integers(0, 60, 20).tolist()
    first = len(prompt) - 1
    of_prompt = [one if i >= 2 and (i - 2) % 3 == 0 else two if i % 4 == 0 else None for i in range(first)]
    llama = SteeredLlama(path, n_ctx=64, n_threads=1, n_threads_batch=1)
    model = open_model(path)
    with Engine(llama, n_ctx=256, n_threads=1) as engine, TokenLoop(model, identity) as loop:
        events, finish = told(engine, greedy(prompt, 9, steering, n_probs=0))
        tokens = [event.token for event in events]
        rules = [1 if 1 <= j < 4 else 2 if (first + j) % 4 == 0 else None for j in range(len(tokens))]
        assert [event.rule for event in events] == rules
        own = of_prompt + [None if rule is None else two for rule in rules]
        read = loop.one_by_one([*prompt, *tokens[:-1]], own, len(prompt))
        assert [event.logprob for event in events] == [
            float(log_softmax(row)[token]) for row, token in zip(read.logits, tokens, strict=True)
        ]
        assert finish.n_steered == sum(rule is not None for rule in rules)
        assert answer(engine, greedy(prompt, 9, steering))[0][1] == tokens, "with a memory"
    llama.close()
    model.close()


def test_without_a_plan(open_engine: Any, biases: Any, prompts: Any) -> None:
    for bias in biases:
        events, finish = told(open_engine(), greedy(prompts[3], 5, bias))
        assert {(event.rule, event.phase) for event in events} == {(None if bias is None else 0, None)}
        assert finish.n_steered == (0 if bias is None else 5)


def test_plans_side_by_side(open_engine: Any, biases: Any, prompts: Any) -> None:
    """In one batch, with biases, prompts that are cut into pieces, and more biases than the library has rows."""
    steerings = [
        plan(("answer", biases[1])),
        plan(("prompt[2:]", biases[2]), ("answer every 2", biases[3])),
        biases[3],
        None,
        plan(("answer[3:]", biases[2]), ("all", biases[1])),
    ]
    expected = [alone(open_engine, prompts[i % 4], bias) for i, bias in enumerate(steerings)]
    for n_batch, n_rows in ((512, 1024), (16, 1024), (512, 2)):
        with pytest.MonkeyPatch.context() as patch, open_engine(n_slots=5, n_batch=n_batch) as engine:
            patch.setattr(capi, "MAX_ROWS", n_rows)
            requests = [greedy(prompts[i % 4], bias=bias) for i, bias in enumerate(steerings)]
            for found, known in zip(answer(engine, *requests), expected, strict=True):
                assert found[:2] == known[:2]
            assert len(engine._context._rows) == min(3, n_rows)


def test_more_biases_than_rows(open_engine: Any, biases: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round is decoded in groups that fit; a plan that never fits is refused."""
    monkeypatch.setattr(capi, "MAX_ROWS", 1)
    sizes: list[int] = []
    decode = capi.decode
    monkeypatch.setattr(capi, "decode", lambda ctx, batch, rows: (sizes.append(len(rows)), decode(ctx, batch, rows)))
    expected = [alone(open_engine, prompts[0], bias)[:2] for bias in biases]
    with open_engine(n_slots=4) as engine:
        sizes.clear()
        found = answer(engine, *(greedy(prompts[0], bias=bias) for bias in biases))
        assert [case[:2] for case in found] == expected
        n = len(prompts[0])
        assert sizes[:3] == [2 * n, n, n], "the unsteered one together with the first"
        with pytest.raises(UsageError, match="2 biases"):
            engine.add(greedy(prompts[0], bias=plan(("prompt", biases[1]), ("answer", biases[2]))))
        assert engine.n_unfinished == 0


def test_least_recently_used_rows_are_taken(
    open_engine: Any, biases: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capi, "MAX_ROWS", 2)
    with open_engine() as engine:
        for number in (1, 2, 1, 3):
            answer(engine, greedy(prompts[0], 2, biases[number]))
        assert set(engine._context._rows) == {biases[1].key, biases[3].key}
        assert sorted(engine._context._rows.values()) == [0, 1]


def test_ever_new_biases_take_no_more_rows(open_engine: Any, biases: Any, prompts: Any) -> None:
    """A bank of rows is memory of the device: not all that the library allows are taken."""
    soft = biases[3]
    with open_engine() as engine:
        for scale in range(1, 71):
            values = {layer: row * np.float32(scale / 50) for layer, row in soft.values.items()}
            engine.check(replace(soft, values=values))
        assert len(engine._context._rows) == 64 < capi.MAX_ROWS
        assert answer(engine, greedy(prompts[3], bias=soft))[0][:2] == alone(open_engine, prompts[3], soft)[:2]


def test_what_does_nothing_is_nothing(open_engine: Any, biases: Any, prompts: Any) -> None:
    with open_engine() as engine, engine.slot() as slot:
        for nothing in (plan(), plan(("answer", None)), plan(("all", None), ("answer", biases[1]))):
            assert not slot.steer(nothing)
            assert slot.bias is None
        assert slot.steer(plan(("all", biases[1]), ("answer", biases[2])))
        assert slot.bias is biases[1], "it steers all tokens alike"
        shadowed = plan(("answer", biases[1]), ("answer", biases[2]))
        events, _ = told(engine, greedy(prompts[0], 2, shadowed, slot=slot))
        assert {event.rule for event in events} == {0}


@pytest.mark.parametrize("n_prompt", [0, -1, 99])
def test_prompts_that_are_none(open_engine: Any, prompts: Any, biases: Any, n_prompt: int) -> None:
    steering = plan(("answer", biases[1]))
    with open_engine() as engine:
        for call in (
            lambda: engine.add(Request(prompts[0], steering, GREEDY, n_prompt=n_prompt)),
            lambda: engine.route(prompts[0], steering, 1, n_prompt=n_prompt),
            lambda: next(engine.logits([steering], prompts[0], n_prompt=n_prompt)),
        ):
            with pytest.raises(UsageError, match=f"n_prompt: {n_prompt} "):
                call()
        assert (engine.n_unfinished, engine.n_free) == (0, 1)
