"""Texts of models and people stay text on the page."""

from __future__ import annotations

import json
from typing import Any

from steermoe_local.models.shipped_maps import shipped_maps
from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import MARKUP, REFUSED, registered, sse
from tests.support.running_server import Running

pytestmark = browsers.marks()

#
# text is text
#


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
