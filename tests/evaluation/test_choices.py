"""Studies of choices by other scores than RD, of weighted soft rules and of caps: grids, searches, controls."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import ChoiceError, UsageError
from steermoe_local.evaluation.measuring.opening import open_steering
from steermoe_local.evaluation.reports.sweep import sweep_csv, sweep_document
from steermoe_local.evaluation.studies.controls import draws as control_draws
from steermoe_local.evaluation.studies.controls.controls import ALL, Controls, run_controls
from steermoe_local.evaluation.studies.search.grid import Choice, Grid, parse_caps, plan
from steermoe_local.evaluation.studies.search.objective import Budget, search_space
from steermoe_local.evaluation.studies.search.sweep import sweep
from steermoe_local.evaluation.studies.search.tune import tune
from steermoe_local.evaluation.studies.steerings import both_ways
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.ranks import RANKS
from steermoe_local.pairs.pairs import Pair
from steermoe_local.steering.rules import Rule
from steermoe_local.steering.steering import Steering
from tests.evaluation.test_control_runs import MadeUpEvaluator
from tests.support.builders import random_counts
from tests.support.fake_evaluator import FakeEvaluator, rising
from tests.support.scored_maps import DIGITS, scored_map

SCORED = scored_map()


def steering(**choice: Any) -> Steering:
    return Steering("m", SCORED, **{"activate": 4, "deactivate": 4, **choice})


#
# grids
#


def test_lists_of_caps() -> None:
    assert parse_caps("1, 2.5,inf,1") == (1.0, 2.5, math.inf)
    for bad in ("", "0", "-1", "nan", "hard", "1,,2", "1_0", "\u0661", "1e9", "-inf"):
        with pytest.raises(UsageError, match=r"^--cap: "):
            parse_caps(bad, "--cap")


def test_a_grid_of_rules() -> None:
    grid = Grid((2,), (2,), strengths=(None, 2.0), caps=(1.0, math.inf), weights="logit", both_ways=True)
    assert grid.rules == (Rule(), Rule(2.0, "logit"), Rule(cap=1.0), Rule(cap=math.inf))
    found = plan(steering(rank="effect"), grid)
    assert len(found.choices) == grid.n == 8
    for choice, bias in zip(found.choices, found.biases, strict=True):
        made = steering(activate=2, deactivate=2, rank="effect", reverse=choice.reverse, **choice_rule(choice)).build()
        assert (bias is None) == (made is None)
        if bias is not None and made is not None:
            assert bias.key == made.key
    assert len(set(found.keys)) == 8
    names = [str(choice) for choice in found.choices]
    assert "+2 -2, strength 2, weights logit" in names
    assert "+2 -2, cap inf, reverse" in names
    data = json.loads(json.dumps(grid.to_dict(), allow_nan=False))
    assert (data["caps"], data["weights"]) == ([1.0, "inf"], "logit")


def choice_rule(choice: Choice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in ("scale", "weights", "cap")}


def test_caps_alone() -> None:
    grid = Grid((2,), (0,), strengths=(), caps=(2.0,))
    assert [choice.cap for choice in plan(steering(), grid).choices] == [2.0]
    with pytest.raises(UsageError, match="strengths"):
        Grid((2,), (0,), strengths=())
    with pytest.raises(UsageError, match="weights logit"):
        Grid((2,), (0,), caps=(1.0,), weights="logit")


def test_a_choice_whose_weights_are_not_known_is_impossible() -> None:
    """By RD some of the first experts were not tried."""
    grid = Grid((1, 30), (0,), strengths=(1.0,), weights="effect")
    with pytest.raises(ChoiceError, match="was not tried"):
        plan(steering(), grid)
    grid = replace(grid, activate=(0, 30))
    found = plan(steering(), grid)
    assert [str(choice.choice) for choice in found.impossible] == ["+30 -0, strength 1, weights effect"]


def test_a_sweep_over_caps() -> None:
    evaluator = FakeEvaluator(SCORED, lambda i, j: 0.02 * (i + j), lambda i, j: 0.001 * (i + j))
    grid = Grid((2, 4), (0,), strengths=(None, 3.0), caps=(1.0, math.inf), weights="logit")
    result = sweep(evaluator, steering(rank="effect"), grid)  # type: ignore[arg-type]
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert [point["cap"] for point in data["points"]] == [None] * 4 + [1.0, 1.0, "inf", "inf"]
    assert [point["weights"] for point in data["points"]] == [None, None, "logit", "logit"] + [None] * 4
    assert data["about"]["steering"]["rank"] == "effect"
    rows = [line.split(",") for line in sweep_csv(result).splitlines()]
    at = [rows[0].index(name) for name in ("strength", "cap", "weights")]
    assert [[row[i] for i in at] for row in rows[1::2]] == [
        ["hard", "", ""],
        ["3.0", "", "logit"],
        ["", "1.0", ""],
        ["", "inf", ""],
    ]
    assert "cap inf" in sweep_document(result).markdown()


#
# searches
#


@pytest.mark.parametrize("rank", RANKS)
def test_the_search_space_is_that_of_the_rank(rank: str) -> None:
    found = search_space(steering(rank=rank, layers="1-2"))
    assert tuple(found) == SCORED.numbers(layers=(1, 2), rank=rank)


def test_tuned_by_effect() -> None:
    evaluator = FakeEvaluator(SCORED, lambda i, j: 0.5 * rising(i + j, 2), lambda i, j: 0.001 * (i + j))
    result = tune(evaluator, steering(rank="effect", cap=3.0), Budget(max_ppl_increase=0.05))  # type: ignore[arg-type]
    assert result.bias is not None
    assert result.chosen is not None
    choice = json.loads(result.bias.provenance["choice"])
    assert (choice["rank"], choice["cap"], result.bias.mode) == ("effect", 3.0, "capped")
    signs = SCORED.choose(result.chosen.activate, result.chosen.deactivate, rank="effect")
    assert np.array_equal(result.bias.signs, signs)


#
# controls
#


def controls(real: Steering, kinds: Any, **options: Any) -> tuple[MadeUpEvaluator, dict[str, Any]]:
    evaluator = MadeUpEvaluator(np.zeros(SCORED.rd.shape), SCORED.identity)
    found = run_controls(evaluator, real, Controls(4, kinds), real_effect=0.5, **options)  # type: ignore[arg-type]
    return evaluator, {one.kind: one for one in found}


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["random", "matched", "bottom"])
def test_controls_have_the_strengths_of_the_real_choice(reverse: bool, kind: str) -> None:
    real = steering(scale=3.0, weights="logit", deactivate=3, reverse=reverse)
    evaluator, found = controls(real, [kind])
    assert found[kind].n, found[kind].note
    biases = both_ways(real, SCORED.identity)
    for number, bias in enumerate(evaluator.asked):
        assert bias is not None
        values, wanted = (np.sort(one.dense()[one.dense() != 0]) for one in (bias, biases[number % 2]))
        assert np.array_equal(values, wanted)
        assert len(set(np.abs(wanted).tolist())) > 2


def test_a_strength_below_0_is_no_choice() -> None:
    """So no control has one: the other side is that of the reversed choice."""
    with pytest.raises(UsageError, match="--reverse"):
        steering(scale=-3.0)


@pytest.mark.parametrize("rank", RANKS)
def test_controls_of_every_rank(rank: str) -> None:
    real = steering(rank=rank, cap=2.0)
    evaluator, found = controls(real, ALL)
    numbers = {(bias.n_active, bias.n_inactive, bias.mode, bias.cap) for bias in evaluator.asked if bias}
    biases = both_ways(real, SCORED.identity)
    assert numbers == {(bias.n_active, bias.n_inactive, "capped", 2.0) for bias in biases}
    assert found["random"].n == found["matched"].n == 4
    assert found["bottom"].labels == ("smallest |RD|" if rank not in RANKS[1:4] else f"smallest |{rank}|",)
    for kind in ("superficial", "shuffled", "same-side"):
        assert found[kind].n == 0
        words = "no pairs" if rank in ("rd", "log-odds") else f"chosen by {rank}"
        assert words in found[kind].note


def test_the_least_by_the_rank() -> None:
    evaluator, _ = controls(steering(rank="logit"), ["bottom"], both_ways=False)
    bias = evaluator.asked[0]
    assert bias is not None
    assert SCORED.logit is not None
    sizes = np.abs(SCORED.logit)
    for sign in (1, -1):
        chosen = sizes[bias.signs == sign]
        assert len(chosen) == 4
        others = sizes[(np.sign(SCORED.logit) == sign) & (bias.signs == 0)]
        assert chosen.max() < others.min()


@pytest.mark.parametrize("of_file", [True, False])
def test_maps_of_other_pairs_under_the_real_rule(monkeypatch: pytest.MonkeyPatch, of_file: bool) -> None:
    """By log-odds and capped: counts are enough; a bias file does not tell its rank, but its cap."""
    other = replace(ExpertMap.from_counts(random_counts(1, SCORED.identity, 40, 50)), n_pairs=3)
    monkeypatch.setattr(control_draws, "superficial_maps", lambda *_, **__: {"form": other})
    real = steering(rank="log-odds", cap=2.0, epsilon=0.5)
    if of_file:
        real = Steering("file", bias=real.build())
    pairs = [Pair("1", "a b", "c d", "b", "d")]
    evaluator = MadeUpEvaluator(np.zeros(SCORED.rd.shape), SCORED.identity)
    (found,) = run_controls(
        evaluator,  # type: ignore[arg-type]
        real,
        Controls(4, ["superficial"], pairs),
        real_effect=0.5,
    )
    assert found.labels == ("form",), found.note
    for number, bias in enumerate(evaluator.asked):
        assert bias is not None
        assert (bias.mode, bias.cap, bias.epsilon) == ("capped", 2.0, 0.5)
        wanted = other.choose(4, 4, reverse=bool(number), rank="rd" if of_file else "log-odds")
        assert np.array_equal(bias.signs, wanted)


#
# opened
#


def test_open_steering(tmp_path: Any) -> None:
    path = tmp_path / "m.json"
    SCORED.save(path)
    found = open_steering(path, activate=3, rank="effect", strength=2.0, weights="effect")
    assert (found.rank, found.rule) == ("effect", Rule(2.0, "effect"))
    assert open_steering(path, activate=3, cap=math.inf).rule == Rule(cap=math.inf)
    assert open_steering("digits-words", rank="log-odds").activate == 2, "numbers of the card"
    with pytest.raises(UsageError, match="strength"):
        open_steering(path, activate=3, weights="effect")
    bias = tmp_path / "b.gguf"
    for fields in ({"rank": "effect"}, {"cap": 1.0}, {"weights": "logit"}):
        with pytest.raises(UsageError, match="chosen from a map"):
            open_steering(bias=bias, **fields)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="steermoe attribute"):
        open_steering(DIGITS, activate=3, rank="effect").build()
