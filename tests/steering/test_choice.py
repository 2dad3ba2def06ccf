"""Steering by other scores than RD, weighted soft rules and the capped rule: the bias, and its form in files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import BiasFile, ExpertMap, FormatError, ModelIdentity, UsageError, read_bias, write_bias
from steermoe_local.maps.ranks import RANKS, WEIGHTS, relative_sizes
from steermoe_local.steering.steering import Steering
from tests.support.builders import HEX
from tests.support.scored_maps import save_scored, scored_map

SCORED = scored_map()


def steering(**choice: Any) -> Steering:
    return Steering("m", SCORED, **{"activate": 4, "deactivate": 4, **choice})


def built(found: Steering) -> BiasFile:
    bias = found.build()
    assert bias is not None
    return bias


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("reverse", [False, True])
def test_the_bias_is_the_choice_by_the_rank(rank: str, reverse: bool) -> None:
    found = steering(rank=rank, reverse=reverse, layers="1-3")
    signs = SCORED.choose(4, 4, rank=rank, reverse=reverse, layers=(1, 2, 3))
    assert np.array_equal(built(found).signs, signs)
    assert signs.any()


@given(st.sampled_from(WEIGHTS), st.floats(0.01, 50), st.integers(0, 6), st.integers(1, 6), st.booleans())
def test_weighted(weights: str, scale: float, activate: int, deactivate: int, reverse: bool) -> None:
    """b = strength * sign * |w| / max |w| of the chosen experts."""
    rank = "effect" if weights == "effect" else "rd"
    signs = SCORED.choose(activate, deactivate, reverse=reverse, rank=rank)
    found = steering(activate=activate, deactivate=deactivate, reverse=reverse, rank=rank, scale=scale, weights=weights)
    wanted = np.float32(scale) * (signs * relative_sizes(SCORED, weights, signs)).astype(np.float32)
    bias = built(found)
    assert np.array_equal(bias.dense(), wanted)
    assert np.abs(bias.dense()).max() == np.float32(scale)
    assert (bias.mode, found.mode) == ("soft", "soft")


@pytest.mark.parametrize("cap", [0.5, 4.0, math.inf])
def test_capped(cap: float) -> None:
    found = steering(cap=cap, epsilon=0.5, rank="log-odds")
    bias = built(found)
    assert (bias.mode, found.mode, bias.cap, bias.epsilon) == ("capped", "capped", cap, 0.5)
    assert np.array_equal(bias.signs, SCORED.choose(4, 4, rank="log-odds"))


def test_provenance_has_what_is_not_the_default() -> None:
    plain = '{"activate": 4, "deactivate": 4, "reverse": false, "layers": null'
    assert built(steering()).provenance["choice"] == plain + "}"
    assert built(steering(rank="effect")).provenance["choice"] == plain + ', "rank": "effect"}'
    weighted = built(steering(scale=2.0, weights="logit"))
    assert weighted.provenance["choice"] == plain + ', "scale": 2.0, "weights": "logit"}'
    capped = built(steering(cap=math.inf)).provenance["choice"]
    assert capped == plain + ', "cap": "inf"}'


CHOICES: list[dict[str, Any]] = [
    {"rank": "efficiency", "activate": 2},
    {"rank": "log-odds", "scale": 3.0, "weights": "effect", "activate": 0, "deactivate": 0},
    {"scale": 3.0, "weights": "weight", "reverse": True},
    {"cap": 2.5, "layers": "1-2"},
    {"cap": math.inf, "rank": "logit"},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_saved_and_opened_again(tmp_path: Path, choice: dict[str, Any]) -> None:
    save_scored(tmp_path / "m.json")
    before = Steering.open(map_file=tmp_path / "m.json", **{"activate": 3, "deactivate": 3, **choice})
    data = json.loads(json.dumps(before.to_dict(), allow_nan=False))
    again = Steering.from_dict(data)
    assert again.to_dict() == data
    assert (again.rank, again.rule) == (before.rank, before.rule)
    bias, same = before.bias_file(), again.bias_file()
    assert (bias is None) == (same is None)
    if bias is not None and same is not None:
        assert bias.key == same.key
        write_bias(bias, tmp_path / "b.gguf")
        assert read_bias(tmp_path / "b.gguf").key == bias.key


def test_what_is_written_of_a_usual_choice_stays(tmp_path: Path) -> None:
    """Saved chats and results of the paper's choice are those of earlier versions."""
    assert not {"rank", "weights", "cap"} & set(steering().to_dict())
    assert not {"rank", "weights", "cap"} & set(steering(scale=2.0).to_dict())


BAD: list[dict[str, Any]] = [
    {"rank": "RD"},
    {"rank": None},
    {"rank": ["effect"]},
    {"rank": 1},
    {"weights": "effect"},
    {"weights": "rd", "scale": 1.0},
    {"weights": True, "scale": 1.0},
    {"cap": 0},
    {"cap": -1.0},
    {"cap": True},
    {"cap": "infinity"},
    {"cap": "1"},
    {"cap": 10**400},
    {"scale": 10**400},
    {"scale": -(10**400), "weights": "logit"},
    {"cap": 1e300},
    {"cap": 2.0, "scale": 1.0},
    {"cap": [2.0]},
    {"preset": "safe", "rank": "effect"},
    {"preset": "safe", "cap": "inf"},
]


@pytest.mark.parametrize("fields", BAD)
def test_damaged_choices_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    save_scored(tmp_path / "m.json")
    data = Steering.open(map_file=tmp_path / "m.json", activate=2).to_dict()
    with pytest.raises(FormatError, match=r"^chat\.steering"):
        Steering.from_dict(data | fields, "chat.steering")


@pytest.mark.parametrize("fields", [{"rank": "effect"}, {"cap": 1.0}, {"scale": 1.0, "weights": "logit"}])
def test_a_preset_is_of_rd_and_its_own_rule(fields: dict[str, Any]) -> None:
    olmoe = ModelIdentity("olmoe", 16, 64, 8, HEX)
    rd = np.random.default_rng(1).uniform(-1, 1, olmoe.shape)
    preset, _ = Steering("m", ExpertMap(olmoe, "", rd, positive="document", negative="memory")).with_preset("faithful")
    with pytest.raises(UsageError, match="preset faithful: "):
        preset.changed(**fields)
    with pytest.raises(UsageError, match="preset faithful: "):
        Steering("m", preset.expert_map, **fields).with_preset("faithful")
    assert preset.changed(activate=1, **fields).preset is None


def test_a_bias_file_has_no_rank(tmp_path: Path) -> None:
    write_bias(built(steering(cap=2.0)), tmp_path / "b.gguf")
    found = Steering.open(bias=tmp_path / "b.gguf")
    assert found.mode == "capped"
    assert found.build() is not None
    for fields in ({"rank": "effect"}, {"cap": 2.0}, {"scale": 1.0, "weights": "logit"}):
        with pytest.raises(UsageError, match=rf"{next(iter(fields))}: b is a bias file"):
            found.changed(**fields)


def test_fewer_than_asked_for() -> None:
    assert steering(activate=1000).shortfall == ""  # by RD fewer are chosen, as ever
    n_promote, n_suppress = SCORED.n_worth(rank="effect")
    assert steering(rank="effect", activate=n_promote, deactivate=n_suppress).shortfall == ""
    words = steering(rank="effect", activate=n_promote + 1, deactivate=1000).shortfall
    for part in (f"{n_promote} to promote ({n_promote + 1} ", f"{n_suppress} to suppress (1000 "):
        assert part in words
    assert built(steering(rank="effect", activate=0, deactivate=1000)).n_inactive == n_suppress


def test_a_map_without_the_data() -> None:
    plain = ExpertMap.load(Path(__file__).parents[2] / "expert_maps" / "tiny" / "digits-words.json")
    for fields in ({"rank": "effect"}, {"rank": "logit"}, {"scale": 1.0, "weights": "effect"}):
        with pytest.raises(UsageError, match=r"steermoe (attribute|detect)"):
            Steering("m", plain, activate=2, **fields).build()  # type: ignore[arg-type]
