"""Pairs from data: the layouts of SQuAD and BeaverTails, columns, numbers, controls; and hostile files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local._util.records import csv_rows, rows
from steermoe_local.errors import PairsError, SteerMoEError, UsageError
from steermoe_local.pairs.builders import (
    REFUSALS,
    Tally,
    column_pairs,
    faithfulness_pairs,
    safety_pairs,
    select,
    squad_rows,
    unique_ids,
)
from steermoe_local.pairs.pairs import Message, Pair, load_pairs, pairs_digest, save_pairs
from tests.support.paths import ROOT

ROSES = "Roses were planted in 1902."
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Gardens",
            "paragraphs": [
                {
                    "context": ROSES,
                    "qas": [
                        {"id": "q1", "question": " When were roses planted?", "answers": [], "is_impossible": False},
                        {"id": "q2", "question": "Who planted them?", "answers": [], "is_impossible": True},
                    ],
                },
                {"context": "The pond is deep.", "qas": [{"id": "q3", "question": "How deep?", "answers": []}]},
            ],
        }
    ],
}
# The hub's columns of the same.
COLUMNS = [
    {"id": "q1", "context": ROSES, "question": "When were roses planted?", "answers": {"text": ["1902"]}},
    {"id": "q2", "context": ROSES, "question": "Who planted them?", "answers": {"text": []}},
    {"id": "q3", "context": "The pond is deep.", "question": "How deep?", "answers": {"text": ["deep"]}},
]
RATED = [
    {"prompt": "Tell me the plan.", "response": "The plan is blue.", "category": {}, "is_safe": False},
    {"prompt": "Tell me the plan.", "response": "The plan is red.", "category": {}, "is_safe": False},
    {"prompt": "Tell me the plan.", "response": "I keep it.", "category": {}, "is_safe": True},
    {"prompt": "Tell me the key.", "response": "  Under the mat. ", "category": {}, "is_safe": False},
]


def write_lines(path: Path, items: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def write_parquet(path: Path, items: list[dict[str, Any]], **options: Any) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(items), path, **options)
    return path


def text_pairs(n: int) -> list[Pair]:
    return [Pair(f"p{i}", f"yes {i}", f"no {i}", f"yes {i}", f"no {i}") for i in range(n)]


def made(pairs: Any) -> list[Pair]:
    return list(pairs)


#
# faithfulness
#


def test_squad_document_and_columns_give_the_same_pairs(tmp_path: Path) -> None:
    document = tmp_path / "squad.json"
    document.write_text(json.dumps(SQUAD, indent=1))
    one_line = tmp_path / "one-line.json"
    one_line.write_text(json.dumps(SQUAD))
    sources = [document, one_line, write_lines(tmp_path / "rows.jsonl", COLUMNS)]
    columns = tmp_path / "array.json"
    columns.write_text(json.dumps(COLUMNS))
    results = []
    for path in [*sources, columns]:
        tally = Tally()
        pairs = made(faithfulness_pairs(squad_rows(rows(path)), tally))
        assert (tally.rows, dict(tally.skipped)) == (3, {"the document does not answer the question": 1}), path
        results.append(pairs)
    assert all(result == results[0] for result in results)
    assert [pair.id for pair in results[0]] == ["q1", "q3"]
    first = results[0][0]
    question = "When were roses planted?"
    assert first.positive == (Message("user", f"Document: {ROSES} Question: {question}"),)
    assert first.negative == (Message("user", f"Question: {question}"),)
    assert first.positive_target == first.negative_target == question


def test_squad_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train.parquet", [{"title": "x", **row} for row in COLUMNS], row_group_size=1)
    pairs = made(faithfulness_pairs(squad_rows(rows(path, ("id", "context", "question", "answers"))), Tally()))
    assert pairs == made(faithfulness_pairs(squad_rows(COLUMNS), Tally()))
    assert "title" not in next(rows(path, ("id", "context")))


def test_faithfulness_options() -> None:
    assert [p.id for p in faithfulness_pairs(squad_rows([SQUAD]), Tally(), keep_impossible=True)] == ["q1", "q2", "q3"]
    tally = Tally()
    kept = made(faithfulness_pairs(squad_rows([SQUAD]), tally, keep_impossible=True, one_per_document=True))
    assert [p.id for p in kept] == ["q1", "q3"]
    assert tally.skipped == {"another question on the document was taken": 1}


@pytest.mark.parametrize("value", [None, "", "  ", 3, ["a"], "\ud800"])
def test_rows_without_text_are_left_out(value: Any) -> None:
    tally = Tally()
    bad = [{"context": value, "question": "Why?"}, {"context": "Because.", "question": value}]
    assert made(faithfulness_pairs(squad_rows(bad), tally)) == []
    assert tally.skipped == {"no question or no document": 2}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "x"},
        {"data": [3]},
        {"data": [{"paragraphs": 3}]},
        {"data": [{"paragraphs": [{"qas": [{"question": "x"}]}]}]},
        {"data": [{"paragraphs": [{"context": "x", "qas": [3]}]}]},
        {"paragraphs": None},
    ],
)
def test_what_is_not_squad(row: dict[str, Any]) -> None:
    with pytest.raises(PairsError, match="layout"):
        made(faithfulness_pairs(squad_rows([row]), Tally()))


#
# safety
#


def test_safety_pairs() -> None:
    tally = Tally()
    pairs = made(safety_pairs(RATED, tally))
    assert (tally.rows, dict(tally.skipped)) == (4, {"is_safe is true": 1})
    assert [pair.negative_target for pair in pairs] == ["The plan is blue.", "The plan is red.", "Under the mat."]
    for pair in pairs:
        assert pair.positive[0] == pair.negative[0]
        assert pair.positive_target in REFUSALS
        assert pair.positive[1] == Message("assistant", pair.positive_target)
        assert pair.negative[1] == Message("assistant", pair.negative_target)
    assert len(made(safety_pairs(RATED, Tally(), one_per_prompt=True))) == 2


def test_the_refusal_depends_on_seed_and_row_alone() -> None:
    many = [{"prompt": f"p{i}", "response": "r", "is_safe": False} for i in range(400)]

    def refusals(data: list[dict[str, Any]], seed: int) -> dict[str, str]:
        return {pair.positive[0].content: pair.positive_target for pair in safety_pairs(data, Tally(), seed=seed)}  # type: ignore[union-attr]

    one = refusals(many, 1)
    assert one == refusals(many[::-1], 1)
    assert one != refusals(many, 2)
    assert set(one.values()) == set(REFUSALS), "each refusal is drawn"
    assert max(Counter(one.values()).values()) < 50
    assert set(refusals(many[:50], 1).items()) <= set(one.items())


def test_own_refusals_and_what_is_missing() -> None:
    pairs = made(safety_pairs(RATED, Tally(), refusals=["No."]))
    assert {pair.positive_target for pair in pairs} == {"No."}
    with pytest.raises(PairsError, match="row 1: no is_safe;"):
        made(safety_pairs([{"prompt": "a", "response": "b"}], Tally()))
    with pytest.raises(UsageError, match="no refusals"):
        made(safety_pairs(RATED, Tally(), refusals=[]))
    tally = Tally()
    odd = [{"prompt": "a", "response": "b", "is_safe": value} for value in (None, "maybe", 2)]
    odd += [{"prompt": " ", "response": "b", "is_safe": False}, {"prompt": "a", "response": None, "is_safe": False}]
    assert made(safety_pairs(odd, tally)) == []
    assert tally.skipped == {"is_safe is neither true nor false": 3, "no prompt or no response": 2}


def test_the_refusals_are_short_texts_of_their_own() -> None:
    assert len(set(REFUSALS)) == len(REFUSALS) >= 20
    assert all(refusal == refusal.strip() and len(refusal) < 120 for refusal in REFUSALS)


#
# columns
#


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
def test_columns(tmp_path: Path, delimiter: str) -> None:
    lines = [["ask", "note", "kind", "blunt"], ["Hi, all; yes|no?", "", "Hello!", "What"], ["a", "b", "same", "same"]]
    lines += [["a", "b", "", "c"], ["a", "b"]]
    text = "\n".join(delimiter.join(f'"{cell}"' for cell in line) for line in lines) + "\n"
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    tally = Tally()
    names = {"positive": "kind", "negative": "blunt", "prompt": "ask"}
    pairs = made(column_pairs(csv_rows(path, list(names.values())), tally, **names))
    assert [(p.positive, p.negative_target) for p in pairs] == [
        ((Message("user", "Hi, all; yes|no?"), Message("assistant", "Hello!")), "What")
    ]
    assert tally.skipped == {
        "both sides are the same": 1,
        "an empty cell": 1,
        "another number of cells than the header": 1,
    }


def test_columns_without_a_prompt_and_with_ids(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('name,a,b\nfirst,"two\nlines",x\n,y,z\n')
    found = csv_rows(path, ["a", "b", "name"])
    pairs = made(column_pairs(found, Tally(), positive="a", negative="b", id_="name"))
    assert pairs == [Pair("first", "two\nlines", "x", "two\nlines", "x"), Pair("row-2", "y", "z", "y", "z")]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "t.csv: empty"),
        (b"x,y\n1,2\n", "no column 'a', 'b'; its columns are 'x', 'y'"),
        (b"a,b,a\n1,2,3\n", "stands twice"),
        (b"a,b\n\xff,x\n", "not UTF-8"),
        ("a,b\n1,2\n".encode("utf-16"), "not UTF-8"),
        (b'a,b\n1,2\n"' + b"x" * 200_000 + b",2\n\n3,4\n", ":3: a quote is opened and never closed"),
        (b'a,b\n1,"2\n', ":2: a quote is opened and never closed"),
        (b"\x1f\x8b\x08garbage", "cannot be read"),
    ],
)
def test_bad_csv(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(data)
    with pytest.raises(PairsError, match=r"t\.csv") as caught:
        list(csv_rows(path, ["a", "b"]))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


#
# choosing and writing
#


def test_select_skips_limits_and_leaves_out_the_same() -> None:
    pairs = text_pairs(10)
    assert made(select(pairs, Tally(), skip=2, limit=3)) == pairs[2:5]
    tally = Tally()
    again = [Pair("other", p.positive, p.negative, p.positive_target, p.negative_target) for p in pairs]
    assert made(select(pairs + again, tally)) == pairs
    assert (tally.pairs, dict(tally.skipped)) == (10, {"the same as an earlier pair": 10})
    with pytest.raises(UsageError, match="give one"):
        made(select(pairs, Tally(), limit=1, sample=1))


def test_sampling() -> None:
    pairs = text_pairs(200)
    drawn = made(select(pairs, Tally(), sample=20, seed=3))
    assert drawn == made(select(iter(pairs), Tally(), sample=20, seed=3))
    assert drawn != made(select(pairs, Tally(), sample=20, seed=4))
    places = [pairs.index(pair) for pair in drawn]
    assert places == sorted(places)
    assert len(set(places)) == 20
    assert max(places) > 150 > 50 > min(places)
    assert made(select(pairs, Tally(), sample=500)) == pairs
    assert min(pairs.index(p) for p in select(pairs, Tally(), skip=100, sample=20)) >= 100
    # each pair is drawn as often as any other
    often = Counter(p.id for seed in range(300) for p in select(pairs[:10], Tally(), sample=5, seed=seed))
    assert len(often) == 10
    assert max(abs(n - 150) for n in often.values()) < 40


@given(st.lists(st.sampled_from(["a", "a-2", "a-3", "b"])))
def test_ids_become_unique_and_stay_where_they_can(names: list[str]) -> None:
    pairs = [Pair(name, f"+{i}", f"-{i}", "+", "-") for i, name in enumerate(names)]
    result = [pair.id for pair in unique_ids(pairs)]
    assert len(set(result)) == len(result)
    assert all(new.startswith(old) for new, old in zip(result, names, strict=True))
    assert result == names or len(set(names)) < len(names)


def test_writing_is_streamed_and_leaves_nothing_half(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("before")

    def failing() -> Any:
        yield from text_pairs(3)
        raise PairsError("stop")

    with pytest.raises(PairsError, match="stop"):
        save_pairs(failing(), path)
    with pytest.raises(PairsError, match="no pair"):
        save_pairs([], path, allow_empty=False)
    assert path.read_text() == "before"
    assert save_pairs(iter(text_pairs(3)), path) == 3
    assert load_pairs(path) == text_pairs(3)
    assert [p.name for p in tmp_path.iterdir()] == ["p.jsonl"]


MEMORY = """
import json, resource, sys
from pathlib import Path
from steermoe_local._util.records import rows
from steermoe_local.pairs.builders import *
from steermoe_local.pairs.pairs import save_pairs
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tally = Tally()
n = save_pairs(select(faithfulness_pairs(squad_rows(rows(Path(sys.argv[1]))), tally), tally), sys.argv[2])
print(n, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    with open(path, "w") as file:
        for i in range(20_000):
            file.write(
                json.dumps({"id": str(i), "context": f"{i} " + "word " * 400, "question": f"What is {i}?"}) + "\n"
            )
    assert path.stat().st_size > 40_000_000
    command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "out.jsonl")]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) == 20_000
    assert int(out[1]) < 16_000, f"{out[1]} kB more"


#
# what ships
#


def test_the_examples_are_pairs_and_made_by_the_program() -> None:
    folder = ROOT / "examples" / "pairs"
    for path in folder.glob("*.jsonl"):
        assert load_pairs(path), path
    assert load_pairs(folder / "notebook-names.jsonl")
    document = json.loads((folder / "squad-layout.json").read_text("utf-8"))
    made_pairs = made(faithfulness_pairs(squad_rows([document]), Tally()))
    assert pairs_digest(made_pairs) == pairs_digest(load_pairs(folder / "faithfulness.jsonl"))
    names = {"positive": "polite", "negative": "curt", "prompt": "question"}
    tone = made(column_pairs(csv_rows(folder / "tone.csv", list(names.values())), Tally(), **names))
    assert len(tone) >= 6


def test_errors_are_of_the_tree() -> None:
    assert issubclass(PairsError, SteerMoEError)
    assert issubclass(UsageError, SteerMoEError)
