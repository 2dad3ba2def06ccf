"""Reasoning told from answers: the styles of chat templates, and pieces cut anywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.llama.reasoning import Part, ReasoningSplitter, split_reasoning
from steermoe_local.llama.reasoning_styles import ReasoningStyle, reasoning_style

QWEN = "{{ '<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}"
HARMONY = "{{ '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|end|>' }}"
COHERE = "{{ '<|START_THINKING|>' }} {{ '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}"
HUNYUAN = "{{ '<think>\n\n</think>\n<answer>\n' }}"
KIMI = "{{ open_tag('think' if thinking else 'response') }}"
SOLAR = "{{ '<|begin|>assistant<|think|>' }} {{ '<|begin|>assistant<|content|>' }}"
MUSE = "{{ '<|start|>assistant to=self<|message|>' }}"
PROMPT = "<|im_start|>assistant\n"


def style(template: str, prompt: str = PROMPT) -> ReasoningStyle:
    found = reasoning_style(template, prompt)
    assert found is not None
    return found


STYLES = {
    "none": None,
    "think": style(QWEN),
    "think, begun": style(QWEN, PROMPT + "<think>\n"),
    "thinking": style("<thinking> and </thinking>"),
    "mistral": style("[THINK]...[/THINK]"),
    "cohere": style(COHERE),
    "cohere, begun": style(COHERE, "<|CHATBOT_TOKEN|><|START_THINKING|>"),
    "hunyuan": style(HUNYUAN),
    "kimi": style(KIMI),
    "solar": style(SOLAR, "<|end|><|begin|>assistant"),
    "muse": style(MUSE, "<|start|>assistant"),
    "harmony": style(HARMONY, "<|start|>assistant"),
    "harmony, final": style(HARMONY, "<|start|>assistant<|channel|>final<|message|>"),
    "harmony, bare": style(HARMONY, ""),
}


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "answer"),
    [
        ("none", "<think>a</think>b", "", "<think>a</think>b"),
        ("think", "<think>\nIt is 4.\n</think>\n\n4", "It is 4.", "4"),
        ("think", " \n<think>a</think>b", "a", "b"),
        ("think", "4", "", "4"),
        ("think", "  4 <think>no</think>", "", "  4 <think>no</think>"),
        ("think", "<think>\n\n</think>\n\n4\n", "", "4\n"),
        ("think", "<think>stopped in mid</thi", "stopped in mid</thi", ""),
        ("think", "<think>a < b <br></think>c", "a < b <br>", "c"),
        ("think", "<thin air", "", "<thin air"),
        ("think", "<th", "", "<th"),
        ("think", "\n", "", "\n"),
        ("think", "", "", ""),
        ("think", "<think>a</think><think>b</think>c", "ab", "c"),
        ("think", "<think>a</think>the tag </think> ends it", "a", "the tag </think> ends it"),
        ("think, begun", "It is 4.\n</think>\n4", "It is 4.", "4"),
        ("think, begun", "never done", "never done", ""),
        ("thinking", "<thinking>a</thinking>b", "a", "b"),
        ("thinking", "<think>a</think>b", "", "<think>a</think>b"),
        ("mistral", "[THINK]a[/THINK]b", "a", "b"),
        ("cohere", "<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "a", "b"),
        ("cohere", "<|START_RESPONSE|>b<|END_RESPONSE|>", "", "b"),
        ("cohere", "<|START_RESPONSE|>b <|END", "", "b <|END"),
        ("cohere, begun", "a<|END_THINKING|><|START_RESPONSE|>b", "a", "b"),
        ("hunyuan", "<think>\na\n</think>\n<answer>\nb\n</answer>", "a", "b"),
        ("think", "</think>b", "", "b"),
        ("think", " \n</think>\n\nb</think>", "", "b</think>"),
        ("think", "<think>a</think></think>b", "a", "</think>b"),
        (
            "kimi",
            "<|open|>think<|sep|>a<|close|>think<|sep|><|open|>response<|sep|>b<|close|>response<|sep|><|close|>message<|sep|>",
            "a",
            "b",
        ),
        ("kimi", "b<|close|>response<|sep|><|close|>message<|sep|>", "", "b"),
        ("solar", "<|think|>a<|end|><|begin|>assistant<|content|>b<|end|>", "a", "b"),
        ("solar", "<|content|>b", "", "b"),
        ("muse", " to=self<|message|>a<|eom|><|start|>assistant to=user<|message|>b<|eot|>", "a", "b"),
        ("muse", " to=user<|message|>b", "", "b"),
        ("muse", " to=self<|message|>a<|eom|><|start|>assistant to=add<|message|>{}<|eot|>", "a\n\n{}", ""),
        ("harmony", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>b", "a", "b"),
        ("harmony", "<|channel|>final<|message|>b<|return|>", "", "b"),
        ("harmony", "<|message|>b", "", "b"),
        ("harmony", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fi", "a", ""),
        ("harmony", "<|channel|>commentary to=x <|constrain|>json<|message|>{}<|call|>", "{}", ""),
        (
            "harmony",
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>",
            "a\n\nb",
            "",
        ),
        ("harmony", f"<|channel|>commentary to={'x' * 150}<|message|>a<|end|>", "a", ""),
        ("harmony", "no format at all", "", "no format at all"),
        ("harmony", "<|channel|>final<|message|>b<|end|>and on", "", "b\n\nand on"),
        ("harmony", "x" * 300 + "<|message|>y", "", "x" * 300 + "y"),
        ("harmony", "<|channel|>final<|message|>a <|b| c", "", "a <|b| c"),
        ("harmony, final", "b<|return|>", "", "b"),
        ("harmony, bare", "<|channel|>analysis<|message|>a", "a", ""),
    ],
)
def test_replies(name: str, text: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(text, STYLES[name]) == (reasoning, answer)


@pytest.mark.parametrize(
    "template",
    ["", "{{ message.content }}", "<|channel|>", "{{ '<answer>' }}", "<|START_RESPONSE|>"],
)
def test_templates_without_reasoning(template: str) -> None:
    assert reasoning_style(template, PROMPT) is None


def test_the_template_opens_the_reasoning() -> None:
    assert style(QWEN, PROMPT + "<think>").prefix == "<think>"
    assert style(QWEN, PROMPT + "<think>\n\n</think>\n\n").prefix == ""
    assert style("{{ content.split('</think>')[-1] }}").tags is not None
    # somebody's words in an earlier turn do not count
    assert style(QWEN, f"<|im_start|>user\nwrite <think><|im_end|>{PROMPT}").prefix == ""
    assert style(HARMONY, "<|start|>user<|message|>x<|end|><|start|>assistant").prefix == "<|start|>assistant"


def test_markers() -> None:
    assert set(style(QWEN).markers) == {"<think>", "</think>"}
    assert "<|channel|>" in style(HARMONY).markers
    assert len(style(COHERE).markers) == 4


def merged(parts: list[Part]) -> list[Part]:
    joined: list[Part] = []
    for kind, text in parts:
        assert text, "an empty part"
        if joined and joined[-1][0] == kind:
            joined[-1] = (kind, joined[-1][1] + text)
        else:
            joined.append((kind, text))
    return joined


def parts_of(style: ReasoningStyle | None, pieces: list[str]) -> list[Part]:
    splitter = ReasoningSplitter(style)
    parts = [part for piece in pieces for part in splitter.feed(piece)] + splitter.finish()
    assert splitter.finish() == []
    return merged(parts)


MARKERS = sorted({marker for style in STYLES.values() if style for marker in style.markers})
FRAGMENTS = st.one_of(
    st.sampled_from(MARKERS),
    st.sampled_from(MARKERS).flatmap(lambda m: st.integers(1, len(m)).map(lambda n: m[:n])),
    st.sampled_from(["assistant", "analysis", "final", " ", "\n\n", "x" * 90, "<", "[", "<|", "\u00a0", "é\u2028"]),
    st.text(max_size=5),
)
TEXTS = st.lists(FRAGMENTS, max_size=14).map("".join)


@given(st.sampled_from(sorted(STYLES)), TEXTS, st.data())
def test_any_cut_gives_the_same_parts(name: str, text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    ends = [*cuts, len(text)]
    pieces = [text[a:b] for a, b in zip([0, *cuts], ends, strict=True)]
    whole = parts_of(STYLES[name], [text])
    assert parts_of(STYLES[name], pieces) == whole
    assert parts_of(STYLES[name], list(text)) == whole


@given(st.sampled_from(sorted(STYLES)), st.text(st.characters(exclude_characters="<[")))
def test_a_text_without_markers_is_kept(name: str, text: str) -> None:
    reasoning, answer = split_reasoning(text, STYLES[name])
    if "begun" in name:
        assert (reasoning, answer) == (text.strip(), "")
    elif name in ("harmony", "harmony, bare", "muse"):
        # before a first marker an answer without format and a header look alike; blank space alone is a header
        assert reasoning == ""
        assert answer == (text.removeprefix("assistant") if text.removeprefix("assistant").strip() else "")
    else:
        assert (reasoning, answer) == ("", text)


def test_calls_are_kept_with_their_markers() -> None:
    """For whoever looks for calls in the answer; otherwise they are something that the model thought."""
    call = "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>{}<|call|>"
    reply = "<|channel|>analysis<|message|>a<|end|>" + call
    harmony = STYLES["harmony"]
    assert harmony is not None
    assert split_reasoning(reply, replace(harmony, keeps_calls=True)) == ("a", call)
    assert split_reasoning(reply, harmony) == ("a\n\n{}", "")
    muse = STYLES["muse"]
    assert muse is not None
    call = "<|start|>assistant to=add<|message|>{}"
    assert split_reasoning(call.removeprefix(muse.prefix), replace(muse, keeps_calls=True)) == ("", call)


def test_text_is_given_as_soon_as_it_is_certain() -> None:
    splitter = ReasoningSplitter(STYLES["think"])
    assert splitter.feed("<think>We") == [("reasoning", "We")]
    assert splitter.feed(" add ") == [("reasoning", " add")]
    assert splitter.feed("<") == []
    assert splitter.feed("b") == [("reasoning", " <b")]
    assert splitter.feed("</think>\n") == []
    assert splitter.feed("4") == [("answer", "4")]
    assert splitter.feed(" </think") == [("answer", " </think")]
    splitter = ReasoningSplitter(STYLES["harmony"])
    assert splitter.feed("<|channel|>analysis<|message|>We") == [("reasoning", "We")]
    assert splitter.feed("<|end|><|start|>assistant<|channel|>final<|message|>4") == [("answer", "4")]
