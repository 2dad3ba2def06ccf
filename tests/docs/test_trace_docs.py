"""The blocks of docs/traces.md run as they stand, and its tables name what is in the files."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np

from steermoe_local import ExpertMap
from tests.support.pages import run
from tests.support.paths import ROOT
from tests.support.traces import arrays_of

PAGE = (ROOT / "docs" / "traces.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return [str(text) for text in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]


def test_the_blocks_run(tmp_path: Path) -> None:
    (script,) = blocks("sh")
    run(["bash", "-euo", "pipefail", "-c", script], tmp_path)
    with_pandas, with_numpy = blocks("python")
    shares = [float(line.split()[-1]) for line in run([sys.executable, "-c", with_pandas], tmp_path).splitlines()[1:-1]]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[0] <= 1
    printed = run([sys.executable, "-c", with_numpy], tmp_path)
    run(["bash", "-c", "steermoe detect -m tiny --pairs pairs.jsonl -o map.json"], tmp_path)
    expected = np.abs(ExpertMap.load(tmp_path / "map.json").rd).max(axis=1).round(2)
    assert [float(number) for number in re.findall(r"[0-9.]+", printed)] == expected.tolist()


def test_the_arrays_are_described(tmp_path: Path) -> None:
    words = ["steermoe", "trace", "-m", "tiny", "-p", "one", "--logits", "-o", "t.npz"]
    run(words, tmp_path)
    arrays = arrays_of(tmp_path / "t.npz")
    for name, array in arrays.items():
        assert f"`{name}`" in PAGE, name
        kind = re.search(rf"^\| `{name}` \| (\w+) \[", PAGE, re.MULTILINE)
        assert kind is None or kind[1] == str(array.dtype), name
    run([*words[:-1], "t.csv"], tmp_path)
    columns = (tmp_path / "t.csv").read_text("utf-8").splitlines()[0].split(",")
    assert {re.sub(r"_\d+$", "_0", column) for column in columns} <= set(re.findall(r"`([a-z_0-9]+)`", PAGE))
