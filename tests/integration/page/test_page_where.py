"""Where the chosen steering is in force: the phase picker of the page, and registered plans."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from steermoe_local import UsageError
from steermoe_local.steering.plan_objects import rules_from
from steermoe_local.steering.plan_text import format_rule
from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import COUNT, MARKUP, QUESTION, marked
from tests.support.running_server import Running

pytestmark = browsers.marks()

RULES = ["answer[0:4] after 'Answer:': digits-words +6 -6", f"thinking: {MARKUP}", "all: none"]


@contextmanager
def mocked(browser: Any, server: Running, *, plans: dict[str, list[str]] | None = None, **meta: Any) -> Iterator[Desk]:
    """The page, with plans among the names, facts of the model, and an answer that comes whatever was asked."""

    def listed(route: Any) -> None:
        data = server.client.get("/v1/steering").json()
        data["data"] += [
            {"name": name, "kind": "plan", "rules": rules, "source": "folder"} for name, rules in (plans or {}).items()
        ]
        route.fulfill(json=data)

    def models(route: Any) -> None:
        data = server.client.get("/v1/models").json()
        data["data"][0]["meta"] |= meta
        route.fulfill(json=data)

    reply = marked([("an", None, False), (" answer", 0, False)], None)
    with desk(browser, server) as tab:
        tab.page.route("**/v1/steering", listed)
        tab.page.route("**/v1/models", models)
        tab.page.route(
            "**/v1/chat/completions", lambda route: route.fulfill(body=reply, content_type="text/event-stream")
        )
        yield tab.open()


def sent(tab: Desk) -> Any:
    tab.send(QUESTION)
    snippet = json.loads("{" + (tab.page.locator("#snippet").text_content() or "") + "}")
    assert snippet["steering"] == tab.watch.sent[-1]["steering"], "programs are told the same"
    return snippet["steering"]


CHOSEN: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "prompt": (("prompt",), {"phase": "prompt"}, "prompt"),
    "thinking": (("thinking",), {"phase": "thinking"}, "thinking"),
    "answer": (("answer",), {"phase": "answer"}, "answer"),
    "window": (("answer", "2", "32"), {"phase": "answer", "tokens": [2, 32]}, "answer[2:32]"),
    "beginning": (("answer", "", "16"), {"phase": "answer", "tokens": [0, 16]}, "answer[0:16]"),
    "rest": (("thinking", "16", ""), {"phase": "thinking", "tokens": [16, None]}, "thinking[16:]"),
    "from the end": (("prompt", "-1", ""), {"phase": "prompt", "tokens": [-1, None]}, "prompt[-1:]"),
}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_chosen_is_one_rule(browser: Any, server: Running, name: str) -> None:
    chosen, where, words = CHOSEN[name]
    with mocked(browser, server) as tab:
        tab.steer("digits-words")
        tab.place(*chosen)
        asked = sent(tab)
        assert asked == {"rules": [where | {"map": "digits-words"}]}, "as it is registered: the name is enough"
        tab.steer("digits-words", activate=6, mode="soft")
        asked = sent(tab)
        choice = {"map": "digits-words", "activate": 6, "deactivate": 4, "reverse": False, "mode": "soft", "scale": 4}
        assert asked == {"rules": [where | choice]}
        (rule,) = rules_from(asked["rules"])
        assert format_rule(rule).startswith(f"{words}: digits-words +6 -4"), "it is a rule of a plan"
        assert tab.page.locator("#chip").inner_text().endswith(f"soft 4 \u00b7 {words}")
        assert tab.page.locator("#chosen").inner_text() == "6 promoted, 4 suppressed of 120", "the map as ever"
        tab.place("all")
        assert not tab.page.locator("#window").is_visible()
        assert sent(tab) == choice, "for all tokens the choice as ever"


def test_it_is_kept_for_each_steering(browser: Any, server: Running) -> None:
    with mocked(browser, server) as tab:
        tab.steer("digits-words")
        tab.place("prompt", "-4", "-1")
        tab.steer("document-memory")
        assert tab.page.locator("#phase-all").is_checked()
        tab.place("answer", "1", "")
        tab.until(lambda: "document-memory" in tab.kept().get("choices", {}))
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert tab.page.locator("#phase-answer").is_checked()
        assert (tab.page.input_value("#window-start"), tab.page.input_value("#window-stop")) == ("1", "")
        tab.steer("digits-words")
        assert sent(tab) == {"rules": [{"phase": "prompt", "tokens": [-4, -1], "map": "digits-words"}]}
        tab.page.click("#reset")
        assert tab.page.locator("#phase-all").is_checked()
        assert sent(tab) == "digits-words"
        tab.steer("")
        assert not tab.page.locator("#where").is_visible()
        assert sent(tab) is None


@pytest.mark.parametrize("where", [5, {"phase": "x"}, {"phase": "answer", "start": -3, "stop": "9"}, {"start": 1e99}])
def test_what_a_browser_kept_is_checked(browser: Any, server: Running, where: Any) -> None:
    state = {"version": 1, "steering": "digits-words", "choices": {"digits-words": {"where": where}}}
    with mocked(browser, server) as tab:
        tab.page.add_init_script(f"localStorage.setItem('steermoe.chat', {json.dumps(json.dumps(state))});")
        tab.open()
        tab.until(lambda: tab.page.locator("#chosen").inner_text())
        phase = "answer" if isinstance(where, dict) and where.get("phase") == "answer" else "all"
        assert tab.page.locator(f"#phase-{phase}").is_checked()
        assert sent(tab) in ("digits-words", {"rules": [{"phase": "answer", "map": "digits-words"}]})


def test_a_window_without_tokens_is_told(browser: Any, server: Running) -> None:
    with mocked(browser, server) as tab:
        tab.steer("digits-words")
        tab.place("answer", "8", "3")
        told = tab.page.locator("#where-help")
        assert "answer[8:3]" in told.inner_text()
        assert "wrong" in (told.get_attribute("class") or "")
        for name in ("start", "stop"):
            field = tab.page.locator(f"#window-{name}")
            assert field.get_attribute("aria-invalid") == "true"
            assert field.get_attribute("aria-describedby") == "where-help"
        tab.place("answer", "3", "8")
        assert "wrong" not in (told.get_attribute("class") or "")
        tab.place("prompt", "-8", "3")
        assert "wrong" not in (told.get_attribute("class") or ""), "from the eighth last to the third: perhaps some"
        tab.place("prompt", "-3", "0")
        assert "prompt[-3:0]" in told.inner_text()
        assert "wrong" in (told.get_attribute("class") or "")
        with pytest.raises(UsageError):
            rules_from(["prompt[-3:0]: none"])


@pytest.mark.parametrize(
    ("reasoning", "hint"), [(None, "has no thinking"), ("unknown", "counts as answer"), ("separated", "")]
)
def test_thinking_is_offered_with_a_hint(browser: Any, server: Running, reasoning: str | None, hint: str) -> None:
    with mocked(browser, server, reasoning=reasoning) as tab:
        tab.steer("digits-words")
        told = tab.page.locator("#where-help")
        tab.place("answer")
        assert "has no thinking" not in told.inner_text()
        tab.place("thinking")
        assert hint in told.inner_text()
        assert ("no thinking" in told.inner_text()) == (reasoning is None)
        assert sent(tab)["rules"][0]["phase"] == "thinking"


def test_by_the_keyboard_and_by_name(browser: Any, server: Running) -> None:
    with mocked(browser, server) as tab:
        tab.steer("digits-words")
        page = tab.page
        for name, role in (
            ("all", "radio"),
            ("prompt", "radio"),
            ("thinking", "radio"),
            ("answer", "radio"),
            ("Where", "group"),
        ):
            assert page.get_by_role(role, name=name, exact=True).count() == 1, name  # type: ignore[arg-type]
        page.locator("#phase-all").focus()
        for _ in range(3):
            page.keyboard.press("ArrowRight")
        assert page.locator("#phase-answer").is_checked()
        page.keyboard.press("Tab")
        page.keyboard.type("4")
        page.keyboard.press("Tab")
        page.keyboard.type("8")
        page.keyboard.press("Tab")
        assert page.get_by_role("spinbutton", name="From token").input_value() == "4"
        assert page.get_by_role("group", name="Tokens").is_visible()
        assert page.evaluate("() => document.activeElement.id") == "reset"
        assert sent(tab)["rules"][0]["tokens"] == [4, 8]


def test_side_by_side_with_a_phase(browser: Any, server: Running) -> None:
    with mocked(browser, server) as tab:
        tab.steer("digits-words")
        tab.place("answer")
        tab.page.locator("label.switch").click()
        tab.send(COUNT)
        assert [one["steering"] for one in tab.watch.sent] == [
            None,
            {"rules": [{"phase": "answer", "map": "digits-words"}]},
        ]


def test_a_plan_shows_its_rules(browser: Any, server: Running) -> None:
    with mocked(browser, server, plans={"careful-start": RULES}) as tab:
        tab.page.select_option("#steering", "careful-start")
        shown = tab.page.locator("#plan-rules li")
        assert shown.all_inner_texts() == RULES, "as text"
        for place in ("#where", "#choice", "#reset"):
            assert not tab.page.locator(place).is_visible(), "a plan says where itself"
        assert tab.page.locator("#about").inner_text() == "a plan \u00b7 from the maps folder"
        assert tab.page.locator("#chip").inner_text() == "careful-start"
        assert "steerings of its own" in tab.page.locator("#meaning").inner_text()
        assert sent(tab) == "careful-start"
        tab.steer("digits-words")
        assert not tab.page.locator("#plan").is_visible()
        assert tab.page.locator("#where").is_visible()
