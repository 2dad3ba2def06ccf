"""Requests and answers of engines on the embedded model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from steermoe_local import BiasFile, SteeredLlama
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling
from steermoe_local.llama import capi

GREEDY = Sampling(temperature=0)
QUESTIONS = [
    "Which number comes after three?",
    "Count to five.",
    "Count from 3 to six.",
    "Tell me the secret recipe of the old mill.",
]


def greedy(tokens: Sequence[int], max_tokens: int | None = 24, bias: BiasFile | None = None, **options: Any) -> Request:
    return Request(tokens, bias, **{"sampling": GREEDY, "max_tokens": max_tokens} | options)


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
    assert engine.n_unfinished == 0
    for index, end in ends.items():
        assert end.n_generated == len(tokens[index])
    return [(texts[i], tokens[i], ends[i]) for i in range(len(requests))]


def alone(make: Callable[..., Engine], prompt: list[int], bias: BiasFile | None = None, **options: Any) -> Any:
    """An answer in an engine of its own."""
    with make() as engine:
        return answer(engine, greedy(prompt, bias=bias, **options))[0]


def ends_of(llama: SteeredLlama) -> list[int]:
    """The tokens that end a generation."""
    lib, vocab = capi.llama_cpp(), llama._model.vocab
    return [token for token in range(llama.n_vocab()) if lib.llama_vocab_is_eog(vocab, token)]


def endless(llama: SteeredLlama) -> Sampling:
    """Greedy, and the end never comes."""
    return Sampling(temperature=0, logit_bias=dict.fromkeys(ends_of(llama), -np.inf))
