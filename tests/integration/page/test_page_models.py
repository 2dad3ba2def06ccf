"""The page with other models and steerings, and when it is loaded again."""

from __future__ import annotations

import base64
import json
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
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import COUNT, QUESTION, registered, table
from tests.support.random_models import RandomModel, write_random_model
from tests.support.running_server import TINY, Running, running, until

pytestmark = browsers.marks()

#
# other models, other steerings
#


def test_a_bias_file_and_a_map_without_numbers(browser: Any, server: Running, tmp_path: Path) -> None:
    own = ExpertMap.load(shipped_maps()["digits-words"])
    write_bias(BiasFile.from_signs(own.choose(2, 2, reverse=True), own.identity), tmp_path / "b.gguf")
    ready = {"name": "ready", "bias": base64.b64encode((tmp_path / "b.gguf").read_bytes()).decode()}
    bare = {"name": "bare", "map": json.loads(shipped_maps()["digits-words"].read_text("utf-8"))}
    del bare["map"]["recommended"]
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
        assert tab.page.input_value("#activate") == "0", "nobody makes numbers up"
        tab.page.wait_for_function("document.getElementById('chosen').textContent.includes('no numbers of experts')")
        for name in ("activate", "deactivate"):
            tab.page.fill(f"#{name}", "8")
            tab.page.locator(f"#{name}").dispatch_event("change")
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
    until(lambda: tab.server.worker.n_running == 0)


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
    until(lambda: tab.server.worker.n_running == 0)
    tab.page.locator("#send").wait_for()
    assert tab.answers() == []
    assert not tab.page.locator("#use").is_visible()
