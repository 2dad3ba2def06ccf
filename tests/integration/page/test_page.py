"""Asking on the page, in a real browser, against the real server and the embedded model."""

from __future__ import annotations

import itertools
import json
import re
from typing import Any

import numpy as np
import pytest

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import COUNT, QUESTION, table
from tests.support.running_server import running, unending, until

pytestmark = browsers.marks()

#
# asking
#


def test_send(tab: Desk) -> None:
    assert tab.page.locator("#welcome").is_visible()
    assert tab.send(QUESTION) == [tab.server.chat(QUESTION).json()["choices"][0]["message"]["content"]]
    assert not tab.page.locator("#welcome").is_visible()
    assert tab.page.locator(".question").inner_text().endswith(QUESTION)
    assert tab.page.input_value("#message") == ""
    assert tab.page.evaluate("() => document.activeElement.id") == "message"
    (answer,) = tab.answers()
    assert answer["title"] == "Unsteered"
    (sent,) = tab.watch.sent
    assert sent["messages"] == [{"role": "user", "content": QUESTION}]
    assert sent["stream"] is sent["routing"] is True
    assert sent["steering"] is None
    assert not {"temperature", "max_tokens"} & set(sent), "the server's own"
    assert answer["meta"][0] == "unsteered"
    assert re.fullmatch(r"\d+ tokens?", answer["meta"][1])
    assert re.fullmatch(r"[\d.]+ tokens/s", answer["meta"][2])
    assert answer["meta"][3] == f"seed {sent['seed']}"
    tab.send("And after four?")
    assert [m["role"] for m in tab.watch.sent[1]["messages"]] == ["user", "assistant", "user"]
    assert tab.watch.sent[1]["messages"][1]["content"] == answer["text"]
    assert tab.watch.sent[1]["seed"] != sent["seed"], "a new one is drawn for each question"


def test_an_example_is_a_question(tab: Desk) -> None:
    tab.page.get_by_role("button", name=COUNT).click()
    assert tab.ended()[0].startswith(("3", "three"))


def test_the_text_grows_and_escape_stops(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    answer = tab.page.locator(".answer")
    answer.wait_for()
    assert answer.get_attribute("aria-busy") == "true"
    assert tab.page.locator("#stop").is_visible()
    assert not tab.page.locator("#send").is_visible()
    seen: list[str] = []
    tab.until(lambda: len(seen) >= 5 or _append_new(seen, tab.page.locator(".answer .text").inner_text()))
    for shorter, longer in itertools.pairwise(seen):
        assert len(longer) > len(shorter)
    tab.page.keyboard.press("Enter")
    assert tab.page.locator(".turn").count() == 1, "one at a time"
    tab.page.keyboard.press("Escape")
    (text,) = tab.ended()
    assert text.startswith(seen[-1][:20])
    assert answer.get_attribute("data-state") == "stopped"
    assert answer.get_attribute("aria-busy") == "false"
    until(lambda: tab.server.worker.n_running == 0)
    assert len(tab.watch.sent) == 1
    tab.type("More.")  # what came goes on as the conversation
    tab.page.locator("#stop").click()
    tab.ended()
    assert tab.watch.sent[1]["messages"][1] == {
        "role": "assistant",
        "content": tab.kept()["turns"][0]["answers"][0]["text"],
    }
    assert tab.page.evaluate("() => document.activeElement.id") == "message", "the button that had the focus is gone"


def _append_new(seen: list[str], text: str) -> None:
    if text and text not in seen:
        seen.append(text)


def test_switching_the_steering_flips_the_answer(tab: Desk) -> None:
    tab.steer("digits-words")
    assert tab.send(QUESTION) == ["4"]
    (answer,) = tab.answers()
    assert answer["title"] == "Steered: digits-words \u2192 digits"
    assert answer["meta"][:3] == ["2 promoted", "4 suppressed", "hard rule"], "as the map recommends"
    assert tab.watch.sent[-1]["steering"] == "digits-words", "as it is registered: the name is enough"
    own = tab.server.chat(QUESTION, steering="digits-words").json()["steering"]
    tab.page.locator(".details summary").click()
    applied = json.loads(tab.page.locator(".details pre").inner_text())
    assert applied | {"n_cached": 0} == own | {"n_cached": 0}, "what the server says of it, whole"
    with tab.new_table():
        tab.set("reverse", True)
    assert tab.again() == ["four"]
    (answer,) = tab.answers()
    assert answer["title"] == "Steered: digits-words \u2192 words"
    assert tab.watch.sent[-1]["steering"]["reverse"] is True
    assert tab.watch.sent[-1]["messages"] == [{"role": "user", "content": QUESTION}], "the answer before is replaced"
    with tab.new_table():
        tab.set("reverse", False)
    assert tab.again() == ["4"]
    tab.steer("")
    tab.again()
    assert tab.watch.sent[-1]["steering"] is None
    assert tab.answers()[0]["title"] == "Unsteered"


CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers": ({"activate": 6, "deactivate": 9}, {"activate": 6, "deactivate": 9, "reverse": False, "mode": "hard"}),
    "reverse": ({"reverse": True}, {"activate": 2, "deactivate": 4, "reverse": True, "mode": "hard"}),
    "layers": (
        {"activate": 8, "layers": "2-3, 4"},
        {"activate": 8, "deactivate": 4, "reverse": False, "layers": "2-3,4", "mode": "hard"},
    ),
    "soft": (
        {"mode": "soft", "scale": 2.5},
        {"activate": 2, "deactivate": 4, "reverse": False, "mode": "soft", "scale": 2.5},
    ),
    "one side": ({"activate": 0, "deactivate": 3}, {"activate": 0, "deactivate": 3, "reverse": False, "mode": "hard"}),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_is_sent_and_marked(tab: Desk, name: str) -> None:
    chosen, wanted = CHOICES[name]
    tab.steer("digits-words", **chosen)
    expected = table(tab.server, **wanted)
    signs = np.array(expected["signs"])
    shown = tab.page.locator("#chosen").inner_text()
    numbers = [int(number) for number in re.findall(r"(\d+) (?:promoted|suppressed)", shown)]
    assert numbers == [expected["n_active"], expected["n_inactive"]] == [(signs > 0).sum(), (signs < 0).sum()]
    for layer, expert in np.argwhere(signs):
        word = "promoted" if signs[layer, expert] > 0 else "suppressed"
        assert word in tab.tooltip(layer, expert), (layer, expert)
    others = [(0, 0), (1, 5), (4, 23)]
    for layer, expert in others:
        if not signs[layer, expert]:
            assert len(tab.tooltip(layer, expert)) == 2
    tab.send(COUNT)
    assert tab.watch.sent[-1]["steering"] == {"map": "digits-words"} | wanted
    answer = tab.answers()[-1]
    assert answer["meta"][:2] == [f"{numbers[0]} promoted", f"{numbers[1]} suppressed"]
    snippet = tab.page.locator("#snippet").text_content() or ""
    assert json.loads("{" + snippet + "}")["steering"] == tab.watch.sent[-1]["steering"]


def test_the_sliders(tab: Desk) -> None:
    """By the arrow keys, as a person without a mouse moves them; the numbers beside them follow."""
    tab.steer("digits-words")  # begins with what the map recommends
    assert (tab.page.input_value("#activate"), tab.page.input_value("#deactivate")) == ("2", "4")
    assert tab.page.locator("#chosen").inner_text() == "2 promoted, 4 suppressed of 120"
    began = np.array(table(tab.server, activate=2, deactivate=4)["signs"])
    before = {at: tab.pixels(*at) for at in ((2, 0), (3, 2), (2, 2), (1, 5))}
    for name, number in (("activate", "5"), ("deactivate", "7")):
        tab.page.locator(f"#{name}-range").focus()
        for _ in range(2):
            tab.page.keyboard.press("ArrowRight")
        with tab.new_table():
            tab.page.keyboard.press("ArrowRight")
        assert tab.page.input_value(f"#{name}") == number
    assert tab.page.locator("#chosen").inner_text() == "5 promoted, 7 suppressed of 120"
    signs = np.array(table(tab.server, activate=5, deactivate=7)["signs"])
    assert [int(signs[at]) for at in before] == [1, -1, -1, 0]
    assert [int(began[at]) for at in before] == [0, 0, -1, 0], "two of them are newly chosen"
    for at, pixels in before.items():
        changed = tab.pixels(*at) != pixels
        assert changed == (signs[at] != began[at]), f"the frame of {at}"
    upper, lower = tab.pixels(2, 0), tab.pixels(3, 2)
    side = round(len(upper) ** 0.5)
    ink = [25, 28, 35]

    def near(pixels: list[list[int]], row: int, column: int) -> bool:
        return max(abs(a - b) for a, b in zip(pixels[row * side + column], ink, strict=True)) < 40

    assert near(upper, 2, side - 3), "promoted: the upper right corner is filled"
    assert not near(upper, side - 3, 2)
    assert near(lower, side - 3, 2), "suppressed: the lower left one"
    assert not near(lower, 2, side - 3)
    assert not near(upper, side // 2, side // 2), "the colour of the RD stays between"
    assert not near(lower, side // 2, side // 2)
    tab.page.get_by_role("button", name="Reset to the map's numbers").click()
    tab.until(lambda: tab.page.locator("#chosen").inner_text().startswith("2 promoted, 4 "))
    assert (tab.page.input_value("#activate"), tab.page.input_value("#deactivate")) == ("2", "4")
    tab.send(QUESTION)
    assert tab.watch.sent[-1]["steering"] == "digits-words"


def test_no_experts_is_no_steering(tab: Desk) -> None:
    tab.steer("digits-words", activate=0, deactivate=0)
    assert tab.page.locator("#chip").inner_text() == "digits-words: no experts chosen"
    assert tab.page.locator("#compare").is_disabled()
    tab.send(QUESTION)
    assert tab.watch.sent[-1]["steering"] is None


def test_side_by_side(tab: Desk) -> None:
    assert tab.page.locator("#compare").is_disabled(), "unsteered against unsteered is no comparison"
    tab.steer("digits-words", reverse=True)
    tab.page.locator("label.switch").click()
    texts = tab.send(QUESTION)
    plain, steered = tab.watch.sent
    assert (plain.pop("steering"), steered.pop("steering")["reverse"]) == (None, True)
    assert plain == steered, "the same but for the steering: the same seed, too"
    assert [answer["title"] for answer in tab.answers()] == ["Unsteered", "Steered: digits-words \u2192 words"]
    assert texts == [tab.server.chat(QUESTION).json()["choices"][0]["message"]["content"], "four"]
    assert texts[0] == "4", "the two differ, or the test would not tell"
    boxes = [tab.page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
    assert boxes[0]
    assert boxes[1]
    assert boxes[0]["y"] == boxes[1]["y"]
    assert boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    tab.send("And after four?")
    for sent in tab.watch.sent[2:]:
        assert sent["messages"][1] == {"role": "assistant", "content": "four"}, "the steered side goes on"
    tab.page.locator("label.switch").click()
    assert len(tab.send(QUESTION)) == 1


def test_both_sides_come_at_once(browser: Any) -> None:
    with running(n_ctx=512) as server, desk(browser, server) as tab, unending(server, most=4, others=True):
        tab.open().steer("digits-words")
        tab.page.locator("label.switch").click()
        tab.type(COUNT)
        tab.until(lambda: [bool(a["text"]) and a["state"] == "running" for a in tab.answers()] == [True, True])
        assert server.worker.n_running == 2
        tab.page.keyboard.press("Escape")
        tab.ended()
        assert [answer["state"] for answer in tab.answers()] == ["stopped", "stopped"]


def test_settings_are_sent(tab: Desk) -> None:
    page = tab.page
    page.click("#settings summary")
    for field, value in (("system", "Use words."), ("temperature", "0.75"), ("seed", "77"), ("max-tokens", "3")):
        page.fill(f"#{field}", value)
    tab.send(COUNT)
    sent = tab.watch.sent[-1]
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.75, 77, 3)
    assert sent["messages"][0] == {"role": "system", "content": "Use words."}
    meta = tab.answers()[0]["meta"]
    assert "3 tokens" in meta
    assert "seed 77" in meta
    assert "cut off at the limit of tokens" in meta
    page.fill("#temperature", "11")
    page.fill("#message", "This is not lost.")
    page.keyboard.press("Enter")
    assert page.locator("#notice").inner_text().startswith("Temperature: give a number from 0 to 10")
    assert page.input_value("#message") == "This is not lost."
    assert page.evaluate("() => document.activeElement.id") == "temperature"
    assert len(tab.watch.sent) == 1
