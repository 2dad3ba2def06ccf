"""Conversations as SDKs send them back, and answers that continue the assistant's last message."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from steermoe_local.server.prompting import Prompter
from steermoe_local.server.schemas_chat import ChatRequest
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import text_of

QUESTION = "Which number comes after three?"
LONG = "Please count starting at eleven until fifteen."
ASKED = {"role": "user", "content": LONG}
# shows all that it is given, as one line a message
SHOWS = (
    "{%- for m in messages -%}{{ m.role }}:{{ m.content }}"
    "{%- if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif -%}"
    "{%- for c in m.tool_calls or [] %} {{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor -%}"
    "<|end|>{%- endfor -%}<|assistant|>"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2) as found:
        yield found


@pytest.fixture(scope="module")
def shower(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path = tmp_path_factory.mktemp("shows") / "shows.gguf"
    copy_model(TINY, path, template=SHOWS)
    with running(model=path, parallel=1) as found:
        yield found


def prompt_of(server: Running, *messages: dict[str, Any], **fields: Any) -> str:
    """The text that a conversation is rendered to."""
    assert server.worker.engine is not None
    prompter = Prompter(server.worker.engine, thinking=False, template_arguments={})
    try:
        return prompter.chat(ChatRequest.model_validate({"messages": list(messages)} | fields)).rendered.text
    finally:
        prompter.close()


@contextmanager
def client_of(server: Running) -> Iterator[OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, http_client=http) as client:
        yield client


#
# sent back
#


class Count(BaseModel):
    n: int


def put(n: int) -> None:
    """Put it."""


def test_answers_of_openais_client_are_accepted_as_history(server: Running) -> None:
    """Each as model_dump gives it: null fields, parsed objects, tool calls with parsed arguments."""
    tool: Any = {
        "type": "function",
        "function": {"name": "put", "parameters": Count.model_json_schema(), "strict": True},
    }
    tool["function"]["parameters"]["additionalProperties"] = False
    common: Any = {"model": "tiny", "temperature": 0, "max_tokens": 60}
    with client_of(server) as client:
        answers = [
            client.chat.completions.create(messages=[ASKED], **common),  # type: ignore[list-item]
            client.chat.completions.create(messages=[ASKED], n=2, logprobs=True, **common),  # type: ignore[list-item]
            client.chat.completions.parse(messages=[ASKED], response_format=Count, **common),  # type: ignore[list-item]
            client.chat.completions.parse(
                messages=[ASKED],  # type: ignore[list-item]
                tools=[tool],
                tool_choice={"type": "function", "function": {"name": "put"}},
                **common,
            ),
        ]
        for answer in answers:
            sent = answer.choices[0].message  # the SDK warns of its own type of `parsed`
            for message in (sent.model_dump(warnings=False), sent.to_dict(warnings=False)):
                history: list[Any] = [ASKED, message]
                for call in message.get("tool_calls") or []:  # type: ignore[attr-defined]
                    history.append({"role": "tool", "tool_call_id": call["id"], "content": "4"})
                history.append({"role": "user", "content": QUESTION})
                client.chat.completions.create(messages=history, **common)
        assert answers[2].choices[0].message.parsed is not None
        assert answers[3].choices[0].message.tool_calls[0].function.parsed_arguments is not None


CALL = {"id": "call_1", "type": "function", "function": {"name": "put", "arguments": '{"n": 4}'}}


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ({"role": "assistant", "content": "one"}, "one"),
        ({"role": "assistant", "content": "one", "parsed": {"n": 1}, "id": "x", "audio": None}, "one"),
        ({"role": "assistant", "content": None, "refusal": "I will not."}, "I will not."),
        ({"role": "assistant", "content": None}, ""),
        ({"role": "assistant", "content": None, "reasoning_content": "so"}, "<think>so</think>"),
        ({"role": "assistant", "content": "one", "reasoning": "so"}, "one<think>so</think>"),
        ({"role": "assistant", "content": "one", "thinking": "so"}, "one<think>so</think>"),
        ({"role": "assistant", "content": "one", "reasoning": "so", "reasoning_content": "so"}, "one<think>so</think>"),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "one", "annotations": []}]}, "one"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "no"),
        (
            {
                "role": "assistant",
                "content": [{"type": "reasoning", "reasoning": "so"}, {"type": "text", "text": "one"}],
            },
            "one<think>so</think>",
        ),
        (
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "so"}]},
                    {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}, "citations": None},
                ],
            },
            "one<think>so</think>",
        ),
        ({"role": "assistant", "content": "", "tool_calls": []}, ""),
        ({"role": "assistant", "content": None, "tool_calls": [CALL], "function_call": None}, ' put({"n": 4})'),
        (
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "function": {"name": "put", "arguments": {"n": 4}, "parsed_arguments": {}}}],
            },
            ' put({"n": 4})',
        ),
        (
            {
                "role": "assistant",
                "reasoning": "so",
                "content": None,
                "tool_calls": [{"index": 0, **CALL, "type": None, "provider_specific_fields": None}],
            },
            '<think>so</think> put({"n": 4})',
        ),
        ({"role": "tool", "tool_call_id": "call_1", "content": None, "is_error": False}, ""),
        ({"role": "user", "content": "one", "name": "Ann", "timestamp": 5, "id": "m1"}, "one"),
    ],
)
def test_messages_as_they_come_back(shower: Running, message: dict[str, Any], shown: str) -> None:
    text = prompt_of(shower, ASKED, message, {"role": "user", "content": "two"})
    assert text == f"user:{LONG}<|end|>{message['role']}:{shown}<|end|>user:two<|end|><|assistant|>"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": None},
        {"role": "user"},
        {"role": "assistant"},
        {"role": "tool", "tool_call_id": "1"},
        {"role": "user", "content": None, "reasoning_content": "so"},
        {"role": "user", "content": "x", "tool_calls": [CALL]},
        {"role": "assistant", "content": [{"type": "text"}]},
        {"role": "assistant", "content": [{"type": "thinking", "text": "so"}]},
        {"role": "assistant", "content": "x", "function_call": {"name": "put", "arguments": "{}"}},
        {"role": "assistant", "content": "x", "weight": 1},
    ],
)
def test_messages_that_are_refused(server: Running, message: dict[str, Any]) -> None:
    response = server.chat(messages=[ASKED, message, ASKED])
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("messages[1]")


#
# prefill
#


def test_the_last_message_is_continued(server: Running) -> None:
    """Its text stands behind the header as it is, and the answer is what follows; as llama-server does, and vLLM if
    it is told to."""
    whole = text_of(server.chat(LONG))
    first = whole[: whole.index(" ")]
    assert 0 < len(first) < len(whole)
    begun = [ASKED, {"role": "assistant", "content": first}]
    assert prompt_of(server, *begun) == prompt_of(server, ASKED) + first
    for fields in (
        {},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        assert first + text_of(server.chat(messages=begun, **fields)) == whole
    assert text_of(server.chat(messages=begun, echo=True)) == whole
    for name in ("prefix", "partial"):
        assert text_of(server.chat(messages=[ASKED, begun[1] | {name: True}], echo=True)) == whole
    for echo in (False, True):
        chunks = server.events("/v1/chat/completions", {"messages": begun, "max_tokens": 24, "echo": echo})
        said = "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        assert said == (whole if echo else whole[len(first) :])


def test_a_new_turn_only_if_it_is_asked_for(shower: Running) -> None:
    begun = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert prompt_of(shower, *begun) == "user:a<|end|><|assistant|>b"
    new = prompt_of(shower, *begun, continue_final_message=False)
    assert new == "user:a<|end|>assistant:b<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("messages", "fields", "words"),
    [
        ([ASKED], {"continue_final_message": True}, "continue_final_message"),
        ([ASKED], {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            [ASKED, {"role": "assistant", "content": "a"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "exclude",
        ),
        ([ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}, "results"),
        ([ASKED, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}], {}, "join them"),
        (
            [ASKED, {"role": "assistant", "content": "{"}],
            {"response_format": {"type": "json_object"}},
            "response_format",
        ),
        ([ASKED, {"role": "assistant", "content": None, "reasoning": "so"}], {}, "reasoning"),
        (
            [ASKED, {"role": "assistant", "content": "a", "reasoning": "so"}],
            {"continue_final_message": "reasoning_content"},
            "reasoning",
        ),
    ],
)
def test_what_cannot_be_continued(server: Running, messages: Any, fields: dict[str, Any], words: str) -> None:
    response = server.chat(messages=messages, **fields)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_reasoning_is_continued(tmp_path: Path) -> None:
    """A template that opens the reasoning: content closes it, reasoning alone goes on."""
    path = tmp_path / "thinks.gguf"
    template = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}<|assistant|><think>\n{# </think> #}"
    copy_model(TINY, path, template=template)
    with running(model=path, parallel=1) as thinker:
        answer = {"role": "assistant", "content": "one,"}
        header = f"{LONG}<|end|><|assistant|><think>\n"
        assert prompt_of(thinker, ASKED, answer) == header + "\n</think>\n\none,"
        message = thinker.chat(messages=[ASKED, answer]).json()["choices"][0]["message"]
        assert message["content"]
        assert "reasoning_content" not in message
        thought = answer | {"reasoning": "so"}
        assert prompt_of(thinker, ASKED, thought) == header + "so\n</think>\n\none,"
        only = {"role": "assistant", "content": None, "reasoning": "so"}
        assert prompt_of(thinker, ASKED, only) == header + "so"
        message = thinker.chat(messages=[ASKED, only]).json()["choices"][0]["message"]
        assert message["reasoning_content"]
        assert message["content"] == ""
        closed = prompt_of(thinker, ASKED, only, continue_final_message="content")
        assert closed == header + "so\n</think>\n\n"
        as_text = thinker.chat(LONG, reasoning_format="none", ignore_eos=True).json()["choices"][0]["message"]
        assert as_text["content"]
        assert "reasoning_content" not in as_text
