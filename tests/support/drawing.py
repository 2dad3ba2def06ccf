"""Tokens drawn from logits that four of them share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from steermoe_local.llama.sampling import Sampler, Sampling

PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
LIKELY = {300: 0.5, 301: 0.3, 302: 0.15, 303: 0.05}


def likely_logits(n_vocab: int) -> Any:
    """Four tokens share all the probability, as `LIKELY` says."""
    values = np.full(n_vocab, -1e4, np.float32)
    for token, probability in LIKELY.items():
        values[token] = math.log(probability) + 3  # logits are not normalised
    return values


def draw(vocab: Any, logits: Any, sampling: Sampling, n: int, prompt: tuple[int, ...] = ()) -> list[int]:
    """Tokens drawn one after the other, each accepted."""
    sampler = Sampler(vocab, sampling, prompt, 64)
    tokens = []
    for _ in range(n):
        token = sampler.sample(logits)
        assert token is not None
        sampler.accept(token)
        tokens.append(token)
    sampler.close()
    return tokens
