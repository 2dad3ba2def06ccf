"""`steermoe pairs faithfulness --choices`: pairs of one prompt and two answers, and the commands that take them."""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.pairs.pairs import load_pairs
from tests.pairs.test_pair_builders import write_lines, write_parquet
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "pairs" / "squad-layout.json"


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [*map(str, args)])


def choices(source: Any, out: Path, *args: Any) -> Result:
    return run("pairs", "faithfulness", "--choices", "--squad", source, "-o", out, *args)


def rows(n: int, **more: Any) -> list[dict[str, Any]]:
    return [
        {"context": f"It was built in {1900 + i}.", "question": "When?", "answers": {"text": [str(1900 + i)]}, **more}
        for i in range(n)
    ]


def test_the_pairs_have_a_margin_and_a_seed(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    result = choices(EXAMPLE, out)
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "12 pairs from 13 rows" in result.stderr
    assert "1 left out: no other answer of the same kind is certainly wrong" in result.stderr
    assert [pair.margin_problem() for pair in load_pairs(out)] == [None] * 12
    first = out.read_bytes()
    data = json.loads(choices(EXAMPLE, out, "--json").stdout)
    assert (data["pairs"], data["rows"], sum(data["skipped"].values())) == (12, 13, 1)
    assert out.read_bytes() == first
    source = write_lines(tmp_path / "rows.jsonl", rows(30))
    files = set()
    for seed in range(4):
        assert choices(source, out, "--seed", seed).exit_code == 0
        files.add(out.read_bytes())
    assert len(files) == 4


def test_some_of_the_pairs_and_parquet(tmp_path: Path) -> None:
    source, out = write_parquet(tmp_path / "t.parquet", rows(30)), tmp_path / "out.jsonl"
    assert choices(source, out).exit_code == 0
    every = load_pairs(out)
    assert len(every) == 30
    assert choices(source, out, "--skip", 3, "--limit", 5).exit_code == 0
    assert load_pairs(out) == every[3:8]
    assert choices(source, out, "--sample", 5).exit_code == 0
    assert set(load_pairs(out)) < set(every)
    assert choices(source, out, "--one-per-document").exit_code == 0
    assert load_pairs(out) == every


def test_check_and_detect_take_them(tmp_path: Path) -> None:
    out, made = tmp_path / "out.jsonl", tmp_path / "map.json"
    assert choices(EXAMPLE, out, "--limit", 4).exit_code == 0
    assert run("pairs", "check", out, "-m", "tiny").exit_code == 0
    result = run("detect", "-m", "tiny", "--pairs", out, "-o", made)
    assert result.exit_code == 0, result.output
    assert ExpertMap.load(made).n_pairs == 4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (rows(1), ("of 1 rows", "1 no other answer of the same kind", "'1900'", "give more")),
        (rows(3, answers=[{"text": "gone"}]), ("of 3 rows", "3 no answer that stands in the document", "'gone'")),
        (rows(2, is_impossible=True), ("2 the document does not answer the question",)),
        ([{"context": "x"}], ("layout",)),
    ],
)
def test_no_pair_without_its_reasons(tmp_path: Path, data: list[Any], words: tuple[str, ...]) -> None:
    source, out = write_lines(tmp_path / "rows.jsonl", data), tmp_path / "out.jsonl"
    result = choices(source, out)
    assert result.exit_code == 1
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
    for word in words:
        assert word in result.stderr
    assert not out.exists()


def test_the_documents_answer_is_needed(tmp_path: Path) -> None:
    result = choices(EXAMPLE, tmp_path / "out.jsonl", "--keep-impossible")
    assert result.exit_code == 2
    assert "--keep-impossible" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.skipif(sys.platform == "win32", reason="named pipes are POSIX")
def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    pipe, out = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    result: list[Result] = []
    # in a thread: a reader of a pipe without a writer would wait for ever
    thread = threading.Thread(target=lambda: result.append(choices(pipe, out)), daemon=True)
    thread.start()
    thread.join(60)
    assert result, "the pipe was opened"
    assert result[0].exit_code == 2
    assert str(pipe) in result[0].stderr
    assert not out.exists()


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        result = choices(path, tmp_path / "out.jsonl")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {path}: ")
        assert result.stderr.count("\n") == 1


def test_hostile_rows_lose_nothing(tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"context": "c", "question": "q", "answers": 3},
        {"context": "c", "question": "q", "answers": [[["c"]]]},
        {"context": "c\ud800", "question": "q", "answers": ["c"]},
        {"context": "\u0000 \u202e 5", "question": "\u001b[31m", "answers": ["\u0000"]},
        {"context": "hundred " * 1000, "question": "9" * 5000, "answers": ["hundred"], "id": [3]},
    ]
    source, out = write_lines(tmp_path / "odd.jsonl", [*odd, *rows(5)]), tmp_path / "out.jsonl"
    result = choices(source, out, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["rows"] == 10 == data["pairs"] + sum(data["skipped"].values())
    assert data["pairs"] >= 5
    assert all(pair.margin_problem() is None for pair in load_pairs(out))
