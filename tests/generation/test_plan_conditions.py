"""Rules that steer only when something holds, against values computed by hand from a loop's logits and experts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ModelMismatchError, SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, FinishEvent, Request, TokenEvent
from steermoe_local.llama.sampling import log_softmax
from tests.support.generation import answer, endless, greedy
from tests.support.low_level import identity_of
from tests.support.placed import plan
from tests.support.token_loop import Read, TokenLoop

pytestmark = pytest.mark.numeric

N = 12  # tokens of an answer


@pytest.fixture(scope="module")
def loop(tiny_model: Any, tiny_path: Path) -> Iterator[TokenLoop]:
    with TokenLoop(tiny_model, identity_of(tiny_path)) as loop:
        yield loop


@pytest.fixture(scope="module")
def scores(tiny_path: Path) -> Any:
    return np.random.default_rng(12).normal(size=identity_of(tiny_path).shape)


def leans(read: Read, scores: Any) -> Any:
    """The sum of the scores of the experts that each token selected, in all layers but the last."""
    layers = range(scores.shape[0] - 1)
    return np.array([sum(scores[layer, token[layer]].sum() for layer in layers) for token in read.experts])


def rules_of(engine: Engine, *requests: Request) -> list[tuple[list[int], list[int | None]]]:
    """(tokens, rules) of each answer."""
    found: list[tuple[list[int], list[int | None]]] = [([], []) for _ in requests]
    for index, event in engine.generate(*requests):
        if isinstance(event, TokenEvent) and event.token >= 0:
            found[index][0].append(event.token)
            found[index][1].append(event.rule)
    return found


def test_over_the_prompt(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, scores: Any
) -> None:
    """Decided once, by the experts of all tokens but the last, also when it is in memory, in pieces, beside others."""
    values = [float(leans(loop.at_once(prompt, [None] * len(prompt)), scores)[:-1].mean()) for prompt in prompts]
    order = sorted(values)
    limit = (order[1] + order[2]) / 2
    assert order[2] - order[1] > 0.01, "no tie"
    steering = plan(
        (f"answer[1:] when m < {limit} over prompt", biases[1]), ("answer every 2", biases[2]), scores=scores
    )
    by_hand = [[1 if j == 0 else 0 if value < limit else None if j % 2 else 1 for j in range(N)] for value in values]
    requests = [Request(prompt, steering, endless(llama), N) for prompt in prompts]
    with open_engine() as engine:
        alone = [rules_of(engine, request)[0] for request in requests]
    assert [rules for _, rules in alone] == by_hand
    for options in ({"n_slots": 4}, {"n_slots": 2, "n_batch": 7}):
        with open_engine(**options) as engine:
            assert rules_of(engine, *requests) == alone
            assert rules_of(engine, *requests[::-1]) == alone[::-1]


def test_the_prompt_in_memory_needs_its_experts(open_engine: Any, biases: Any, prompts: Any, scores: Any) -> None:
    steering = plan(("answer when m > -99 over prompt", biases[1]), scores=scores)
    prompt = prompts[2]
    whole = len(prompt) - 1
    with open_engine() as engine, engine.slot() as slot:

        def n_cached(tokens: list[int], bias: Any, **options: Any) -> int:
            end = answer(engine, greedy(tokens, 3, bias, slot=slot, **options))[0][2]
            assert bias is not steering or end.n_steered == end.n_generated
            return int(end.n_cached)

        assert [n_cached(prompt, bias) for bias in (None, steering, steering, None, steering)] == [
            0, 0, whole, whole, whole
        ]  # fmt: skip
        answered = list(slot.tokens)
        # the answer's experts are known, too, but it was steered
        assert n_cached([*answered, *prompts[0]], steering) == len(prompt) - 1
        never = plan(("answer when m > 99 over prompt", biases[1]), scores=scores)
        said = answer(engine, greedy(prompt, 5, never, slot=slot))[0]
        assert said[2].n_steered == 0
        assert n_cached([*slot.tokens, *prompts[0]], never) == len(prompt) + len(said[1]) - 1
        # a trace needs those of the last layer, too
        assert n_cached(prompt, None, trace=True) == 0
        assert n_cached(prompt, None, trace=True) == whole
        assert n_cached(prompt, steering) == whole
        # one that looks at distributions as well needs no more of the prompt
        both = plan(
            ("answer when m > -99 over prompt", biases[1]), ("answer when entropy > 99", biases[2]), scores=scores
        )
        assert answer(engine, greedy(prompt, 3, both, slot=slot))[0][2].n_cached == whole
        slot.forget()
        assert (slot.keys, slot._selected) == ([], []), "experts go with their tokens"


@pytest.mark.parametrize("n_last", [1, 3])
def test_over_the_last_tokens_of_the_answer(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, scores: Any, n_last: int
) -> None:
    prompt = prompts[2]
    steering = plan((f"answer when m > 0.5 over last {n_last}", biases[1]), scores=scores)
    with open_engine() as engine:
        ((tokens, rules),) = rules_of(engine, Request(prompt, steering, endless(llama), N))
    first = len(prompt) - 1
    own = [None] * first + [None if rule is None else biases[1] for rule in rules]
    found = leans(loop.one_by_one([*prompt, *tokens[:-1]], own, len(prompt)), scores)[first:]
    means = [found[j - n_last : j].mean() if j >= n_last else -np.inf for j in range(N)]
    assert rules == [0 if mean > 0.5 else None for mean in means]
    assert set(rules) == {0, None}, "it always or never holds"


@pytest.mark.parametrize("measure", ["entropy", "margin"])
def test_the_distribution_of_the_token(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, measure: str
) -> None:
    """That which the token before was drawn from, before samplers; before the first there is none."""
    prompt = prompts[2]
    steering = plan((f"answer when {measure} > 0.4", biases[1]), ("answer", biases[2]))
    with open_engine() as engine:
        ((tokens, rules),) = rules_of(engine, Request(prompt, steering, endless(llama), N))
    own = [None] * (len(prompt) - 1) + [biases[1 if rule == 0 else 2] for rule in rules]
    logits = loop.one_by_one([*prompt, *tokens[:-1]], own, len(prompt)).logits
    logprobs = np.array([log_softmax(row) for row in logits], dtype=np.float64)
    top = np.sort(logprobs, axis=1)
    values = -(np.exp(logprobs) * logprobs).sum(axis=1) if measure == "entropy" else top[:, -1] - top[:, -2]
    assert rules == [1, *(0 if value > 0.4 else 1 for value in values[:-1])]
    assert set(rules) == {0, 1}, "it always or never holds"


CONDITIONS = {
    "prompt": "answer[1:] when m > -99 over prompt",
    "last": "answer when m > 0.5 over last 2",
    "entropy": "answer when entropy > 0.4",
    "margin": "answer when margin < 2",
}


@pytest.mark.parametrize("name", CONDITIONS)
def test_given_answers(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, scores: Any, name: str
) -> None:
    """What is forced is steered as what was drawn: as the beginning of an answer, by `logits` and by `route`."""
    prompt = prompts[2]
    n = len(prompt)
    steering = plan((CONDITIONS[name], biases[1]), ("answer every 3", biases[3]), scores=scores)
    with open_engine() as engine:
        request = Request(prompt, steering, endless(llama), N, n_probs=0)
        ((tokens, rules),) = rules_of(engine, request)
        assert len(set(rules)) > 1
        keys = engine._slots[0].keys
        engine.forget()
        for n_given in (1, 5):
            begun = Request([*prompt, *tokens[:n_given]], steering, endless(llama), N - n_given, n_prompt=n)
            for _ in range(2):  # the second time with a memory
                assert rules_of(engine, begun) == [(tokens[n_given:], rules[n_given:])]
                assert engine._slots[0].keys == keys
        text = [*prompt, *tokens]
        read = loop.one_by_one(text[:-1], [None if key is None else by_key(biases, key) for key in keys], n)
        found = [rows for _, rows in engine.logits([steering], text, n - 1, n_prompt=n)]
        joined = np.concatenate(found, axis=1)
        assert joined.shape == (1, N, read.logits.shape[1])
        one_by_one = name != "prompt"  # as the loop
        if one_by_one:
            assert np.array_equal(joined[0], read.logits)
        first = n - 1
        counts = engine.route(text, steering, first, first + N, n_prompt=n)
        assert engine._slots[0].keys == keys
        by_loop = np.stack(
            [
                np.bincount(read.experts[first:, layer].ravel(), minlength=counts.shape[1])
                for layer in range(len(counts))
            ]
        )
        assert np.abs(counts - by_loop).sum() <= (0 if one_by_one else 4)


def by_key(biases: Any, key: str) -> Any:
    return next(bias for bias in biases[1:] if bias.key == key)


def test_given_tokens_under_several_plans(
    open_engine: Any, llama: SteeredLlama, biases: Any, prompts: Any, scores: Any
) -> None:
    """Beside others a conditional plan is followed as alone; the choices of a task, say."""
    prompt = prompts[2]
    n = len(prompt)
    plans = [None, *(plan((CONDITIONS[name], biases[1]), scores=scores) for name in CONDITIONS), biases[2]]
    text = [*prompt, *prompts[3]]
    with open_engine(n_slots=len(plans)) as engine:
        together = np.concatenate([rows for _, rows in engine.logits(plans, text, n - 1, n_prompt=n)], axis=1)
        keys = [slot.keys for slot in engine._slots]
        for index, bias in enumerate(plans):
            engine.forget()
            alone = np.concatenate([rows for _, rows in engine.logits([bias], text, n - 1, n_prompt=n)], axis=1)
            assert engine._slots[0].keys == keys[index]
            assert np.abs(log_softmax(alone[0]) - log_softmax(together[index])).max() < 0.1
        scored = Request(text, plans[2], endless(llama), 0, prompt_probs=0, prompt_from=n, n_prompt=n)
        (finish,) = (event for _, event in engine.generate(scored) if isinstance(event, FinishEvent))
        given = log_softmax(together[2])[np.arange(len(prompts[3])), prompts[3]]
        assert [event.token for event in finish.prompt] == prompts[3]
        assert np.abs(given - [event.logprob for event in finish.prompt]).max() < 0.1
        assert len({tuple(one) for one in keys}) >= 4, "the plans do the same"


def test_no_distribution_of_the_prompt_is_looked_at(
    open_engine: Any, llama: SteeredLlama, biases: Any, prompts: Any, scores: Any
) -> None:
    """A trace makes the prompt's tokens outputs, and its last row is decided behind one of them."""
    prompt = prompts[2]
    rules = [("answer when entropy > -1", biases[1]), ("answer when m > -99 over prompt", biases[2])]
    steering = plan(*rules, scores=scores)
    with open_engine() as engine:
        requests = [Request(prompt, steering, endless(llama), 4, trace=trace, reuse=False) for trace in (False, True)]
        plain, traced = (rules_of(engine, request) for request in requests)
    assert plain == traced
    assert plain[0][1] == [1, 0, 0, 0]


def test_a_token_that_the_model_lacks(open_engine: Any, biases: Any, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine, engine.slot() as slot:
        n_vocab = engine.model.n_vocab()
        engine.check(plan((f"answer after #{n_vocab - 1}", biases[1])))
        for mark in (f"after #{n_vocab}", f"until #{n_vocab}", "after #999999 until 'x'"):
            refused = plan(("prompt", None), (f"answer {mark}", biases[1]))
            request = greedy(prompts[0], bias=refused)
            for ask, given in ((engine.check, refused), (engine.add, request), (slot.steer, refused)):
                with pytest.raises(UsageError, match=r"rule 2: \w+ #\d+: the vocabulary has 0 to") as caught:
                    ask(given)
                assert str(caught.value).endswith(f" {n_vocab - 1}")
        assert slot.bias is None


def test_plans_that_cannot_be_followed(open_engine: Any, biases: Any, prompts: Any, scores: Any) -> None:
    routed = plan(("answer when m > 0 over prompt", biases[1]), scores=scores)
    with open_engine(record=False) as engine:
        for refused in (routed, plan(("answer when m > 0 over last 2", biases[1]), scores=scores)):
            with pytest.raises(UsageError, match="recorder"):
                engine.add(greedy(prompts[0], bias=refused))
            with pytest.raises(UsageError, match="recorder"):
                engine.check(refused)
        with pytest.raises(UsageError, match="recorder"):
            engine.add(greedy(prompts[0], trace=True))
        assert engine.n_unfinished == 0
        end = answer(engine, greedy(prompts[2], 3, plan(("answer when entropy > 0", biases[1]))))[0][2]
        assert (end.n_steered, end.n_generated) == (2, 3)
    with open_engine() as engine:
        other = plan(("all", biases[1]), ("answer when m > 0 over prompt", biases[2]), scores=scores[:, 1:])
        engine.check(other)  # nothing ever looks at the second rule
        with pytest.raises(ModelMismatchError, match="rule 1"):
            engine.check(plan(("answer when m > 0 over prompt", biases[2]), scores=scores[:, 1:]))
