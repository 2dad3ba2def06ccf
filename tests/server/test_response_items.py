"""Requests for responses as the chat requests that mean the same, and the responses that are kept."""

from __future__ import annotations

from typing import Any

import pytest

from steermoe_local.server.api_errors import ApiError
from steermoe_local.server.response_items import chat_request, messages_of, own_items
from steermoe_local.server.response_store import ResponseStore
from steermoe_local.server.schemas_responses import ResponsesRequest


def messages(input_: Any, **fields: Any) -> list[dict[str, Any]]:
    """The messages of the chat request, as JSON."""
    request = ResponsesRequest.model_validate({"input": input_, **fields})
    return [
        message | {"content": [part.model_dump(exclude_none=True) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages_of(request.instructions, own_items(request))
    ]


def chat(**fields: Any) -> Any:
    request = ResponsesRequest.model_validate({"input": "one"} | fields)
    return chat_request(request, own_items(request))


def said(text: str, kind: str = "output_text", **fields: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": kind, "text": text, **fields}]}


def thought(*texts: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": t} for t in texts]}


def called(name: str, id_: str = "c1") -> dict[str, Any]:
    return {"type": "function_call", "call_id": id_, "name": name, "arguments": "{}"}


def call_of(name: str, id_: str = "c1") -> dict[str, Any]:
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": "{}"}}


USER = {"role": "user", "content": "go"}
ASSISTANT = {"role": "assistant"}


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER], [USER]),
        (
            [USER | {"type": "message"}, said("a")],
            [USER, ASSISTANT | {"content": [{"type": "output_text", "text": "a"}]}],
        ),
        ([USER, thought("t")], [USER, ASSISTANT | {"content": "", "reasoning_content": "t"}]),
        (
            [USER, thought("t", "u"), said("a"), called("f"), called("g", "c2")],
            [
                USER,
                ASSISTANT
                | {
                    "reasoning_content": "t\nu",
                    "content": [{"type": "output_text", "text": "a"}],
                    "tool_calls": [call_of("f"), call_of("g", "c2")],
                },
            ],
        ),
        (
            [USER, called("f"), thought("t"), called("g", "c2")],
            [
                USER,
                ASSISTANT | {"tool_calls": [call_of("f")]},
                ASSISTANT | {"reasoning_content": "t", "tool_calls": [call_of("g", "c2")]},
            ],
        ),
        (
            [
                USER,
                called("f"),
                {"type": "function_call_output", "call_id": "c1", "output": "o"},
                said("a"),
                said("b"),
            ],
            [
                USER,
                ASSISTANT | {"tool_calls": [call_of("f")]},
                {"role": "tool", "tool_call_id": "c1", "content": "o"},
                ASSISTANT | {"content": [{"type": "output_text", "text": "a"}]},
                ASSISTANT | {"content": [{"type": "output_text", "text": "b"}]},
            ],
        ),
    ],
)
def test_items_become_messages(items: list[Any], expected: list[Any]) -> None:
    found = messages(items)
    assert found == expected


def test_a_text_is_the_users() -> None:
    assert messages("one") == [{"role": "user", "content": "one"}]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_the_system_messages_at_the_beginning_are_one(role: str) -> None:
    """Codex sends two, and instructions beside them; templates have room for one."""
    parts = [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}]
    own = [{"role": role, "content": parts}, {"role": role, "content": "d"}, USER, {"role": role, "content": "e"}]
    rest = [USER, {"role": role, "content": "e"}]
    assert messages(own, instructions="a") == [{"role": "system", "content": "a\n\nb\nc\n\nd"}, *rest]
    assert messages(own) == [{"role": role, "content": "b\nc\n\nd"}, *rest]


def test_reasoning_of_other_servers() -> None:
    """A summary is all that there is of it; what is encrypted cannot be read."""
    summary = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "s"}], "content": None}
    assert messages([USER, summary, said("a")])[1]["reasoning_content"] == "s"
    assert (
        "reasoning_content" not in messages([USER, summary | {"summary": [], "encrypted_content": "x"}, said("a")])[1]
    )


def test_items_as_sdks_send_them_back() -> None:
    text = said("a", annotations=[], logprobs=[{"token": "a"}], parsed={"x": 1})
    items = [
        text | {"id": "msg_1", "status": "completed", "phase": None},
        called("f") | {"id": "fc_1", "status": "completed", "parsed_arguments": {}, "namespace": "n"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "o"}], "id": None},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
    ]
    found = messages([USER, *items])
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant"]
    assert found[2]["content"] == [{"type": "input_text", "text": "o"}]
    assert chat(input=[USER, *items, USER]).messages[3].text == "no"


#
# fields
#

TOOLS = [{"type": "function", "name": name, "parameters": {"type": "object"}} for name in ("f", "g")]


def test_fields() -> None:
    schema = {"type": "object", "properties": {}}
    asked = chat(
        steering=None,
        model="tiny",
        seed=5,
        temperature=0.5,
        stop=["x"],
        max_output_tokens=7,
        reasoning={"effort": "none", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "low"},
        include=["message.output_text.logprobs", "reasoning.encrypted_content"],
        top_logprobs=3,
        store=True,
        metadata={"a": "b"},
        stream=True,
        stream_options={"include_obfuscation": False},
    )
    assert "steering" in asked.model_fields_set
    assert (asked.model, asked.seed, asked.temperature, asked.stops) == ("tiny", 5, 0.5, ("x",))
    assert (asked.max_completion_tokens, asked.reasoning_effort, asked.stream) == (7, "none", True)
    assert asked.response_format.json_schema.schema_ == schema
    assert (asked.logprobs, asked.top_logprobs) == (True, 3)
    assert "steering" not in chat().model_fields_set, "left out, it is the server's default"
    assert chat(text={"format": {"type": "json_object"}}).response_format.type == "json_object"
    assert chat().logprobs is None


def test_tools() -> None:
    namespace = {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "h"}, {"type": "custom"}]}
    fields = {"tools": [*TOOLS, {"type": "web_search", "search_context_size": "low"}, namespace]}
    assert [tool.function.name for tool in chat(**fields).tools] == ["f", "g", "h"]
    request = ResponsesRequest.model_validate({"input": "one", **fields})
    assert request.left_out == ["web_search", "custom"]
    assert [tool["name"] for tool in request.shown_tools] == ["f", "g", "n"]
    assert request.functions["h"][1] == "n"
    assert chat(tools=[{"type": "web_search"}]).tools is None
    choice = chat(**fields, tool_choice={"type": "function", "name": "g"}).tool_choice
    assert choice.function.name == "g"
    only = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    asked = chat(**fields, tool_choice=only)
    assert ([tool.function.name for tool in asked.tools], asked.tool_choice) == (["g"], "required")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "x"}]},
            },
            "tool_choice",
        ),
        ({"chat_template_kwargs": {"not a name": 1}}, "chat_template_kwargs"),
    ],
)
def test_what_a_chat_refuses_has_the_name_of_the_response(fields: Any, param: str) -> None:
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "invalid_value")
    assert str(caught.value).startswith(param)


#
# what is kept
#


def body(name: str, length: int = 1) -> dict[str, Any]:
    return {"id": f"resp_{name}", "output": [said(name * length) | {"id": f"msg_{name}"}]}


def test_a_conversation_of_kept_responses() -> None:
    store = ResponseStore()
    first = ResponsesRequest.model_validate({"input": "one"})
    store.keep(body("a"), store.conversation(None, own_items(first)))
    second = ResponsesRequest.model_validate({"input": [USER]})
    items = store.conversation("resp_a", own_items(second))
    store.keep(body("b"), items)
    third = ResponsesRequest.model_validate({"input": [{"type": "item_reference", "id": "msg_a"}, USER]})
    expected = [("user", "one"), ("assistant", "a"), ("user", "go"), ("assistant", "b")]
    found = store.conversation("resp_b", own_items(third))
    texts = [(item.role, item.content if isinstance(item.content, str) else item.content[0].text) for item in found]
    assert texts == [*expected, ("assistant", "a"), ("user", "go")]
    store.delete("resp_a")
    with pytest.raises(ApiError) as caught:
        store.conversation(None, own_items(third))
    assert (caught.value.status, caught.value.param, caught.value.code) == (404, "input[0]", "item_not_found")
    assert store.conversation("resp_b", [])[:2] == found[:2], "a conversation does not lose its beginning"


def test_a_call_without_a_name_is_not_sent_back() -> None:
    store = ResponseStore()
    store.keep({"id": "resp_a", "output": [thought("t") | {"id": "rs_1"}, called("") | {"id": "fc_1"}]}, [])
    assert [item.type for item in store.conversation("resp_a", [])] == ["reasoning"]


def test_what_is_kept_is_bounded() -> None:
    store = ResponseStore(most=2)
    for name in "abc":
        store.keep(body(name), [])
    assert len(store) == 2
    with pytest.raises(ApiError) as caught:
        store.conversation("resp_a", [])
    assert (caught.value.status, caught.value.param) == (404, "previous_response_id")
    assert store.body("resp_c")["id"] == "resp_c"
    small = ResponseStore(most_characters=1000)
    small.keep(body("a"), [])
    small.keep(body("b", 2000), [])
    assert small.body("resp_a"), "one that is too large is not kept, and drives out nothing"
    for name in "cdefgh":
        small.keep(body(name), [])
    assert 0 < len(small) < 7
    assert small.body("resp_h")
