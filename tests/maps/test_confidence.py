"""The part of an expert map that says how sure it is: read back the same, and refused when impossible."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import FormatError
from steermoe_local.maps.confidence import Confidence, Control, SplitHalf
from steermoe_local.maps.expert_map import ExpertMap
from tests.support.builders import table_map
from tests.support.paths import GOLDEN

CONTROL = Control(value=0.5, median=0.1, q95=0.2, p=0.001)


def confidence(**changes: Any) -> Confidence:
    fields: dict[str, Any] = {
        "n_pairs": 5,
        "moe_layers": (0, 1),
        "top_n": 4,
        "seed": 0,
        "split_half": SplitHalf(10, 0.9, 0.75),
        "draws": 999,
        "max_rd": CONTROL,
        "sum_top": CONTROL,
    }
    return Confidence(**(fields | changes))


def sure_map(**changes: Any) -> ExpertMap:
    fields = {"n_pairs": 5, "se": np.full((2, 2), 0.1), "confidence": confidence()}
    return table_map([[0.5, -0.1], [0.2, 0.0]], **(fields | changes))


def test_differs_from_shuffled() -> None:
    """Two chances to pass, so each counts double."""
    for p1, p2, differs in ((0.025, 1.0, True), (1.0, 0.025, True), (0.026, 0.026, False), (0.001, 0.9, True)):
        made = confidence(max_rd=replace(CONTROL, p=p1), sum_top=replace(CONTROL, p=p2))
        assert made.differs_from_shuffled is differs


def test_round_trip(tmp_path: Path) -> None:
    made = sure_map()
    made.save(tmp_path / "m.json")
    loaded = ExpertMap.load(tmp_path / "m.json")
    assert loaded.to_json() == made.to_json()
    assert loaded.confidence == confidence()
    assert loaded.se is not None
    assert np.array_equal(loaded.se, np.full((2, 2), 0.1))
    with pytest.raises(ValueError, match="read-only"):
        loaded.se[0, 0] = 1
    assert Confidence.from_dict(json.loads(json.dumps(confidence().to_dict()))) == confidence()


def test_maps_without_it_are_the_files_they_were() -> None:
    loaded = ExpertMap.load(GOLDEN / "map.json")
    assert loaded.se is None
    assert loaded.confidence is None
    assert loaded.to_json() == (GOLDEN / "map.json").read_text("utf-8")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["se"], ..., "se, confidence: "),
        (["confidence"], ..., "se, confidence: "),
        (["se"], [[0.1, 0.1]], "se: not a table of 2 rows"),
        (["se", 0, 0], -0.1, "se: "),
        (["se", 0, 0], "x", "se: "),
        (["confidence"], 1, "confidence: "),
        (["confidence", "colour"], 1, "confidence: "),
        (["confidence", "seed"], ..., "confidence: "),
        (["confidence", "seed"], -1, "confidence.seed: -1"),
        (["confidence", "seed"], True, "confidence.seed: True"),
        (["confidence", "n_pairs"], 6, "confidence: "),
        (["confidence", "n_pairs"], 0, "is not a count"),
        (["confidence", "top_n"], 1.5, "is not a count"),
        (["confidence", "draws"], "9", "is not a count"),
        (["confidence", "moe_layers"], [0, 2], "confidence: "),
        (["confidence", "moe_layers"], [], "confidence.moe_layers: "),
        (["confidence", "moe_layers"], [1, 0], "confidence.moe_layers: "),
        (["confidence", "moe_layers"], "01", "confidence.moe_layers: "),
        (["confidence", "moe_layers"], [0, [1]], "confidence.moe_layers: "),
        (["confidence", "split_half"], [], "confidence.split_half: "),
        (["confidence", "split_half", "repeats"], 0, "is not a count"),
        (["confidence", "split_half", "spearman"], 1.5, "a share outside"),
        (["confidence", "split_half", "overlap"], -0.5, "a share outside"),
        (["confidence", "split_half", "overlap"], None, "a value that is not a number"),
        (["confidence", "max_rd"], {}, "confidence.max_rd: "),
        (["confidence", "max_rd", "p"], 2, "a share outside"),
        (["confidence", "max_rd", "p"], "0", "a value that is not a number"),
        (["confidence", "sum_top", "value"], True, "a value that is not a number"),
        (["confidence", "sum_top", "value"], 10**400, "is too large"),
    ],
)
def test_load_refuses(tmp_path: Path, path: list[Any], value: Any, words: str) -> None:
    data = json.loads(sure_map().to_json())
    at = data
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    (tmp_path / "m.json").write_text(json.dumps(data))
    with pytest.raises(FormatError) as caught:
        ExpertMap.load(tmp_path / "m.json")
    assert words in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'm.json'}: ")
    assert "\n" not in str(caught.value)


def test_damaged_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    data = sure_map().to_json().encode()
    for at in range(0, len(data) - 1, 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with contextlib.suppress(FormatError):
            ExpertMap.load(path)
