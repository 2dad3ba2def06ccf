"""Requests made up from the server's own OpenAPI document, right ones and wrong ones: its promises hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    status_code_conformance,
)

from steermoe_local.server import ServerSettings, SteeringRegistry, Worker, create_app
from tests.support.running_server import Load, Running, running

pytestmark = pytest.mark.alone  # its tests have one name

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, negative_data_rejection]


def document() -> dict[str, Any]:
    """The document; no model is needed for it.

    Fields without a meaning are left out, as there would be thousands of requests with them: `test_fields` sends each.
    """

    def nothing() -> Any:
        raise AssertionError("not started")

    load: Load = nothing
    found = create_app(Worker(load), SteeringRegistry(folder=None), ServerSettings("tiny")).openapi()
    without_meaning = ("Accepted, without effect: ", "Not offered: ")
    for part in found["components"]["schemas"].values():
        for name, field in list(part.get("properties", {}).items()):
            if field.keys() <= {"description", "enum"} and field.get("description", "").startswith(without_meaning):
                del part["properties"][name]
    return found


schema = schemathesis.openapi.from_dict(document())


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(n_ctx=64, parallel=2) as found:
        yield found
        assert found.chat(max_tokens=1).status_code == 200, "it lives"


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as found:
        found.trust_env = False
        yield found


@pytest.fixture(scope="module")
def seen() -> Iterator[Counter[tuple[str, int]]]:
    """What was answered; an answer that is never right would test little."""
    found: Counter[tuple[str, int]] = Counter()
    yield found
    answering = ("/v1/chat/completions", "/v1/responses", "/v1/responses/input_tokens", "/v1/completions")
    for path in (*answering, "/tokenize", "/detokenize"):
        assert found[f"POST {path}", 200] > 2, found
        assert found[f"POST {path}", 400] > 2, found
        assert found[f"POST {path}", 415], found


def name_what_there_is(case: schemathesis.Case) -> None:
    """Nobody draws the name of a model or a map by chance, or messages that make sense."""
    if "name" in case.path_parameters:
        case.path_parameters["name"] = "digits-words"
    body = case.body
    if not isinstance(body, dict):
        return
    if "model" in body:
        body["model"] = "tiny"
    steering = body.get("steering")
    if isinstance(steering, str):
        body["steering"] = "digits-words" if len(steering) % 2 else "answer: digits-words +2 -2"
    elif isinstance(steering, dict) and "rules" not in steering:
        steering |= {"map": "digits-words", "layers": None}
    for rules in (steering, body.get("rules"), steering.get("rules") if isinstance(steering, dict) else None):
        if isinstance(rules, list):
            rules[:] = ["answer: digits-words" if isinstance(rule, str) else rule_of(rule) for rule in rules]
    if "input" in body:
        name_what_a_response_needs(body)
    for message in body.get("messages", ()):
        if message.get("content") is None:
            message["content"] = "one"
        if message["role"] != "assistant":
            message.pop("tool_calls", None)


def rule_of(rule: dict[str, Any]) -> dict[str, Any]:
    """What of a rule made up makes sense with other fields of it."""
    kept = {
        name: rule[name] for name in ("every", "after", "until", "activate", "deactivate", "reverse") if name in rule
    }
    return kept | {"phase": rule.get("phase"), "map": "digits-words"}


def name_what_a_response_needs(body: dict[str, Any]) -> None:
    """Nothing is kept yet, and a format's schema and a tool to call do not come about by chance."""
    for field in ("previous_response_id", "text", "tool_choice", "tools", "chat_template_kwargs"):
        body.pop(field, None)
    if isinstance(body["input"], list):
        body["input"] = [item for item in body["input"] if item.get("type") != "item_reference"] or "one"


@schema.parametrize()
@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_requests(
    case: schemathesis.Case, server: Running, session: requests.Session, seen: Counter[tuple[str, int]]
) -> None:
    if case.meta is not None and case.meta.generation.mode is GenerationMode.POSITIVE:
        name_what_there_is(case)
    response = case.call(base_url=server.url, session=session, timeout=30)
    seen[f"{case.method} {case.path}", response.status_code] += 1
    case.validate_response(response, checks=CHECKS)
    if response.status_code >= 400 and response.headers.get("content-type") == "application/json":
        assert response.status_code == 503 or set(response.json()["error"]) == {"message", "type", "param", "code"}
