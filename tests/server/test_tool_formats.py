"""Calls of tools: what each template of the pinned llama.cpp tree renders of a call is read back as the same call."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.llama.reasoning import Part, split_reasoning
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.llama.thinking import thinking_arguments
from steermoe_local.server.tool_calls import CallSplitter, OfferedTools
from steermoe_local.server.tool_formats import FORMATS, tool_format
from tests.support.chat_templates import NAMES, render, source

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Its name."},
        "days": {"type": "integer", "description": "How many."},
        "hours": {"type": "array", "items": {"type": "integer"}, "description": "Which."},
        "wind": {"type": "boolean", "description": "Wind, too?"},
    },
    "required": ["city"],
}
STOP = {"type": "object", "properties": {"reason": {"type": "string", "description": "Why."}}, "required": []}
SCHEMAS = {"get_weather": WEATHER, "stop": STOP}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "It does.", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
QUESTION = {"role": "user", "content": "And now?"}
NEEDED = {"fireworks-ai-llama-3-firefunction-v2": {"functions": "[]", "datetime": "now"}}

# template -> name of the format
KNOWN = {
    "Apertus-8B-Instruct": "apertus",
    "Apriel-1.6-15b-Thinker-fixed": "tool_calls",
    "Bielik-11B-v3.0-Instruct": "hermes",
    "ByteDance-Seed-OSS": "seed",
    "Cohere2MoE": "cohere",
    "CohereForAI-c4ai-command-r7b-12-2024-tool_use": "cohere",
    "GLM-4.6": "glm",
    "GLM-4.7-Flash": "glm",
    "GigaChat3-10B-A1.8B": "gigachat-3",
    "GigaChat3.1-10B-A1.8B": "gigachat",
    "Kimi-K2-Instruct": "kimi-k2",
    "Kimi-K2-Thinking": "kimi-k2",
    "Kimi-K3": "kimi-k3",
    "LFM2-8B-A1B": "lfm2",
    "LFM2.5-8B-A1B": "lfm2",
    "LFM2.5-Instruct": "lfm2",
    "MiMo-VL": "hermes",
    "MiniMax-M1": "tool_calls",
    "MiniMax-M2": "minimax-m2",
    "MiniMax-M3": "minimax-m3",
    "Mistral-Small-3.2-24B-Instruct-2506": "mistral",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "qwen3-coder",
    "NVIDIA-Nemotron-Nano-v2": "nemotron-v2",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "hermes",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "hermes",
    "Qwen-QwQ-32B": "hermes",
    "Qwen-Qwen2.5-7B-Instruct": "hermes",
    "Qwen-Qwen3-0.6B": "hermes",
    "Qwen3-Coder": "qwen3-coder",
    "Qwen3.5-4B": "qwen3-coder",
    "Reka-Edge": "hermes",
    "Spark2.5": "glm",
    "StepFun3.5-Flash": "qwen3-coder",
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": "deepseek",
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": "deepseek",
    "deepseek-ai-DeepSeek-V3.1": "deepseek",
    "deepseek-ai-DeepSeek-V3.2": "deepseek-dsml",
    "deepseek-ai-DeepSeek-V4": "deepseek-dsml",
    "deepseek-ai-DeepSeek-V4-Flash-0731": "deepseek-dsml",
    "fireworks-ai-llama-3-firefunction-v2": "firefunction",
    "google-gemma-4-31B-it": "gemma-4",
    "google-gemma-4-31B-it-interleaved": "gemma-4",
    "ibm-granite-granite-3.3-2B-Instruct": "granite-3",
    "ibm-granite-granite-4.0": "hermes",
    "ibm-granite-granite-4.1": "hermes",
    "inclusionai-ling-3.0-flash": "glm",
    "llama-cpp-deepseek-r1": "deepseek",
    "meetkai-functionary-medium-v3.1": "functionary-v3.1",
    "meta-llama-Llama-3.1-8B-Instruct": "llama-3",
    "meta-llama-Llama-3.2-3B-Instruct": "llama-3",
    "meta-llama-Llama-3.3-70B-Instruct": "llama-3",
    "mistralai-Ministral-3-14B-Reasoning-2512": "mistral",
    "mistralai-Mistral-Nemo-Instruct-2407": "mistral",
    "moonshotai-Kimi-K2": "kimi-k2",
    "muse-glimmer": "muse",
    "openai-gpt-oss-120b": "harmony",
    "openbmb-MiniCPM5-1B": "minicpm5",
    "poolside-Laguna-S-2.1": "glm",
    "poolside-Laguna-XS-2.1": "glm",
    "poolside-Laguna-XS.2": "glm",
    "tencent-Hy3": "hy3",
    "unsloth-Apriel-1.5": "tool_calls",
    "unsloth-mistral-Devstral-Small-2507": "mistral",
    "upstage-Solar-Open-100B": "solar",
}
# Their calls stay in the content: no format of their own (docs/server.md).
UNKNOWN = {
    "HuggingFaceTB-SmolLM3-3B",
    "google-gemma-2-2b-it",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
    "CohereForAI-c4ai-command-r-plus-tool_use",  # "Action: ```json [...]```", which is also an answer in Markdown
    "meetkai-functionary-medium-v3.2",  # every answer begins with its recipient
}
# They describe the format to the model, and drop calls from the history.
NOT_RENDERED = {
    "LFM2-8B-A1B",
    "LFM2.5-Instruct",
    "ibm-granite-granite-3.3-2B-Instruct",
}
# The largest number of calls that they render in one answer.
MOST = {
    "GigaChat3-10B-A1.8B": 1,
    "GigaChat3.1-10B-A1.8B": 1,
    "deepseek-ai-DeepSeek-R1-Distill-Llama-8B": 2,  # it ends the answer behind each further one
    "meta-llama-Llama-3.1-8B-Instruct": 1,
    "meta-llama-Llama-3.2-3B-Instruct": 1,
    "meta-llama-Llama-3.3-70B-Instruct": 1,
    "openai-gpt-oss-120b": 1,
}

Calls = list[tuple[str, dict[str, Any]]]


def common_length(a: str, b: str) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def reply(name: str, calls: Calls, content: str = "") -> tuple[str, str]:
    """(prompt up to where the reply differs, what the template renders for an answer that makes these calls)."""
    variables = {"tools": TOOLS} | thinking_arguments(source(name), False) | NEEDED.get(name, {})
    problems = []
    for parsed in (True, False):
        for empty in ("", None):
            rendered = [
                {
                    "id": f"call{number:05}",
                    "type": "function",
                    "function": {"name": tool, "arguments": arguments if parsed else json.dumps(arguments)},
                }
                for number, (tool, arguments) in enumerate(calls)
            ]
            message = {"role": "assistant", "content": content or empty, "tool_calls": rendered}
            try:
                prompt = render(name, [QUESTION], answer=True, **variables)
                text = render(name, [QUESTION, message], answer=False, **variables)
            except (jinja2.TemplateError, TypeError) as error:
                problems.append(error)
                continue
            common = common_length(prompt, text)
            opened = text[:common].rpartition("<")[0]
            if ">" not in text[len(opened) : common]:  # it is inside a marker: two begin alike
                common = len(opened)
            if calls[0][0] in text[common:]:
                return text[:common], text[common:]
    raise AssertionError(f"{name} renders no call: {problems}")


def split(name: str, prompt: str, text: str, pieces: list[str] | None = None) -> tuple[str, Calls]:
    """(content, calls) of a reply."""
    format_ = tool_format(source(name))
    assert format_ is not None
    style = reasoning_style(source(name), prompt)
    _, answer = split_reasoning(text, style and replace(style, keeps_calls=True))
    splitter = CallSplitter(OfferedTools(format_, SCHEMAS))
    parts = splitter.feed([Part("answer", piece) for piece in (pieces or [answer])]) + splitter.finish()
    return "".join(text for _, text in parts), [(call.name, json.loads(call.arguments)) for call in splitter.calls]


# Markers are no part of the values, since some formats do not escape them (LFM2's nor backslashes and quotes).
WORDS = st.text(
    st.characters(codec="utf-8", exclude_categories=("C", "Z"), exclude_characters="<>[]&｜|`\\'"), min_size=1
)
TEXTS = st.lists(WORDS, min_size=1, max_size=3).map(" ".join)
ARGUMENTS = st.fixed_dictionaries(
    {"city": TEXTS},
    optional={
        "days": st.integers(-(10**9), 10**9),
        "hours": st.lists(st.integers(0, 23), min_size=1, max_size=3),
        "wind": st.booleans(),
    },
)
CALLS = st.lists(
    ARGUMENTS.map(lambda a: ("get_weather", a)) | TEXTS.map(lambda t: ("stop", {"reason": t})), min_size=1, max_size=3
)


@pytest.mark.parametrize("name", NAMES)
def test_the_table(name: str) -> None:
    found = tool_format(source(name))
    assert (found and found.name) == KNOWN.get(name), f"{name}: add its format, or name it in UNKNOWN"
    assert (name in KNOWN) != (name in UNKNOWN)


def test_every_format_is_of_a_template() -> None:
    assert {format_.name for format_ in FORMATS} == set(KNOWN.values())


@pytest.mark.parametrize("name", sorted(set(KNOWN) - NOT_RENDERED))
@settings(max_examples=8)
@given(CALLS)
def test_calls_are_read_back(name: str, calls: Calls) -> None:
    calls = calls[: MOST.get(name)]
    content, found = split(name, *reply(name, calls))
    assert found == calls
    assert "get_weather" not in content
    assert "reason" not in content


@pytest.mark.parametrize(
    "name",
    [
        "Qwen-Qwen2.5-7B-Instruct",
        "mistralai-Mistral-Nemo-Instruct-2407",
        "mistralai-Ministral-3-14B-Reasoning-2512",
        "Kimi-K2-Instruct",
        "deepseek-ai-DeepSeek-V3.1",
        "Cohere2MoE",
        "NVIDIA-Nemotron-Nano-v2",
        "meta-llama-Llama-3.1-8B-Instruct",
    ],
)
@settings(max_examples=20)
@given(st.text())
def test_json_holds_any_text(name: str, text: str) -> None:
    calls = [("get_weather", {"city": text})]
    assert split(name, *reply(name, calls))[1] == calls


@pytest.mark.parametrize("name", sorted(set(KNOWN) - NOT_RENDERED - {"MiniMax-M3"}))
def test_nested_arguments(name: str) -> None:
    """Values that the schema does not describe: objects, lists of texts, null. (M3 has no form for null and [].)"""
    arguments = {"city": "Rom", "more": {"a": [1, "x", {"b": 2.5}], "c": "d"}, "list": ["x", "y z"]}
    assert split(name, *reply(name, [("get_weather", arguments)]))[1] == [("get_weather", arguments)]


def test_elements_in_elements() -> None:
    arguments = {"city": "Rom", "more": {"a": {"b": 1}, "c": [{"d": "e f"}, {"d": "g"}]}, "list": [[1, 2], [3]]}
    assert split("MiniMax-M3", *reply("MiniMax-M3", [("get_weather", arguments)]))[1] == [("get_weather", arguments)]


#
# what models write otherwise
#

ROME = ("get_weather", {"city": "Rome"})


def read(format_: str, text: str) -> tuple[str, Calls]:
    found = next(entry for entry in FORMATS if entry.name == format_)
    splitter = CallSplitter(OfferedTools(found, SCHEMAS))
    parts = splitter.feed([Part("answer", text)]) + splitter.finish()
    return "".join(text for _, text in parts), [(call.name, json.loads(call.arguments)) for call in splitter.calls]


@pytest.mark.parametrize(
    ("format_", "text", "content", "calls"),
    [
        ("hermes", 'I look.\n\n<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}', "I look.", [ROME]),
        (
            "hermes",
            '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Rome\\"}"}</tool_call>',
            "",
            [ROME],
        ),
        ("hermes", '<tool_call>{"name": "stop"}</tool_call> Done.', "Done.", [("stop", {})]),
        (
            "hermes",
            '<tool_call>{"name": "stop", "arguments": {"reason": "a\nb"}}</tool_call>',
            "",
            [("stop", {"reason": "a\nb"})],
        ),
        ("mistral", '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome"}', "", [ROME]),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "a"}]', "", [ROME]),
        ("llama-3", '{"name": "get_weather", "parameters": {"city": "Rome"}}', "", [ROME]),
        (
            "llama-3",
            ' <|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Rome"}}',
            "",
            [ROME],
        ),
        (
            "llama-3",
            '{"name": "stop", "parameters": {}}; {"name": "get_weather", "parameters": {"city": "Rome"}}',
            "",
            [("stop", {}), ROME],
        ),
        (
            "lfm2",
            '<|tool_call_start|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|tool_call_end|>',
            "",
            [ROME],
        ),
        (
            "lfm2",
            '<|tool_call_start|>[get_weather(city="Rome", wind=true, hours=[])]<|tool_call_end|>',
            "",
            [("get_weather", {"city": "Rome", "wind": True, "hours": []})],
        ),
        ("qwen3-coder", "<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>", "", [ROME]),
        (
            "qwen3-coder",
            "<tool_call>\n<function=stop>\n<parameter=reason>\n12\n</parameter>\n</function>\n</tool_call>",
            "",
            [("stop", {"reason": "12"})],
        ),
        (
            "qwen3-coder",
            "<tool_call>\n<function=stop>\n<parameter=x>\n12\n</parameter>\n</function>\n</tool_call>",
            "",
            [("stop", {"x": 12})],
        ),
        ("glm", "<tool_call>stop</tool_call>", "", [("stop", {})]),
        (
            "minicpm5",
            '<function name="stop"><param name="reason"><![CDATA[a < b]]></param></function>',
            "",
            [("stop", {"reason": "a < b"})],
        ),
        (
            "harmony",
            '<|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>{"city": "Rome"}<|call|>',
            "",
            [ROME],
        ),
        (
            "kimi-k2",
            '<|tool_call_begin|>get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|tool_call_end|>',
            "",
            [ROME],
        ),
        (
            "gemma-4",
            '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,hours:[1, 2],wind:null}<tool_call|>',
            "",
            [("get_weather", {"city": "Rome", "hours": [1, 2], "wind": None})],
        ),
    ],
)
def test_other_forms(format_: str, text: str, content: str, calls: Calls) -> None:
    assert read(format_, text) == (content, calls)


@pytest.mark.parametrize(
    ("format_", "text"),
    [
        ("hermes", "no call at all"),
        ("hermes", 'cut off: <tool_call>{"name": "get_weather", "arguments": {"ci'),
        ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),  # no such tool
        ("hermes", "I would write <tool_call> and then JSON."),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": {"city": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 100_000),
        ("llama-3", '{"answer": 4}'),
        ("llama-3", '{"name": "Ann", "parameters": {}}'),
        ("llama-3", '{"name": "get_w'),
        ("llama-3", 'So: {"name": "get_weather", "parameters": {"city": "Rome"}}'),
        ("qwen3-coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRo"),
        ("glm", "<tool_call>get_weather\n<arg_key>city</arg_key>"),
        ("lfm2", "<|tool_call_start|>[get_weather('Rome')]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[get_weather(**{'city': 'Rome'})]<|tool_call_end|>"),
        ("lfm2", "<|tool_call_start|>[get_weather(city=open('x'))]<|tool_call_end|>"),
        ("gemma-4", '<|tool_call>call:get_weather{city:<|"|>Rome'),
        ("gemma-4", "<|tool_call>call:get_weather" + "{a:" * 50_000),
        ("minimax-m3", ']<]minimax[>[<tool_call>]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<a>'),
    ],
)
def test_what_is_no_call_stays_in_the_content(format_: str, text: str) -> None:
    assert read(format_, text) == (text, [])


def test_calls_before_a_cut_are_kept() -> None:
    text = '<tool_call>{"name": "stop"}</tool_call>\n<tool_call>{"name": "get_'
    assert read("hermes", text) == ('<tool_call>{"name": "get_', [("stop", {})])


PIECES = st.lists(
    st.sampled_from(
        [
            *(opening for format_ in FORMATS for opening in format_.openings),
            '{"name": "stop", "arguments": {}}',
            "</tool_call>",
            "<tool",
            "[TOOL",
            " ",
            "\n\n",
            "text",
        ]
    )
    | st.text(max_size=4),
    max_size=8,
).map("".join)


@given(st.sampled_from(FORMATS), PIECES, st.data())
def test_any_cut_gives_the_same(format_: Any, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    results = []
    for parts in ([text], pieces, list(text)):
        splitter = CallSplitter(OfferedTools(format_, SCHEMAS))
        found = [part for piece in parts for part in splitter.feed([Part("answer", piece)])] + splitter.finish()
        assert all(text for _, text in found)
        results.append(("".join(text for _, text in found), splitter.calls))
    assert results[0] == results[1] == results[2]
    if not results[0][1]:
        assert results[0][0] == text, "nothing is lost"


def test_content_streams_until_a_call_may_begin() -> None:
    splitter = CallSplitter(OfferedTools(next(f for f in FORMATS if f.name == "hermes"), SCHEMAS))
    assert splitter.feed([Part("answer", "Let me ")]) == [("answer", "Let me")]
    assert splitter.feed([Part("answer", "look <to")]) == [("answer", " look")]
    assert splitter.feed([Part("answer", "day> ")]) == [("answer", " <today>")]
    assert splitter.feed([Part("reasoning", "<tool_call>")]) == [("reasoning", "<tool_call>")]
    assert splitter.feed([Part("answer", '<tool_call>{"name": "stop"}')]) == []
    assert splitter.finish() == []
    assert splitter.calls == [("stop", "{}")]
