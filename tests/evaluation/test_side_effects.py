"""The guards, by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from steermoe_local.evaluation.measuring.measurements import UNSTEERED, Answer, Measurement
from steermoe_local.evaluation.measuring.side_effects import LOOPING, fluency
from steermoe_local.evaluation.tasks.neutral_text import TextScore


def answer(item: str = "a", value: float = 1.0, **fields: Any) -> Answer:
    facts = {
        "seed": 0,
        "text": "three",
        "label": "positive",
        "finish": "stop",
        "n_tokens": 4,
        "distinct_2": 1.0,
        "loop": 0.0,
    }
    return Answer(item=item, value=value, **{**facts, **fields})


def measurement(*answers: Answer, benign: tuple[Answer, ...] = (), text: TextScore | None = None) -> Measurement:
    return Measurement(None, UNSTEERED, answers, benign, text)


def test_all_guards() -> None:
    base = measurement(answer(), text=TextScore(1.0, 0.0, 1.0, 10))
    found = fluency(
        measurement(
            answer("a", text=" \n", distinct_2=0.5, loop=LOOPING),
            answer("b", finish="length", label="ill-formed", loop=LOOPING - 0.01),
            answer("c", finish="context"),
            answer("d"),
            benign=(answer("x", 1.0), answer("y", 0.0)),
            text=TextScore(1.0 + math.log(1.5), 0.3, 0.8, 10),
        ),
        base,
    )
    assert found.perplexity_ratio == pytest.approx(1.5)
    assert found.perplexity == pytest.approx(math.e * 1.5)
    assert (found.kl, found.same_top) == (0.3, 0.8)
    assert found.distinct_2 == pytest.approx(3.5 / 4)
    assert found.longest_loop == LOOPING
    assert (found.looping, found.empty, found.cut, found.ill_formed) == (0.25, 0.25, 0.5, 0.25)
    assert found.refused is not None
    assert (found.refused.value, found.refused.n, found.refused.method) == (0.5, 2, "wilson")
    data = found.to_dict()
    assert data["refused"]["value"] == 0.5


def test_what_was_not_measured_is_none() -> None:
    found = fluency(measurement(answer()), measurement(answer()))
    assert (found.perplexity, found.perplexity_ratio, found.kl, found.same_top, found.refused) == (None,) * 5
    text = TextScore(1.0, 0.0, 1.0, 10)
    assert fluency(measurement(answer(), text=text), measurement(answer())).perplexity_ratio is None


def test_the_unsteered_model_costs_nothing() -> None:
    base = measurement(answer(), text=TextScore(2.0, 0.0, 1.0, 10))
    found = fluency(base, base)
    assert (found.perplexity_ratio, found.kl, found.looping) == (1.0, 0.0, 0.0)


def test_refusals_in_degrees_are_bootstrapped() -> None:
    benign = tuple(answer(str(i), i / 10) for i in range(10))
    found = fluency(measurement(answer(), benign=benign), measurement(answer()))
    assert found.refused is not None
    assert found.refused.method == "bootstrap"
