"""Teaching on the page: what is asked of the server, jobs and their verdicts, examples from marks and edits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.server.learn_jobs import LearnJobs
from steermoe_local.server.learning import add_learnt
from tests.integration.page.test_page_modules import run
from tests.support import browser as browsers
from tests.support.fake_learner import DID_NOT, WORKS, FakeLearner
from tests.support.page_desk import NARROW, Desk, desk
from tests.support.page_requests import QUESTION
from tests.support.running_server import Running, running

pytestmark = browsers.marks()

TALK = [{"role": "user", "content": "Hi"}]
PAIR = {"prompt": TALK, "like": "Good day.", "unlike": "yo"}


@pytest.fixture
def teacher(learner: FakeLearner, maps_folder: Path) -> Iterator[Running]:
    with running(
        parallel=2, n_ctx=512, jobs=lambda registry: LearnJobs([], partial(add_learnt, registry), start=learner.start)
    ) as found:
        yield found


@pytest.fixture
def tab(browser: Any, teacher: Running) -> Iterator[Desk]:
    with desk(browser, teacher) as made:
        yield opened(made)


def opened(made: Desk) -> Desk:
    """The page with the card."""
    made.open()
    made.page.click("#teach summary")
    return made


def instruct(tab: Desk, name: str = "") -> None:
    tab.page.fill("#teach-like", "Answer very formally, please!")
    tab.page.fill("#teach-unlike", "--casual")
    if name:
        tab.page.fill("#teach-name", name)
    tab.page.click("#teach-start")


def job(tab: Desk) -> Any:
    return tab.page.locator("#teach-jobs li").first


def words(tab: Desk) -> str:
    return str(job(tab).locator("p").inner_text())


def examples(tab: Desk) -> dict[str, Any]:
    text = tab.page.evaluate("() => localStorage.getItem('steermoe.examples')")
    return dict(json.loads(text or "{}"))


def marks(tab: Desk) -> str:
    return str(tab.page.locator("#teach-marks").text_content())


def thumb(tab: Desk, turn: int, up: bool) -> Any:
    return tab.page.locator(".turn").nth(turn).get_by_role("button", name="Wanted" if up else "Not wanted", exact=False)


#
# jobs
#


def test_two_instructions_become_a_steering(tab: Desk, learner: FakeLearner, maps_folder: Path) -> None:
    page = tab.page
    instruct(tab)
    learner.wait_for()
    assert learner.started[0][-4:] == [
        "--like=Answer very formally, please!",
        "--unlike=--casual",
        "--",
        "answer-very-formally-please",
    ]
    assert "answer-very-formally-please" in job(tab).inner_text()
    learner.say("detect", 1, 4, 30, 300)
    tab.until(lambda: "finding experts" in words(tab))
    assert "min left" in words(tab)
    assert float(job(tab).locator("progress").get_attribute("value")) == pytest.approx(0.1)
    name = "answer-very-formally-please"
    (maps_folder / name).mkdir(parents=True)
    shutil.copy(shipped_maps()["digits-words"], maps_folder / name / "map.json")
    learner.end()
    tab.until(lambda: words(tab) == WORKS["verdict"])
    assert job(tab).get_attribute("data-outcome") == "works"
    tab.until(lambda: page.locator(f"#steering option[value={name}]").count() == 1)
    assert page.locator("#steering").input_value() == ""
    job(tab).get_by_role("button", name="Use it").click()
    tab.until(lambda: page.locator("#steering").input_value() == name)
    tab.until(lambda: tab.kept()["steering"] == name)
    tab.watch.expected.add("409")
    page.click("#teach-start")
    tab.until(lambda: page.locator("#teach-again").is_visible())
    page.click("#teach-again")
    learner.wait_for(2)
    assert "--restart" in learner.started[1]


def test_what_did_not_work(tab: Desk, learner: FakeLearner) -> None:
    instruct(tab, "formal")
    learner.wait_for()
    learner.end(DID_NOT, 1)
    tab.until(lambda: words(tab) == DID_NOT["verdict"])
    assert job(tab).get_attribute("data-outcome") == "did not work"
    assert not job(tab).get_by_role("button", name="Use it").is_visible()
    assert tab.page.locator("#steering option[value=formal]").count() == 0
    instruct(tab, "formal-2")
    learner.wait_for(2)
    learner.tell(err="error: <b>no</b> room\n", exit=1)
    tab.until(lambda: words(tab) == "<b>no</b> room")
    assert job(tab).get_attribute("data-state") == "failed"


def test_a_job_outlives_a_reload_and_is_cancelled(tab: Desk, learner: FakeLearner) -> None:
    instruct(tab, "formal")
    learner.wait_for()
    tab.page.reload()
    opened(tab)
    assert "formal" in job(tab).inner_text()
    job(tab).get_by_role("button", name="Cancel").click()
    tab.until(lambda: words(tab).startswith("cancelled"))
    assert learner.processes[0].wait(20) < 0
    assert not job(tab).locator("progress").is_visible()


def test_what_is_missing_is_said(tab: Desk, learner: FakeLearner) -> None:
    page = tab.page
    problem = page.locator("#teach-problem")
    page.click("#teach-start")
    assert "both instructions" in problem.inner_text()
    for id_ in ("like", "unlike"):
        page.fill(f"#teach-{id_}", "The same.")
    page.click("#teach-start")
    assert "same text" in problem.inner_text()
    instruct(tab, "Not a name")
    assert "name of small letters" in problem.inner_text()
    page.locator("label:has(#teach-examples)").click()
    assert not problem.is_visible()
    page.click("#teach-start")
    assert "At least 3 examples" in problem.inner_text()
    page.click("#teach-add")
    assert "a question, an answer" in problem.inner_text()
    page.locator("label:has(#teach-instructions)").click()
    tab.watch.expected.add("409")
    instruct(tab, "digits-words")
    tab.until(problem.is_visible)
    assert "another steering" in problem.inner_text()
    assert not learner.started


def test_a_server_that_learns_nothing(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        opened(tab)
        tab.until(lambda: tab.page.locator("#teach-off").is_visible())
        assert tab.page.locator("#teach-start").is_disabled()


@pytest.mark.parametrize("width", [NARROW[0], 360, 320])
def test_it_fits_a_narrow_screen(browser: Any, teacher: Running, width: int) -> None:
    with desk(browser, teacher, size=(width, NARROW[1])) as tab:
        tab.open()
        tab.page.click("#view-panel")
        tab.page.click("#teach summary")
        cut = """() => [...document.querySelectorAll("#teach-from span")].filter((one) =>
            one.scrollWidth > one.clientWidth || one.getBoundingClientRect().right > innerWidth - 20)
            .map((one) => one.textContent)"""
        assert tab.page.evaluate(cut) == []
        instruct(tab, "a" * 64)
        tab.until(lambda: job(tab).count() == 1)
        assert tab.overflow() <= 0


#
# examples
#


def test_marked_answers_become_examples(tab: Desk, learner: FakeLearner) -> None:
    """One and the same question, answered by turns as it is and steered the other way."""
    page = tab.page
    tab.steer("digits-words", reverse=True)
    page.locator("label:has(#compare)").click()
    answers = tab.send(QUESTION)
    assert len(set(answers)) == 2, answers
    page.locator("label:has(#teach-examples)").click()
    assert marks(tab) == "0 examples from your marks, edits and texts."
    thumb(tab, 0, True).nth(0).click()
    assert "1 mark without a counterpart" in marks(tab)
    assert thumb(tab, 0, True).nth(0).get_attribute("aria-pressed") == "true"
    thumb(tab, 0, False).nth(1).click()
    assert marks(tab) == "1 example from your marks, edits and texts."
    asked = [{"role": "user", "content": QUESTION}]
    kept = examples(tab)["marks"]
    assert {mark["text"]: (mark["messages"], mark["up"]) for mark in kept} == {
        answers[0]: (asked, True),
        answers[1]: (asked, False),
    }
    thumb(tab, 0, False).nth(1).click()
    assert "1 mark without" in marks(tab), "the same mark again takes it away"
    thumb(tab, 0, False).nth(1).click()
    page.reload()
    opened(tab)
    assert thumb(tab, 0, True).nth(0).get_attribute("aria-pressed") == "true"
    assert thumb(tab, 0, False).nth(1).get_attribute("aria-pressed") == "true"
    page.locator("label:has(#teach-examples)").click()
    for n in range(2):
        page.fill("#teach-question", f"Question {n}?")
        page.fill("#teach-wanted", "Good day.")
        page.fill("#teach-unwanted", "yo")
        page.click("#teach-add")
    assert marks(tab).startswith("3 examples")
    page.fill("#teach-name", "mine")
    page.click("#teach-start")
    learner.wait_for()
    pairs = [json.loads(line) for line in learner.pairs[0].splitlines()]
    assert [pair["positive_target"] for pair in pairs] == [answers[0], "Good day.", "Good day."]
    assert [pair["negative_target"] for pair in pairs] == [answers[1], "yo", "yo"]
    assert pairs[0]["positive"] == [*asked, {"role": "assistant", "content": answers[0]}]
    with page.expect_download() as download:
        page.click("#teach-export")
    exported = Path(download.value.path()).read_text("utf-8")
    assert [json.loads(line) for line in exported.splitlines()] == pairs
    page.click("#teach-list summary")
    page.locator("#teach-pairs li").first.get_by_role("button", name="Remove").click()
    assert marks(tab).startswith("2 examples")
    assert thumb(tab, 0, True).nth(0).get_attribute("aria-pressed") == "false"
    page.click("#teach-clear")
    assert marks(tab) == "0 examples from your marks, edits and texts."


def edit(tab: Desk, detail: Any) -> None:
    script = "(detail) => document.dispatchEvent(new CustomEvent('steermoe:edited', { detail }))"
    tab.page.evaluate(script, detail)


def test_an_edit_is_an_example(tab: Desk) -> None:
    edit(tab, {"messages": TALK, "before": "yo", "after": "Good day."})
    assert examples(tab)["given"] == [PAIR]
    for before, after in (("yo", "Good evening."), ("Good evening.", "Good night.")):
        edit(tab, {"messages": TALK, "before": before, "after": after})
        assert examples(tab)["given"] == [PAIR | {"like": after}], "edited once more"
    for odd in (
        None,
        "text",
        {},
        {"messages": [], "before": "a", "after": "b"},
        {"messages": TALK, "before": "a", "after": "a "},
        {"messages": TALK, "before": "a", "after": 1},
        {"messages": [{"role": "tool", "content": "x"}], "before": "a", "after": "b"},
        {"messages": TALK, "before": "a", "after": "b" * 16_001},
    ):
        edit(tab, odd)
    assert len(examples(tab)["given"]) == 1
    assert tab.page.locator("#teach-pairs li").count() == 1


def test_an_answer_that_is_edited_on_the_page(tab: Desk) -> None:
    (text,) = tab.send(QUESTION)
    tab.page.locator(".answer").get_by_role("button", name="Edit", exact=True).click()
    tab.page.keyboard.press("Control+A")
    tab.page.keyboard.type("The number four.")
    tab.page.keyboard.press("Control+Enter")
    pair = {"prompt": [{"role": "user", "content": QUESTION}], "like": "The number four.", "unlike": text}
    tab.until(lambda: examples(tab).get("given") == [pair])
    assert marks(tab) == "1 example from your marks, edits and texts."


def test_texts_are_no_markup(tab: Desk) -> None:
    text = "<img src=x onerror=alert(1)>"
    edit(tab, {"messages": [{"role": "user", "content": text}], "before": f"{text}a", "after": f"{text}b"})
    assert tab.page.locator("#teach-pairs p").first.text_content() == text
    assert tab.page.locator("#teach-pairs img").count() == 0


@pytest.mark.parametrize(
    "kept",
    ["", "no JSON", "[]", '{"version": 2}', '{"version": 1, "marks": {}, "given": [1, null, {"prompt": "a"}]}'],
)
def test_what_was_kept_by_others(tab: Desk, kept: str) -> None:
    assert run(tab, "examples", "return m.parsedExamples(x);", kept) == {"marks": [], "given": []}


def test_pairs_of_marks(tab: Desk) -> None:
    other = [{"role": "system", "content": "Be brief."}, *TALK]
    given = [(TALK, "a", True), (TALK, "b", False), (TALK, "c", False), (other, "d", True), (other, "e", False)]
    found = run(
        tab,
        "examples",
        "return m.pairsOf(x.map(([messages, text, up]) => ({messages, text, up})));",
        [*given, (TALK, "f", True), (TALK, "g", True)],
    )
    assert [(pair["like"], pair["unlike"], len(pair["prompt"])) for pair in found] == [
        ("a", "b", 1),
        ("f", "c", 1),
        ("d", "e", 2),
    ]


def test_words(tab: Desk) -> None:
    def left(elapsed: float, expected: float) -> Any:
        return run(tab, "teach", "return m.leftWords(x);", {"elapsed": elapsed, "expected": expected})

    assert [left(0, 0), left(50, 60), left(0, 300), left(0, 7200), left(61, 60)] == [
        "",
        "less than a minute left",
        "about 5 min left",
        "about 2 h left",
        "longer than expected",
    ]
    names = run(
        tab, "teach", "return x.map(m.nameOf);", ["Answer like a TEENAGER, ok?", "Über-höflich!", "???", "a" * 99]
    )
    assert names == ["answer-like-a-teenager", "uber-hoflich", "", "a" * 40]
