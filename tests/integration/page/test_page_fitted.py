"""A map that recommends fitted values, on the page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from steermoe_local import ExpertMap
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.models.shipped_maps import map_path
from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import REFUSED
from tests.support.running_server import Running, running

pytestmark = browsers.marks()

VALUES = ((0, 1, 2.0), (2, 3, -1.0), (4, 0, 0.5))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    maps = tmp_path_factory.mktemp("maps")
    with_recommended(ExpertMap.load(map_path("digits-words")), Recommended({}, values=VALUES)).save(maps / "own.json")
    with running(parallel=1, maps_folder=maps) as found:
        yield found


@pytest.fixture
def page(browser: Any, fitted: Running) -> Iterator[Desk]:
    with desk(browser, fitted) as made:
        yield made.open()


def request_of(page: Desk) -> Any:
    text = page.page.locator("#snippet").text_content() or ""
    return json.loads(text.removeprefix('"steering": '))


def told(page: Desk) -> str:
    return str(page.page.locator("#chosen").inner_text())


def test_fitted_values_are_shown_and_steer(page: Desk) -> None:
    page.steer("own")
    assert "fitted values of 3 experts" in page.page.locator("#about").inner_text()
    assert told(page) == "fitted values of 3 experts: 2 promoted, 1 suppressed of 120"
    assert request_of(page) == "own"
    with page.new_table():
        page.page.check("#reverse", force=True)
    assert request_of(page) == {"map": "own", "reverse": True, "mode": "soft", "scale": 1}
    assert told(page) == "fitted values of 3 experts: 1 promoted, 2 suppressed of 120"
    page.send("Which number comes after three?")
    said = page.page.locator(".turn").last.inner_text()
    assert "1 promoted" in said
    assert "2 suppressed" in said


def test_numbers_are_instead_of_them(page: Desk) -> None:
    page.steer("own")
    with page.new_table():
        page.page.fill("#activate", "2")
        page.page.press("#activate", "Enter")
    assert told(page) == "2 promoted, 0 suppressed of 120"
    asked = request_of(page)
    assert (asked["activate"], asked["deactivate"]) == (2, 0)
    with page.new_table():
        page.page.fill("#activate", "0")
        page.page.press("#activate", "Enter")
    assert told(page).startswith("fitted values of 3 experts")
    page.watch.expected = {f"{REFUSED} 400"}
    with page.new_table():
        page.page.check("#hard", force=True)
    assert "give numbers of experts" in told(page), "values have no hard rule"
