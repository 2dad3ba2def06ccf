"""When requests get a slot: queueing, aborting, failing, and rounds shared by several requests."""

from __future__ import annotations

import random
from collections.abc import Callable
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

pytestmark = pytest.mark.numeric

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
