"""Steering by the fitted values that a map recommends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap, FormatError, UsageError
from steermoe_local.evaluation.measuring.opening import open_steering
from steermoe_local.evaluation.measuring.plans import open_plan
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.steering.plan import SteeringPlan
from steermoe_local.steering.steering import Steering

VALUES = ((0, 1, 0.25), (0, 2, 4.0), (3, 1, -1.5))


def table(*, scale: float = 1.0) -> Any:
    expected = np.zeros((5, 24), dtype=np.float32)
    for layer, expert, logits in VALUES:
        expected[layer, expert] = scale * logits
    return expected


def saved(path: Path, **fields: Any) -> Path:
    bare = ExpertMap.load(shipped_maps()["digits-words"])
    with_recommended(bare, Recommended(**{"choice": {}, "values": VALUES} | fields)).save(path)
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return saved(tmp_path / "own.json")


@pytest.fixture
def steering(own: Path) -> Steering:
    return Steering.open(map_file=own).recommending()


def dense(steering: Any) -> Any:
    bias = steering.build()
    assert bias.mode == "soft"
    return bias.dense()


def test_the_bias_is_that_of_the_values(steering: Steering) -> None:
    assert (steering.mode, steering.scale, steering.side) == ("soft", 1.0, "digits")
    assert np.array_equal(dense(steering), table())
    assert np.array_equal(dense(steering.with_choice({"scale": 2.5})[0]), table(scale=2.5))
    other = steering.with_choice({"reverse": True})[0]
    assert np.array_equal(dense(other), table(scale=-1))
    assert other.side == "words"
    assert steering.with_choice({"scale": 0.0})[0].build() is None
    assert len({one.content for one in (steering, other, steering.changed(scale=2.0))}) == 3
    bare = Steering(steering.name, steering.expert_map, path=steering.path)
    assert not bare.has_experts
    assert bare.recommending({"activate": 0, "deactivate": 0}).build() is None, "numbers that are given are meant"


def test_values_towards_the_other_side(tmp_path: Path) -> None:
    both = Steering.open(map_file=saved(tmp_path / "a.json", choice={"reverse": True})).recommending()
    assert np.array_equal(dense(both), table(scale=-1))
    assert both.side == "words"
    alone = Steering.open(map_file=saved(tmp_path / "b.json", one_way=True)).recommending()
    with pytest.raises(UsageError, match="digits alone"):
        alone.with_choice({"reverse": True})
    assert alone.with_choice({"reverse": True, "activate": 2})[0].reverse


@pytest.mark.parametrize(
    "choice", [{"rank": "log-odds"}, {"layers": "0-1"}, {"mode": "hard"}, {"mode": "capped"}, {"cap": 2.0},
               {"weights": "log-odds"}]
)  # fmt: skip
def test_what_chooses_experts_needs_numbers(choice: dict[str, Any], steering: Steering, own: Path) -> None:
    with pytest.raises(UsageError, match=r"steers by fitted values, which have no .*give numbers of experts"):
        steering.with_choice(choice)
    word = " ".join(f"{name}={value}" for name, value in choice.items())
    with pytest.raises(UsageError, match="give numbers of experts"):
        open_plan([f'answer: "{own}" {word}'])


@pytest.mark.parametrize(
    ("choice", "mode"),
    [({"activate": 3}, "hard"), ({"deactivate": 2, "cap": 2.0}, "capped"), ({"activate": 1, "scale": 3.0}, "soft"),
     ({"activate": 2, "rank": "log-odds"}, "hard")],
)  # fmt: skip
def test_numbers_are_instead_of_values(choice: dict[str, Any], mode: str, steering: Steering) -> None:
    assert steering.expert_map is not None
    bare = Steering(steering.name, with_recommended(steering.expert_map, None), path=steering.path)
    chosen, expected = steering.with_choice(choice)[0], bare.with_choice(choice)[0]
    assert chosen.mode == mode
    assert chosen.values == ()
    assert chosen.content == expected.content
    changed = steering.changed(**{name: value for name, value in choice.items() if name in ("activate", "deactivate")})
    assert (changed.mode, changed.values) == ("hard", ()), "as /activate N of a chat"


def test_it_is_saved_and_opened_with_its_values(steering: Steering, own: Path) -> None:
    for one in (steering, steering.changed(scale=2.0, reverse=True)):
        data = json.loads(json.dumps(one.to_dict()))
        assert data["values"] == [list(row) for row in VALUES]
        saved(own, values=((1, 1, 9.0),))  # what the map recommends by now is another matter
        again = Steering.from_dict(data)
        assert again.content == one.content
        assert again.to_dict() == one.to_dict()
    with pytest.raises(FormatError, match=r"chat\.values"):
        Steering.from_dict(steering.to_dict() | {"values": [[0, 1]]}, "chat")
    with pytest.raises(FormatError, match="layer 7"):
        Steering.from_dict(steering.to_dict() | {"values": [[7, 1, 1.0]]})
    bias = steering.build()
    assert bias is not None
    assert json.loads(bias.provenance["choice"])["fitted"] == 3
    assert "values" not in Steering.open(map_file=own, activate=1).to_dict()


def test_plans_and_open_steering_take_them(own: Path) -> None:
    assert np.array_equal(dense(open_steering(own)), table())
    assert np.array_equal(dense(open_steering(own, strength=2.0, reverse=True)), table(scale=-2))
    assert open_steering(own, activate=2).values == ()
    plan = open_plan([f'answer: "{own}"', f'thinking: "{own}" reverse scale=3', f'all: "{own}" +1'])
    steerings = [rule.steering for rule in plan.rules]
    assert [one.values == VALUES for one in steerings if one is not None] == [True, True, False]
    assert np.array_equal(dense(steerings[1]), table(scale=-3))
    again = SteeringPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again.content == plan.content
