"""steermoe map on maps with effects of interventions, and what it says of maps without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from steermoe_local.cli import main
from steermoe_local.maps.effects import ATTRIBUTE
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts
from tests.support.builders import identity, table_map
from tests.support.random_effects import RD, effects, effects_map, five_effects, random_effects
from tests.support.random_pairs import random_pairs, write


def run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def with_effects(tmp_path: Path) -> Path:
    effects_map().save(tmp_path / "with.json")
    return tmp_path / "with.json"


def table(result: Result, first: str) -> list[list[str]]:
    """The words of the table whose header begins so."""
    lines = result.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[: len(first.split())] == first.split())
    end = next((i for i in range(start, len(lines)) if not lines[i].strip()), len(lines))
    return [line.split() for line in lines[start:end]]


def test_show_tells_both(with_effects: Path) -> None:
    result = run("map", "show", with_effects, "-n", 4)
    assert result.exit_code == 0, result.output
    assert table(result, "layer expert RD") == [
        ["layer", "expert", "RD", "promote", "suppress"],
        ["1", "0", "-0.9000", "+0.062", "+0.750*"],
        ["0", "0", "+0.5000", "+0.500*", "-0.625*"],
        ["1", "1", "+0.5000"],
        ["0", "1", "-0.4000"],
    ]
    assert table(result, "layer expert action") == [
        ["layer", "expert", "action", "effect", "p", "cost", "confirm", "RD"],
        ["1", "0", "suppress", "+0.750", "±0.125*", "0", "0.500", "0.250", "-0.900"],
        ["0", "0", "suppress", "-0.625", "±0.125*", "0.010", "-0.010", "+0.500"],
        ["0", "0", "promote", "+0.500", "±0.125*", "0.001", "0.250", "+0.500"],
        ["0", "3", "promote", "-0.250", "±0.125", "0.250", "0.000", "+0.000", "random"],
    ]
    said = " ".join(result.stdout.split())
    assert "promote: 1 of 3 experts significant at 5%, 0 of the 1 random ones; R2 0.75, of the cost 0.25" in said
    assert "suppress: 2 of 2 experts significant at 5%; R2 0.50" in said
    assert "NOT stable" in said
    assert "steermoe attribute" not in said


def test_show_json_tells_both(with_effects: Path) -> None:
    data = json.loads(run("map", "show", with_effects, "-n", 4, "--json").stdout)
    made = five_effects()
    for entry in data["top"]:
        found = made.at(entry["layer"], entry["expert"])
        assert {name: entry[name] for name in ("promote", "suppress") if name in entry} == found
    assert data["effects"]["attribution"] == made.facts.to_dict()
    assert data["effects"]["promote"] == made.numbers(1)
    assert data["effects"]["suppress"] == made.numbers(-1)
    first = [(row["layer"], row["expert"], row["action"]) for row in data["effects"]["first"]]
    assert first == [(1, 0, "suppress"), (0, 0, "suppress"), (0, 0, "promote"), (0, 3, "promote")]
    row = data["effects"]["first"][0]
    assert row == made.rows()[3] | {"significant": True, "rd": -0.9}


def test_show_without_effects_names_the_command(tmp_path: Path) -> None:
    table_map(RD).save(tmp_path / "m.json")
    result = run("map", "show", tmp_path / "m.json")
    said = " ".join(result.stdout.split())
    assert said.count(ATTRIBUTE) == said.count("steermoe attribute") == 1
    assert "intervention" in said
    assert "effect" in next(line for line in result.stdout.splitlines() if line.startswith("effects"))
    assert json.loads(run("map", "show", tmp_path / "m.json", "--json").stdout)["effects"] is None


def test_show_of_one_action_without_costs(tmp_path: Path) -> None:
    found = effects({"layer": 0, "expert": 1, "action": "suppress"}, actions=("suppress",), r2_cost={})
    table_map(RD, effects=found).save(tmp_path / "m.json")
    result = run("map", "show", tmp_path / "m.json")
    assert table(result, "layer expert action") == [
        ["layer", "expert", "action", "effect", "p", "RD"],
        ["0", "1", "suppress", "+0.000", "±0.125", "1.000", "-0.400"],
    ]
    assert "promote:" not in result.stdout
    assert "of the cost" not in result.stdout


def test_names_of_a_file_stay_in_their_line(tmp_path: Path) -> None:
    found = effects({"layer": 0, "expert": 1, "action": "promote"}, response="x\nerror: forged\x1b[31m[bold]")
    table_map(RD, effects=found).save(tmp_path / "m.json")
    result = run("map", "show", tmp_path / "m.json")
    assert result.exit_code == 0
    assert not any(line.startswith("error: ") for line in result.stdout.splitlines())
    assert "\x1b" not in result.stdout


def test_stats_keeps_them(tmp_path: Path) -> None:
    pairs = PairCounts.load(write(tmp_path / "run.pairs.npz", random_pairs(1, 30)))
    counted = ExpertMap.from_counts(pairs.total())
    shape = counted.identity.shape
    made = replace(counted, effects=random_effects(shape), logit=counted.rd * 2, weight=counted.rd / 2)
    made.save(tmp_path / "map.json")
    result = run("map", "stats", tmp_path / "map.json", "--per-pair", pairs.path, "-o", tmp_path / "new.json")
    assert result.exit_code == 0, result.output
    before, after = (json.loads((tmp_path / name).read_text("utf-8")) for name in ("map.json", "new.json"))
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"se", "confidence"}
    shown = run("map", "show", tmp_path / "new.json")
    assert max(map(len, (line for line in shown.stdout.splitlines() if line[:9].split()[:1] == ["1"]))) <= 80
    assert table(shown, "layer expert RD")[0][3:] == ["95%", "CI", "p", "(holm)", "promote", "suppress"]


def test_diff_tells_both(with_effects: Path, tmp_path: Path) -> None:
    rows = five_effects().rows()
    rows[0] |= {"effect": -0.5}
    effects_map(effects=effects(*rows)).save(tmp_path / "other.json")
    result = run("map", "diff", with_effects, tmp_path / "other.json")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "Pearson of RD +1.0000" in said
    assert "over 3 experts tried in both; significant in both: 1, of these to the same side: 0" in said
    assert "over 2 experts tried in both; significant in both: 2, of these to the same side: 2" in said
    data = json.loads(run("map", "diff", with_effects, tmp_path / "other.json", "--json").stdout)
    assert data["effects"]["suppress"] == pytest.approx(
        {"n": 2, "pearson": 1, "spearman": 1, "n_significant": 2, "n_same_sign": 2}
    )


def test_diff_where_one_has_none(with_effects: Path, tmp_path: Path) -> None:
    table_map(RD).save(tmp_path / "bare.json")
    assert "only the first map" in run("map", "diff", with_effects, tmp_path / "bare.json").stdout
    assert "only the second map" in run("map", "diff", tmp_path / "bare.json", with_effects).stdout
    assert "effects" not in run("map", "diff", tmp_path / "bare.json", tmp_path / "bare.json").stdout
    data = json.loads(run("map", "diff", with_effects, tmp_path / "bare.json", "--json").stdout)
    assert data["effects"] is None


def test_export_of_another_models_effects_is_refused(tmp_path: Path) -> None:
    data = json.loads(effects_map().to_json()) | {"model": identity(2, 4, 1).to_dict()}
    data["effects"][0]["layer"] = 2
    (tmp_path / "m.json").write_text(json.dumps(data), "utf-8")
    result = run("map", "export", tmp_path / "m.json", "--format", "json", "-o", tmp_path / "out.json")
    assert result.exit_code == 1
    assert f"{tmp_path / 'm.json'}: effects: " in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out.json").exists()
