"""The page in a browser, as the tests use it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.support.browser import Watch
from tests.support.running_server import Running

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

WIDE, NARROW = (1360, 900), (400, 800)
DONE = ".answer:not([data-state=running])"


@dataclass
class Desk:
    """One tab with the page."""

    page: Page
    context: BrowserContext
    watch: Watch
    server: Running

    def open(self, state: str = "ok") -> Desk:
        """Go to the page, and wait until it knows the server."""
        self.page.goto(f"{self.server.url}/")
        self.page.locator(f"#state[data-state={state}]").wait_for(state="attached")
        return self

    def until(self, true: Callable[[], Any], seconds: float = 30) -> Any:
        """Wait for something to become true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if found := true():
                return found
            self.page.wait_for_timeout(20)
        raise AssertionError("it did not happen")

    def type(self, text: str) -> None:
        """Send a message with the keyboard."""
        self.page.fill("#message", text)
        self.page.keyboard.press("Enter")

    def send(self, text: str) -> list[str]:
        """Send a message; the texts of its answers, when they have come."""
        before = self.page.locator(".turn").count()
        self.type(text)
        self.until(lambda: self.page.locator(".turn").count() == before + 1)
        return self.ended()

    def ended(self) -> list[str]:
        """The texts of the last answers, when they have ended."""
        last = self.page.locator(".turn").last
        self.until(lambda: last.locator(DONE).count() == last.locator(".answer").count() > 0)
        self.page.locator("#send").wait_for()
        self.page.locator(".text[data-read=false]").wait_for(state="detached")
        return last.locator(".answer .text").all_inner_texts()

    def again(self) -> list[str]:
        """Ask the last question again."""
        self.page.locator(".turn").last.get_by_role("button", name="Ask again").first.click()
        return self.ended()

    def steer(self, name: str, **choice: Any) -> None:
        """Choose a steering, and numbers; waits until the map of it is drawn."""
        if (
            self.page.locator("body").get_attribute("data-view") == "chat"
            and self.page.locator("#view-panel").is_visible()
        ):
            self.page.click("#view-panel")
        with self.new_table() if name else contextlib.nullcontext():
            self.page.select_option("#steering", name)
        for field, value in choice.items():
            with self.new_table():
                self.set(field, value)

    def set(self, field: str, value: Any) -> None:
        """Use one control of the panel."""
        page = self.page
        if field == "reverse":
            page.locator(f"label:has(#{'reverse' if value else 'forward'})").click()
        elif field == "mode":
            page.locator(f"label:has(#{value})").click()
        elif field in ("rank", "weights"):
            page.select_option(f"#{field}", value)
        else:
            page.fill(f"#{field}", str(value))
            page.locator(f"#{field}").blur()

    def place(self, phase: str, start: str = "", stop: str = "") -> None:
        """Choose where the steering is in force."""
        self.page.locator(f"label:has(#phase-{phase})").click()
        if phase != "all":
            for name, value in (("start", start), ("stop", stop)):
                self.page.fill(f"#window-{name}", value)
                self.page.locator(f"#window-{name}").blur()

    def token_experts(self) -> list[list[str]]:
        """The experts that the dialog lists for its token, their texts for each layer."""
        script = """(all) => all.map((cell) => [...cell.querySelectorAll(".expert")]
            .map((one) => one.textContent).filter(Boolean))"""
        return list(self.page.locator("#step-rows td").evaluate_all(script))

    @contextmanager
    def new_table(self) -> Iterator[None]:
        """Within the block the page asks for a map, and has drawn it at the end."""
        with self.page.expect_response(lambda response: "/map" in response.url) as found:
            yield
        found.value.finished()
        self.page.evaluate("() => new Promise((done) => setTimeout(done, 20))")

    def answers(self) -> list[dict[str, Any]]:
        """All that is shown."""
        script = """() => [...document.querySelectorAll(".answer")].map((one) => ({
            title: one.querySelector("h2").innerText, text: one.querySelector(".text").innerText,
            state: one.dataset.state, meta: [...one.querySelectorAll(".meta span")].map((part) => part.innerText),
            problem: one.querySelector(".problem").hidden ? "" : one.querySelector(".problem").innerText }))"""
        return list(self.page.evaluate(script))

    def cell(self, layer: int, expert: int) -> dict[str, float]:
        """The middle of a cell of the heat map, in its own pixels."""
        data = self.page.locator("#heatmap").evaluate("(canvas) => ({...canvas.dataset})")
        cell, left, top = (float(data[name]) for name in ("cell", "left", "top"))
        return {"x": left + (expert + 0.5) * cell, "y": top + (layer + 0.5) * cell}

    def tooltip(self, layer: int, expert: int) -> list[str]:
        """What the heat map says of an expert under the pointer."""
        self.page.hover("#heatmap", position=self.cell(layer, expert), force=True)
        return self.shown_tooltip()

    def shown_tooltip(self) -> list[str]:
        """The lines of the tooltip."""
        assert self.page.locator("#tooltip").is_visible()
        return self.page.locator("#tooltip").inner_text().replace("\u2212", "-").splitlines()

    def pixels(self, layer: int, expert: int) -> list[list[int]]:
        """The colours of a cell."""
        script = """([x, y, size]) => {
            const canvas = document.getElementById("heatmap");
            const ratio = canvas.width / canvas.getBoundingClientRect().width;
            const at = [x - size / 2, y - size / 2, size, size].map((value) => Math.round(value * ratio));
            const { data } = canvas.getContext("2d").getImageData(...at);
            return Array.from({ length: data.length / 4 }, (_, i) => [...data.slice(4 * i, 4 * i + 3)]);
        }"""
        place = self.cell(layer, expert)
        size = float(self.page.locator("#heatmap").get_attribute("data-cell") or 0)
        return list(self.page.evaluate(script, [place["x"], place["y"], size]))

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("() => document.documentElement.scrollWidth - innerWidth"))

    def kept(self) -> dict[str, Any]:
        """What the browser keeps over a reload of the chat that is shown."""
        text = self.page.evaluate(
            "() => localStorage.getItem(`steermoe.chat.${sessionStorage.getItem('steermoe.current')}`)"
        )
        return dict(json.loads(text or "{}"))


@contextmanager
def desk(browser: Browser, server: Running, *, size: tuple[int, int] = WIDE, **context: Any) -> Iterator[Desk]:
    """A new tab that knows nothing; at its end it must have had nothing to complain about."""
    made = browser.new_context(viewport={"width": size[0], "height": size[1]}, **context)
    try:
        page = made.new_page()
        page.set_default_timeout(30_000)
        watch = Watch(server.url)
        watch.follow(page)
        yield Desk(page, made, watch, server)
        watch.check()
    finally:
        made.close()
