"""Engines on the embedded model, and chats on one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, Message, SteeredLlama
from steermoe_local.generation.chat import Chat
from steermoe_local.generation.engine import Engine
from steermoe_local.steering.steering import Steering
from tests.support.generation import GREEDY, QUESTIONS
from tests.support.low_level import identity_of, random_signs


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
    """Questions in the model's template."""
    with Engine(llama, n_ctx=256, n_threads=1) as engine:
        return [engine.renderer.render((Message("user", question),)).tokens for question in QUESTIONS]


@pytest.fixture(scope="module")
def engine(llama: SteeredLlama) -> Iterator[Engine]:
    with Engine(llama, n_ctx=256, n_slots=3, n_batch=64, n_threads=1) as engine:
        yield engine


@pytest.fixture
def new(engine: Engine) -> Iterator[Any]:
    """Makes greedy chats on the module's engine, and closes them."""
    chats: list[Chat] = []

    def make(steering: Steering | None = None, **arguments: Any) -> Chat:
        chats.append(Chat(engine, steering=steering, **({"sampling": GREEDY} | arguments)))
        return chats[-1]

    yield make
    for chat in chats:
        chat.close()
