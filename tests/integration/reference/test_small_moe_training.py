"""The trainer of examples/small_moe: an interrupted run that goes on gives the same model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT

pytestmark = pytest.mark.reference

SIZES = {"hidden": 32, "layers": 2, "heads": 2, "experts": 4, "expert-ff": 16, "context": 64, "length": 32}
RUN = {"batch": 4, "micro": 1, "workers": 2, "save-every": 1, "evaluate-every": 2}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    rng = np.random.default_rng(0)
    for part, n in (("train", 4000), ("heldout", 400)):
        np.save(folder / f"{part}.npy", rng.integers(0, 8192, n).astype(np.uint16))
    return folder


def train(tokens: Path, folder: Path, *flags: str, **options: Any) -> dict[str, Any]:
    words = [f"--{name}={value}" for name, value in {**SIZES, **RUN, **options}.items()]
    command = [sys.executable, "-B", "-m", "small_moe.train", tokens, folder, *words, *flags]
    subprocess.run(command, cwd=ROOT / "examples", check=True, capture_output=True, timeout=300)
    state: dict[str, Any] = torch.load(folder / "last.pt", weights_only=True)
    return state


def test_resumed(tokens: Path, tmp_path: Path) -> None:
    flags = ("--bf16", "--top-k=1")
    whole = train(tokens, tmp_path / "whole", *flags, steps=4)
    first = train(tokens, tmp_path / "parts", *flags, steps=2)  # at the start the steps to come change nothing
    resumed = train(tokens, tmp_path / "parts", *flags, "--resume", steps=4)
    assert (first["step"], resumed["step"], whole["step"]) == (2, 4, 4)
    assert torch.equal(resumed["shares"], whole["shares"])
    for name, value in whole["model"].items():
        assert torch.equal(resumed["model"][name], value), name
    assert any(not torch.equal(first["model"][name], value) for name, value in whole["model"].items())
    rows = [json.loads(line) for line in (tmp_path / "parts" / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4]
    assert all("heldout" in row for row in rows)
    assert json.loads((tmp_path / "parts" / "options.json").read_text())["config"] == whole["config"]
    assert whole["config"]["top_k"] == 1
