"""Steerings of sequences, their oracle, and batches of several sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from tests.native.test_native_oracle import layer_values, weight_rows
from tests.support import oracle, rounding
from tests.support.low_level import Context, Row, native_bias, random_signs
from tests.support.random_models import N_EMBD, N_VOCAB, OLMOE, RandomModel

Loaded = tuple[ModelIdentity, Any]
ARGUMENT = 5  # steermoe.h: STEERMOE_ERR_ARGUMENT


@dataclass(frozen=True)
class Steering:
    """The steering of a sequence: rows by layer; no rows: unsteered."""

    rows: dict[int, Any] = field(default_factory=dict)
    mode: str = "hard"
    epsilon: float = 0.01
    cap: float = float("inf")  # of the capped rule

    def native(self, identity: ModelIdentity) -> capi.NativeBias:
        return native_bias(identity, self.rows, self.mode, self.epsilon, self.cap)

    def logits(self, z: Any, layer: int) -> Any:
        """The oracle's edit of one layer's logits."""
        row = self.rows.get(layer)
        return z if row is None else oracle.steer(z, self.mode, row, self.epsilon, self.cap)


NONE = Steering()


def allowance(logits: Any) -> float:
    """Of the logits of OLMOE with a cache in F32."""
    return rounding.logits(logits, OLMOE.n_layer, N_EMBD)


def steerings(identity: ModelIdentity, seed: int = 1) -> list[Steering]:
    """Hard rules of different layers and epsilon, soft ones, capped ones of several caps, and none."""
    rng = np.random.default_rng(seed)
    n, k, layers = identity.n_expert, identity.n_expert_used, range(identity.n_layer)

    def signs(n_plus: int, n_minus: int) -> Any:
        return random_signs(rng, n, k, n_plus, n_minus)

    return [
        Steering({layer: signs(1, n // 2) for layer in layers}),
        Steering({layer: rng.normal(scale=2, size=n).astype(np.float32) for layer in layers}, "soft"),
        NONE,
        Steering({identity.n_layer - 1: signs(k, n - k)}, epsilon=2.5),
        Steering({0: signs(0, n - k), 1: signs(1, 0)}, epsilon=20.0),
        Steering({1: np.linspace(-30, 30, n, dtype=np.float32)}, "soft"),
        Steering({layer: signs(k, 0) for layer in layers}, epsilon=1e-3),
        Steering({layer: signs(1, n // 2) for layer in layers}, "capped", cap=1.5),
        Steering({0: signs(k, n - k), identity.n_layer - 1: signs(0, n - k)}, "capped", 2.5, 0.25),
        Steering({1: signs(k, 0)}, "capped"),
        Steering({layer: signs(1, 1) for layer in layers}, "capped", cap=0.0),
    ]


def attach(context: Context, identity: ModelIdentity, given: Sequence[Steering | None]) -> None:
    """Steer sequence s by given[s]; None: leave it to the context."""
    for sequence, steering in enumerate(given):
        if steering is not None:
            capi.attach_sequence(context.ctx, sequence, steering.native(identity) if steering.rows else None)


def tokens(sequence: int, n: int) -> list[int]:
    rng = np.random.default_rng(100 + sequence)
    return [int(token) for token in rng.integers(0, N_VOCAB, n)]


def turns(n_sequences: int, first: int, last: int) -> list[Row]:
    """Positions first..last of all sequences, taking turns; every token is an output."""
    ids = [tokens(s, last) for s in range(n_sequences)]
    return [(ids[s][i], i, s, True) for i in range(first, last) for s in range(n_sequences)]


def check_layer(
    model: RandomModel, seen: dict[str, list[Any]], layer: int, under: Sequence[Steering], of_rows: Any
) -> None:
    steered_here = any(layer in s.rows for s in under)
    gpt_oss = model.arch == "gpt-oss"
    raw, steered = "ffn_moe_logits", "ffn_moe_logits_steered"
    if gpt_oss:
        raw, steered = "ffn_moe_logits_biased" if steered_here else "ffn_moe_probs", "ffn_moe_probs"
    else:
        assert (f"{steered}-{layer}" in seen) == steered_here
    z = layer_values(seen, raw, layer)
    expected = z.copy()
    for sequence, steering in enumerate(under):
        mine = of_rows == sequence
        expected[mine] = steering.logits(z[mine], layer)
    if steered_here:
        edited = layer_values(seen, steered, layer)
        assert (edited + np.float32(0)).tobytes() == (expected + np.float32(0)).tobytes(), f"layer {layer}"
        untouched = expected == z
        assert edited[untouched].tobytes() == z[untouched].tobytes(), f"layer {layer}: untouched logits changed"
    topk = layer_values(seen, "ffn_moe_topk", layer)
    wanted = oracle.chosen(expected, model.k)
    assert np.array_equal(np.sort(topk, axis=1), np.sort(wanted, axis=1)), f"layer {layer}: another choice"
    gating = "softmax-weight" if gpt_oss else "softmax"
    last = "ffn_moe_weights_softmax" if gpt_oss else "ffn_moe_weights_norm" if model.norm else "ffn_moe_weights"
    weights = weight_rows(seen, last, layer, model.k)
    np.testing.assert_array_less(
        np.abs(weights - oracle.weights(expected, topk, gating, model.norm)),
        oracle.weight_allowance(expected, topk, gating.replace("-", "_"), model.norm),
    )
