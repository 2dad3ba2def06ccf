"""Answers bound to a format or to a tool call, reasoning, and chat templates."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from steermoe_local import SteeredLlama
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import messages, text_of

QUESTION = "Which number comes after three?"
LONG = "Please count starting at eleven until fifteen."


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def llama() -> Iterator[SteeredLlama]:
    """The judge: llama-cpp-python's own path, and the logits of every token."""
    model = SteeredLlama(TINY, n_ctx=512, n_threads=1, logits_all=True)
    yield model
    model.close()


#
# formats and tools
#

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "word": {"enum": ["one", "two"]}},
    "required": ["n", "word"],
}
TOOL = {"type": "function", "function": {"name": "put", "description": "Put it.", "parameters": SCHEMA}}
OTHER = {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}}


def fits(text: str) -> None:
    value = json.loads(text)
    assert set(value) == {"n", "word"}
    assert isinstance(value["n"], int)
    assert value["word"] in ("one", "two")


def test_a_json_schema_binds_the_answer(server: Running, llama: SteeredLlama) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    text = text_of(server.chat(LONG, response_format=format_, max_tokens=64))
    fits(text)
    own = llama.create_chat_completion(
        messages(LONG), temperature=0, response_format={"type": "json_object", "schema": SCHEMA}, max_tokens=64
    )
    fits(own["choices"][0]["message"]["content"])
    fits(text_of(server.chat(LONG, response_format={"type": "json_object", "schema": SCHEMA}, max_tokens=64)))
    assert text_of(server.chat(LONG, response_format={"type": "text"})) == text_of(server.chat(LONG))


def test_a_json_object(server: Running) -> None:
    body = server.chat(LONG, response_format={"type": "json_object"}, max_tokens=60, temperature=1.0, seed=4).json()
    text = body["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{")
    if body["choices"][0]["finish_reason"] == "stop":
        json.loads(text)


@pytest.mark.parametrize("choice", [{"type": "function", "function": {"name": "put"}}, "required"])
def test_a_forced_call(server: Running, choice: Any) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "max_tokens": 64}
    body = server.chat(LONG, **fields).json()["choices"][0]
    assert body["finish_reason"] == "tool_calls"
    assert body["message"]["content"] is None
    call = body["message"]["tool_calls"][0]
    assert (call["type"], call["function"]["name"]) == ("function", "put")
    fits(call["function"]["arguments"])
    chunks = server.events("/v1/chat/completions", {"messages": messages(LONG), **fields})
    calls = [c for chunk in chunks for d in chunk["choices"] for c in d["delta"].get("tool_calls", [])]
    assert (calls[0]["function"]["name"], calls[0]["index"]) == ("put", 0)
    assert calls[0]["id"].startswith("call_")
    assert "".join(c["function"]["arguments"] for c in calls) == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_of_one_of_several(server: Running) -> None:
    fields = {"tools": [TOOL, OTHER], "tool_choice": "required", "max_tokens": 80}
    body = server.chat(LONG, **fields).json()
    call = body["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] in ("put", "stop")
    json.loads(call["function"]["arguments"])
    chunks = server.events("/v1/chat/completions", {"messages": messages(LONG), **fields})
    calls = [c for chunk in chunks for d in chunk["choices"] for c in d["delta"].get("tool_calls", [])]
    assert [c["function"] for c in calls] == [call["function"]]
    for n in (2, body["usage"]["completion_tokens"] - 1):
        cut = server.chat(LONG, **(fields | {"max_tokens": n})).json()["choices"][0]
        assert cut["finish_reason"] == "length"
        started = cut["message"]["tool_calls"][0]["function"]
        assert started["name"] in ("", call["function"]["name"])
    assert started["name"], "the reply reports the beginning of a call that was cut off"


ODD = {
    "type": "object",
    "properties": {'a "b"\n': {"enum": ["x\ty", "\\", "😀"]}, "tree": {"$ref": "#/$defs/tree"}},
    "required": ['a "b"\n', "tree"],
    "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 1}},
}


def check_odd(arguments: str) -> None:
    value = json.loads(arguments)
    jsonschema.validate(value, ODD)
    assert set(value) == set(ODD["properties"])


@pytest.mark.parametrize("seed", range(3))
def test_references_and_characters(server: Running, seed: int) -> None:
    """The same schema as a format, as the one tool and as one of several tools, whose references are their own."""
    hot = {"temperature": 1.2, "seed": seed, "max_tokens": 300}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": ODD}}
    check_odd(text_of(server.chat(LONG, response_format=format_, **hot)))
    odd = {"type": "function", "function": {"name": "odd", "parameters": ODD}}
    for tools in ([odd], [odd, odd | {"function": odd["function"] | {"name": "other.odd-1"}}]):
        body = server.chat(LONG, tools=tools, tool_choice="required", **hot).json()["choices"][0]
        assert body["finish_reason"] == "tool_calls"
        call = body["message"]["tool_calls"][0]["function"]
        assert call["name"] in [tool["function"]["name"] for tool in tools]
        check_odd(call["arguments"])


def test_a_function_without_parameters_is_called_without(server: Running) -> None:
    """As OpenAI reads a function that leaves them out."""
    tools = [{"type": "function", "function": {"name": "stop"}}]
    for fields in ({"tools": tools}, {"tools": [*tools, OTHER]}):
        body = server.chat(LONG, tool_choice="required", max_tokens=60, temperature=1.0, seed=1, **fields).json()
        assert body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == "{}"


@pytest.mark.parametrize("parameters", [{}, {"description": "any"}, {"properties": {"x": True}}])
def test_arguments_are_an_object(server: Running, parameters: Any) -> None:
    tool = {"type": "function", "function": {"name": "put", "parameters": parameters}}
    body = server.chat(LONG, tools=[tool], tool_choice="required", max_tokens=300, temperature=1.0, seed=1).json()
    arguments = body["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]
    assert arguments.startswith("{")


def test_a_refused_tool_is_named(server: Running) -> None:
    bad = {"type": "object", "properties": {"x": {"not": {"type": "null"}}}}
    tools = [TOOL, OTHER | {"function": {"name": "bad", "parameters": bad}}]
    error = server.chat(tools=tools, tool_choice="required").json()["error"]
    assert (error["code"], error["param"]) == ("invalid_schema", "tools[1].function.parameters")
    assert "$.properties.x.not" in error["message"]


def test_tools_that_are_not_forced(server: Running) -> None:
    for choice in ("auto", "none", None):
        assert server.chat(LONG, tools=[TOOL], tool_choice=choice).status_code == 200


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"tool_choice": "required"}, "invalid_value", "tool_choice: "),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "invalid_value",
            "tool_choice: 'no'",
        ),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format: json_schema"),
        ({"response_format": {"type": "json_object", "schema": {"type": "nonsense"}}}, "invalid_schema", "nonsense"),
        ({"response_format": {"type": "json_object", "schema": {"$ref": "#/no"}}}, "invalid_schema", "#/no"),
        (
            {"response_format": {"type": "json_object", "schema": {"$ref": "https://a.b/c"}}},
            "invalid_schema",
            "https://a.b/c",
        ),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type: "),
        ({"functions": []}, "invalid_value", "functions: "),
        ({"function_call": "auto"}, "invalid_value", "function_call: "),
        ({"tools": [{"type": "web"}]}, "invalid_value", "tools[0].type: "),
    ],
)
def test_formats_and_tools_that_are_refused(server: Running, fields: dict[str, Any], code: str, words: str) -> None:
    response = server.chat(**fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["code"] == code
    assert words in response.json()["error"]["message"]


#
# reasoning and templates
#

THINKS = (
    "{%- for message in messages -%}<|{{ message.role }}|>{{ message.content }}<|end|>{%- endfor -%}"
    "<|assistant|>{% if enable_thinking %}<think>{% else %}{{ note }}{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    copy_model(TINY, path, template=THINKS + "{# <think> </think> #}")
    with running(model=path, parallel=2) as found:
        yield found


def test_reasoning_is_told_from_the_answer(thinker: Running) -> None:
    """The template opens the reasoning; this model never closes it, so all it says is reasoning."""
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    message = thinker.chat(LONG, **on).json()["choices"][0]["message"]
    assert message["content"] == ""
    assert message["reasoning_content"]
    assert "reasoning_content" not in thinker.chat(LONG).json()["choices"][0]["message"]
    assert thinker.chat(LONG, reasoning_effort="high").json()["choices"][0]["message"] == message
    chunks = thinker.events("/v1/chat/completions", {"messages": messages(LONG), "max_tokens": 24, **on})
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == message["reasoning_content"]
    assert not any(delta.get("content") for delta in deltas)
    bound = thinker.chat(LONG, reasoning_effort="high", response_format={"type": "json_object", "schema": SCHEMA})
    assert bound.json()["choices"][0]["message"]["content"].startswith("{"), "a format leaves no room to think"


def test_a_format_goes_into_the_final_channel(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model of harmony's format opens a channel first, which a grammar would not let it do."""
    path = tmp_path_factory.mktemp("harmony") / "harmony.gguf"
    turns = "{%- for m in messages -%}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{%- endfor -%}"
    copy_model(TINY, path, template=turns + "<|start|>assistant{# <|channel|> #}")
    with running(model=path, parallel=1) as harmony:
        free = harmony.chat(LONG).json()
        format_ = {"type": "json_object", "schema": SCHEMA}
        bound = harmony.chat(LONG, response_format=format_, max_tokens=64).json()
        fits(bound["choices"][0]["message"]["content"])
        opening = harmony.client.post("/tokenize", json={"content": "<|channel|>final<|message|>"}).json()["tokens"]
        assert bound["usage"]["prompt_tokens"] == free["usage"]["prompt_tokens"] + len(opening)


def test_variables_of_the_template(thinker: Running) -> None:
    plain = thinker.chat("one").json()["usage"]["prompt_tokens"]
    longer = thinker.chat("one", chat_template_kwargs={"note": "one two three"}).json()["usage"]["prompt_tokens"]
    assert longer > plain
    for variables in ({"messages": []}, {"tools": []}, {"not a name": 1}):
        assert thinker.chat("one", chat_template_kwargs=variables).status_code == 400


def test_a_model_without_a_template(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plain") / "plain.gguf"
    copy_model(TINY, path, template="")
    with running(model=path, parallel=1) as plain:
        response = plain.chat()
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]
        assert plain.complete().status_code == 200


def test_a_template_that_refuses(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("picky") / "picky.gguf"
    copy_model(TINY, path, template="{{ raise_exception('only one message') if messages | length > 1 }}x")
    with running(model=path, parallel=1) as picky:
        assert picky.chat().status_code == 200
        response = picky.chat(messages=messages("a") + messages("b"))
        assert response.status_code == 400
        assert response.json()["error"]["message"].endswith(": only one message")
