"""Write docs/images/page.png, the picture of the server's page. Needs the programs that `make test-page` installs.

The real page in a headless Chromium, against a server with the embedded model and greedy decoding. A picture whose
answers are not the right ones is not taken.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "page.png"
MOST_BYTES = 300_000
sys.path.insert(0, str(ROOT))  # for tests/

from tests.support.browser import chromium  # noqa: E402
from tests.support.page_desk import desk  # noqa: E402
from tests.support.running_server import running  # noqa: E402

SIZE = (1280, 860)
QUESTIONS = ("Count from four to nine.", "Count from two to six.")
ANSWERS = ("4, 5, 6, 7, 8, 9", "2, 3, 4, 5, 6", "two, three, four, five, six")  # the right ones, in their order


def picture() -> bytes:
    """Take the picture: an answer in digits, a side-by-side answer in words, and the experts that were used."""
    with chromium() as browser, running(n_ctx=512, parallel=2) as server:
        server.chat(QUESTIONS[0])  # the first answer of a server is slower
        with desk(browser, server, size=SIZE, color_scheme="light", device_scale_factor=1.25) as tab:
            tab.open().page.click("#settings summary")
            tab.page.fill("#seed", "7")
            tab.page.click("#settings summary")
            tab.steer("digits-words", activate=6, deactivate=6)
            tab.send(QUESTIONS[0])
            with tab.new_table():
                tab.set("reverse", True)
            tab.page.locator("label.switch").click()
            tab.send(QUESTIONS[1])
            shown = [text.strip() for text in tab.page.locator(".answer .text").all_inner_texts()]
            if shown != list(ANSWERS):
                raise SystemExit(f"the answers are {shown}, not the right ones; take other questions or numbers")
            tab.page.locator("#message").focus()
            tab.tooltip(3, 2)
            return tab.page.screenshot()


if __name__ == "__main__":
    data = picture()
    if len(data) > MOST_BYTES:
        raise SystemExit(f"{len(data)} bytes are too many for a page of documentation: {PICTURE}")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(data)
    print(f"written: {PICTURE}", file=sys.stderr)
