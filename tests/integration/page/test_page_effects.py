"""The page on a map with effects of interventions: the switch between RD and effects, numbers, the list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from steermoe_local import Effects, ExpertMap
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import registered
from tests.support.random_effects import effects, random_effects
from tests.support.running_server import Running

pytestmark = browsers.marks()


@pytest.fixture(scope="module")
def tried() -> ExpertMap:
    made = ExpertMap.load(shipped_maps()["digits-words"])
    return replace(made, effects=random_effects(made.rd.shape, n=60))


def found(expert_map: ExpertMap) -> Effects:
    assert expert_map.effects is not None
    return expert_map.effects


def body(expert_map: ExpertMap, name: str = "tried") -> dict[str, Any]:
    return {"name": name, "map": json.loads(expert_map.to_json()), "activate": 2, "deactivate": 2}


@pytest.fixture
def shown(browser: Any, server: Running, tried: ExpertMap) -> Iterator[Desk]:
    """The page with the map that has effects chosen."""
    with registered(server, body(tried)), desk(browser, server) as made:
        made.open().steer("tried")
        yield made


def choose(tab: Desk, what: str) -> None:
    tab.page.locator(f"#shown label:has(input[value={what}])").click()


def open_list(tab: Desk) -> None:
    """Open the list of experts, and wait until it has rows."""
    tab.page.click("#experts summary")
    tab.page.locator("#expert-rows tr").first.wait_for()


def test_the_tooltip_tells_what_the_map_says(shown: Desk, tried: ExpertMap) -> None:
    words = {"promote": "promoting", "suppress": "suppressing"}
    signs = tried.choose(2, 2)
    for layer in range(5):
        for expert in range(0, 24, 3):
            lines = shown.tooltip(layer, expert)
            wanted = [f"Layer {layer}, expert {expert}"]
            rd = tried.rd[layer, expert]
            wanted.append(f"RD {rd:+.3f}" if round(abs(rd), 3) else "RD 0.000")
            for action, row in found(tried).at(layer, expert).items():
                line = f"{words[action]} {row['effect']:+.3f} ± {row['effect_se']:.3f} nats, cost {row['cost']:.3f}"
                line += "" if row["significant"] else ", not significant"
                wanted.append(line + (", random control" if row["control"] else ""))
            wanted += {0: [], 1: ["promoted"], -1: ["suppressed"]}[int(signs[layer, expert])]
            assert lines == wanted


def test_the_switch_colours_by_effect(shown: Desk, tried: ExpertMap) -> None:
    page = shown.page
    radios = page.locator("#shown input")
    assert [radios.nth(i).get_attribute("value") for i in range(3)] == ["rd", "promote", "suppress"]
    assert page.locator("#shown input:checked").get_attribute("value") == "rd"
    assert (page.locator("#meaning").text_content() or "").startswith("RD, the risk difference")
    for what, action in (("promote", 1), ("suppress", -1)):
        choose(shown, what)
        page.mouse.move(5, 5)
        table = found(tried).table(action, "effect", (5, 24))
        for at in (np.nanargmax(table), np.nanargmin(table)):
            place = divmod(int(at), 24)
            red, _, blue = np.median(shown.pixels(*place), axis=0)
            assert (red > blue + 60) if table[place] > 0 else (blue > red + 40)
        untried = next((layer, expert) for layer, expert in np.argwhere(np.isnan(table)).tolist() if expert > 7)
        colours = np.unique(shown.pixels(*untried), axis=0)
        assert np.ptp(colours, axis=1).max() < 30, "not tried: grey"
        least = divmod(int(np.nanargmin(np.abs(table))), 24)
        drawn = [np.any(shown.pixels(*at), axis=1).mean() for at in (untried, least)]  # the others are transparent
        assert drawn[0] < 0.3 < 0.7 < drawn[1], "and smaller than a cell with a value, also one near 0"
        largest = np.nanmax(np.abs(table))
        assert page.locator("#legend-high").inner_text() == f"+{largest:.2f}"
        assert what in (page.locator("#heatmap").get_attribute("aria-label") or "")
        meaning = page.locator("#meaning").text_content() or ""
        assert "24 pairs" in meaning
        assert f"R2 {found(tried).facts.r2[what]:.2f}" in meaning
    shown.set("activate", 3)
    with shown.new_table():
        shown.set("activate", 4)
    assert page.locator("#shown input:checked").get_attribute("value") == "suppress", "kept while numbers change"
    choose(shown, "rd")
    assert page.locator("#legend-high").inner_text() == "+1.00"


def test_the_switch_by_keyboard(shown: Desk) -> None:
    page = shown.page
    page.locator("#shown input:checked").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#shown input:checked").get_attribute("value") == "promote"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator("#shown input:checked").get_attribute("value") == "rd"
    page.keyboard.press("ArrowLeft")
    tree = page.locator("#shown").aria_snapshot()
    for name in ('group "Colour"', 'radio "RD"', 'radio "effect of the action promote"', "[checked]"):
        assert name in tree
    page.keyboard.press("Tab")
    page.locator("#heatmap").focus()
    page.keyboard.press("ArrowRight")
    lines = shown.shown_tooltip()
    assert lines[0] == "Layer 0, expert 1"
    assert (page.locator("#map-live").text_content() or "").replace("\u2212", "-") == ", ".join(lines)


def test_the_list_has_both(shown: Desk, tried: ExpertMap) -> None:
    open_list(shown)
    heads = shown.page.locator("#experts th").all_inner_texts()
    assert heads == ["layer", "expert", "RD", "promote", "suppress", "chosen", "used"]
    rows = [row.split("\t") for row in shown.page.locator("#expert-rows tr").all_inner_texts()]
    assert len(rows) == np.count_nonzero(tried.choose(2, 2))
    for layer, expert, _, promote, suppress, word, _ in rows:
        of = found(tried).at(int(layer), int(expert))
        for action, cell in (("promote", promote), ("suppress", suppress)):
            row = of.get(action)
            assert cell.replace("\u2212", "-") == (
                "" if row is None else f"{row['effect']:+.3f}{'*' if row['significant'] else ''}"
            )
        assert word in ("promoted", "suppressed")


def test_a_map_without_effects_has_no_switch(shown: Desk) -> None:
    choose(shown, "suppress")
    shown.steer("document-memory")
    assert not shown.page.locator("#shown").is_visible()
    assert len(shown.tooltip(0, 0)) == 2
    open_list(shown)
    assert shown.page.locator("#experts th").all_inner_texts().count("") == 0
    assert shown.page.locator("#column-promote").is_hidden()
    assert {len(row.split("\t")) for row in shown.page.locator("#expert-rows tr").all_inner_texts()} == {5}
    shown.steer("tried")
    assert shown.page.locator("#shown").is_visible()
    assert shown.page.locator("#shown input:checked").get_attribute("value") == "rd"


def test_one_action_and_a_hostile_name(browser: Any, server: Running, tried: ExpertMap) -> None:
    name = "<img src=x onerror=alert(1)>"
    only = effects(
        {"layer": 1, "expert": 2, "action": "suppress", "effect": -0.5}, response=name, actions=("suppress",)
    )
    made = replace(tried, effects=only)
    with registered(server, body(made, "one")), desk(browser, server) as tab:
        tab.open().steer("one")
        assert tab.page.locator("#shown input").count() == 2
        choose(tab, "suppress")
        assert f"24 items of {name}" in (tab.page.locator("#meaning").text_content() or "")
        assert tab.page.locator("#map img").count() == 0
        assert tab.tooltip(1, 2)[2] == "suppressing -0.500 ± 0.125 nats, not significant"
        assert tab.overflow() <= 0
