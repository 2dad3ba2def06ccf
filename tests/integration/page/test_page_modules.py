"""The page's modules by themselves, in a browser: what reads streams and kept chats, and what asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import browser as browsers
from tests.support.page_desk import Desk, desk
from tests.support.running_server import running

pytestmark = browsers.marks()


@pytest.fixture(scope="module")
def tab() -> Iterator[Desk]:
    with browsers.chromium() as browser, running(parallel=1) as server, desk(browser, server) as made:
        yield made.open()


def run(tab: Desk, module: str, body: str, given: Any = None) -> Any:
    """Run a function's body with a module's exports as `m` and what is given as `x`."""
    script = f"""async (x) => {{ const m = await import("/page/{module}.js"); {body} }}"""
    return tab.page.evaluate(script, given)


#
# streams
#

PARSE = """const bytes = new TextEncoder().encode(x.text);
const stream = new ReadableStream({ start(controller) {
    for (let i = 0; i < bytes.length; i += x.size) controller.enqueue(bytes.slice(i, i + x.size));
    controller.close();
} });
const found = [];
try { for await (const data of m.events(stream)) found.push(data); } catch (error) { return [found, error.title]; }
return [found, null];"""


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_streams_may_be_cut_anywhere(tab: Desk, end: str, size: int) -> None:
    events = ["{}", '{"text":"\u00e9\u4e2d\U0001f600"}', "two\nlines"]
    lines = [f"data: {events[0]}", "", ": a comment", "", "event: x", f"data:{events[1]}", ""]
    lines += ["data: two", "data: lines", "", "data: [DONE]", "", "data: behind the end", "", ""]
    assert run(tab, "api", PARSE, {"text": end.join(lines), "size": size}) == [events, None]


def test_streams_that_break_off(tab: Desk) -> None:
    for text in ("", "data: {}\n\n", "data: {}\n\ndata: {}", "data: {}\n\ndata: [DONE]"):
        found, title = run(tab, "api", PARSE, {"text": text, "size": 5})
        assert title == "The connection broke off."
        assert found == ["{}"] * text.count("data: {}\n\n")


PROBLEMS = [
    (401, {}, False, "key", "The server asks for its API key."),
    (401, {}, True, "key", "The server does not accept this API key."),
    (429, {"code": "queue_full"}, True, "busy", "The server is busy: too many requests wait."),
    (503, {"code": "loading"}, True, "loading", "The model is still being loaded."),
    (503, {"code": "stopping"}, True, "gone", "The server cannot answer now."),
    (503, {"code": "failed"}, True, "gone", "The server cannot answer now."),
    (408, {"code": "timeout"}, True, "server", "The answer took too long."),
    (403, {"code": "unknown_host"}, True, "refused", "The server does not know this host name."),
    (400, {"code": "impossible_choice"}, True, "steering", "The server refuses this steering."),
    (400, {"code": "invalid_value", "param": "steering.scale"}, True, "steering", "The server refuses this steering."),
    (400, {"code": "context_length_exceeded"}, True, "refused", "The conversation is too long for the model."),
    (400, {"code": "x"}, True, "refused", "The server refuses this request."),
    (500, None, True, "server", "The server failed."),
    (0, {"code": "native_error"}, True, "server", "The server failed."),
    (418, None, True, "refused", "The server refuses this request."),
]


@pytest.mark.parametrize(("status", "error", "has_key", "kind", "title"), PROBLEMS)
def test_problems(tab: Desk, status: int, error: Any, has_key: bool, kind: str, title: str) -> None:
    if error is not None:
        error = error | {"message": "what the server says"}
    body = "const p = m.problemOf(...x); return [p.kind, p.title, p.detail];"
    found = run(tab, "api", body, [status, error, 3, has_key])
    assert found[:2] == [kind, title]
    if status in (400, 403, 408, 0):
        assert found[2] == "what the server says"


#
# what is kept, and what is asked
#


def test_routing_is_kept_of_the_latest_answers(tab: Desk) -> None:
    body = """const answer = () => ({ side: "steered", text: "t", state: "done", routing: [[1, 2]], facts: {} });
    const turns = Array.from({ length: 15 }, () => ({ user: "q", seed: 1, answers: [answer(), answer()] }));
    m.save({ ...m.empty("x"), turns });
    const back = m.loadAll().get("x").turns;
    m.forget("x");
    const kept = back.flatMap((turn) => turn.answers.map((one) => one.routing !== null));
    return [back.length, kept, turns[0].answers[0].routing];"""
    n, kept, own = run(tab, "store", body)
    assert n == 15
    assert kept == [False] * 10 + [True] * 20
    assert own == [[1, 2]], "what is shown now is not touched"


def test_a_full_browser_keeps_the_texts(tab: Desk) -> None:
    """What makes a chat long, routing and marks, is left out before the chat is lost."""
    body = """const set = Storage.prototype.setItem;
    Storage.prototype.setItem = function (name, value) {
        if (value.length > x) throw new DOMException("full", "QuotaExceededError");
        set.call(this, name, value);
    };
    const spans = Array.from({ length: 200 }, (_, i) => ({ start: 2 * i, end: 2 * i + 1, rule: 0 }));
    const steered = { answer: spans, reasoning: [] };
    const answer = { side: "steered", text: "t", state: "done", routing: [[1, 2]], facts: {}, steered };
    const kept = m.save({ ...m.empty("x"), turns: [{ user: "q", seed: 1, answers: [answer] }] });
    const back = kept && m.loadAll().get("x").turns[0].answers[0];
    Storage.prototype.setItem = set;
    m.forget("x");
    return kept && [back.text, back.routing, back.steered?.answer.length ?? 0];"""
    assert run(tab, "store", body, 100_000) == ["t", [[1, 2]], 200]
    assert run(tab, "store", body, 1000) == ["t", None, 0]
    assert run(tab, "store", body, 100) is False


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
kept_chats = st.fixed_dictionaries(
    {"version": st.just(1)},
    optional=dict.fromkeys(
        ("title", "changed", "steering", "choices", "compare", "marks", "settings", "draft"), json_values
    )
    | {
        "turns": st.lists(
            st.fixed_dictionaries(
                {"user": json_values | st.text(max_size=3), "answers": json_values | st.lists(json_values, max_size=3)},
                optional={"seed": json_values},
            ),
            max_size=3,
        )
    },
)


@settings(max_examples=60)
@given(kept_chats | json_values)
def test_kept_chats_are_made_whole(tab: Desk, kept: Any) -> None:
    state = run(tab, "store", 'return m.parsed(x, "id");', json.dumps(kept))
    fields = {"turns", "steering", "choices", "compare", "marks", "settings", "draft"}
    assert set(state) == fields | {"id", "title", "changed"}
    assert state["id"] == "id"
    for turn in state["turns"]:
        assert isinstance(turn["user"], str)
        assert turn["answers"]
        for answer in turn["answers"]:
            assert answer["state"] in ("done", "stopped", "error")
            assert isinstance(answer["text"], str)
    assert all(isinstance(choice, dict) for choice in state["choices"].values())
    again = run(tab, "store", 'return m.parsed(x, "id");', json.dumps(state | {"version": 1}))
    assert again == state


def test_what_a_choice_asks_for(tab: Desk) -> None:
    entry = {
        "name": "m",
        "kind": "map",
        "activate": 2,
        "deactivate": 3,
        "reverse": True,
        "layers": "1-2",
        "scale": None,
    }
    own = {"activate": 2, "deactivate": 3, "reverse": True, "layers": "1-2", "scale": None}
    whole = {"map": "m", "activate": 2, "deactivate": 3, "reverse": True, "layers": "1-2", "mode": "hard"}
    cases: list[tuple[Any, Any, Any]] = [
        (None, None, None),
        ({"name": "b", "kind": "bias"}, None, "b"),
        (entry, own, "m"),
        (entry, own | {"activate": 0, "deactivate": 0}, None),
        (entry, own | {"activate": 4}, whole | {"activate": 4}),
        (entry, own | {"layers": ""}, whole | {"layers": "0-4"}),  # left out, they would be the map's own
        (entry, own | {"scale": 1.5}, whole | {"mode": "soft", "scale": 1.5}),
        (entry | {"scale": 2}, own, whole),
        (entry, own | {"rank": "rd", "weights": None, "cap": None}, "m"),
        (entry, own | {"rank": "effect"}, whole | {"rank": "effect"}),
        (entry | {"rank": "effect"}, own | {"rank": "effect"}, "m"),
        (entry | {"rank": "effect"}, own, whole | {"rank": "rd"}),  # left out, it would be the map's own
        (entry, own | {"cap": 2}, whole | {"mode": "capped", "cap": 2}),
        (entry | {"cap": "inf"}, own | {"cap": "inf"}, "m"),
        (entry | {"cap": "inf"}, own, whole),
        (
            entry,
            own | {"scale": 1.5, "weights": "logit"},
            whole | {"mode": "soft", "scale": 1.5, "weights": "logit"},
        ),
        (
            entry | {"scale": 1.5, "weights": "logit"},
            own | {"scale": 1.5},
            whole | {"mode": "soft", "scale": 1.5, "weights": "none"},
        ),
    ]
    for entry_of, choice, wanted in cases:
        assert run(tab, "choice", "return m.requestOf(...x);", [entry_of, choice, 5]) == wanted


def test_once_a_frame(tab: Desk) -> None:
    body = """const calls = []; const frames = new m.PerFrame((items) => calls.push(items.length));
    for (let i = 0; i < 1000; i++) frames.add(i % 3);
    const before = calls.length;
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    frames.add(1); frames.flush(); frames.flush();
    return [before, calls];"""
    assert run(tab, "dom", body) == [0, [3, 1]]


def test_numbers_as_they_are_shown(tab: Desk) -> None:
    shown = run(tab, "dom", "return x.map((value) => m.signed(value));", [0.5, -0.25, 0, -0.0001, 1])
    assert shown == ["+0.500", "\u22120.250", "0.000", "0.000", "+1.000"]
    facts = {"tokens": 5, "milliseconds": 1000, "seed": 3, "cached": 2, "prompt": 9, "finish": "length"}
    words = ["5 tokens", "5.0 tokens/s", "seed 3", "2 of 9 prompt tokens reused", "cut off at the limit of tokens"]
    assert run(tab, "conversation", "return m.figures(x);", facts) == words
    assert run(tab, "conversation", "return m.figures(x);", {"tokens": 1, "milliseconds": 0}) == ["1 token"]
