"""The choice of experts that a map recommends."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.errors import FormatError
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.recommended import Recommended, with_recommended
from steermoe_local.models.shipped_maps import shipped_maps

MEASURED = Recommended(
    {"activate": 3, "deactivate": 2, "layers": "0-2", "cap": 4.0},
    unsteered=0.31,
    steered=0.84,
    random=0.06,
    n_items=100,
    task="100 held-out prompts",
    perplexity=0.02,
    kl=0.01,
    command="steermoe eval",
    created="2026-11-29T00:00:00Z",
)


@pytest.fixture
def bare() -> ExpertMap:
    return with_recommended(ExpertMap.load(shipped_maps()["digits-words"]), None)


def test_it_is_kept_in_the_file_and_leaves_the_digest(bare: ExpertMap, tmp_path: Path) -> None:
    told = with_recommended(bare, MEASURED)
    told.save(tmp_path / "m.json")
    read = ExpertMap.load(tmp_path / "m.json")
    assert read.recommended == MEASURED
    assert read.to_json() == told.to_json() != bare.to_json()
    assert read.sha256 == bare.sha256
    assert json.loads(told.to_json())["version"] == json.loads(bare.to_json())["version"]
    assert "recommended" not in json.loads(bare.to_json())


def test_an_infinite_cap_is_json(bare: ExpertMap) -> None:
    told = with_recommended(bare, Recommended({"activate": 1, "cap": float("inf")}))
    assert json.loads(told.to_json())["recommended"] == {"choice": {"activate": 1, "cap": "inf"}}
    assert ExpertMap.from_dict(json.loads(told.to_json())).recommended == told.recommended


def test_words_say_what_was_measured() -> None:
    assert MEASURED.words == "31% -> 84% of 100 items; random experts +6 points; perplexity +2.0%; KL 0.01"
    assert Recommended({"activate": 1}).words == ""


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"choice": []},
        {"choice": {}},
        {"choice": {"activate": 0, "deactivate": 0}},
        {"choice": {"activate": -1}},
        {"choice": {"activate": True}},
        {"choice": {"activate": 1, "preset": "faithful"}},
        {"choice": {"activate": 1, "reverse": 1}},
        {"choice": {"activate": 1, "layers": "3-"}},
        {"choice": {"activate": 1, "layers": "99"}},
        {"choice": {"activate": 1, "layers": "3-1"}},
        {"choice": {"activate": 1, "rank": "effect"}},
        {"choice": {"activate": 1, "rank": []}},
        {"choice": {"activate": 1, "mode": "soft"}},
        {"choice": {"activate": 1, "mode": "capped"}},
        {"choice": {"activate": 1, "scale": 1, "cap": 1}},
        {"choice": {"activate": 1, "scale": -1}},
        {"choice": {"activate": 1, "scale": 10**400}},
        {"choice": {"activate": 1, "weights": "logit"}},
        {"choice": {"activate": 1, "mode": "hard", "cap": 4}},
        {"choice": {"activate": 1}, "steered": 1.5},
        {"choice": {"activate": 1}, "steered": None},
        {"choice": {"activate": 1}, "kl": float("nan")},
        {"choice": {"activate": 1}, "n_items": 1.0},
        {"choice": {"activate": 1}, "one_way": "yes"},
        {"choice": {"activate": 1}, "task": 3},
        {"choice": {"activate": 1}, "by": "me"},
    ],
)
def test_what_is_no_recommendation_is_refused(bare: ExpertMap, data: Any) -> None:
    with pytest.raises(FormatError, match="recommended"):
        ExpertMap.from_dict(json.loads(bare.to_json()) | {"recommended": data})


def test_every_field_is_written() -> None:
    fields = set(Recommended.__dataclass_fields__)
    assert set(dataclasses.replace(MEASURED, one_way=True).to_dict()) == fields - {"values"}
    fitted = dataclasses.replace(MEASURED, choice={}, values=((0, 1, 2.0),), one_way=True)
    assert set(fitted.to_dict()) == fields


FITTED = Recommended({}, values=((3, 1, -1.5), (0, 2, 4.0), (0, 1, 0.25)))


def test_fitted_values_stand_in_the_file_in_order(bare: ExpertMap, tmp_path: Path) -> None:
    told = with_recommended(bare, FITTED)
    told.save(tmp_path / "m.json")
    read = ExpertMap.load(tmp_path / "m.json")
    assert read.recommended == FITTED
    assert FITTED.values == ((0, 1, 0.25), (0, 2, 4.0), (3, 1, -1.5))
    assert FITTED.to_dict() == {"choice": {}, "values": [[0, 1, 0.25], [0, 2, 4.0], [3, 1, -1.5]]}
    assert read.sha256 == bare.sha256
    assert FITTED.choice_words == "fitted values of 3 experts"
    assert dataclasses.replace(FITTED, choice={"reverse": True}).choice_words == "fitted values of 3 experts reverse"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (7, "values: not a list"),
        ("abc", "values: not a list"),
        ([[0, 1]], r"values\[0\]"),
        ([7], r"values\[0\]"),
        (["0a1"], r"values\[0\]"),
        ([[0, 1, 2.0], [0, 1, 3.0]], r"values\[1\]: layer 0, expert 1 has a value already"),
        ([[0.0, 1, 2.0]], r"values\[0\]"),
        ([[True, 1, 2.0]], r"values\[0\]"),
        ([[-1, 1, 2.0]], r"values\[0\]"),
        ([[0, 1, float("nan")]], r"values\[0\]"),
        ([[0, 1, float("inf")]], r"values\[0\]"),
        ([[0, 1, 10**400]], r"values\[0\]"),
        ([[0, 1, True]], r"values\[0\]"),
        ([[0, 1, "2"]], r"values\[0\]"),
        ([[0, 1, 0.0]], "no value but 0"),
        ([[5, 0, 1.0]], "layer 5, expert 0, but the map has 5 layers of 24 experts"),
        ([[0, 24, 1.0]], "layer 0, expert 24, but"),
    ],
)
def test_impossible_values_are_refused(values: Any, words: str, bare: ExpertMap) -> None:
    data = json.loads(bare.to_json()) | {"recommended": {"choice": {}, "values": values}}
    with pytest.raises(FormatError, match=words):
        ExpertMap.from_dict(data)


@pytest.mark.parametrize("choice", [{"activate": 1}, {"scale": 2.0}, {"rank": "rd"}, {"layers": "0-1"}])
def test_fitted_values_are_not_chosen(choice: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="fitted values are not chosen by it"):
        Recommended(choice, values=((0, 1, 2.0),))
