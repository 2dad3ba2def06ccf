"""Controls drawn from tables: always a choice that the model can carry out, never the real one, matched where asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.errors import ChoiceError
from steermoe_local.identity import ModelIdentity
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.control_choices import (
    NEAREST,
    Relabelling,
    activation_frequency,
    bottom_signs,
    draw_experts,
)
from tests.support.builders import table_map

Table = npt.NDArray[Any]


def identity(n_layer: int = 4, n_expert: int = 12, k: int = 3) -> ModelIdentity:
    return ModelIdentity("olmoe", n_layer, n_expert, k, "0" * 64)


def sorted_values(table: Table) -> list[float]:
    return sorted(table[table != 0].tolist())


@st.composite
def choices(draw: st.DrawFn) -> tuple[ModelIdentity, list[Table], tuple[int, ...], npt.NDArray[np.float64], int]:
    """A map's choice and its reverse, with the layers in scope and frequencies."""
    n_layer, n_expert = draw(st.integers(1, 5)), draw(st.integers(4, 12))
    k = draw(st.integers(1, n_expert // 2))
    seed = draw(st.integers(0, 1000))
    rng = np.random.default_rng(seed)
    layers = tuple(sorted(draw(st.sets(st.integers(0, n_layer - 1), min_size=1))))
    rd = np.round(rng.uniform(-1, 1, (n_layer, n_expert)), draw(st.integers(1, 3)))
    expert_map = table_map(rd, k)
    most = max(1, len(layers) * n_expert // 4)
    numbers = draw(st.integers(0, most)), draw(st.integers(0, most))
    tables = []
    for reverse in (False, True):
        try:
            tables.append(expert_map.choose(*numbers, reverse=reverse, layers=layers).astype(np.float32))
        except ChoiceError:
            tables.append(np.zeros(rd.shape, np.float32))
    return expert_map.identity, tables, layers, rng.uniform(0, 1, rd.shape), seed


@settings(max_examples=150)
@given(choices(), st.booleans())
def test_draws_can_be_carried_out(
    made: tuple[ModelIdentity, list[Table], tuple[int, ...], npt.NDArray[np.float64], int], matched: bool
) -> None:
    model, tables, layers, frequency, seed = made
    rng = np.random.default_rng(seed)
    try:
        found = draw_experts(tables, model, layers, rng, frequency=frequency if matched else None)
    except ChoiceError:
        return
    outside = [layer for layer in range(model.n_layer) if layer not in layers]
    for table in tables:
        drawn = found.apply(table)
        BiasFile.from_signs(drawn, model)  # raises where the model could not
        assert sorted_values(drawn) == sorted_values(table), "same numbers, same signs"
        assert not drawn[outside].any(), "the scope of layers"
    assert any(not np.array_equal(found.apply(table), table) for table in tables)
    assert len(set(found.to.values())) == len(found.to)
    if matched:
        assert not set(found.to) & set(found.to.values()), "a matched expert is one that was not chosen"


def test_the_real_set_is_never_drawn() -> None:
    """Two experts, one chosen: a draw that may not be the real one can only be the other."""
    model = identity(1, 2, 1)
    table = np.array([[1, 0]], np.float32)
    for seed in range(20):
        found = draw_experts([table], model, (0,), np.random.default_rng(seed))
        assert found.to == {(0, 0): (0, 1)}
    with pytest.raises(ChoiceError, match="do not fit"):
        draw_experts([np.array([[1]], np.float32)], identity(1, 1, 1), (0,), np.random.default_rng(0))
    # the turned set is the real set as well: its swing is the real one, with the other sign
    turned = np.array([[1, -1]], np.float32)
    for tables in ([turned], [turned, -turned]):
        with pytest.raises(ChoiceError):
            draw_experts(tables, model, (0,), np.random.default_rng(0))


def test_nothing_chosen() -> None:
    with pytest.raises(ChoiceError, match="nothing to draw"):
        draw_experts([np.zeros((4, 12))], identity(), (0, 1), np.random.default_rng(0))


def test_even_draws_reach_every_expert_about_as_often() -> None:
    model = identity()
    table = np.zeros(model.shape, np.float32)
    table[0, :2], table[1, :2] = 1, -1
    hits = np.zeros(model.shape)
    for seed in range(600):
        hits += np.abs(draw_experts([table], model, (0, 1, 3), np.random.default_rng(seed)).apply(table))
    assert not hits[2].any()
    expected = 600 * 4 / 36
    # +-5 standard deviations of a binomial count
    assert np.abs(hits[[0, 1, 3]] - expected).max() < 5 * np.sqrt(expected)


def test_matched_draws_have_the_frequencies_of_the_chosen() -> None:
    model = identity(6, 32, 4)
    rng = np.random.default_rng(3)
    frequency = rng.beta(0.4, 2.0, model.shape)
    table = np.zeros(model.shape, np.float32)
    for layer in range(6):
        busiest = np.argsort(-frequency[layer])
        table[layer, busiest[[2, 5]]], table[layer, busiest[[3, 9]]] = 1, -1
    matched, even, seen = [], [], set()
    for seed in range(30):
        found = draw_experts([table, -table], model, range(6), np.random.default_rng(seed), frequency=frequency)
        matched.append(found.frequency_gap(frequency))
        even.append(draw_experts([table], model, range(6), np.random.default_rng(seed)).frequency_gap(frequency))
        seen.add(found.apply(table).tobytes())
    assert np.mean(matched) < 0.05
    assert np.mean(matched) * 4 < np.mean(even)
    assert len(seen) == 30, "30 draws, all different"


def test_a_matched_expert_is_of_the_own_layer_where_possible() -> None:
    model = identity(2, 6, 2)
    frequency = np.array([[0.5, 0.52, 0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.5, 0.1, 0.1, 0.1]])
    table = np.zeros(model.shape, np.float32)
    table[0, 0] = 1
    for seed in range(10):
        found = draw_experts([table], model, (0, 1), np.random.default_rng(seed), frequency=frequency)
        assert found.to == {(0, 0): (0, 1)}, "near enough in its own layer"
    frequency[0, 1] = 0.2
    drawn = set()
    for seed in range(40):
        found = draw_experts([table], model, (0, 1), np.random.default_rng(seed), frequency=frequency)
        drawn.add(found.to[0, 0])
    assert {(1, 0), (1, 1), (1, 2)} <= drawn, "nobody near in its own layer: the nearest anywhere"
    assert len(drawn) <= NEAREST
    found = draw_experts([table], model, (0,), np.random.default_rng(0), frequency=frequency)
    assert found.to[0, 0][0] == 0, "but not outside of the scope"


def test_matched_draws_need_experts_that_were_not_chosen() -> None:
    model = identity(1, 4, 2)
    table = np.array([[1, 1, -1, -1]], np.float32)
    with pytest.raises(ChoiceError, match="4 other experts"):
        draw_experts([table], model, (0,), np.random.default_rng(0), frequency=np.zeros((1, 4)))


def test_a_soft_bias_keeps_its_values() -> None:
    model = identity()
    table = np.zeros(model.shape, np.float32)
    table[0, :5] = [2.5, -1.5, 0.5, 3, 4]  # more than top-k promoted: a soft bias may
    drawn = draw_experts([table], model, (0, 1, 2, 3), np.random.default_rng(0)).apply(table)
    assert sorted_values(drawn) == sorted_values(table)


def test_relabelling() -> None:
    moved = Relabelling({(0, 0): (1, 2), (1, 2): (0, 1)})
    table = np.array([[5, 0, 0], [0, 0, -7]])
    assert moved.apply(table).tolist() == [[0, -7, 0], [0, 0, 5]]
    frequency = np.array([[0.5, 0.25, 0], [0, 0, 0.25]])
    assert moved.frequency_gap(frequency) == pytest.approx((0.25 + 0.0) / 2)


def test_activation_frequency() -> None:
    assert activation_frequency(np.array([[3]]), 4, np.array([[1]]), 12).tolist() == [[0.25]]


def test_bottom_signs() -> None:
    rows = [[0.9, -0.9, 0.01, 0.0, -0.02, 0.3], [0.02, 0.03, 0.04, -0.5, -0.01, 0.0], [0.001, -0.001, 0, 0, 0, 0]]
    rd = np.array(rows)
    model = ModelIdentity("olmoe", 3, 6, 2, "0" * 64)
    signs = bottom_signs(rd, 2, 2, model, (0, 1))
    assert np.argwhere(signs > 0).tolist() == [[0, 2], [1, 0]]
    assert np.argwhere(signs < 0).tolist() == [[0, 4], [1, 4]]
    turned = bottom_signs(-rd, 2, 2, model, (0, 1))
    assert np.array_equal(turned, -signs)
    with pytest.raises(ChoiceError, match=r"only 2 .*RD > 0, but 3 "):
        bottom_signs(rd, 3, 0, model, (1,))  # top-2 of a layer
    with pytest.raises(ChoiceError, match=r"only 2 .*RD < 0"):
        bottom_signs(rd, 0, 3, model, (1,))  # an RD of 0 has no side
