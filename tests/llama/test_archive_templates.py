"""Rounds of calls under every chat template of the pinned llama.cpp tree."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from steermoe_local.llama.chat_template import ChatTemplate
from steermoe_local.llama.template_client import BoundedTemplate
from steermoe_local.llama.template_date import template_date
from tests.support.chat_templates import NAMES, source

# Templates that write no calls: the first refuses the round, the others leave them out, as under llama-server.
WITHOUT_CALLS = {
    "google-gemma-2-2b-it",
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "ibm-granite-granite-3.3-2B-Instruct",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
DAY = template_date("2024-02-29")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Tells the weather.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


@cache
def template(name: str) -> ChatTemplate:
    return ChatTemplate(source(name), {"bos_token": "<s>", "eos_token": "</s>"})


def chat(name: str, messages: list[dict[str, Any]]) -> str:
    return template(name).chat(messages, add_generation_prompt=True, variables={"tools": TOOLS}, date=DAY)


def round_of(arguments: Any, content: str | None = None) -> list[dict[str, Any]]:
    """A question, a call as an SDK sends it, and its result."""
    call = {"id": "call_0123456789abcdef", "type": "function", "function": {"name": "zweather", "arguments": arguments}}
    return [
        {"role": "user", "content": "Is it sunny?"},
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_0123456789abcdef", "content": "Quite sunny."},
    ]


def test_the_templates_are_there() -> None:
    assert len(NAMES) >= 70
    assert set(NAMES) > WITHOUT_CALLS


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_CALLS])
def test_rounds_of_calls(name: str) -> None:
    """Arguments come out as JSON or in the template's own form; "" means none, an object and a text the same."""
    text = chat(name, round_of('{"city": "Zoslo"}'))
    assert all(word in text for word in ("zweather", "city", "Zoslo", "Quite sunny."))
    assert "{'city': 'Zoslo'" not in text, "an object as Python prints it"
    assert chat(name, round_of({"city": "Zoslo"})) == text
    assert chat(name, round_of("")) == chat(name, round_of("{}")) == chat(name, round_of({}))


@pytest.mark.parametrize("name", NAMES)
def test_content_and_its_parts(name: str) -> None:
    """A text comes out under every template, and so do parts, never as Python or JSON has them."""
    parts = [{"type": "text", "text": "Zquestion?"}]
    for content in ("Zquestion?", parts):
        text = chat(name, [{"role": "user", "content": content}])
        assert "Zquestion?" in text
        assert "'Zquestion?'" not in text
        assert '"text": "Zquestion?"' not in text


def test_a_system_message_that_is_refused() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert [name for name in NAMES if template(name).forms.refuses_system] == ["google-gemma-2-2b-it"]
    text = chat("google-gemma-2-2b-it", [system, {"role": "user", "content": "Hi."}])
    assert "<start_of_turn>user\nBe brief.\nHi.<end_of_turn>" in text


def test_templates_that_print_the_date() -> None:
    """The seven of them that ask for it, and the one that llama.cpp gives it."""
    today = template_date(None)
    templates = {name: BoundedTemplate(source(name), {}) for name in NAMES}
    reads = {name: (one.reads(today), one.reads(DAY)) for name, one in templates.items()}
    assert {name for name, (by_itself, _) in reads.items() if by_itself} == {
        "Apertus-8B-Instruct",
        "Mistral-Small-3.2-24B-Instruct-2506",
        "fireworks-ai-llama-3-firefunction-v2",
        "ibm-granite-granite-3.3-2B-Instruct",
        "meta-llama-Llama-3.2-3B-Instruct",
        "muse-glimmer",
        "openai-gpt-oss-120b",
        "upstage-Solar-Open-100B",
    }
    more = {name for name, (by_itself, given) in reads.items() if given > by_itself}
    assert more == {"meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.3-70B-Instruct"}
