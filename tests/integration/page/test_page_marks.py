"""Steered text on the page: what of an answer is marked, in Markdown and reasoning, and when."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.page_requests import MARKUP, QUESTION, REFUSED, marked, sse
from tests.support.running_server import Running

pytestmark = browsers.marks()

RULES = ["answer[2:6]: digits-words +6 -6", "thinking: digits-words +2 -0"]
UNDER_A_PLAN = {"name": "mine", "rules": RULES, "n_steered": 3}


@pytest.fixture(scope="module")
def modules(browser: Any, server: Running) -> Iterator[Desk]:
    with desk(browser, server) as made:
        yield made.open()


#
# marks in Markdown
#

# . is a character of its own
PIECES = ["`", "```", "**", "*", "\n", "\r\n", "\n\n", "- ", "1) ", "# ", "  ", " ", "\t", ".", "..", "..."]
WHOLE = [
    "**..**",
    "`..`",
    "``.`.``",
    "*..*",
    "**.*..*.**",
    "\n# ..  \n",
    "\n- ..\n   ..\n2) .\n",
    "\n```. .\n..\r\n  .\n```\n",
]

SHOW = """async ([text, spans, cuts]) => {
    const { Reader, Rendered } = await import("/page/markdown.js");
    const { Server } = await import("/page/api.js");
    const reader = new Reader(new Server());
    reader.start();
    const make = async (sizes, wanted) => {
        const into = document.createElement("div");
        const shown = new Rendered(into, reader);
        for (const size of [...sizes, text.length]) {
            const begun = wanted.filter((span) => span.start < size);
            const cut = begun.map((span) => ({ ...span, end: Math.min(span.end, size) }));
            shown.show(text.slice(0, size), cut, String);
            shown.ready = 0;
            while (into.dataset.read !== "true") await new Promise((done) => setTimeout(done));
        }
        return into;
    };
    const [plain, once, growing] = [await make([], []), await make([], spans), await make(cuts, spans)];
    const marks = [...once.querySelectorAll("mark")].map((mark) => [Number(mark.title), mark.textContent]);
    const html = once.innerHTML;
    for (const mark of once.querySelectorAll("mark")) mark.replaceWith(...mark.childNodes);
    const [same, grown] = [plain.innerHTML === once.innerHTML, growing.innerHTML === html];
    return { same, grown, marks, shown: plain.textContent };
}"""


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(PIECES) | st.sampled_from(WHOLE), max_size=20), st.lists(st.integers(0, 60), max_size=12)
)
@example(pieces=["``.`.``"], cuts=[2, 3])
def test_marks_are_where_the_text_was_steered(modules: Desk, pieces: list[str], cuts: list[int]) -> None:
    """In any Markdown: every character that is shown is marked just if it was steered, and nothing else is changed."""
    text = "".join(chr(0x4E00 + i) if sign == "." else sign for i, sign in enumerate("".join(pieces)))
    edges = sorted({min(cut, len(text)) for cut in cuts})
    spans = [
        {"start": a, "end": b, "rule": i % 3} for i, (a, b) in enumerate(zip(edges[::2], edges[1::2], strict=False))
    ]
    found = modules.page.evaluate(SHOW, [text, spans, edges])
    assert found["same"], "marks change nothing but what is marked"
    assert found["grown"], "an answer that grows ends as if it had come at once"
    shown = {sign for sign in found["shown"] if sign >= "\u4e00"}
    for rule in range(3):
        steered = {sign for span in spans if span["rule"] == rule for sign in text[span["start"] : span["end"]]}
        assert {
            sign for of, part in found["marks"] if of == rule for sign in part if sign >= "\u4e00"
        } == steered & shown


@pytest.mark.parametrize(
    "text", ["word " * 20_000, "**a** `b` *c* d\n" * 5_000, "- item\n" * 10_000, "```\n" + "x y\n" * 20_000]
)
def test_many_marks_take_little_work(modules: Desk, text: str) -> None:
    """Every second character is a span of its own; each span is looked at a few times, whatever the length."""
    modules.watch.expected.add("status of 400")  # a block of too many parts is text
    body = """async (text) => {
        const { Reader, Rendered } = await import("/page/markdown.js");
        const { Server } = await import("/page/api.js");
        const reader = new Reader(new Server());
        reader.start();
        let looks = 0;
        const span = (i) => ({ get start() { looks++; return 2 * i; }, end: 2 * i + 1, rule: 0 });
        const spans = Array.from({ length: text.length >> 1 }, (_, i) => span(i));
        const into = document.createElement("div");
        new Rendered(into, reader).show(text, spans, String);
        while (into.dataset.read !== "true") await new Promise((done) => setTimeout(done));
        return looks / spans.length;
    }"""
    assert modules.page.evaluate(body, text) <= 12


def test_spans_of_a_stream(modules: Desk) -> None:
    """Chunks under one rule become one span; characters count as JavaScript's, so that an emoji is two."""
    body = """async (chunks) => {
        const { take, turnOf } = await import("/page/asking.js");
        const answer = turnOf("q", 1, ["x"]).answers[0];
        for (const chunk of chunks) take(answer, { choices: [chunk] });
        return [answer.text, answer.reasoning, answer.steered];
    }"""
    chunks = [
        {"delta": {"role": "assistant", "content": ""}, "rule": None},
        {"delta": {"reasoning_content": "ab"}, "rule": 1},
        {"delta": {"content": "\U0001f600"}, "rule": 0},
        {"delta": {"content": "c"}, "rule": 0},
        {"delta": {"content": "d"}, "rule": None},
        {"delta": {"content": "e"}, "rule": 1},
        {"delta": {}, "rule": 1, "finish_reason": "stop"},
    ]
    steered = {
        "answer": [{"start": 0, "end": 3, "rule": 0}, {"start": 4, "end": 5, "rule": 1}],
        "reasoning": [{"start": 0, "end": 2, "rule": 1}],
    }
    assert modules.page.evaluate(body, chunks) == ["\U0001f600cde", "ab", steered]
    silent = [{key: value for key, value in chunk.items() if key != "rule"} for chunk in chunks]
    assert modules.page.evaluate(body, silent)[2] is None, "a server that does not say it"


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        ([{"start": 0, "end": 2, "rule": 0}], 1),
        ([{"start": 3, "end": 2, "rule": 0}], 0),
        ([{"start": 0, "end": 2, "rule": 0}, {"start": 1, "end": 4, "rule": 0}], 1),
        ([{"start": -1, "end": 2, "rule": 0}], 0),
        ([{"start": 0, "end": 2}, None, 5, {"start": 0.5, "end": 2, "rule": 1}], 0),
        ("x", 0),
    ],
)
def test_kept_spans_are_checked(modules: Desk, kept: Any, left: int) -> None:
    found = modules.page.evaluate("async (x) => (await import('/page/marks.js')).spansOf(x)", kept)
    assert len(found) == left


#
# on the page
#

PARTS = [
    ("Let", 1, True),
    (" me", None, True),
    ("# Ti", None, False),
    ("tle\n\nA **b", 0, False),
    ("c** d", None, False),
]


def answering(tab: Desk, parts: list[tuple[str, int | None, bool]], applied: Any) -> None:
    reply = marked(parts, applied)
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=reply, content_type="text/event-stream"))


def marks(tab: Desk, place: str) -> list[tuple[str, str]]:
    script = "(all) => all.map((mark) => [mark.textContent, mark.title])"
    return [tuple(pair) for pair in tab.page.locator(f"{place} mark.steered").evaluate_all(script)]


def test_the_text_is_marked_where_it_was_steered(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        answering(tab.open(), PARTS, UNDER_A_PLAN)
        tab.send(QUESTION)
        by_answer, by_thinking = (f"Steered by rule {i + 1}: {rule}" for i, rule in enumerate(RULES))
        shown = [("tle", by_answer), ("A ", by_answer), ("b", by_answer)]
        assert marks(tab, ".text") == shown
        assert marks(tab, ".thoughts") == [("Let", by_thinking)]
        assert tab.page.locator(".text strong").inner_text() == "bc", "Markdown is rendered all the same"
        assert tab.page.locator("p.legend").is_visible()
        assert tab.answers()[0]["meta"][:2] == ["2 rules", "3 of 5 tokens steered"]
        style = tab.page.locator(".text mark").first.evaluate(
            "(one) => { const s = getComputedStyle(one); return [s.textDecorationLine, s.backgroundColor, s.color]; }"
        )
        assert style[0] == "underline", "not by its colour alone"
        assert style[2] == tab.page.locator(".text p").first.evaluate("(one) => getComputedStyle(one).color")
        button = tab.page.get_by_role("button", name="Steered text")
        assert button.get_attribute("aria-pressed") == "true"
        button.focus()
        tab.page.keyboard.press("Enter")
        assert button.get_attribute("aria-pressed") == "false"
        assert marks(tab, ".text") == []
        assert not tab.page.locator("p.legend").is_visible()
        tab.until(lambda: tab.kept().get("marks") is False)
        tab.page.reload()
        tab.page.locator("#state[data-state=ok]").wait_for()
        assert marks(tab, ".text") == []
        button.click()
        assert marks(tab, ".text") == shown, "what was steered is kept over a reload"


@pytest.mark.parametrize(
    ("parts", "applied", "n"),
    [
        ([("a", 0, False), ("b", 0, False)], {"name": "x", "n_active": 1, "n_inactive": 1}, 0),  # all of it
        ([("a", 0, False), ("b", None, False)], {"name": "x", "n_active": 1, "n_inactive": 1}, 1),
        ([("a", 0, False), ("b", 0, False)], UNDER_A_PLAN, 1),
        ([("a", None, False), ("b", None, False)], UNDER_A_PLAN, 0),
        ([("a", None, False), ("b", None, False)], None, 0),
    ],
)
def test_marks_only_where_they_tell_something(
    browser: Any, server: Running, parts: list[tuple[str, int | None, bool]], applied: Any, n: int
) -> None:
    with desk(browser, server) as tab:
        answering(tab.open(), parts, applied)
        tab.send(QUESTION)
        assert len(marks(tab, ".text")) == n
        assert tab.page.locator("p.legend").is_visible() == bool(n)


def test_marked_text_stays_text(browser: Any, server: Running) -> None:
    with desk(browser, server) as tab:
        images = tab.open().page.locator("img").count()
        hostile = {"name": MARKUP, "rules": [MARKUP], "n_steered": 1}
        answering(tab, [(MARKUP, 0, True), (MARKUP, 0, False), ("\n- x", None, False)], hostile)
        tab.send(QUESTION)
        assert marks(tab, ".text") == marks(tab, ".thoughts") == [(MARKUP, f"Steered by {MARKUP}")]
        assert tab.page.locator("img").count() == images
        assert tab.page.locator("b, script:not([src])").count() == 0


def test_a_server_that_does_not_know_the_field(browser: Any, server: Running) -> None:
    """An older one refuses it: it is asked without, then and from then on."""
    error = {"error": {"message": "return_steered: not a field", "param": "return_steered", "code": "unknown_field"}}
    with desk(browser, server) as tab:
        tab.watch.expected = {f"{REFUSED} 400"}

        def answer(route: Any) -> None:
            if "return_steered" in route.request.post_data_json:
                route.fulfill(status=400, body=json.dumps(error), content_type="application/json")
            else:
                chunk = {"choices": [{"delta": {"content": "an answer"}}], "steering": None}
                route.fulfill(body=sse(chunk, end="data: [DONE]\n\n"), content_type="text/event-stream")

        tab.open().page.route("**/v1/chat/completions", answer)
        assert tab.send(QUESTION) == ["an answer"]
        assert tab.send(QUESTION) == ["an answer"]
        assert ["return_steered" in sent for sent in tab.watch.sent] == [True, False, False]
        assert marks(tab, ".text") == []
