"""Errors on the page: busy servers, lost connections, refused requests."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import COUNT, OFF, QUESTION, REFUSED, registered, sse
from tests.support.running_server import Running, running, unending, until

pytestmark = browsers.marks()

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
        assert tab.answers()[-1]["problem"].startswith("The server does not accept")
        page.fill("#key", "the right key")
        page.keyboard.press("Enter")
        page.get_by_role("button", name="Try again").click()
        assert tab.ended()[0].startswith("3")


def test_the_server_goes_away(browser: Any) -> None:
    with running(n_ctx=512, parallel=2) as server, desk(browser, server) as tab, unending(server, most=4):
        tab.watch.expected = {OFF, f"{REFUSED} 503"}
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
    assert tab.answers()[-1]["problem"].startswith("The server does not")
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
        assert problem.startswith("The server is busy")
        assert re.search(r"Try again in \d+ s\.", problem)
    until(lambda: tab.server.worker.n_running == 0)
    tab.page.get_by_role("button", name="Try again").click()
    tab.until(lambda: tab.answers()[0]["text"])
    tab.page.keyboard.press("Escape")
    tab.ended()


def test_an_answer_that_takes_too_long(browser: Any) -> None:
    with running(n_ctx=512, timeout=3600) as server, desk(browser, server) as tab, unending(server, most=4):
        tab.open().type(COUNT)
        tab.until(lambda: tab.answers()[0]["text"])
        (entry,) = server.worker._running.values()
        entry.ticket.deadline = 0.0
        tab.until(lambda: tab.answers()[0]["state"] == "error")
        assert tab.answers()[0]["problem"].startswith("The answer took")


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
    assert tab.answers()[0]["problem"].startswith("The server refuses")
    assert message in tab.answers()[0]["problem"]
    tab.set("layers", "nonsense")
    tab.until(lambda: "nonsense" in chosen.inner_text())
    tab.set("layers", "")
    tab.until(lambda: chosen.inner_text() == "2 promoted, 4 suppressed of 120")
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
        assert "'mine' is not registered" in tab.answers()[0]["problem"]
        tab.until(lambda: tab.page.input_value("#steering") == "")
