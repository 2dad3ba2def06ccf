"""The tables of harmless and of refused fields, in requests for responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from steermoe_local.server.known_fields import IGNORED, NOT_OFFERED, Ignored, NotOffered
from steermoe_local.server.schemas_responses import ResponsesRequest
from tests.support.running_server import Running, running

# Fields of these names are this request's own.
OWN = ResponsesRequest.model_fields.keys()
PLACES = ("request", "responses request", "item", "responses tool", "tool", "function", "content part")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=1) as found:
        yield found


def body_with(place: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request whose objects `place` have some more fields."""
    of_item = fields if place == "item" else {}
    part = {"type": "input_text", "text": "Count."} | (fields if place == "content part" else {})
    items: list[dict[str, Any]] = [
        {"role": "user", "content": [part]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "one"}]},
        {"type": "function_call", "call_id": "c", "name": "put", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "4"},
    ]
    tool = {"type": "function", "name": "put"} | (fields if place in ("responses tool", "tool", "function") else {})
    body = {"input": [item | of_item for item in items], "tools": [tool], "max_output_tokens": 2}
    return body | (fields if place in ("request", "responses request") else {})


def post(server: Running, body: dict[str, Any]) -> Any:
    return server.client.post("/v1/responses", json=body | {"store": False})


def text_of(response: Any) -> str:
    assert response.status_code == 200, response.text
    return str(response.json()["output"][-1]["content"][0]["text"])


@pytest.mark.parametrize(
    "row", [row for row in IGNORED if row.place in PLACES], ids=lambda row: f"{row.place}-{row.names[0]}"
)
def test_harmless_fields(server: Running, row: Ignored) -> None:
    """Whatever their value, the answer is the same."""
    plain = text_of(post(server, body_with(row.place, {})))
    own = OWN if row.place.endswith("request") else {"strict"}
    for value in ("x", 1, {"a": [True]}, None):
        fields = dict.fromkeys((name for name in row.names if name not in own), value)
        assert text_of(post(server, body_with(row.place, fields))) == plain


@pytest.mark.parametrize(
    "row", [row for row in NOT_OFFERED if row.place in PLACES], ids=lambda row: f"{row.place}-{row.names[0]}"
)
def test_refused_fields(server: Running, row: NotOffered) -> None:
    """They would change the answer; a value that asks for nothing is accepted."""
    for name in row.names:
        assert name not in OWN
        for value in (None, *row.nothing):
            assert post(server, body_with(row.place, {name: value})).status_code == 200
        response = post(server, body_with(row.place, {name: {"a": 1}}))
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["param"], error["code"]) == (name, "invalid_value")
        assert row.cure in error["message"]
