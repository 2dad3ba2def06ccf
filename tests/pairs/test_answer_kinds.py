"""Kinds of answers, and the words of two answers in one spelling."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.pairs.answer_kinds import KINDS, answer_kind, canonical_words
from steermoe_local.pairs.number_pairs import number_word


@pytest.mark.parametrize(
    ("answer", "question", "kind"),
    [
        ("yes", "Is it?", "yes or no"),
        ("1936", "When was it?", "year"),
        ("in 1936", "When was it?", "year"),
        ("1990s", "When was it?", "year"),
        ("1936", "How many were there?", "number"),
        ("936", "When was it?", "number"),
        ("4 May 1936", "When was it?", "date"),
        ("Mondays", "When is it?", "date"),
        ("35%", "How much?", "percentage"),
        ("two per cent", "How much?", "percentage"),
        ("$5 million", "How much?", "amount of money"),
        ("twenty dollars", "How much?", "amount of money"),
        ("1,200", "How many?", "number"),
        ("two hundred and five", "How many?", "number"),
        ("nine hours", "How long?", "quantity"),
        ("Ida Berg", "Who sells it?", "name of somebody"),
        ("the Bank of Oslo", "Where is it?", "name of a place"),
        ("Denver Broncos", "Which team won?", "name"),
        ("larch", "What is it made of?", "word"),
        ("a wooden bridge", "What is it?", "phrase"),
        ("because the water was far too high", "Why?", "longer text"),
        ("...", "What?", "word"),
        ("北京", "哪里?", "word"),
    ],
)
def test_kinds(answer: str, question: str, kind: str) -> None:
    assert answer_kind(answer, question) == kind
    assert kind in KINDS


@given(st.text(min_size=1), st.text())
def test_every_text_is_of_a_kind(answer: str, question: str) -> None:
    assert answer_kind(answer, question) in KINDS


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The 2nd of Sept., 1,200 cats", ["2", "september", "1200", "cat"]),
        ("May the fourth", ["may", "4"]),
        ("$5 million", ["dollar", "5000000"]),
        ("1.50 per cent", ["3/2", "percent"]),
        ("three hundred thousand and twelve", ["300012"]),
        ("hundreds, thousand", ["hundred", "1000"]),
        ("3, 4 and five", ["3", "4", "5"]),
        ("1990, 5 people", ["1990", "5", "people"]),
        ("Café \uff13", ["cafe", "3"]),
        ("The", ["the"]),
        ("!?", []),
        ("9" * 5000, ["9" * 5000]),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert canonical_words(text) == words


@given(st.integers(0, 9999), st.sampled_from([1, 1000, 1_000_000]))
def test_a_number_has_one_spelling(n: int, scale: int) -> None:
    n = n if scale == 1 else max(1, n % 1000)
    name = {1: "", 1000: " thousand", 1_000_000: " million"}[scale]
    written = f"{number_word(n)}{name}"
    assert canonical_words(written) == canonical_words(f"{n * scale:,}") == canonical_words(f"{n * scale}")
    assert canonical_words(f"{n}{name}") == [str(n * scale)]


@given(
    st.lists(st.sampled_from(["two", "twenty", "hundred", "million", "and", "5", "1936", "the", "cat"]), max_size=12)
)
def test_parts_only_add_words(words: list[str]) -> None:
    text = " ".join(words)
    together, parts = canonical_words(text), canonical_words(text, parts=True)
    assert set(together) <= set(parts)
    for word in words:
        if canonical_words(word) not in (["and"], ["the"]):
            assert set(canonical_words(word)) <= set(parts), "what stands in a text alone is found in it"


def test_numbers_beside_others_are_found() -> None:
    words = set(canonical_words("between one hundred and two hundred, or two million and three million", parts=True))
    assert {"100", "200", "2000000", "3000000"} <= words


@pytest.mark.parametrize("word", ["hundred ", "thousand ", "million two ", "9", "9,", "9.", "\u0300", "a ", "\ufdfa"])
def test_long_texts_take_time_as_their_length(word: str) -> None:
    start = time.process_time()
    canonical_words(word * 50_000, parts=True)
    # a second; a number that grew with the text, or a search from each place, would take minutes
    assert time.process_time() - start < 30
