"""Tool calls that a model chooses to make (tool_choice auto), whole and streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.chat_templates import source
from tests.support.running_server import Running
from tests.support.saying import saying
from tests.support.steered_server import messages

QUESTION = "What is the weather in Rome?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "Its name."}}}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It does.", "parameters": PARAMETERS}}
    for name in ("get_weather", "stop")
]
ROME = '{"city": "Rome"}'
HERMES = f'<tool_call>\n{{"name": "get_weather", "arguments": {ROME}}}\n</tool_call>'
STOP = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'
XML = "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
MISTRAL = f'[TOOL_CALLS][{{"name": "get_weather", "arguments": {ROME}}}]'
ACTION = f'{{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {ROME}}}'

# (template, what the model says, the reasoning and the content that a client should get)
SAID: dict[str, tuple[str, str, str | None, str | None]] = {
    "call": ("Qwen-Qwen3-0.6B", HERMES, None, None),
    "content and call": ("Qwen-Qwen3-0.6B", "I look.\n\n" + HERMES, None, "I look."),
    "thought and call": ("StepFun3.5-Flash", "Rome.\n</think>\n\n" + XML, "Rome.", None),
    "harmony": (
        "openai-gpt-oss-120b",
        "<|channel|>analysis<|message|>Rome.<|end|><|start|>assistant to=functions.get_weather<|channel|>"
        f"commentary json<|message|>{ROME}",
        "Rome.",
        None,
    ),
    "muse": (
        "muse-glimmer",
        " to=self<|message|>Rome.<|eom|><|start|>assistant to=get_weather<|message|><atem:function_calls>\n"
        '<atem:invoke name="get_weather">\n<atem:parameter name="city">Rome</atem:parameter>\n</atem:invoke>\n'
        "</atem:function_calls>",
        "Rome.",
        None,
    ),
    "llama": ("meta-llama-Llama-3.1-8B-Instruct", f'{{"name": "get_weather", "parameters": {ROME}}}', None, None),
    "mistral": ("mistralai-Mistral-Nemo-Instruct-2407", MISTRAL, None, None),
    "cohere": ("Cohere2MoE", f"<|START_ACTION|>[{ACTION}]<|END_ACTION|>", None, None),
}


def joined(server: Running, fields: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """(message of the joined chunks, finish_reason), as OpenAI's client joins them."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = ""
    for chunk in server.events("/v1/chat/completions", fields):
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for call in delta.get("tool_calls") or ():
                if call["index"] == len(message["tool_calls"]):
                    assert call["id"]
                    assert call["type"] == "function"
                    function = {"name": call["function"]["name"], "arguments": ""}
                    message["tool_calls"].append({"id": call["id"], "type": "function", "function": function})
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return message, reason


def asked(**fields: Any) -> dict[str, Any]:
    return {"messages": messages(QUESTION), "tools": TOOLS, "max_tokens": 600} | fields


@pytest.mark.parametrize("name", SAID)
def test_calls_are_given_as_calls(tmp_path: Path, name: str) -> None:
    template, text, reasoning, content = SAID[name]
    with saying(text, source(template), tmp_path) as server:
        body = asked(chat_template_kwargs={"reasoning_effort": "high"} if name == "harmony" else {})
        choice = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]
        message = choice["message"]
        assert choice["finish_reason"] == "tool_calls"
        assert message["content"] == content
        assert message.get("reasoning_content") == reasoning
        (call,) = message["tool_calls"]
        assert call["id"]
        assert call["type"] == "function"
        assert call["function"]["name"] == "get_weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
        streamed, reason = joined(server, body)
        assert reason == "tool_calls"
        assert streamed["content"] == (content or "")
        assert streamed["reasoning_content"] == (reasoning or "")
        assert [c["function"] for c in streamed["tool_calls"]] == [call["function"]]


def test_several_calls(tmp_path: Path) -> None:
    with saying(f"{HERMES}\n{STOP}", source("Qwen-Qwen2.5-7B-Instruct"), tmp_path) as server:
        message = server.client.post("/v1/chat/completions", json=asked()).json()["choices"][0]["message"]
        assert [call["function"]["name"] for call in message["tool_calls"]] == ["get_weather", "stop"]
        assert len({call["id"] for call in message["tool_calls"]}) == 2
        streamed, _ = joined(server, asked())
        assert [c["function"] for c in streamed["tool_calls"]] == [c["function"] for c in message["tool_calls"]]
        one = server.client.post("/v1/chat/completions", json=asked(parallel_tool_calls=False)).json()
        assert [c["function"]["name"] for c in one["choices"][0]["message"]["tool_calls"]] == ["get_weather"]


def test_what_is_no_call_is_content(tmp_path: Path) -> None:
    """Without tools, with tool_choice none, cut off, or in a format that is not known."""
    template = source("Qwen-Qwen2.5-7B-Instruct")
    with saying(HERMES, template, tmp_path) as server:
        assert server.client.get("/v1/models").json()["data"][0]["meta"]["tool_calls"] == "hermes"
        for fields in ({"tools": []}, {"tools": None}, {"tool_choice": "none"}):
            choice = server.client.post("/v1/chat/completions", json=asked(**fields)).json()["choices"][0]
            assert choice["message"]["content"] == HERMES
            assert "tool_calls" not in choice["message"]
            assert choice["finish_reason"] == "stop"
        cut = server.client.post("/v1/chat/completions", json=asked(max_tokens=8)).json()["choices"][0]
        assert cut["finish_reason"] == "length"
        assert cut["message"]["content"]
        assert HERMES.startswith(cut["message"]["content"])
        assert "tool_calls" not in cut["message"]
        schema = {"type": "json_object", "schema": {"const": {"name": "stop", "arguments": {}}}}
        bound = server.client.post("/v1/chat/completions", json=asked(response_format=schema)).json()["choices"][0]
        assert json.loads(bound["message"]["content"]) == {"name": "stop", "arguments": {}}
    unknown = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ tools | tojson if tools }}"
    with saying(HERMES, unknown, tmp_path) as server:
        assert server.client.get("/v1/models").json()["data"][0]["meta"]["tool_calls"] is None
        choice = server.client.post("/v1/chat/completions", json=asked()).json()["choices"][0]
        assert choice["message"]["content"] == HERMES
        assert choice["finish_reason"] == "stop"


def test_a_call_goes_back_as_it_came(tmp_path: Path) -> None:
    """The message with the calls, and their results, are the next request's history."""
    with saying(HERMES, source("Qwen-Qwen3-0.6B"), tmp_path) as server:
        message = server.client.post("/v1/chat/completions", json=asked()).json()["choices"][0]["message"]
        result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "Sunny."}
        response = server.client.post(
            "/v1/chat/completions", json=asked(messages=[*messages(QUESTION), message, result])
        )
        assert response.status_code == 200, response.text
