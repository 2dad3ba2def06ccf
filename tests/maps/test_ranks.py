"""The scores by which experts are chosen and weighted, against slow definitions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import ChoiceError, UsageError
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.ranks import OBSERVED, RANKS, WEIGHTS, action_scores, ranks_of, relative_sizes
from tests.support.builders import random_counts, table_map
from tests.support.random_effects import RD, effects, effects_map
from tests.support.scored_maps import scored_map

SCORED = scored_map()
WANTING = {"log-odds": "a1", "logit": "logit", "weight": "weight", "effect": "effects", "efficiency": "effects"}


def by_hand(expert_map: ExpertMap, rank: str, reverse: bool) -> tuple[list[Any], list[Any]]:
    """(experts to promote, experts to suppress), the best first: row by row."""
    sign = -1 if reverse else 1
    found: dict[str, dict[tuple[int, int], float]] = {"promote": {}, "suppress": {}}
    for layer, expert in np.ndindex(expert_map.rd.shape):
        if rank in OBSERVED:
            score = sign * float(action_scores(expert_map, rank)[0][layer, expert])
            found["promote" if score > 0 else "suppress"][layer, expert] = abs(score)
    if rank not in OBSERVED:
        assert expert_map.effects is not None
        for row in expert_map.effects.rows():
            worth = sign * row["effect"]
            if rank == "efficiency":
                worth /= max(row["cost"], row["cost_se"], 1e-9)
            if row["p"] <= 0.05 and worth > 0:
                found[row["action"]][row["layer"], row["expert"]] = worth
    both = set(found["promote"]) & set(found["suppress"])
    for cell in both:
        worse = min(found, key=lambda action: found[action].get(cell, 0.0))
        del found[worse][cell]
    order = [sorted(one, key=lambda cell, one=one: (-one[cell], cell)) for one in found.values()]  # type: ignore[misc]
    return order[0], order[1]


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_by_every_rank(rank: str, reverse: bool) -> None:
    promoted, suppressed = by_hand(SCORED, rank, reverse)
    promoted = [cell for cell in promoted if SCORED.rd[cell[0]].any() or rank not in OBSERVED]
    suppressed = [cell for cell in suppressed if SCORED.rd[cell[0]].any() or rank not in OBSERVED]
    signs = SCORED.choose(3, 4, reverse=reverse, rank=rank)
    assert {(int(i), int(j)) for i, j in np.argwhere(signs > 0)} == set(promoted[:3])
    assert {(int(i), int(j)) for i, j in np.argwhere(signs < 0)} == set(suppressed[:4])
    if rank not in OBSERVED:
        assert SCORED.n_worth(reverse=reverse, rank=rank) == (len(promoted), len(suppressed))
        assert len(promoted) > 3
        everything = SCORED.choose(10_000, 0, reverse=reverse, rank=rank)
        kept = [cell for n, cell in enumerate(promoted) if sum(c[0] == cell[0] for c in promoted[:n]) < 4]
        assert {(int(i), int(j)) for i, j in np.argwhere(everything)} == set(kept)


def test_the_ranks_choose_differently() -> None:
    chosen = {rank: SCORED.choose(4, 4, rank=rank).tobytes() for rank in RANKS}
    assert len(set(chosen.values())) >= 5
    assert chosen["rd"] == SCORED.choose(4, 4).tobytes()


@pytest.mark.parametrize("rank", RANKS)
def test_numbers_are_those_that_make_a_difference(rank: str) -> None:
    activate, deactivate = SCORED.numbers(rank=rank)
    choices = {SCORED.choose(n, rank=rank).tobytes() for n in activate}
    assert len(choices) == len(activate)
    assert {SCORED.choose(n, rank=rank).tobytes() for n in range(activate[-1] + 9)} == choices
    assert len({SCORED.choose(0, n, rank=rank).tobytes() for n in deactivate}) == len(deactivate)


def test_ranks_of_a_map() -> None:
    assert ranks_of(SCORED) == RANKS
    assert ranks_of(table_map(RD)) == ("rd",)
    assert ranks_of(ExpertMap.from_counts(random_counts(1))) == ("rd", "log-odds")
    costless = replace(SCORED, effects=effects({"layer": 0, "expert": 0, "action": "promote"}))
    assert "effect" in ranks_of(costless)
    assert "efficiency" not in ranks_of(costless)
    with pytest.raises(UsageError, match="steermoe attribute"):
        costless.choose(1, rank="efficiency")


@pytest.mark.parametrize("rank", WANTING)
def test_a_map_without_the_data(rank: str) -> None:
    lacking = {WANTING[rank]: None} | ({"a2": None} if rank == "log-odds" else {})
    without = replace(SCORED, **lacking)  # type: ignore[arg-type]
    assert rank not in ranks_of(without)
    command = "steermoe attribute" if WANTING[rank] == "effects" else "steermoe detect"
    with pytest.raises(UsageError, match=rf"^rank {rank}: .*{command}"):
        without.choose(1, 1, rank=rank)
    if rank in WEIGHTS:
        with pytest.raises(UsageError, match=rf"^weights {rank}: .*{command}"):
            relative_sizes(without, rank, SCORED.choose(2, 2))


@pytest.mark.parametrize("name", ["", "RD", "risk-difference", "effects"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(UsageError, match=r"^rank: "):
        SCORED.choose(1, rank=name)
    with pytest.raises(UsageError, match=r"^weights: "):
        relative_sizes(SCORED, name, SCORED.choose(1))


@given(st.sampled_from(WEIGHTS), st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_relative_sizes(weights: str, activate: int, deactivate: int, reverse: bool) -> None:
    """The largest of the chosen has 1, the others their share; by effect each expert has that of its own action."""
    rank = "effect" if weights == "effect" else "rd"
    signs = SCORED.choose(activate, deactivate, reverse=reverse, rank=rank)
    sizes = relative_sizes(SCORED, weights, signs)
    assert sizes.shape == signs.shape
    assert not sizes[signs == 0].any()
    if not signs.any():
        return
    assert sizes.max() == 1
    assert SCORED.effects is not None
    known = {(row["layer"], row["expert"], row["action"]): row["effect"] for row in SCORED.effects.rows()}
    scores = {}
    for layer, expert in np.argwhere(signs).tolist():
        action = "promote" if signs[layer, expert] > 0 else "suppress"
        table = action_scores(SCORED, weights)[0] if weights != "effect" else None
        scores[layer, expert] = abs(known[layer, expert, action] if table is None else table[layer, expert])
    for cell, score in scores.items():
        assert sizes[cell] == score / max(scores.values())


def test_an_action_that_was_not_tried() -> None:
    found = effects_map()
    signs = np.zeros(found.rd.shape, dtype=np.int8)
    signs[1, 0] = -1
    assert relative_sizes(found, "effect", signs)[1, 0] == 1
    signs[0, 1] = 1
    with pytest.raises(ChoiceError, match=r"expert 1 of layer 0 .*--candidates"):
        relative_sizes(found, "effect", signs)


def test_weights_that_are_all_zero() -> None:
    signs = np.zeros((2, 4), dtype=np.int8)
    assert not relative_sizes(effects_map(), "logit", signs).any()
    signs[0, 3] = 1  # its RD, and so its logit here, is 0
    with pytest.raises(ChoiceError, match="are 0 for every"):
        relative_sizes(effects_map(), "logit", signs)
