"""The phase of counts and maps: kept in their files, not mixed, and not written where all tokens were counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap, FormatError, RoutingCounts, UsageError
from steermoe_local.maps.counts import merge_counts
from steermoe_local.maps.map_phases import PhaseSplit, phase_words
from tests.support.builders import random_counts

PHASES = ("first:1", "rest:123456789", "thinking", "answer")


@pytest.mark.parametrize("phase", PHASES)
def test_it_is_kept(tmp_path: Path, phase: str) -> None:
    counts = random_counts(1, phase=phase)
    counts.save(tmp_path / "c.npz")
    assert RoutingCounts.load(tmp_path / "c.npz").phase == phase
    made = ExpertMap.from_counts(counts)
    made.save(tmp_path / "m.json")
    assert json.loads((tmp_path / "m.json").read_text())["phase"] == phase
    assert ExpertMap.load(tmp_path / "m.json").phase == phase
    assert ExpertMap.load(tmp_path / "m.json").to_json() == made.to_json()
    assert made.sha256 != replace(made, phase="").sha256
    both = counts + random_counts(2, phase=phase)
    assert both.phase == phase


def test_of_all_tokens_nothing_is_written(tmp_path: Path) -> None:
    counts = random_counts(1)
    counts.save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as arrays:
        assert "phase" not in json.loads(str(arrays["meta"]))
    assert '"phase"' not in ExpertMap.from_counts(counts).to_json()


def test_phases_are_not_added() -> None:
    for one, two in (("first:2", "rest:2"), ("first:2", "first:3"), ("thinking", "")):
        with pytest.raises(UsageError, match="one phase"):
            _ = random_counts(1, phase=one) + random_counts(2, phase=two)
        with pytest.raises(UsageError, match=r"^b\.npz: .*one phase"):
            merge_counts([("a.npz", random_counts(1, phase=one)), ("b.npz", random_counts(2, phase=two))])


@pytest.mark.parametrize(
    "phase", ["first", "first:0", "rest:\u0663", "prompt", "thinking ", "first:1234567890", None, 5]
)
def test_no_phase(tmp_path: Path, phase: Any) -> None:
    with pytest.raises(FormatError, match="phase"):
        random_counts(1, phase=phase).validate()
    made = ExpertMap.from_counts(random_counts(1))
    with pytest.raises(FormatError, match="phase"):
        replace(made, phase=phase)
    for bad in (phase, ""):
        (tmp_path / "m.json").write_text(json.dumps(json.loads(made.to_json()) | {"phase": bad}))
        with pytest.raises(FormatError, match=r"m\.json: phase"):
            ExpertMap.load(tmp_path / "m.json")


def test_a_damaged_phase_of_counts(tmp_path: Path) -> None:
    random_counts(1, phase="first:2").save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as arrays:
        known = dict(arrays)
    known["meta"] = np.asarray(str(known["meta"]).replace("first:2", "first:x"))
    np.savez(tmp_path / "bad.npz", **known)
    with pytest.raises(FormatError, match=r"bad\.npz: meta\.phase: 'first:x'"):
        RoutingCounts.load(tmp_path / "bad.npz")


def test_names_and_words() -> None:
    assert PhaseSplit.parse("first:16") == PhaseSplit(16)
    assert PhaseSplit.parse("thinking") == PhaseSplit()
    assert [str(PhaseSplit(16)), str(PhaseSplit())] == ["first:16", "thinking"]
    assert PhaseSplit(16).names == ("first:16", "rest:16")
    assert PhaseSplit().names == ("thinking", "answer")
    assert [phase_words(phase) for phase in ("", "first:2", "rest:2", "answer")] == [
        "all tokens of the targets",
        "the first 2 tokens of each target",
        "the tokens behind the first 2",
        "the answer",
    ]
    for first in (0, -1, 10**9):
        with pytest.raises(UsageError, match="tokens from 1"):
            PhaseSplit(first)
