"""The map on the page: pictures of experts, numbers, what is chosen."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support import browser as browsers
from tests.support.page_desk import Desk
from tests.support.page_requests import COUNT, table
from tests.support.running_server import Running

pytestmark = browsers.marks()

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
    # red for RD > 0, blue for RD < 0, the stronger the farther from grey
    strongest = [tuple(divmod(int(at), 24)) for at in (rd.argmax(), rd.argmin())]
    (red, _, blue), (red2, _, blue2) = (np.median(tab.pixels(*at), axis=0) for at in strongest)
    assert red > blue + 80
    assert blue2 > red2 + 40
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
    assert len(rows) == expected["n_active"] + expected["n_inactive"] == 3 + 4
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
    assert tab.overflow() <= 0
    box = tab.page.locator("#map-scroll").evaluate("(box) => [box.scrollWidth, box.clientWidth]")
    assert box[0] <= box[1], "the smallest cells are small enough"
