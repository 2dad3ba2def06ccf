"""Questions and answers that are changed where they stand, and what an answer that fails leaves."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import browser as browsers
from tests.support.page_desk import Desk
from tests.support.page_requests import COUNT, QUESTION, REFUSED, sse

pytestmark = browsers.marks()

SEVEN = "Which number comes after seven?"
TEXT_STREAM = "text/event-stream"


def questions(tab: Desk) -> list[str]:
    return [text.removeprefix("You: ") for text in tab.page.locator(".question:visible").all_text_contents()]


def edit_question(tab: Desk, number: int, text: str) -> None:
    row = tab.page.locator(".question-row").nth(number)
    row.get_by_role("button", name="Edit this message").click()
    row.locator("textarea").fill(text)


def test_another_question_in_its_place(tab: Desk) -> None:
    for text in (QUESTION, COUNT, QUESTION):
        tab.send(text)
    before = tab.answers()
    edit_question(tab, 1, SEVEN)
    tab.page.keyboard.press("Enter")
    tab.until(lambda: questions(tab) == [QUESTION, SEVEN])
    assert len(tab.ended()) == 1
    assert [one["content"] for one in tab.watch.sent[-1]["messages"]] == [QUESTION, before[0]["text"], SEVEN]
    assert tab.page.locator("#notice").inner_text().startswith("2 questions and their answers were replaced.")
    tab.page.get_by_role("button", name="Undo").click()
    assert questions(tab) == [QUESTION, COUNT, QUESTION]
    assert tab.answers() == before
    assert len(tab.kept()["turns"]) == 3


def test_giving_up(tab: Desk) -> None:
    tab.send(QUESTION)
    n_sent = len(tab.watch.sent)
    edit_question(tab, 0, SEVEN)
    tab.page.keyboard.press("Escape")
    assert questions(tab) == [QUESTION]
    assert tab.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Edit this message"
    edit_question(tab, 0, "  ")
    tab.page.keyboard.press("Enter")
    assert tab.page.locator(".editor").is_visible(), "nothing is asked without words"
    tab.page.get_by_role("button", name="Cancel").click()
    assert len(tab.watch.sent) == n_sent


@pytest.mark.parametrize("again", [True, False], ids=["ask again", "edit"])
def test_what_follows_stays_until_an_answer_begins(tab: Desk, again: bool) -> None:
    """A server that fails costs no answer."""
    tab.watch.expected = {f"{REFUSED} 500"}
    tab.send(QUESTION)
    tab.send(COUNT)
    before = tab.answers()
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=500, json={"error": {"message": "x"}}))
    if again:
        tab.page.locator(".turn").last.get_by_role("button", name="Ask again").first.click()
    else:
        edit_question(tab, 0, SEVEN)
        tab.page.keyboard.press("Enter")
    tab.until(lambda: "The earlier answer stays." in tab.page.locator("#notice").inner_text())
    assert tab.answers() == before
    assert questions(tab) == [QUESTION, COUNT]
    assert [turn["user"] for turn in tab.kept()["turns"]] == [QUESTION, COUNT]
    tab.page.unroute("**/v1/chat/completions")
    tab.page.get_by_role("button", name="Try again").click()
    wanted = [QUESTION, COUNT] if again else [SEVEN]
    tab.until(lambda: [turn["user"] for turn in tab.kept()["turns"]] == wanted)
    assert questions(tab) == wanted


def test_while_an_answer_comes_nothing_else_is_asked(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    tab.until(lambda: tab.answers()[0]["text"])
    n_sent = len(tab.watch.sent)
    edit_question(tab, 0, "Another.")
    tab.page.keyboard.press("Enter")
    assert tab.page.locator(".editor").is_visible()
    tab.page.click("#stop")
    tab.page.locator("#send").wait_for()
    assert len(tab.watch.sent) == n_sent


def test_an_edited_answer(tab: Desk) -> None:
    """The conversation goes on with it, it is kept, and others are told."""
    tab.page.evaluate(
        "() => document.addEventListener('steermoe:edited', (event) => (window.told ??= []).push(event.detail))"
    )
    tab.page.click("#settings summary")
    tab.page.fill("#system", "Count.")
    (text,) = tab.send(QUESTION)
    tab.send(COUNT)
    answer = tab.page.locator(".answer").first
    answer.get_by_role("button", name="Edit", exact=True).click()
    field = answer.locator("textarea")
    assert field.input_value() == text
    field.fill("It is **four**.")
    tab.page.keyboard.press("Enter")
    assert field.is_visible(), "Enter breaks the line"
    tab.page.keyboard.press("Backspace")
    tab.page.keyboard.press("Control+Enter")
    tab.until(lambda: answer.locator("strong").count() == 1)
    assert "edited" in tab.answers()[0]["meta"]
    assert not answer.get_by_role("button", name="Tokens").is_visible(), "the tokens are not the model's"
    messages = [{"role": "system", "content": "Count."}, {"role": "user", "content": QUESTION}]
    told = [{"messages": messages, "before": text, "after": "It is **four**."}]
    assert tab.page.evaluate("window.told") == told
    tab.send(SEVEN)
    assert tab.watch.sent[-1]["messages"][2] == {"role": "assistant", "content": "It is **four**."}
    kept = tab.kept()["turns"][0]["answers"][0]
    assert (kept["text"], kept["original"]) == ("It is **four**.", text)
    tab.page.reload()
    tab.page.locator("#state[data-state=ok]").wait_for()
    assert "edited" in tab.answers()[0]["meta"]


def test_an_edit_that_changes_nothing(tab: Desk) -> None:
    tab.page.evaluate("() => document.addEventListener('steermoe:edited', () => (window.told = true))")
    tab.send(QUESTION)
    tab.page.locator(".answer").get_by_role("button", name="Edit", exact=True).click()
    tab.page.keyboard.press("Control+Enter")
    tab.until(lambda: tab.page.locator(".editor").count() == 0)
    assert tab.page.evaluate("window.told") is None
    assert "edited" not in tab.answers()[0]["meta"]


def test_the_code_of_an_answer_can_be_copied(tab: Desk) -> None:
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "for x in y:\n    <b>print</b>(x)"
    chunk: dict[str, Any] = {"choices": [{"delta": {"content": f"See:\n\n```python\n{code}\n```\n\n[a](https://b.c)"}}]}
    reply = sse(chunk, end="data: [DONE]\n\n")
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=reply, content_type=TEXT_STREAM))
    tab.send("Code?")
    tab.page.get_by_role("button", name="Copy this code").click()
    tab.until(lambda: tab.page.evaluate("navigator.clipboard.readText()") == code)
    assert tab.page.locator(".code-head").get_attribute("data-language") == "python"
    link = tab.page.locator(".text a")
    assert link.get_attribute("rel") == "noopener noreferrer"
    assert link.get_attribute("target") == "_blank"
