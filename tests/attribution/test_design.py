"""Candidates and random draws: who is drawn, how often, and never more of a layer than its router allows."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.attribution.design import RATE, Candidates, Design, choose_candidates, default_rate
from steermoe_local.errors import UsageError
from steermoe_local.identity import ModelIdentity
from steermoe_local.maps.effects import ACTIONS
from steermoe_local.steering.bias_file import BiasFile
from tests.support.builders import identity, table_map

Array = np.ndarray[Any, Any]


@st.composite
def designs(draw: Any) -> Design:
    """Any candidates of a small model, any rate."""
    n_layer, n_expert = draw(st.integers(1, 5)), draw(st.integers(2, 12))
    model = identity(n_layer, n_expert, draw(st.integers(1, n_expert)))
    cells = list(itertools.product(range(n_layer), range(n_expert)))
    chosen = draw(st.lists(st.sampled_from(cells), min_size=1, unique=True))
    candidates = Candidates(np.array(chosen, dtype=np.int64), np.zeros(len(chosen), dtype=bool))
    rate = draw(st.floats(0.01, 0.99))
    return Design(draw(st.sampled_from(list(ACTIONS))), candidates, model, rate, draw(st.integers(0, 1 << 40)))


def all_of(model: ModelIdentity) -> Candidates:
    cells = np.array(list(itertools.product(range(model.n_layer), range(model.n_expert))), dtype=np.int64)
    return Candidates(cells, np.zeros(len(cells), dtype=bool))


#
# draws
#


@given(design=designs(), block=st.integers(0, 1 << 20))
@settings(max_examples=200, deadline=None)
def test_no_layer_takes_more_than_its_router_allows(design: Design, block: int) -> None:
    model = design.identity
    most = model.max_active if design.action == "promote" else model.max_inactive
    for draw in design.draws(block, 32):
        signs = design.signs(draw)
        assert (np.count_nonzero(signs, axis=1) <= most).all()
        assert set(np.unique(signs)) <= {0, ACTIONS[design.action]}
        taken = {tuple(cell) for cell in np.argwhere(signs).tolist()}
        assert taken == {tuple(cell) for cell in design.candidates.experts[draw].tolist()}
        BiasFile.from_signs(signs, model)  # the rule accepts it


@given(design=designs(), blocks=st.lists(st.integers(0, 50), min_size=2, max_size=6))
@settings(max_examples=100, deadline=None)
def test_draws_do_not_depend_on_the_calls_before(design: Design, blocks: list[int]) -> None:
    alone = {block: design.draws(block, 16) for block in sorted(set(blocks))}
    for block in blocks:
        assert np.array_equal(design.draws(block, 16), alone[block])


def test_blocks_actions_and_seeds_draw_differently() -> None:
    """With one candidate of each layer, which no layer has too many of."""
    model = identity(12, 4, 2)
    candidates = Candidates(np.array([(layer, 1) for layer in range(12)]), np.zeros(12, dtype=bool))
    one = Design("promote", candidates, model, 0.3, 1)
    others = (Design("suppress", candidates, model, 0.3, 1), Design("promote", candidates, model, 0.3, 2))
    for draws in (one.draws(1, 64), *(other.draws(0, 64) for other in others)):
        assert not np.array_equal(draws, one.draws(0, 64))


def test_every_draw_of_a_block_is_another_one() -> None:
    model = identity(4, 32, 16)
    draws = Design("suppress", all_of(model), model, 0.5, 0).draws(0, 64)
    assert len(np.unique(draws, axis=0)) == 64


SIGMAS = 5.0


@pytest.mark.parametrize("rate", [0.03, 0.12, 0.5])
def test_each_candidate_is_taken_with_the_rate_independently_of_the_others(rate: float) -> None:
    """Where no layer can be full: one expert of each; alone and in pairs, over 20,000 draws."""
    n = 20_000
    model = identity(6, 4, 2)
    candidates = Candidates(np.array([(layer, 1) for layer in range(6)]), np.zeros(6, dtype=bool))
    draws = np.concatenate([Design("suppress", candidates, model, rate, 3).draws(b, 1000) for b in range(n // 1000)])
    off = SIGMAS * math.sqrt(rate * (1 - rate) / n)
    assert (np.abs(draws.mean(axis=0) - rate) < off).all()
    both = rate * rate
    off = SIGMAS * math.sqrt(both * (1 - both) / n)
    for i, j in itertools.combinations(range(6), 2):
        assert abs((draws[:, i] & draws[:, j]).mean() - both) < off


def test_a_full_layer_loses_experts_at_random() -> None:
    """Twelve candidates for two slots at rate 0.9: each is left as often as the others."""
    model = identity(1, 12, 2)
    n = 20_000
    draws = Design("promote", all_of(model), model, 0.9, 0).draws(0, n)
    assert (draws.sum(axis=1) <= 2).all()
    share = 2 / 12
    assert np.abs(draws.mean(axis=0) - share).max() < SIGMAS * math.sqrt(share * (1 - share) / n)


@given(design=designs())
@settings(max_examples=100, deadline=None)
def test_the_default_rate_seldom_fills_a_layer(design: Design) -> None:
    model = design.identity
    rate = default_rate(design.action, design.candidates, model)
    most = model.max_active if design.action == "promote" else model.max_inactive
    assert 0 <= rate <= RATE
    if most:
        assert rate > 0
        assert rate * np.bincount(design.candidates.experts[:, 0]).max() <= most / 4 + 1e-12


#
# candidates
#


def test_candidates_are_the_first_by_rd_and_as_many_others() -> None:
    rd = np.random.default_rng(0).uniform(-1, 1, size=(5, 16))
    found = choose_candidates(table_map(rd, 4), [0, 1, 2, 3, 4], 12, seed=7)
    assert len(found) == 24
    assert found.control.tolist() == [False] * 12 + [True] * 12
    sizes = [abs(rd[layer, expert]) for layer, expert in found.experts]
    assert sizes[:12] == sorted((abs(value) for value in rd.ravel()), reverse=True)[:12]
    assert len({tuple(cell) for cell in found.experts.tolist()}) == 24


def test_controls_depend_on_the_seed_alone() -> None:
    rd = np.random.default_rng(0).uniform(-1, 1, size=(3, 16))
    layers = [0, 1, 2]
    one, again, other = (choose_candidates(table_map(rd, 4), layers, 8, seed=s).experts for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert np.array_equal(one[:8], other[:8])
    assert not np.array_equal(one, other)


def test_controls_are_drawn_evenly() -> None:
    """Over 2,000 seeds every expert behind the first ones is a control equally often."""
    rd = np.arange(20, 0, -1.0).reshape(1, 20) / 20
    count = np.zeros(20)
    for seed in range(2000):
        count[choose_candidates(table_map(rd, 4), [0], 5, seed).experts[5:, 1]] += 1
    assert (count[:5] == 0).all()
    assert np.abs(count[5:] / 2000 - 1 / 3).max() < SIGMAS * math.sqrt(2 / 9 / 2000)


def test_layers_that_cannot_be_steered_have_no_candidates() -> None:
    rd = np.ones((4, 8))
    found = choose_candidates(table_map(rd, 2), [1, 3], 5, seed=0)
    assert set(found.experts[:, 0].tolist()) == {1, 3}
    assert len(found) == 10


def test_with_few_experts_all_others_are_controls() -> None:
    found = choose_candidates(table_map(np.eye(2, 8), 2), [0, 1], 12, seed=0)
    assert len(found) == 16
    assert int(found.control.sum()) == 4
    assert int(choose_candidates(table_map(np.eye(2, 8), 2), [0, 1], 16, seed=0).control.sum()) == 0


@pytest.mark.parametrize("n", [0, -1, 17])
def test_a_number_of_candidates_that_the_model_does_not_have_is_refused(n: int) -> None:
    with pytest.raises(UsageError, match=rf" {n} .*\b16\b"):
        choose_candidates(table_map(np.eye(2, 8), 2), [0, 1], n, seed=0)
