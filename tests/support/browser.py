"""A headless Chromium for the tests of the page and its pictures: Debian's, or the one that STEERMOE_CHROMIUM names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

REQUIRED = "STEERMOE_REQUIRE_BROWSER"  # set: what is missing fails the tests, instead of skipping them
# The shell is the same browser without windows, and starts tabs much faster.
NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
# Nothing from elsewhere: no updates, no services of its maker.
ARGUMENTS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def why_not() -> str:
    """What is missing for a browser, "" if nothing is."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return "playwright is not installed: make test-page"
    return "" if program() else "there is no Chromium: make test-page, or name one in STEERMOE_CHROMIUM"


def marks() -> list[Any]:
    """Marks of tests that need a browser."""
    reason = why_not()
    return [pytest.mark.page, pytest.mark.skipif(bool(reason) and not os.environ.get(REQUIRED), reason=reason)]


def program() -> str | None:
    """Its path."""
    return os.environ.get("STEERMOE_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, until the block ends."""
    assert not why_not(), why_not()
    from playwright.sync_api import sync_playwright

    # In a container's root account its sandbox cannot start.
    sandbox = () if getattr(os, "geteuid", lambda: 1)() else ("--no-sandbox",)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program(), args=[*ARGUMENTS, *sandbox])
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Watch:
    """What a page must not do: complain, break its policy, ask others. `expected`: parts of complaints that may be."""

    origin: str
    expected: set[str] = field(default_factory=set)
    complaints: list[str] = field(default_factory=list)
    sent: list[dict[str, Any]] = field(default_factory=list)

    def follow(self, page: Page) -> None:
        """Listen to the page; before it loads anything."""
        page.on("console", lambda message: self._console(message.type, message.text))
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", self._request)
        page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (event) => console.error('policy', event.violatedDirective));"
        )

    def _console(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not text.startswith("Canvas2D: "):  # the tests read pixels
            self.complaints.append(f"{kind}: {text}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith(f"{self.origin}/"):
            self.complaints.append(f"request: {request.url}")
        if request.url == f"{self.origin}/v1/chat/completions":
            self.sent.append(request.post_data_json)

    def check(self) -> None:
        """Fails for complaints that are not expected."""
        left = [text for text in self.complaints if not any(part in text for part in self.expected)]
        assert not left, left
