"""Formats and forced calls on templates that open a block of thinking whatever they are told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.llama.rendering import Renderer
from tests.support.chat_templates import source
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY, Running, running
from tests.support.steered_server import messages

QUESTION = "Which number comes after three?"
SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [3, 4]}, "word": {"enum": ["<think>", "</think>"]}},
    "required": ["n", "word"],
}
TOOL = {"type": "function", "function": {"name": "put", "description": "Put it.", "parameters": SCHEMA}}
FORMATS: dict[str, dict[str, Any]] = {
    "schema": {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
    "object": {"response_format": {"type": "json_object", "schema": SCHEMA}},
}
CHOICES: dict[str, Any] = {"named": {"type": "function", "function": {"name": "put"}}, "required": "required"}

ALWAYS = [
    "MiniMax-M2",
    "StepFun3.5-Flash",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "NVIDIA-Nemotron-Nano-v2",
    "Apriel-1.6-15b-Thinker-fixed",
    "upstage-Solar-Open-100B",
    "muse-glimmer",
    "Kimi-K3",
]


@pytest.fixture(scope="module", params=ALWAYS)
def thinker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    path: Path = tmp_path_factory.mktemp("thinker") / "thinker.gguf"
    copy_model(TINY, path, template=source(request.param))
    with running(model=path, parallel=1, n_ctx=4096, thinking=True) as found:
        yield found


def fits(text: str) -> None:
    value = json.loads(text)
    assert value["n"] in (3, 4)
    assert value["word"] in ("<think>", "</think>"), "what looks like a marker is text of the answer here"


@pytest.mark.parametrize("format_", FORMATS)
def test_a_format_is_in_the_content(thinker: Running, format_: str) -> None:
    fields = {"messages": messages(QUESTION), "max_tokens": 64, **FORMATS[format_]}
    message = thinker.chat(**fields).json()["choices"][0]["message"]
    fits(message["content"])
    assert "reasoning_content" not in message
    chunks = thinker.events("/v1/chat/completions", fields)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert not any("reasoning_content" in delta for delta in deltas)


@pytest.mark.parametrize("choice", CHOICES)
def test_a_forced_call_has_its_arguments(thinker: Running, choice: str) -> None:
    fields = {"messages": messages(QUESTION), "tools": [TOOL], "tool_choice": CHOICES[choice], "max_tokens": 96}
    chosen = thinker.chat(**fields).json()["choices"][0]
    assert chosen["finish_reason"] == "tool_calls"
    assert chosen["message"]["content"] is None
    (call,) = chosen["message"]["tool_calls"]
    assert call["function"]["name"] == "put"
    fits(call["function"]["arguments"])
    chunks = thinker.events("/v1/chat/completions", fields)
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    functions = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert "".join(function["arguments"] for function in functions) == call["function"]["arguments"]


def test_free_answers_still_think(tmp_path: Path) -> None:
    copy_model(TINY, tmp_path / "m.gguf", template=source("MiniMax-M2"))
    with running(model=tmp_path / "m.gguf", parallel=1, n_ctx=1024) as found:
        assert prompt_of(found).endswith("\n<think>\n")
        assert prompt_of(found, tools=[TOOL]).endswith("\n<think>\n")
        assert prompt_of(found, **FORMATS["schema"]).endswith("\n<think>\n\n</think>\n\n")


def test_a_control_token_that_a_schema_asks_for_is_text() -> None:
    """Spelled by its characters: the control token itself is never drawn, however likely."""
    with running(parallel=1) as found:
        (token,) = found.client.post("/tokenize", json={"content": "<|user|>"}).json()["tokens"]
        schema = {"type": "json_object", "schema": {"const": "<|user|>"}}
        body = found.chat(QUESTION, response_format=schema, logit_bias={str(token): 100}, return_tokens=True).json()
        assert json.loads(body["choices"][0]["message"]["content"]) == "<|user|>"
        assert token not in body["choices"][0]["tokens"]


#
# reasoning_effort
#


@pytest.mark.parametrize(
    ("template", "off", "on"),
    [
        ("tencent-Hy3", "<think:opensource></think:opensource>", "<think:opensource>"),
        ("Qwen3.5-4B", "<think>\n\n</think>\n\n", "<think>\n"),
        ("Cohere2MoE", "<|START_THINKING|><|END_THINKING|>", "<|START_THINKING|>"),
        ("Kimi-K3", "<|open|>response<|sep|>", "<|open|>think<|sep|>"),
    ],
)
def test_an_effort_of_none_is_off(tmp_path: Path, template: str, off: str, on: str) -> None:
    copy_model(TINY, tmp_path / "m.gguf", template=source(template))
    with running(model=tmp_path / "m.gguf", parallel=1, n_ctx=4096, thinking=True) as found:
        for effort, tail in (("none", off), ("medium", on), ("minimal", on), (None, on)):
            prompt = prompt_of(found, reasoning_effort=effort)
            assert prompt.endswith(tail), (effort, prompt[-80:])
        assert prompt_of(found, reasoning_effort="none", chat_template_kwargs={}).endswith(off)


def prompt_of(server: Running, **fields: Any) -> str:
    """The rendered prompt of a request: what was tokenized last."""
    seen: list[str] = []
    tokenize = Renderer.tokenize

    def spy(self: Renderer, text: str, **options: Any) -> list[int]:
        seen.append(text)
        return tokenize(self, text, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Renderer, "tokenize", spy)
        response = server.chat(QUESTION, max_tokens=1, **fields)
    assert response.status_code == 200, response.text
    return seen[-1]
