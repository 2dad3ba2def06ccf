"""What the embedded model and the demo must show; benchmarks/behaviours.py measures the same on all prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from steermoe_local import ExpertMap, read_bias
from steermoe_local.errors import ChoiceError
from steermoe_local.evaluation.demo import DemoResult, run_demo
from steermoe_local.identity import ModelIdentity
from steermoe_local.models.embedded import score_reply
from steermoe_local.steering.control_choices import random_signs


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    return run_demo(tmp_path_factory.mktemp("demo"), n_prompts=40, n_random=5)


@pytest.mark.parametrize(("name", "least"), [("digits-words", 0.6), ("document-memory", 0.6), ("refuse-comply", 0.3)])
def test_steering_moves_unseen_prompts_and_random_experts_do_not(result: DemoResult, name: str, least: float) -> None:
    b = next(b for b in result.behaviours if b.name == name)
    assert b.swing >= least
    assert b.away <= b.base <= b.toward
    assert b.random_swing < b.swing / 3
    for direction in ("toward", "away"):
        assert b.neutral[direction] >= 0.9 * b.neutral["base"]
        assert b.ill_formed[direction] <= 0.15


def test_detection_finds_the_planted_experts(result: DemoResult) -> None:
    for b in result.behaviours:
        assert b.planted_precision >= 0.75, b.name


def test_the_result_is_json_and_the_files_are_there(result: DemoResult) -> None:
    data = json.loads(json.dumps(result.to_dict()))
    assert [b["name"] for b in data["behaviours"]] == ["digits-words", "document-memory", "refuse-comply"]
    for b in data["behaviours"]:
        assert {"n", "base", "toward", "away", "random_mean", "max_abs_rd"} <= set(b)
        expert_map = ExpertMap.load(Path(data["folder"]) / f"{b['name']}.map.json")
        assert b["max_abs_rd"] == np.abs(expert_map.rd).max()
        toward = read_bias(Path(data["folder"]) / f"{b['name']}.toward.gguf")
        away = read_bias(Path(data["folder"]) / f"{b['name']}.away.gguf")
        assert toward.n_active == b["n_active"] > 0 or toward.n_inactive == b["n_inactive"] > 0
        assert (toward.signs != away.signs).any()


@pytest.mark.parametrize(
    ("behaviour", "reply", "expected"),
    [
        ("digits-words", "4, 5", ("positive", True)),
        ("digits-words", "4, 6", ("positive", False)),
        ("digits-words", "four, five ", ("negative", True)),
        ("digits-words", "twenty-one", ("negative", False)),
        ("digits-words", "4, five", ("ill-formed", False)),
        ("digits-words", "", ("ill-formed", False)),
        ("document-memory", "4, 5", ("positive", True)),
        ("document-memory", "4", ("ill-formed", False)),
        ("refuse-comply", "Sorry, no.", ("positive", False)),
        ("refuse-comply", "Sure, yes.", ("negative", False)),
        ("refuse-comply", "Sorry, Sure", ("ill-formed", False)),
    ],
)
def test_replies_are_scored_by_their_form(behaviour: str, reply: str, expected: tuple[str, bool]) -> None:
    assert score_reply(behaviour, reply, "4, 5", "four, five") == expected


def test_random_signs_have_the_same_counts_and_can_be_carried_out() -> None:
    identity = ModelIdentity("olmoe", 4, 8, 2, "0" * 64)
    signs = np.zeros((4, 8), dtype=np.int8)
    signs[1, :2], signs[2, :3] = 1, -1
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(50):
        drawn = random_signs(signs, identity, (0, 1, 3), rng)
        assert ((drawn > 0).sum(), (drawn < 0).sum()) == (2, 3)
        assert not drawn[2].any(), "layer 2 has no router"
        assert (drawn > 0).sum(axis=1).max() <= 2
        seen.add(drawn.tobytes())
    assert len(seen) > 40
    with pytest.raises(ChoiceError):
        random_signs(np.ones((4, 8), dtype=np.int8), identity, (0, 1, 2, 3), rng)
