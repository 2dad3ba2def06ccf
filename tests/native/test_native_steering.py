"""Attach, swap and detach: what a context computes depends on what is attached now, and on nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import ModelError, ModelMismatchError
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from tests.support import rounding
from tests.support.low_level import F32, Context, identity_of, native_bias, open_model, random_signs
from tests.support.random_models import DENSE_FIRST, N_EMBD, N_VOCAB, OLMOE, RandomModel

pytestmark = pytest.mark.numeric

TOKENS = np.random.default_rng(5).integers(0, N_VOCAB, 16).tolist()

Loaded = tuple[ModelIdentity, Any]


@pytest.fixture(scope="module")
def olmoe(random_model: Any) -> Iterator[Loaded]:
    path = random_model(OLMOE)
    model = open_model(path)
    yield identity_of(path), model
    model.close()


def signs(seed: int, layers: list[int]) -> dict[int, Any]:
    rng = np.random.default_rng(seed)
    return {layer: random_signs(rng, OLMOE.n_expert, OLMOE.k, 1, 5) for layer in layers}


def same(one: Any, two: Any) -> bool:
    return one.shape == two.shape and one.tobytes() == two.tobytes()


def fresh_logits(
    loaded: Loaded, *bias: Any, tokens: list[int] = TOKENS, type_kv: int | None = None, **options: Any
) -> Any:
    """What a new context computes that was steered from its beginning."""
    with Context(loaded[1], type_kv=type_kv) as context:
        for one in bias:
            capi.attach(context.ctx, native_bias(loaded[0], one, **options))
        return context.decode(tokens)


def test_no_values_change_nothing(olmoe: Loaded) -> None:
    identity, model = olmoe
    plain = fresh_logits(olmoe)
    with Context(model) as context:
        before = context.decode(TOKENS)
        zeros = np.zeros(identity.n_expert, np.float32)
        for mode in ("hard", "soft"):
            for layers in ({}, {0: zeros, 2: zeros}):
                capi.attach(context.ctx, native_bias(identity, layers, mode))
                assert not any(capi.layer_info(context.ctx, i).steered for i in range(identity.n_layer))
                assert same(context.fresh(TOKENS), plain), "a bias without values changed the logits"
    assert same(before, plain)


def test_a_cap_of_0_leaves_the_graph(olmoe: Loaded) -> None:
    """No node is added, in a context that never had another rule and in one that had."""
    identity, model = olmoe
    plain = fresh_logits(olmoe)
    nothing = native_bias(identity, signs(1, [0, 2]), "capped", cap=0.0)
    with Context(model, capture=True) as context:
        for sequence_too in (False, True):
            capi.attach(context.ctx, nothing)
            if sequence_too:
                capi.attach_sequence(context.ctx, 0, nothing)
            assert not any(capi.layer_info(context.ctx, i).steered for i in range(identity.n_layer))
            assert same(context.fresh(TOKENS), plain)
            assert not any("steered" in name for name in context.seen)
        capi.attach_sequence(context.ctx, 0, native_bias(identity, signs(1, [0, 2]), "capped", cap=1.0))
        assert not same(context.fresh(TOKENS), plain)
        capi.attach_sequence(context.ctx, 0, nothing)
        context.seen.clear()
        assert same(context.fresh(TOKENS), plain)
        assert not any("steered" in name for name in context.seen)


def test_an_infinite_cap_is_the_hard_rule(olmoe: Loaded) -> None:
    """The same graph and the same bits; with a large cap other nodes, which compute the same values."""
    identity, model = olmoe
    rows = signs(1, [0, 2])
    seen = []
    for mode, cap in (("hard", None), ("capped", float("inf")), ("capped", 1e6)):
        with Context(model, capture=True) as context:
            capi.attach(context.ctx, native_bias(identity, rows, mode, 0.5, cap))
            logits = context.decode(TOKENS)
            edited = [b"".join(part.tobytes() for part in context.seen[f"ffn_moe_logits_steered-{i}"]) for i in rows]
            seen.append((logits.tobytes(), edited, context.ops))
    (hard, edited, ops), infinite, large = seen
    assert infinite == (hard, edited, ops)
    assert large[:2] == (hard, edited)
    assert large[2]["ffn_moe_logits_steered-0"] != ops["ffn_moe_logits_steered-0"], "no other nodes: nothing was tested"


def test_a_bias_changes_something(olmoe: Loaded) -> None:
    assert not same(fresh_logits(olmoe, signs(1, [0])), fresh_logits(olmoe))


def test_same_text_after_steering(olmoe: Loaded) -> None:
    identity, model = olmoe
    with Context(model) as context:
        context.decode(TOKENS)
        capi.attach(context.ctx, native_bias(identity, signs(1, [0, 3])))
        assert same(context.fresh(TOKENS), fresh_logits(olmoe, signs(1, [0, 3])))


# what comes after {layers 0 and 2, hard, 0.01}
SWAPS: dict[str, tuple[dict[int, Any], dict[str, Any]]] = {
    "other values, same graph": (signs(2, [0, 2]), {}),
    "other layers": (signs(2, [1, 3]), {}),
    "fewer layers": (signs(2, [2]), {}),
    "more layers": (signs(2, [0, 1, 2, 3]), {}),
    "hard to soft": ({0: np.linspace(-1, 1, 16), 2: np.linspace(1, -1, 16)}, {"mode": "soft"}),
    "other epsilon": (signs(1, [0, 2]), {"epsilon": 1.5}),
    "hard to capped": (signs(1, [0, 2]), {"mode": "capped", "cap": 0.75}),
    "hard to capped, other layers": (signs(2, [1, 3]), {"mode": "capped", "cap": 0.75, "epsilon": 1.5}),
    "only on": ({0: np.eye(16)[3], 2: np.eye(16)[5]}, {}),
    "only off": ({0: -np.eye(16)[3], 2: -np.eye(16)[5]}, {}),
}


@pytest.mark.parametrize("case", SWAPS)
def test_swap(olmoe: Loaded, case: str) -> None:
    identity, model = olmoe
    first, (second, options) = signs(1, [0, 2]), SWAPS[case]
    plain, one = fresh_logits(olmoe), fresh_logits(olmoe, first)
    two = fresh_logits(olmoe, second, **options)
    assert not same(one, two)
    with Context(model) as context:
        for _ in range(2):
            capi.attach(context.ctx, native_bias(identity, first))
            assert same(context.fresh(TOKENS), one)
            capi.attach(context.ctx, native_bias(identity, second, **options))
            assert same(context.fresh(TOKENS), two), "the second bias computes otherwise than in a new context"
        capi.detach(context.ctx)
        assert same(context.fresh(TOKENS), plain), "detached, but not as without steering"


def test_swap_between_single_tokens(olmoe: Loaded) -> None:
    """The graph of the last decode must not be reused for another steering: token by token it otherwise would be."""
    identity, model = olmoe
    biases = [native_bias(identity, signs(seed, layers)) for seed, layers in ((1, [0]), (2, [0]), (3, [1, 3]))]

    def run(schedule: list[int], reset: bool) -> list[Any]:
        rows = []
        with Context(model) as context:
            for position, choice in enumerate(schedule):
                if reset:  # away and back: every graph is a new one
                    capi.attach(context.ctx, native_bias(identity, {2: np.eye(16)[0]}, "soft"))
                capi.attach(context.ctx, biases[choice]) if choice >= 0 else capi.detach(context.ctx)
                rows.append(context.decode([TOKENS[position]], position))
        return rows

    schedule = [0, 0, 1, 1, -1, -1, 2, 2, 0, -1, 2, 1]
    ours, slow = run(schedule, reset=False), run(schedule, reset=True)
    plain = run([-1] * len(schedule), reset=False)
    for position, (one, two) in enumerate(zip(ours, slow, strict=True)):
        assert same(one, two), f"token {position}"
    assert not same(ours[-1], plain[-1])


def test_two_contexts_at_once(olmoe: Loaded) -> None:
    identity, model = olmoe
    biases = [signs(1, [0, 1]), signs(2, [1, 2]), None]
    expected = [fresh_logits(olmoe, *([b] if b else []), type_kv=F32) for b in biases]
    contexts = [Context(model, type_kv=F32) for _ in biases]
    for context, bias in zip(contexts, biases, strict=True):
        if bias:
            capi.attach(context.ctx, native_bias(identity, bias))
    rows: list[list[Any]] = [[] for _ in biases]
    for start in range(0, len(TOKENS), 4):
        for context, row in zip(contexts, rows, strict=True):
            row.append(context.decode(TOKENS[start : start + 4], start))
    for context, row, logits in zip(contexts, rows, expected, strict=True):
        allowance = rounding.logits(logits, OLMOE.n_layer, N_EMBD)
        np.testing.assert_allclose(np.concatenate(row), logits, rtol=0, atol=allowance)
        assert same(context.fresh(TOKENS), logits)
        context.close()


def test_the_bias_is_copied(olmoe: Loaded) -> None:
    identity, model = olmoe
    with Context(model) as context:
        bias = native_bias(identity, signs(1, [0]))
        capi.attach(context.ctx, bias)
        del bias
        assert same(context.decode(TOKENS), fresh_logits(olmoe, signs(1, [0])))


def test_an_error_leaves_the_steering(olmoe: Loaded) -> None:
    identity, model = olmoe
    with Context(model) as context:
        capi.attach(context.ctx, native_bias(identity, signs(1, [0])))
        other = ModelIdentity("olmoe", identity.n_layer, identity.n_expert, identity.n_expert_used, "0" * 64)
        with pytest.raises(ModelMismatchError, match=r"for olmoe .* force"):
            capi.attach(context.ctx, native_bias(other, signs(2, [1])))
        assert [capi.layer_info(context.ctx, i).steered for i in range(4)] == [True, False, False, False]
        assert same(context.decode(TOKENS), fresh_logits(olmoe, signs(1, [0])))
        capi.attach(context.ctx, native_bias(other, signs(2, [1])), force=True)
        assert same(context.fresh(TOKENS), fresh_logits(olmoe, signs(2, [1])))


@pytest.mark.parametrize(
    "changes",
    [{"architecture": "qwen3moe"}, {"n_layer": 5}, {"n_expert": 17}, {"n_expert_used": 3}],
)
def test_force_is_for_the_router_alone(olmoe: Loaded, changes: dict[str, Any]) -> None:
    identity, model = olmoe
    other = ModelIdentity(**(identity.to_dict() | changes))
    with Context(model) as context:
        for force in (False, True):
            with pytest.raises(ModelMismatchError, match=r".*; run steermoe detect"):
                capi.attach(context.ctx, native_bias(other, {}), force)


def test_layer_info(steerable: tuple[RandomModel, Path, Any]) -> None:
    description, _, model = steerable
    with Context(model) as context:
        for layer in range(description.n_layer):
            info = capi.layer_info(context.ctx, layer)
            assert info.gating == ("softmax_weight" if description.arch == "gpt-oss" else "softmax")
            assert (info.n_expert, info.n_expert_used) == (description.n_expert, description.k)
            assert (info.selection_bias, info.expert_groups, info.steerable, info.steered) == (
                False,
                False,
                True,
                False,
            )
            assert info.reason == ""


def test_a_layer_without_a_router_cannot_be_steered(random_model: Any) -> None:
    path = random_model(DENSE_FIRST)
    model = open_model(path)
    with Context(model) as context:
        plain = context.decode(TOKENS)
        info = capi.layer_info(context.ctx, 0)
        assert not info.steerable
        assert info.reason
        with pytest.raises(ModelError) as caught:
            capi.attach(context.ctx, native_bias(identity_of(path), {0: np.eye(DENSE_FIRST.n_expert)[1]}))
        assert "layer 0 cannot be steered:" in str(caught.value)
        assert same(context.fresh(TOKENS), plain)
        # a row of zeros asks for nothing
        capi.attach(context.ctx, native_bias(identity_of(path), {0: np.zeros(DENSE_FIRST.n_expert)}))
        assert same(context.fresh(TOKENS), plain)
    model.close()


def test_warm_up_graph_tells_the_right_top_k(olmoe: Loaded) -> None:
    _, model = olmoe
    with Context(model) as context:
        llama = capi.llama_cpp()
        llama.llama_set_warmup(context.ctx, True)
        context.decode(TOKENS[:2])
        llama.llama_set_warmup(context.ctx, False)
        assert capi.layer_info(context.ctx, 0).n_expert_used == OLMOE.k
