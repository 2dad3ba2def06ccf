"""Fields as clients send them: harmless ones, refused ones, llama-server's and vLLM's names, and their meaning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from steermoe_local.generation.engine import Sampling
from steermoe_local.llama.full_sampling import FullSampling
from steermoe_local.server.known_fields import (
    IGNORED,
    NOT_OFFERED,
    Ignored,
    NotOffered,
    ignored_table,
    not_offered_table,
)
from steermoe_local.server.schemas import CompletionRequest
from steermoe_local.server.schemas_chat import ChatRequest
from tests.support.running_server import Running, running
from tests.support.steered_server import messages, text_of

LONG = "Please count starting at eleven until fifteen."
DOCS = Path(__file__).parents[2] / "docs" / "server.md"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2) as found:
        yield found


def body_with(place: str, fields: dict[str, Any]) -> dict[str, Any]:
    """A request whose object `place` has some more fields."""
    call = {"name": "put", "arguments": "{}"} | (fields if place == "call" else {})
    tool_call = {"id": "call_1", "type": "function", "function": call} | (fields if place == "tool call" else {})
    function = {"name": "put"} | (fields if place == "function" else {})
    tool = {"type": "function", "function": function} | (fields if place == "tool" else {})
    part = {"type": "text", "text": "Count."} | (fields if place == "content part" else {})
    answer = {"role": "assistant", "content": None, "tool_calls": [tool_call]} | (fields if place == "message" else {})
    result = {"role": "tool", "tool_call_id": "call_1", "content": "4"}
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [part]}, answer, result], "tools": [tool]}
    if place == "stream_options":
        body |= {"stream": True, "stream_options": {"include_usage": True} | fields}
    return body | {"max_tokens": 2} | (fields if place == "request" else {})


# The places of the other requests are in test_response_fields.py.
PLACES = ("request", "stream_options", "message", "content part", "tool", "function", "tool call", "call")
OF_CHATS = [row for row in IGNORED if row.place in PLACES]
NOT_IN_CHATS = [row for row in NOT_OFFERED if row.place in PLACES]


@pytest.mark.parametrize("row", OF_CHATS, ids=lambda row: f"{row.place}-{row.names[0]}")
def test_harmless_fields(server: Running, row: Ignored) -> None:
    """Whatever their value, the answer is the same."""
    plain = text_of_any(server, body_with(row.place, {}))
    for value in ("x", 1, {"a": [True]}, None):
        assert text_of_any(server, body_with(row.place, dict.fromkeys(row.names, value))) == plain


def text_of_any(server: Running, body: dict[str, Any]) -> str:
    if body.get("stream"):
        chunks = server.events("/v1/chat/completions", body)
        return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
    return text_of(server.client.post("/v1/chat/completions", json=body))


@pytest.mark.parametrize("row", NOT_IN_CHATS, ids=lambda row: row.names[0])
def test_refused_fields(server: Running, row: NotOffered) -> None:
    """They would change the answer; a value that asks for nothing is accepted."""
    for name in row.names:
        for value in (None, *row.nothing):
            response = server.client.post("/v1/chat/completions", json=body_with(row.place, {name: value}))
            assert response.status_code == 200, (name, value, response.text)
        response = server.client.post("/v1/chat/completions", json=body_with(row.place, {name: {"a": 1}}))
        assert response.status_code == 400
        error = response.json()["error"]
        param = name if row.place == "request" else f"messages[1].{name}"
        assert (error["param"], error["code"]) == (param, "invalid_value")
        assert row.cure in error["message"]


def test_zero_is_not_false(server: Running) -> None:
    assert server.chat(post_sampling_probs=0, max_tokens=1).status_code == 400
    assert server.chat(min_tokens=False, max_tokens=1).status_code == 400


def test_an_empty_grammar_binds_nothing(server: Running) -> None:
    """As clients of llama-server send it whose user has given none."""
    assert server.chat(grammar="", max_tokens=1).status_code == 200
    assert server.complete(grammar=None, max_tokens=1).status_code == 200
    error = server.complete(grammar='root ::= "a"').json()["error"]
    assert (error["param"], error["code"]) == ("grammar", "invalid_value")


def test_the_tables_are_in_the_docs() -> None:
    text = DOCS.read_text("utf-8")
    assert ignored_table() in text
    assert not_offered_table() in text
    names = [(row.place, name) for row in (*IGNORED, *NOT_OFFERED) for name in row.names]
    assert len(names) == len(set(names)), "no field stands in two rows"


def test_the_tables_are_in_the_openapi_document(server: Running) -> None:
    schemas = server.client.get("/openapi.json").json()["components"]["schemas"]
    assert not [name for name in schemas if "__" in name], "two models of one name"
    chat = schemas["ChatRequest"]["properties"]
    assert "without effect" in chat["user"]["description"]
    assert chat["min_tokens"]["enum"] == [None, 0]
    assert "without effect" in schemas["Message"]["properties"]["parsed"]["description"]


#
# limits
#


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n_predict"])
def test_no_limit_but_the_context(server: Running, name: str) -> None:
    """-1, also where the server has a limit of its own."""
    with running(parallel=1, n_ctx=64, max_tokens=3) as limited:
        endless: dict[str, Any] = {"messages": messages(LONG), "ignore_eos": True, "temperature": 0}
        answer = limited.client.post("/v1/chat/completions", json=endless | {name: -1}).json()
        assert answer["usage"]["total_tokens"] == 64
        assert answer["choices"][0]["finish_reason"] == "length"
        kept = limited.client.post("/v1/chat/completions", json=endless).json()
        assert kept["usage"]["completion_tokens"] == 3
    for wrong in (0, -2, 1.5):
        response = server.client.post("/v1/chat/completions", json={"messages": messages("a"), name: wrong})
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name


def test_no_limit_of_a_completion(server: Running) -> None:
    with running(parallel=1, n_ctx=64) as small:
        for name in ("max_tokens", "n_predict"):
            body = {"prompt": "one, two,", "ignore_eos": True, name: -1}
            assert small.client.post("/v1/completions", json=body).json()["usage"]["total_tokens"] == 64
        body = {"prompt": "one, two,", "ignore_eos": True}
        assert small.client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 16


def test_two_names_of_a_field(server: Running) -> None:
    pairs = (
        ("max_tokens", 3, "n_predict", 4),
        ("max_tokens", 3, "max_completion_tokens", -1),
        ("n", 1, "n_cmpl", 2),
        ("repeat_penalty", 1.1, "repetition_penalty", 1.2),
    )
    for name, value, other, another in pairs:
        response = server.client.post(
            "/v1/chat/completions", json={"messages": messages("a"), name: value, other: another}
        )
        assert response.status_code == 400
        assert other in response.json()["error"]["message"]
        both = {"messages": messages("a"), name: value, other: value} | ({} if "max" in name else {"max_tokens": 2})
        assert server.client.post("/v1/chat/completions", json=both).status_code == 200
    assert len(server.chat(n_cmpl=2).json()["choices"]) == 2


#
# sampling
#


def sampling(**fields: Any) -> Sampling:
    """What a request comes to, on a server with some defaults of its own."""
    return CompletionRequest.model_validate({"prompt": "a"} | fields).sampling(Sampling(temperature=0.5, top_p=0.7))


def test_the_servers_defaults_stay() -> None:
    assert sampling() == Sampling(temperature=0.5, top_p=0.7)
    assert sampling(top_k=-1) == Sampling(temperature=0.5, top_p=0.7, top_k=0)
    assert sampling(top_k=0).top_k == 0
    assert sampling(repetition_penalty=1.3).repeat_penalty == 1.3
    full = sampling(typical_p=0.9)
    assert isinstance(full, FullSampling)
    assert (full.temperature, full.top_p, full.typical_p) == (0.5, 0.7, 0.9)


def test_whole_numbers_that_are_written_as_floats(server: Running) -> None:
    for fields in ({"max_tokens": 4.0}, {"top_k": 40.0}, {"n": 1.0}, {"seed": 7.0}, {"mirostat": 0.0}):
        assert server.chat(**{"max_tokens": 2} | fields).status_code == 200
    assert sampling(top_k=40.0) == sampling(top_k=40)
    for fields in ({"max_tokens": 4.5}, {"top_k": 1e300}, {"n": "1"}):
        assert server.chat(**fields).status_code == 400


FURTHER: dict[str, Any] = {"typical_p": 0.9, "top_n_sigma": 1.5, "xtc_probability": 0.5, "xtc_threshold": 0.2}
FURTHER |= {"dynatemp_range": 0.3, "dynatemp_exponent": 2.0, "dry_multiplier": 0.8, "dry_base": 1.5}
FURTHER |= {"dry_allowed_length": 3, "dry_penalty_last_n": -1, "mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2}
FURTHER |= {"adaptive_target": 0.4, "adaptive_decay": 0.5, "min_keep": 2, "ignore_eos": True}
FURTHER |= {"dry_sequence_breakers": ["\n"], "samplers": ["top_k", "temperature"]}


@pytest.mark.parametrize("name", FURTHER)
def test_each_sampler_of_llama_server(server: Running, name: str) -> None:
    value = FURTHER[name]
    wanted = tuple(value) if isinstance(value, list) else value
    assert getattr(sampling(**{name: value}), name) == wanted
    for fields in ({name: value}, {name: None}):
        response = server.chat(LONG, temperature=1.0, seed=1, max_tokens=4, **fields)
        assert response.status_code == 200, response.text
    response = server.complete(**{name: {"a": 1}})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(name)
    every = set(FullSampling.__dataclass_fields__) - set(Sampling.__dataclass_fields__)
    assert set(FURTHER) == every, "each has a field"


def test_samplers_change_the_answer(server: Running) -> None:
    """Each that is asked for is applied."""

    def answer(**fields: Any) -> str:
        return text_of(
            server.chat(LONG, seed=7, **{"temperature": 5.0, "top_k": 0, "min_p": 0.0, "top_p": 1.0} | fields)
        )

    plain = answer()
    assert answer(samplers="kt", top_k=1) == text_of(server.chat(LONG, temperature=0)) != plain
    for fields in ({"xtc_probability": 1.0, "xtc_threshold": 0.05}, {"mirostat": 2, "mirostat_tau": 0.1}):
        assert answer(**fields) != plain
    assert answer(top_n_sigma=0.01) == text_of(server.chat(LONG, temperature=0))
    for wrong in (["nonsense"], "?", ["infill"]):
        response = server.chat(samplers=wrong)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "samplers"


def test_biases_in_llama_servers_form(server: Running) -> None:
    (token,) = server.client.post("/tokenize", json={"content": "4"}).json()["tokens"]
    assert text_of(server.chat()) == "4"
    for bias in ({str(token): -100}, [[token, -100]], [[token, False]], [[token, -100.0], [0, 1]]):
        assert text_of(server.chat(logit_bias=bias)) != "4"
    found = CompletionRequest.model_validate({"prompt": "a", "logit_bias": [[token, False], [1, 2]]}).biases
    assert found == {token: -math.inf, 1: 2.0}
    for wrong in ([[token]], [["4", 1]], [[token, True]], [[token, 101]], {"4x": 1}, [token, 1]):
        assert server.chat(logit_bias=wrong).status_code == 400, wrong
    assert server.chat(logit_bias=[[5000, 1]]).status_code == 400


#
# what is reported
#


def test_probabilities_under_llama_servers_name(server: Running) -> None:
    chat = server.chat(n_probs=2).json()["choices"][0]["logprobs"]
    assert chat == server.chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert len(chat["content"][0]["top_logprobs"]) == 2
    text = server.complete(n_probs=2).json()["choices"][0]["logprobs"]
    assert text == server.complete(logprobs=2).json()["choices"][0]["logprobs"]
    assert server.chat(n_probs=2, logprobs=False).status_code == 400


def test_a_prompt_that_is_computed_again(server: Running) -> None:
    def cached(**fields: Any) -> int:
        return int(server.chat(LONG, max_tokens=2, **fields).json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    cached()
    assert cached() > 0
    assert cached(cache_prompt=True) > 0
    assert cached(cache_prompt=False) == 0


def test_the_tokens_of_an_answer(server: Running) -> None:
    for path, body in (
        ("/v1/chat/completions", {"messages": messages(LONG), "max_tokens": 8}),
        ("/v1/completions", {"prompt": "one, two,", "max_tokens": 8}),
    ):
        answer = server.client.post(path, json=body | {"return_tokens": True}).json()["choices"][0]
        said = answer["message"]["content"] if "message" in answer else answer["text"]
        back = server.client.post("/detokenize", json={"tokens": answer["tokens"]}).json()["content"]
        assert back == said
        assert server.events(path, body | {"return_tokens": True})[-1]["choices"][0]["tokens"] == answer["tokens"]
        assert "tokens" not in server.client.post(path, json=body).json()["choices"][0]


def test_a_schema_under_llama_servers_name(server: Running) -> None:
    schema = {"enum": ["x", "y"]}
    assert text_of(server.chat(json_schema=schema)) in ('"x"', '"y"')
    assert server.chat(json_schema=schema, response_format={"type": "text"}).status_code == 400


#
# reasoning and tools, in other clients' forms
#


@pytest.mark.parametrize(
    ("fields", "thinks", "effort"),
    [
        ({}, None, None),
        ({"enable_thinking": False}, False, None),
        ({"thinking": {"type": "enabled"}}, True, None),
        ({"thinking": {"type": "disabled"}}, False, None),
        ({"reasoning": {"enabled": True, "exclude": True}}, True, None),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, None, "low"),
        ({"reasoning_effort": "high", "reasoning": {"effort": "high"}}, None, "high"),
    ],
)
def test_forms_of_reasoning(fields: dict[str, Any], thinks: bool | None, effort: str | None) -> None:
    request = ChatRequest.model_validate({"messages": messages("a")} | fields)
    assert (request.thinks, request.effort) == (thinks, effort)


def test_forms_of_a_tool_choice() -> None:
    tools = [{"type": "function", "function": {"name": "put"}}]
    for given, wanted in (({"type": "auto"}, "auto"), ("any", "required"), ({"type": "any"}, "required")):
        request = ChatRequest.model_validate({"messages": messages("a"), "tools": tools, "tool_choice": given})
        assert request.tool_choice == wanted
    with pytest.raises(ValidationError):
        ChatRequest.model_validate({"messages": messages("a"), "tools": tools, "tool_choice": {"type": "function"}})


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"max_tokens": 0}, "greater than or equal to 1"),
        ({"max_tokens": "10"}, "integer"),
        ({"stop": ["a"] * 17}, "16"),
        ({"tool_choice": "maybe"}, "'required'"),
    ],
)
def test_the_branch_of_the_values_type_says_what_is_wrong(server: Running, fields: dict[str, Any], told: str) -> None:
    error = server.chat(**fields).json()["error"]
    assert error["param"] == next(iter(fields))
    assert told in error["message"]
