"""Sums of what the routers compute: their scores against single tokens, their rules and their file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import ExpertMap
from steermoe_local.errors import FormatError
from steermoe_local.maps.counts import RoutingCounts, merge_counts
from steermoe_local.maps.routing_sums import MEMBERS, RoutingSums, logit_difference, weight_difference
from tests.support import oracle
from tests.support.builders import identity, random_counts

MODEL = identity()  # three layers of four experts, top-2; layer 0 is dense
N = (7, 11)


def tokens(seed: int, shift: float = 0.0, scale: float = 1.0) -> list[Any]:
    """Router logits of the tokens of both sides, [side][tokens, layer, expert]; every token has its own offset."""
    rng = np.random.default_rng(seed)
    sides = []
    for n in N:
        z = scale * rng.normal(size=(n, *MODEL.shape)) + shift * rng.normal(size=(n, 1, 1))
        z[:, 0] = 0
        sides.append(z.astype(np.float32))
    return sides


def counts_of(sides: list[Any]) -> RoutingCounts:
    """What a run over these tokens would count and sum; weights are a softmax's."""
    a = np.zeros((2, *MODEL.shape), np.int64)
    tables = [np.zeros((2, *MODEL.shape)), np.zeros((2, MODEL.n_layer)), np.zeros((2, *MODEL.shape))]
    for side, z in enumerate(sides):
        for layer in range(1, MODEL.n_layer):
            chosen = oracle.chosen(z[:, layer], MODEL.n_expert_used)
            weights = oracle.weights(z[:, layer], chosen, "softmax", norm=True)
            a[side, layer] = np.bincount(chosen.ravel(), minlength=MODEL.n_expert)
            for table, values in zip(tables, oracle.sums(z[:, layer], chosen, weights), strict=True):
                table[side, layer] = values if table.ndim == 3 else values[0]
    return random_counts(1, MODEL, *N, a1=a[0], a2=a[1], sums=RoutingSums(*tables))


def scores_of(sides: list[Any]) -> tuple[Any, Any]:
    """The scores from single tokens, by their definitions."""
    centred = [z.astype(np.float64) - z.astype(np.float64).mean(axis=2, keepdims=True) for z in sides]
    every = np.concatenate(centred)
    deviation = np.sqrt((every**2).mean(axis=(0, 2)))
    logit = (centred[0].mean(axis=0) - centred[1].mean(axis=0)) / np.where(deviation, deviation, 1)[:, None]
    weight = np.zeros((2, *MODEL.shape))
    for side, z in enumerate(sides):
        for layer in range(1, MODEL.n_layer):
            for token in z[:, layer]:
                chosen = np.argsort(-token, kind="stable")[: MODEL.n_expert_used]
                share = np.exp(token[chosen].astype(np.float64))
                weight[side, layer, chosen] += share / share.sum() / len(z)
    return logit, weight[0] - weight[1]


def sums(counts: RoutingCounts) -> RoutingSums:
    assert counts.sums is not None
    return counts.sums


@pytest.mark.parametrize("seed", range(3))
def test_scores_of_single_tokens(seed: int) -> None:
    sides = tokens(seed)
    counts = counts_of(sides)
    logit, weight = scores_of(sides)
    np.testing.assert_allclose(logit_difference(sums(counts), *N), logit, atol=1e-12)
    np.testing.assert_allclose(weight_difference(sums(counts), *N), weight, atol=1e-12)
    made = ExpertMap.from_counts(counts)
    assert made.logit is not None
    assert made.weight is not None
    np.testing.assert_allclose(made.logit, logit, atol=1e-12)
    np.testing.assert_allclose(made.weight, weight, atol=1e-12)
    assert not made.logit[0].any(), "a dense layer"


def test_what_the_scores_do_not_see() -> None:
    """A token's offset, and the size of the layer's logits; the router's choice sees neither."""
    plain, offset, large = (
        logit_difference(sums(counts_of(tokens(4, *changes))), *N) for changes in ((), (50.0,), (0.0, 8.0))
    )
    np.testing.assert_allclose(offset, plain, atol=1e-4)
    np.testing.assert_allclose(large, plain, atol=1e-12)
    # a layer whose tokens have one logit for all experts says nothing
    assert not logit_difference(RoutingSums(np.ones((2, 3, 4)), np.zeros((2, 3)), np.ones((2, 3, 4))), *N).any()


def test_a_map_without_sums_has_no_scores_of_them() -> None:
    made = ExpertMap.from_counts(random_counts(1))
    assert (made.logit, made.weight) == (None, None)
    assert json.loads(made.to_json())["version"] == 1
    assert json.loads(ExpertMap.from_counts(counts_of(tokens(1))).to_json())["version"] == 2


@given(st.integers(0, 50), st.integers(0, 50))
def test_they_add_up(i: int, j: int) -> None:
    one, two = counts_of(tokens(i)), replace(counts_of(tokens(j)), pairs_digest=("f" * 64,))
    total = one + two
    total.validate()
    for name in MEMBERS:
        assert np.array_equal(getattr(sums(total), name), getattr(sums(one), name) + getattr(sums(two), name))
        assert np.array_equal(getattr(sums(two + one), name), getattr(sums(total), name))
    without = replace(two, sums=None)
    assert (one + without).sums is (without + one).sums is None
    assert merge_counts([("a", one), ("b", without)]).sums is None


def test_round_trip(tmp_path: Path) -> None:
    counts = counts_of(tokens(2))
    counts.save(tmp_path / "a.npz")
    counts.save(tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = RoutingCounts.load(tmp_path / "a.npz")
    for name in MEMBERS:
        assert getattr(sums(again), name).tobytes() == getattr(sums(counts), name).tobytes()
        with pytest.raises(ValueError, match="read-only"):
            getattr(sums(again), name)[0] = 1
    with np.load(tmp_path / "a.npz") as arrays:
        assert json.loads(str(arrays["meta"]))["version"] == 2
    replace(counts, sums=None).save(tmp_path / "old.npz")
    with np.load(tmp_path / "old.npz") as arrays:
        assert json.loads(str(arrays["meta"]))["version"] == 1
        assert not set(arrays) & set(MEMBERS)
    assert RoutingCounts.load(tmp_path / "old.npz").sums is None


def changed(name: str, value: Any, *place: int) -> dict[str, Any]:
    table = getattr(sums(counts_of(tokens(2))), name).copy()
    table[place] = value
    return {name: table}


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (changed("logits", np.nan, 0, 1, 0), "logits: NaN"),
        (changed("weights", np.inf, 0, 1, 0), "weights: NaN"),
        (changed("spread", -1.0, 0, 1), "spread: below 0"),
        (changed("spread", 1.0, 0, 0), "spread: below 0, or of a layer"),
        (changed("logits", 1.0, 1, 0, 0), "logits: of a layer"),
        (changed("weights", 1.0, 1, 0, 0), "weights: of an expert"),
        ({"logits": np.zeros((2, 3, 5))}, "logits: float64 of shape (2, 3, 5), not numbers"),
        ({"spread": np.zeros((2, 3, 1))}, "spread: float64 of shape (2, 3, 1)"),
        ({"weights": np.zeros((2, 3, 4), np.float32)}, "weights: float32"),
        ({"weights": np.zeros((2, 3, 4), np.int64)}, "weights: int64"),
        ({"spread": None}, "not a counts file: its arrays are"),
        ({"more": np.zeros(1)}, "not a counts file: its arrays are"),
        ({"meta": {"version": 1}}, "format version 1, this program reads 2"),
        ({"meta": {"version": 3}}, "format version 3"),
        ({"meta": {"version": 2}, **dict.fromkeys(MEMBERS)}, "format version 2, this program reads 1"),
    ],
)
def test_hostile_files(tmp_path: Path, members: dict[str, Any], words: str) -> None:
    path = tmp_path / "a.npz"
    counts_of(tokens(2)).save(path)
    with np.load(path) as archive:
        arrays = dict(archive)
    for name, value in members.items():
        if value is None:
            del arrays[name]
        elif name == "meta":
            arrays[name] = np.asarray(json.dumps(json.loads(str(arrays[name])) | value))
        else:
            arrays[name] = value
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(FormatError) as caught:
        RoutingCounts.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)


def test_a_shape_that_does_not_fit() -> None:
    with pytest.raises(FormatError, match=r"counts: weights: shape \(2, 3, 5\)"):
        replace(
            counts_of(tokens(1)), sums=RoutingSums(np.zeros((2, 3, 4)), np.zeros((2, 3)), np.zeros((2, 3, 5)))
        ).validate()
