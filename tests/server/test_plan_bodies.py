"""The field steering with anything in it: 200 or 400, and then one line that names the rule and the field."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from steermoe_local import UsageError, model_info
from steermoe_local.server import SteeringRegistry
from steermoe_local.server.api_errors import ApiError, request_error
from steermoe_local.server.registered import Applied
from steermoe_local.server.schemas import GivenPlan
from steermoe_local.server.schemas_chat import ChatRequest
from steermoe_local.server.schemas_plans import rule_schema
from steermoe_local.steering.plan_rules import MAX_RULES
from steermoe_local.steering.plan_text import format_rule
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import messages, post


@pytest.fixture(scope="module")
def registry() -> SteeringRegistry:
    found = SteeringRegistry()
    assert found.open(model_info(TINY).identity) == []
    return found


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2) as found:
        yield found


ANSWER: dict[str, Any] = {"phase": "answer", "map": None}


def asked(registry: SteeringRegistry, steering: Any) -> Applied:
    """What a request with this field is steered by. Raises ApiError."""
    try:
        request = ChatRequest.model_validate({"messages": messages("a"), "steering": steering})
    except ValidationError as error:
        raise request_error(error) from None
    return registry.resolve(request.steering)


@pytest.mark.parametrize(
    ("steering", "words"),
    [
        ([], "1 to 64 rules, not 0"),
        ({"rules": []}, "1 to 64 rules, not 0"),
        ({"rules": "answer: none"}, "give a list of rules"),
        ({"rules": {"map": None}}, "give a list of rules"),
        (["answer: none", 5], "rule 2: "),
        (["answer: none", None], "rule 2: "),
        (["answer: none", []], "rule 2: "),
        (["anser: none"], "rule 1 'anser: none': 'anser' is no place"),
        (["answer"], "rule 1 "),
        (["answer none"], "rule 1 'answer none': "),
        (["answer: none", "answer[4:2]: none"], "rule 2 'answer[4:2]: none': "),
        (["answer every 0: none"], "every 0"),
        (["answer: digits-words every=2"], "'every=2'"),
        ([{"phase": "answer"}], "rule 1: map: "),
        ([{"map": 5}], "rule 1: map: "),
        ([{"map": None, "tokens": [0, 1, 2]}], "rule 1: tokens: "),
        ([{"map": None, "tokens": [True, 2]}], "rule 1: tokens: "),
        ([{"map": None, "tokens": [0, 1.5]}], "rule 1: tokens: "),
        ([{"map": None, "every": 1.5}], "rule 1: every: "),
        ([{"map": None, "every": True}], "rule 1: every: "),
        ([{"map": None, "after": ""}], "rule 1: after: "),
        ([{"map": None, "after": -1}], "rule 1: after #-1"),
        ([{"map": None, "after": "x" * 1001}], "rule 1: after: "),
        ([{"map": None, "fro": 1}], "'fro': not a field"),
        ([{"map": None, "activate": 1}], "rule 1: none: nothing steers there"),
        ([{"map": "digits-words", "activate": -1}], "rule 1: activate: "),
        ([{"map": "digits-words", "activate": 1e6}], "rule 1: activate: "),
        ([{"map": "digits-words", "layers": "x" * 201}], "rule 1: layers: "),
        ([{"map": "digits-words", "cap": "infinite"}], "rule 1: cap: "),
        ([{"map": "digits-words", "cap": 0}], "rule 1: cap: "),
        ([{"map": "digits-words", "scale": 1e6}], "rule 1: scale: "),
        ([{"map": "digits-words", "rank": "best"}], "rule 1: rank: "),
        ([{"map": "digits-words", "mode": "soft", "cap": 2}], "rule 1: "),
        ([{"map": "digits-words", "when": {"map": "digits-words", "below": 1, "over": "prompt"}}], "rule 1: when: "),
        (
            [{"phase": "answer", "map": None, "when": {"map": "digits-words", "below": 1}}],
            "rule 1: when.over: is missing",
        ),
        ([{"phase": "answer", "map": None, "when": {"measure": "entropy"}}], "rule 1: when: give one limit"),
        ([{"phase": "answer", "map": None, "when": {"measure": "entropy", "below": True}}], "rule 1: when.below: "),
        ([{"phase": "answer", "map": None, "when": {"measure": "luck", "below": 1}}], "rule 1: when: 'luck'"),
        (
            [{"phase": "answer", "map": None, "when": {"map": "x", "below": 1, "over": 5000}}],
            "over last 5000",
        ),
        ([{"phase": "answer", "map": None, "when": {"map": "../x", "below": 1, "over": 5}}], "'../x' is no name"),
        ([{"map": "Digits-Words"}], "'Digits-Words' is no name"),
        ([{"map": "/etc/passwd", "activate": 1}], "'/etc/passwd' is no name"),
    ],
)
def test_what_is_refused(registry: SteeringRegistry, server: Running, steering: Any, words: str) -> None:
    with pytest.raises(ApiError) as caught:
        asked(registry, steering)
    assert words in str(caught.value)
    response = server.chat(steering=steering)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["message"]) == (400, "steering", str(caught.value))
    rules = steering["rules"] if isinstance(steering, dict) else steering
    registered = post(server, name="x", rules=rules)
    assert (registered.status_code, registered.json()["error"]["param"]) == (400, "rules")
    assert server.client.get("/v1/steering/x").status_code == 404


@pytest.mark.parametrize("steering", [{"phase": "answer", "map": "digits-words"}, {"tokens": [0, 4], "map": None}])
def test_a_rule_by_itself(registry: SteeringRegistry, server: Running, steering: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match=r'is of a rule, which stands in a list, .* or in \{"rules"') as caught:
        asked(registry, steering)
    error = server.chat(steering=steering).json()["error"]
    assert (error["param"], error["message"]) == ("steering", str(caught.value))
    assert asked(registry, [steering]).label == asked(registry, {"rules": [steering]}).label


@pytest.mark.parametrize("steering", [5, True, 0.5])
def test_what_is_no_form_of_a_steering(server: Running, steering: Any) -> None:
    response = server.chat(steering=steering)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "steering")
    for form in ("name", '{"map": NAME', "rule as text", "list of rules", '{"rules": [...]}', "null"):
        assert form in error["message"]


@pytest.mark.parametrize("name", ["answer", "all"])
def test_a_place_alone(server: Running, name: str) -> None:
    response = server.chat(steering=name)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "steering_not_found")
    assert f"a rule has a colon and what steers, like {name}: none" in response.json()["error"]["message"]
    assert "colon" not in server.chat(steering="nothing").json()["error"]["message"]


def test_rules_in_one_text(registry: SteeringRegistry, server: Running) -> None:
    rules = ["answer after 'x; y': digits-words +1", "thinking: none"]
    assert asked(registry, "; ".join(rules) + ";").info == asked(registry, rules).info
    for several in (["all: none", "; ".join(rules)], {"rules": ["all: none", "; ".join(rules)]}):
        with pytest.raises(ApiError, match=r"rule 2 .*2 rules in one text; give them as 2"):
            asked(registry, several)
    for text in (" ; ", "answer: none; " * 1000):
        assert server.chat(steering=text).status_code == 400
    assert post(server, name="x", rules=["; ".join(rules)]).status_code == 400


def test_a_token_that_the_model_lacks(server: Running) -> None:
    n_vocab = server.client.get("/v1/models").json()["data"][0]["meta"]["n_vocab"]
    for mark in ("after", "until"):
        response = server.chat(steering=["all: digits-words", f"answer {mark} #{n_vocab}: digits-words +1"])
        assert response.status_code == 200, "the first rule hides it"
        response = server.chat(steering=["prompt: none", f"answer {mark} #{n_vocab}: digits-words +1"])
        assert response.status_code == 400
        told = response.json()["error"]["message"]
        assert f"rule 2: {mark} #{n_vocab}: the vocabulary has 0 to {n_vocab - 1}" in told
        assert server.chat(steering=f"answer {mark} #{n_vocab - 1}: digits-words +1").status_code == 200


def test_fields_beside_rules(registry: SteeringRegistry) -> None:
    with pytest.raises(ApiError) as caught:
        asked(registry, {"rules": ["answer: none"], "map": "digits-words"})
    assert (caught.value.param, caught.value.code) == ("steering.map", "unknown_field")


def test_the_most_that_a_plan_can_have(registry: SteeringRegistry) -> None:
    rule = {
        "phase": "answer",
        "after": "é" * 1000,
        "until": "\0" * 0 + "“" * 1000,
        "map": "digits-words",
        "layers": "1-3",
    }
    when = {"map": "digits-words", "below": 1.0, "over": 4096}
    rules = [
        rule | {"when": when, "tokens": [i, 2**31], "every": 2**31, "activate": i % 3 + 1} for i in range(MAX_RULES)
    ]
    applied = asked(registry, {"rules": rules})
    assert applied.info is not None
    assert len(applied.info["rules"]) == MAX_RULES
    assert asked(registry, rules).info == applied.info


WORDS = ["answer", "thinking", "prompt", "all", ":", "[0:4]", "[-1:]", "every", "2", "after", "until", '"x"', "#5"]
WORDS += ["when", "digits-words", "document-memory", "none", "+2", "-2", "reverse", "<", ">", "0.1", "over", "last"]
WORDS += [
    "entropy",
    "by",
    "rd",
    "effect",
    "mode=soft",
    "scale=2",
    "cap=inf",
    "layers=1-2",
    "'",
    "\n",
    "\0",
    "../x",
    "é",
]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ["phase", "tokens", "after", "until", "every", "when", "map", "activate", "deactivate", "reverse", "layers"]
FIELDS += ["preset", "rank", "mode", "scale", "weights", "cap", "rules"]
RIGHT = st.sampled_from(
    [0, 1, 2, "answer", "prompt", "digits-words", "none", True, [0, 4], [1, None], 0.5, "hard", "inf"]
)
WHEN = st.fixed_dictionaries(
    {}, optional={"measure": RIGHT, "map": RIGHT, "by": RIGHT, "below": RIGHT, "above": RIGHT, "over": RIGHT}
)
RULE = st.dictionaries(st.sampled_from(FIELDS), RIGHT | WHEN | JSON, max_size=5).map(lambda rule: {"map": None} | rule)
TEXT = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)
STEERING = (
    JSON
    | RULE
    | TEXT
    | st.lists(RULE | TEXT | JSON, max_size=4)
    | st.builds(lambda rules: {"rules": rules}, st.lists(RULE | TEXT, max_size=4) | JSON)
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(steering=STEERING)
def test_anything(registry: SteeringRegistry, steering: Any) -> None:
    applied, error = None, None
    try:
        applied = asked(registry, steering)
    except ApiError as refused:
        error = refused
    except UsageError:  # of a choice, which is no plan
        assert isinstance(steering, dict)
        assert "map" in steering
    if error is not None:
        message = str(error)
        assert error.status in (400, 404)
        assert (error.param or "").startswith("steering")
        assert message.isprintable(), message
        assert len(message) < 1000
        is_plan = isinstance(steering, list) or (isinstance(steering, dict) and isinstance(steering.get("rules"), list))
        assert not is_plan or error.code == "unknown_field" or re.search(r"\brules?\b", message), message
    elif applied is not None and applied.info is not None and "rules" in applied.info:
        again = asked(registry, applied.info["rules"])
        assert again.info == applied.info, "the rules that are told are not those that steer"


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(rule=RULE | TEXT | JSON)
def test_what_can_be_asked_for_is_in_the_schema(registry: SteeringRegistry, rule: Any) -> None:
    """A client that keeps to the document is told no more by errors than that names or numbers do not fit."""
    try:
        asked(registry, [rule])
    except ApiError:
        return
    Draft202012Validator(rule_schema()).validate(rule)


def test_rules_of_files_are_in_the_schema() -> None:
    validator = Draft202012Validator(rule_schema())
    full = {"phase": "answer", "tokens": [0, None], "after": 5, "until": "x", "every": 2, "map": "a", "layers": "1-2"}
    full |= {
        "activate": 1,
        "deactivate": 1,
        "reverse": True,
        "rank": "rd",
        "mode": "capped",
        "cap": "inf",
        "scale": None,
    }
    full |= {"when": {"measure": "routing", "map": "a", "by": "effect", "above": -1, "over": 3}, "weights": "none"}
    for right in (full, {"map": None}, "answer: none", {"map": "none", "phase": "all"}):
        validator.validate(right)
    for wrong in (
        5,
        None,
        {},
        {"map": "A"},
        {"map": "a", "x": 1},
        {"map": "a", "every": 0},
        "",
        {"map": "a", "tokens": [1]},
    ):
        assert not validator.is_valid(wrong), wrong


def test_a_plan_is_read_once() -> None:
    """What was validated is what the registry gets; a second validation changes nothing."""
    request = ChatRequest.model_validate({"messages": messages("a"), "steering": "answer[0:4]: digits-words +2"})
    assert isinstance(request.steering, GivenPlan)
    again = ChatRequest.model_validate({"messages": messages("a"), "steering": request.steering})
    assert again.steering == request.steering
    assert [format_rule(rule) for rule in request.steering.rules] == ["answer[0:4]: digits-words +2"]
    assert json.loads(json.dumps(ChatRequest.model_json_schema()))["properties"]["steering"]
