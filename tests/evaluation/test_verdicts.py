"""Verdicts in plain words: which case each figure is, and that the sentence has the figures."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from steermoe_local.evaluation.metrics.intervals import Interval, difference
from steermoe_local.evaluation.reports import verdicts
from steermoe_local.evaluation.reports.verdicts import Measured, judge, of_evaluation
from steermoe_local.evaluation.studies.controls.controls import ControlResult
from steermoe_local.evaluation.studies.evaluate import Evaluation
from steermoe_local.evaluation.studies.signatures import Signature
from tests.evaluation.test_report import made


def effect(value: float, low: float, high: float, n: int = 100) -> Interval:
    return Interval(value, low, high, n, "newcombe")


def measured(**changes: Any) -> Measured:
    """A steering that works, at no cost, ahead of random experts."""
    facts: dict[str, Any] = {
        "what": "digits",
        "unsteered": 0.31,
        "steered": {"": 0.84},
        "effect": effect(0.53, 0.41, 0.64),
        "random": 0.06,
        "n_draws": 20,
        "percentile": 1.0,
        "perplexity": 1.02,
    }
    return Measured(**facts | changes)


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("works", {}, "digits in 84% of the answers instead of 31% (100 items)"),
    ("works", {}, "random experts change it by 6 points; other text is unharmed (perplexity +2%). Use it as it is."),
    ("works", {"n_draws": 3}, "only 3 draws"),
    ("works", {"random": None, "percentile": None, "n_draws": 0}, "steermoe eval"),
    ("works", {"perplexity": None}, "was not measured"),
    ("works", {"what": ""}, "works: 84% of the answers instead of 31%"),
    ("works at a cost", {"perplexity": 1.4}, "other text suffers (perplexity +40%)"),
    ("works at a cost", {"perplexity": float("nan")}, "steermoe tune"),
    ("works at a cost", {"harms": ["refused benign prompts up by 12 points (towards)"]}, "up by 12 points"),
    ("no better than random", {"percentile": 0.6}, "only 60% of 20 random choices move it less"),
    ("no better than random", {"percentile": 0.6, "perplexity": 3.0}, "Do not rely on it"),
    ("too few items", {"effect": effect(0.2, -0.1, 0.45, 12)}, "12 items"),
    ("too few items", {"effect": effect(0.02, -0.1, 0.1, 12)}, "100 items or more"),
    ("no effect", {"effect": effect(0.01, -0.03, 0.04, 400)}, "no more than chance"),
    ("no effect", {"effect": effect(0.03, 0.01, 0.05, 4000)}, "hardly works"),
    ("nothing steered", {"changed": False, "effect": effect(0.0, -0.02, 0.02)}, "every answer is the same"),
    ("wrong way", {"effect": effect(-0.4, -0.5, -0.2)}, "--reverse"),
    ("no room", {"room": False, "unsteered": 0.98, "effect": effect(0.01, -0.01, 0.03)}, "hardly room"),
]


@pytest.mark.parametrize(("outcome", "changes", "says"), CASES)
def test_cases(outcome: str, changes: dict[str, Any], says: str) -> None:
    found = judge(measured(**changes))
    assert found.outcome == outcome
    assert says in found.text
    assert found.works == outcome.startswith("works")
    assert found.text.endswith(".")


def test_how_many_items_would_tell() -> None:
    """As many that an interval of the same shape, which narrows with their root, lies above 0; a fifth to spare."""
    found = judge(measured(effect=effect(0.2, -0.2, 0.5, 25)))
    assert "Measure on 120 items or more." in found.text  # 1.2 * 25 * (0.4 / 0.2)^2


#
# evaluations
#

N = 40


def evaluation(unsteered: int, towards: int, away: int | None = None, **fields: Any) -> Evaluation:
    """Of 40 items so many show the positive side."""
    sides = [unsteered, towards, *([] if away is None else [away])]
    return made(*([1.0] * k + [0.0] * (N - k) for k in sides), **fields)


def test_both_directions_are_said() -> None:
    found = of_evaluation(evaluation(12, 36, 2))
    assert found.outcome == "works"
    assert "digits in 30% of the answers unsteered, 90% steered towards, 5% steered away (40 items)" in found.text


def test_controls_decide() -> None:
    drawn = [0.9, -0.8, 0.1, 0.95] * 5
    control = ControlResult.of("random", drawn, [str(i) for i in range(20)], 0.85)
    assert of_evaluation(evaluation(12, 36, 2, controls=(control,))).outcome == "no better than random"
    small = ControlResult.of("random", [0.1, -0.1] * 10, [str(i) for i in range(20)], 0.85)
    found = of_evaluation(evaluation(12, 36, 2, controls=(small,)))
    assert found.outcome == "works"
    assert "random experts change it by 10 points" in found.text
    empty = ControlResult.of("random", [], [], 0.85, note="too few experts")
    assert "not compared with random" in of_evaluation(evaluation(12, 36, 2, controls=(empty,))).text


def test_signatures_are_costs_or_no_room() -> None:
    fired = Signature("over-refusal", "towards", "rule", "refused benign prompts up by 30 points")
    found = of_evaluation(evaluation(12, 36, 2, signatures=(fired,)))
    assert found.outcome == "works at a cost"
    assert "refused benign prompts up by 30 points (towards)" in found.text
    full = Signature("no room", "towards", "rule", "the unsteered rate is 98% already")
    assert of_evaluation(evaluation(39, 40, signatures=(full,))).outcome == "no room"


def test_the_negative_direction_alone_lowers_the_rate() -> None:
    whole = evaluation(30, 36, 4)
    only = replace(
        whole,
        sides=(whole.sides[0], whole.sides[2]),
        effects={"away": whole.effects["away"]},
        measurements=(whole.measurements[0], whole.measurements[2]),
    )
    found = of_evaluation(only)
    assert found.outcome == "works"
    assert "digits in 10% of the answers instead of 75%" in found.text


def test_the_same_answers_are_nothing_steered() -> None:
    whole = evaluation(12, 12)
    same = replace(whole, measurements=(whole.measurements[0], whole.measurements[0]))
    assert of_evaluation(same).outcome == "nothing steered"
    assert of_evaluation(whole).outcome == "no effect", "other texts with the same rate are no effect"


#
# fits, conditions, maps, attributions
#


def test_fits() -> None:
    arguments: dict[str, Any] = {"change": 0.5, "change_se": 0.1, "kl": 0.01, "budget": 0.02, "n_items": 30}
    assert verdicts.of_fit(**arguments, confirmed=True).outcome == "works"
    assert verdicts.of_fit(**{**arguments, "kl": 0.03}, confirmed=True).outcome == "works at a cost"
    assert verdicts.of_fit(**arguments, confirmed=False).outcome == "too few items"
    assert verdicts.of_fit(**{**arguments, "change": -0.1}, confirmed=False).outcome == "no effect"
    assert "no items to confirm" in verdicts.of_fit(0.0, None, 0.0, 0.02, 0, confirmed=False).text


@pytest.mark.parametrize(
    ("shares", "differs", "begins"),
    [
        ((0.04, 0.06), True, "It works:"),
        ((0.04, 0.3), True, "It works, with errors:"),
        ((0.04, 0.06), False, "It does not work:"),
        ((None, None), False, "It does not work:"),
    ],
)
def test_conditions(shares: tuple[float | None, float | None], differs: bool, begins: str) -> None:
    assert verdicts.of_condition(*shares, differs=differs).startswith(begins)


def test_maps_and_attributions() -> None:
    assert len({verdicts.of_map(differs) for differs in (None, False, True)}) == 3
    assert verdicts.of_effects(16, 0, stable=True).startswith("None of the 16 experts")
    assert verdicts.of_effects(16, 5, stable=True).startswith("5 of the 16 experts")
    assert verdicts.of_effects(16, 5, stable=False).endswith("give more draws.")


def test_an_interval_of_the_report_is_that_of_the_study() -> None:
    found = evaluation(12, 36, 2)
    assert found.headline[1] == difference([1.0] * 36 + [0.0] * 4, [1.0] * 2 + [0.0] * 38)
