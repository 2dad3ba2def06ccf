"""Pairs of a document's answer against a wrong one: which answers are swapped, and that none of them is right."""

from __future__ import annotations

import itertools
import json
import re
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local._util.records import rows as read_rows
from steermoe_local.pairs import choice_pairs as module
from steermoe_local.pairs.answer_kinds import answer_kind
from steermoe_local.pairs.builders import Tally, select, squad_rows
from steermoe_local.pairs.choice_pairs import (
    MOST_ACCEPTED,
    MOST_CHARACTERS,
    MOST_DOCUMENT,
    AnswerPool,
    RightAnswers,
    answer_pool,
    choice_pairs,
)
from steermoe_local.pairs.pairs import Message, Pair
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "pairs" / "squad-layout.json"
NONE_LEFT = "no other answer of the same kind is certainly wrong"


def row(context: str, question: str, *answers: str, **more: Any) -> dict[str, Any]:
    return {"context": context, "question": question, "answers": {"text": list(answers)}, **more}


def made(rows: list[dict[str, Any]], seed: int = 0, tally: Tally | None = None, **options: Any) -> list[Pair]:
    pool = answer_pool(squad_rows(rows), seed=seed)
    return list(choice_pairs(squad_rows(rows), tally or Tally(), pool, seed=seed, **options))


def document_of(pair: Pair) -> str:
    return str(pair.positive[0].content)  # type: ignore[union-attr]


YEARS = [row(f"House {n} was built in {1900 + n}.", f"When was house {n} built?", str(1900 + n)) for n in range(40)]


def test_one_prompt_and_two_answers_of_a_kind() -> None:
    tally = Tally()
    pairs = made(list(read_rows(EXAMPLE)), tally=tally)
    assert (tally.rows, dict(tally.skipped)) == (13, {NONE_LEFT: 1})
    answers = {pair.id: (pair.positive_target, pair.negative_target) for pair in pairs}
    assert answers["bridge-1"] == ("1936", "1874")
    assert answers["ferry-3"] == ("Ida Berg", "Tom Hale")
    assert "choir-2" not in answers, "no other number is there"
    for pair in pairs:
        assert pair.margin_problem() is None
        ask = pair.positive[0]
        assert isinstance(ask, Message)
        assert re.fullmatch(r"Document: .+ Question: .+\?", ask.content)
        assert pair.positive == (ask, Message("assistant", pair.positive_target))
        assert pair.negative == (ask, Message("assistant", pair.negative_target))
        assert pair.positive_target in ask.content
        assert pair.negative_target not in ask.content
        assert answer_kind(pair.positive_target, ask.content) == answer_kind(pair.negative_target, ask.content)


def test_the_wrong_answer_depends_on_the_seed_and_the_question_alone() -> None:
    one = {pair.positive_target: pair.negative_target for pair in made(YEARS, seed=1)}
    backwards = {pair.positive_target: pair.negative_target for pair in made(YEARS[::-1], seed=1)}
    assert one == backwards
    assert one != {pair.positive_target: pair.negative_target for pair in made(YEARS, seed=2)}
    assert len(set(one.values())) > 10, "not one answer for all"
    assert made(YEARS, seed=1) == made(YEARS, seed=1)


def test_the_nearest_in_length_is_taken() -> None:
    rows = [row(f"Here is {name}.", "Who is here?", name) for name in ("Bo", "Al", "Maximilian Featherstone")]
    assert {pair.positive_target: pair.negative_target for pair in made(rows)}["Bo"] == "Al"


@pytest.mark.parametrize(
    ("answer", "context", "accepted"),
    [
        ("1936", "It was built in 1936.", []),
        ("red", "It is covered.", []),  # letters of another word: not certain
        ("RED", "It is red.", []),
        ("4", "There are four of them.", []),
        ("200", "There are two hundred.", []),
        ("the fourth of May", "It was on May 4.", []),
        ("Berg, Ida", "Ida Berg sells it.", []),
        ("Fridays", "It is every Friday.", []),
        ("Sao Paulo", "It is in São Paulo.", []),
        ("50%", "It is 50 percent.", []),
        ("5", "It is deep.", ["five"]),
        ("Denver", "They won.", ["Denver Broncos"]),
        ("the Denver Broncos", "They won.", ["Broncos"]),
        ("北京市", "在那里。", ["北京"]),
        ("Where", "It is here.", []),  # of the question
        ("???", "It is here.", []),
        ("the", "A bridge.", []),
    ],
)
def test_what_may_be_right_is_not_taken(answer: str, context: str, accepted: list[str]) -> None:
    assert not RightAnswers(context, "Where the?", accepted).certainly_exclude(answer)


def test_one_word_of_a_name_may_be_the_whole() -> None:
    for context, accepted in (("Ann won.", ["Bo"]), ("Bo won.", ["Ann", "Bo"])):
        assert not RightAnswers(context, "Who won?", accepted, names=True).certainly_exclude("Ann Lund")
        assert RightAnswers(context, "Who won?", accepted, names=True).certainly_exclude("Ida Lund")
        assert RightAnswers(context, "Who won?", ["Bo"]).certainly_exclude("Ida Lund")
    pairs = made([row("Bo met Ann.", "Who met?", "Bo"), row("Ann Lund met Bob.", "Who met?", "Ann Lund"), *YEARS[:2]])
    assert {pair.positive_target for pair in pairs} == {"1900", "1901"}


@pytest.mark.parametrize("answer", ["1937", "blue", "two hundred and six", "the sixth of May", "Ida Holm"])
def test_what_is_wrong_is_taken(answer: str) -> None:
    text = "On May 4, 1936, Ida Berg painted two hundred and five doors black."
    assert RightAnswers(text, "What?", ["black", "1936"]).certainly_exclude(answer)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"context": "", "question": "Why?"}, "no question or no document"),
        ({"context": 3, "question": "Why?"}, "no question or no document"),
        (row("Built in 1936.", "When?", "1936", is_impossible=True), "the document does not answer the question"),
        (row("Built in 1936.", "When?"), "the document does not answer the question"),
        (row("Built in 1936.", "When?", "1937"), "no answer that stands in the document"),
        ({"context": "Built.", "question": "When?", "answers": [3, None, {}, {"text": "\ud800"}]}, None),
        (row(f"It is {'x' * 300}.", "What?", "x" * 300), f"the answer has more than {MOST_CHARACTERS} characters"),
        (row("It is x.", "What?", *map(str, range(200)), "x"), f"more than {MOST_ACCEPTED} accepted answers"),
        (row("x" * (MOST_DOCUMENT + 1), "What?", "x"), "a document or question of more than 1 Mi characters"),
        (row("x y", "y" * (MOST_DOCUMENT + 1), "x"), "a document or question of more than 1 Mi characters"),
        (row("It is so.", "Is it?", "so"), NONE_LEFT),
        (row("It is !?.", "Is it?", "!?"), NONE_LEFT),
    ],
)
def test_what_is_left_out_is_counted(bad: dict[str, Any], reason: str | None) -> None:
    tally = Tally()
    pairs = made([*YEARS[:3], bad, *YEARS[3:6]], tally=tally)
    assert [pair.positive_target for pair in pairs] == [str(1900 + n) for n in range(6)]
    assert tally.rows == 7
    assert sum(tally.skipped.values()) == 1
    assert reason is None or dict(tally.skipped) == {reason: 1}


def test_the_first_answer_that_stands_in_the_document_is_the_documents() -> None:
    rows = [row("It was built in\n May 1936.", "When?", "spring 1936", "May 1936", "1936"), *YEARS[:2]]
    rows.append(row("It fell in June 1950.", "When?", "June 1950"))
    pair = made(rows)[0]
    assert (pair.positive_target, pair.negative_target) == ("May 1936", "June 1950")


def test_one_question_of_a_document() -> None:
    text = "It was built in 1936 of larch."
    rows = [row(text, "Of what?", "larch"), row(text, "When?", "1936"), row(text, "Which year?", "1936"), *YEARS]
    tally = Tally()
    pairs = made(rows, tally=tally, one_per_document=True)
    assert sum(text in document_of(pair) for pair in pairs) == 1
    # the question on larch, which makes no pair, does not use the document up
    assert dict(tally.skipped) == {NONE_LEFT: 1, "another question on the document was taken": 1}


def test_the_pool_is_bounded_and_does_not_depend_on_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ANSWERS", 20)
    answers = [f"answer {n}" for n in range(500)]
    pools = []
    for order in (answers, answers[::-1], answers * 2):
        pool = AnswerPool(seed=3)
        for answer in order:
            pool.add("phrase", answer)
        pools.append(list(pool.answers("phrase", 0)))
    assert pools[0] == pools[1] == pools[2]
    assert len(set(pools[0])) == 20
    other = AnswerPool(seed=4)
    for answer in answers:
        other.add("phrase", answer)
    assert set(other.answers("phrase", 0)) != set(pools[0])
    assert list(other.answers("name", 5)) == []


def test_few_answers_are_compared_with_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every answer of a kind stands in the document, the search ends."""
    numbers = [str(n) for n in range(1001, 1901)]
    text = " ".join(numbers)
    rows = [row(text, f"Which is number {n}?", number) for n, number in enumerate(numbers)]
    compared = 0
    exclude = RightAnswers.certainly_exclude

    def counted(self: RightAnswers, answer: str) -> bool:
        nonlocal compared
        compared += 1
        return exclude(self, answer)

    monkeypatch.setattr(RightAnswers, "certainly_exclude", counted)
    assert made(rows) == []
    assert 0 < compared <= 512 * len(rows)


#
# no swapped answer is right: answers with a meaning that can be spelled in several ways
#

_SPELLINGS = {
    **{n: [str(n), word] for n, word in ((4, "four"), (5, "five"), (21, "twenty-one"), (205, "two hundred and five"))},
    1200: ["1200", "1,200", "twelve hundred", "one thousand two hundred"],
    "4 May": ["4 May", "May 4", "May 4th", "the fourth of May", "the 4th of May"],
    "5 May": ["5 May", "May 5", "the fifth of May"],
    "Friday": ["Friday", "Fridays", "on Friday"],
    "Monday": ["Monday", "Mondays", "on Mondays"],
    "half": ["50%", "fifty percent", "50 per cent"],
    "tenth": ["10%", "ten percent"],
    "Ida": ["Ida Berg", "Berg", "Berg, Ida"],
    "Tom": ["Tom Hale", "Hale", "the Tom Hale"],
    "Ann": ["Ann Lund", "Ann"],
    "oak": ["oak", "the oak", "Oak"],
    "larch": ["larch", "a larch"],
    "pine": ["pine", "Pine"],
}
MEANING = {spelling: meaning for meaning, spellings in _SPELLINGS.items() for spelling in spellings}
_MEANINGS = sorted(_SPELLINGS, key=str)


@st.composite
def _question(draw: st.DrawFn) -> tuple[dict[str, Any], set[Any]]:
    """A row, and the meanings of all that is right: what the document says, and what is accepted."""
    said = draw(st.lists(st.sampled_from(_MEANINGS), min_size=1, max_size=5, unique=True))
    spelled = [draw(st.sampled_from(_SPELLINGS[meaning])) for meaning in said]
    also = [draw(st.sampled_from(_SPELLINGS[m])) for m in draw(st.lists(st.sampled_from(_MEANINGS), max_size=2))]
    joint = draw(st.sampled_from([" and ", ", ", "; ", " or by "]))
    context = f"They say {joint.join(spelled)}."
    accepted = [draw(st.sampled_from(spelled)), *also]
    return row(context, draw(st.sampled_from(["Who?", "What is it?", "How many?"])), *accepted), {
        *said,
        *(MEANING[a] for a in also),
    }


def _plain(text: str) -> str:
    """SQuAD's own normal form of an answer."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in text.split() if word not in ("a", "an", "the"))


@given(st.lists(_question(), min_size=1, max_size=12), st.integers(0, 3))
def test_a_swapped_answer_is_never_right(questions: list[tuple[dict[str, Any], set[Any]]], seed: int) -> None:
    rows = [found | {"id": str(n)} for n, (found, _) in enumerate(questions)]
    for pair in made(rows, seed=seed):
        found, right = questions[int(pair.id)]
        wrong = pair.negative_target
        assert MEANING[wrong] not in right, (found, wrong)
        assert wrong.lower() not in found["context"].lower()
        assert f" {_plain(wrong)} " not in f" {_plain(found['context'])} "
        assert _plain(wrong) not in map(_plain, found["answers"]["text"])
        assert pair.margin_problem() is None


def test_the_spellings_do_make_pairs() -> None:
    """What the test above says is not of an empty list: each meaning is swapped, whatever its spelling."""
    rows = [row(f"They say {spelling}.", "What is it?", spelling, id=spelling) for spelling in MEANING]
    pairs = made(rows)
    swapped = {MEANING[pair.positive_target] for pair in pairs}
    assert swapped == set(_MEANINGS)
    assert all(MEANING[pair.positive_target] != MEANING[pair.negative_target] for pair in pairs)


@given(st.lists(st.tuples(*[st.text(max_size=12)] * 3), max_size=8), st.integers())
def test_any_texts_make_pairs_or_none(texts: list[tuple[str, str, str]], seed: int) -> None:
    rows = [row(f"{context} {answer}", question, answer) for context, question, answer in texts]
    tally = Tally()
    pairs = list(select(made(rows, seed=seed, tally=tally), tally))
    assert tally.rows == len(rows) == len(pairs) + sum(tally.skipped.values())
    for pair in pairs:
        assert pair.margin_problem() is None
        assert json.loads(json.dumps(pair.to_dict()))["id"] == pair.id
        context, _, question = document_of(pair).removeprefix("Document: ").rpartition(" Question: ")
        assert pair.negative_target.casefold() not in context.casefold()
        assert pair.negative_target.casefold() not in question.casefold()


def test_the_same_rows_in_each_layout() -> None:
    document = next(read_rows(EXAMPLE))
    columns = [
        {**found, "answers": {"text": [answer["text"] for answer in found["answers"]]}}
        for found in squad_rows([document])
    ]
    assert made(columns) == made([document])
    texts = [{**found, "answers": found["answers"]["text"]} for found in columns]
    assert made(texts) == made([document])
    assert made(list(itertools.chain(columns, columns)))[: len(made(columns))] == made(columns)
