"""Prompts of the embedded model: template, tokens, the places of a target's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steermoe_local import Message, Pair, PairsError, record_counts
from steermoe_local.llama.rendering import Renderer
from steermoe_local.llama.tokenizing import token_bytes


@pytest.fixture(scope="module")
def renderer(tiny_model: Any) -> Renderer:
    return Renderer(tiny_model)


def chat(*contents: str) -> tuple[Message, ...]:
    return tuple(Message(("user", "assistant")[i % 2], content) for i, content in enumerate(contents))


def control_name(renderer: Renderer) -> tuple[str, str]:
    """A control token of the template with a word in it, and the word."""
    rendered = renderer.text(chat("x", "y"))
    for name in renderer._special.control:
        word = name.strip("<|>/ ")
        if name in rendered and word.isalpha():
            return name, word
    raise AssertionError("the embedded model's template has no control token")


def text_of(renderer: Renderer, tokens: list[int]) -> str:
    return b"".join(token_bytes(renderer._model.vocab, token, special=True) for token in tokens).decode()


def test_a_target_is_cut_behind_its_last_token(renderer: Renderer) -> None:
    side = chat("Count to three.", "one, two, three", "thanks")
    prompt = renderer.prompt(side, "one, two, three")
    assert text_of(renderer, [prompt.tokens[i] for i in prompt.target]).strip() == "one, two, three"
    assert prompt.target[-1] == len(prompt.tokens) - 1
    assert prompt.target == list(range(prompt.target[0], len(prompt.tokens)))
    full = renderer.tokenize(renderer.text(side), add_special=False)
    assert full[: len(prompt.tokens)] == prompt.tokens


def test_a_word_of_a_control_token_is_not_the_target(renderer: Renderer) -> None:
    name, word = control_name(renderer)
    side = chat("say it", f"the {word} of it")
    rendered = renderer.text(side)
    assert rendered.rfind(word) > rendered.rfind(f"the {word}") + 4, "the template's own token comes last"
    prompt = renderer.prompt(side, word)
    assert text_of(renderer, [prompt.tokens[i] for i in prompt.target]).strip() == word
    assert text_of(renderer, prompt.tokens).endswith(f"the {word}")
    # a stripped reply whose only other match is the control token
    prompt = renderer.prompt(chat("say it", f" {word} "), word)
    assert name not in text_of(renderer, [prompt.tokens[i] for i in prompt.target])


def test_a_control_token_can_be_the_target_of_a_text(renderer: Renderer) -> None:
    name, _ = control_name(renderer)
    prompt = renderer.prompt(f"one, two{name}", name)
    assert [text_of(renderer, [prompt.tokens[i]]) for i in prompt.target] == [name]


def test_control_tokens_are_one_token(renderer: Renderer) -> None:
    name, word = control_name(renderer)
    assert len(renderer.tokenize(name, add_special=False)) == 1
    assert word not in renderer._special.control


def test_text_and_chat(renderer: Renderer) -> None:
    text = "one, two, three"
    assert renderer.text(text) == text
    assert text in renderer.text(chat("count", text))
    prompt = renderer.prompt(text, text)
    assert text_of(renderer, [prompt.tokens[i] for i in prompt.target]).strip() == text


def test_a_target_that_the_template_drops(renderer: Renderer) -> None:
    with pytest.raises(PairsError, match="'zzz'"):
        renderer.prompt(chat("a", "b"), "zzz")


def test_a_template_that_refuses(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ raise_exception('no such role') }}"
    monkeypatch.setattr(tiny_model, "metadata", lambda: {"tokenizer.chat_template": template})
    renderer = Renderer(tiny_model)
    with pytest.raises(PairsError, match=r"refuses .*no such"):
        renderer.text(chat("a", "b"))
    monkeypatch.setattr(tiny_model, "metadata", dict)
    renderer = Renderer(tiny_model)
    with pytest.raises(PairsError, match="no chat template"):
        renderer.text(chat("a", "b"))


def test_the_error_names_the_pair(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PairsError("no")

    monkeypatch.setattr(Renderer, "prompt", refuse)
    with pytest.raises(PairsError, match="pair 'first', positive: "):
        record_counts(tiny_path, [Pair("first", "a", "b", "a", "b")])


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}", "[system]be brief"),
        # the word is in the template, the message is not in what it renders
        (
            "{% for m in messages if m.role != 'developer' %}[{{ m.role }}]{{ m.content }}{% endfor %}",
            "[system]be brief",
        ),
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{# developer #}", "[developer]be brief"),
    ],
)
def test_the_role_of_developers(tiny_model: Any, monkeypatch: pytest.MonkeyPatch, template: str, kept: str) -> None:
    monkeypatch.setattr(tiny_model, "metadata", lambda: {"tokenizer.chat_template": template})
    renderer = Renderer(tiny_model)
    messages = (Message("developer", "be brief"), Message("user", "hi"))
    assert renderer.text(messages) == renderer.chat_text([m.to_dict() for m in messages]) == kept + "[user]hi"
    assert not renderer.located((*messages, Message("assistant", "a")), "a").losses
