"""Markers of reasoning against what the templates of the pinned llama.cpp tree render of an earlier answer."""

from __future__ import annotations

from typing import Any

import pytest

from steermoe_local.llama.reasoning import split_reasoning
from steermoe_local.llama.reasoning_styles import ReasoningStyle, reasoning_style
from steermoe_local.llama.thinking import mentions_reasoning, thinking_arguments
from tests.support.chat_templates import NAMES, render, source

QUESTION = {"role": "user", "content": "What is 2 + 2?"}
REASONING, ANSWER = "Two and two.", "Four it is."
CALL = {"id": "call00000", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}

# An assistant's message with reasoning, as one template or another reads it; the first form that is rendered counts.
FORMS: dict[str, dict[str, Any]] = {
    "reasoning_content": {"content": ANSWER, "reasoning_content": REASONING},
    "reasoning": {"content": ANSWER, "reasoning": REASONING},
    "thinking": {"content": ANSWER, "thinking": REASONING},
    "parts": {"content": [{"type": "thinking", "thinking": REASONING}, {"type": "text", "text": ANSWER}]},
    "blocks": {"content": {"blocks": [{"type": "thoughts", "text": REASONING}, {"type": "response", "text": ANSWER}]}},
    "with a call": {"content": ANSWER, "reasoning_content": REASONING, "tool_calls": [CALL]},
}
# They drop an earlier answer's reasoning, or take the model's whole text for the answer: the markers cannot be seen.
UNSEEN = {
    "HuggingFaceTB-SmolLM3-3B",
    "LFM2.5-Instruct",
    "NVIDIA-Nemotron-Nano-v2",
    "Qwen-QwQ-32B",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-ai-DeepSeek-V3.1",
    "ibm-granite-granite-3.3-2B-Instruct",
    "llama-cpp-deepseek-r1",
    "llama-cpp-rwkv-world",
    "unsloth-Apriel-1.5",
}


def common_length(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def rendered(name: str) -> tuple[str, str] | None:
    """(prompt, what the template renders in place of what follows the prompt); None: reasoning is not rendered."""
    on = thinking_arguments(source(name), True)
    for fields in FORMS.values():
        try:
            prompt = render(name, [QUESTION], answer=True, **on)
            text = render(name, [QUESTION, {"role": "assistant", **fields}], answer=False, **on)
        except Exception:  # templates refuse what they do not know in their own ways
            continue
        # a list that was printed as it is says nothing of markers
        if REASONING in text and f"'{REASONING}'" not in text and f'"{REASONING}"' not in text:
            return prompt, text[common_length(prompt, text) :]
    return None


@pytest.mark.parametrize("name", NAMES)
def test_the_template_s_own_history_is_split(name: str) -> None:
    """Independent of the table: where reasoning and answer are is known, since both were given to the template."""
    template = source(name)
    found = rendered(name)
    if found is None:
        assert name in UNSEEN or not mentions_reasoning(template), f"{name} mentions reasoning, and renders none"
        return
    assert name not in UNSEEN
    prompt, reply = found
    style = reasoning_style(template, prompt)
    assert style is not None, f"{name}: no entry of the table; it renders {reply!r}"
    reasoning, answer = split_reasoning(reply, style)
    assert reasoning == REASONING, reply
    assert (ANSWER in answer) == (ANSWER in reply), reply  # one leaves out what comes with a call
    assert REASONING not in answer


@pytest.mark.parametrize("name", NAMES)
def test_no_template_of_the_archive_is_unknown(name: str) -> None:
    template = source(name)
    if mentions_reasoning(template):
        assert reasoning_style(template) is not None


def style(template: str, prompt: str) -> ReasoningStyle:
    found = reasoning_style(template, prompt)
    assert found is not None
    return found


@pytest.mark.parametrize("name", [name for name in NAMES if reasoning_style(source(name))])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_bound_answer_is_all_answer(name: str, thinking: bool) -> None:
    """Behind `answer_opening` the model is where the template puts the answer: what comes next is no reasoning."""
    template = source(name)
    prompt = render(name, [QUESTION], answer=True, **thinking_arguments(template, thinking))
    closed = prompt + style(template, prompt).answer_opening(prompt)
    after = style(template, closed)
    assert split_reasoning('{"n": 4}', after) == ("", '{"n": 4}')
    assert after.answer_opening(closed) == "", "asked again, nothing is missing"


@pytest.mark.parametrize(
    ("name", "thinking", "opening"),
    [
        ("MiniMax-M2", False, "\n</think>\n\n"),
        ("StepFun3.5-Flash", False, "\n</think>\n\n"),
        ("deepseek-ai-DeepSeek-R1-Distill-Llama-8B", False, "\n</think>\n\n"),
        ("NVIDIA-Nemotron-Nano-v2", False, "\n</think>\n\n"),
        ("Apriel-1.6-15b-Thinker-fixed", False, "\n[BEGIN FINAL RESPONSE]\n\n"),
        ("GLM-4.7-Flash", True, "</think>"),
        ("GLM-4.7-Flash", False, ""),
        ("Qwen-Qwen3-0.6B", False, ""),
        ("Cohere2MoE", False, "<|START_TEXT|>"),
        ("Cohere2MoE", True, "<|END_THINKING|><|START_TEXT|>"),
        ("Kimi-K3", True, "<|close|>think<|sep|><|open|>response<|sep|>"),
        ("Kimi-K3", False, ""),
        ("upstage-Solar-Open-100B", True, "<|content|>"),
        ("openai-gpt-oss-120b", True, "<|channel|>final<|message|>"),
        ("muse-glimmer", True, " to=user<|message|>"),
        ("ibm-granite-granite-3.3-2B-Instruct", False, ""),
    ],
)
def test_answer_openings(name: str, thinking: bool, opening: str) -> None:
    template = source(name)
    prompt = render(name, [QUESTION], answer=True, **thinking_arguments(template, thinking))
    assert style(template, prompt).answer_opening(prompt) == opening


def test_results_of_tools_are_no_answers() -> None:
    """MiniMax-M2 has <response> around the results of tools, which is no marker of its answers."""
    assert "<response>" in source("MiniMax-M2")
    assert "<response>" not in style(source("MiniMax-M2"), "").markers
    assert "<response>" in style(source("ibm-granite-granite-3.3-2B-Instruct"), "").markers
