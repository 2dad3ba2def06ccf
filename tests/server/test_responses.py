"""/v1/responses: what OpenAI's own Python client asks for, and what it gets."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from steermoe_local.server import routes_responses
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY, Running, running, unending
from tests.support.steered_server import DIGITS, WORDS, text_of

QUESTION = "Which number comes after three?"
LONG = "Please count starting at eleven until fifteen."
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "word": {"enum": ["one", "two"]}},
    "required": ["n", "word"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "put", "parameters": SCHEMA, "strict": True}
OTHER: Any = {"type": "function", "name": "stop", "parameters": {"type": "object", "properties": {}}, "strict": False}
CALL: Any = {"type": "function_call", "call_id": "c", "name": "put", "arguments": "{}"}
PUT: Any = {"type": "function", "name": "put"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(n_ctx=1024) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with client_of(server) as found:
        yield found


def client_of(server: Running) -> OpenAI:
    """A client that refuses answers which are not as OpenAI's description of them says, and asks once."""
    http = openai.DefaultHttpxClient(trust_env=False)
    return OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        max_retries=0,
        timeout=30,
        _strict_response_validation=True,
        http_client=http,
    )


def asked(input_: Any = LONG, **fields: Any) -> Any:
    """A question, greedily."""
    return {"model": "tiny", "input": input_, "temperature": 0, "max_output_tokens": 64} | fields


def streamed(server: Running, **fields: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under its name."""
    with server.client.stream("POST", "/v1/responses", json=asked(**fields) | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert [event["type"] for event in events] == names
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def settled(body: dict[str, Any]) -> dict[str, Any]:
    """A response without what is new every time."""
    body = json.loads(json.dumps(body))
    for name in ("id", "created_at", "completed_at", "timings", "seed"):
        body.pop(name)
    for item in body["output"]:
        for name in ("id", "call_id"):
            item.pop(name, None)
    return body


#
# as a chat
#


@pytest.mark.parametrize("steering", [None, DIGITS, WORDS, "document-memory"])
@pytest.mark.parametrize("text", [LONG, "Add 4 and 6."])
def test_it_says_what_a_chat_says(server: Running, client: OpenAI, steering: Any, text: str) -> None:
    chat = server.chat(text, steering=steering, max_tokens=64).json()
    response = client.responses.create(**asked(text), extra_body={"steering": steering, "routing": True})
    assert response.output_text == chat["choices"][0]["message"]["content"]
    assert (response.status, response.model, response.object) == ("completed", "tiny", "response")
    assert response.usage is not None
    assert response.usage.input_tokens == chat["usage"]["prompt_tokens"]
    assert response.usage.output_tokens == chat["usage"]["completion_tokens"]
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.model_extra is not None
    applied = response.model_extra["steering"]
    assert (applied and applied["bias_sha256"]) == (chat["steering"] and chat["steering"]["bias_sha256"])
    assert response.model_extra["routing"] == server.chat(text, steering=steering, routing=True).json()["routing"]


def test_steering_by_the_models_name_and_by_default(client: OpenAI) -> None:
    by_model = client.responses.create(**asked(model="tiny:digits-words"))
    assert by_model.model == "tiny:digits-words"
    assert by_model.output_text == client.responses.create(**asked(), extra_body={"steering": DIGITS}).output_text
    with running(parallel=1, steering="digits-words") as steered, client_of(steered) as default:
        assert default.responses.create(**asked()).output_text == by_model.output_text
        assert default.responses.create(**asked(), extra_body={"steering": None}).output_text != by_model.output_text


def test_instructions_are_a_system_message(server: Running, client: OpenAI) -> None:
    messages = [{"role": "system", "content": "one two"}, {"role": "user", "content": LONG}]
    chat = server.chat(messages=messages, max_tokens=64)
    response = client.responses.create(**asked(), instructions="one two")
    assert response.output_text == text_of(chat)
    assert response.usage is not None
    assert response.usage.input_tokens == chat.json()["usage"]["prompt_tokens"]
    assert response.instructions == "one two"
    count = client.responses.input_tokens.count(model="tiny", input=LONG, instructions="one two")
    assert count.input_tokens == response.usage.input_tokens


def test_sampling_fields_are_those_of_a_chat(server: Running, client: OpenAI) -> None:
    drawn = {"temperature": 1.5, "top_p": 0.9}
    extra = {"seed": 7, "top_k": 5, "stop": ["n,"]}
    response = client.responses.create(**asked(**drawn), extra_body=extra)
    assert response.output_text == text_of(server.chat(LONG, **drawn, **extra, max_tokens=64))
    assert (response.temperature, response.top_p) == (1.5, pytest.approx(0.9))


def test_sampling_fields_of_other_servers(server: Running, client: OpenAI) -> None:
    first = server.client.post("/tokenize", json={"content": text_of(server.chat(LONG))}).json()["tokens"][0]
    for extra in ({"logit_bias": [[first, False]]}, {"repetition_penalty": 10.0}, {"repeat_penalty": 10.0}):
        expected = text_of(server.chat(LONG, **extra, max_tokens=64))
        assert client.responses.create(**asked(), extra_body=extra).output_text == expected
        assert expected != text_of(server.chat(LONG, max_tokens=64))


def test_a_last_message_of_the_assistant_is_continued(server: Running, client: OpenAI) -> None:
    turns: Any = [{"role": "user", "content": LONG}, {"role": "assistant", "content": "eleven, twelve"}]
    for again in ({}, {"continue_final_message": False}):
        expected = text_of(server.chat(messages=turns, max_tokens=64, **again))
        assert client.responses.create(**asked(turns), extra_body=again).output_text == expected


def test_what_was_asked_for_is_given_back(client: OpenAI) -> None:
    fields: dict[str, Any] = {
        "metadata": {"a": "b"},
        "user": "me",
        "parallel_tool_calls": False,
        "truncation": "auto",
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "k",
        "safety_identifier": "s",
        "service_tier": "auto",
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "background": False,
        "max_tool_calls": 3,
    }
    response = client.responses.create(**asked(), **fields, extra_body={"client_metadata": {"x": "y"}})
    assert response.metadata == {"a": "b"}
    assert (response.user, response.prompt_cache_key, response.safety_identifier) == ("me", "k", "s")
    assert (response.parallel_tool_calls, response.max_output_tokens) == (False, 64)
    assert response.reasoning is not None
    assert response.text is not None
    assert (response.reasoning.effort, response.text.verbosity) == ("low", "low")
    assert response.truncation == "disabled", "nothing is truncated here, whatever is asked for"
    nothing = dict.fromkeys(fields | {"previous_response_id": 0, "conversation": 0, "tools": 0, "tool_choice": 0})
    assert client.responses.create(**asked(), extra_body=nothing).output_text == response.output_text


#
# streams
#


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"steering": WORDS, "routing": True},
        {"max_output_tokens": 3},
        {"include": ["message.output_text.logprobs"], "top_logprobs": 2},
        {"tools": [TOOL], "tool_choice": PUT},
        {"tools": [TOOL, OTHER], "tool_choice": "required"},
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}},
    ],
)
def test_a_stream_ends_as_the_whole(server: Running, fields: dict[str, Any]) -> None:
    fields |= {"store": False}
    server.client.post("/v1/responses", json=asked(**fields))  # now the prompt is in memory for both
    whole = server.client.post("/v1/responses", json=asked(**fields)).json()
    events = streamed(server, **fields)
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert {event["response"]["status"] for event in events[:2]} == {"in_progress"}
    assert events[-1]["type"] == f"response.{whole['status']}"
    final = events[-1]["response"]
    assert settled(final) == settled(whole)
    assert {event["response"]["id"] for event in events if "response" in event} == {final["id"]}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == final["output"]
    assert events[0]["response"]["output"] == []
    if steering := whole["steering"]:
        assert events[0]["response"]["steering"].items() <= steering.items()


def test_logprobs(server: Running, client: OpenAI) -> None:
    chat = server.chat(LONG, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    part = client.responses.create(**asked(), **fields).output[0].content[0]
    assert [token.token for token in part.logprobs] == [token["token"] for token in chat]
    deltas = [
        event for event in client.responses.create(**asked(), **fields, stream=True) if "text.delta" in event.type
    ]
    assert [one.token for event in deltas for one in event.logprobs] == [token["token"] for token in chat]


def test_the_helper_for_streams(client: OpenAI) -> None:
    whole = client.responses.create(**asked())
    with client.responses.stream(**asked()) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert len(deltas) > 5
    assert "".join(deltas) == final.output_text == whole.output_text


def test_the_asynchronous_client(server: Running, client: OpenAI) -> None:
    steerings: tuple[Any, ...] = (None, DIGITS, WORDS)
    expected = [client.responses.create(**asked(), extra_body={"steering": s}).output_text for s in steerings]

    async def all_of_them() -> list[str]:
        http = openai.DefaultAsyncHttpxClient(trust_env=False)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as many:

            async def one(steering: Any) -> str:
                stream = await many.responses.create(**asked(), stream=True, extra_body={"steering": steering})
                return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

            return list(await asyncio.gather(*map(one, steerings)))

    assert asyncio.run(all_of_them()) == expected


def test_an_answer_that_is_cut_off(client: OpenAI) -> None:
    response = client.responses.create(**asked(max_output_tokens=2))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"
    cut = client.responses.create(**asked(max_output_tokens=4, tools=[TOOL, OTHER], tool_choice="required"))
    assert (cut.status, cut.output[0].type) == ("incomplete", "function_call")
    again = client.responses.create(**asked(QUESTION), previous_response_id=cut.id)
    assert again.status == "completed", "a call that has no name yet is no obstacle"


def test_an_error_in_a_stream(server: Running, client: OpenAI) -> None:
    endless: Any = {"max_output_tokens": 900, "extra_body": {"logit_bias": {"0": -100}}}  # 0 is the end
    with unending(server):
        stream = client.responses.create(**asked() | endless, stream=True)
        first = next(iter(stream))
        entry = next(iter(server.worker._running.values()))
        entry.ticket.deadline = 0.0
        events: list[Any] = [first, *stream]
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-2].code == "timeout"
    failed = events[-1].response
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    assert "--timeout" in failed.error.message
    assert failed.output[0].status == "incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))


#
# several turns
#


def test_items_are_given_back(server: Running, client: OpenAI) -> None:
    """The same conversation as items, as a text message, by the response's id and by the item's: the same prompt."""
    first = client.responses.create(**asked())
    user: Any = {"role": "user", "content": QUESTION}
    turns = [{"role": "user", "content": LONG}, {"role": "assistant", "content": first.output_text}, user]
    expected = server.chat(messages=turns, max_tokens=64)
    own: list[Any] = [{"role": "user", "content": LONG}]
    answers = [
        client.responses.create(**asked(own + first.output + [user])),
        client.responses.create(**asked([*own, *[item.to_dict() for item in first.output], user])),
        client.responses.create(**asked(turns)),
        client.responses.create(**asked(QUESTION, previous_response_id=first.id)),
        client.responses.create(**asked([*own, {"type": "item_reference", "id": first.output[0].id}, user])),
    ]
    assert [answer.output_text for answer in answers] == [text_of(expected)] * len(answers)
    n_prompt = expected.json()["usage"]["prompt_tokens"]
    assert [answer.usage.input_tokens for answer in answers if answer.usage] == [n_prompt] * len(answers)
    third = client.responses.create(**asked(QUESTION, previous_response_id=answers[3].id))
    assert third.usage is not None
    assert third.usage.input_tokens > n_prompt + 5
    assert third.previous_response_id == answers[3].id


def test_what_is_kept(client: OpenAI, server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = itertools.count(1_000_000_000)
    monkeypatch.setattr(routes_responses, "time", SimpleNamespace(time=lambda: next(seconds)))
    kept = client.responses.create(**asked())
    assert client.responses.retrieve(kept.id) == kept
    told = streamed(server)[-1]["response"]
    assert server.client.get(f"/v1/responses/{told['id']}").json() == told
    client.responses.delete(kept.id)
    not_kept = client.responses.create(**asked(), store=False)
    for id_ in (kept.id, not_kept.id, "resp_x"):
        for ask in (
            lambda id_=id_: client.responses.retrieve(id_),
            lambda id_=id_: client.responses.delete(id_),
            lambda id_=id_: client.responses.create(**asked(previous_response_id=id_)),
        ):
            with pytest.raises(openai.NotFoundError) as caught:
                ask()
            assert caught.value.code == "response_not_found"
            assert id_ in caught.value.message
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(**asked([{"type": "item_reference", "id": not_kept.output[0].id}]))
    assert (missing.value.code, missing.value.param) == ("item_not_found", "input[0]")


#
# formats and tools
#


def test_formats(client: OpenAI) -> None:
    class Number(BaseModel):
        number: int

    parsed = client.responses.parse(**asked(QUESTION), text_format=Number)
    assert parsed.output_parsed is not None
    assert Number.model_validate_json(parsed.output_text) == parsed.output_parsed
    with client.responses.stream(**asked(QUESTION), text_format=Number) as stream:
        assert stream.get_final_response().output_parsed == parsed.output_parsed
    again = client.responses.create(
        **asked([{"role": "user", "content": QUESTION}, *parsed.output, {"role": "user", "content": "one"}])
    )
    assert again.status == "completed", "what the SDK made of an answer may be sent back with it"
    format_: Any = {"type": "json_schema", "name": "x", "schema": SCHEMA}
    found = json.loads(client.responses.create(**asked(text={"format": format_})).output_text)
    assert set(found) == {"n", "word"}
    loose = client.responses.create(**asked(text={"format": {"type": "json_object"}}))
    assert loose.output_text.lstrip().startswith("{")


def test_a_round_of_tools(server: Running, client: OpenAI) -> None:
    chat_tool = {"type": "function", "function": {"name": "put", "parameters": SCHEMA, "strict": True}}
    chat = server.chat(LONG, tools=[chat_tool], tool_choice="required", max_tokens=64).json()["choices"][0]["message"]
    response = client.responses.parse(**asked(tools=[TOOL], tool_choice=PUT))
    (call,) = response.output
    assert call.type == "function_call"
    assert call.arguments == chat["tool_calls"][0]["function"]["arguments"]
    assert call.parsed_arguments == json.loads(call.arguments)
    assert (call.name, call.status, response.status) == ("put", "completed", "completed")
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "one, two"}
    user: Any = {"role": "user", "content": LONG}
    called = {"id": call.call_id, "type": "function", "function": {"name": "put", "arguments": call.arguments}}
    turns = [
        user,
        {"role": "assistant", "tool_calls": [called]},
        {"role": "tool", "tool_call_id": call.call_id, "content": "one, two"},
    ]
    expected = server.chat(messages=turns, tools=[chat_tool], max_tokens=64)
    answers = [
        client.responses.create(**asked([user, *response.output, output], tools=[TOOL])),
        client.responses.create(**asked([output], tools=[TOOL], previous_response_id=response.id)),
    ]
    assert [answer.output_text for answer in answers] == [text_of(expected)] * 2
    n_prompt = expected.json()["usage"]["prompt_tokens"]
    assert [answer.usage.input_tokens for answer in answers if answer.usage] == [n_prompt] * 2


def test_tools_that_there_are_not(server: Running, client: OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    """Codex sends them to every server: they are left out, and the log and the response say so."""
    tools: Any = [TOOL, {"type": "web_search", "search_context_size": "low"}, {"type": "custom", "name": "apply_patch"}]
    tools.append({"type": "namespace", "name": "agents", "description": "", "tools": [OTHER]})
    with caplog.at_level("WARNING", "steermoe.server"):
        response = client.responses.create(**asked(tools=tools))
    assert [tool.type for tool in response.tools] == ["function", "namespace"]
    assert any("web_search, custom" in record.getMessage() for record in caplog.records)
    call = client.responses.create(**asked(tools=tools, tool_choice={"type": "function", "name": "stop"})).output[0]
    assert call.type == "function_call"
    assert (call.name, call.namespace) == ("stop", "agents")


#
# reasoning
#

THINKS = (
    "{%- for message in messages -%}<|{{ message.role }}|>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}<|end|>{%- endfor -%}<|assistant|>{% if enable_thinking %}<think>{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path: Path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    copy_model(TINY, path, template=THINKS)
    with running(model=path, parallel=2) as found:
        yield found


def test_reasoning_is_an_item(thinker: Running) -> None:
    """The template opens the reasoning; this model never closes it, so all it says is reasoning."""
    chat = thinker.chat(LONG, reasoning_effort="high", max_tokens=64).json()
    with client_of(thinker) as client:
        response = client.responses.create(**asked(reasoning={"effort": "high"}))
        assert [item.type for item in response.output] == ["reasoning", "message"]
        reasoning = response.output[0]
        assert reasoning.content[0].text == chat["choices"][0]["message"]["reasoning_content"]
        assert response.output_text == ""
        assert response.usage is not None
        assert response.usage.output_tokens_details.reasoning_tokens == response.usage.output_tokens > 3
        cut = client.responses.create(**asked(reasoning={"effort": "high"}, max_output_tokens=4))
        assert [(item.type, item.status) for item in cut.output] == [("reasoning", "incomplete")]
        assert cut.status == "incomplete"
        with client.responses.stream(**asked(reasoning={"effort": "high"})) as stream:
            deltas = [event.delta for event in stream if event.type == "response.reasoning_text.delta"]
            stream.get_final_response()
        assert "".join(deltas) == reasoning.content[0].text
        none = client.responses.create(**asked(reasoning={"effort": "none"}))
        assert [item.type for item in none.output] == ["message"]
        user: Any = {"role": "user", "content": "one"}
        with_it = client.responses.input_tokens.count(input=[user, *response.output, user])
        without = client.responses.input_tokens.count(input=[user, *response.output[1:], user])
        assert with_it.input_tokens > without.input_tokens, "reasoning that is given back reaches the template"


#
# what is refused
#


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"input": []}, "input", "invalid_value"),
        ({"input": None}, "input", "invalid_value"),
        ({"input": [{"role": "user"}]}, "input[0].content", "missing_field"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"role": "user", "content": "x", "weight": 1}]}, "input[0].weight", "unknown_field"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0]", "invalid_value"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "data:x"}]}]},
            "input[0].content[0]",
            "invalid_value",
        ),
        (
            {"input": [{"type": "function_call_output", "call_id": "c", "output": [{"type": "input_file"}]}]},
            "input[0].output[0]",
            "invalid_value",
        ),
        ({"input": [{"role": "user", "content": "x", "type": []}]}, "input[0].type", "invalid_value"),
        ({"tools": [{"type": {}}]}, "tools[0].type", "invalid_value"),
        ({"stering": None}, "stering", "unknown_field"),
        ({"background": True}, "background", "invalid_value"),
        ({"conversation": "conv_1"}, "conversation", "invalid_value"),
        ({"prompt": {"id": "p"}}, "prompt", "invalid_value"),
        ({"n": 2}, "n", "invalid_value"),
        ({"n_cmpl": 2}, "n_cmpl", "invalid_value"),
        ({"max_tokens": 5}, "max_tokens", "invalid_value"),
        ({"n_predict": 5}, "n_predict", "invalid_value"),
        ({"return_tokens": True}, "return_tokens", "invalid_value"),
        ({"input": [{"role": "user", "content": "x"}, CALL]}, None, "invalid_value"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_value"),
        ({"temperature": 99}, "temperature", "invalid_value"),
        ({"tools": [{"type": "nonsense"}]}, "tools[0].type", "invalid_value"),
        ({"tools": [TOOL | {"type": "function", "function": {}}]}, "tools[0].function", "unknown_field"),
        ({"tool_choice": "required"}, None, "invalid_value"),
        ({"tool_choice": {"type": "web_search_preview"}}, None, "invalid_value"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "no"}}, None, "invalid_value"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "invalid_value"),
        (
            {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"$ref": "#/no"}}}},
            "text.format.schema",
            "invalid_schema",
        ),
        ({"input": "one " * 3000}, None, "context_length_exceeded"),
        ({"steering": {"map": "../x"}}, None, "invalid_value"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_a_response_refuses(
    server: Running, fields: dict[str, Any], param: str | None, code: str, stream: bool
) -> None:
    response = server.client.post("/v1/responses", json=asked() | fields | {"stream": stream})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["type"]) == (code, "invalid_request_error")
    if param is not None:
        assert error["param"] == param
        assert error["message"].startswith(param)


def test_a_part_that_is_no_text_is_named(server: Running) -> None:
    part = {"type": "input_image", "image_url": "data:x"}
    body = asked([{"role": "user", "content": [part]}])
    assert "input_image" in server.client.post("/v1/responses", json=body).json()["error"]["message"]
    missing = server.client.post("/v1/responses", json=asked(steering="nothing"))
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "steering_not_found")


def test_it_is_counted(server: Running, client: OpenAI) -> None:
    client.responses.create(**asked(), extra_body={"steering": DIGITS})
    metrics = server.client.get("/metrics").text
    assert 'steermoe_requests_total{endpoint="responses",status="ok",steering="digits-words' in metrics
