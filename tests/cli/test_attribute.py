"""steermoe attribute: its map, what it prints, an interruption, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local import ExpertMap
from steermoe_local.cli import main
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path
from tests.support.interrupting import interrupted_after

NAME = "document-memory"
QUICK = f"attribute -m tiny --map {NAME} --candidates 8 --draws 64 --items 6 --n-text 32 -t 1"


def start(*words: Any) -> Result:
    return CliRunner().invoke(main, [*QUICK.split(), *map(str, words)])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("attribute") / "pairs.jsonl"
    found.write_text("\n".join(behaviour(NAME).pairs.read_text("utf-8").splitlines()[:12]) + "\n", "utf-8")
    return found


@pytest.fixture(scope="module")
def finished(pairs: Path) -> tuple[Result, Path]:
    output = pairs.parent / "map.json"
    return start("--pairs", pairs, "-o", output, "--json"), output


def test_the_map_keeps_rd_and_has_effects(finished: tuple[Result, Path]) -> None:
    done, output = finished
    assert done.exit_code == 0, done.output
    made, shipped = ExpertMap.load(output), ExpertMap.load(map_path(NAME))
    assert np.array_equal(made.rd, shipped.rd)
    assert made.effects is not None
    assert len(made.effects.layer) == 2 * (8 + 8)
    assert int(made.effects.control.sum()) == 2 * 8
    facts = made.effects.facts
    assert facts.n_draws == {"promote": 64, "suppress": 64}
    assert re.search(
        r"3 items, 3 to confirm, 64 draws of each action; \d+ steps \(shorter with --draws N, .+\)$", done.stderr, re.M
    )
    assert done.stderr.count("shorter with") == 1
    assert (facts.n_items, facts.n_confirm, facts.response) == (3, 3, "pairs")
    assert (~np.isnan(made.effects.confirm)).sum() == 2 * 8  # the first of each action are tried alone
    assert sorted(path.name for path in output.parent.iterdir()) == ["map.json", "pairs.jsonl"]


def test_its_json_is_the_map(finished: tuple[Result, Path]) -> None:
    done, output = finished
    data, stored = json.loads(done.stdout), json.loads(output.read_text("utf-8"))
    assert data["effects"] == stored["effects"]
    assert data["attribution"] == stored["attribution"]
    assert data["first_by_rd"] == 8
    assert 0 <= data["of_them_with_an_effect"] <= 8


def test_its_table(pairs: Path, tmp_path: Path) -> None:
    done = start("--pairs", pairs, "-o", tmp_path / "map.json", "--action", "suppress", "--neutral", "none")
    assert done.exit_code == 0, done.output
    assert "suppress: 64 draws" in done.stdout
    assert "of the first 8 experts by RD" in done.stdout
    effects = ExpertMap.load(tmp_path / "map.json").effects
    assert effects is not None
    assert set(effects.action.tolist()) == {-1}
    assert np.isnan(effects.cost).all()


def test_interrupted_and_resumed_to_the_bit(pairs: Path, finished: tuple[Result, Path], tmp_path: Path) -> None:
    output = tmp_path / "map.json"
    with interrupted_after(4):
        stopped = start("--pairs", pairs, "-o", output)
    assert stopped.exit_code == 130
    assert "--resume" in stopped.stderr
    assert not output.exists()
    refused = start("--pairs", pairs, "-o", output)
    assert refused.exit_code == 2
    assert "--restart" in refused.stderr
    done = start("--pairs", pairs, "-o", output, "--resume")
    assert done.exit_code == 0, done.output
    assert output.read_bytes() == finished[1].read_bytes()


def test_a_task_of_choices(tmp_path: Path) -> None:
    items = [
        {"prompt": f"Which number comes after {word}?", "choices": [right, wrong], "answer": 0}
        for word, right, wrong in (("three", "4", "four"), ("five", "6", "six"), ("nine", "10", "ten"))
    ]
    head = {"task": {"name": "digits", "scorer": "choice"}}
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps(line) for line in (head, *items)) + "\n", "utf-8")
    done = start("--task", task, "--action", "suppress", "-o", tmp_path / "map.json")
    assert done.exit_code == 0, done.output
    effects = ExpertMap.load(tmp_path / "map.json").effects
    assert effects is not None
    assert (effects.facts.n_items, effects.facts.response) == (3, "digits")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--pairs FILE, or --task TASK"),
        (("--pairs", "PAIRS", "--task", "builtin:digits-words"), "not both"),
        (("--task", "builtin:digits-words"), "choices"),  # scored by generated text
        (("--pairs", "PAIRS", "--draws", "few"), "'few'"),
        (("--pairs", "PAIRS", "--draws", "33"), "at least 34"),
        (("--pairs", "PAIRS", "--candidates", "121"), "121"),
        (("--pairs", "PAIRS", "--rate", "1"), "--rate"),
        (("--pairs", "PAIRS", "--items", "1"), "--items"),
        (("--pairs", "ONE TARGET"), "prompts"),
        (("--pairs", "PAIRS", "--resume", "--restart"), "--restart"),
    ],
)
def test_refused(words: tuple[str, ...], says: str, pairs: Path, tmp_path: Path) -> None:
    same = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "yes"}]
    other = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "yes"}]
    one = {"positive": same, "negative": other, "positive_target": "yes", "negative_target": "yes"}
    (tmp_path / "one.jsonl").write_text(json.dumps(one) + "\n", "utf-8")
    named = {"PAIRS": str(pairs), "ONE TARGET": str(tmp_path / "one.jsonl")}
    done = start(*(named.get(word, word) for word in words), "-o", tmp_path / "map.json")
    assert done.exit_code in (1, 2), done.output
    assert done.stdout == ""
    error = done.stderr.splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl"]
