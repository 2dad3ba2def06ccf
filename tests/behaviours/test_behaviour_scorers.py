"""The scorers of style and form: any text gets a score at once, and what echoes, cuts and options do."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.behaviours import behaviours
from steermoe_local.errors import FormatError, UsageError
from steermoe_local.evaluation.tasks.form_scorers import language_of
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.pairs.prompts import PromptItem

SCORERS = {one.name: make_scorer(one.scorer, one.options) for one in behaviours() if not one.model}
ITEMS = {one.name: one.heldout()[0] for one in behaviours() if not one.model}
# letters that the patterns are about
PIECES = st.sampled_from(
    ["1. ", "Step 1", "\n", " ", ".", "!", "```", "```json", "{", "}", "[", "]", '"', "\\", ":", "I", "'m", "may",
     "an AI", "ä", "der", "the", "seven", "7", "-", "=", "x", "\u2019", "aaaa", "First,", "then", "*", ">", "\0",
     "\U0001f600"]
)  # fmt: skip


def label(name: str, text: str, prompt: str = "x", **options: object) -> str:
    return make_scorer(name, options).score(PromptItem("q", prompt), text).label


@given(text=st.one_of(st.text(max_size=200), st.lists(PIECES, max_size=60).map("".join)))
def test_any_text_gets_a_score(text: str) -> None:
    for name, scorer in SCORERS.items():
        score = scorer.score(ITEMS[name], text)
        assert score.value in (0, 1)
        assert score.value == scorer.score(ITEMS[name], text).value


@pytest.mark.parametrize(
    "text",
    [
        piece * 60_000
        for piece in ("a", " ", ".", "! ", "\n", "\n*", "1. ", "1 + ", "[", "{", '{"a":', '"', "\\", "`", "```",
                      "it's ", "i", "seven-", "step ", "I am ", "oooo", "ä", "as a ", ".\t", "x'", "first\n")
    ],
    ids=repr,
)  # fmt: skip
def test_long_texts_do_not_take_long(text: str) -> None:
    """A pattern that takes the square of a text's length would need minutes for these."""
    for name, scorer in SCORERS.items():
        before = time.process_time()
        scorer.score(ITEMS[name], text)
        assert time.process_time() - before < 20, name


@pytest.mark.parametrize(
    ("prompt", "text", "found"),
    [
        ("Which number comes after three?", "The number that comes after three is 4.", "digits"),
        ("Which number comes after 3?", "The number that comes after 3 is four.", "words"),
        ("Which is larger, 3 or 5?", "5", "digits"),
        ("Which is larger, 3 or 5?", "5 is larger than 3.", "digits"),
        ("Which is larger, three or five?", "Five.", "words"),
        ("How many?", "Since 1990 there have been twelve.", "words"),
        ("When?", "In 1990.", "digits"),
        ("How many?", "B12 is one of three.", "words"),
        ("How many?", "COVID-19 has no number.", "ill-formed"),
        ("How many?", "One cannot say.", "ill-formed"),
        ("Say one.", "Two.", "words"),
    ],
)
def test_echoes_years_and_names(prompt: str, text: str, found: str) -> None:
    assert label("digits-or-words", text, prompt) == found
    talk = PromptItem("q", (PromptItem("q", prompt).messages()[0],))
    assert make_scorer("digits-or-words", {}).score(talk, text).label == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', "json"),
        ("[]", "json"),
        ('{"a": [1, {"b": "}"}]} ', "json"),
        ('{"a": [1, {"b": ', "json"),
        ("```json\n[1, 2]", "json"),
        ('```json\n["1", 2]', "json"),
        ('{"a": 1,}', "ill-formed"),
        ("{a}", "ill-formed"),
        ("A set is written {a, b} in mathematics, and the letters stand for its elements.", "prose"),
        ("see [1]", "prose"),
        ("", "ill-formed"),
        ("{" * 5000, "ill-formed"),
        ("[" * 5000 + "]" * 5000, "ill-formed"),
    ],
)
def test_json(text: str, found: str) -> None:
    assert label("json", text) == found


def test_months_are_no_hedges() -> None:
    assert label("hedging", "The bridge was opened in May 1925.") == "confident"
    assert label("hedging", "The bridge may be closed.") == "hedged"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Leonardo da Vinci hat die Mona Lisa gemalt.", "german"),
        ("Alle Vögel fliegen im Herbst nach Süden.", "german"),
        ("War das so?", "german"),
        ("Canada's coast is long.", "english"),
        ("Add-ins are loaded by the program.", "english"),
        ("On s'assied sur une chaise.", "french"),
        ("Il s\u2019agit d\u2019une ville.", "french"),
        ("El archivo se guarda a las siete y se cierra.", "spanish"),
        ("Il testo si sposta a destra della finestra.", "italian"),
        ("De trein is niet van gisteren, het is een nieuwe.", ""),
        ("O trem não é uma casa.", ""),
        ("Das Haus ist alt. The house is old.", ""),
        ("", ""),
        ("Madrid", ""),
    ],
)
def test_language_of(text: str, found: str) -> None:
    assert language_of(text) == found


def test_sides_of_languages() -> None:
    text = "Das ist ein Haus."
    assert make_scorer("language", {}).score(PromptItem("q", "x"), text).value == 1
    assert make_scorer("language", {"positive": "english"}).score(PromptItem("q", "x"), text).value == 0


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("length", {"limit": 0}, "limit: 0"),
        ("steps", {"limit": -1}, "limit: -1"),
        ("json", {"share": 0.0}, "share: 0"),
        ("json", {"share": 1.5}, "share: 1.5"),
        ("language", {"positive": "latin"}, "'latin'"),
        ("language", {"negative": "latin"}, "'latin'"),
        ("language", {"positive": ""}, "positive: ''"),
        ("language", {"positive": "french", "negative": "french"}, "name two"),
    ],
)
def test_impossible_options(name: str, options: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_scorer(name, options)


def test_impossible_items() -> None:
    for name, extra in (("length", {"limit": "ten"}), ("length", {"limit": True}), ("role", {"words": "sea"})):
        with pytest.raises(FormatError, match=next(iter(extra))):
            make_scorer(name, {}).check(PromptItem("q", "x", extra=extra))
    assert make_scorer("length", {}).score(PromptItem("q", "x", extra={"limit": 2}), "one two three").label == "long"
