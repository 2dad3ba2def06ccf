"""A run that is interrupted anywhere goes on, to the same result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.errors import FormatError, UsageError
from steermoe_local.learning.learn import LearnProgress
from steermoe_local.learning.options import GivenPairs
from steermoe_local.learning.result import LearnResult
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.models.embedded import behaviour
from tests.learning.conftest import OPENINGS, small
from tests.support.interrupting import interrupted_after

STEPS = ("answers", "detect", "attribute", "tune", "confirm", "report")
VARYING = ("clock", "speed", "created", "folder")


class Interrupt:
    """A progress that is Ctrl-C at the n-th call of a step."""

    def __init__(self, step: str, n: int) -> None:
        self.step, self.left = step, n

    def __call__(self, done: LearnProgress) -> None:
        if done.step == self.step:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def result_of(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "learn.json").read_text("utf-8"))
    return {name: value for name, value in data.items() if name not in VARYING}


def assert_same(folder: Path, learnt: LearnResult) -> None:
    assert result_of(folder) == result_of(learnt.folder)
    maps = [ExpertMap.load(path / "map.json") for path in (folder, learnt.folder)]
    assert maps[0].rd.tolist() == maps[1].rd.tolist()
    for name in ("pairs.jsonl", "task.jsonl"):
        assert (folder / name).read_bytes() == (learnt.folder / name).read_bytes()


@pytest.mark.parametrize(("n", "steps"), [(1, STEPS), (3, ("answers", "attribute", "tune", "confirm"))])
def test_interrupted_in_every_step(learnt: LearnResult, tmp_path: Path, n: int, steps: tuple[str, ...]) -> None:
    for number, step in enumerate(steps):
        with pytest.raises(KeyboardInterrupt):
            small(tmp_path, OPENINGS, resume=number > 0, progress=Interrupt(step, n))
        assert not (tmp_path / "numbers" / "learn.json").exists()
    small(tmp_path, OPENINGS, resume=True)
    assert_same(tmp_path / "numbers", learnt)


def test_interrupted_while_results_are_kept(learnt: LearnResult, tmp_path: Path) -> None:
    n_interrupted = 0
    while n_interrupted < 9:
        try:
            with interrupted_after((7, 90, 33, 1, 60)[n_interrupted % 5]):
                small(tmp_path, OPENINGS, resume=n_interrupted > 0)
        except KeyboardInterrupt:
            n_interrupted += 1
        else:
            break
    else:
        small(tmp_path, OPENINGS, resume=True)
    assert n_interrupted > 3
    assert_same(tmp_path / "numbers", learnt)


def test_finished_steps_are_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, OPENINGS, progress=Interrupt("tune", 1))
    seen: list[str] = []
    small(tmp_path, OPENINGS, resume=True, progress=lambda done: seen.append(done.step))
    assert set(seen) == {"tune", "confirm", "report"}


def test_other_settings_and_forgotten_flags(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, OPENINGS, progress=Interrupt("detect", 1))
    with pytest.raises(UsageError, match=r"interrupted run; go on with --resume, or start over with --restart"):
        small(tmp_path, OPENINGS)
    with pytest.raises(UsageError, match=r"begun with seed 0, now it is 1; .*--restart"):
        small(tmp_path, OPENINGS, resume=True, seed=1)
    with pytest.raises(UsageError, match="begun with contrast"):
        small(tmp_path, GivenPairs(behaviour("digits-words").pairs), resume=True)
    (tmp_path / "numbers" / "work" / "state.json").write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match="--restart"):
        small(tmp_path, OPENINGS, resume=True)
    with pytest.raises(KeyboardInterrupt):
        small(tmp_path, GivenPairs(behaviour("digits-words").pairs), restart=True, progress=Interrupt("detect", 1))
