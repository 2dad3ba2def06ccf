"""An interrupted attribution gives the map of an uninterrupted one, to the bit; other settings are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap
from steermoe_local.attribution.attribute import attribute
from steermoe_local.attribution.items import Item
from steermoe_local.errors import FormatError, StorageError, UsageError
from steermoe_local.evaluation.tasks.neutral_text import Document
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.llama import steered_llama
from steermoe_local.llama.loaded_model import loaded_identity
from tests.support.builders import table_map
from tests.support.interrupting import interrupted_after
from tests.support.interventions import DECODER, Alone
from tests.support.paths import ROOT
from tests.support.random_models import OLMOE

SETTINGS: dict[str, Any] = {**DECODER, "n_candidates": 4, "draws": 70, "first": 2}
# of each action: 70 draws are two blocks, of two items and the text; then two items confirm
N_PARTS = 2 * (2 * 3 + 2)


class FixedText:
    """Stands for a neutral text of the random model, which has no tokenizer."""

    name = "text"

    def __init__(self, document: Document) -> None:
        self.document = document
        self.sha256 = "ab" * 32

    def longest(self, renderer: Any) -> int:
        return 0

    def documents(self, renderer: Any, n_ctx: int, max_tokens: int) -> list[Document]:
        return [self.document]


class Case:
    """A random model, its map, items and text."""

    def __init__(self, path: Path) -> None:
        self.one = Alone(path)
        model = loaded_identity(self.one.model)
        rd = np.random.default_rng(2).uniform(-1, 1, model.shape)
        self.map = replace(table_map(rd), identity=model)
        self.items = [*self.one.items(4)[1:], *(replace(item, id=f"{item.id}-2") for item in self.one.items(6, 8)[1:])]
        self.text: Any = FixedText(self.one.document(12, 3))

    def run(self, kept: AnswerFile | None = None, **changed: Any) -> str:
        """The map as it would be saved."""
        given: dict[str, Any] = (
            {"neutral": self.text, "renderer": object(), "expert_map": self.map} | SETTINGS | changed
        )
        found: ExpertMap = attribute(self.one.llama, given.pop("items", self.items), kept=kept, **given)
        assert found.effects is not None
        return json.dumps([found.effects.facts.to_dict(), found.effects.rows()], sort_keys=True)


@pytest.fixture(scope="module")
def case(random_model: Any) -> Iterator[Case]:
    found = Case(random_model(OLMOE))
    yield found
    found.one.close()


@pytest.fixture(scope="module")
def whole(case: Case) -> str:
    return case.run()


def kept_after(case: Case, folder: Path, n: int, **changed: Any) -> AnswerFile:
    """The file of a run that was interrupted after `n` parts."""
    with AnswerFile(folder / "map.json") as kept, interrupted_after(n), pytest.raises(KeyboardInterrupt):
        case.run(kept, **changed)
    return AnswerFile(folder / "map.json")


def test_a_run_is_the_same_every_time(case: Case, whole: str, tmp_path: Path) -> None:
    assert case.run() == whole
    with AnswerFile(tmp_path / "map.json") as kept:
        assert case.run(kept) == whole
        assert kept.n_kept == N_PARTS


@pytest.mark.parametrize("n", range(1, N_PARTS + 1))
def test_interrupted_after_any_part(case: Case, whole: str, tmp_path: Path, n: int) -> None:
    with kept_after(case, tmp_path, n) as kept:
        assert kept.exists()
        assert case.run(kept, resume=True) == whole
        assert kept.n_kept == N_PARTS


def test_interrupted_again_and_again(case: Case, whole: str, tmp_path: Path) -> None:
    for _ in range(N_PARTS // 3):
        with AnswerFile(tmp_path / "map.json") as kept, interrupted_after(3), pytest.raises(KeyboardInterrupt):
            case.run(kept, resume=True)
    with AnswerFile(tmp_path / "map.json") as kept:
        assert case.run(kept, resume=True) == whole


def test_a_line_that_was_cut_off_is_computed_again(case: Case, whole: str, tmp_path: Path) -> None:
    path = kept_after(case, tmp_path, 5).path
    path.write_bytes(path.read_bytes()[:-4])
    with AnswerFile(tmp_path / "map.json") as kept:
        assert case.run(kept, resume=True) == whole


def _killed(path: Path, folder: Path) -> None:
    """In a process of its own: kill it after the seventh part."""
    add, n = AnswerFile.add, 0

    def add_and_kill(self: AnswerFile, record: dict[str, Any]) -> None:
        nonlocal n
        add(self, record)
        n += 1
        if n == 7:
            os.kill(os.getpid(), signal.SIGKILL)

    AnswerFile.add = add_and_kill  # type: ignore[method-assign]
    with AnswerFile(folder / "map.json") as kept:
        Case(path).run(kept)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_process(case: Case, whole: str, tmp_path: Path, random_model: Any) -> None:
    # this folder last: the package is the one that is tested here
    code = "import sys; from pathlib import Path; sys.path.append(sys.argv[1]); "
    code += "from tests.attribution.test_resume import _killed; _killed(Path(sys.argv[2]), Path(sys.argv[3]))"
    words = [sys.executable, "-P", "-c", code, str(ROOT), str(random_model(OLMOE)), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with AnswerFile(tmp_path / "map.json") as kept:
        assert case.run(kept, resume=True) == whole


@pytest.mark.parametrize("draws", [71, 128, 200, "auto"])
def test_more_draws_go_on_from_fewer(case: Case, tmp_path: Path, draws: Any) -> None:
    """What was computed in whole blocks is used; the result is that of a run that asked for as many at once."""
    expected = case.run(draws=draws)
    with kept_after(case, tmp_path, N_PARTS) as kept:
        before = kept.n_kept
        assert case.run(kept, resume=True, draws=draws) == expected
        assert kept.n_kept > before


OTHER: dict[str, Any] = {
    "n_candidates": 3,
    "n_items": 3,
    "actions": ("suppress",),
    "rate": 0.2,
    "steer": "all",
    "n_text": 5,
    "seed": 1,
    "n_batch": 100,
    "type_k": None,
    "flash_attn": "auto",
    "neutral": None,
    "metadata": {"model": "another"},
}


@pytest.mark.parametrize("name", [*OTHER, "items", "map"])
def test_other_settings_are_refused(case: Case, tmp_path: Path, name: str) -> None:
    """And what was computed stays."""
    changed: dict[str, Any] = {name: OTHER.get(name)}
    if name == "items":
        first = case.items[0]
        changed = {"items": [replace(first, prompt=(*first.prompt, 1)), *case.items[1:]]}
    if name == "map":
        changed = {"expert_map": replace(case.map, rd=-case.map.rd * 0.5)}
    with kept_after(case, tmp_path, 3) as kept:
        before = kept.path.read_bytes()
        with pytest.raises(UsageError, match="model" if name == "metadata" else name):
            case.run(kept, resume=True, **changed)
        assert kept.path.read_bytes() == before


def test_without_resume_it_starts_over(case: Case, whole: str, tmp_path: Path) -> None:
    with kept_after(case, tmp_path, 5, seed=1) as kept:
        assert case.run(kept) == whole
        assert kept.n_kept == N_PARTS


@pytest.mark.parametrize("line", [b"no JSON\n", b'{"values": [1]}\n', b"[]\n"])
def test_a_damaged_line_is_refused(case: Case, tmp_path: Path, line: bytes) -> None:
    path = kept_after(case, tmp_path, 3).path
    path.write_bytes(path.read_bytes() + line)
    with AnswerFile(tmp_path / "map.json") as kept, pytest.raises(FormatError):
        case.run(kept, resume=True)


@pytest.mark.parametrize("values", ["[]", '"text"', "[1, 2]", "[null]", "{}", "3", "[NaN]", "[1e999]", None])
def test_a_part_that_is_not_its_values_is_refused(case: Case, tmp_path: Path, values: str | None) -> None:
    path = kept_after(case, tmp_path, 3).path
    head, *parts = path.read_text().splitlines()
    name = json.loads(parts[0])["id"]
    parts[0] = json.dumps({"id": name}) if values is None else f'{{"id": {json.dumps(name)}, "values": {values}}}'
    path.write_text("\n".join([head, *parts]) + "\n")
    with AnswerFile(tmp_path / "map.json") as kept, pytest.raises(FormatError):
        case.run(kept, resume=True)


def test_a_full_disk_keeps_what_was_computed(
    case: Case, whole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, n = AnswerFile.add, 0

    def full(self: AnswerFile, record: dict[str, Any]) -> None:
        nonlocal n
        n += 1
        if n == 6:
            raise StorageError("no space left on device")
        add(self, record)

    with AnswerFile(tmp_path / "map.json") as kept, monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", full)
        with pytest.raises(StorageError):
            case.run(kept)
    with AnswerFile(tmp_path / "map.json") as kept:
        assert case.run(kept, resume=True) == whole


def test_memory_does_not_grow_with_the_draws(case: Case) -> None:
    """Biases of a block are let go of before those of the next are made."""
    most: list[int] = []
    for draws in (128, 1024):
        alive = []

        def count(*_: Any, alive: list[int] = alive) -> None:
            alive.append(len(steered_llama._built))

        case.run(draws=draws, actions=("suppress",), neutral=None, progress=count)
        most.append(max(alive))
    assert max(most) <= 2 * 64


def test_the_digest_of_the_items(case: Case) -> None:
    """It depends on their tokens, not on their order."""
    items: list[Item] = case.items
    one, turned = (json.loads(case.run(items=given, draws=32))[0]["items_sha256"] for given in (items, items[::-1]))
    other = [replace(items[0], answers=items[0].answers[::-1]), *items[1:]]
    assert one == turned
    assert json.loads(case.run(items=other, draws=32))[0]["items_sha256"] != one
