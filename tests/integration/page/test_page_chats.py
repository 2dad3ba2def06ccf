"""Several chats: their list, what each keeps, other tabs, a browser without room, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import browser as browsers
from tests.support.page_desk import NARROW, Desk, desk
from tests.support.page_requests import COUNT, MARKUP, QUESTION
from tests.support.running_server import Running, until

pytestmark = browsers.marks()


def titles(tab: Desk) -> list[str]:
    """Of the open list."""
    return list(tab.page.locator("#chat-list .chat-title").all_inner_texts())


def listed(tab: Desk) -> list[str]:
    tab.page.click("#open-chats")
    found = titles(tab)
    tab.page.click("#chats-close")
    return found


def chat(tab: Desk, title: str) -> Any:
    """A row of the open list."""
    return tab.page.locator("#chat-list li", has=tab.page.get_by_text(title, exact=True))


def open_chat(tab: Desk, title: str) -> None:
    tab.page.click("#open-chats")
    chat(tab, title).locator(".chat-name").click()
    tab.page.locator("#chats").wait_for(state="hidden")


def questions(tab: Desk) -> list[str]:
    return [text.removeprefix("You: ") for text in tab.page.locator(".question").all_text_contents()]


def entries(tab: Desk) -> dict[str, str]:
    """All that the browser keeps."""
    return dict(tab.page.evaluate("() => ({...localStorage})"))


def test_each_chat_has_its_own_steering_and_settings(tab: Desk) -> None:
    tab.steer("digits-words", reverse=True)
    assert tab.send(QUESTION) == ["four"]
    tab.page.click("#new-chat")
    assert questions(tab) == []
    assert tab.page.locator("#welcome").is_visible()
    assert tab.page.evaluate("document.activeElement.id") == "message"
    assert tab.page.input_value("#steering") == "digits-words", "a new chat begins as the one before it"
    tab.steer("")
    tab.page.click("#settings summary")
    tab.page.fill("#system", "Count.")
    tab.send(COUNT)
    assert [message["content"] for message in tab.watch.sent[-1]["messages"]] == ["Count.", COUNT]
    tab.page.fill("#message", "half a")
    open_chat(tab, QUESTION)
    assert questions(tab) == [QUESTION]
    assert tab.page.input_value("#steering") == "digits-words"
    assert tab.page.locator("#reverse").is_checked()
    assert tab.page.input_value("#system") == ""
    assert tab.page.input_value("#message") == ""
    tab.page.reload()
    tab.page.locator("#state[data-state=ok]").wait_for()
    assert questions(tab) == [QUESTION], "a reload shows the same chat"
    assert listed(tab) == [COUNT, QUESTION]
    open_chat(tab, COUNT)
    assert tab.page.input_value("#system") == "Count."
    assert tab.page.input_value("#steering") == ""
    assert tab.page.input_value("#message") == "half a"


def test_new_chats_do_not_pile_up(tab: Desk) -> None:
    for _ in range(3):
        tab.page.click("#new-chat")
    tab.page.click("#open-chats")
    tab.page.click("#chats-new")
    assert listed(tab) == ["New chat"]


def test_rename_by_keyboard(tab: Desk) -> None:
    tab.send(QUESTION)
    page = tab.page
    page.focus("#open-chats")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.className") == "chat-name"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.locator("#chat-list input").input_value() == QUESTION
    page.keyboard.type(f" {MARKUP} ")
    page.keyboard.press("Escape")
    assert page.locator("#chats").is_visible(), "Escape gives up the new title alone"
    assert titles(tab) == [QUESTION]
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.keyboard.type(f" {MARKUP} ")
    page.keyboard.press("Enter")
    assert titles(tab) == [MARKUP]
    assert page.evaluate("document.activeElement.className") == "chat-name"
    page.keyboard.press("Escape")
    page.locator("#chats").wait_for(state="hidden")
    page.reload()
    page.locator("#state[data-state=ok]").wait_for()
    assert listed(tab) == [MARKUP]
    assert page.locator("#chat-list img").count() == 0


def test_delete_and_undo(tab: Desk) -> None:
    tab.send(QUESTION)
    tab.page.click("#new-chat")
    tab.send(COUNT)
    before = entries(tab)
    tab.page.click("#open-chats")
    chat(tab, COUNT).get_by_role("button", name="Delete").click()
    assert titles(tab) == [QUESTION]
    assert questions(tab) == [QUESTION], "what was shown is gone; the next one is"
    assert len(entries(tab)) == len(before) - 1
    assert tab.page.evaluate("document.activeElement.textContent") == "Undo"
    tab.page.keyboard.press("Enter")
    assert titles(tab) == [COUNT, QUESTION]
    chat(tab, COUNT).locator(".chat-name").click()
    assert questions(tab) == [COUNT]
    assert entries(tab).keys() == before.keys()
    tab.page.click("#open-chats")
    for _ in range(2):
        tab.page.locator("#chat-list").get_by_role("button", name="Delete").first.click()
    assert titles(tab) == ["New chat"]
    assert questions(tab) == []
    tab.page.reload()
    tab.page.locator("#state[data-state=ok]").wait_for()
    assert listed(tab) == ["New chat"]


def test_an_answer_goes_on_while_another_chat_is_shown(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    tab.until(lambda: tab.answers()[0]["text"])
    tab.page.click("#new-chat")
    assert questions(tab) == []
    assert tab.page.locator("#stop").is_visible()
    tab.page.wait_for_timeout(300)
    tab.page.click("#stop")
    tab.page.locator("#send").wait_for()
    assert questions(tab) == []
    open_chat(tab, "Talk.")
    (answer,) = tab.answers()
    assert answer["state"] == "stopped"
    assert len(answer["text"]) > 10
    assert tab.kept()["turns"][0]["answers"][0]["state"] == "stopped"


def test_a_reload_keeps_the_answer_of_another_chat(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    tab.until(lambda: tab.answers()[0]["text"])
    tab.page.click("#new-chat")
    tab.page.wait_for_timeout(300)
    tab.page.reload()
    tab.page.locator("#state[data-state=ok]").wait_for()
    open_chat(tab, "Talk.")
    (answer,) = tab.answers()
    assert answer["state"] == "stopped"
    assert len(answer["text"]) > 10


def test_deleting_a_chat_stops_its_answer(slow_tab: Desk) -> None:
    tab = slow_tab
    tab.type("Talk.")
    tab.until(lambda: tab.answers()[0]["text"])
    tab.page.click("#open-chats")
    chat(tab, "Talk.").get_by_role("button", name="Delete").click()
    until(lambda: tab.server.worker.n_running == 0)
    tab.page.click("#chats-close")
    tab.page.locator("#send").wait_for()
    assert questions(tab) == []
    tab.page.wait_for_timeout(600)
    assert "Talk." not in json.dumps(entries(tab)), "it is not kept again"


#
# what was kept before, and a browser that is full
#

OLD = {
    "version": 1,
    "turns": [
        {"user": "An old question?", "seed": 1, "answers": [{"side": "unsteered", "text": "x", "state": "done"}]}
    ],
    "steering": "digits-words",
    "settings": {"system": "Old."},
}


def set_once(tab: Desk, value: str) -> None:
    script = (
        "localStorage.getItem('once') ?? localStorage.setItem('steermoe.chat', x); localStorage.setItem('once', '1')"
    )
    tab.page.add_init_script(script.replace("x)", f"{json.dumps(value)})"))


def test_the_chat_of_earlier_versions_is_taken_over(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        set_once(tab, json.dumps(OLD))
        tab.open()
        assert questions(tab) == ["An old question?"]
        assert tab.page.input_value("#steering") == "digits-words"
        assert tab.page.input_value("#system") == "Old."
        assert "steermoe.chat" not in entries(tab)
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert listed(tab) == ["An old question?"], "once"


def test_an_old_chat_stays_where_there_is_no_room(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        set_once(tab, json.dumps(OLD))
        tab.page.add_init_script(
            """const set = Storage.prototype.setItem;
            Storage.prototype.setItem = function (name, value) {
                if (name.startsWith("steermoe.chat.")) throw new DOMException("full", "QuotaExceededError");
                set.call(this, name, value);
            };"""
        )
        tab.open()
        assert json.loads(entries(tab)["steermoe.chat"]) == OLD


def test_a_full_browser_loses_nothing(tab: Desk) -> None:
    """It says so; the other chats and the last state that was kept stay; deleting one makes room."""
    tab.send(QUESTION)
    tab.page.click("#new-chat")
    tab.send(COUNT)
    tab.until(lambda: len(entries(tab)) == 2)
    before = entries(tab)
    fill = """() => { let size = 4 << 20, i = 0;
        while (size >= 1) { try { localStorage.setItem("other" + i++, "x".repeat(size)); } catch { size >>= 1; } } }"""
    tab.page.evaluate(fill)
    tab.send("Which number comes after seven?")
    tab.until(lambda: tab.page.locator("#notice").inner_text().startswith("This browser has no room"))
    assert len(questions(tab)) == 2
    after = entries(tab)
    assert {name: after[name] for name in before} == before
    tab.page.click("#open-chats")
    chat(tab, QUESTION).get_by_role("button", name="Delete").click()
    tab.page.click("#chats-close")
    tab.page.fill("#message", "x")
    tab.until(lambda: len(tab.kept()["turns"]) == 2)


def test_two_tabs(tab: Desk) -> None:
    """A chat that grew in another tab is shown here, too, and not overwritten when this one is left."""
    tab.send(QUESTION)
    tab.until(lambda: tab.kept().get("turns"))
    other = Desk(tab.context.new_page(), tab.context, tab.watch, tab.server)
    other.watch.follow(other.page)
    other.open()
    assert questions(other) == [QUESTION]
    other.send(COUNT)
    other.until(lambda: len(other.kept()["turns"]) == 2)
    tab.until(lambda: questions(tab) == [QUESTION, COUNT])
    tab.page.close()
    other.page.reload()
    other.page.locator("#state[data-state=ok]").wait_for()
    assert questions(other) == [QUESTION, COUNT]


#
# files
#


def exported(tab: Desk, title: str, kind: str, folder: Path) -> tuple[str, str]:
    """Name and text of a chat's file."""
    tab.page.click("#open-chats")
    with tab.page.expect_download() as found:
        chat(tab, title).get_by_role("button", name=kind).click()
    path = folder / "file"
    found.value.save_as(path)
    tab.page.click("#chats-close")
    return str(found.value.suggested_filename), path.read_text("utf-8")


def test_export_and_import(tab: Desk, tmp_path: Path) -> None:
    tab.steer("digits-words", reverse=True)
    tab.page.locator("label.switch").click()
    before = tab.send(QUESTION)
    name, text = exported(tab, QUESTION, "Markdown", tmp_path)
    assert name == "steermoe-which-number-comes-after-three.md"
    assert text == (
        f"# {QUESTION}\n\n## You\n\n> {QUESTION}\n\n## Unsteered\n\n{before[0]}\n\n"
        f"## Steered: digits-words \u2192 words\n\n{before[1]}\n"
    )
    name, text = exported(tab, QUESTION, "JSON", tmp_path)
    assert name == "steermoe-which-number-comes-after-three.json"
    file = tmp_path / name
    file.write_text(text, "utf-8")
    shown = tab.answers()
    tab.page.click("#open-chats")
    chat(tab, QUESTION).get_by_role("button", name="Delete").click()
    with tab.page.expect_file_chooser() as chooser:
        tab.page.click("#chats-import")
    chooser.value.set_files(file)
    chat(tab, QUESTION).locator(".chat-name").click()
    assert tab.answers() == shown
    assert tab.page.locator("#reverse").is_checked()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "The file is not JSON"),
        ("[1]", "The file is no chat of this page"),
        ('{"format": "steermoe-page-chat", "version": 9}', "another version"),
        ('{"format": "steermoe-page-chat", "version": 1, "turns": [5, {"user": 1}]}', "no question"),
    ],
)
def test_files_that_are_none(tab: Desk, tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "file.json"
    file.write_text(text, "utf-8")
    tab.page.click("#open-chats")
    tab.page.set_input_files("#chats-file", file)
    tab.until(lambda: message in tab.page.locator("#chats-state").inner_text())
    assert titles(tab) == ["New chat"]


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("a/b\\..:c*?", "steermoe-a-b-c.md"),
        ("../../etc/passwd", "steermoe-etc-passwd.md"),
        ("CON", "steermoe-con.md"),
        ("\u202egpj.exe\0", "steermoe-gpj-exe.md"),
        ("Z\u00fcrich \u4e00", "steermoe-z\u00fcrich-\u4e00.md"),
        ("?!", "steermoe-chat.md"),
        ("x" * 500, f"steermoe-{'x' * 60}.md"),
    ],
)
def test_names_of_files(tab: Desk, title: str, name: str) -> None:
    script = """async (title) => (await import("/page/export.js")).fileName({ title, turns: [] }, "md")"""
    assert tab.page.evaluate(script, title) == name


def test_a_narrow_window(browser: Any, server: Running) -> None:
    with desk(browser, server, size=NARROW) as tab:
        tab.open()
        tab.send(QUESTION)
        assert tab.overflow() <= 0
        tab.page.click("#open-chats")
        assert tab.overflow() <= 0
        assert tab.page.locator("#chats").evaluate("(one) => one.scrollWidth - one.clientWidth") <= 0
        for name in ("Rename", "Markdown", "JSON", "Delete"):
            assert tab.page.locator("#chat-list").get_by_role("button", name=name).is_visible()
