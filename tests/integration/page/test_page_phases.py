"""Phases, plans and tokens on the page against the real server and the embedded model."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import browser as browsers
from tests.support.gguf_copy import copy_model
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import COUNT, QUESTION, registered, table
from tests.support.running_server import TINY, running
from tests.support.templated import TURNS

pytestmark = browsers.marks()


def asked(tab: Desk, **fields: Any) -> Any:
    """What the server answers to the page's last question, not as a stream."""
    other = ("stream", "stream_options", "routed_experts_start_len")
    body = {key: value for key, value in tab.watch.sent[-1].items() if key not in other}
    response = tab.server.client.post("/v1/chat/completions", json=body | fields)
    assert response.status_code == 200, response.text
    return response.json()


def marks(tab: Desk) -> list[str]:
    return list(tab.page.locator(".answer").last.locator(".text mark.steered").all_inner_texts())


@pytest.mark.parametrize(("phase", "start", "stop"), [("answer", "", ""), ("answer", "2", "6"), ("prompt", "", "")])
def test_a_phase_is_applied_and_marked(tab: Desk, phase: str, start: str, stop: str) -> None:
    tab.steer("digits-words", reverse=True)
    tab.place(phase, start, stop)
    (text,) = tab.send(COUNT)
    body = asked(tab)
    choice = body["choices"][0]
    assert text == choice["message"]["content"]
    spans = [choice["message"]["content"][span["start"] : span["end"]] for span in choice["steered"]]
    assert marks(tab) == spans
    assert bool(spans) == (phase == "answer")
    assert (spans == [text]) == (phase == "answer" and not start), "a window is a part of it"
    assert tab.answers()[0]["title"] == "Steered: digits-words \u2192 words"
    meta = tab.answers()[0]["meta"]
    assert meta[0] == body["steering"]["rules"][0]
    assert meta[1].startswith(f"{body['steering']['n_steered']} of ")


def test_a_registered_plan(tab: Desk) -> None:
    rules = ["answer[0:4]: none", "answer: digits-words +6 -6 reverse"]
    with registered(tab.server, {"name": "later", "rules": rules}):
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        tab.page.select_option("#steering", "later")
        listed = tab.server.client.get("/v1/steering/later").json()
        assert tab.page.locator("#plan-rules li").all_inner_texts() == listed["rules"]
        (text,) = tab.send(COUNT)
        assert tab.watch.sent[-1]["steering"] == "later"
        choice = asked(tab)["choices"][0]
        assert marks(tab) == [text[span["start"] : span["end"]] for span in choice["steered"]] != []
        assert tab.answers()[0]["title"].startswith("Steered: later")
        tab.page.get_by_role("button", name="Tokens").click()
        tab.page.locator("#tokens").wait_for()
        rules_of = asked(tab, return_tokens=True)["choices"][0]["token_rules"]
        steered = "(all) => all.map((one) => one.classList.contains('steered'))"
        assert tab.page.locator("#tokens .token").evaluate_all(steered) == [rule is not None for rule in rules_of]
        assert "no single map" in tab.page.locator("#step-meaning").inner_text()


def test_a_refused_window(tab: Desk) -> None:
    tab.watch.expected = {"status of 400"}
    tab.steer("digits-words")
    tab.place("answer", "8", "3")
    tab.type(QUESTION)
    tab.until(lambda: tab.answers()[0]["state"] == "error")
    assert tab.answers()[0]["problem"].startswith("The server refuses this steering")
    assert "8" in tab.answers()[0]["problem"]


@pytest.mark.parametrize("steered", [True, False])
def test_the_tokens_of_an_answer(tab: Desk, steered: bool) -> None:
    """All tokens, as the server gives them, and for each the experts that the server says, layer by layer."""
    if steered:
        tab.steer("digits-words", activate=6, deactivate=6, reverse=True)
        tab.place("answer", "1", "")
    tab.send(QUESTION)
    (text,) = tab.send(COUNT)
    tab.page.get_by_role("button", name="Tokens").last.click()
    tab.page.locator("#tokens").wait_for()
    assert tab.page.locator("#steps-state").inner_text() == "", "it came out the same"
    body = asked(tab, return_tokens=True, return_routed_experts=True, logprobs=True)
    choice, n_prompt = body["choices"][0], body["usage"]["prompt_tokens"]
    texts = tab.page.locator("#tokens .token").all_inner_texts()
    assert "".join(texts[: len(choice["logprobs"]["content"])]) == text
    assert len(texts) == len(choice["tokens"])
    model = tab.server.client.get("/v1/steering").json()["model"]
    raw = base64.b64decode(body["sglext"]["routed_experts"])
    experts = np.frombuffer(raw, "<i4").reshape(-1, model["n_layer"], model["n_expert_used"])
    choice_of = {"activate": 6, "deactivate": 6, "reverse": True, "mode": "hard"}
    signs = np.array(table(tab.server, **choice_of)["signs"]) * steered
    words = {1: " promoted", -1: " suppressed", 0: ""}
    seen = set()
    for at, token in enumerate(choice["tokens"]):
        tab.until(lambda at=at: tab.page.locator("#step-about").inner_text().startswith(f"Token {at + 1} of "))
        about = tab.page.locator("#step-about").inner_text()
        assert f"number {token}" in about
        assert ("unsteered" in about) == (choice["token_rules"][at] is None)
        shown = tab.token_experts()
        rows = experts[n_prompt - 1 + at]
        signed = [[int(signs[layer, expert]) for expert in row] for layer, row in enumerate(rows)]
        assert shown == [
            [f"{expert}{words[sign]}" for expert, sign in zip(row, of, strict=True)]
            for row, of in zip(rows.tolist(), signed, strict=True)
        ]
        if choice["token_rules"][at] is not None:
            assert min(map(min, signed)) >= 0, "what is suppressed did not draw it"
        seen |= {sign for of in signed for sign in of}
        tab.page.keyboard.press("ArrowRight")
    assert seen == ({-1, 0, 1} if steered else {0})
    assert json.dumps(tab.kept()).count("routed_experts") == 0, "they are not kept"


THINKS = TURNS.replace("m.content", "m.content.split('</think>')[-1]") + (
    "{% if add_generation_prompt %}<|assistant|><think>{% endif %}"
)


def test_thinking_is_marked(browser: Any, tmp_path: Path) -> None:
    """A template that begins with thinking: all that the embedded model says is that, and steered there alone."""
    (model,) = copy_model(TINY, tmp_path / "thinks.gguf", template=THINKS)
    with running(model=model, n_ctx=512) as server, desk(browser, server) as tab:
        tab.open().steer("digits-words", reverse=True)
        tab.place("thinking")
        hint = tab.page.locator("#where-help").inner_text()
        assert "no thinking" not in hint
        assert "not known" not in hint
        tab.send(COUNT)
        body = asked(tab)
        thoughts = body["choices"][0]["message"]["reasoning_content"]
        spans = [thoughts[span["start"] : span["end"]] for span in body["choices"][0]["steered_reasoning"]]
        assert tab.page.locator(".thoughts").text_content() == thoughts
        assert tab.page.locator(".thoughts mark.steered").all_text_contents() == spans == [thoughts]
        tab.page.locator(".answer").get_by_role("button", name="Tokens").click()
        tab.page.locator("#tokens").wait_for()
        about = tab.page.locator("#step-about")
        tab.until(lambda: about.inner_text())  # the answer is asked for once more
        assert "steered by thinking: digits-words" in about.inner_text()
        tab.page.keyboard.press("Escape")
        tab.place("answer")
        tab.again()
        assert tab.page.locator(".thoughts mark.steered").count() == 0
