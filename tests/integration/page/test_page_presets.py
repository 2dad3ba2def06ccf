"""A preset's numbers on the page, for an imported ranking of one of the paper's models."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.paper_models import paper_model, ranking
from tests.support.running_server import Running, running

pytestmark = browsers.marks()


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("olmoe")
    model, maps = paper_model(folder), folder / "maps"
    maps.mkdir()
    for name, behaviour in (("authors", "faithfulness"), ("unnamed", "something")):
        ranking(model, behaviour).save(maps / f"{name}.json")
    with running(model=model, n_ctx=64, parallel=1, maps_folder=maps) as found:
        yield found


@pytest.fixture
def page(browser: Any, olmoe: Running) -> Iterator[Desk]:
    with desk(browser, olmoe) as made:
        yield made.open()


def numbers(page: Desk) -> tuple[str, str]:
    return page.page.input_value("#activate"), page.page.input_value("#deactivate")


def test_a_ranking_begins_with_its_presets_numbers(page: Desk) -> None:
    page.steer("authors")
    assert numbers(page) == ("0", "50")
    assert page.page.locator("#preset-buttons button").all_inner_texts() == ["faithful +0 \u221250"]
    assert "50 suppressed" in page.page.locator("#chosen").inner_text()
    snippet = page.page.locator("#snippet").text_content() or ""
    assert '"activate": 0' in snippet
    assert '"deactivate": 50' in snippet


def test_a_preset_is_chosen_by_its_button(page: Desk) -> None:
    """Both fit a map of unknown words: it begins with no experts, and the buttons choose."""
    page.steer("unnamed")
    assert numbers(page) == ("0", "0"), "no numbers are made up where none are recommended"
    assert "no experts" in page.page.locator("#chip").inner_text()
    buttons = page.page.locator("#preset-buttons button")
    assert buttons.all_inner_texts() == ["faithful +0 \u221250", "safe +5 \u22120"]
    page.page.check("#reverse", force=True)
    with page.new_table():
        buttons.last.click()
    assert numbers(page) == ("5", "0")
    assert page.page.is_checked("#forward"), "a preset is for the positive side"
    assert page.page.evaluate("() => document.activeElement.textContent") == "safe +5 \u22120", "the focus stays"


def test_no_preset_for_other_models(tab: Desk) -> None:
    tab.steer("digits-words")
    assert not tab.page.locator("#presets").is_visible()
