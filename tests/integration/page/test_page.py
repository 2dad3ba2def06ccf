"""The page in a real browser, against the real server and the embedded model."""

from __future__ import annotations

import base64
import itertools
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from steermoe_local import ExpertMap, write_bias
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.steering.bias_file import BiasFile
from tests.support import browser as browsers
from tests.support import random_models
from tests.support.gguf_copy import copy_model
from tests.support.page_desk import NARROW, Desk, desk
from tests.support.random_models import RandomModel, write_random_model
from tests.support.run_models import talker
from tests.support.running_server import TINY, Running, running, unending, until

pytestmark = browsers.marks()

QUESTION = "Which number comes after three?"
COUNT = "Count from three to nine."
REFUSED = "the server responded with a status of"  # what a browser says of an answer that is not 2xx
OFF = "net::ERR_"
MARKUP = "<img src=x onerror=\"alert(1)\"><script>alert(2)</script><b onclick='alert(3)'>b</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with browsers.chromium() as found:
        yield found


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(n_ctx=512) as found:
        yield found


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model whose answers go on and on, slowly enough to look at them."""
    model = talker(tmp_path_factory.mktemp("talker"), TINY)
    with running(model=model, n_ctx=512, parallel=2, queue_limit=0, timeout=60) as found:
        slow(found, 0.02)
        yield found


def slow(server: Running, seconds: float) -> None:
    """Make every step take longer."""
    engine = server.worker.engine
    assert engine is not None
    step = engine.step

    def slowly() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slowly  # type: ignore[method-assign]


@pytest.fixture
def tab(browser: Any, server: Running) -> Iterator[Desk]:
    with desk(browser, server) as made:
        yield made.open()


@pytest.fixture
def slow_tab(browser: Any, endless: Running) -> Iterator[Desk]:
    until(lambda: endless.worker.n_running == 0)
    with desk(browser, endless) as made:
        yield made.open()


def table(server: Running, name: str = "digits-words", **choice: Any) -> Any:
    response = server.client.get(f"/v1/steering/{name}/map", params=choice)
    assert response.status_code == 200, response.text
    return response.json()


@contextmanager
def registered(server: Running, *bodies: dict[str, Any]) -> Iterator[None]:
    """Names that are there while the block lasts; within it they may go."""
    for body in bodies:
        response = server.client.post("/v1/steering", json=body)
        assert response.status_code == 201, response.text
    try:
        yield
    finally:
        for body in bodies:
            server.client.delete(f"/v1/steering/{body['name']}")


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
    until(lambda: tab.server.worker.n_running == 0, 5)
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
    assert answer["meta"][:3] == ["2 promoted", "2 suppressed", "hard rule"]
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
    "reverse": ({"reverse": True}, {"activate": 2, "deactivate": 2, "reverse": True, "mode": "hard"}),
    "layers": (
        {"activate": 8, "layers": "2-3, 4"},
        {"activate": 8, "deactivate": 2, "reverse": False, "layers": "2-3,4", "mode": "hard"},
    ),
    "soft": (
        {"mode": "soft", "scale": 2.5},
        {"activate": 2, "deactivate": 2, "reverse": False, "mode": "soft", "scale": 2.5},
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
    tab.steer("digits-words")
    before = {at: tab.pixels(*at) for at in ((2, 0), (2, 2), (1, 5))}
    for name in ("activate", "deactivate"):
        tab.page.locator(f"#{name}-range").focus()
        for _ in range(2):
            tab.page.keyboard.press("ArrowRight")
        with tab.new_table():
            tab.page.keyboard.press("ArrowRight")
        assert tab.page.input_value(f"#{name}") == "5"
    assert tab.page.locator("#chosen").inner_text() == "5 promoted, 5 suppressed of 120"
    signs = np.array(table(tab.server, activate=5, deactivate=5)["signs"])
    assert (signs[2, 0], signs[2, 2], signs[1, 5]) == (1, -1, 0)
    for at, pixels in before.items():
        changed = tab.pixels(*at) != pixels
        assert changed == bool(signs[at]), f"the frame of {at}"
    upper, lower = tab.pixels(2, 0), tab.pixels(2, 2)
    side = round(len(upper) ** 0.5)
    ink = [25, 28, 35]

    def near(pixels: list[list[int]], row: int, column: int) -> bool:
        return max(abs(a - b) for a, b in zip(pixels[row * side + column], ink, strict=True)) < 40

    assert near(upper, 2, side - 4), "promoted: the upper right corner is filled"
    assert not near(upper, side - 5, 3)
    assert near(lower, side - 4, 2), "suppressed: the lower left one"
    assert not near(lower, 3, side - 5)
    tab.page.get_by_role("button", name="Reset to the map's numbers").click()
    tab.until(lambda: tab.page.locator("#chosen").inner_text().startswith("2 promoted, 2 "))
    assert tab.page.input_value("#activate") == "2"
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
    with running(n_ctx=512) as server, desk(browser, server) as tab:
        slow(server, 0.1)
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


#
# the map
#


def test_the_heat_map_says_what_the_map_says(tab: Desk) -> None:
    tab.steer("document-memory")
    expected = table(tab.server, "document-memory")
    rd, signs = np.array(expected["rd"]), np.array(expected["signs"])
    own = ExpertMap.load(shipped_maps()["document-memory"])
    assert np.allclose(rd, own.rd, atol=1e-6)
    data = tab.page.locator("#heatmap").evaluate("(canvas) => ({...canvas.dataset})")
    assert (int(data["layers"]), int(data["experts"])) == rd.shape == (5, 24)
    assert tab.page.locator("#heatmap").get_attribute("aria-label") == "Map of document-memory: 5 layers of 24 experts"
    places = [(layer, expert) for layer in range(5) for expert in (*range(0, 24, 5), 23)]
    for layer, expert in {*places, *map(tuple, np.argwhere(signs).tolist())}:
        lines = tab.tooltip(layer, expert)
        assert lines[0] == f"Layer {layer}, expert {expert}"
        assert float(lines[1].removeprefix("RD ")) == pytest.approx(own.rd[layer, expert], abs=5e-4)
        assert lines[2:] == {0: [], 1: ["promoted"], -1: ["suppressed"]}[int(signs[layer, expert])]
    # blue for RD > 0, orange for RD < 0, the stronger the farther from grey
    strongest = [tuple(divmod(int(at), 24)) for at in (rd.argmax(), rd.argmin())]
    (red, _, blue), (red2, _, blue2) = (np.median(tab.pixels(*at), axis=0) for at in strongest)
    assert blue > red + 80
    assert red2 > blue2 + 80
    grey = np.median(tab.pixels(*divmod(int(np.abs(rd).argmin()), 24)), axis=0)
    assert np.ptp(grey) < 30
    tab.page.mouse.move(5, 5)
    assert not tab.page.locator("#tooltip").is_visible()


def test_the_heat_map_by_keyboard(tab: Desk) -> None:
    tab.steer("digits-words")
    rd = np.array(table(tab.server)["rd"])
    page = tab.page
    page.locator("#enlarge").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") == "heatmap"
    assert tab.shown_tooltip()[0] == "Layer 0, expert 0"
    for key, place in (
        ("ArrowRight", (0, 1)),
        ("ArrowDown", (1, 1)),
        ("ArrowLeft", (1, 0)),
        ("ArrowLeft", (1, 0)),
        ("n", (1, 1)),
        ("n", (1, 2)),
        ("p", (1, 1)),
        ("End", (1, 23)),
        ("PageDown", (4, 23)),
        ("Home", (4, 0)),
        ("ArrowUp", (3, 0)),
        ("PageUp", (0, 0)),
        ("ArrowUp", (0, 0)),
    ):
        page.keyboard.press(key)
        lines = tab.shown_tooltip()
        assert lines[0] == f"Layer {place[0]}, expert {place[1]}", key
        assert float(lines[1].removeprefix("RD ")) == pytest.approx(rd[place], abs=5e-4)
        assert (page.locator("#map-live").text_content() or "").replace("\u2212", "-") == ", ".join(lines)
    page.keyboard.press("Escape")
    assert not page.locator("#tooltip").is_visible()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.id") != "heatmap", "no trap"


def routing_of(server: Running, sent: dict[str, Any]) -> Any:
    """The routing of the answer to what the page sent; greedy answers and their routing are the same every time."""
    body = {name: value for name, value in sent.items() if not name.startswith("stream")}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return np.array(response.json()["routing"])


def test_the_experts_that_an_answer_used(tab: Desk) -> None:
    tab.steer("digits-words", reverse=True)
    bare = {at: tab.pixels(*at) for at in itertools.product(range(5), (0, 2, 4, 7))}
    tab.page.locator("label.switch").click()
    tab.send(COUNT)
    routings = [routing_of(tab.server, sent) for sent in tab.watch.sent]
    sides = ["unsteered" if sent["steering"] is None else "steered" for sent in tab.watch.sent]
    assert (routings[0] != routings[1]).any()
    assert tab.page.locator("#use input:checked").get_attribute("value") == "steered", "shown without asking"
    assert tab.page.locator("#mark-used").is_visible()
    for side in ("steered", "unsteered"):
        tab.page.locator(f"#use label:has(input[value={side}])").click()
        routing = routings[sides.index(side)]
        tokens = routing.sum(axis=1) / 4
        for layer, expert in itertools.product(range(5), range(0, 24, 3)):
            line = tab.tooltip(layer, expert)[-1]
            share = round(100 * routing[layer, expert] / tokens[layer])
            assert line == f"used for {share}% of tokens ({routing[layer, expert]} of {tokens[layer]:.0f})"
        tab.page.mouse.move(5, 5)
        for at, pixels in bare.items():
            assert (tab.pixels(*at) != pixels) == bool(routing[at]), f"the dot of {at}, {side}"
        pressed = tab.page.locator(f".answer.{side} button[aria-pressed=true]")
        assert pressed.inner_text() == "Experts used"
    tab.page.locator("#use label").first.click()
    assert {at: tab.pixels(*at) for at in bare} == bare
    assert not tab.page.locator("#mark-used").is_visible()
    tab.page.locator(".answer.steered").get_by_role("button", name="Experts used").click()
    assert tab.page.locator("#use input:checked").get_attribute("value") == "steered"


def test_the_list_of_experts(tab: Desk) -> None:
    tab.steer("digits-words", activate=3)
    tab.page.click("#experts summary")
    tab.send(COUNT)
    routing = routing_of(tab.server, tab.watch.sent[-1])
    expected = table(tab.server, activate=3)
    rows = [row.split("\t") for row in tab.page.locator("#expert-rows tr").all_inner_texts()]
    assert len(rows) == expected["n_active"] + expected["n_inactive"] == 5
    for layer, expert, rd, word, used in rows:
        at = int(layer), int(expert)
        assert float(rd.replace("\u2212", "-")) == pytest.approx(np.array(expected["rd"])[at], abs=5e-4)
        assert word == ("promoted" if np.array(expected["signs"])[at] > 0 else "suppressed")
        assert used == f"{round(400 * routing[at] / routing[at[0]].sum())}%"


def test_without_a_map_the_experts_are_still_shown(tab: Desk) -> None:
    tab.send(COUNT)
    routing = routing_of(tab.server, tab.watch.sent[-1])
    layer, expert = (int(at) for at in np.argwhere(routing)[0])
    lines = tab.tooltip(layer, expert)
    assert len(lines) == 2, "no RD"
    assert lines[1].startswith("used for ")
    assert not tab.page.locator("#scale-legend").is_visible()


def test_the_enlarged_map(tab: Desk) -> None:
    tab.steer("digits-words")
    small = tab.cell(0, 1)["x"] - tab.cell(0, 0)["x"]
    tab.page.click("#enlarge")
    tab.until(lambda: tab.cell(0, 1)["x"] - tab.cell(0, 0)["x"] > small)
    assert tab.tooltip(1, 0)[1:] == ["RD +1.000", "promoted"]
    tab.page.keyboard.press("Escape")
    tab.until(lambda: tab.cell(0, 1)["x"] - tab.cell(0, 0)["x"] == small)
    assert tab.tooltip(1, 0)[1:] == ["RD +1.000", "promoted"]


def test_a_large_map_is_drawn_quickly(tab: Desk) -> None:
    """48 layers of 128 experts, a third of them chosen and used: drawn in well under a frame or two."""
    script = """async () => {
        const { Heatmap } = await import("/page/heatmap.js");
        const byId = (id) => document.getElementById(id);
        const map = new Heatmap({ canvas: byId("heatmap"), cursor: byId("map-cursor"), tooltip: byId("tooltip"),
                                  live: byId("map-live"), scroll: byId("map-scroll") });
        const row = (value) => Array.from({ length: 128 }, (_, e) => value(e));
        const grid = (value) => Array.from({ length: 48 }, (_, l) => row((e) => value(l, e)));
        const shape = { n_layer: 48, n_expert: 128, n_expert_used: 8 };
        const rd = grid((l, e) => Math.sin(l * 128 + e));
        const signs = grid((l, e) => (e % 3 ? 0 : l % 2 ? 1 : -1));
        const routing = grid((l, e) => (e % 3 ? 0 : e));
        const times = [];
        for (let i = 0; i < 7; i++) {
            const began = performance.now();
            map.setTable({ ...shape, rd, signs });
            map.setUse(routing);
            byId("heatmap").getContext("2d").getImageData(0, 0, 1, 1); // it is really drawn
            times.push(performance.now() - began);
        }
        return times.sort((a, b) => a - b)[3];
    }"""
    milliseconds = tab.page.evaluate(script)
    assert milliseconds < 300, f"{milliseconds:.0f} ms"
    assert tab.overflow() <= 0, "a map that is too wide scrolls in its own box"
    box = tab.page.locator("#map-scroll").evaluate("(box) => [box.scrollWidth, box.clientWidth]")
    assert box[0] > box[1]


#
# what goes wrong
#


def test_the_key(browser: Any) -> None:
    with running(api_key="the right key", parallel=1) as server, desk(browser, server) as tab:
        tab.watch.expected = {f"{REFUSED} 401"}
        tab.open("key")
        page = tab.page
        dialog = page.locator("#key-dialog")
        assert dialog.is_visible()
        assert page.locator("#key-text").inner_text() == "The server asks for its API key."
        assert page.evaluate("() => document.activeElement.id") == "key"
        page.keyboard.type("a wrong one")
        page.keyboard.press("Enter")
        tab.until(lambda: page.locator("#key-text").inner_text() == "The server does not accept this API key.")
        page.fill("#key", "schlüssel")
        page.keyboard.press("Enter")
        assert "ASCII" in page.locator("#key-text").inner_text()
        page.fill("#key", "the right key")
        page.keyboard.press("Enter")
        page.locator("#state[data-state=ok]").wait_for()
        assert not dialog.is_visible()
        assert tab.send(QUESTION) == ["4"]
        assert "the right key" not in json.dumps(page.evaluate("() => ({...localStorage})"))
        page.reload()
        page.locator("#state[data-state=ok]").wait_for()  # this tab still knows it
        page.click("#open-key")
        page.fill("#key", "another")
        page.keyboard.press("Enter")
        tab.until(dialog.is_visible)
        page.click("#key-cancel")
        tab.type(COUNT)
        tab.until(lambda: tab.answers()[-1]["state"] == "error")
        assert tab.answers()[-1]["problem"].startswith("The server does not accept this API key.")
        page.fill("#key", "the right key")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Try again").click()
        assert tab.ended()[0].startswith("3")


def test_the_server_goes_away(browser: Any) -> None:
    with running(n_ctx=512, parallel=2) as server, desk(browser, server) as tab:
        tab.watch.expected = {OFF, f"{REFUSED} 503"}
        slow(server, 0.1)
        tab.open()
        tab.type(COUNT)
        tab.until(lambda: tab.answers()[0]["text"])
        server.worker.stop()  # as on a signal: what runs is ended
        tab.until(lambda: tab.answers()[0]["state"] == "error")
        answer = tab.answers()[0]
        assert answer["text"], "what came stays"
        assert answer["problem"].splitlines()[0] in ("The server cannot answer now.", "The connection broke off.")
        tab.page.locator("#state[data-state=gone]").wait_for()


def test_the_server_is_killed_and_comes_back(tab: Desk) -> None:
    tab.watch.expected = {OFF}
    tab.send(QUESTION)
    tab.context.set_offline(True)
    tab.type(COUNT)
    tab.until(lambda: tab.answers()[-1]["state"] == "error")
    assert tab.answers()[-1]["problem"].startswith("The server does not answer.")
    assert tab.page.locator("#state").inner_text() == "no answer"
    assert tab.page.locator(".problem[role=alert]").last.is_visible()
    tab.context.set_offline(False)
    tab.page.locator("#state[data-state=ok]").wait_for()  # it asks by itself
    tab.page.get_by_role("button", name="Try again").click()
    assert tab.ended()[0].startswith(("3", "three"))
    roles = [message["role"] for message in tab.watch.sent[-1]["messages"]]
    assert roles == ["user", "assistant", "user"], "a question without an answer is no part of the conversation"


def test_a_connection_that_breaks_off(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        whole = sse({"choices": [{"delta": {"content": "half an"}}], "steering": None})
        tab.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(body=whole, content_type="text/event-stream")
        )
        tab.open().type(QUESTION)
        tab.until(lambda: tab.answers()[0]["state"] == "error")
        answer = tab.answers()[0]
        assert answer["text"] == "half an"
        assert answer["problem"].startswith("The connection broke off.")


def test_no_server_from_the_beginning(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        tab.watch.expected = {OFF}
        tab.page.route("**/v1/**", lambda route: route.abort())
        tab.open("gone")
        tab.page.fill("#message", QUESTION)
        tab.page.keyboard.press("Enter")
        assert tab.page.locator("#notice").inner_text().startswith("The server does not answer yet")
        assert tab.page.input_value("#message") == QUESTION
        tab.page.unroute("**/v1/**")
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert not tab.page.locator("#notice").is_visible()
        tab.page.keyboard.press("Enter")
        assert tab.ended() == ["4"]


def test_a_server_that_is_loading(browser: Any) -> None:
    go = threading.Event()

    def held(load: Any) -> Any:
        @contextmanager
        def wait() -> Iterator[Any]:
            assert go.wait(60)
            with load() as engine:
                yield engine

        return wait

    with running(parallel=1, load=held, wait=False) as server, desk(browser, server) as tab:
        tab.watch.expected = {f"{REFUSED} 503"}
        tab.open("loading")
        assert tab.page.locator("#state").inner_text() == "loading the model"
        go.set()
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert tab.send(QUESTION) == ["4"]


def test_a_busy_server(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.watch.expected = {f"{REFUSED} 429"}
    body = {"prompt": "one,", "max_tokens": 400, "stream": True, "logit_bias": {"0": -100}}
    client = tab.server.client
    with (
        unending(tab.server),
        client.stream("POST", "/v1/completions", json=body),
        client.stream("POST", "/v1/completions", json=body),
    ):
        until(lambda: tab.server.worker.n_running == 2)
        tab.type(QUESTION)
        tab.until(lambda: tab.answers()[0]["state"] == "error")
        problem = tab.answers()[0]["problem"]
        assert problem.startswith("The server is busy: too many requests wait.")
        assert re.search(r"Try again in \d+ s\.", problem)
    until(lambda: tab.server.worker.n_running == 0)
    tab.page.get_by_role("button", name="Try again").click()
    tab.until(lambda: tab.answers()[0]["text"])
    tab.page.keyboard.press("Escape")
    tab.ended()


def test_an_answer_that_takes_too_long(browser: Any) -> None:
    with running(n_ctx=512, timeout=0.5) as server, desk(browser, server) as tab:
        slow(server, 0.2)
        tab.open().type(COUNT)
        tab.until(lambda: tab.answers()[0]["state"] == "error")
        assert tab.answers()[0]["problem"].startswith("The answer took too long.")


def test_a_refused_steering(tab: Desk) -> None:
    tab.watch.expected = {f"{REFUSED} 400"}
    tab.steer("digits-words", layers="7-9")
    response = tab.server.client.get("/v1/steering/digits-words/map", params={"layers": "7-9"})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    chosen = tab.page.locator("#chosen")
    assert chosen.inner_text() == message
    assert "wrong" in (chosen.get_attribute("class") or "")
    tab.type(QUESTION)
    tab.until(lambda: tab.answers()[0]["state"] == "error")
    assert tab.answers()[0]["problem"].startswith("The server refuses this steering.")
    assert message in tab.answers()[0]["problem"]
    tab.set("layers", "nonsense")
    tab.until(lambda: "nonsense" in chosen.inner_text())
    tab.set("layers", "")
    tab.until(lambda: chosen.inner_text() == "2 promoted, 2 suppressed of 120")
    tab.page.get_by_role("button", name="Try again").click()
    assert tab.ended() == ["4"]


def test_a_steering_that_was_deleted(browser: Any, server: Running) -> None:
    mine = {"name": "mine", "map": "digits-words", "reverse": True}
    with registered(server, mine), desk(browser, server) as tab:
        tab.watch.expected = {f"{REFUSED} 404"}
        tab.open().steer("mine")
        assert server.client.delete("/v1/steering/mine").status_code == 204
        tab.type(QUESTION)
        tab.until(lambda: tab.answers()[0]["state"] == "error")
        assert "steering 'mine' is not registered" in tab.answers()[0]["problem"]
        tab.until(lambda: tab.page.input_value("#steering") == "")


#
# other models, other steerings
#


def test_a_bias_file_and_a_map_without_numbers(browser: Any, server: Running, tmp_path: Path) -> None:
    own = ExpertMap.load(shipped_maps()["digits-words"])
    write_bias(BiasFile.from_signs(own.choose(2, 2, reverse=True), own.identity), tmp_path / "b.gguf")
    ready = {"name": "ready", "bias": base64.b64encode((tmp_path / "b.gguf").read_bytes()).decode()}
    bare = {"name": "bare", "map": json.loads(shipped_maps()["digits-words"].read_text("utf-8"))}
    with registered(server, ready, bare), desk(browser, server) as tab:
        tab.open().steer("ready")
        assert not tab.page.locator("#choice").is_visible(), "its choice is made"
        assert tab.page.locator("#about").inner_text().startswith("a bias file: 2 promoted, 2 suppressed, hard rule")
        assert tab.send(QUESTION) == ["four"]
        assert tab.watch.sent[-1]["steering"] == "ready"
        signs = np.array(table(server, "ready")["signs"])
        for layer, expert in np.argwhere(signs):
            assert tab.tooltip(layer, expert)[1] == ("promoted" if signs[layer, expert] > 0 else "suppressed")
        tab.steer("bare")
        assert tab.page.input_value("#activate") == "8"
        tab.again()
        numbers = {"activate": 8, "deactivate": 8, "reverse": False, "mode": "hard"}
        assert tab.watch.sent[-1]["steering"] == {"map": "bare"} | numbers


def test_a_model_without_experts(browser: Any, tmp_path: Path) -> None:
    with mock.patch.object(random_models, "N_VOCAB", 1280):  # of the embedded model's tokenizer
        plain = write_random_model(tmp_path / "plain.gguf", RandomModel("dots1", n_layer=2, n_dense=2))
    (dense,) = copy_model(plain, tmp_path / "dense.gguf", tokenizer_of=TINY)
    with running(model=dense, parallel=1, max_tokens=4) as server, desk(browser, server) as tab:
        tab.open()
        assert tab.page.locator("#steering").is_disabled()
        assert tab.page.locator("#about").inner_text() == "This model has no experts, so nothing can steer it."
        assert not tab.page.locator("#map-card").is_visible()
        assert tab.page.locator("#compare").is_disabled()
        tab.send(QUESTION)
        (answer,) = tab.answers()
        assert answer["state"] == "done"
        assert "4 tokens" in answer["meta"]


def test_the_servers_default(browser: Any) -> None:
    with running(steering="digits-words") as server, desk(browser, server) as tab:
        tab.open()
        assert tab.page.input_value("#steering") == "digits-words"
        assert tab.page.locator("#steering option:checked").inner_text() == "digits-words (default)"
        tab.steer("")
        tab.send(QUESTION)
        assert tab.watch.sent[-1]["steering"] is None, "none is none, whatever the default"
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert tab.page.input_value("#steering") == "", "what was chosen stays"


#
# reload
#


def test_a_reload_keeps_the_chat(tab: Desk) -> None:
    tab.steer("digits-words", reverse=True, activate=3, mode="soft", scale=6)
    tab.page.locator("label.switch").click()
    tab.page.click("#settings summary")
    tab.page.fill("#seed", "5")
    tab.page.fill("#system", "Use words.")
    tab.send(QUESTION)
    tab.send(COUNT)
    before = tab.answers()
    tooltip = tab.tooltip(2, 2)
    tab.page.fill("#message", "not sent yet")
    tab.page.reload()
    tab.page.locator("#state[data-state=ok]").wait_for()
    tab.until(lambda: tab.page.locator("#chosen").inner_text())
    assert tab.answers() == before
    assert len(before) == 4
    page = tab.page
    assert page.input_value("#message") == "not sent yet"
    assert page.input_value("#steering") == "digits-words"
    assert page.locator("#reverse").is_checked()
    assert (page.input_value("#activate"), page.input_value("#scale")) == ("3", "6")
    assert page.locator("#compare").is_checked()
    assert (page.input_value("#seed"), page.input_value("#system")) == ("5", "Use words.")
    assert tab.tooltip(2, 2) == tooltip
    assert tooltip[-1].startswith("used for ")
    tab.again()
    assert tab.watch.sent[-1]["messages"][0]["content"] == "Use words."
    assert len(tab.watch.sent[-1]["messages"]) == 4


def test_a_reload_in_the_middle_of_an_answer(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    tab.until(lambda: len(tab.answers()[0]["text"]) > 20)
    tab.page.reload()
    tab.page.locator("#state[data-state=ok]").wait_for()
    answer = tab.answers()[0]
    assert answer["state"] == "stopped"
    assert len(answer["text"]) > 20
    until(lambda: tab.server.worker.n_running == 0, 5)


@pytest.mark.parametrize(
    "kept",
    [
        "",
        "{",
        "[]",
        '"text"',
        '{"version": 2, "turns": 5}',
        '{"version": 1, "turns": [1, null, {"user": 5}, {"user": "x", "answers": [null, 3]}], "steering": 7, '
        '"choices": 3}',
        '{"version": 1, "turns": [{"user": "x", "answers": [{"text": {"a": 1}, "routing": [[1], "b"], "facts": 3, '
        '"problem": 4, "applied": 5, "state": "running"}]}], "steering": "digits-words", '
        '"choices": {"digits-words": {"activate": "many", "layers": 5, "scale": "x", "reverse": 1}}, "settings": [1]}',
        '{"version": 1, "turns": [{"user": "x", "answers": [{"text": "y", "routing": [[1, 2], [3]], '
        '"applied": {"name": 5, "n_active": "<b>", "layers": {}}, "facts": {"tokens": "z", "seed": {}}}]}]}',
    ],
)
def test_what_the_browser_kept_may_be_anything(browser: Any, server: Running, kept: str) -> None:
    with desk(browser, server) as tab:
        tab.page.add_init_script(
            f"localStorage.getItem('once') ?? localStorage.setItem('steermoe.chat', {json.dumps(kept)});"
        )
        tab.open()
        tab.page.evaluate("() => localStorage.setItem('once', '1')")
        tab.steer("")
        assert tab.send(QUESTION)[0] in ("4", "four")


def test_a_browser_without_room(tab: Desk) -> None:
    tab.page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    assert tab.send(QUESTION) == ["4"]
    tab.until(lambda: tab.page.locator("#notice").inner_text().startswith("This browser has no room"))


def test_clear_and_undo(tab: Desk) -> None:
    tab.send(QUESTION)
    tab.send(COUNT)
    before = tab.answers()
    tab.page.click("#clear")
    assert tab.answers() == []
    assert tab.page.locator("#welcome").is_visible()
    assert tab.kept()["turns"] == []
    assert not tab.page.locator("#use").is_visible()
    tab.page.get_by_role("button", name="Undo").click()
    assert tab.answers() == before
    tab.page.click("#clear")
    tab.send(QUESTION)
    assert tab.watch.sent[-1]["messages"] == [{"role": "user", "content": QUESTION}]
    assert not tab.page.get_by_role("button", name="Undo").is_visible()


def test_clear_in_the_middle_of_an_answer(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    tab.until(lambda: tab.answers()[0]["text"])
    tab.page.click("#clear")
    until(lambda: tab.server.worker.n_running == 0, 5)
    tab.page.locator("#send").wait_for()
    assert tab.answers() == []
    assert not tab.page.locator("#use").is_visible()


#
# text is text
#


def sse(*chunks: dict[str, Any], end: str = "") -> str:
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def test_nothing_becomes_markup(browser: Any, server: Running) -> None:
    """In a prompt, an answer, its reasoning, the names of a map, an error."""
    own = json.loads(shipped_maps()["digits-words"].read_text("utf-8"))
    own["behaviour"] = {"name": MARKUP, "positive": MARKUP, "negative": MARKUP}
    delta = {
        "content": MARKUP + f"\n\n# {MARKUP}\n- {MARKUP}\n```{MARKUP}\n{MARKUP}\n```\n**{MARKUP}**",
        "reasoning_content": MARKUP,
    }
    applied = {"name": MARKUP, "side": MARKUP, "mode": MARKUP, "n_active": 1, "n_inactive": 1, "layers": MARKUP}
    reply = sse({"choices": [{"delta": delta}], "steering": applied}, end="data: [DONE]\n\n")
    error = json.dumps({"error": {"message": MARKUP, "type": MARKUP, "param": MARKUP, "code": MARKUP}})
    hostile = {"name": "hostile", "map": own, "activate": 2}
    with registered(server, hostile), desk(browser, server) as tab:
        tab.watch.expected = {f"{REFUSED} 400"}
        tab.open()
        images = tab.page.locator("img").count()
        tab.steer("hostile")
        tab.tooltip(1, 0)
        tab.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(body=reply, content_type="text/event-stream")
        )
        (text,) = tab.send(MARKUP)
        assert text.count("<img src=x onerror=") >= 5
        tab.page.unroute("**/v1/chat/completions")
        tab.page.route(
            "**/v1/chat/completions",
            lambda route: route.fulfill(status=400, body=error, content_type="application/json"),
        )
        tab.type(MARKUP)
        tab.until(lambda: tab.answers()[-1]["state"] == "error")
        assert MARKUP in tab.answers()[-1]["problem"]
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert tab.page.locator("img").count() == images == 1
        assert tab.page.locator("b, script:not([src])").count() == 0
        assert MARKUP in tab.page.locator(".question").first.inner_text()


def test_a_prompt_with_markup_reaches_the_model(tab: Desk) -> None:
    tab.send(f"Repeat: {MARKUP}")
    assert tab.watch.sent[-1]["messages"][0]["content"] == f"Repeat: {MARKUP}"
    assert tab.page.locator(".question").inner_text().endswith(MARKUP)
    assert tab.page.locator("img").count() == 1


#
# keyboard, screens, taste
#


def test_with_the_keyboard_alone(tab: Desk) -> None:
    """From loading the page: choose, ask, read, stop, without a pointer; and the focus can always be seen."""
    page, press = tab.page, tab.page.keyboard.press

    def active() -> str:
        return str(page.evaluate("() => document.activeElement.id || document.activeElement.textContent.trim()"))

    def seen() -> bool:
        script = """() => {
            const one = document.activeElement;
            const shown = [one, one.nextElementSibling, one.closest("form")].filter(Boolean);
            return shown.map((part) => getComputedStyle(part))
                .some((style) => style.outlineStyle !== "none" && style.outlineWidth !== "0px");
        }"""
        return bool(page.evaluate(script))

    assert active() == "message"
    assert seen()
    visited = []
    while active() != "steering":
        press("Tab")
        visited.append(active())
        assert seen(), visited
        assert len(visited) < 30
    assert visited == ["chip", "send", "steering"], "what can do nothing is left out"
    with tab.new_table():
        press("ArrowDown")
    assert page.input_value("#steering") == "digits-words"
    press("Tab")
    assert active() == "forward"
    assert seen()
    with tab.new_table():
        press("ArrowRight")
    assert page.locator("#reverse").is_checked()
    visited = []
    while active() != "heatmap":
        press("Tab")
        visited.append(active())
        assert seen(), visited
        assert len(visited) < 30
    assert visited == [
        "activate-range", "activate", "deactivate-range", "deactivate", "hard", "layers", "reset",
        "Use it from a program", "enlarge", "heatmap",
    ]  # fmt: skip
    while active() != "compare":
        press("Shift+Tab")
        assert len(visited) < 60
        visited.append(active())
    press("Space")
    assert page.locator("#compare").is_checked()
    press("Shift+Tab")
    assert active() == "message"
    page.keyboard.type("Which number")
    press("Shift+Enter")
    page.keyboard.type("comes after three?")
    assert page.input_value("#message") == "Which number\ncomes after three?"
    press("Control+a")
    page.keyboard.type(QUESTION)
    press("Enter")
    assert tab.ended() == ["4", "four"]
    assert active() == "message"
    for name in ("Applied", "Ask again"):
        press("Shift+Tab")
        assert active() == name
    assert seen()
    press("Enter")
    assert tab.ended() == ["4", "four"]
    assert active() == "message"


def test_the_skip_link_and_what_is_read_out(tab: Desk) -> None:
    page = tab.page
    page.locator(".skip").focus()
    box = page.locator(".skip").bounding_box()
    assert box
    assert box["x"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "message"
    assert page.get_by_role("log", name="Conversation").get_attribute("aria-live") == "polite"
    assert page.get_by_role("main").count() == 1
    for name, role in (
        ("Message", "textbox"),
        ("Side by side", "switch"),
        ("Steering of the next answers", "combobox"),
        ("Send", "button"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name  # type: ignore[arg-type]
    tab.steer("digits-words")
    for name, role in (
        ("digits", "radio"),
        ("words (reverse)", "radio"),
        ("Promote", "slider"),
        ("Experts to promote", "spinbutton"),
        ("Suppress", "slider"),
        ("hard", "radio"),
        ("soft", "radio"),
        ("Layers", "textbox"),
        ("Map of digits-words: 5 layers of 24 experts", "application"),
    ):
        assert page.get_by_role(role, name=name, exact=True).count() == 1, name  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [400, 320])
def test_a_narrow_screen(browser: Any, server: Running, width: int) -> None:
    with desk(browser, server, size=(width, NARROW[1])) as tab:
        page = tab.open().page

        def fits() -> None:
            assert tab.overflow() <= 0
            script = """() => [...document.querySelectorAll("button, input, select, textarea, canvas, p, h2")]
                .filter((one) => {
                    const box = one.getBoundingClientRect();
                    const apart = one.closest(".map-scroll, .hidden, .segments");
                    return box.width > 1 && !apart && box.right > innerWidth + 0.5;
                }).map((one) => one.id || one.className || one.textContent)"""
            assert page.evaluate(script) == []

        fits()
        tab.steer("digits-words", mode="soft")
        assert not page.locator("#message").is_visible(), "one part at a time"
        for part in ("#settings", "#program", "#experts"):
            page.click(f"{part} summary")
            fits()
        page.click("#view-chat")
        page.locator("label.switch").click()
        tab.send(COUNT)
        tab.send("x" * 300)
        fits()
        boxes = [page.locator(".answer").nth(i).bounding_box() for i in (0, 1)]
        assert boxes[0]
        assert boxes[1]
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"], "one below the other"
        page.locator(".answer.steered").first.get_by_role("button", name="Experts used").click()
        assert page.locator("#heatmap").is_visible(), "it leads to the map"
        assert tab.tooltip(1, 0)[0] == "Layer 1, expert 0"
        tip = page.locator("#tooltip").bounding_box()
        assert tip
        assert tip["x"] >= 0
        assert tip["x"] + tip["width"] <= width
        fits()
        page.mouse.move(1, 1)
        page.click("#enlarge")
        fits()
        page.keyboard.press("Escape")
        page.click("#open-key")
        fits()


def test_dark_and_light_and_still(browser: Any, server: Running) -> None:
    backs = {}
    for scheme in ("light", "dark"):
        with desk(browser, server, color_scheme=scheme, reduced_motion="reduce") as tab:
            tab.open().steer("digits-words")
            backs[scheme] = tab.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
            other = "dark" if scheme == "light" else "light"
            before = tab.pixels(1, 5)
            tab.page.emulate_media(color_scheme=other)  # type: ignore[arg-type]
            tab.until(lambda before=before: tab.pixels(1, 5) != before)  # the map is drawn anew
            tab.page.route("**/v1/chat/completions", lambda route: None)  # an answer that does not come
            tab.type(QUESTION)
            tab.page.locator("#stop").wait_for()
            moving = """() => [...document.querySelectorAll("*")]
                .flatMap((one) => [null, "::after", "::before"].map((part) => getComputedStyle(one, part)))
                .filter((style) => style.animationName !== "none" || parseFloat(style.transitionDuration) > 0)
                .length"""
            assert tab.page.evaluate(moving) == 0
            tab.page.emulate_media(reduced_motion="no-preference")
            assert tab.page.evaluate(moving) > 0
            tab.page.keyboard.press("Escape")
            tab.ended()
    dark, light = (sum(map(int, re.findall(r"\d+", backs[scheme]))) for scheme in ("dark", "light"))
    assert dark < 120
    assert light > 600


def test_long_answers_are_drawn_once_a_frame_and_followed(browser: Any, server: Running) -> None:
    """4000 chunks at once cost few drawings; the page stays at the end unless its reader went up."""
    chunks = [
        {"choices": [{"delta": {"content": f"word{i} " + ("\n\n" if i % 40 == 39 else "")}}]} for i in range(4000)
    ]
    reply = sse(*chunks, end="data: [DONE]\n\n")
    with desk(browser, server) as tab:
        tab.open()
        tab.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(body=reply, content_type="text/event-stream")
        )
        tab.page.evaluate("""() => {
            window.drawn = 0;
            new MutationObserver((records) => {
                if (records.some((record) => record.target.closest?.(".text"))) window.drawn++;
            }).observe(document.getElementById("log"), { childList: true, subtree: true });
        }""")
        (text,) = tab.send(QUESTION)
        assert text.split() == [f"word{i}" for i in range(4000)]
        assert 1 <= tab.page.evaluate("() => window.drawn") <= 100
        gap = """() => {
            const { scrollHeight, scrollTop, clientHeight } = document.getElementById("scroll");
            return scrollHeight - scrollTop - clientHeight;
        }"""
        assert tab.page.evaluate(gap) < 2
        tab.page.evaluate("() => document.getElementById('scroll').scrollTo(0, 100)")
        tab.page.locator("#latest").click()
        assert tab.page.evaluate(gap) < 2
        tab.page.locator("#latest").wait_for(state="hidden")
