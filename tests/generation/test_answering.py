"""Answers to many prompts under one steering or two, and the accumulator of a reply."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import BiasFile, Message
from steermoe_local.generation.answering import answers
from steermoe_local.generation.engine import FinishEvent, Request, Sampling, TokenEvent
from steermoe_local.generation.reply import Reply
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.llama.rendering import RenderedPrompt, Renderer
from tests.support.generation import GREEDY
from tests.support.low_level import identity_of


class FakeEngine:
    """An engine whose answer is the prompt's tokens as letters, some of them a step."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.asked: list[Request] = []
        self.closed = False

    def generate(self, *requests: Request) -> Iterator[tuple[int, TokenEvent | FinishEvent]]:
        self.asked += requests
        rests = {index: list(request.tokens) for index, request in enumerate(requests)}
        try:
            while rests:
                index = self.random.choice(list(rests))
                if rests[index]:
                    token = rests[index].pop(0)
                    yield index, TokenEvent(chr(token), token)
                else:
                    del rests[index]
                    n, seed = len(requests[index].tokens), requests[index].sampling.seed or 0
                    yield index, FinishEvent("stop", n, 0, n, 0.1, 0.2, seed, None, n_rows=n + 1)
        finally:
            self.closed = True


TEXTS = st.text(st.characters(categories=["L"]), min_size=1, max_size=8)
STYLE = reasoning_style("<think></think>")


def prompt_of(text: str, style: Any = None) -> RenderedPrompt:
    return RenderedPrompt(text, [ord(letter) for letter in text], style=style)


@given(st.lists(TEXTS, max_size=9), st.integers(0, 99), st.booleans())
def test_answers_find_their_prompts(texts: list[str], seed: int, compare: bool) -> None:
    engine: Any = FakeEngine(seed)
    bias: Any = object()
    sides: dict[str, Any] = {"unsteered": None, "steered": bias} if compare else {"steered": bias}
    parts: dict[tuple[int, str], str] = {}
    whole: dict[tuple[int, str], str] = {}
    for index, side, what in answers(engine, [prompt_of(text) for text in texts], sides, sampling=Sampling()):
        if isinstance(what, Reply):
            whole[index, side] = what.text
        else:
            parts[index, side] = parts.get((index, side), "") + what.text
    assert whole == parts == {(index, side): text for index, text in enumerate(texts) for side in sides}
    assert [request.bias for request in engine.asked] == list(sides.values()) * len(texts)
    if compare:
        for text in texts:  # both sides of a prompt are drawn with one seed
            seeds = [r.sampling.seed for r in engine.asked if r.tokens == [ord(letter) for letter in text]]
            assert len(set(seeds)) == texts.count(text)
    assert engine.closed


def test_closing_stops_what_is_running() -> None:
    engine: Any = FakeEngine(0)
    events = answers(engine, [prompt_of("ab")] * 3, {"steered": None})
    next(events)
    events.close()  # type: ignore[attr-defined]
    assert engine.closed


def test_an_empty_bias_is_none(open_engine: Any, tiny_path: Any) -> None:
    empty = BiasFile(identity_of(tiny_path), "hard", {})
    with open_engine(n_slots=2) as engine:
        prompt = engine.renderer.render((Message("user", "Add 4 and 6."),))
        events = answers(engine, [prompt], {"none": None, "empty": empty}, sampling=GREEDY)
        one, two = (what for _, _, what in events if isinstance(what, Reply))
        assert one.text == two.text
        assert [slot.bias for slot in engine._slots] == [None, None]


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "b", "\n"]), max_size=8).map("".join))
def test_reasoning_and_answer_are_what_the_parts_said(text: str) -> None:
    engine: Any = FakeEngine(1)
    parts = {"reasoning": "", "answer": ""}
    for _, _, what in answers(engine, [prompt_of(text, STYLE)], {"steered": None}):
        if isinstance(what, Reply):
            assert (what.reasoning, what.text) == (parts["reasoning"], parts["answer"])
            assert what.raw == text
        else:
            parts[what.kind] += what.text
    if text.startswith("<think>a</think>b"):
        assert (parts["reasoning"], parts["answer"][:1]) == ("a", "b")


def test_the_template_writes_the_beginning_of_text_itself() -> None:
    """A tokenizer that adds it as well would give two; to a text without template it has to add it."""
    seen: list[tuple[str, bool]] = []

    class Fake(Renderer):
        def __init__(self) -> None:
            self._metadata = {}

        def chat_text(self, messages: Any, **_: Any) -> str:
            return f"<s>{messages[0]['content']}"

        def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
            seen.append((text, add_special))
            return [1]

    renderer = Fake()
    assert not renderer.render((Message("user", "x"),)).add_special
    assert renderer.render("x").add_special
    assert seen == [("<s>x", False), ("x", True)]


def test_rates_leave_out_what_was_not_computed() -> None:
    def timings(**values: Any) -> dict[str, Any]:
        fields = {"n_prompt": 10, "n_cached": 4, "n_generated": 5, "prompt_seconds": 2.0, "seconds": 3.0, "n_rows": 6}
        return Reply(finish=FinishEvent(reason="stop", seed=1, stop=None, **(fields | values))).timings()

    assert timings()["prompt_per_second"] == 3
    assert timings()["generation_per_second"] == pytest.approx(5 / 3, abs=0.01)
    assert timings(n_rows=1, seconds=0.0)["generation_per_second"] is None
    assert timings(prompt_seconds=0.0)["prompt_per_second"] is None
