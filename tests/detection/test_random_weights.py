"""A model of random weights: its map differs from maps of shuffled pairs, so that to differ is not enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from tests.support.announced import besides
from tests.support.gguf_copy import copy_model


def run(*args: Any) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.parametrize("seed", [0, 2])
def test_random_weights_differ_from_shuffled_pairs(seed: int, tiny_path: Path, tmp_path: Path) -> None:
    """docs/statistics.md says so; `map show` must not call it a proof."""
    copy_model(tiny_path, tmp_path / "random.gguf", random=seed)
    run("pairs", "numbers", "-n", 60, "--largest", 20, "-o", tmp_path / "n.jsonl")
    made = tmp_path / "m.json"
    flags = ("--per-pair", tmp_path / "m.pairs.npz", "-t", 1)
    detected = run("detect", "-m", tmp_path / "random.gguf", "--pairs", tmp_path / "n.jsonl", "-o", made, *flags)
    assert besides(detected.stderr, "detect: 60 pairs, 120 texts") == ""
    data = json.loads(run("map", "show", made, "--json").stdout)
    assert data["differs_from_shuffled"] is True
    assert data["n_significant"] <= 12  # a tenth: there is no behaviour to find
    shown = run("map", "show", made).stdout
    line = next(line for line in shown.splitlines() if line.startswith("differs "))
    assert "needed, not enough" in line


def test_random_weights_are_those_of_the_seed(tiny_path: Path, tmp_path: Path) -> None:
    files = [copy_model(tiny_path, tmp_path / f"{n}.gguf", random=seed)[0] for n, seed in enumerate((1, 1, 2))]
    one, again, other = (path.read_bytes() for path in files)
    assert one == again != other
