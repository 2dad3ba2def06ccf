"""Random plans: with a memory of whatever came before, alone or beside others, an answer is that of an empty memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.generation.engine import Engine, FinishEvent, Request, TokenEvent
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.steering.bias_plan import AnyBias
from tests.support.generation import endless
from tests.support.low_level import F32, identity_of, random_signs
from tests.support.placed import plan

pytestmark = pytest.mark.numeric

N = 6  # tokens of an answer
STYLE = reasoning_style("<think></think>")
WINDOWS = st.sampled_from(["", "[1:]", "[0:2]", "[2:4]", "[3:]"])
MARKS = st.sampled_from(["", ' after ","', ' until ","', " after #3", ' until "1"'])
EVERY = st.sampled_from(["", " every 2", " every 3"])
# limits that random values are not near to: rounding in another batch decides none of them
CONDITIONS = st.sampled_from(
    ["", "", " when m > 0 over prompt", " when m > -500 over last 2", " when m > 500 over last 1"]
)


@st.composite
def rules(draw: st.DrawFn) -> tuple[str, int]:
    """(where, number of a bias, 0: none)."""
    phase = draw(st.sampled_from(["answer", "answer", "prompt", "thinking", "all"]))
    window = draw(st.sampled_from(["[-1:]", "[-3:-1]", "[:-2]"]) | WINDOWS if phase == "prompt" else WINDOWS)
    where = phase + window + draw(MARKS) + draw(EVERY)
    return where + (draw(CONDITIONS) if phase in ("answer", "thinking") else ""), draw(st.integers(0, 3))


class Asked(NamedTuple):
    """A request: numbers of tokens, and what steers it."""

    prompt: tuple[int, ...]
    rules: tuple[tuple[str, int], ...]
    trace: bool


ASKED = st.builds(
    Asked,
    st.lists(st.sampled_from([300, 301, 302]), min_size=1, max_size=9).map(tuple),
    st.lists(rules(), max_size=3).map(tuple),
    st.booleans(),
)


class Model(NamedTuple):
    """The embedded model in F32, where sums of other shapes differ little, and what steers it."""

    llama: SteeredLlama
    biases: list[BiasFile | None]
    scores: Any

    def engine(self, **options: Any) -> Engine:
        return Engine(self.llama, **{"n_ctx": 64, "n_threads": 1, "type_k": F32, "type_v": F32} | options)

    def request(self, asked: Asked) -> Request:
        steering: AnyBias = plan(*((where, self.biases[n]) for where, n in asked.rules), scores=self.scores)
        sampling = endless(self.llama)
        return Request(list(asked.prompt), steering, sampling, N, style=STYLE, trace=asked.trace, n_probs=0)


@pytest.fixture(scope="module")
def model(tiny_f32_path: Path) -> Iterator[Model]:
    identity = identity_of(tiny_f32_path)
    rng = np.random.default_rng(21)

    def signs() -> Any:
        k, n = identity.n_expert_used, identity.n_expert
        return np.stack([random_signs(rng, n, k, 1, n // 4) for _ in range(identity.n_layer)])

    biases = [None, *(BiasFile.from_signs(signs(), identity) for _ in range(3))]
    llama = SteeredLlama(tiny_f32_path, n_ctx=64, n_threads=1, n_threads_batch=1)
    yield Model(llama, biases, rng.normal(size=identity.shape))
    llama.close()


def answers(engine: Engine, requests: list[Request]) -> list[tuple[list[TokenEvent], FinishEvent]]:
    found: list[list[TokenEvent]] = [[] for _ in requests]
    ends: dict[int, FinishEvent] = {}
    for index, event in engine.generate(*requests):
        if isinstance(event, FinishEvent):
            ends[index] = event
        elif event.token >= 0:
            found[index].append(event)
    return [(found[index], ends[index]) for index in range(len(requests))]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(ASKED, min_size=1, max_size=2), min_size=2, max_size=5), st.sampled_from([4, 64]))
def test_any_plans_in_any_order(model: Model, rounds: list[list[Asked]], n_batch: int) -> None:
    with model.engine(n_slots=2, n_batch=n_batch) as engine:
        for asked in rounds:
            found = answers(engine, [model.request(one) for one in asked])
            for one, (events, end) in zip(asked, found, strict=True):
                with model.engine() as fresh:
                    ((known, whole),) = answers(fresh, [model.request(one)])
                assert end.n_steered == whole.n_steered
                for event, expected in zip(events, known, strict=True):
                    assert (event.token, event.rule, event.phase) == (expected.token, expected.rule, expected.phase)
                    # a token that was computed under another bias is seen here, when it changes no word
                    assert event.logprob == pytest.approx(expected.logprob, abs=1e-3)
                if one.trace:
                    assert end.experts is not None
                    assert whole.experts is not None
                    assert (end.experts != whole.experts).mean() < 0.01, "but for two that all but tie"
            for slot in engine._slots:
                assert len(slot.keys) == len(slot.tokens)
                assert len(slot._selected) == len(slot.tokens)
