"""The rules of steering: what each needs, and which of what is asked for goes with which."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import UsageError
from steermoe_local.maps.ranks import WEIGHTS
from steermoe_local.steering.rules import DEFAULT_CAP, RULES, Rule, json_cap

HARD, SOFT, CAPPED = Rule(), Rule(2.0, "logit"), Rule(cap=3.0)

CASES: list[tuple[Rule, dict[str, Any], Rule]] = [
    (HARD, {}, HARD),
    (SOFT, {}, SOFT),
    (CAPPED, {}, CAPPED),
    (HARD, {"scale": 1.5}, Rule(1.5)),
    (HARD, {"cap": math.inf}, Rule(cap=math.inf)),
    (HARD, {"mode": "capped"}, Rule(cap=DEFAULT_CAP)),
    (HARD, {"mode": "soft", "strength": 1.0}, Rule(1.0)),
    (HARD, {"weights": "effect", "strength": 1.0}, Rule(1.0, "effect")),
    (HARD, {"weights": "none"}, HARD),
    (SOFT, {"scale": 5.0}, Rule(5.0, "logit")),
    (SOFT, {"weights": "none"}, Rule(2.0)),
    (SOFT, {"weights": "effect"}, Rule(2.0, "effect")),
    (SOFT, {"mode": "hard"}, HARD),
    (SOFT, {"mode": "hard", "weights": "none"}, HARD),
    (SOFT, {"cap": 1.0}, Rule(cap=1.0)),
    (SOFT, {"mode": "capped"}, Rule(cap=DEFAULT_CAP)),
    (CAPPED, {"mode": "capped"}, CAPPED),
    (CAPPED, {"scale": 1.0}, Rule(1.0)),
    (CAPPED, {"mode": "soft", "strength": 4.0}, Rule(4.0)),
    (SOFT, {"scale": 0.0}, Rule(0.0, "logit")),
]


@pytest.mark.parametrize(("rule", "asked", "wanted"), CASES)
def test_what_is_asked_for(rule: Rule, asked: dict[str, Any], wanted: Rule) -> None:
    assert rule.changed(**asked) == wanted


REFUSED: list[tuple[Rule, dict[str, Any], str]] = [
    (HARD, {"mode": "soft"}, "how strong"),
    (HARD, {"weights": "logit"}, "how strong"),
    (HARD, {"scale": 1.0, "cap": 1.0}, "scale, cap: "),
    (HARD, {"weights": "logit", "cap": 1.0}, "weights, cap: "),
    (HARD, {"mode": "hard", "scale": 1.0}, "scale goes with mode soft"),
    (HARD, {"mode": "hard", "cap": 1.0}, "cap goes with mode capped"),
    (SOFT, {"mode": "soft", "cap": 1.0}, "cap goes with mode capped"),
    (CAPPED, {"mode": "capped", "weights": "logit"}, "weights goes with mode soft"),
    (HARD, {"scale": -1.0}, "strength -1: below 0; .* reverse"),
    (HARD, {"cap": 0.0}, "cap: 0.0"),
    (HARD, {"cap": -math.inf}, "cap: -inf"),
    (HARD, {"cap": math.nan}, "cap: nan"),
    (HARD, {"cap": 1e7}, "cap: "),
    (HARD, {"cap": 10**400}, "cap: "),
    (SOFT, {"weights": "rd"}, "weights: 'rd'"),
]


@pytest.mark.parametrize(("rule", "asked", "words"), REFUSED)
def test_what_does_not_go_together(rule: Rule, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        rule.changed(**asked)


def test_messages_call_things_by_the_callers_names() -> None:
    with pytest.raises(UsageError, match=r"^--cap goes with --mode capped"):
        HARD.changed("hard", cap=1.0, names={"cap": "--cap", "mode": "--mode"})


@pytest.mark.parametrize("fields", [{"scale": 1.0, "cap": 1.0}, {"weights": "logit"}, {"cap": 1.0, "weights": "logit"}])
def test_impossible_rules(fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rule(**fields)


numbers = st.none() | st.floats(0.01, 100)


@given(
    st.sampled_from([HARD, SOFT, CAPPED]),
    st.none() | st.sampled_from(RULES),
    numbers,
    numbers | st.just(math.inf),
    st.none() | st.sampled_from([*WEIGHTS, "none"]),
)
def test_a_rule_or_a_reason(rule: Rule, mode: Any, scale: Any, cap: Any, weights: Any) -> None:
    """What was asked for is in the rule, or it is refused; nothing that was asked for is left aside."""
    try:
        found = rule.changed(mode, scale, cap, weights)
    except UsageError:
        return
    assert mode in (None, found.name)
    assert scale in (None, found.scale)
    assert cap in (None, found.cap)
    assert weights in (None, found.weights) or (weights == "none" and found.weights is None)
    assert found.changed() == found
    assert Rule(**found.fields) == found


def test_json_has_no_infinity() -> None:
    assert [json_cap(cap) for cap in (None, 2.5, math.inf)] == [None, 2.5, "inf"]
