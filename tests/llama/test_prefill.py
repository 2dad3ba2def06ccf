"""Prompts that end inside the assistant's message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steermoe_local import Message, UsageError
from steermoe_local.llama.prefill import continued
from steermoe_local.llama.reasoning import split_reasoning
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.llama.rendering import Renderer, vocabulary
from tests.support.gguf_copy import copy_model
from tests.support.running_server import TINY

THINK = "<think></think>"
HARMONY = "<|start|><|channel|><|message|>"
COHERE = "<|START_THINKING|><|END_THINKING|><|START_RESPONSE|><|END_RESPONSE|>"


@pytest.mark.parametrize(
    ("template", "header", "reasoning", "content", "wanted"),
    [
        ("", "A:", "", "one, ", "A:one, "),
        ("", "A:", "dropped", "one", "A:one"),
        # a model that opens its reasoning by itself
        (THINK, "A:", "", "one", "A:one"),
        (THINK, "A:", "so", "one", "A:<think>\nso\n</think>\n\none"),
        (THINK, "A:", "so", "", "A:<think>\nso"),
        # a template that opens it
        (THINK, "A:<think>\n", "", "one", "A:<think>\n\n</think>\n\none"),
        (THINK, "A:<think>\n", "so", "one", "A:<think>\nso\n</think>\n\none"),
        (THINK, "A:<think>\n", "so", "", "A:<think>\nso"),
        # a template that turned it off by an empty block
        (THINK, "A:<think>\n\n</think>\n\n", "", "one", "A:<think>\n\n</think>\n\none"),
        (THINK, "A:<think>\n\n</think>\n\n", "so", "one", "A:<think>\nso\n</think>\n\none"),
        ("[THINK][/THINK]", "A:", "so", "one", "A:[THINK]so[/THINK]one"),
        (HARMONY, "<|start|>assistant", "", "one", "<|start|>assistant<|channel|>final<|message|>one"),
        (HARMONY, "<|start|>assistant", "so", "", "<|start|>assistant<|channel|>analysis<|message|>so"),
        (
            HARMONY,
            "<|start|>assistant",
            "so",
            "one",
            "<|start|>assistant<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>one",
        ),
        (COHERE, "A:", "", "one", "A:<|START_RESPONSE|>one"),
        (
            COHERE,
            "A:<|START_THINKING|>",
            "so",
            "one",
            "A:<|START_THINKING|>so<|END_THINKING|><|START_RESPONSE|>one",
        ),
    ],
)
def test_texts(template: str, header: str, reasoning: str, content: str, wanted: str) -> None:
    text, prefix = continued(header, reasoning_style(template, header), reasoning, content)
    assert text == wanted
    # what the model says next is split as the rest of this message
    style = reasoning_style(template, text)
    if style is not None and prefix is not None:
        style = type(style)(style.tags, prefix)
    expected = ("", " two") if content else (" two", "")
    assert split_reasoning(" two", style) == expected


def test_reasoning_alone() -> None:
    with pytest.raises(UsageError, match="reasoning"):
        continued("A:", None, "so", "")
    assert continued("A:", reasoning_style(THINK, "A:"), "so", "", in_answer=True)[0] == "A:<think>\nso\n</think>\n\n"
    assert continued("A:", None, "", "")[0] == "A:"


def test_a_conversation_that_ends_with_the_assistants_turn(tmp_path: Path, tiny_model: Any) -> None:
    """It is continued by `Renderer.render`: no end of turn behind it, and no second header."""
    renderer = Renderer(tiny_model)
    asked = renderer.render((Message("user", "Count to three."),))
    begun = renderer.render((Message("user", "Count to three."), Message("assistant", "one, two")))
    assert begun.text == asked.text + "one, two"
    copy_model(TINY, tmp_path / "thinks.gguf", template="{% for m in messages %}{{ m.content }}|{% endfor %}<think>")
    with vocabulary(tmp_path / "thinks.gguf") as model:
        thinks = Renderer(model).render((Message("user", "a"), Message("assistant", "b")))
        assert thinks.text == "a|<think>\n\n</think>\n\nb"
        assert thinks.style is not None
        assert not thinks.style.prefix
