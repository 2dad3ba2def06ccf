"""Choosing a score, weights and a cap on the page: what the map has is offered, what is chosen is sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from steermoe_local.maps.ranks import RANKS
from steermoe_local.steering.steering import Steering
from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import COUNT
from tests.support.running_server import Running, running
from tests.support.scored_maps import save_scored, scored_map

pytestmark = browsers.marks()

SCORED = scored_map()


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("maps")
    save_scored(folder / "scored.json")
    choice = {"map": "scored", "activate": 3, "deactivate": 2, "rank": "effect", "cap": "inf"}
    (folder / "own.choice.json").write_text(json.dumps(choice))
    with running(n_ctx=512, maps_folder=folder) as found:
        yield found


@pytest.fixture
def page(browser: Any, scores: Running) -> Iterator[Desk]:
    with desk(browser, scores) as made:
        yield made.open()


def options(page: Desk, name: str) -> list[str]:
    return list(page.page.locator(f"#{name} option").evaluate_all("(all) => all.map((one) => one.value)"))


def test_a_map_offers_the_scores_that_it_has(page: Desk) -> None:
    page.steer("scored")
    assert page.page.locator("#rank").is_visible()
    assert options(page, "rank") == list(RANKS)
    assert not page.page.locator("#weights").is_visible()
    page.set("mode", "soft")
    assert page.page.locator("#weights").is_visible()
    assert options(page, "weights") == ["", *RANKS[1:5]]
    page.steer("digits-words", mode="soft")
    assert options(page, "rank") == ["rd", "log-odds"]
    assert options(page, "weights") == ["", "log-odds"]


CHOICES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rank": ({"rank": "effect"}, {"rank": "effect"}, "by effect"),
    "capped": ({"mode": "capped", "cap": 2.5}, {"cap": 2.5}, "capped rule, 2.5 logits"),
    "weighted": (
        {"mode": "soft", "scale": 3, "weights": "logit"},
        {"scale": 3.0, "weights": "logit"},
        "soft rule, 3 logits by logit",
    ),
    "both": ({"rank": "logit", "mode": "capped", "cap": 1}, {"rank": "logit", "cap": 1.0}, "capped rule, 1 logits"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_is_chosen_is_sent_and_marked(page: Desk, name: str) -> None:
    chosen, fields, words = CHOICES[name]
    page.steer("scored", activate=4, deactivate=3, **chosen)
    bias = Steering("m", SCORED, activate=4, deactivate=3, **fields).build()
    assert bias is not None
    assert page.page.locator("#chosen").inner_text().startswith(f"{bias.n_active} promoted, {bias.n_inactive} suppr")
    for layer, expert in np.argwhere(bias.signs)[:3]:
        word = "promoted" if bias.signs[layer, expert] > 0 else "suppressed"
        assert any(word in line for line in page.tooltip(layer, expert))
    page.send(COUNT)
    sent = page.watch.sent[-1]["steering"]
    assert sent["map"] == "scored"
    served = page.server.chat(COUNT, steering=sent).json()["steering"]
    assert served["bias_sha256"] == bias.key
    assert words in page.answers()[-1]["meta"]
    assert json.loads("{" + (page.page.locator("#snippet").text_content() or "") + "}")["steering"] == sent


def test_a_choice_survives_a_reload_and_is_reset(page: Desk) -> None:
    page.steer("own")
    assert page.page.input_value("#rank") == "effect"
    assert page.page.locator("#capped").is_checked()
    assert page.page.input_value("#cap") == "", "an infinite cap has no number"
    page.send(COUNT)
    assert page.watch.sent[-1]["steering"] == "own"
    for field, value in (("rank", "weight"), ("cap", 3)):
        with page.new_table():
            page.set(field, value)
    page.page.reload()
    page.page.locator("#state[data-state=ok]").wait_for()
    page.until(lambda: page.page.locator("#chosen").inner_text())
    assert (page.page.input_value("#rank"), page.page.input_value("#cap")) == ("weight", "3")
    page.send(COUNT)
    sent = page.watch.sent[-1]["steering"]
    assert (sent["rank"], sent["mode"], sent["cap"]) == ("weight", "capped", 3)
    with page.new_table():
        page.page.click("#reset")
    page.send(COUNT)
    assert page.watch.sent[-1]["steering"] == "own"


def test_rules_exclude_each_other(page: Desk) -> None:
    page.steer("scored", mode="soft", weights="logit")
    for mode, shown in (("capped", "#limit"), ("hard", None), ("soft", "#strength")):
        page.set("mode", mode)
        for place in ("#limit", "#strength"):
            assert page.page.locator(place).is_visible() == (place == shown)
    page.send(COUNT)
    assert "weights" not in page.watch.sent[-1]["steering"], "the rule begins anew"


@pytest.mark.parametrize("kept", [{"rank": "x"}, {"cap": -1}, {"cap": "x"}, {"weights": "rd", "scale": 2}, {"rank": 5}])
def test_what_a_browser_kept_is_checked(browser: Any, scores: Running, kept: dict[str, Any]) -> None:
    state = {"version": 1, "steering": "scored", "choices": {"scored": {"activate": 2, "deactivate": 2} | kept}}
    with desk(browser, scores) as page:
        page.page.add_init_script(f"localStorage.setItem('steermoe.chat', {json.dumps(json.dumps(state))});")
        page.open()
        page.until(lambda: page.page.locator("#chosen").inner_text())
        page.send(COUNT)
        assert page.answers()[-1]["state"] == "done"
        sent = page.watch.sent[-1]["steering"]
    assert (sent["map"], sent["activate"]) == ("scored", 2)
    assert not {"rank", "weights", "cap"} & set(sent)
