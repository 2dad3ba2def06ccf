"""The object form of the rules of a plan, and that it says the same as the text form."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local._util.json_text import parse_json
from steermoe_local.errors import UsageError
from steermoe_local.steering.plan_objects import rule_from, rule_to_dict, rules_from
from steermoe_local.steering.plan_rules import Condition, RuleSpec, Where
from steermoe_local.steering.plan_text import MAX_RULE, format_rule, parse_rule
from tests.support.plans import specs

SAME: dict[str, dict[str, Any]] = {
    "formal +8 -8": {"map": "formal", "activate": 8, "deactivate": 8},
    "thinking: none": {"phase": "thinking", "map": None},
    "answer: none": {"phase": "answer", "map": "none"},
    "answer[0:32]: careful -20": {"phase": "answer", "tokens": [0, 32], "map": "careful", "deactivate": 20},
    "prompt[-1:]: x": {"phase": "prompt", "tokens": (-1, None), "map": "x", "every": None},
    "all after 'Answer:' until #0 every 3: x reverse": {
        **{"phase": "all", "after": "Answer:", "until": 0, "every": 3, "map": "x", "reverse": True}
    },
    "answer when f > -1 over prompt: x": {
        "phase": "answer",
        "map": "x",
        "when": {"map": "f", "above": -1, "over": "prompt"},
    },
    "answer when f by effect < 1 over last 3: x": {
        "phase": "answer",
        "map": "x",
        "when": {"measure": "routing", "map": "f", "by": "effect", "below": 1.0, "over": 3},
    },
    "answer when entropy < 1: x": {"phase": "answer", "map": "x", "when": {"measure": "entropy", "below": 1}},
    "x cap=inf mode=capped": {"map": "x", "cap": "inf", "mode": "capped"},
    "x scale=2 weights=none": {"map": "x", "scale": 2, "weights": "none"},
}


@pytest.mark.parametrize("text", SAME)
def test_two_forms_of_one_rule(text: str) -> None:
    assert rule_from(SAME[text]) == parse_rule(text) == rule_from(text)
    assert rule_from(rule_to_dict(parse_rule(text))) == parse_rule(text)


@given(specs())
def test_what_is_written_reads_back(spec: RuleSpec) -> None:
    data = rule_to_dict(spec)
    assert parse_json(json.dumps(data)) == json.loads(json.dumps(data)), "plain JSON, which strict readers take"
    if len(format_rule(spec)) > MAX_RULE:
        with pytest.raises(UsageError, match="longer"):
            rule_from(data)
        return
    read = rule_from(json.loads(json.dumps(data)))
    assert read == spec
    assert rule_to_dict(read) == data
    assert parse_rule(format_rule(read)) == read


def test_what_is_left_out_is_not_written() -> None:
    assert rule_to_dict(parse_rule("x")) == {"phase": "all", "map": "x"}
    assert rule_to_dict(RuleSpec(Where("thinking"), None)) == {"phase": "thinking", "map": None}
    assert rule_to_dict(RuleSpec(Where(), "x", {"cap": math.inf, "layers": None})) == {
        **{"phase": "all", "map": "x", "cap": "inf"}
    }


HUGE = 10**5000
DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
REFUSED: list[tuple[Any, str]] = [
    ([], "an object"),
    (5, "an object"),
    (None, "an object"),
    ({}, "map"),
    ({"phase": "answer"}, "map"),
    ({"map": ""}, "none"),
    ({"map": 5}, "map: 5"),
    ({"map": True}, "map: True"),
    ({"map": "\x00"}, "'\\x00'"),
    ({"map": "\ud800"}, "'\\ud800'"),
    ({"map": "x", "odd\x1b": 1}, "'odd\\x1b'"),
    ({"map": "x", "phase": "reply"}, "'reply'"),
    ({"map": "x", "phase": ["answer"]}, "phase: a list"),
    ({"map": "x", "tokens": 5}, "tokens: 5"),
    ({"map": "x", "tokens": [1]}, "tokens"),
    ({"map": "x", "tokens": [None, 3]}, "tokens"),
    ({"map": "x", "tokens": [0, True]}, "tokens"),
    ({"map": "x", "tokens": [0.0, 3]}, "tokens"),
    ({"map": "x", "tokens": [3, 3]}, "all[3:3]"),
    ({"map": "x", "tokens": [-1, None]}, "-1"),
    ({"map": "x", "tokens": [0, HUGE]}, "bits"),
    ({"map": "x", "every": 0}, "every 0"),
    ({"map": "x", "every": True}, "every: True"),
    ({"map": "x", "every": 2.0}, "every: 2.0"),
    ({"map": "x", "every": HUGE}, "bits"),
    ({"map": "x", "after": HUGE}, "bits"),
    ({"map": "x", "after": -1}, "#-1"),
    ({"map": "x", "after": ""}, "after"),
    ({"map": "x", "after": "y" * 1001}, "1000"),
    ({"map": "x", "until": DEEP}, "until: a list"),
    ({"map": "x", "until": {"y": DEEP}}, "until: an object"),
    ({"map": None, "activate": 3}, "activate"),
    ({"map": "x", "activate": -3}, "-3"),
    ({"map": "x", "activate": HUGE}, "bits"),
    ({"map": "x", "activate": 3.0}, "3.0"),
    ({"map": "x", "reverse": 1}, "reverse: 1"),
    ({"map": "x", "layers": ""}, "layers"),
    ({"map": "x", "layers": "\ud800"}, "'\\ud800'"),
    ({"map": "x", "scale": HUGE}, "bits"),
    ({"map": "x", "scale": math.nan}, "nan"),
    ({"map": "x", "scale": math.inf}, "inf"),
    ({"map": "x", "cap": "INF"}, '"inf"'),
    ({"map": "x", "cap": -HUGE}, "bits"),
    ({"map": "x", "when": "entropy < 1"}, "when: 'entropy < 1'"),
    ({"map": "x", "when": {"measure": "entropy", "below": 1}}, "thinking or answer"),
    ({"map": "x", "phase": "answer", "when": {}}, "when.over"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "below": 1}}, "when.over"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "below": 1, "over": "all"}}, "when.over"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "below": 1, "over": True}}, "when.over"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "below": 1, "over": HUGE}}, "bits"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "over": 3}}, "limit"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "over": 3, "below": 1, "above": 0}}, "limit"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "over": 3, "below": HUGE}}, "bits"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "over": 3, "below": math.nan}}, "nan"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "over": 3, "below": 1, "by": "logit"}}, "'logit'"),
    ({"map": "x", "phase": "answer", "when": {"map": "f", "over": 3, "below": 1, "y": 1}}, "when.'y'"),
    ({"map": "x", "phase": "answer", "when": {"measure": "surprise", "below": 1}}, "'surprise'"),
    ({"map": "x", "phase": "answer", "when": {"measure": "entropy", "below": 1, "over": "prompt"}}, "when.over"),
    ({"map": "x", "phase": "answer", "when": {"measure": "margin", "below": 1, "map": "f"}}, "margin"),
    ("answer: ", "what steers"),
]


@pytest.mark.parametrize(("data", "words"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_refused(data: Any, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        rules_from(["x", {"map": "x"}, data])
    message = str(refused.value)
    assert message.startswith("rule 3")
    assert words in message
    assert message.isprintable()
    assert len(message) < 1000
    with pytest.raises(UsageError, match=r"^rule\b"):
        rule_from(data)


@pytest.mark.parametrize("data", ["x", b"x", None, {"rules": []}, 5, [], ["x"] * 65])
def test_no_list_of_rules(data: Any) -> None:
    with pytest.raises(UsageError, match="rule"):
        rules_from(data)


def test_rules_in_any_form() -> None:
    spec = RuleSpec(Where("answer", when=Condition("entropy", below=1)), "x")
    assert rules_from([format_rule(spec), rule_to_dict(spec), spec]) == [spec] * 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ("phase", "tokens", "after", "until", "every", "when", "map", "activate", "reverse", "layers", "scale", "cap")


@given(st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_any_object_is_a_rule_or_one_line(data: dict[str, Any]) -> None:
    try:
        spec = rule_from(data, 4)
    except UsageError as error:
        message = str(error)
    else:
        assert parse_rule(format_rule(spec)) == spec
        return
    assert message.startswith("rule 4: ")
    assert message.isprintable()
