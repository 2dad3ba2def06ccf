"""Which slot a request gets, what its memory is worth, what steers it, and slots that are reserved."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ModelMismatchError, SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, FinishEvent, Request, TokenEvent
from steermoe_local.llama import capi
from tests.support.generation import alone, answer, endless, greedy
from tests.support.low_level import identity_of
from tests.support.random_models import OLMOE

pytestmark = pytest.mark.numeric

Make = Callable[..., Engine]


def finished(engine: Engine) -> list[Request]:
    """The requests that end in the next step."""
    return [request for request, event in engine.step() if isinstance(event, FinishEvent)]


def held(engine: Engine) -> list[list[int]]:
    return [slot.tokens for slot in engine._slots]


#
# which slot
#


def test_the_slot_that_holds_most_of_the_prompt(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine(n_slots=4) as engine:
        first = answer(engine, *(greedy(prompt, 4, biases[1]) for prompt in prompts[:2]))
        answer(engine, greedy(prompts[0], 4, biases[2]))
        before = held(engine)
        assert [len(tokens) > 0 for tokens in before] == [True, True, True, False]
        for index, bias in ((0, biases[1]), (2, biases[2])):  # the same text under two steerings
            end = answer(engine, greedy(prompts[0], 4, bias))[0][2]
            assert end.n_cached == len(prompts[0]) - 1
            assert held(engine)[index][: len(prompts[0])] == prompts[0]
            assert [slot.tokens for slot in engine._slots if slot.index != index] == [
                tokens for i, tokens in enumerate(before) if i != index
            ], "no other slot is touched"
        text = [*prompts[1], *first[1][1], *prompts[2]]
        assert answer(engine, greedy(text, 4, biases[1]))[0][2].n_cached >= len(prompts[1])
        assert held(engine)[1][: len(text)] == text


def test_an_empty_slot_before_one_that_would_be_forgotten(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine(n_slots=3) as engine:
        for n, bias in enumerate(biases[:3], 1):
            answer(engine, greedy(prompts[0], 2, bias))
            assert sum(bool(tokens) for tokens in held(engine)) == n
        assert [slot.bias for slot in engine._slots] == biases[:3]


def test_the_least_recently_used_is_forgotten(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine(n_slots=3) as engine:
        for bias in biases[:3]:
            answer(engine, greedy(prompts[0], 2, bias))
        answer(engine, greedy(prompts[0], 2, biases[0]))  # now the second is the oldest
        answer(engine, greedy(prompts[0], 2, biases[3]))
        assert [slot.bias for slot in engine._slots] == [biases[0], biases[3], biases[2]]


def test_a_beginning_that_is_hardly_shared_is_not_worth_a_slot(open_engine: Make, llama: SteeredLlama) -> None:
    long, other = (llama.tokenize(b"1, 2, " + text * 30, add_bos=False) for text in (b"one, ", b"7, "))
    assert long[:2] == other[:2]
    with open_engine(n_slots=2) as engine:
        answer(engine, greedy(long, 2))
        assert answer(engine, greedy(other, 2))[0][2].n_cached == 0
        assert [bool(tokens) for tokens in held(engine)] == [True, True]


def test_what_is_in_memory_is_not_computed_again(open_engine: Make, prompts: Any) -> None:
    with open_engine() as engine:

        def ask(prompt: list[int], n_cached: int) -> list[int]:
            text, tokens, end = answer(engine, greedy(prompt, 12, slot=slot))[0]
            assert end.n_cached == n_cached
            assert (text, tokens) == alone(open_engine, prompt, max_tokens=12)[:2]
            assert slot.tokens[: len(prompt)] == prompt
            return tokens

        slot, first = engine.slot(), prompts[0]
        said = ask(first, 0)
        ask(first, len(first) - 1)  # the last token is needed for its logits
        more = first + said + prompts[1]
        ask(more, len(slot.tokens))
        ask(more[: len(more) - 3], len(more) - 4)
        ask([*more[:5], *prompts[2]], 5)
        ask(prompts[3][::-1], 0)
        slot.forget()
        assert slot.tokens == []
        ask(prompts[3][::-1], 0)


def test_forget(open_engine: Make, prompts: Any) -> None:
    """What comes does not depend on what was computed before; reserved and busy slots keep theirs."""
    with open_engine(n_slots=3) as engine:
        own = engine.slot()
        answer(engine, greedy(prompts[0], 2, slot=own))
        answer(engine, greedy(prompts[0], 2))
        running = greedy(prompts[3])
        engine.add(running)
        engine.step()
        engine.forget()
        assert [len(tokens) > 0 for tokens in held(engine)] == [True, False, True]
        engine.abort(running)
        engine.step()
        n_cached = answer(engine, greedy(prompts[0], 2))[0][2].n_cached
        assert n_cached <= 1, "no more than the token that all prompts begin with"


def test_any_history(open_engine: Make, biases: Any) -> None:
    """Whatever the slots did before, an answer is that of an engine of its own."""
    known: dict[Any, Any] = {}

    def expected(prompt: tuple[int, ...], number: int) -> Any:
        if (prompt, number) not in known:
            known[prompt, number] = alone(open_engine, list(prompt), biases[number], max_tokens=4)
        return known[prompt, number]

    rng = random.Random(11)
    for pinned in (True, False) * 4:
        with open_engine(n_slots=2, n_batch=5) as engine:
            slots = [engine.slot() if pinned else None for _ in range(2)]
            for _ in range(12):
                i = rng.randrange(2)
                numbers = [rng.randrange(4) for _ in range(2)]
                prompts = [tuple(rng.choices((300, 301), k=rng.randint(1, 9))) for _ in range(2)]
                both = [greedy(prompts[k], 4, biases[numbers[k]], slot=slots[k]) for k in range(2)]
                action = rng.choice(("ask", "ask both", "steer", "forget", "break off", "route"))
                slot = slots[i]
                if action == "ask":
                    found = answer(engine, both[i])[0]
                    assert found[:2] == expected(prompts[i], numbers[i])[:2]
                    assert np.array_equal(found[2].routing, expected(prompts[i], numbers[i])[2].routing)
                elif action == "ask both":
                    for k, found in enumerate(answer(engine, *both)):
                        assert found[:2] == expected(prompts[k], numbers[k])[:2]
                        # both in one batch: another shape rounds otherwise, and two experts may all but tie
                        differ = np.abs(found[2].routing - expected(prompts[k], numbers[k])[2].routing)
                        assert differ.sum() <= 2
                elif action == "steer" and slot is not None:
                    slot.steer(biases[numbers[i]])
                elif action == "forget":
                    engine.forget() if slot is None else slot.forget()
                elif action == "break off":
                    events = engine.generate(*both)
                    next(events)
                    events.close()
                else:
                    engine.route(prompts[i], biases[numbers[i]], rng.randrange(len(prompts[i])), slot=slot)


#
# what steers a slot
#


def test_what_another_steering_computed_is_forgotten(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine() as engine, engine.slot() as slot:
        prompt = prompts[3]
        for n, bias in enumerate((None, biases[1], biases[2], None, biases[3])):
            assert slot.steer(bias) == (n > 0)
            assert slot.bias is bias
            text, _, end = answer(engine, greedy(prompt, bias=bias, slot=slot))[0]
            assert end.n_cached == 0
            assert text == alone(open_engine, prompt, bias)[0]
            same = None if bias is None else replace(bias, provenance={"behaviour": "renamed"})
            assert not slot.steer(same), "it does the same"
            assert slot.bias is same
            again = answer(engine, greedy(prompt, bias=bias, slot=slot))[0]
            assert again[2].n_cached == len(prompt) - 1
            assert again[0] == text


def test_a_request_steers_its_slot(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine() as engine, engine.slot() as slot:
        for bias in (biases[1], None, biases[2]):
            assert (
                answer(engine, greedy(prompts[3], bias=bias, slot=slot))[0][:2]
                == (alone(open_engine, prompts[3], bias)[:2])
            )
            assert slot.bias is bias


def test_a_bias_without_values_is_none(open_engine: Make, tiny_path: Any, random_model: Any, prompts: Any) -> None:
    identity = identity_of(tiny_path)
    foreign = BiasFile(identity_of(random_model(OLMOE)), "hard", {})
    with open_engine() as engine, engine.slot() as slot:
        for empty in (BiasFile(identity, "hard", {}), BiasFile(identity, "soft", {0: np.zeros(identity.n_expert)})):
            assert not slot.steer(empty)
            assert slot.bias is None
            answer(engine, greedy(prompts[0], 1, empty, slot=slot))
            assert slot.bias is None
        with pytest.raises(ModelMismatchError):
            slot.steer(foreign)


def test_a_bias_that_is_refused_changes_nothing(
    open_engine: Make, biases: Any, prompts: Any, random_model: Any
) -> None:
    other = BiasFile.from_signs(np.eye(OLMOE.n_layer, OLMOE.n_expert), identity_of(random_model(OLMOE)))
    with open_engine() as engine, engine.slot() as slot:
        before = answer(engine, greedy(prompts[0], bias=biases[1], slot=slot))[0]
        tokens = list(slot.tokens)
        with pytest.raises(ModelMismatchError):
            slot.steer(other)
        assert slot.bias is biases[1]
        assert slot.tokens == tokens
        assert answer(engine, greedy(prompts[0], bias=biases[1], slot=slot))[0][:2] == before[:2]


def test_a_check_does_not_steer(open_engine: Make, biases: Any, prompts: Any) -> None:
    """Not even what is being answered in the slot that the library is asked with."""
    expected = alone(open_engine, prompts[3], biases[1])
    with open_engine() as engine:
        request = greedy(prompts[3], bias=biases[1])
        tokens = []
        engine.add(request)
        while engine.n_unfinished:
            engine._context._checked.clear()
            engine.check(biases[2])
            tokens += [event.token for _, event in engine.step() if isinstance(event, TokenEvent) and event.token >= 0]
        assert tokens == expected[1]


def test_force(llama: SteeredLlama, biases: Any) -> None:
    foreign = BiasFile(replace(biases[1].identity, router_sha256="0" * 64), "hard", dict(biases[1].values))
    for force in (False, True):
        with Engine(llama, n_ctx=64, n_threads=1, force=force) as engine, engine.slot() as slot:
            assert engine.force is force
            if force:
                assert slot.steer(foreign)
            else:
                with pytest.raises(ModelMismatchError):
                    slot.steer(foreign)


def test_a_bias_goes_to_the_library_when_it_changes(
    open_engine: Make, biases: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attached: list[int] = []
    real = capi.attach_row

    def counted(ctx: Any, row: int, *arguments: Any) -> None:
        attached.append(row)
        real(ctx, row, *arguments)

    monkeypatch.setattr(capi, "attach_row", counted)
    with open_engine(n_slots=2) as engine:
        same = replace(biases[1], provenance={"behaviour": "renamed"})
        answer(engine, greedy(prompts[0], 8, biases[1]))
        assert len(attached) == 1
        answer(engine, greedy(prompts[0], 8, same), greedy(prompts[1], 8, same))
        assert len(attached) == 1
        answer(engine, greedy(prompts[0], 8, biases[2]), greedy(prompts[1], 8, same))
        assert len(attached) == len(set(attached)) == 2


#
# slots of one's own
#


def test_slots_are_reserved_and_given_back(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine, open_engine() as another:
        one, two = engine.slot(), engine.slot()
        assert (engine.n_slots, engine.n_free) == (2, 0)
        for refused in (engine.slot, lambda: engine.add(greedy(prompts[0]))):
            with pytest.raises(UsageError, match="all 2 slots"):
                refused()
        running = greedy(prompts[3], None, biases[1], slot=one)
        engine.add(running)
        engine.step()
        for refused in (one.forget, lambda: one.steer(None), lambda: engine.route(prompts[0], None, 1, slot=one)):
            with pytest.raises(UsageError, match="slot is answering"):
                refused()
        one.close()
        one.close()
        assert [event.reason for _, event in engine.step() if isinstance(event, FinishEvent)] == ["cancelled"]
        for refused in (one.forget, lambda: one.steer(None), lambda: engine.add(running)):
            with pytest.raises(UsageError, match="closed"):
                refused()
        three = engine.slot()
        assert three is not one
        assert three.bias is None
        assert three.tokens == []
        assert answer(engine, greedy(prompts[0], slot=three))[0][:2] == alone(open_engine, prompts[0])[:2]
        with pytest.raises(UsageError, match="another engine"):
            another.add(greedy(prompts[0], slot=two))
    with pytest.raises(UsageError, match="closed"):
        two.forget()
    for refused in (engine.slot, lambda: engine.add(greedy(prompts[0]))):
        with pytest.raises(UsageError, match="engine is closed"):
            refused()
    for refused in (lambda: next(engine.logits([None], [1, 2])), lambda: engine.route([1, 2], None, 0)):
        with pytest.raises(UsageError, match="engine is closed"):
            refused()
    assert engine.n_unfinished == 0
    assert engine.step() == []


def test_a_reserved_slot_is_nobody_elses(open_engine: Make, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine, engine.slot() as own:
        answer(engine, greedy(prompts[0], 2, slot=own))
        tokens = list(own.tokens)
        for _, _, end in answer(engine, *(greedy(prompts[0], 2) for _ in range(3))):
            assert end.n_cached in (0, len(prompts[0]) - 1)
        assert own.tokens == tokens


def test_its_owner_does_not_wait(open_engine: Make, llama: SteeredLlama, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine, engine.slot() as own:
        for _ in range(3):
            engine.add(Request(prompts[0], sampling=endless(llama), max_tokens=9))
        mine = greedy(prompts[1], 1, slot=own)
        engine.add(mine)
        assert finished(engine) == [mine]


def test_what_waits_keeps_a_slot_to_wait_for(open_engine: Make, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine, engine.slot():
        engine.add(greedy(prompts[0], 1))
        with pytest.raises(UsageError, match="all 2 slots"):
            engine.slot()
        engine.step()
        engine.slot().close()


def test_given_tokens_need_free_slots(open_engine: Make, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine:
        items = engine.logits([None, None], prompts[0])
        next(items)
        assert engine.n_free == 0, "the slots are in use between two items"
        items.close()
        assert engine.n_free == 2
        with pytest.raises(UsageError, match="3 free slots"):
            next(engine.logits([None] * 3, prompts[0]))
        with engine.slot(), engine.slot(), pytest.raises(UsageError, match="1 free slots"):
            engine.route(prompts[0], None, 1)
