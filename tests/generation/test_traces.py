"""The experts that every token of an answer selected (`Request.trace`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import SteeredLlama
from steermoe_local.generation.engine import Engine, FinishEvent, Request
from tests.support.generation import answer, endless, greedy
from tests.support.low_level import identity_of
from tests.support.placed import plan
from tests.support.random_models import DENSE_FIRST
from tests.support.token_loop import TokenLoop

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def loop(tiny_model: Any, tiny_path: Path) -> Iterator[TokenLoop]:
    with TokenLoop(tiny_model, identity_of(tiny_path)) as loop:
        yield loop


def traced(engine: Engine, *requests: Request) -> list[tuple[list[int], FinishEvent]]:
    return [(tokens, end) for _, tokens, end in answer(engine, *requests)]


def test_every_layer_of_every_token(
    open_engine: Any, llama: SteeredLlama, loop: TokenLoop, biases: Any, prompts: Any, tiny_path: Path
) -> None:
    """Those that a loop sees that reads the same tokens, steered or not; the one that was drawn last is not read."""
    identity = identity_of(tiny_path)
    prompt = prompts[2]
    for bias, own in (
        (None, lambda n: [None] * n),
        (biases[2], lambda n: [biases[2]] * n),
        (plan(("answer", biases[1])), lambda n: [None] * (len(prompt) - 1) + [biases[1]] * (n + 1 - len(prompt))),
    ):
        with open_engine() as engine:
            ((tokens, end),) = traced(engine, Request(prompt, bias, endless(llama), 6, trace=True))
        text = [*prompt, *tokens[:-1]]
        assert end.experts is not None
        assert end.experts.dtype == np.int32
        assert end.experts.shape == (len(text), identity.n_layer, identity.n_expert_used)
        assert len(text) == end.n_prompt - 1 + end.n_rows
        assert np.array_equal(
            end.experts[len(prompt) :], loop.one_by_one(text, own(len(text)), len(prompt)).experts[len(prompt) :]
        )
        assert np.array_equal(end.experts[: len(prompt)], loop.at_once(prompt, own(len(prompt))).experts)
        # the rows that were drawn from are those of the counts
        rows = end.experts[end.n_prompt - 1 :]
        counts = np.stack(
            [np.bincount(rows[:, i].ravel(), minlength=identity.n_expert) for i in range(identity.n_layer)]
        )
        assert np.array_equal(end.routing, counts)


def test_the_end_was_drawn_from_the_last_token(open_engine: Any, prompts: Any) -> None:
    with open_engine() as engine:
        ((tokens, end),) = traced(engine, greedy(prompts[3], None, trace=True))
        assert end.reason == "stop"
        assert end.experts is not None
        assert len(end.experts) == len(prompts[3]) + len(tokens)


def test_memory_is_used_where_the_experts_are_known(open_engine: Any, llama: SteeredLlama, prompts: Any) -> None:
    prompt = prompts[2]

    def ask(tokens: list[int], trace: bool) -> tuple[list[int], FinishEvent]:
        return traced(engine, Request(tokens, None, endless(llama), 4, trace=trace))[0]

    with open_engine() as engine:
        said, _ = ask(prompt, False)
        _, first = ask(prompt, True)
        assert first.n_cached == 0
        _, again = ask(prompt, True)
        assert again.n_cached == len(prompt) - 1
        assert np.array_equal(first.experts, again.experts)
        longer = [*prompt, *said, *prompts[0]]
        _, more = ask(longer, True)
        assert more.n_cached == len(prompt) + 3
        assert more.experts is not None
        assert np.array_equal(more.experts[: len(prompt) + 3], first.experts)
        assert (more.experts >= 0).all()
        _, plain = ask(longer, False)
        assert plain.n_cached == len(longer) - 1
        assert plain.experts is None


def test_a_long_prompt_is_read_in_pieces(open_engine: Any, prompts: Any, llama: SteeredLlama, biases: Any) -> None:
    """Each traced token is an output, which has logits over the whole vocabulary; beside one without a trace."""
    long = (prompts[2] + prompts[3] + prompts[1]) * 4
    assert 100 < len(long) < 200
    with open_engine(n_slots=2) as engine:
        sizes: list[list[int]] = []
        decode = engine._context.decode

        def watched(parts: Any) -> Any:
            sizes.append([part.n_outputs for part in parts])
            return decode(parts)

        engine._context.decode = watched
        requests = [
            Request(long, biases[1], endless(llama), 3, trace=True),
            Request(prompts[0], None, endless(llama), 3),
        ]
        (_, end), (_, other) = traced(engine, *requests)
        assert max(n for step in sizes for n in step) == 64
        assert other.experts is None
        assert end.experts is not None
        assert end.experts.shape[0] == len(long) + 2
        assert (end.experts >= 0).all()


def test_cancelled(open_engine: Any, prompts: Any, llama: SteeredLlama) -> None:
    """What was read until then; nothing before the beginning."""
    with open_engine(n_slots=2) as engine:
        request, early = (Request(prompts[2], None, endless(llama), trace=True) for _ in range(2))
        engine.add(request)
        for _ in range(3):
            engine.step()
        engine.add(early)
        engine.abort(request)
        engine.abort(early)
        ends = {request: event for request, event in engine.step() if isinstance(event, FinishEvent)}
        found = ends[request].experts
        assert found is not None
        assert len(found) == len(prompts[2]) + 2
        assert ends[early].experts is None


def test_layers_without_a_router(random_model: Any) -> None:
    path = random_model(DENSE_FIRST)
    model = SteeredLlama(path, n_ctx=32, n_threads=1)
    with Engine(model, n_ctx=64, n_threads=1) as engine:
        ((_, end),) = traced(engine, greedy([1, 2, 3], 4, trace=True))
        assert end.experts is not None
        assert (end.experts[:, 0] == -1).all()
        assert (end.experts[:, 1:] >= 0).all()
    model.close()
