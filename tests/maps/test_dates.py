"""The dates that prompts said, in counts and maps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap, FormatError, RoutingCounts
from steermoe_local.models.shipped_maps import shipped_maps

ONE, TWO = "2024-02-29", "2025-12-01"


@pytest.fixture(scope="module")
def counts() -> RoutingCounts:
    """Counts of the shipped map."""
    found = ExpertMap.load(shipped_maps()["digits-words"])
    assert found.a1 is not None
    assert found.a2 is not None
    layers = tuple(int(layer) for layer in np.flatnonzero(found.a1.any(axis=1)))
    return RoutingCounts(found.identity, found.a1, found.a2, found.n1, found.n2, layers, dates=(ONE,))


def test_they_are_kept(counts: RoutingCounts, tmp_path: Path) -> None:
    counts.save(tmp_path / "c.npz")
    assert RoutingCounts.load(tmp_path / "c.npz").dates == (ONE,)
    both = counts + replace(counts, dates=(TWO, ONE))
    assert both.dates == (ONE, TWO)
    made = ExpertMap.from_counts(both)
    made.save(tmp_path / "m.json")
    assert ExpertMap.load(tmp_path / "m.json").dates == (ONE, TWO)
    assert ExpertMap.load(tmp_path / "m.json").to_json() == made.to_json()


def test_without_dates_nothing_is_written(counts: RoutingCounts, tmp_path: Path) -> None:
    none = replace(counts, dates=())
    none.save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as archive:
        assert "dates" not in json.loads(str(archive["meta"]))
    assert RoutingCounts.load(tmp_path / "c.npz").dates == ()
    assert '"dates"' not in ExpertMap.from_counts(none).to_json()


@pytest.mark.parametrize("dates", ["2024-02-29", ["2023-02-29"], ["20240229"], [3], {"a": 1}, None, [[]]])
def test_what_are_no_dates(counts: RoutingCounts, tmp_path: Path, dates: Any) -> None:
    counts.save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as archive:
        arrays = dict(archive)
    arrays["meta"] = np.asarray(json.dumps(json.loads(str(arrays["meta"])) | {"dates": dates}))
    np.savez(tmp_path / "c.npz", **arrays)
    with pytest.raises(FormatError, match="dates"):
        RoutingCounts.load(tmp_path / "c.npz")
    data = json.loads(ExpertMap.from_counts(counts).to_json()) | {"dates": dates}
    (tmp_path / "m.json").write_text(json.dumps(data), "utf-8")
    with pytest.raises(FormatError, match="dates"):
        ExpertMap.load(tmp_path / "m.json")
