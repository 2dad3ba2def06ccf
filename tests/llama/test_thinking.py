"""Switches for thinking: what each template of the pinned llama.cpp tree renders with thinking off and on."""

from __future__ import annotations

from typing import Any

import pytest

from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.llama.thinking import effort_arguments, mentions_reasoning, thinking_arguments
from tests.support import chat_templates
from tests.support.chat_templates import NAMES, render, source

QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]

# template -> (a text of the prompt with thinking off, one with thinking on); each is in its own prompt alone.
SWITCHED = {
    "Apertus-8B-Instruct": ("Deliberation: disabled", "Deliberation: enabled"),
    "Bielik-11B-v3.0-Instruct": ("2?<|im_end|>\n<|im_start|>assistant\n|", "assistant\n<think>\n|"),
    "ByteDance-Seed-OSS": ("</seed:think>|", "<seed:bos>assistant\n|"),
    "Cohere2MoE": ("<|START_THINKING|><|END_THINKING|>|", "<|START_THINKING|>|"),
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": ("<|START_THINKING|><|END_THINKING|>|", "<|CHATBOT_TOKEN|>|"),
    "GLM-4.6": ("/nothink<|assistant|>\n<think></think>|", "2?<|assistant|>|"),
    "GLM-4.7-Flash": ("<|assistant|></think>|", "<|assistant|><think>|"),
    "HuggingFaceTB-SmolLM3-3B": ("/no_think", "assistant\n|"),
    "Kimi-K3": ("<|open|>response<|sep|>|", "<|open|>think<|sep|>|"),
    "MiniMax-M3": ("ai\n</mm:think>|", "ai\n<mm:think>|"),
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": ("<think></think>|", "<think>\n|"),
    "Qwen-QwQ-32B": ("<think>\n</think>|", "<think>\n|"),
    "Qwen-Qwen3-0.6B": ("<think>\n\n</think>\n\n|", "assistant\n|"),
    "Qwen3.5-4B": ("<think>\n\n</think>\n\n|", "assistant\n<think>\n|"),
    "Reka-Edge": ("assistant:|", "assistant: <think>\n|"),
    "Spark2.5": ("<|Bot|></think>|", "<|Bot|><think>|"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("<think>\n</think>|", "<think>\n|"),
    "deepseek-ai-DeepSeek-V3.1": ("<think></think>|", "<｜Assistant｜><think>|"),
    "deepseek-ai-DeepSeek-V3.2": ("<think></think>|", "<｜Assistant｜><think>|"),
    "deepseek-ai-DeepSeek-V4": ("<｜Assistant｜></think>|", "<｜Assistant｜><think>|"),
    "deepseek-ai-DeepSeek-V4-Flash-0731": ("<｜Assistant｜></think>|", "<｜Assistant｜><think>|"),
    "google-gemma-4-31B-it": ("<|channel>thought\n<channel|>|", "<|turn>system\n<|think|>"),
    "google-gemma-4-31B-it-interleaved": ("<|channel>thought\n<channel|>|", "<|turn>system\n<|think|>"),
    "ibm-granite-granite-3.3-2B-Instruct": ("assistant.<|end_of_text|>", "between <think></think>"),
    "inclusionai-ling-3.0-flash": ("<think></think>|", "</role>\n<think>|"),
    "llama-cpp-rwkv-world": (" <think>\n</think>|", "Assistant: <think>|"),
    "muse-glimmer": ("Reasoning strength: low", "Reasoning strength: high"),
    "openai-gpt-oss-120b": ("Reasoning: low", "Reasoning: medium"),
    "openbmb-MiniCPM5-1B": ("<think>\n\n</think>\n\n|", "assistant\n<think>\n|"),
    "poolside-Laguna-S-2.1": ("<assistant></think>|", "<assistant><think>|"),
    "poolside-Laguna-XS-2.1": ("<assistant>\n</think>|", "<assistant>\n<think>|"),
    "poolside-Laguna-XS.2": ("<assistant>\n</think>|", "<assistant>\n<think>|"),
    "tencent-Hy3": ("<think:opensource></think:opensource>|", "<think:opensource>|"),
    "upstage-Solar-Open-100B": ("<|think|><|end|><|begin|>assistant|", "2?<|end|><|begin|>assistant|"),
}
# Their reasoning cannot be switched off by a variable (docs/pairs.md).
ALWAYS = {
    "Apriel-1.6-15b-Thinker-fixed",
    "Kimi-K2-Thinking",
    "LFM2.5-8B-A1B",
    "LFM2.5-Instruct",
    "MiniMax-M2",
    "NVIDIA-Nemotron-Nano-v2",  # /no_think in a message does it
    "StepFun3.5-Flash",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
    "llama-cpp-deepseek-r1",
    "mistralai-Ministral-3-14B-Reasoning-2512",
    "unsloth-Apriel-1.5",
}
# They only reason less.
LESS = {"muse-glimmer", "openai-gpt-oss-120b"}
NEEDED = {"fireworks-ai-llama-3-firefunction-v2": {"functions": "", "datetime": ""}}


def prompt(name: str, **variables: Any) -> str:
    """A prompt, with "|" for its end."""
    return render(name, QUESTION, answer=True, **NEEDED.get(name, {}), **variables) + "|"


def test_the_archive_has_templates() -> None:
    assert NAMES, f"no templates in {chat_templates.FOLDER}"
    assert not {*SWITCHED, *ALWAYS} - {*NAMES}, "the pinned tree has them no more"


@pytest.mark.parametrize("name", NAMES)
def test_off_and_on(name: str) -> None:
    template = source(name)
    off, on = (prompt(name, **thinking_arguments(template, thinking)) for thinking in (False, True))
    if name not in SWITCHED:
        assert off == on, f"{name} has a switch: add what it renders to SWITCHED"
        assert (reasoning_style(template) is not None) == (name in ALWAYS), f"{name}: does it reason? See ALWAYS"
        return
    wanted_off, wanted_on = SWITCHED[name]
    assert wanted_off in off
    assert wanted_off not in on
    assert wanted_on in on
    assert wanted_on not in off
    style = reasoning_style(template, off.removesuffix("|"))
    assert style is not None, f"{name}: no markers are known of its reasoning"
    assert style.tags is None or not style.prefix, "off, and the prompt opens the reasoning"
    assert (style.tags is None) == (name in LESS)


@pytest.mark.parametrize("name", NAMES)
def test_every_effort_is_accepted(name: str) -> None:
    """OpenAI's values; a template that knows others gets the nearest."""
    for effort in ("minimal", "low", "medium", "high", "xhigh"):
        switches = thinking_arguments(source(name), True)
        prompt(name, **switches | effort_arguments(source(name), effort))


@pytest.mark.parametrize(
    ("name", "effort", "variables"),
    [
        ("tencent-Hy3", "minimal", {"reasoning_effort": "low"}),
        ("tencent-Hy3", "medium", {"reasoning_effort": "high"}),
        ("tencent-Hy3", "xhigh", {"reasoning_effort": "high"}),
        ("tencent-Hy3", "no_think", {"reasoning_effort": "no_think"}),
        ("Kimi-K3", "medium", {"thinking_effort": "high"}),
        ("Kimi-K3", "xhigh", {"thinking_effort": "max"}),
        ("openai-gpt-oss-120b", "medium", {"reasoning_effort": "medium"}),
        ("muse-glimmer", "medium", {"reasoning_strength": "medium"}),
        ("Qwen3.5-4B", "medium", {}),
        ("upstage-Solar-Open-100B", "xhigh", {"reasoning_effort": "xhigh"}),
    ],
)
def test_efforts(name: str, effort: str, variables: dict[str, str]) -> None:
    assert effort_arguments(source(name), effort) == variables


@pytest.mark.parametrize(
    ("effort", "value"), [("minimal", "high"), ("xhigh", "high"), ("none", "none"), ("high", "high"), ("odd", "odd")]
)
def test_a_template_that_takes_certain_efforts_alone(effort: str, value: str) -> None:
    template = "{% if reasoning_effort not in ['none', \"high\"] %}{{ raise_exception('no') }}{% endif %}"
    assert effort_arguments(template, effort) == {"reasoning_effort": value}


@pytest.mark.parametrize(
    ("template", "off", "on"),
    [
        ("{{ enable_thinking }}", {"enable_thinking": False}, {"enable_thinking": True}),
        (
            "{%- set enable_thinking = enable_thinking | default(true) %}",
            {"enable_thinking": False},
            {"enable_thinking": True},
        ),
        (
            "{% if not thinking is defined %}{% set thinking = true %}{% endif %}",
            {"thinking": False},
            {"thinking": True},
        ),
        ("{{ thinking_budget }}", {"thinking_budget": 0}, {}),
        ("{{ reasoning_effort }}", {"reasoning_effort": "low"}, {}),
        ("{% if reasoning_effort == 'none' %}x{% endif %}", {"reasoning_effort": "none"}, {}),
        (
            "{% if reasoning_effort == 'no_think' %}x{% endif %}",
            {"reasoning_effort": "no_think"},
            {"reasoning_effort": "high"},
        ),
        (
            "{% if thinking_mode == 'disabled' %}x{% endif %}",
            {"thinking_mode": "disabled"},
            {"thinking_mode": "enabled"},
        ),
        ("{{ thinking_mode }}", {}, {}),
        ("Stop thinking {{ 'enable_thinking' }} {{ m.thinking }}", {}, {}),
        (
            "{% generation %}{{ thinking }}{% endgeneration %}{% for a in b %}{% break %}{% endfor %}",
            {"thinking": False},
            {"thinking": True},
        ),
        ("{% broken", {}, {}),
        ("", {}, {}),
    ],
)
def test_switches_are_those_that_the_template_reads(template: str, off: dict[str, Any], on: dict[str, Any]) -> None:
    assert thinking_arguments(template, False) == off
    assert thinking_arguments(template, True) == on


@pytest.mark.parametrize(
    ("template", "mentioned"),
    [
        ("{{ message.reasoning_content }}", True),
        ("{{ message['reasoning'] }}", True),
        ("{% if enable_thinking %}x{% endif %}", True),
        ("{{ 'Think, and give reasons: reasoning_content' }}", False),
        ("{{ message.content }}", False),
        ("{% broken", False),
    ],
)
def test_templates_that_know_of_reasoning(template: str, mentioned: bool) -> None:
    assert mentions_reasoning(template) == mentioned
