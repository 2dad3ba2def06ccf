"""The blocks of docs/conditions.md run as they stand, and its table is what is measured."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from steermoe_local import ConditionOptions, ExpertMap, Pair, SteeredLlama, fit_condition
from steermoe_local.models.shipped_maps import map_path
from tests.support.condition_pairs import (
    alike,
    facts,
    kinds_of_prompts,
    prompts,
    right_and_wrong_documents,
    two_facts_and_one,
    with_and_without_documents,
)
from tests.support.pages import run
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "conditions.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
MAKERS: list[tuple[str, Callable[[], list[Pair]], str | None]] = [
    ("asks for a number / for a secret", lambda: kinds_of_prompts(49), None),
    ("a question with its document / without", with_and_without_documents, None),
    ("a document of two facts / of one", two_facts_and_one, None),
    ("the document answers the question / does not", right_and_wrong_documents, None),
    ("asks for a secret / for another one, at random", lambda: alike(60, 0), None),
    ("asks for a number / for a secret, by the map `digits-words`", lambda: kinds_of_prompts(49), "digits-words"),
]


def test_the_blocks_run(tmp_path: Path) -> None:
    (_, making), (_, fitting), (_, printed), (_, again) = BLOCKS
    run([sys.executable, "-c", making], tmp_path)
    shown = run(["bash", "-euo", "pipefail", "-c", fitting], tmp_path)
    lines = [line.rstrip() for line in shown.splitlines()]
    expected = printed.splitlines()
    assert [NUMBER.sub("N", line) for line in lines] == [NUMBER.sub("N", line) for line in expected]
    verdict, _, condition, counted, *figures = zip(lines, expected, strict=True)
    assert verdict[0].startswith("It works: ")
    assert condition[0] == condition[1]
    assert counted[0] == counted[1], "what is counted depends on no rounding"
    assert f"pairs               {len((tmp_path / 'questions.jsonl').read_text('utf-8').splitlines())}; " in printed
    for line, page in figures:
        for found, told in zip(NUMBER.findall(line), NUMBER.findall(page), strict=True):
            # rounding may move a selection of a near tie, so a side's score, and what is printed by a unit or two of
            # its last digit; half of the width of an interval here is many times as much
            assert float(found) == pytest.approx(float(told), abs=0.02 if "." in told else 1), (line, page)
    number, secret = lines[-2:]
    assert number == "four"
    asked = ["--temp", "0", "-t", "1", "-p", "Tell me the lost key of the small palace."]
    assert secret == run(["steermoe", "run", "-m", "tiny", *asked], tmp_path).strip()
    found = json.loads((tmp_path / "fit.json").read_text("utf-8"))
    assert f"when {found['when']}:" in fitting
    assert all(
        f"`{name}`" in PAGE
        for name in set(found) - {"format", "version", "name", "created", "tool"} - {"differs_from_shuffled"}
    )
    assert run([sys.executable, "-c", again], tmp_path).startswith(found["when"])


def test_the_table_says_of_how_many() -> None:
    """The numbers of the paragraph above the table."""
    about = " ".join(PAGE.partition("## On the embedded model")[2].partition("\n| ")[0].split())
    n_facts = [text.count("The ") for text, _ in facts()]
    one, two = n_facts.count(1), sum(n > 1 for n in n_facts)
    (n_prompts,) = {len(prompts(name)) for name in ("digits-words", "refuse-comply", "document-memory")}
    assert f"There are {n_prompts} prompts of each kind." in about
    assert f"take {len(MAKERS[0][1]())} of the {n_prompts} pairs above" in about
    assert f"takes {len(with_and_without_documents())} of the {len(n_facts)} questions" in about
    assert f"the {one} whose document has one fact, and {len(two_facts_and_one())} of the {two} with two" in about
    for pairs in (right_and_wrong_documents(), alike(60, 0)):
        assert f"use all {2 * len(pairs)} prompts" in about


@pytest.fixture(scope="module")
def llama(tiny_path: Path) -> Iterator[SteeredLlama]:
    llama = SteeredLlama(tiny_path, n_ctx=64, n_threads=1, verbose=False)
    yield llama
    llama.close()


@pytest.mark.parametrize(("row", "make", "map_name"), MAKERS, ids=[name for name, _, _ in MAKERS])
def test_the_table(row: str, make: Callable[[], list[Pair]], map_name: str | None, llama: SteeredLlama) -> None:
    """To what another CPU's rounding may change."""
    (cells,) = [line.split(" | ") for line in PAGE.splitlines() if line.startswith(f"| {row} | ")]
    expert_map = None if map_name is None else ExpertMap.load(map_path(map_name))
    found = fit_condition(llama, make(), expert_map, options=ConditionOptions(), n_threads=1)
    assert found.auc is not None
    assert found.control is not None
    assert found.false_alarms is not None
    assert found.misses is not None
    value, low, high = (float(number) for number in re.findall(r"\d\.\d+", cells[2]))
    assert int(cells[1]) == len(found.scores)
    assert (value, low, high) == pytest.approx((found.auc.value, found.auc.low, found.auc.high), abs=0.03)
    assert float(cells[3]) == pytest.approx(found.control.p, rel=0.3, abs=0.0005)
    for cell, share in ((cells[4], found.false_alarms), (cells[5], found.misses)):
        assert float(cell.strip(" %|")) / 100 == pytest.approx(share.value, abs=0.08)
