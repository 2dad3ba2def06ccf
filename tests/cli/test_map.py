"""steermoe map: show, stats, plot and diff, on small maps of random counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.maps import significance
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts
from tests.support.builders import identity, table_map
from tests.support.random_pairs import random_pairs, write


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A map of pairs without a difference, and its per-pair counts."""
    pairs = PairCounts.load(write(tmp_path / "run.pairs.npz", random_pairs(1, 30)))
    ExpertMap.from_counts(pairs.total(), positive="digits", negative="words").save(tmp_path / "map.json")
    return tmp_path / "map.json", pairs.path


@pytest.fixture
def clear(tmp_path: Path) -> tuple[Path, Path]:
    """A map whose sides differ: expert 0 of layer 1 selects on the positive side alone."""
    ids, a, n = random_pairs(2, 30)
    a[:, 0, 1], a[:, 1, 1] = 0, 0
    a[:, 0, 1, 0] = a[:, 0, 1, 1] = n[:, 0]
    a[:, 1, 1, 2] = a[:, 1, 1, 1] = n[:, 1]
    pairs = PairCounts.load(write(tmp_path / "clear.pairs.npz", (ids, a, n)))
    ExpertMap.from_counts(pairs.total()).save(tmp_path / "clear.json")
    return tmp_path / "clear.json", pairs.path


def test_show_without_per_pair_counts(files: tuple[Path, Path]) -> None:
    result = run("map", "show", files[0])
    assert result.exit_code == 0
    assert "unknown (needs per-pair counts: steermoe map stats)" in result.stdout
    header = next(line for line in result.stdout.splitlines() if line.startswith("layer"))
    assert header.split() == ["layer", "expert", "RD", "a1/N1", "a2/N2"]
    assert result.stderr == ""
    data = json.loads(run("map", "show", files[0], "--json").stdout)
    assert data["confidence"] is data["differs_from_shuffled"] is None
    assert set(data["top"][0]) == {"layer", "expert", "rd", "a1", "a2", "p1", "p2"}


def test_show_with_per_pair_counts(files: tuple[Path, Path]) -> None:
    result = run("map", "show", files[0], "--per-pair", files[1], "-n", 3)
    assert result.exit_code == 0
    header = next(line for line in result.stdout.splitlines() if line.startswith("layer"))
    assert header.split() == ["layer", "expert", "RD", "95%", "CI", "p", "(holm)", "a1/N1", "a2/N2"]
    assert "differs      NO: looks like shuffled pairs" in result.stdout
    assert result.stderr.startswith(f"warning: {files[0]}: does not differ from maps of shuffled pairs")
    assert result.stderr.count("\n") == 1
    assert ExpertMap.load(files[0]).confidence is None, "show writes nothing"

    result = run("map", "show", files[0], "--per-pair", files[1], "--json", "--level", 0.9, "--correction", "bh")
    data = json.loads(result.stdout)
    annotated = significance.annotate(ExpertMap.load(files[0]), PairCounts.load(files[1]))
    assert annotated.se is not None
    assert annotated.confidence is not None
    assert data["differs_from_shuffled"] is False
    assert (data["level"], data["correction"]) == (0.9, "bh")
    assert data["confidence"] == annotated.confidence.to_dict()
    p = significance.corrected_p(annotated, "bh")
    assert data["n_significant"] == int((p <= 0.05).sum())
    half = significance.half_widths(annotated.se, 30, 0.9)
    for entry, (layer, expert, rd) in zip(data["top"], annotated.top(20), strict=True):
        assert (entry["layer"], entry["expert"], entry["rd"]) == (layer, expert, rd)
        assert entry["p"] == p[layer, expert]
        assert entry["se"] == annotated.se[layer, expert]
        if layer == 0:  # dense
            assert (entry["p"], entry["se"], entry["ci_low"]) == (1, 0, None)
            continue
        assert entry["ci_low"] == pytest.approx(rd - half[layer, expert])
        assert entry["ci_high"] == pytest.approx(rd + half[layer, expert])


def test_a_clear_map_gets_no_warning(clear: tuple[Path, Path]) -> None:
    result = run("map", "show", clear[0], "--per-pair", clear[1], "-n", 2)
    assert "differs      yes, from shuffled pairs: needed, not enough" in result.stdout
    assert result.stderr == ""
    lines = result.stdout.splitlines()[-2:]
    assert lines[0].split() == ["1", "0", "+1.0000", "no", "spread", "1e-08", "1.0000", "0.0000"]
    assert lines[1].split()[:3] == ["1", "2", "-1.0000"]
    entry = json.loads(run("map", "show", clear[0], "--per-pair", clear[1], "--json").stdout)["top"][0]
    assert (entry["se"], entry["ci_low"], entry["ci_high"]) == (0, None, None)


def test_stats_writes_what_show_shows(clear: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "with.json"
    result = run("map", "stats", clear[0], "--per-pair", clear[1], "-o", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.endswith(f"written: {out}\n")
    shown = json.loads(run("map", "show", out, "--json").stdout)
    on_the_fly = json.loads(run("map", "show", clear[0], "--per-pair", clear[1], "--json").stdout)
    assert shown == on_the_fly
    again = run("map", "stats", out, "--per-pair", clear[1], "-o", out, "--draws", 99, "--halves", 5, "--json")
    data = json.loads(again.stdout)
    assert data["confidence"]["draws"] == 99
    assert data["confidence"]["split_half"]["repeats"] == 5
    assert data["differs_from_shuffled"] is True


def test_stats_refuses_other_pairs(files: tuple[Path, Path], clear: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("map", "stats", files[0], "--per-pair", clear[1], "-o", tmp_path / "x.json")
    assert result.exit_code == 1
    assert "one run" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "x.json").exists()
    result = run("map", "show", files[0], "--per-pair", files[0])
    assert result.exit_code == 1
    assert "not pair counts" in result.stderr


def test_one_pair_has_no_statistics(tmp_path: Path) -> None:
    pairs = PairCounts.load(write(tmp_path / "one.pairs.npz", random_pairs(1, 1)))
    ExpertMap.from_counts(pairs.total()).save(tmp_path / "one.json")
    result = run("map", "show", tmp_path / "one.json", "--per-pair", pairs.path)
    assert result.exit_code == 0
    assert "unknown (one pair has none)" in result.stdout


def test_imported_map_without_counts(tmp_path: Path) -> None:
    table_map([[0.5, -0.25, 0.0]]).save(tmp_path / "m.json")
    result = run("map", "show", tmp_path / "m.json")
    assert result.stdout.splitlines()[-3].split() == ["0", "0", "+0.5000"]


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_plot(files: tuple[Path, Path], tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"heat.{suffix}"
    result = run("map", "plot", files[0], "-o", out, "--activate", 2, "--deactivate", 1, "--layers", "1-2")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"written: {out}\n"
    if suffix == "html":
        page = out.read_text("utf-8")
        chosen = ExpertMap.load(files[0]).choose(2, 1, layers=(1, 2))
        assert page.count(", promoted") == (chosen > 0).sum()
        assert page.count(", suppressed") == (chosen < 0).sum()
    else:
        assert out.stat().st_size > 10_000


def test_plot_refuses(files: tuple[Path, Path], tmp_path: Path) -> None:
    for arguments, words in (
        (["-o", tmp_path / "a.gif"], "a.gif: "),
        (["-o", tmp_path / "no" / "a.png"], f"{tmp_path / 'no'}"),
        (["-o", tmp_path / "a.png", "--reverse"], "--reverse and --layers"),
        (["-o", tmp_path / "a.png", "--deactivate", 2, "--layers", "9"], "layer 9"),
    ):
        result = run("map", "plot", files[0], *arguments)
        assert result.exit_code != 0
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        assert not (tmp_path / "a.png").exists()


def test_diff(files: tuple[Path, Path], clear: tuple[Path, Path], tmp_path: Path) -> None:
    result = run("map", "diff", files[0], clear[0], "-n", 4, "-o", tmp_path / "d.svg")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "Pearson of RD" in result.stdout
    assert (tmp_path / "d.svg").exists()
    data = json.loads(run("map", "diff", files[0], clear[0], "-n", 4, "--json").stdout)
    compared = significance.compare(ExpertMap.load(files[0]), ExpertMap.load(clear[0]), 4)
    assert data["pearson"] == compared.pearson
    assert data["by_layer"] == list(compared.by_layer)
    assert data["same_model"] is True
    assert data["plot"] is None
    same = json.loads(run("map", "diff", files[0], files[0], "--json").stdout)
    assert (same["pearson"], same["overlap"]) == pytest.approx((1, 1))


def test_diff_of_other_models(files: tuple[Path, Path], tmp_path: Path) -> None:
    made = ExpertMap.load(files[0])
    replace(made, identity=identity(router_sha256="9" * 64)).save(tmp_path / "other.json")
    result = run("map", "diff", files[0], tmp_path / "other.json", "--json")
    assert result.exit_code == 0
    assert result.stderr.startswith("note: ")
    assert json.loads(result.stdout)["same_model"] is False
    table_map(np.eye(2)).save(tmp_path / "small.json")
    result = run("map", "diff", files[0], tmp_path / "small.json")
    assert result.exit_code == 1
    assert "do not correspond" in result.stderr
