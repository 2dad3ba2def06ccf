"""Where texts of messages are in a rendering, and what templates leave out."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import PairsError
from steermoe_local.llama.locating import (
    Loss,
    Render,
    find_in_text,
    find_losses,
    place_target,
    with_known_roles,
)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
ENDS = CHATML + "<|im_start|>assistant\n"
# In the manner of DeepSeek-R1: what was thought is left out.
NO_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}{% endfor %}"
)
# In the manner of Mistral-Nemo: the system message stands in front of the last message, if that is the user's.
LAST_USER = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
    "{% if m.role == 'user' %}[INST]{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# In the manner of Phi-3-medium: no word of systems.
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>\n{{ m.content }}<|end|>\n<|assistant|>\n"
    "{% elif m.role == 'assistant' %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
)
# In the manner of Qwen3: a user's message that is all of it a tool's response is no question.
TOOL_RESPONSE = (
    "{% set marks = ('<tool_response>', '</tool_response>') %}{% for m in messages %}"
    "<|{{ 'tool' if m.content.startswith(marks[0]) and m.content.endswith(marks[1]) else m.role }}|>{{ m.content }}"
    "{% endfor %}"
)
NO_LAST_REPLY = (
    "{% for m in messages %}{% if not (loop.last and m.role == 'assistant') %}{{ m.role }}: {{ m.content }}\n"
    "{% endif %}{% endfor %}"
)
TWICE = "{{ messages[0].content }} {% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
AS_JSON = "{% for m in messages %}{{ m | escaped }}\n{% endfor %}"
PARTS = "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %}\n{% endfor %}"


def renders(template: str) -> Render:
    environment = jinja2.Environment(trim_blocks=True)
    environment.filters["escaped"] = json.dumps
    compiled = environment.from_string(template)
    return lambda messages: str(compiled.render(messages=messages))


def chat(*contents: str, system: str = "") -> list[dict[str, Any]]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if system else messages


def losses(template: str, messages: list[dict[str, Any]]) -> list[tuple[int, bool]]:
    render = renders(template)
    return [(loss.index, loss.whole) for loss in find_losses(render, messages, render(messages))]


@pytest.mark.parametrize(
    ("template", "contents", "target", "before"),
    [
        (ENDS, ("say a", "a"), "a", "<|im_start|>assistant\n"),
        (ENDS, ("say im", "im"), "im", "<|im_start|>assistant\n"),
        (ENDS, ("which?", " user "), "user", "<|im_start|>assistant\n"),
        (ENDS, ("say user or assistant", "no"), "assistant", "say user or "),
        (ENDS, ("which?", "end", "and now?", "s"), "end", "<|im_start|>assistant\n"),
        (ENDS, ("is it s?", "s"), "s", "<|im_start|>assistant\n"),
        (ENDS, ("zähle", "ä 1 ä 1"), "ä 1", "<|im_start|>assistant\nä 1 "),
        (ENDS, ("call my assistant",), "assistant", "call my "),
        (NO_THOUGHTS, ("q", "<think>7</think>so 7"), "7", "<|assistant|>so "),
        (TOOL_RESPONSE, ("<tool_response>x</tool_response>",), "<tool_response>x</tool_response>", "<|tool|>"),
        (TOOL_RESPONSE, ("<tool_response>x</tool_response>",), "x", "<|tool|><tool_response>"),
        (TWICE, ("one", "two"), "one", "one [user]"),
        (AS_JSON, ("q", "it's a"), "a", '{"role": "assistant", "content": "it\'s '),
        ("{{ messages[-1].content | replace('x', 'y') }}", ("q", "a Zqx"), "a", ""),
    ],
)
def test_a_target_is_found_in_its_own_message(
    template: str, contents: tuple[str, ...], target: str, before: str
) -> None:
    messages, render = chat(*contents), renders(template)
    placed = place_target(render, messages, target)
    data = placed.text.encode()
    assert placed.text == render(messages)
    assert data[placed.start : placed.end].decode() == target
    assert data[: placed.start].decode().endswith(before)


@given(st.data())
def test_the_target_is_where_another_text_would_be(data: Any) -> None:
    """A word that is in no text, in the target's place, is at the same place of the rendering."""
    words = st.text("aim sur|<>", min_size=1, max_size=6)
    contents = [f"x{data.draw(words)}x" for _ in range(data.draw(st.integers(1, 4)))]
    carrier = contents[-1]
    start = data.draw(st.integers(0, len(carrier) - 1))
    target = carrier[start : data.draw(st.integers(start + 1, len(carrier)))]
    before, behind = carrier.rsplit(target, 1)
    render = renders(ENDS)
    other = render(chat(*contents[:-1], f"{before}QQ{behind}"))
    placed = place_target(render, chat(*contents), target)
    assert placed.start == len(other[: other.index("QQ")].encode())
    assert placed.text[: placed.start] + "QQ" + placed.text[placed.end :] == other
    assert not placed.losses


@pytest.mark.parametrize(
    ("template", "contents", "target"),
    [
        (NO_THOUGHTS, ("say lute", "<think>a lute</think>ok"), "lute"),
        (NO_THOUGHTS, ("q", "<think>a</think>ok"), "</think>ok"),
        (NO_LAST_REPLY, ("say two", "two"), "two"),
        (CHATML, ("q", " 7 "), " 7 "),
        (CHATML + " ", ("q", "7 "), "7 "),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", ("q", "seven"), "seven"),
        (PARTS, ("q", "seven"), "seven"),
    ],
)
def test_a_target_that_the_template_leaves_out(template: str, contents: tuple[str, ...], target: str) -> None:
    with pytest.raises(PairsError, match=r"template .* message 2 \(assistant\)"):
        place_target(renders(template), chat(*contents), target)


def test_special_tokens_hold_no_target() -> None:
    special = ["<|im_end|>", "<|im_start|>"]
    messages = chat("the end", "is <|im_end|> it")
    placed = place_target(renders(ENDS), messages, "end", special)
    assert placed.text[: placed.start].endswith("user\nthe ")
    placed = place_target(renders(ENDS), messages, "<|im_end|>", special)
    assert placed.text[: placed.start].endswith("is ")
    with pytest.raises(PairsError, match="special token"):
        place_target(renders(ENDS), chat("a", "<|im_end|>"), "end", special)


def test_plain_texts() -> None:
    assert find_in_text("1 2 1 2", "1 2") == (4, 7)
    assert find_in_text("ä ä", "ä") == (3, 5)
    assert find_in_text("end<|im_end|>", "end", ["<|im_end|>"]) == (0, 3)
    assert find_in_text("end<|im_end|>", "<|im_end|>", ["<|im_end|>"]) == (3, 13)
    with pytest.raises(PairsError, match="'im'"):
        find_in_text("<|im_end|>", "im", ["<|im_end|>"])


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (CHATML, chat("a", " b ", system="s"), []),
        (LAST_USER, chat("q", "r", system="be brief"), [(0, True)]),
        (LAST_USER, chat("q", "r", "q", system="be brief"), []),
        (NO_SYSTEM, chat("q", "r", system="user"), [(0, True)]),
        (NO_SYSTEM, chat("q", "r"), []),
        (NO_THOUGHTS, chat("q", "<think>7</think>ok"), [(1, False)]),
        (NO_THOUGHTS, chat("q", "<think>7</think>"), [(1, True)]),
        (NO_LAST_REPLY, chat("q", "r"), [(1, True)]),
        (NO_LAST_REPLY, chat("r", "r"), [(1, True)]),
        (CHATML, chat("a\n\nb", ""), []),
        # set in another way, nothing lost
        ("{% for m in messages %}{{ m.content.split() | join(' ') }}|{% endfor %}", chat("a\n\nb", " c"), []),
        ("{% for m in messages %}{{ m.content.split(' ')[0] }}{% endfor %}", chat("along one", "b"), [(0, False)]),
        (PARTS, [{"role": "user", "content": [{"type": "text", "text": "a b"}]}], []),
        (CHATML.replace(" | trim", ""), [{"role": "tool", "content": None}], []),
    ],
)
def test_texts_that_the_template_leaves_out(
    template: str, messages: list[dict[str, Any]], lost: list[tuple[int, bool]]
) -> None:
    assert losses(template, messages) == lost


def test_a_loss_names_the_message() -> None:
    placed = place_target(renders(NO_SYSTEM), chat("q", "r", system="be brief"), "r")
    assert placed.losses == (Loss(0, "system", True),)
    assert "message 1 (system)" in str(placed.losses[0])


def refusing(*roles: str) -> str:
    return f"{{% for m in messages %}}{{% if m.role in {list(roles)} %}}{{{{ m.content }}}}|{{% endif %}}{{% endfor %}}"


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        (CHATML, False),  # knows no developers
        (refusing("developer", "user"), True),
        (refusing("system", "user") + "{# developer #}", False),
        ("{% if messages[0].role == 'developer' %}{{ 1 / 0 }}{% endif %}" + CHATML, False),
    ],
)
def test_developers(template: str, kept: bool) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *chat("q")]
    roles = [message["role"] for message in with_known_roles(renders(template), messages, template)]
    assert roles == ["developer" if kept else "system", "user"]
    assert messages[0]["role"] == "developer", "unchanged"


def test_the_template_may_fail_on_marks() -> None:
    def render(messages: list[dict[str, Any]]) -> str:
        if not all(message["content"].isascii() for message in messages):
            raise ValueError("ASCII alone")
        return "".join(f"<{message['content']}>" for message in messages)

    strict: Callable[[list[dict[str, Any]]], str] = render
    assert place_target(strict, chat("a", "b a"), "a").start == 6

    def only(messages: list[dict[str, Any]]) -> str:
        if [message["content"] for message in messages] != ["a", "b"]:
            raise ValueError
        return "ab"

    with pytest.raises(PairsError):
        place_target(only, chat("a", "b"), "b")
