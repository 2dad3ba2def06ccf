"""The evaluation of the small model: its commands, the comparison of rules, and its tables. Nothing is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.evaluation.measuring.measurements import bias_key
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts
from steermoe_local.models.embedded import behaviour, behaviours
from steermoe_local.models.shipped_maps import map_path
from tests.docs.test_benchmarks import interval
from tests.docs.test_evaluation_docs import parse

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")

ABOUT = {"positive": "one", "negative": "other", "neutral": "prose", "n_prompts": 240}


def files(folder: Path, n_items: int | None = None) -> Any:
    """Those of a behaviour, with everything that its commands read."""
    import small

    found = small.Files(folder / "model.gguf", folder, folder, "german", ABOUT, n_items)
    found.map.parent.mkdir(exist_ok=True)
    for path in (found.model, found.pairs, found.task, found.map, found.neutral("choose"), found.neutral("report")):
        path.touch()
    return found


def test_the_commands_are_ones_that_the_program_takes(tmp_path: Path) -> None:
    import small

    found = small.jobs(files(tmp_path), 8)
    assert [job.kind for job in found] == ["eval", "controls", "layers", "transfer"]
    for job in found:
        parse([*job.words, "-t", "1", "-o", str(tmp_path / "out")])
    whole, controls = found[0].words, found[1].words
    assert "--no-controls" in whole
    assert whole[whole.index("-n") + 1] == "240"
    assert "--no-controls" not in controls
    assert "--pairs" in controls


def test_answers_are_counted_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import small

    monkeypatch.setattr(small, "model_info", lambda path: type("Info", (), {"n_layer": 8}))
    whole, few = small.n_answers(files(tmp_path)), small.n_answers(files(tmp_path, 4))
    assert whole == 240 * 3 + 36 * (3 + 130 + 30 + 20) + 66 * 60
    assert few == 4 * (3 + 3 + 130 + 30 + 20 + 60)


class FakeMeasured:
    """Margins and costs that follow from a size that each bias is given: the margin is the size, the KL its square."""

    fitted, held, texts = ("choose",), ("report",) * 5, (("choose",), ("report",))

    def __init__(self, choices: Any) -> None:
        self.sizes: dict[str, float] = {}
        for towards, away, size in choices:
            self.sizes |= {bias_key(towards): size, bias_key(away): -size}

    def margins(self, biases: Any, items: Any) -> Any:
        return np.array([[self.sizes.get(bias_key(bias), 0.0)] * len(items) for bias in biases])

    def costs(self, biases: Any, documents: Any) -> Any:
        return np.array([0.01 * self.sizes[bias_key(bias)] ** 2 for bias in biases])


def test_a_rule_is_taken_at_its_best_within_the_cost() -> None:
    import rules

    expert_map = ExpertMap.load(map_path("digits-words"))

    def choice(label: str, **fields: Any) -> Any:
        return label, *rules.both_ways(expert_map, (2, 2), **fields)

    hard = rules.Method("hard", (choice("all"),))
    soft = rules.Method("soft", tuple(choice(f"{scale}", scale=scale) for scale in (0.5, 2.0, 3.0, 4.0)))
    measured = FakeMeasured(
        [(*both, 3.0 if label == "all" else float(label)) for m in (hard, soft) for label, *both in m.choices]
    )

    def values(biases: Any) -> Any:
        return [np.full(8, 0.5)] * len(biases)

    rows, pairs = rules.compare(measured, [hard, soft], 0.09, [], values)
    assert [row["strength"] for row in rows] == ["all", "3.0"], "4 would be stronger, and above the cost"
    assert pairs == [hard.choices[0][1:], soft.choices[2][1:]]
    assert rows[1]["swing"]["value"] == pytest.approx(6)
    assert rows[1]["cost"] == pytest.approx(0.09)
    assert rows[1]["more_than_rd"]["value"] == pytest.approx(0)
    rows, _ = rules.compare(measured, [hard, soft], 0.0001, rules.randoms(expert_map, (2, 2))[:0], values)
    assert [row["strength"] for row in rows] == ["all (above the cost)", "0.5 (above the cost)"]


def test_results_of_another_model_are_not_mixed(tmp_path: Path) -> None:
    import small

    facts = {"router": "a", "type": "F16", "items": None}
    for _ in range(2):
        small.same_run(tmp_path / "new", facts)
    with pytest.raises(RuntimeError, match="another model or of other --items; give another --folder"):
        small.same_run(tmp_path / "new", facts | {"router": "b"})


def test_shares_of_the_depth() -> None:
    """Half of the differences are in the first third of six layers, the rest in the last."""
    import small

    rng = np.random.default_rng(0)
    a, n = np.zeros((200, 2, 6, 4)), np.full((200, 2), 50)
    a[:, 0, 0, 0], a[:, 1, 5, 3] = rng.integers(20, 40, (2, 200))
    first, middle, last = small.shares(a, n)
    assert first["low"] < 0.5 < first["high"]
    assert first["high"] - first["low"] < 0.05
    assert middle == {"value": 0, "low": 0, "high": 0}
    assert first["value"] + last["value"] == pytest.approx(1)


def test_depth_of_a_map(tmp_path: Path) -> None:
    import small

    one = behaviour("digits-words")
    path, counts = tmp_path / "map.json", tmp_path / "map.pairs.npz"
    small.steermoe("detect", "-m", "tiny", "--pairs", str(one.pairs), "-o", str(path), "--per-pair", str(counts))
    found = small.depth(ExpertMap.load(path), PairCounts.load(counts))
    assert sum(third["value"] for third in found["share"]) == pytest.approx(1)
    assert sum(found["sure_by_layer"]) == found["n_sure"] <= found["n_experts"]
    assert found["n_sure"] >= len(one.planted_positive)


def kinds(value: float) -> dict[str, Any]:
    """Summaries of one behaviour, as `eval`, `experiment layers` and `transfer` write them."""
    fluency = {"perplexity_ratio": 1.5, "kl": 0.25, "ill_formed": 0.04, "looping": 0.125}
    sides = [{"name": name, "rate": interval(0.5), "fluency": fluency} for name in ("unsteered", "towards", "away")]
    control = {"kind": "random", "n": 20, "mean": 0.09, "low": 0.01, "high": 0.41, "percentile": 0.95, "p": 0.095}
    left_out = {"kind": "shuffled", "n": 0, "note": "no pairs"}
    one = {"effects": {"swing": interval(value)}, "sides": sides, "controls": [control, left_out]}
    part = {"name": "early", "n_active": 1, "n_inactive": 0, "away": None, "towards": None, "swing": interval(0.11)}
    column = {
        "name": "Q2_K",
        "file": {"bits_per_weight": 3.6},
        "map": {"pearson": 0.987, "overlap": 0.9},
        "routing": {"same_sets": 0.83},
        "text": {"kl": 0.0123},
        "effect": {"effects": {"swing": interval(0.2)}, "headline": "swing"},
    }
    return {
        "eval": one,
        "controls": one,
        "layers": {"verdict": "open", "finding": "Nothing is.", "figures": {"divided": {"parts": [part]}}},
        "transfer": {"base": column | {"name": "base", "map": None}, "columns": [column]},
    }


def small_report() -> dict[str, Any]:
    span = {"value": 0.5, "low": 0.25, "high": 0.75}
    row = {"name": "RD, hard", "strength": "all", "n": [4, 4], "swing": span, "more_than_rd": None, "cost": 0.0625}
    row |= {"rate": span, "rates": [0.6, 0.1], "answer_rate": {"value": 0.125, "low": 0.0, "high": 0.25}}
    rules = {"n": 4, "budget": 0.08, "fitted": False, "n_items": [16, 16], "n_prompts": 96, "rules": [row]}
    depth = {
        "n_experts": 128,
        "n_pairs": 168,
        "n_sure": 17,
        "max_rd": 0.073,
        "overlap": 0.57,
        "share": [interval(0.5), interval(0.3), interval(0.2)],
    }
    untrained = depth | {"n_sure": 3, "shuffled": {"q95": 0.028, "p": 0.001}, "sure_by_layer": [1, 1, 1]}
    depth |= {"shuffled": {"q95": 0.028, "p": 0.001}, "sure_by_layer": [5, 4, 8]}
    misjudged = {"n": 400, "other_side": {"value": 0.15, "low": 0.118, "high": 0.188}, "neither": 0.02}
    return {
        "about": {"tool": "t 1", "date": "2030-01-01", "machine": {"cpu": "c"}, "items": None, "model": "x.gguf"}
        | {"file_type": "F32", "max_tokens": 24, "n_answers": 1000, "budget": 0.1},
        "scorers": {"behaviours": {"code": {"misjudged": {"code": misjudged}}}},
        "behaviours": {"code": kinds(0.33) | {"about": ABOUT, "rules": rules, "depth": depth, "untrained": untrained}},
    }


def test_tables_of_the_small_model() -> None:
    import small_tables

    text = small_tables.render(small_report())
    for words in (
        "at most 1000 answers",
        "| code | code | 400 | 15.0% (11.8 to 18.8) | 2% |",
        "| code | 168 | 17 of 128 | 0.073 | 0.028 (p = 0.001) | 57% | 50% (40 to 60) / 30%",
        "20% (10 to 30) | 5 4 8 |",
        "| code, untrained | 168 | 3 of 128 | 0.073 |",
        "+33 (+23 to +43)",
        "| code | random | 20 | 9 (1 to 41) | 95% | 0.095 |",
        "| code | shuffled | 0 | no pairs |  |  |",
        "| code | early | 1 / 0 | +11 (+1 to +21) |",
        "| RD, hard | all | 4 / 4 | 0.50 (0.25 to 0.75) |  | 0.0625 | 50 (25 to 75) | 12 (0 to 25) |",
        "no expert had a significant effect, so nothing was fitted",
        "| code | Q2_K | 3.6 | 0.987 | 90% | 83% | 0.0123 | +20 (+10 to +30) |",
    ):
        assert words in text, words


def test_the_second_column_is_empty_only_where_there_is_no_model() -> None:
    import results
    import small_tables

    tiny = {"behaviours": {"b": kinds(0.59)}}
    without, with_it = results.small_section(tiny, None), results.small_section(tiny, small_report())
    assert small_tables.ABSENT in without
    assert "| swing of the hard rule, points | b: +59 (+49 to +69) |  |" in without
    assert small_tables.ABSENT not in with_it
    assert "| swing of the hard rule, points | b: +59 (+49 to +69) | code: +33 (+23 to +43) |" in with_it
    assert "### Small: controls" in with_it


def test_which_small_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import results

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "SMALL", tmp_path / "small.gguf")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert results.small_model(None) is None
    assert results.small(None, None, tmp_path, None, 1) is None
    with pytest.raises(RuntimeError, match=r"--small mine\.gguf: no such model"):
        results.small_model("mine.gguf")
    results.SMALL.touch()
    assert results.small_model(None) == results.SMALL
    assert results.small_model(str(results.SMALL)) == results.SMALL


def test_the_planted_numbers_are_those_of_the_card() -> None:
    import causes

    for one in behaviours():
        assert causes.planted(one) == (len(one.planted_positive), len(one.planted_negative))
