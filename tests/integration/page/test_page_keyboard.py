"""The page by keyboard, on narrow screens, and in other tastes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support import browser as browsers
from tests.support.page_desk import NARROW, Desk, desk
from tests.support.page_requests import COUNT, QUESTION, sse
from tests.support.running_server import Running

pytestmark = browsers.marks()

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
        "activate-range", "activate", "deactivate-range", "deactivate", "rank", "hard", "layers", "phase-all", "reset",
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
        ("Where", "group"),
        ("thinking", "radio"),
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
                    const end = Math.min(innerWidth, one.closest(".card")?.getBoundingClientRect().right ?? Infinity);
                    return box.width > 1 && !apart && box.right > end + 0.5;
                }).map((one) => one.id || one.className || one.textContent)"""
            assert page.evaluate(script) == []
            cut = """() => [...document.querySelectorAll("#rule span, #phase span, #direction")].filter((one) =>
                one.checkVisibility() && (one.scrollWidth > one.clientWidth + 1 ||
                    one.getBoundingClientRect().right > one.closest(".card").getBoundingClientRect().right))
                .map((one) => one.textContent)"""
            assert page.evaluate(cut) == []

        fits()
        tab.steer("digits-words", mode="soft")
        tab.place("answer", "1", "3")
        assert not page.locator("#message").is_visible(), "one part at a time"
        for part in ("#settings", "#program", "#experts"):
            page.click(f"{part} summary")
            fits()
        page.click("#view-chat")
        page.locator("label.switch").click()
        tab.send(COUNT)
        tab.send("x" * 300)
        assert page.get_by_role("button", name="Steered text").first.is_visible()
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
        page.click("#view-chat")
        page.locator(".answer").first.get_by_role("button", name="Tokens").click()
        page.locator("#step-map").wait_for()
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
