"""An answer token by token on the page: what is asked for, what is shown of each token, and by which keys."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import MARKUP, QUESTION, REFUSED, marked, table
from tests.support.running_server import Running

pytestmark = browsers.marks()

N_PROMPT, N_LAYER, N_EXPERT, TOP_K = 5, 5, 24, 4
PARTS = [(" one", None, False), (",\n", 0, False), ("\u202e<b>", 0, False), ("", 1, False)]
TEXT = "".join(text for text, _, _ in PARTS)
RULES = ["answer[1:3]: digits-words +6 -6", "answer: digits-words"]
APPLIED = {"name": None, "rules": RULES, "n_steered": 3}


def encoded(experts: Any) -> str:
    return base64.b64encode(np.asarray(experts, "<i4").tobytes()).decode()


def routed(n: int = len(PARTS)) -> Any:
    """Experts [tokens, layers, top k] from the prompt's last token on, all different; the first layer has no router."""
    token, layer, slot = np.ogrid[:n, :N_LAYER, :TOP_K]
    experts = (7 * token + 5 * layer + slot) % N_EXPERT
    experts[:, 0] = -1
    return experts


def trace(**other: Any) -> dict[str, Any]:
    """The server's answer to the page's second question."""
    content = [{"token": text, "logprob": -0.5 * i} for i, (text, _, _) in enumerate(PARTS)]
    choice = {
        "message": {"role": "assistant", "content": TEXT},
        "tokens": [100 + i for i in range(len(PARTS))],
        "token_rules": [rule for _, rule, _ in PARTS],
        "logprobs": {"content": content},
    }
    usage = {"prompt_tokens": N_PROMPT, "completion_tokens": len(PARTS)}
    body = {"choices": [choice], "usage": usage, "steering": APPLIED, "sglext": {"routed_experts": encoded(routed())}}
    return body | other


@dataclass
class Mock:
    """A server that answers both questions of the page; `answer` is what it says to the second."""

    tab: Desk
    answer: dict[str, Any]
    status: int = 200
    asked: list[dict[str, Any]] = field(default_factory=list)

    def open(self) -> None:
        """Open the dialog of the last answer, and wait for what it says."""
        self.tab.page.get_by_role("button", name="Tokens").last.click()
        self.tab.until(lambda: self.tab.page.locator("#steps-body").is_visible() or self.wrong())

    def wrong(self) -> str:
        """What it says is wrong."""
        place = self.tab.page.locator("#steps-state.wrong")
        return place.inner_text() if place.count() else ""

    def about(self) -> str:
        """What it says of the token; after the frame that it is drawn in."""
        self.tab.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return str(self.tab.page.locator("#step-about").inner_text())

    def option(self, **of: Any) -> Any:
        """Tokens of the list."""
        return self.tab.page.locator("#tokens").get_by_role("option", **of)


@contextmanager
def mock(browser: Any, server: Running, answer: dict[str, Any] | None = None, status: int = 200) -> Iterator[Mock]:
    with desk(browser, server) as tab:
        found = Mock(tab, trace() if answer is None else answer, status)
        reply = marked(PARTS, APPLIED, n_prompt=N_PROMPT)

        def respond(route: Any) -> None:
            if route.request.post_data_json.get("stream"):
                route.fulfill(body=reply, content_type="text/event-stream")
            else:
                found.asked.append(route.request.post_data_json)
                route.fulfill(status=found.status, body=json.dumps(found.answer), content_type="application/json")

        tab.page.route("**/v1/chat/completions", respond)
        tab.open()
        yield found


def test_the_same_is_asked_again(browser: Any, server: Running) -> None:
    """With the conversation, the settings and the seed of then, whatever is chosen now; once."""
    with mock(browser, server) as found:
        tab = found.tab
        tab.page.click("#settings summary")
        tab.page.fill("#system", "Use words.")
        tab.page.fill("#temperature", "0.5")
        tab.steer("digits-words")
        tab.send("First.")
        tab.place("answer")
        tab.send(QUESTION)
        first = tab.watch.sent[1]
        tab.steer("")
        tab.page.fill("#system", "Another.")
        tab.page.fill("#temperature", "")
        tab.until(lambda: tab.kept()["settings"]["system"] == "Another.")
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        found.open()
        (asked,) = found.asked
        same = ("messages", "steering", "temperature")
        assert {name: asked[name] for name in same} == {name: first[name] for name in same}
        assert [message["role"] for message in asked["messages"]] == ["system", "user", "assistant", "user"]
        assert (asked["seed"], asked["max_tokens"]) == (7, len(PARTS)), "the seed that the server told"
        assert asked["routed_experts_start_len"] == N_PROMPT - 1, "those of the prompt are not needed"
        for name in ("return_routed_experts", "return_tokens", "return_steered", "logprobs"):
            assert asked[name] is True
        tab.page.keyboard.press("Escape")
        found.open()
        assert len(found.asked) == 1, "what is known is not asked for again"


def test_the_keys_go_from_token_to_token(browser: Any, server: Running) -> None:
    with mock(browser, server) as found:
        tab, press = found.tab, found.tab.page.keyboard.press
        tab.steer("digits-words")
        tab.send(QUESTION)
        tab.page.locator(".answer").get_by_role("button", name="Tokens").focus()
        press("Enter")
        tab.page.locator("#tokens").wait_for()
        assert tab.page.evaluate("() => document.activeElement.id") == "tokens"
        options = found.option()
        assert options.count() == len(PARTS)
        for key, at in (
            ("ArrowRight", 1),
            ("ArrowDown", 2),
            ("ArrowLeft", 1),
            ("End", 3),
            ("ArrowRight", 3),
            ("PageUp", 0),
            ("ArrowUp", 0),
            ("PageDown", 3),
            ("Home", 0),
        ):
            press(key)
            assert found.about().startswith(f"Token {at + 1} of 4:"), key
            assert found.option(selected=True).get_attribute("data-at") == str(at)
            assert tab.page.locator("#tokens").get_attribute("aria-activedescendant") == f"token-{at}"
        press("Tab")
        assert tab.page.evaluate("() => document.activeElement.id") == "step-back"
        assert tab.page.locator("#step-back").get_attribute("aria-disabled") == "true"
        press("Enter")
        assert found.about().startswith("Token 1 of 4:")
        press("Tab")
        press("Enter")
        assert found.about().startswith("Token 2 of 4:")
        options.nth(2).click()
        assert found.about().startswith("Token 3 of 4:")
        press("Escape")
        assert not tab.page.locator("#steps").is_visible()
        assert tab.page.evaluate("() => document.activeElement.textContent") == "Tokens", "the focus is where it was"


def test_the_experts_of_each_token(browser: Any, server: Running) -> None:
    """As the list and as the heat map, with those of the map that the answer was steered by."""
    with mock(browser, server) as found:
        tab = found.tab
        tab.steer("digits-words", activate=6, deactivate=6)
        tab.place("answer")
        tab.send(QUESTION)
        tab.steer("")  # what is chosen now does not matter
        found.open()
        signs = np.array(table(server, activate=6, deactivate=6, reverse=False, mode="hard")["signs"])
        seen = set()
        for at in range(len(PARTS)):
            about = found.about()
            assert f"number {100 + at}" in about
            for layer, text in enumerate(found.tab.token_experts()):
                experts = [int(expert) for expert in routed()[at, layer] if expert >= 0]
                words = {1: " promoted", -1: " suppressed", 0: ""}
                assert text == [f"{expert}{words[int(signs[layer, expert])]}" for expert in experts]
                seen |= {int(signs[layer, expert]) for expert in experts}
            tab.page.keyboard.press("ArrowRight")
        assert seen == {-1, 0, 1}, "the experts here are of every kind"
        tab.page.keyboard.press("Home")
        found.about()
        expert = int(routed()[0, 2, 0])
        data = tab.page.locator("#step-map").evaluate("(canvas) => ({...canvas.dataset})")
        cell, left, top = (float(data[name]) for name in ("cell", "left", "top"))
        for at, words in ((expert, "used for this token"), (expert - 1, "not used for this token")):
            place = {"x": left + (at + 0.5) * cell, "y": top + 2.5 * cell}
            tab.page.hover("#step-map", position=place, force=True)
            lines = tab.page.locator("#step-tooltip").inner_text().splitlines()
            assert (lines[0], lines[-1]) == (f"Layer 2, expert {at}", words)
        tab.page.locator("#step-map").focus()
        tab.page.keyboard.press("ArrowRight")
        assert found.about().startswith("Token 1 of 4:"), "there the keys are the map's"


def test_what_is_said_of_a_token(browser: Any, server: Running) -> None:
    with mock(browser, server) as found:
        tab = found.tab
        tab.send(QUESTION)
        found.open()
        told = []
        for _ in PARTS:
            told.append(found.about())
            tab.page.keyboard.press("ArrowRight")
        assert told[0].endswith("unsteered")
        assert "probability 100%" in told[0]
        assert "probability 61%" in told[1]
        assert told[1].endswith(f"steered by rule 1: {RULES[0]}")
        assert f"steered by rule 2: {RULES[1]}" in told[3]
        options = found.option()
        assert [one.get_attribute("aria-label") for one in options.all()] == [
            " one",
            ", line break , steered",
            "\\u{202e}<b>, steered",
            "number 103, steered",
        ]
        assert options.nth(2).inner_text() == "\\u{202e}<b>", "what would turn the text around is spelt"
        assert ["steered" in (one.get_attribute("class") or "") for one in options.all()] == [False, True, True, True]
        line = "(one) => getComputedStyle(one).textDecorationLine"
        assert [one.evaluate(line) for one in options.all()] == ["none", "underline", "underline", "underline"]


def choice_with(**other: Any) -> dict[str, Any]:
    return trace(choices=[trace()["choices"][0] | other])


WRONG: dict[str, tuple[int, dict[str, Any], str]] = {
    "old server": (
        400,
        {"error": {"message": "unknown", "param": "return_routed_experts"}},
        "This server does not give the experts of each token.",
    ),
    "no experts": (200, {**trace(), "sglext": None}, "This server does not give the experts of each token."),
    "no tokens": (200, choice_with(tokens=None), "This server does not give the experts of each token."),
    "no base64": (200, trace(sglext={"routed_experts": "{}"}), "it is not base64"),
    "cut": (200, trace(sglext={"routed_experts": encoded([1, 2, 3])}), "12 bytes are no whole tokens"),
    "too few": (200, trace(sglext={"routed_experts": encoded(routed(3))}), "experts of 3 tokens came"),
    "no usage": (200, trace(usage=None), "cannot be read"),
    "busy": (429, {"error": {"message": "full"}}, "The server is busy"),
    "failed": (500, {"error": {"message": MARKUP}}, MARKUP),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_shown_is_told(browser: Any, server: Running, name: str) -> None:
    status, answer, words = WRONG[name]
    with mock(browser, server, answer, status) as found:
        tab = found.tab
        tab.watch.expected = {f"{REFUSED} {status}"} if status != 200 else set()
        images = tab.page.locator("img").count()
        tab.send(QUESTION)
        found.open()
        assert words in found.wrong()
        assert not tab.page.locator("#steps-body").is_visible()
        assert tab.page.locator("img").count() == images
        tab.page.get_by_role("button", name="Close").click()
        found.status, found.answer = 200, trace()
        found.open()
        assert found.about().startswith("Token 1 of 4:"), "it can be tried again"


def test_another_answer_is_told(browser: Any, server: Running) -> None:
    """Sampled again beside other requests an answer may come out differently: then it says so."""
    with mock(browser, server, choice_with(message={"content": TEXT + "?"})) as found:
        found.tab.send(QUESTION)
        found.open()
        assert "came out differently" in found.wrong()
        assert found.about().startswith("Token 1 of 4:")


def test_a_server_that_says_less_of_tokens(browser: Any, server: Running) -> None:
    """Without probabilities, texts and rules there are still tokens with their experts."""
    with mock(browser, server, choice_with(logprobs=None, token_rules=None)) as found:
        found.tab.send(QUESTION)
        found.open()
        assert found.about() == "Token 1 of 4: \u201c#100\u201d, number 100"
        assert [len(texts) for texts in found.tab.token_experts()] == [0, *[TOP_K] * (N_LAYER - 1)]


def test_closing_stops_the_question(browser: Any, server: Running) -> None:
    with mock(browser, server) as found:
        tab = found.tab
        tab.send(QUESTION)
        tab.page.unroute("**/v1/chat/completions")
        held: list[Any] = []
        tab.page.route("**/v1/chat/completions", lambda route: held.append(route))  # an answer that does not come
        tab.page.get_by_role("button", name="Tokens").click()
        tab.until(lambda: held)
        assert "Asking" in tab.page.locator("#steps-state").inner_text()
        with tab.page.expect_event("requestfailed"):
            tab.page.keyboard.press("Escape")
        assert not tab.page.locator("#steps").is_visible()


def test_which_answers_can_be_asked_again(browser: Any, server: Running) -> None:
    """Neither those that did not end, nor those kept by an older page, which did not note how they were asked."""
    ended = {"side": "steered", "text": "x", "state": "done", "facts": {"tokens": 1, "seed": 1}}
    answers = [
        ended | {"asked": None},
        ended | {"asked": "a"},
        ended,
        ended | {"asked": 5},
        ended | {"asked": None, "state": "stopped"},
    ]
    state = {"version": 1, "turns": [{"user": "q", "seed": 1, "answers": [answer]} for answer in answers]}
    with desk(browser, server) as tab:
        tab.page.add_init_script(f"localStorage.setItem('steermoe.chat', {json.dumps(json.dumps(state))});")
        tab.open()
        buttons = tab.page.locator(".answer").all()
        offered = [one.get_by_role("button", name="Tokens").count() for one in buttons]
        assert offered == [1, 1, 0, 0, 0]


def test_a_large_model_stays_quick(browser: Any, server: Running) -> None:
    """48 layers of 128 experts, 8 a token: keys faster than frames cost a drawing a frame, and no elements."""
    layers, experts, top_k, n = 48, 128, 8, 300
    shape = {"n_layer": layers, "n_expert": experts, "n_expert_used": top_k}
    random = np.random.default_rng(0).integers(0, experts, (n, layers, top_k))
    answer = trace(sglext={"routed_experts": encoded(random)})
    answer["choices"][0] |= {"tokens": list(range(n)), "token_rules": None, "logprobs": None}
    with mock(browser, server, answer) as found:
        tab = found.tab

        def listed(route: Any) -> None:
            data = server.client.get("/v1/steering").json()
            route.fulfill(json=data | {"model": data["model"] | shape})

        tab.page.route("**/v1/steering", listed)
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        tab.send(QUESTION)
        found.open()
        body = """async () => {
            const list = document.getElementById("tokens");
            const canvas = document.getElementById("step-map");
            let [drawn, added] = [0, 0];
            const watch = new MutationObserver((records) => {
                for (const record of records) {
                    if (record.target === canvas && record.attributeName === "width") drawn++;
                    added += [...record.addedNodes].filter((node) => node.nodeType === Node.ELEMENT_NODE).length;
                }
            });
            watch.observe(document.getElementById("steps"), { subtree: true, childList: true, attributes: true });
            for (let i = 0; i < 250; i++) list.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            return [drawn, added];
        }"""
        assert tab.page.evaluate(body) == [1, 0]
        assert found.about().startswith("Token 251 of 300:")
        shown = [list(map(int, texts)) for texts in found.tab.token_experts()]
        assert shown == random[250].tolist()


def test_a_model_without_experts(browser: Any, server: Running) -> None:
    with mock(browser, server) as found:
        tab = found.tab
        tab.page.route("**/v1/steering", lambda route: route.fulfill(json={"default": None, "model": None, "data": []}))
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        tab.send(QUESTION)
        found.open()
        assert "no experts" in found.wrong()
        assert found.asked == []
