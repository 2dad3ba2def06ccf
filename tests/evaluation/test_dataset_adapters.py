"""Data set adapters: what each makes of a row, what is left out and why, and their options."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.errors import FormatError, UsageError
from steermoe_local.evaluation.datasets.builders import (
    ADAPTERS,
    BuildOptions,
    Tally,
    dataset_rows,
    task_head,
    task_items,
)
from steermoe_local.evaluation.tasks.scorers import make_scorer
from tests.support.dataset_samples import (
    ADVBENCH,
    COUNTERFACTUAL,
    CRANES,
    HUB_MCTEST,
    INCONSISTENT,
    MQUAKE,
    QUESTION,
    SAMPLES,
    SNAILS,
    STORY,
    STRONGREJECT,
    TRIVIA,
    UNANSWERABLE,
    edit,
    from_file,
    made,
    write_csv,
    write_json,
    write_mctest,
)

#
# what each adapter makes of a row
#


def test_counterfactual_by_letter() -> None:
    item = made("faitheval-counterfactual", COUNTERFACTUAL)[0]
    assert item.id == "cf-0"
    assert item.content == (
        f"Document: {SNAILS}\nQuestion: Why do snails carry shell 0?\nA. It protects them\n"
        "B. It is filled with warm air\nC. It is a gift\nD. It makes them fast\nLetter of the Answer Only:"
    )
    assert item.extra["choices"] == ["A", "B", "C", "D"]
    assert item.extra["answer"] == 1
    assert task_head("faitheval-counterfactual")["scorer"] == "choice"


def test_counterfactual_by_text_and_free() -> None:
    item = made("faitheval-counterfactual", COUNTERFACTUAL, answer_as="text")[0]
    assert item.content == f"Document: {SNAILS}\nQuestion: Why do snails carry shell 0?\nFinal Answer Only:"
    assert item.extra == {"choices": COUNTERFACTUAL[0]["choices"]["text"], "answer": 1}
    head = task_head("faitheval-counterfactual", BuildOptions(answer_as="text"))
    assert (head["scorer"], head["options"]) == ("choice", {"normalize": "characters"})
    item = made("faitheval-counterfactual", COUNTERFACTUAL, answer_as="free")[0]
    assert item.extra["answer"] == ["It is filled with warm air"]
    assert item.extra["negative"] == ["It protects them", "It is a gift", "It makes them fast"]
    head = task_head("faitheval-counterfactual", BuildOptions(answer_as="free"))
    scorer = make_scorer(head["scorer"], head["options"])
    assert scorer.score(item, "it is filled with warm air.").value == 1
    assert scorer.score(item, "It protects them.") == scorer.score(item, "It is a gift")
    assert scorer.score(item, "It protects them.").label == "another choice"


@pytest.mark.parametrize(
    "choices",
    [
        {"label": ["A", "B"], "text": ["warm", "cold"]},
        {"label": ["1", "2"], "text": ["warm", "cold"]},
        [{"label": "A", "text": "warm"}, {"label": "B", "text": "cold"}],
        ["warm", "cold"],
        {"A": "warm", "B": "cold"},
        json.dumps({"label": ["A", "B"], "text": ["warm", "cold"]}),
    ],
)
def test_choices_in_any_form(choices: Any) -> None:
    row = {"context": "c", "question": "q", "choices": choices}
    key = "2" if "1" in str(choices) else "B"
    for answer in ({"answerKey": key}, {"answer": "cold"}, {"answerKey": None, "answer": "cold"}):
        item = made("faitheval-counterfactual", [row | answer])[0]
        assert (item.extra["texts"], item.extra["choices"], item.extra["answer"]) == (["warm", "cold"], ["A", "B"], 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"choices": None}, "choices that are no list and no object"),
        ({"choices": "{"}, "choices that are no list and no object"),
        ({"choices": {"label": ["A"], "text": ["x", "y"]}}, "choices that are no list and no object"),
        ({"choices": ["x"]}, "not 2 to 26 choices"),
        ({"choices": [str(n) for n in range(27)]}, "not 2 to 26 choices"),
        ({"choices": ["same", "same"]}, "a choice stands twice"),
        ({"choices": ["x", " "]}, "an empty choice"),
        ({"choices": ["x", math.nan]}, "an empty choice"),
        ({"answerKey": "Z", "answer": "z"}, "the answer is none of the choices"),
        ({"answerKey": None, "answer": math.nan}, "the answer is none of the choices"),
        ({"context": None}, "no document"),
        ({"context": math.nan}, "no document"),
        ({"question": "  "}, "no question"),
        ({"question": "\ud800"}, "no question"),
        ({"question": True}, "no question"),
    ],
)
def test_counterfactual_rows_that_are_left_out(changes: dict[str, Any], reason: str) -> None:
    tally = Tally()
    assert made("faitheval-counterfactual", [COUNTERFACTUAL[0] | changes], tally) == []
    assert tally.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("name", "rows", "right", "wrong"),
    [
        ("faitheval-unanswerable", UNANSWERABLE, ["Unknown.", "It cannot be said", "No information"], ["Ada did"]),
        ("faitheval-inconsistent", INCONSISTENT, ["Conflict", "There are two answers: Ada, Ben."], ["Ada", "Ben did"]),
    ],
)
def test_a_phrase_says_what_is_wrong(name: str, rows: list[Any], right: list[str], wrong: list[str]) -> None:
    item = made(name, rows)[0]
    word = str(item.extra["answer"][0])
    assert f"say '{word}'.\nFinal Answer Only:" in str(item.content)
    head = task_head(name)
    scorer = make_scorer(head["scorer"], head["options"])
    assert [scorer.score(item, text).value for text in right] == [1.0] * len(right)
    assert [scorer.score(item, text).value for text in wrong] == [0.0] * len(wrong)
    strict = made(name, rows, match="strict")[0]
    assert strict.extra["answer"] == [word]
    assert [scorer.score(strict, text).value for text in right] == [1.0] + [0.0] * (len(right) - 1)


def test_cf_triviaqa() -> None:
    item = made("cf-triviaqa", TRIVIA)[0]
    assert item.id == "tc_0"
    assert item.content == (
        "Document: Acorns are the fruit of the birch.\nQuestion: Which tree gives acorn 0?\nFinal Answer Only:"
    )
    assert item.extra == {"answer": ["the birch"]}
    tally = Tally()
    bad: list[Any] = [None, {}, {"answer": []}, {"answer": [3]}, {"answer": [{"paragraph_reference": {"string": 1.5}}]}]
    assert made("cf-triviaqa", [TRIVIA[0] | {"annotation": one} for one in bad], tally) == []
    assert tally.skipped == {"no answer": 5}


def test_mquake_single_hop() -> None:
    items = made("mquake", MQUAKE[:1])
    assert [item.id for item in items] == ["0.1", "0.2"]
    assert items[0].content == (
        "Document: boathouse 0 was built by Mills\nQuestion: Who built boathouse 0?\nFinal Answer Only:"
    )
    assert items[0].extra == {"answer": ["Mills", "A. Mills"], "negative": ["Anders", "Anders the Elder"]}
    assert items[1].extra == {"answer": ["Holm"], "negative": ["Berg"]}
    head = task_head("mquake")
    scorer = make_scorer(head["scorer"], head["options"])
    labels = [scorer.score(items[0], text).label for text in ("Mills", "Anders.", "Not Anders but Mills", "?")]
    assert labels == ["right", "memory", "both", "ill-formed"]


def test_mquake_multi_hop() -> None:
    item, other = made("mquake", MQUAKE[:2], hops="multi")
    assert (item.id, other.id) == ("0.1", "1.1")
    assert item.content == (
        "Document: boathouse 0 was built by Mills. Jetty 0 was built by Holm.\n"
        "Question: Where was its builder born?\nFinal Answer Only:"
    )
    # "LU" is too short to be looked for in an answer
    assert item.extra == {"answer": ["York", "City of York"], "negative": ["Lund", "Lund in the south"]}
    assert len(made("mquake", MQUAKE[:2], hops="multi", all_questions=True)) == 6
    extended = made("mquake", [MQUAKE[0] | {"answer_extended": ["Skåne", None, 3.5]}], hops="multi")[0]
    assert extended.extra["negative"][-1] == "Skåne"


def test_a_negative_that_is_in_the_answer_is_dropped() -> None:
    rows = [{"case_id": 1, "requested_rewrite": [edit(new="New York", old="York"), edit("b", "York", "New York")]}]
    first, second = made("mquake", rows)
    assert first.extra == {"answer": ["New York"]}, "a right answer would have counted as both"
    assert second.extra == {"answer": ["York"], "negative": ["New York"]}


@pytest.mark.parametrize(
    ("rewrite", "reason"),
    [
        (None, "no edited fact"),
        ([], "no edited fact"),
        ([3], "no edited fact"),
        ([{}], "no answer"),
        ([edit(new="same", old="same")], "the new answer is the old one"),
        ([edit() | {"question": None}], "no question"),
        ([edit() | {"prompt": ""}], "no edited fact"),
        ([edit() | {"target_new": 3.5}], "no answer"),
    ],
)
def test_mquake_edits_that_are_left_out(rewrite: Any, reason: str) -> None:
    tally = Tally()
    good = edit("the mill")
    rows = [{"case_id": 1, "requested_rewrite": rewrite}, {"case_id": 2, "requested_rewrite": [good]}]
    assert [item.id for item in made("mquake", rows, tally)] == ["2.1"]
    assert tally.skipped == {reason: 1}
    assert tally.rows == 2


def test_mquake_cases_that_are_left_out() -> None:
    tally = Tally()
    changes: list[dict[str, Any]] = [
        {"new_answer": "Lund in the south"},
        {"questions": []},
        {"answer": None},
        {"new_answer": 2.5},
    ]
    assert made("mquake", [MQUAKE[0] | one for one in changes], tally, hops="multi") == []
    assert tally.skipped == {"the new answer is the old one": 1, "no question": 1, "no answer": 2}


def test_one_bad_edit_does_not_take_the_others_with_it() -> None:
    tally = Tally()
    items = made("mquake", [{"case_id": 1, "requested_rewrite": [edit(), edit() | {"question": 3.5}]}], tally)
    assert [item.id for item in items] == ["1.1"]
    assert tally.skipped == {"no question": 1}


def test_a_cloze_is_no_format_string() -> None:
    hostile = edit("{0.__class__}") | {"prompt": "{} {0} {name} was built by"}
    assert "{0.__class__} {0} {name} was built by Mills" in str(
        made("mquake", [{"requested_rewrite": [hostile]}])[0].content
    )


def test_mctest_of_the_hub_and_of_its_files(tmp_path: Path) -> None:
    item = made("mctest", HUB_MCTEST)[0]
    assert str(item.content).startswith(
        "Document: Tom made kite 0.\nIt was red.\nQuestion: What colour was the kite?\nA."
    )
    assert (item.id, item.extra["answer"], item.extra["texts"][2]) == ("row-1", 2, "red")
    items = from_file("mctest", write_mctest(tmp_path))
    assert [item.id for item in items] == [f"mc160.x.{story}.{n}" for story in (0, 1) for n in (1, 2, 3, 4)]
    assert [item.extra["answer"] for item in items] == [2, 0, 1, 3] * 2
    assert "Document: Tom made a kite.\nIt was red.\tIt flew.\nQuestion: What colour was the kite?\nA. blue" in str(
        items[0].content
    )


def test_mctest_files_that_do_not_fit(tmp_path: Path) -> None:
    path = write_mctest(tmp_path)
    answers = path.with_suffix(".ans").rename(tmp_path / "elsewhere.ans")
    with pytest.raises(FormatError, match=r"mc160\.x\.ans, .*--answers"):
        from_file("mctest", path)
    assert len(from_file("mctest", path, answers=answers)) == 8
    answers.write_text("A\tB\tC\tD\n")
    with pytest.raises(FormatError, match=r"elsewhere\.ans: .* 1 stories, .* 2"):
        from_file("mctest", path, answers=answers)
    answers.write_text("A\tB\tC\tD\nA\tB\tC\tE\n")
    with pytest.raises(FormatError, match=r"elsewhere\.ans:2: "):
        from_file("mctest", path, answers=answers)
    answers.write_text("A\tB\tC\tD\n" * 2)
    path.write_text("too\tshort\n" + "\t".join(STORY + QUESTION * 4) + "\n")
    tally = Tally()
    assert len(list(task_items("mctest", dataset_rows("mctest", [path], answers=answers), tally))) == 4
    assert tally.skipped == {"another number of cells than the header": 1}
    with pytest.raises(UsageError, match=r"a\.json: --answers "):
        from_file("mctest", write_json(tmp_path / "a.json", HUB_MCTEST), answers=answers)


def test_lists_of_requests(tmp_path: Path) -> None:
    for name in ("advbench", "strongreject"):
        item = made(name, SAMPLES[name])[0]
        assert item.content == CRANES[0]
        assert "target" not in item.extra
    assert made("strongreject", STRONGREJECT)[0].extra == {"category": "Paper", "source": "made up"}
    assert task_head("advbench")["scorer"] == "refusal"
    csv_file = write_csv(tmp_path / "behaviors.csv", ADVBENCH)
    lines = tmp_path / "list.txt"
    lines.write_text("\ufeff" + "\n\n".join(CRANES) + "\n", encoding="utf-8")
    listed = write_json(tmp_path / "list.json", CRANES)
    for name, path in (("advbench", csv_file), ("malicious-instruct", lines), ("tdc2023", listed), ("prompts", lines)):
        assert [item.content for item in from_file(name, path)] == CRANES, name
    own = write_csv(tmp_path / "own.csv", [{"n": n, "ask": text} for n, text in enumerate(CRANES)])
    assert [item.content for item in from_file("prompts", own, column="ask")] == CRANES
    assert [item.content for item in from_file("advbench", csv_file, column="target")] == [
        "Sure, take a sheet of paper"
    ] * 4
    with pytest.raises(UsageError, match=r"mquake: .*--column"):
        from_file("mquake", own, column="ask")


def test_ragged_rows_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("ask,n\nFold a crane,1\nFold a boat\n,2\n")
    tally = Tally()
    items = list(task_items("prompts", dataset_rows("prompts", [path], column="ask"), tally))
    assert [item.content for item in items] == ["Fold a crane"]
    assert tally.skipped == {"another number of cells than the header": 1, "no prompt": 1}


def test_what_the_scorer_cannot_use_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ADAPTERS["prompts"], "scoring", lambda _: ("exact", {}))
    tally = Tally()
    assert made("prompts", [{"id": f"a: {n}", "prompt": text} for n, text in enumerate(CRANES)], tally) == []
    assert tally.skipped == {"answer: missing": 4}


def test_a_wrong_header_is_no_prompt(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", [{"goals": text, "target": "x"} for text in CRANES])
    with pytest.raises(FormatError, match=r"t\.csv: .*'goal' or 'prompt'; .*'goals', 'target'"):
        from_file("advbench", path)


#
# options
#


@pytest.mark.parametrize("name", [name for name, adapter in ADAPTERS.items() if "closed_book" in adapter.takes])
def test_closed_book(name: str) -> None:
    items = made(name, SAMPLES[name], closed_book=True)
    for item, open_book in zip(items, made(name, SAMPLES[name]), strict=True):
        assert str(item.content).startswith("Question: ")
        assert str(open_book.content).endswith(str(item.content))
        assert item.extra == open_book.extra
    assert task_head(name, BuildOptions(closed_book=True))["name"] == f"{name}-closed-book"


def test_another_instruction() -> None:
    assert str(made("cf-triviaqa", TRIVIA, instruction="In one word.")[0].content).endswith("acorn 0?\nIn one word.")
    assert str(made("cf-triviaqa", TRIVIA, instruction="")[0].content).endswith("acorn 0?")


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_that_do_not_apply(name: str) -> None:
    values = {
        "closed_book": True,
        "instruction": "x",
        "answer_as": "text",
        "match": "strict",
        "hops": "multi",
        "all_questions": True,
    }
    for option, value in values.items():
        options = BuildOptions(**{option: value} | ({"hops": "multi"} if option == "all_questions" else {}))
        if option in ADAPTERS[name].takes:
            task_head(name, options)
        else:
            with pytest.raises(UsageError, match=rf"layout {name}: .*--"):
                task_head(name, options)
            with pytest.raises(UsageError, match=rf"layout {name}: .*--"):
                list(task_items(name, [], Tally(), options))


def test_options_that_are_none() -> None:
    for wrong in ({"answer_as": "x"}, {"match": "x"}, {"hops": "x"}, {"max_chars": 0}, {"all_questions": True}):
        with pytest.raises(UsageError):
            BuildOptions(**wrong)
    for call in (
        lambda: task_head("x"),
        lambda: list(task_items("x", [], Tally())),
        lambda: list(dataset_rows("x", [])),
    ):
        with pytest.raises(UsageError, match=r"'x'.* faitheval-counterfactual"):
            call()


def test_absurd_lengths() -> None:
    tally = Tally()
    rows = [UNANSWERABLE[0] | {"context": "x" * 1000}, UNANSWERABLE[1] | {"qid": "y" * 100_000}]
    items = made("faitheval-unanswerable", rows, tally, max_chars=900)
    assert tally.skipped == {"more than 900 characters": 1}
    assert [len(str(item.id)) for item in items] == [200]


def test_the_head() -> None:
    head = task_head("mquake", task_name="mine", max_tokens=9, system="Be brief.", license="MIT")
    assert head["name"] == "mine"
    assert (head["max_tokens"], head["system"], head["license"]) == (9, "Be brief.", "MIT")
    assert "system" not in task_head("mquake")
    with pytest.raises(UsageError, match="UTF-8"):
        task_head("mquake", license="\ud800")
