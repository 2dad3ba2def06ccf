"""The steered graph against a NumPy oracle: edited logits bit for bit, choice and order exactly, weights as rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from steermoe_local.llama import capi
from tests.support import oracle
from tests.support.low_level import Context, identity_of, native_bias, open_model, random_signs
from tests.support.random_models import DENSE_FIRST, N_VOCAB, RandomModel

pytestmark = pytest.mark.numeric

TOKENS = np.random.default_rng(3).integers(0, N_VOCAB, 24).tolist()
N_PROMPT = 20  # the rest is decoded token by token

Rows = dict[int, Any]


def all_layers(make: Callable[[RandomModel, np.random.Generator], Any]) -> Callable[[RandomModel], Rows]:
    def rows(model: RandomModel) -> Rows:
        rng = np.random.default_rng(7)
        return {layer: make(model, rng) for layer in range(model.n_dense, model.n_layer)}

    return rows


def first_and_last(model: RandomModel) -> Rows:
    rng = np.random.default_rng(11)
    return {layer: random_signs(rng, model.n_expert, model.k, 1, 2) for layer in (0, model.n_layer - 1)}


HARD = {
    "mixed": all_layers(lambda m, rng: random_signs(rng, m.n_expert, m.k, 1, m.n_expert // 2)),
    "first and last layer": first_and_last,
    "all but k off": all_layers(lambda m, rng: random_signs(rng, m.n_expert, m.k, 0, m.n_expert - m.k)),
    "k on, the rest off": all_layers(lambda m, rng: random_signs(rng, m.n_expert, m.k, m.k, m.n_expert - m.k)),
    "k on": all_layers(lambda m, rng: random_signs(rng, m.n_expert, m.k, m.k, 0)),
    "one on": all_layers(lambda m, rng: random_signs(rng, m.n_expert, m.k, 1, 0)),
    "one off": all_layers(lambda m, rng: random_signs(rng, m.n_expert, m.k, 0, 1)),
}
CAPS = (1e-3, 0.5, 4.0, float("inf"))  # the logits of these models are up to about 10 apart
CAPPED = ("mixed", "k on, the rest off", "one on", "one off")
SOFT = {
    "small": all_layers(lambda m, rng: rng.normal(scale=0.5, size=m.n_expert)),
    "large": all_layers(lambda m, rng: rng.normal(scale=30, size=m.n_expert)),
    "one layer": lambda m: {1: np.linspace(-2, 2, m.n_expert)},
}


def layer_values(seen: dict[str, list[Any]], name: str, layer: int) -> Any:
    """Values of all ubatches, one row a token."""
    parts = seen[f"{name}-{layer}"]
    return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])


def weight_rows(seen: dict[str, list[Any]], name: str, layer: int, k: int) -> Any:
    return np.concatenate([part.reshape(-1, k) for part in seen[f"{name}-{layer}"]])


def check_layer(
    model: RandomModel,
    seen: dict[str, list[Any]],
    layer: int,
    row: Any,
    mode: str,
    epsilon: float,
    cap: float = float("inf"),
) -> None:
    gpt_oss = model.arch == "gpt-oss"
    raw, steered = "ffn_moe_logits", "ffn_moe_logits_steered"
    if gpt_oss:  # what top-k sees is renamed last
        raw, steered = "ffn_moe_logits_biased" if row is not None else "ffn_moe_probs", "ffn_moe_probs"
    else:
        assert (f"{steered}-{layer}" in seen) == (row is not None), f"layer {layer}: steered, or not, against the bias"
    z = layer_values(seen, raw, layer)
    assert z.shape == (len(TOKENS), model.n_expert)
    expected = z
    if row is not None:
        expected = oracle.steer(z, mode, row, epsilon, cap)
        edited = layer_values(seen, steered, layer)
        # + 0.0: the sign of a zero logit is not promised
        assert (edited + np.float32(0)).tobytes() == (expected + np.float32(0)).tobytes(), "edited logits differ"
        if mode != "soft":
            untouched = np.asarray(row) == 0
            assert edited[:, untouched].tobytes() == z[:, untouched].tobytes(), "untouched logits changed"

    topk = layer_values(seen, "ffn_moe_topk", layer)
    assert topk.shape == (len(TOKENS), model.k)
    wanted = oracle.chosen(expected, model.k)
    assert np.array_equal(np.sort(topk, axis=1), np.sort(wanted, axis=1)), "another choice of experts"
    # ties (several +1 experts) may stand in any order; by their logits the order is fixed
    assert np.array_equal(np.take_along_axis(expected, topk, axis=1), np.take_along_axis(expected, wanted, axis=1)), (
        "the chosen experts are not in the order of their logits"
    )
    if row is not None and (mode == "hard" or (mode == "capped" and cap == float("inf"))):
        signs = np.asarray(row)
        for expert in np.flatnonzero(signs > 0):
            assert (topk == expert).any(axis=1).all(), f"expert {expert} is +1, but not always chosen"
        assert not np.isin(topk, np.flatnonzero(signs < 0)).any(), "an expert with -1 was chosen"

    gating = "softmax-weight" if gpt_oss else "softmax"
    last = "ffn_moe_weights_softmax" if gpt_oss else "ffn_moe_weights_norm" if model.norm else "ffn_moe_weights"
    weights = weight_rows(seen, last, layer, model.k)
    np.testing.assert_array_less(
        np.abs(weights - oracle.weights(expected, topk, gating, model.norm)),
        oracle.weight_allowance(expected, topk, gating.replace("-", "_"), model.norm),
    )


def run(
    model: RandomModel,
    path: Any,
    loaded: Any,
    rows: Rows,
    mode: str,
    epsilon: float = 0.01,
    cap: float = float("inf"),
) -> None:
    with Context(loaded, capture=True, n_ubatch=8) as context:
        bias = native_bias(identity_of(path), rows, mode, epsilon, cap)
        capi.attach(context.ctx, bias)
        context.decode(TOKENS[:N_PROMPT])
        for i, token in enumerate(TOKENS[N_PROMPT:]):
            context.decode([token], N_PROMPT + i)
        for layer in range(model.n_layer):
            info = capi.layer_info(context.ctx, layer)
            assert info.steered == (layer in rows)
            if layer < model.n_dense:
                assert f"ffn_moe_logits-{layer}" not in context.seen
                continue
            check_layer(model, context.seen, layer, rows.get(layer), mode, epsilon, cap)


@pytest.mark.parametrize("case", HARD)
def test_hard_rule(steerable: tuple[RandomModel, Any, Any], case: str) -> None:
    model, path, loaded = steerable
    run(model, path, loaded, HARD[case](model), "hard")


@pytest.mark.parametrize("epsilon", [1e-3, 2.5, 20.0])
def test_epsilon(steerable: tuple[RandomModel, Any, Any], epsilon: float) -> None:
    model, path, loaded = steerable
    run(model, path, loaded, HARD["mixed"](model), "hard", epsilon)


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize("case", CAPPED)
def test_capped_rule(steerable: tuple[RandomModel, Any, Any], case: str, cap: float) -> None:
    model, path, loaded = steerable
    run(model, path, loaded, HARD[case](model), "capped", cap=cap)


@pytest.mark.parametrize("epsilon", [1e-3, 20.0])
def test_epsilon_of_the_capped_rule(steerable: tuple[RandomModel, Any, Any], epsilon: float) -> None:
    """A cap below epsilon moves every steered expert by the cap; one above leaves some at the extreme."""
    model, path, loaded = steerable
    run(model, path, loaded, HARD["mixed"](model), "capped", epsilon, 2.0)


@pytest.mark.parametrize("case", SOFT)
def test_soft_rule(steerable: tuple[RandomModel, Any, Any], case: str) -> None:
    model, path, loaded = steerable
    run(model, path, loaded, SOFT[case](model), "soft")


def test_unsteered_routing(steerable: tuple[RandomModel, Any, Any]) -> None:
    model, path, loaded = steerable
    run(model, path, loaded, {}, "hard")


def test_dense_first_layer(random_model: Any) -> None:
    path = random_model(DENSE_FIRST)
    loaded = open_model(path)
    run(DENSE_FIRST, path, loaded, HARD["mixed"](DENSE_FIRST), "hard")
    loaded.close()


def test_the_oracle_itself() -> None:
    z = np.array([[3.0, 1.0, -2.0, 0.5], [0.0, 5.0, 4.0, 4.5]], np.float32)
    hard = oracle.steer(z, "hard", [-1, 1, 0, 0], 0.5)
    assert hard.tolist() == [[-2.5, 3.5, -2.0, 0.5], [-0.5, 5.5, 4.0, 4.5]]
    assert oracle.chosen(hard, 2).tolist() == [[1, 3], [1, 3]]
    assert oracle.steer(z, "soft", [0, 1, 0, -1]).tolist() == [[3, 2, -2, -0.5], [0, 6, 4, 3.5]]
    # by hand: expert 1 is 2 and 0 below the highest of its token, expert 0 is 5 and 0 above the lowest
    for cap, first, second in (
        (0.0, z[0], z[1]),
        (1.5, [1.5, 2.5, -2, 0.5], [-0.5, 5.5, 4, 4.5]),
        (4.0, [-1, 3.5, -2, 0.5], [-0.5, 5.5, 4, 4.5]),
        (np.inf, hard[0], hard[1]),
    ):
        capped = oracle.steer(z, "capped", [-1, 1, 0, 0], 0.5, cap)
        assert capped.tolist() == [list(first), list(second)], f"cap {cap}"
        assert capped.dtype == np.float32
    even = np.array([[1.0, 1.0, 1.0, 1.0]], np.float32)
    experts = np.array([[0, 1]])
    assert oracle.weights(even, experts, "softmax", norm=False).tolist() == [[0.25, 0.25]]
    assert oracle.weights(even, experts, "softmax", norm=True).tolist() == [[0.5, 0.5]]
    assert oracle.weights(even, experts, "softmax-weight", norm=False).tolist() == [[0.5, 0.5]]
