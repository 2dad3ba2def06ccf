"""Phases of a reply: thinking and answer, as each reasoning format marks them, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.llama.phases import PhaseTracker, TokenTexts
from steermoe_local.llama.reasoning import ReasoningSplitter
from steermoe_local.llama.reasoning_styles import CHANNELS, MESSAGE, START, TAGS, ReasoningStyle, Tags, reasoning_style
from steermoe_local.llama.thinking import thinking_arguments
from tests.llama.test_reasoning import STYLES, TEXTS
from tests.llama.test_reasoning_styles import ANSWER, QUESTION, REASONING, UNSEEN, rendered
from tests.support.chat_templates import NAMES, render, source

HARMONY, MUSE = CHANNELS


def phases(style: ReasoningStyle | None, pieces: Sequence[str]) -> str:
    """T or A for each character of the pieces, which are tokens."""
    tracker = PhaseTracker(style)
    return "".join({"thinking": "T", "answer": "A"}[tracker.next(piece)] * len(piece) for piece in pieces)


def parts(style: ReasoningStyle | None, *pieces: str) -> list[tuple[str, str]]:
    """Each token with its phase."""
    return list(zip(pieces, map(PhaseTracker(style).next, pieces), strict=True))


T, A = "thinking", "answer"


@pytest.mark.parametrize("tags", TAGS, ids=lambda tags: tags.opening + tags.answer_opening)
def test_tags(tags: Tags) -> None:
    """The markers of the reasoning are thinking, and everything behind its end is answer, its own marker as well."""
    style = ReasoningStyle(tags)
    openings = [tags.header, tags.opening] if tags.header else [tags.opening]
    answer = [tags.header, tags.answer_opening] if tags.answer_opening else []
    thought = [(piece, T) for piece in [*openings, "\nTwo", " and two.", "\n", tags.closing]]
    said = [(piece, A) for piece in [*filter(None, answer), "\n\n", "Four", " it is.", tags.answer_closing or "!", "x"]]
    assert parts(style, *(piece for piece, _ in thought + said)) == thought + said


@pytest.mark.parametrize("tags", TAGS, ids=lambda tags: tags.opening + tags.answer_opening)
def test_tags_that_the_prompt_opened(tags: Tags) -> None:
    style = ReasoningStyle(tags, prefix=tags.opening + "\n")
    assert parts(style, "Two", tags.closing, "Four") == [("Two", T), (tags.closing, T), ("Four", A)]


@pytest.mark.parametrize("tags", TAGS, ids=lambda tags: tags.opening + tags.answer_opening)
def test_a_reply_without_reasoning(tags: Tags) -> None:
    """It is answer from its first token that cannot begin a marker; an opening tag later on is text."""
    style = ReasoningStyle(tags)
    assert parts(style, "Four", tags.opening, "x") == [("Four", A), (tags.opening, A), ("x", A)]
    assert parts(style, tags.closing, "Four") == [(tags.closing, T), ("Four", A)]
    if tags.answer_opening:
        assert parts(style, tags.answer_opening, "Four")[1:] == [("Four", A)]


def test_without_a_style() -> None:
    assert parts(None, "<think>", "x", "</think>") == [("<think>", A), ("x", A), ("</think>", A)]


def test_harmony() -> None:
    style = ReasoningStyle(None, "<|start|>assistant", HARMONY)
    thought = ["<|channel|>", "analysis", MESSAGE, "Two", ".", "<|end|>"]
    called = [START, "assistant", "<|channel|>", "commentary", " to=functions.add", MESSAGE, "{}", "<|end|>"]
    header = [START, "assistant", "<|channel|>", "final"]
    said = [MESSAGE, "Four", "<|return|>"]
    found = parts(style, *thought, *called, *thought, *header, *said)
    assert found == [(piece, T) for piece in thought + called + thought + header] + [(piece, A) for piece in said]


def test_harmony_thinks_again_behind_an_answer() -> None:
    style = ReasoningStyle(None, "<|start|>assistant", HARMONY)
    said = ["<|channel|>", "final", MESSAGE, "Four", "<|end|>", START, "assistant", "<|channel|>", "analysis"]
    assert parts(style, *said, MESSAGE, "Hm", "<|end|>")[4:] == [
        *((piece, A) for piece in said[4:]),
        (MESSAGE, T),
        ("Hm", T),
        ("<|end|>", T),
    ]


def test_harmony_in_the_prompt() -> None:
    final = ReasoningStyle(None, START + "assistant<|channel|>final" + MESSAGE, HARMONY)
    assert parts(final, "Four", "<|return|>") == [("Four", A), ("<|return|>", A)]
    analysis = ReasoningStyle(None, START + "assistant<|channel|>analysis" + MESSAGE, HARMONY)
    assert parts(analysis, "Two", "<|end|>") == [("Two", T), ("<|end|>", T)]


def test_muse() -> None:
    style = ReasoningStyle(None, START + "assistant", MUSE)
    thought = [" to=self", MESSAGE, "Two", "<|eom|>", START, "assistant", " to=user"]
    assert parts(style, *thought, MESSAGE, "Four", "<|eot|>") == [
        *((piece, T) for piece in thought),
        *((piece, A) for piece in (MESSAGE, "Four", "<|eot|>")),
    ]


# the templates that render reasoning; test_reasoning_styles.py checks that no other one does
@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNSEEN and reasoning_style(source(name))])
def test_templates_of_the_archive(name: str) -> None:
    """Independent of the table: the template was given reasoning and answer, so it is known where they are."""
    found = rendered(name)
    assert found is not None
    prompt, reply = found
    style = reasoning_style(source(name), prompt)
    marked = phases(style, list(reply))
    start = reply.index(REASONING)
    assert marked[start : start + len(REASONING)] == "T" * len(REASONING)
    if ANSWER in reply:  # one leaves out what comes with a call
        start = reply.index(ANSWER, start)
        assert marked[start : start + len(ANSWER)] == "A" * len(ANSWER)


@pytest.mark.parametrize("name", [name for name in NAMES if reasoning_style(source(name))])
@pytest.mark.parametrize("thinking", [False, True])
def test_a_bound_answer_is_all_answer(name: str, thinking: bool) -> None:
    """Behind `answer_opening`, in the prompt or in the reply, what comes next is answer."""
    template = source(name)
    prompt = render(name, [QUESTION], answer=True, **thinking_arguments(template, thinking))
    style = reasoning_style(template, prompt)
    assert style is not None
    closing = style.answer_opening(prompt)
    assert set(phases(reasoning_style(template, prompt + closing), list('{"n": 4}'))) == {"A"}
    assert phases(style, [*closing, *'{"n": 4}']).endswith("A" * 8)


def whole_text_phase(style: ReasoningStyle | None, text: str, start: int, end: int) -> str:
    """The phase of text[start:end], by what it does to the whole text in front of it, parsed anew."""
    places = []
    for stop in (start, end):
        splitter = ReasoningSplitter(style)
        splitter.feed(text[:stop])
        places.append(splitter.place)
    before, after = places
    if after == "answer" or (before in ("between", "answer") and after != "reasoning"):
        return "A"
    return "T"


@given(st.sampled_from(sorted(STYLES)), TEXTS, st.data())
def test_phases_depend_on_the_text_alone(name: str, text: str, data: st.DataObject) -> None:
    """Of a token it matters what its text does to the text in front of it, not how that was cut."""
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)) | {0, len(text)})
    pieces = [text[a:b] for a, b in pairwise(cuts)]
    found = phases(STYLES[name], pieces)
    expected = [whole_text_phase(STYLES[name], text, a, b) * (b - a) for a, b in pairwise(cuts)]
    assert found == "".join(expected)


@given(st.sampled_from(sorted(STYLES)), TEXTS)
def test_what_is_shown_is_of_its_phase(name: str, text: str) -> None:
    """A reader sees reasoning and answer: each that is not blank has tokens of its phase."""
    style = STYLES[name]
    marked = phases(style, list(text))
    splitter = ReasoningSplitter(style)
    seen = {kind for kind, part in splitter.feed(text) if part.strip()}
    assert ("reasoning" in seen) <= ("T" in marked)
    assert ("answer" in seen) <= ("A" in marked)


TEXT = "naïve 漢字 🙂 <think>é</think>\n"


@given(st.lists(st.integers(0, len(TEXT.encode())), max_size=12))
def test_a_character_belongs_to_the_token_that_completes_it(cuts: list[int]) -> None:
    data = TEXT.encode()
    ends = sorted({*cuts, len(data)})
    tokens = [data[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    texts = TokenTexts(lambda token: tokens[token])
    found = [texts.next(token) for token in range(len(tokens))]
    assert "".join(found) == TEXT
    for i in range(len(tokens)):
        assert "".join(found[: i + 1]) == b"".join(tokens[: i + 1]).decode("utf-8", "ignore")


def test_bytes_that_are_no_text() -> None:
    tokens = [b"a\xff", b"\xf0\x9f", b"b", b"\xe2", b"\x82", b"\xac"]
    texts = TokenTexts(lambda token: tokens[token])
    assert [texts.next(token) for token in range(6)] == ["a\ufffd", "", "\ufffdb", "", "", "€"]
