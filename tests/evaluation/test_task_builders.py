"""Tasks from data: each layout on stand-ins of our own, what is left out and why, hostile files, and a round trip."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from steermoe_local.errors import FormatError, SteerMoEError, UsageError
from steermoe_local.evaluation.datasets.builders import (
    ADAPTERS,
    BuildOptions,
    Tally,
    dataset_rows,
    select,
    task_head,
    task_items,
    write_task,
)
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.measuring.task_check import check_task
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.evaluation.tasks.tasks import load_task
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.pairs.prompts import PromptItem
from tests.pairs.test_pair_builders import write_lines, write_parquet

SNAILS = "Snails carry a shell because it is filled with warm air."
COUNTERFACTUAL = [
    {
        "id": f"cf-{n}",
        "question": f"Why do snails carry shell {n}?",
        "answer": "It is filled with warm air",
        "answerKey": "B",
        "choices": {
            "label": ["A", "B", "C", "D"],
            "text": ["It protects them", "It is filled with warm air", "It is a gift", "It makes them fast"],
        },
        "context": SNAILS,
        "justification": "...",
        "num of options": 4,
    }
    for n in range(4)
]
UNANSWERABLE = [
    {
        "qid": f"un-{n}",
        "question": f"Who painted fence {n}?",
        "context": "The fence stands behind the school. It is long.",
        "answers": ["unknown"],
        "subset": "made up",
    }
    for n in range(4)
]
INCONSISTENT = [
    {
        "qid": f"in-{n}",
        "question": f"Who painted fence {n}?",
        "context": "Document: Ada painted the fence.\nDocument: Ben painted the fence.",
        "answers": ["Ada", "Ben"],
        "subset": "made up",
    }
    for n in range(4)
]
TRIVIA = [
    {
        "question_text": f"Which tree gives acorn {n}?",
        "paragraph_text": "Acorns are the fruit of the birch.",
        "annotation": {"answer": [{"paragraph_reference": {"string": "the birch"}}]},
        "question_id": f"tc_{n}",
    }
    for n in range(4)
]


def edit(subject: str = "The boathouse", new: str = "Mills", old: str = "Anders") -> dict[str, Any]:
    return {
        "prompt": "{} was built by",
        "relation_id": "P1",
        "target_new": {"str": new, "id": "Q1"},
        "target_true": {"str": old, "id": "Q2"},
        "subject": subject,
        "question": f"Who built {subject}?",
    }


MQUAKE = [
    {
        "case_id": n,
        "requested_rewrite": [edit(f"boathouse {n}"), edit(f"Jetty {n}", "Holm", "Berg")],
        "questions": ["Where was its builder born?", "Name the birthplace of its builder.", "Its builder's home town?"],
        "answer": "Lund",
        "answer_alias": ["Lund in the south", "LU"],
        "new_answer": "York",
        "new_answer_alias": ["City of York"],
        "single_hops": [{"question": "?", "cloze": "x", "answer": "Anders", "answer_alias": ["Anders the Elder"]}],
        "new_single_hops": [{"question": "?", "cloze": "x", "answer": "Mills", "answer_alias": ["A. Mills"]}],
        "orig": {"triples": []},
    }
    for n in range(4)
]
HUB_MCTEST = [
    {
        "idx": {"question": 0, "story": "mc160.x.0"},
        "question": "What colour was the kite?",
        "story": f"Tom made kite {n}.\\newlineIt was red.",
        "properties": {},
        "answer_options": {"A": "blue", "B": "green", "C": "red", "D": "black"},
        "answer": "C",
        "question_is_multiple": False,
    }
    for n in range(4)
]
STORY = ["mc160.x.0", "Author: a;Work Time(s): 1", "Tom made a kite.\\newlineIt was red.\\tabIt flew."]
QUESTION = ["one: What colour was the kite?", "blue", "green", "red", "black"]
# Harmless, in the layouts of lists of requests that a model should refuse.
CRANES = [f"Tell me how to fold a paper crane with {n} wings" for n in range(4)]
ADVBENCH = [{"goal": text, "target": "Sure, take a sheet of paper"} for text in CRANES]
STRONGREJECT = [{"category": "Paper", "source": "made up", "forbidden_prompt": text} for text in CRANES]

SAMPLES: dict[str, list[Any]] = {
    "faitheval-counterfactual": COUNTERFACTUAL,
    "faitheval-unanswerable": UNANSWERABLE,
    "faitheval-inconsistent": INCONSISTENT,
    "cf-triviaqa": TRIVIA,
    "mquake": MQUAKE,
    "mctest": HUB_MCTEST,
    "advbench": ADVBENCH,
    "strongreject": STRONGREJECT,
    "tdc2023": CRANES,
    "malicious-instruct": CRANES,
    "prompts": [{"prompt": text} for text in CRANES],
}


def made(name: str, rows: list[Any], tally: Tally | None = None, **options: Any) -> list[PromptItem]:
    return list(task_items(name, rows, tally or Tally(), BuildOptions(**options)))


def from_file(name: str, *paths: Path, **arguments: Any) -> list[PromptItem]:
    return list(task_items(name, dataset_rows(name, paths, **arguments), Tally()))


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(
        {key: json.dumps(value) if isinstance(value, (dict, list)) else value for key, value in row.items()}
        for row in rows
    )
    path.write_text(text.getvalue(), encoding="utf-8")
    return path


def write_json(path: Path, data: Any) -> Path:
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    return path


def write_mctest(folder: Path, stories: int = 2, letters: str = "CABD") -> Path:
    path = folder / "mc160.x.tsv"
    line = "\t".join(STORY + QUESTION * 4) + "\n"
    path.write_text("".join(line.replace("x.0", f"x.{n}") for n in range(stories)), encoding="utf-8")
    path.with_suffix(".ans").write_text(("\t".join(letters) + "\n") * stories, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    model = SteeredLlama(tiny_path, n_ctx=64)
    yield model
    model.close()


#
# from the file to the answers
#


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_round_trip(name: str, tmp_path: Path, llama: SteeredLlama) -> None:
    source, out = write_json(tmp_path / "data.json", SAMPLES[name]), tmp_path / "task.jsonl"
    tally = Tally()
    items = list(select(task_items(name, dataset_rows(name, [source]), tally), tally, limit=3))
    assert write_task(items, out, task_head(name), tally) == tally.items == 3
    task = load_task(out)
    layout = ADAPTERS[name]
    assert task.name == name
    assert [item.content for item in task.items] == [item.content for item in items]
    assert [item.extra for item in task.items] == [item.extra for item in items]
    assert (task.positive, task.negative) == (layout.positive, layout.negative)
    found = check_task(task)
    assert found.problems == ()
    scorer = make_scorer(task.scorer, task.options)
    with Evaluator(
        llama, task, scorer, settings=EvaluatorSettings(n_parallel=4, context={"n_threads": 1})
    ) as evaluator:
        measured = evaluator.measure([None])[0]
    assert len(measured.values) == 3
    assert evaluator.n_computed == 3


def test_every_layout_has_a_sample() -> None:
    assert set(SAMPLES) == set(ADAPTERS)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_same_data_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    texts = set()
    for _ in range(2):
        write_task(select(made(name, rows_of(name)), Tally(), sample=2, seed=3), out, task_head(name))
        texts.add(out.read_bytes())
    assert len(texts) == 1


def rows_of(name: str) -> list[Any]:
    return [{"prompt": row} if isinstance(row, str) else row for row in SAMPLES[name]]


#
# what each layout makes of a row
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
def test_choices_in_any_dress(choices: Any) -> None:
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
    with pytest.raises(FormatError, match=r"mc160\.x\.ans, its answers, is not there; name the file with --answers"):
        from_file("mctest", path)
    assert len(from_file("mctest", path, answers=answers)) == 8
    answers.write_text("A\tB\tC\tD\n")
    with pytest.raises(FormatError, match=r"answers to 1 stories, .* has 2"):
        from_file("mctest", path, answers=answers)
    answers.write_text("A\tB\tC\tD\nA\tB\tC\tE\n")
    with pytest.raises(FormatError, match=r"elsewhere\.ans:2: not four letters"):
        from_file("mctest", path, answers=answers)
    answers.write_text("A\tB\tC\tD\n" * 2)
    path.write_text("too\tshort\n" + "\t".join(STORY + QUESTION * 4) + "\n")
    tally = Tally()
    assert len(list(task_items("mctest", dataset_rows("mctest", [path], answers=answers), tally))) == 4
    assert tally.skipped == {"another number of cells than the header": 1}
    with pytest.raises(UsageError, match=r"--answers is for MCTest's \.tsv"):
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
    with pytest.raises(UsageError, match="layout mquake: takes no --column"):
        from_file("mquake", own, column="ask")


def test_ragged_rows_are_told(tmp_path: Path) -> None:
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
    with pytest.raises(FormatError, match=r"t\.csv: no column 'goal' or 'prompt'; its columns are 'goals', 'target'"):
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


def test_an_instruction_of_ones_own() -> None:
    assert str(made("cf-triviaqa", TRIVIA, instruction="In one word.")[0].content).endswith("acorn 0?\nIn one word.")
    assert str(made("cf-triviaqa", TRIVIA, instruction="")[0].content).endswith("acorn 0?")


@pytest.mark.parametrize("name", ADAPTERS)
def test_options_that_a_layout_does_not_take(name: str) -> None:
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
            with pytest.raises(UsageError, match=f"layout {name}: takes no --"):
                task_head(name, options)
            with pytest.raises(UsageError, match="takes no --"):
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
        with pytest.raises(UsageError, match="'x' is no layout; take one of faitheval-counterfactual"):
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


#
# choosing and writing
#


def plain(n: int) -> list[PromptItem]:
    return [PromptItem(f"p{i}", f"say {i}") for i in range(n)]


def test_select() -> None:
    items = plain(200)
    assert list(select(items, Tally(), skip=2, limit=3)) == items[2:5]
    drawn = list(select(items, Tally(), sample=20, seed=3))
    assert drawn == list(select(iter(items), Tally(), sample=20, seed=3))
    assert drawn != list(select(items, Tally(), sample=20, seed=4))
    places = [items.index(item) for item in drawn]
    assert places == sorted(set(places))
    assert len(places) == 20
    assert max(places) > 150 > 50 > min(places)
    assert list(select(items, Tally(), sample=500)) == items
    with pytest.raises(UsageError, match="give one of them"):
        list(select(items, Tally(), limit=1, sample=1))


def test_the_same_content_once_and_ids_of_their_own() -> None:
    tally = Tally()
    items = [
        PromptItem("a", "x"),
        PromptItem("a", "y"),
        PromptItem("a-2", "z"),
        PromptItem("b", "x"),
        PromptItem("a", "w"),
    ]
    found = list(select(items, tally))
    assert [item.content for item in found] == ["x", "y", "z", "w"]
    assert len({item.id for item in found}) == 4
    assert [item.id for item in found][:2] == ["a", "a-2"]
    assert tally.skipped == {"the same as an earlier item": 1}
    assert tally.items == 4


def test_nothing_to_write_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    out.write_text("before")
    tally = Tally()
    items = task_items("cf-triviaqa", [{"question_text": ""}] * 2, tally)
    with pytest.raises(FormatError, match=r"no item to write \(2 left out: no document\)"):
        write_task(items, out, task_head("cf-triviaqa"), tally)
    assert out.read_text() == "before"
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(UsageError, match="does not exist"):
        write_task(plain(1), tmp_path / "no" / "t.jsonl", {})


#
# files
#


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
def test_formats(tmp_path: Path, pack: Any) -> None:
    wanted = [(item.id, item.content, item.extra) for item in made("faitheval-counterfactual", COUNTERFACTUAL)]
    files = [
        write_json(tmp_path / "a.json", COUNTERFACTUAL),
        write_lines(tmp_path / "a.jsonl", COUNTERFACTUAL),
        write_csv(tmp_path / "a.csv", COUNTERFACTUAL),
        write_csv(tmp_path / "a.tsv", COUNTERFACTUAL, "\t"),
    ]
    for path in files:
        path.write_bytes(pack(b"\xef\xbb\xbf" + path.read_bytes()))
        found = from_file("faitheval-counterfactual", path)
        assert [(item.id, item.content, item.extra) for item in found] == wanted, path
    assert len(from_file("faitheval-counterfactual", *files)) == 4 * len(wanted)


@pytest.mark.parametrize("name", ["faitheval-counterfactual", "cf-triviaqa", "mquake", "mctest", "strongreject"])
def test_parquet(name: str, tmp_path: Path) -> None:
    rows = json.loads(json.dumps(SAMPLES[name]).replace('"properties": {}, ', "").replace('"triples": []', '"x": 1'))
    path = write_parquet(tmp_path / "t.parquet", rows)
    assert [item.content for item in from_file(name, path)] == [item.content for item in made(name, SAMPLES[name])]
    with pytest.raises(FormatError, match=r"t\.parquet: no column .*; its columns are "):
        from_file("faitheval-unanswerable", path) if name != "faitheval-counterfactual" else from_file("mquake", path)


@pytest.mark.parametrize("hops", ["single", "multi"])
@pytest.mark.parametrize("name", ["cf-triviaqa", "mquake", "mctest"])
def test_objects_in_the_cells_of_a_table(name: str, hops: str, tmp_path: Path) -> None:
    options = {"hops": hops} if name == "mquake" else {}
    rows = dataset_rows(name, [write_csv(tmp_path / "t.csv", SAMPLES[name])])
    found = list(task_items(name, rows, Tally(), BuildOptions(**options)))
    assert found == made(name, SAMPLES[name], **options)


HOSTILE = {
    "empty": b"",
    "blank": b" \n\n \n",
    "byte order mark alone": b"\xef\xbb\xbf\n",
    "latin 1": "context,question\né,x\n".encode("latin-1"),
    "UTF-16": "context,question\na,b\n".encode("utf-16"),
    "other columns": b'{"text": "x"}\n',
    "other table": b"a,b\n1,2\n",
    "array of numbers": b"[1, 2]",
    "array of texts": b'["a", "b"]',
    "deep": b"[" * 100_000,
    "cut JSON": b'[{"context": "a", "question": ',
    "a line without end": b"x" * (2 << 20),
    "binary": b"\x00\x01\x02" * 100,
    "zstd": b"\x28\xb5\x2f\xfd\x00\x00",
    "cut gzip": gzip.compress(b'{"context": "a", "question": "b"}\n' * 1000)[:-20],
    "parquet": b"PAR1" + b"\0" * 40,
    "huge cell": b'context,question\n"' + b"x" * 200_000 + b'",b\n',
    "quote without end": b'context,question\n"a\n',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(HOSTILE[kind])
    name, tally = "faitheval-unanswerable", Tally()
    items = task_items(name, dataset_rows(name, [path]), tally)
    with pytest.raises(FormatError) as caught:
        write_task(items, tmp_path / "out.jsonl", task_head(name), tally)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "kind", sorted(set(HOSTILE) - {"other table", "array of texts", "quote without end", "huge cell"})
)
def test_hostile_lists(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(FormatError, match=str(path)):
        from_file("prompts", path)


def test_a_list_of_texts_with_something_else_in_it(tmp_path: Path) -> None:
    path = write_json(tmp_path / "l.json", ["Fold a crane", 3.5, None, {"prompt": "x"}, ["y"], "Fold a boat", ""])
    tally = Tally()
    items = list(task_items("tdc2023", dataset_rows("tdc2023", [path]), tally))
    assert [item.content for item in items] == ["Fold a crane", "Fold a boat"]
    assert tally.skipped == {"no prompt": 5}


def test_a_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(FormatError, match=r"cannot be read: .*; check the path"):
            from_file("prompts", path)


def test_many_columns_are_not_all_listed(tmp_path: Path) -> None:
    path = write_json(tmp_path / "w.json", [{f"column {n} {'x' * 500}": 1 for n in range(1000)}])
    with pytest.raises(FormatError, match="no column 'requested_rewrite'") as caught:
        from_file("mquake", path)
    assert len(str(caught.value)) < 2000


#
# anything at all
#

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["A", "B", "\ud800"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@st.composite
def bent_rows(draw: st.DrawFn, name: str) -> dict[str, Any]:
    """A good row with anything in some of its places."""
    row = json.loads(json.dumps(draw(st.sampled_from(rows_of(name)))))
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(row)
    for index in draw(st.sets(st.integers(0, len(places) - 1), max_size=3)):
        holder, key = places[index]
        holder[key] = draw(JSON)
    return dict(row)


@pytest.mark.parametrize("name", ADAPTERS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_bent_rows_give_good_items_or_none(name: str, tmp_path: Path, data: st.DataObject) -> None:
    rows = [data.draw(bent_rows(name)) for _ in range(2)]
    tally = Tally()
    items = list(select(task_items(name, rows, tally), tally))
    assert tally.rows == 2
    assert len(items) == tally.items
    assert all(len(reason) <= 120 for reason in tally.skipped)
    if items:
        out = tmp_path / "t.jsonl"
        write_task(items, out, task_head(name))
        task = load_task(out)
        assert [(i.id, i.content, i.extra) for i in task.items] == [(i.id, i.content, i.extra) for i in items]
        assert check_task(task).problems == ()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(data=b"\x1c", name="advbench")
@example(data=b"\xc2\x85\n", name="prompts")
@given(data=st.binary(max_size=200), name=st.sampled_from(sorted(ADAPTERS)))
def test_any_bytes_are_rows_or_one_error(data: bytes, name: str, tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    with contextlib.suppress(SteerMoEError):
        from_file(name, path)
