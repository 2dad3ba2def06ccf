"""The blocks of docs/attribution.md run as they stand, and its benchmark measures what it says."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest

from steermoe_local import ExpertMap
from tests.support.pages import run
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "attribution.md").read_text("utf-8")


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_blocks_run(tmp_path: Path) -> None:
    assert run(["bash", "-euo", "pipefail", "-c", block("sh")], tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.jsonl", "causes.json"}
    effects = ExpertMap.load(tmp_path / "causes.json").effects
    assert effects is not None
    assert len(effects.layer) == 2 * 2 * 16
    assert effects.facts.n_draws == {"promote": 128, "suppress": 128}
    out = run([sys.executable, "-c", block("python")], tmp_path)
    assert re.search(r"^[1-8] experts chosen, \{'promote': [-0-9.]+, 'suppress': [-0-9.]+\}$", out, re.MULTILINE)


def test_the_benchmark_compares_the_same_interventions(tmp_path: Path) -> None:
    """On its toy model; times are not looked at."""
    script = str(ROOT / "benchmarks" / "attribution.py")
    folders = ["--json", str(tmp_path / "figures.json"), "--models", str(tmp_path)]
    printed = run([sys.executable, script, "--quick", "--rounds", "1", *folders], tmp_path)
    (one,) = json.loads((tmp_path / "figures.json").read_text("utf-8"))["models"].values()
    for side in ("answer", "all"):
        # margins under one steering are alike however they are computed, and differ between steerings
        assert one["apart"][side] < one["spread"][side]
    times = one["times"]
    ratio = times["alone"][0]["cpu"] / times["answer"][0]["cpu"]
    first = next(iter(one["ratios"].values()))["cpu"]["median"]
    assert first == pytest.approx(ratio)
    assert f"{ratio:.1f} (" in printed
    assert math.isfinite(ratio)
