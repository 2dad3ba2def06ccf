"""Requests that are aborted, interrupted between any two lines, or lost with a failed decode."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import UsageError
from steermoe_local.generation.engine import FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.llama import capi
from tests.support.generation import alone, answer, greedy
from tests.support.placed import plan


def test_abort(open_engine: Any, prompts: Any) -> None:
    with open_engine(n_slots=2) as engine:
        one, two = (greedy(prompt) for prompt in (prompts[3], prompts[2]))
        engine.add(one)
        engine.add(two)
        engine.abort(one)
        (request, event), *_ = engine.step()
        assert request is one
        assert (event.reason, event.n_generated, event.n_rows) == ("cancelled", 0, 0)
        engine.abort(one)  # nothing to cancel any more
        three = replace(one)
        engine.add(three)
        for _ in range(3):
            engine.step()
        engine.abort(two)
        (event,) = (event for request, event in engine.step() if request is two)
        assert (event.reason, event.n_generated, event.n_rows) == ("cancelled", 4, 4)
        assert event.routing.sum() == 4 * len(event.routing) * engine.identity.n_expert_used
        engine.abort(three)
        assert engine.step()[-1][0] is three
        assert engine.n_unfinished == 0
        for prompt in (prompts[2], prompts[3], prompts[3]):
            assert answer(engine, greedy(prompt))[0][:2] == alone(open_engine, prompt)[:2]


def test_aborting_gives_out_what_was_held_back(open_engine: Any, prompts: Any) -> None:
    full = alone(open_engine, prompts[3])[0]
    with open_engine() as engine:
        request = greedy(prompts[3], None, stop=(full + "!",))
        engine.add(request)
        events = [event for _ in range(4) for _, event in engine.step()]
        assert "".join(event.text for event in events) == ""
        engine.abort(request)
        rest, end = (event for _, event in engine.step())
        assert rest == TokenEvent(alone(open_engine, prompts[3], max_tokens=4)[0], -1)
        assert (end.reason, end.n_generated) == ("cancelled", 4)


def test_a_closed_iterator_cancels(open_engine: Any, prompts: Any) -> None:
    with open_engine() as engine:
        slot = engine.slot()
        for n in (1, 2, 5):
            events = engine.generate(greedy(prompts[3], None, slot=slot))
            for _ in range(n):
                next(events)
            with pytest.raises(UsageError, match="slot is answering"):
                engine.add(greedy(prompts[0], slot=slot))
            events.close()
            assert engine.n_unfinished == 0
            assert slot.tokens[: len(prompts[3])] == prompts[3]
            assert engine.step() == []
            for prompt in (prompts[3], prompts[0]):
                assert answer(engine, greedy(prompt, slot=slot))[0][:2] == alone(open_engine, prompt)[:2]


PARTS = {("generation", name) for name in ("engine", "request_state", "text_steering", "slots", "context")}
PARTS |= {("llama", name) for name in ("sampling", "detokenizer", "capi", "native_recorder", "plan_state", "phases")}


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
        wanted = (path.parent.name, path.stem) in PARTS
        return self._line if wanted and "__del__" not in callers else None  # a finaliser cannot raise

    def _line(self, frame: Any, event: str, _: Any) -> Any:
        if event == "line":
            self.lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(self.lines) == self._at:
                raise KeyboardInterrupt
        return self._line


@pytest.mark.parametrize("planned", [False, True])
def test_an_interrupt_anywhere_leaves_everything_valid(
    open_engine: Any, biases: Any, prompts: Any, planned: bool
) -> None:
    """Ctrl-C can come between any two lines; what a slot says it holds is in memory all the same."""
    lib = capi.llama_cpp()
    hot = Sampling(temperature=1.5, seed=2, repeat_penalty=1.1)
    if planned:
        shape = biases[1].identity.shape
        scores = np.random.default_rng(3).normal(size=shape)
        biases = [
            plan(("answer[1:]", biases[1]), ("prompt[-3:]", biases[2])),
            plan(
                ("answer when m < 0 over last 1", biases[1]),
                ("answer when m > -99 over prompt", biases[3]),
                ("answer when entropy > 0.1", biases[2]),
                scores=scores,
            ),
            plan(("all every 2", biases[3])),
        ]
    expected = [alone(open_engine, prompts[i], biases[i], sampling=hot, max_tokens=3)[:2] for i in (0, 1)]
    with open_engine(n_slots=3, n_batch=8) as engine:
        slots = [engine.slot() for _ in range(2)]

        def requests() -> list[Request]:
            return [Request(prompts[i], biases[i], hot, 3, stop=("zzz",), slot=slot) for i, slot in enumerate(slots)]

        def ask() -> None:
            for i, slot in enumerate(slots):
                slot.steer(biases[1 - i])  # something to forget
            others = [Request(prompts[2], biases[2], hot, 3), Request(prompts[2], biases[2], hot, 3)]  # one waits
            list(engine.generate(*requests(), *others))

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
            while engine.n_unfinished:  # only if it came while the iterator was being closed
                engine.step()
            assert engine.step() == [], "something is left of what was given up"
            memory = engine._context._memory
            for slot in engine._slots:
                assert lib.llama_memory_seq_pos_max(memory, slot.index) + 1 >= len(slot.tokens), at
                assert min(len(slot._keys), len(slot._selected)) >= len(slot.tokens) == len(slot.keys), at
            found = answer(engine, *requests())
            assert [case[:2] for case in found] == expected, at
            for i, (_, _, end) in enumerate(found):
                assert end.routing.sum() == end.n_rows * len(end.routing) * engine.identity.n_expert_used, (at, i)
        assert n_raised > 0.95 * len(set(whole.lines)) > 120


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("name", ["attach_row", "set_token_rows"])
def test_an_interrupt_behind_a_change_of_steering(
    open_engine: Any, biases: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch, number: int, name: str
) -> None:
    """The library has a new bias, or the rows of tokens that are not decoded, and nobody was told."""
    real = getattr(capi, name)

    def interrupted(*arguments: Any) -> None:
        real(*arguments)
        raise KeyboardInterrupt

    with open_engine() as engine:
        slot = engine.slot()
        answer(engine, greedy(prompts[3], 2, biases[number], slot=slot))
        with monkeypatch.context() as patch:
            patch.setattr(capi, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                answer(engine, greedy(prompts[3], 2, biases[3], slot=slot))
        engine.step()
        found = answer(engine, greedy(prompts[3], 24, biases[number], slot=slot))[0]
        expected = alone(open_engine, prompts[3], biases[number])
        assert found[:2] == expected[:2]
        assert np.array_equal(found[2].routing, expected[2].routing)


def test_a_failed_decode(open_engine: Any, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that ran ends as cancelled, and the slots can be used."""
    with open_engine(n_slots=2) as engine:
        requests = [greedy(prompt) for prompt in prompts[:2]]
        engine.add(requests[0])
        engine.step()
        engine.add(requests[1])
        with monkeypatch.context() as patch:
            patch.setattr(capi.llama_cpp(), "llama_decode", lambda *_: -3)
            with pytest.raises(capi.NativeError, match=r"llama_decode .*-3"):
                engine.step()
        ends = [(request, event.reason) for request, event in engine.step() if isinstance(event, FinishEvent)]
        assert ends == [(requests[0], "cancelled"), (requests[1], "cancelled")]
        for request, found in zip(requests, answer(engine, *requests), strict=True):
            assert found[:2] == alone(open_engine, list(request.tokens))[:2]
