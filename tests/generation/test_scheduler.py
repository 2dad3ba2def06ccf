"""Who gets which slot and when: queueing, reuse of memory, reserved slots, rounds shared by several requests."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import BiasFile, ModelMismatchError, NativeError, SteeredLlama, UsageError
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent, _shares
from steermoe_local.llama import capi
from tests.support.generation import GREEDY, alone, answer, endless, greedy
from tests.support.low_level import identity_of
from tests.support.random_models import OLMOE

Make = Callable[..., Engine]


def finished(engine: Engine) -> list[Request]:
    """The requests that end in the next step."""
    return [request for request, event in engine.step() if isinstance(event, FinishEvent)]


def held(engine: Engine) -> list[list[int]]:
    return [slot.tokens for slot in engine._slots]


#
# queueing
#


def test_more_requests_than_slots(open_engine: Make, biases: Any, prompts: Any) -> None:
    """All are answered as alone, in the order in which they came as far as they are equally long."""
    cases = [(prompts[i % 4], biases[i % 4]) for i in range(7)]
    expected = [alone(open_engine, *case) for case in cases]
    for n_slots in (1, 2, 3):
        with open_engine(n_slots=n_slots) as engine:
            for found, wanted in zip(answer(engine, *(greedy(p, bias=b) for p, b in cases)), expected, strict=True):
                assert found[:2] == wanted[:2]
                assert np.array_equal(found[2].routing, wanted[2].routing) or n_slots > 1  # else rounded otherwise


def test_first_come_first_served(open_engine: Make, llama: SteeredLlama, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine:
        requests = [Request(prompts[0], None, endless(llama), n) for n in (3, 5, 2, 4, 1)]
        for request in requests:
            engine.add(request)
        assert (engine.n_unfinished, engine.n_waiting, engine.n_free) == (5, 5, 0)
        started: list[Request] = []
        while engine.n_unfinished:
            for request, _ in engine.step():
                if request not in started:
                    started.append(request)
        assert started == requests
        assert (engine.n_waiting, engine.n_free) == (0, 2)


def test_free_slots_are_counted_without_those_that_wait(open_engine: Make, prompts: Any) -> None:
    with open_engine(n_slots=3) as engine:
        assert engine.n_free == 3
        engine.add(greedy(prompts[0]))
        assert (engine.n_waiting, engine.n_free) == (1, 2)
        engine.step()
        assert (engine.n_waiting, engine.n_free) == (0, 2)
        with engine.slot():
            assert engine.n_free == 1
        assert engine.n_free == 2


def test_a_request_that_is_aborted_while_it_waits(open_engine: Make, prompts: Any) -> None:
    with open_engine() as engine:
        first, second, third = (greedy(prompt) for prompt in prompts[:3])
        for request in (first, second, third):
            engine.add(request)
        engine.step()
        engine.abort(second)
        assert engine.n_unfinished == 2
        events = engine.step()
        (end,) = (event for request, event in events if request is second)
        assert (end.reason, end.n_prompt, end.n_cached, end.n_rows) == ("cancelled", len(prompts[1]), 0, 0)
        assert (end.prompt_seconds, end.routing) == (0, None)
        ends = [request for request, event in events if isinstance(event, FinishEvent) and request is not second]
        while engine.n_unfinished:
            ends += finished(engine)
        assert ends == [first, third]
        assert answer(engine, second)[0][:2] == alone(open_engine, prompts[1])[:2]


def test_an_aborted_request_makes_room_at_once(open_engine: Make, prompts: Any) -> None:
    with open_engine() as engine:
        first, second = greedy(prompts[3]), greedy(prompts[0], 1)
        engine.add(first)
        engine.step()
        engine.add(second)
        engine.abort(first)
        assert finished(engine) == [first, second], "the second began with the step that reports the first"


def test_a_closed_iterator_drops_what_waits(open_engine: Make, prompts: Any) -> None:
    with open_engine() as engine:
        events = engine.generate(*(greedy(prompt) for prompt in prompts))
        next(events)
        assert engine.n_waiting == len(prompts) - 1
        other = greedy(prompts[0], 2)
        engine.add(other)
        events.close()
        assert (engine.n_unfinished, engine.n_waiting) == (1, 1)
        while engine.n_unfinished:
            assert all(request is other for request, _ in engine.step())


def test_a_failed_decode_leaves_what_waits(open_engine: Make, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_engine() as engine:
        first, second = greedy(prompts[0]), greedy(prompts[1])
        engine.add(first)
        engine.add(second)
        with monkeypatch.context() as patch:
            patch.setattr(capi.llama_cpp(), "llama_decode", lambda *_: -3)
            with pytest.raises(NativeError):
                engine.step()
        text, ends = "", []
        while engine.n_unfinished:
            for request, event in engine.step():
                if isinstance(event, FinishEvent):
                    ends.append((request, event.reason))
                else:
                    assert request is second
                    text += event.text
        assert ends[0] == (first, "cancelled")
        assert ends[1][0] is second
        assert text == alone(open_engine, prompts[1])[0]


def test_a_request_is_added_once(open_engine: Make, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine:
        request = greedy(prompts[0])
        engine.add(request)
        with pytest.raises(UsageError, match="being answered"):
            engine.add(request)
        assert engine.n_unfinished == 1


def test_what_does_not_fit_is_refused_before_its_turn(open_engine: Make, prompts: Any, random_model: Any) -> None:
    """A bias of another model, or a grammar that is none, does not wait in order to fail."""
    foreign = BiasFile.from_signs(np.eye(OLMOE.n_layer, OLMOE.n_expert), identity_of(random_model(OLMOE)))
    with open_engine() as engine:
        running = greedy(prompts[3])
        engine.add(running)
        engine.step()
        with pytest.raises(ModelMismatchError):
            engine.add(greedy(prompts[0], bias=foreign))
        with pytest.raises(UsageError, match="grammar"):
            engine.add(Request(prompts[0], sampling=Sampling(grammar="nonsense")))
        with pytest.raises(ModelMismatchError):
            engine.check(foreign)
        text = "".join(event.text for _ in range(40) for _, event in engine.step() if isinstance(event, TokenEvent))
        assert alone(open_engine, prompts[3])[0].endswith(text)
        assert text


def test_thousands_may_wait(open_engine: Make, prompts: Any) -> None:
    """They are cheap: their samplers, which hold a table of the vocabulary, are made when their turn comes."""
    with open_engine() as engine:
        for _ in range(2000):
            engine.add(greedy(prompts[0]))
        assert all(state._sampler is None for state in engine._states.values())
        engine.step()
        assert sum(state._sampler is not None for state in engine._states.values()) == 1


#
# rounds
#


def test_steerings_at_once(open_engine: Make, biases: Any, prompts: Any) -> None:
    """Requests under different steerings, in any order of arrival, are answered as each is alone."""
    cases = [(prompts[i % len(prompts)], biases[i % 3 if i < 3 else 3]) for i in range(5)]
    sampling = [GREEDY if i % 2 else Sampling(temperature=1.5, seed=i) for i in range(5)]
    expected = [alone(open_engine, *case, sampling=s) for case, s in zip(cases, sampling, strict=True)]
    for seed in range(4):
        rng = random.Random(seed)
        order = rng.sample(range(5), 5)
        with open_engine(n_slots=5, n_batch=16) as engine:
            requests: dict[Request, int] = {}
            events: dict[int, list[Any]] = {i: [] for i in range(5)}
            while order or engine.n_unfinished:
                for _ in range(min(len(order), rng.randrange(3))):
                    i = order.pop()
                    request = Request(*cases[i], sampling[i], 24)
                    requests[request] = i
                    engine.add(request)
                for request, event in engine.step():
                    events[requests[request]].append(event)
        for i, (text, tokens, end) in enumerate(expected):
            *pieces, finish = events[i]
            assert "".join(piece.text for piece in pieces) == text
            assert [piece.token for piece in pieces if piece.token >= 0] == tokens
            assert (finish.reason, finish.n_rows) == (end.reason, end.n_rows)
            assert np.array_equal(finish.routing, end.routing), "rows of another slot are counted"


def test_answers_flow_while_a_prompt_is_computed(llama: SteeredLlama, open_engine: Make) -> None:
    with open_engine(n_slots=3, n_batch=16) as engine:
        running = Request(llama.tokenize(b"one"), sampling=endless(llama))
        long, short = (greedy(llama.tokenize(b"1, 2, " * n), 1) for n in (40, 3))
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


def test_requests_of_others_go_on(open_engine: Make, prompts: Any) -> None:
    """What comes for another request while `generate` runs is given out by `step`."""
    expected = [alone(open_engine, prompt) for prompt in prompts[:2]]
    with open_engine(n_slots=2) as engine:
        other = greedy(prompts[0])
        engine.add(other)
        events = engine.generate(greedy(prompts[1]))
        assert "".join(event.text for _, event in events if isinstance(event, TokenEvent)) == expected[1][0]
        text = ""
        while True:
            found = engine.step()
            text += "".join(event.text for _, event in found if isinstance(event, TokenEvent))
            if any(isinstance(event, FinishEvent) for _, event in found):
                break
        assert text == expected[0][0]


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
    real = capi.attach_sequence

    def counted(ctx: Any, index: int, *arguments: Any) -> None:
        attached.append(index)
        real(ctx, index, *arguments)

    monkeypatch.setattr(capi, "attach_sequence", counted)
    with open_engine(n_slots=2) as engine:
        same = replace(biases[1], provenance={"behaviour": "renamed"})
        answer(engine, greedy(prompts[0], 8, biases[1]))
        n = len(attached)
        assert n >= 1
        answer(engine, greedy(prompts[0], 8, same))
        assert len(attached) == n


#
# slots of one's own
#


def test_slots_are_reserved_and_given_back(open_engine: Make, biases: Any, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine, open_engine() as another:
        one, two = engine.slot(), engine.slot()
        assert (engine.n_slots, engine.n_free) == (2, 0)
        for refused in (engine.slot, lambda: engine.add(greedy(prompts[0]))):
            with pytest.raises(UsageError, match="all 2 slots are taken"):
                refused()
        running = greedy(prompts[3], None, biases[1], slot=one)
        engine.add(running)
        engine.step()
        for refused in (one.forget, lambda: one.steer(None), lambda: engine.route(prompts[0], None, 1, slot=one)):
            with pytest.raises(UsageError, match="this slot is answering; abort the request"):
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
        with pytest.raises(UsageError, match="the engine is closed"):
            refused()
    assert engine.n_unfinished == 0


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
        with pytest.raises(UsageError, match="slots are taken"):
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
        with pytest.raises(UsageError, match="3 free slots are needed"):
            next(engine.logits([None] * 3, prompts[0]))
        with engine.slot(), engine.slot(), pytest.raises(UsageError, match="1 free slots are needed"):
            engine.route(prompts[0], None, 1)
