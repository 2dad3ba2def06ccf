"""Prompts in JSON arrays and CSV: read as in JSON Lines, or refused with the cure."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.cli import main
from steermoe_local.errors import FormatError
from steermoe_local.evaluation.tasks.tasks import load_task
from steermoe_local.pairs.pairs import Message
from steermoe_local.pairs.prompts import load_prompts, read_prompts

ROWS = [{"id": "a", "prompt": 'Say "x", please\n\nnow', "system": "s", "answer": "x"}, {"prompt": "y"}]
CSV = 'id,prompt,system,answer\na,"Say ""x"", please\n\nnow",s,x\n,y,,\n'


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def contents(path: Path) -> list[tuple[Any, ...]]:
    return [(item.content, item.system, item.extra) for item in load_prompts(path)]


EXPECTED = [(ROWS[0]["prompt"], "s", {"answer": "x"}), ("y", "", {})]


@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p"])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array(tmp_path: Path, name: str, indent: int | None) -> None:
    path = written(tmp_path / name, "\ufeff" + json.dumps(ROWS, indent=indent))
    assert contents(path) == EXPECTED
    assert [(item.id, item.line) for item in load_prompts(path)] == [("a", 1), ("row-2", 2)]


def test_an_array_of_texts_and_conversations(tmp_path: Path) -> None:
    path = written(tmp_path / "p.json", '["one", {"messages": [{"role": "user", "content": "two"}]}]')
    assert [item.content for item in load_prompts(path)] == ["one", (Message("user", "two"),)]


@pytest.mark.parametrize(("name", "text"), [("p.csv", CSV), ("p", CSV), ("p.tsv", CSV.replace(",", "\t"))])
def test_csv(tmp_path: Path, name: str, text: str) -> None:
    """By its name, or by a header with several columns, one of them prompt."""
    if name == "p.tsv":
        text = text.replace('""x""\t', '""x"",')
    path = written(tmp_path / name, text)
    assert contents(path) == EXPECTED
    assert [(item.id, item.line) for item in load_prompts(path)] == [("a", 2), ("line-5", 5)]


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), min_size=1))))
def test_csv_as_python_writes_it(rows: list[tuple[str]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["prompt", "x"])
    writer.writerows([(row[0], "1") for row in rows])
    data = io.BytesIO(text.getvalue().encode())
    if not rows:
        with pytest.raises(FormatError, match="no prompts"):
            read_prompts(data, "p.csv")
        return
    assert [(item.content, item.extra) for item in read_prompts(data, "p.csv")] == [
        (row[0], {"x": "1"}) for row in rows
    ]


def test_text_stays_text(tmp_path: Path) -> None:
    """Lines that only look like the other layouts."""
    for name, text in (
        ("a", "[INST] hello\n[x]\n"),
        ("b", "prompt\nhello\n"),
        ("c.txt", CSV.split("\n")[0] + "\n"),
        ("d.txt", json.dumps(ROWS)),
        ("e", "a, b\nid,prompt\n"),
    ):
        path = written(tmp_path / name, text)
        assert [item.content for item in load_prompts(path)] == text.strip("\n").split("\n"), name


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.json", '[{"prompt": "x"},', "not JSON"),
        ("p.json", "[]", "no prompts in it"),
        ("p.json", "[1]", "p.json:1: not a JSON object"),
        ("p.json", '[{"prompt": "x"}, {"promt": "y"}]', "p.json:2: neither prompt nor messages"),
        ("p.json", '[{"prompt": "x", "id": 1}, {"prompt": "y", "id": 1}]', "p.json:2: id: 1 is already"),
        ("p.json", '[{"role": "user", "content": "x"}]', '{"messages": [...]}'),
        ("p.json", '[{"prompt": "x", "prompt": "y"}]', "stands twice"),
        (
            "p.csv",
            "question,answer\n1,2\n",
            "no column 'prompt'; its columns are 'question', 'answer'; name the column",
        ),
        ("p.csv", "", "empty; check the path"),
        ("p.csv", "prompt,a\nx\n", "p.csv:2: another number of cells"),
        ("p.csv", "prompt,a\n,2\n", "p.csv:2: prompt: empty"),
        ("p.csv", 'prompt\nx\n"y\n', "p.csv:3: a quote is opened and never closed"),
        ("p.csv", "prompt,prompt\n1,2\n", "stands twice"),
        ("p.csv", "id,prompt\na,x\na,y\n", "p.csv:3: id: 'a' is already"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        load_prompts(written(tmp_path / name, text))
    assert words in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"prompt\nx\ncaf\xe9\n")
    with pytest.raises(FormatError, match=r"p\.csv:3: not UTF-8"):
        load_prompts(path)


def test_run_and_eval_take_them(tmp_path: Path) -> None:
    data = [{"id": "q", "prompt": "Which number comes after three?", "answer": "4"}]
    array = written(tmp_path / "p.json", json.dumps(data, indent=1))
    table = written(tmp_path / "p.csv", 'id,prompt,answer\nq,"Which number comes after three?",4\n')
    answers = []
    for words, stdin in (((array,), None), ((table,), None), (("-",), table.read_text()), (("-",), array.read_text())):
        command = ["run", "-m", "tiny", "--temp", "0", "-n", "2", "--n-prompts", *map(str, words)]
        result = CliRunner().invoke(main, command, input=stdin)
        assert result.exit_code == 0, result.stderr
        answers.append(json.loads(result.stdout))
    assert [(one["id"], one["extra"]) for one in answers] == [("q", {"answer": "4"})] * 4
    assert len({one["text"] for one in answers}) == 1
    for path in (array, table):
        task = load_task(path, scorer="contains")
        assert [(item.content, item.extra) for item in task.items] == [(data[0]["prompt"], {"answer": "4"})]
