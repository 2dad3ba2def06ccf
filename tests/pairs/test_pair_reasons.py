"""Why rows give no pair: the reasons are counted and told, words and numbers for true and false are understood."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local._util.records import csv_rows, truth
from steermoe_local.cli import main
from steermoe_local.pairs.builders import Tally, faithfulness_pairs, safety_pairs, select, squad_rows
from steermoe_local.pairs.pairs import load_pairs

TRUE = [True, 1, 1.0, "true", "True", " TRUE ", "yes", "1"]
FALSE = [False, 0, 0.0, "false", "False", "no", "0"]
NEITHER = [None, "maybe", "", 2, -1, 0.5, float("nan"), [], {}, "safe?"]


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("value", TRUE + FALSE + NEITHER, ids=repr)
def test_truth(value: Any) -> None:
    wanted = True if value in TRUE else False if value in FALSE else None
    assert truth(value) is wanted
    tally = Tally()
    made = list(safety_pairs([{"prompt": "p", "response": "r", "is_safe": value}], tally))
    assert len(made) == (wanted is False)
    reason = {True: "is_safe is true", None: "is_safe is neither true nor false"}
    assert dict(tally.skipped) == ({} if wanted is False else {reason[wanted]: 1})


@pytest.mark.parametrize(
    ("answers", "answered"),
    [
        ({"text": [], "answer_start": []}, False),
        ({"text": [""]}, False),
        ({"text": "elm"}, True),
        ({"text": ["elm"]}, True),
        ([], False),
        ([{"text": ""}], False),
        ([{"text": "elm", "answer_start": 3}], True),
        (["elm"], True),
        (None, False),
        ("", False),
        ("elm", True),
    ],
)
def test_questions_without_an_answer(answers: Any, answered: bool) -> None:
    row = {"context": "An elm.", "question": "Which tree?", "answers": answers}
    for more, wanted in (
        ({}, answered),
        ({"is_impossible": "True"}, False),
        ({"is_impossible": "False"}, True),
        ({"is_impossible": 0}, True),
        ({"is_impossible": None}, answered),
    ):
        tally = Tally()
        assert len(list(faithfulness_pairs(squad_rows([row | more]), tally))) == wanted, more
        kept = list(faithfulness_pairs(squad_rows([row | more]), Tally(), keep_impossible=True))
        assert len(kept) == 1


def test_no_pair_without_its_reasons(tmp_path: Path) -> None:
    """Every builder's command tells how many rows it read, and what was left out for which reason."""
    out = ("-o", tmp_path / "out.jsonl")
    rated = lines(
        tmp_path / "r",
        {"prompt": "p", "response": "r", "is_safe": True},
        {"prompt": "p", "response": "r", "is_safe": "maybe\n"},
        {"prompt": "", "response": "r", "is_safe": False},
    )
    squad = lines(
        tmp_path / "s",
        {"context": "c", "question": "q", "answers": {"text": []}},
        {"context": "", "question": "q", "answers": {"text": ["a"]}},
    )
    table = tmp_path / "t.csv"
    table.write_text("a,b\nx,x\n,y\n1,2,3\n")
    one = tmp_path / "one.csv"
    one.write_text("a,b\nx,y\n")
    empty = tmp_path / "e.csv"
    empty.write_text("a,b\n")
    columns = ("--positive-column", "a", "--negative-column", "b")
    for command, reasons in (
        (("safety", "--data", rated), ("3 rows", "1 is_safe is true", "('maybe\\n')", "1 no prompt or no response")),
        (("faithfulness", "--squad", squad), ("2 rows", "--keep-impossible", "1 no question or no document")),
        (("from-csv", table, *columns), ("3 rows", "1 both sides", "1 an empty cell", "1 another number of cells")),
        (("from-csv", one, *columns, "--skip", 5), ("1 rows", "1 passed over by --skip")),
        (("from-csv", empty, *columns), ("no rows in the data",)),
    ):
        result = run("pairs", *command, *out)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert "no pair" in result.stderr
        assert str(command[1] if command[0] == "from-csv" else command[2]) in result.stderr
        for reason in reasons:
            assert reason in result.stderr, (command, result.stderr)
        assert not (tmp_path / "out.jsonl").exists()


def test_words_for_false_make_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{n}", "response": "r", "is_safe": value} for n, value in enumerate(("False", "True", 0, "no"))
    ]
    result = run("pairs", "safety", "--data", lines(tmp_path / "r", *rows), "-o", tmp_path / "p.jsonl")
    assert result.exit_code == 0, result.stderr
    assert [pair.id for pair in load_pairs(tmp_path / "p.jsonl")] == ["row-1", "row-3", "row-4"]


def test_pairs_that_were_passed_over() -> None:
    tally = Tally()
    rows = [{"prompt": f"p{n}", "response": "r", "is_safe": False} for n in range(3)]
    assert len(list(select(safety_pairs(rows, tally), tally, skip=2))) == 1
    assert (tally.passed, tally.pairs) == (2, 1)


def test_cells_of_any_length(tmp_path: Path) -> None:
    long = "long " * 200_000
    path = tmp_path / "t.csv"
    path.write_text(f'a,b\n"{long}",2\nx,"{long}"\n')
    assert [len(row["a"]) for row in csv_rows(path, ["a", "b"])] == [len(long), 1]
    columns = ("--positive-column", "a", "--negative-column", "b")
    assert run("pairs", "from-csv", path, *columns, "-o", tmp_path / "p.jsonl").exit_code == 0
    assert [len(str(pair.positive)) for pair in load_pairs(tmp_path / "p.jsonl")] == [len(long.strip()), 1]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('a,b\n1,"2\n', 2),
        ('a,b\n1,2\n"x\ny,z\n', 3),
        ('a,b\n"1\n1",2\n3,"4', 4),
        ('a,b\n1,"2""\n', 2),
    ],
)
def test_quotes_that_stay_open(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    columns = ("--positive-column", "a", "--negative-column", "b")
    result = run("pairs", "from-csv", path, *columns, "-o", tmp_path / "p.jsonl")
    assert result.exit_code == 1
    assert f"{path}:{line}: a quote is opened" in result.stderr
    assert not (tmp_path / "p.jsonl").exists()


@pytest.mark.parametrize("text", ['a,b\n1,5" pipe\n', 'a,b\n"1\n2",3\n', 'a,b\n"x""",y', 'a,b\n1,"2"\n\n'])
def test_quotes_that_do_not(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert len(list(csv_rows(path, ["a", "b"]))) == 1
