"""Grids of choices: how they are written, planned, measured and drawn; the Pareto front; the model."""

from __future__ import annotations

import csv
import io
import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import ChoiceError, UsageError
from steermoe_local.evaluation.reports.sweep import draw_sweep, sweep_csv, sweep_document, sweep_tables
from steermoe_local.evaluation.studies.search.grid import MOST, parse_numbers, parse_strengths
from steermoe_local.evaluation.studies.search.sweep import Choice, Grid, Plan, Sweep, front, plan, sweep
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.steering.steering import Steering
from tests.support.builders import table_map
from tests.support.fake_evaluator import FakeEvaluator, wide_map

#
# lists of numbers
#


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("0", (0,)),
        ("0,5,10", (0, 5, 10)),
        ("5, 0", (5, 0)),
        ("0..200:50", (0, 50, 100, 150, 200)),
        ("0..10:4", (0, 4, 8)),
        ("2..5", (2, 3, 4, 5)),
        ("3..3", (3,)),
        ("0..4:2,3,2..6:2", (0, 2, 4, 3, 6)),
        ("007", (7,)),
    ],
)
def test_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_numbers(text) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "--x: '' in '' "),
        ("1,,2", "'' in '1,,2'"),
        ("-1", "'-1' in '-1' "),
        ("1.5", "'1.5'"),
        ("a", "'a'"),
        ("1..", "'1..'"),
        ("1..2..3", "'1..2..3'"),
        ("1...5", "'1...5'"),
        ("0-5", "'0-5'"),
        ("5:2", "'5:2'"),
        ("1..9:-1", "'1..9:-1'"),
        ("٣", "'٣'"),
        ("9..1", "'9..1' is empty"),
        ("0..9:0", "a step of 0"),
        ("0..10000", f"more than {MOST} numbers"),
        ("0..999999999", f"more than {MOST} numbers"),
        ("9999999999", "'9999999999'"),
    ],
)
def test_no_numbers(text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_numbers(text, "--x")
    assert words in str(caught.value)
    assert str(caught.value).startswith("--x: ")


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60), st.integers(1, 40)), min_size=1, max_size=4))
def test_any_ranges(ranges: list[tuple[int, int, int]]) -> None:
    text = ",".join(f"{first}..{first + more}:{step}" for first, more, step in ranges)
    wanted = [n for first, more, step in ranges for n in range(first, first + more + 1, step)]
    assert parse_numbers(text) == tuple(dict.fromkeys(wanted))


@given(st.text(alphabet="0123456789.,:- a", max_size=12))
def test_any_text_is_numbers_or_a_usage_error(text: str) -> None:
    try:
        found = parse_numbers(text)
    except UsageError:
        return
    assert found
    assert len(set(found)) == len(found) <= MOST


def test_strengths() -> None:
    assert parse_strengths("hard,2, 4.5,-1,2,hard") == (None, 2, 4.5, -1)
    for text, words in (
        ("", "--strength: "),
        ("hard,", "''"),
        ("Hard", "'Hard'"),
        ("nan", "'nan'"),
        ("inf", "'inf'"),
        ("1_0", "'1_0'"),
        ("0", "a strength of 0"),
    ):
        with pytest.raises(UsageError) as caught:
            parse_strengths(text, "--strength")
        assert words in str(caught.value)


#
# the front
#

POINTS = st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), max_size=25)


@given(POINTS)
def test_front_by_definition(points: list[tuple[int, int]]) -> None:
    def dominated(gain: int, cost: int) -> bool:
        return any((g >= gain and c < cost) or (g > gain and c <= cost) for g, c in points)

    assert front([(float(g), float(c)) for g, c in points]) == [not dominated(*point) for point in points]


#
# the plan
#


def test_grid() -> None:
    grid = Grid((0, 1, 1), (0, 2), (None, "0-2"), (None, 2.0), both_ways=True)
    assert grid.n == 2 * 2 * 2 * 2 * 2
    assert grid.activate == (0, 1), "each once"
    with pytest.raises(UsageError, match="layers"):
        Grid(layers=())
    with pytest.raises(UsageError, match="100000"):
        Grid(tuple(range(1000)), tuple(range(1000)))
    json.dumps(grid.to_dict())


def planned(grid: Grid, made: Any = None, **choice: Any) -> Plan:
    return plan(
        Steering("x", expert_map=made or table_map([[0.5, -0.4, 0.3, -0.2], [0.1, 0, -0.1, 0]], 2), **choice), grid
    )


def test_plan() -> None:
    """Layer 0 has two experts with RD < 0 of four, top-2: all can be suppressed; with top-3 one."""
    found = planned(Grid((0, 1), (0, 3, 9)))
    assert [str(choice) for choice in found.choices] == ["+0 -0", "+0 -3", "+0 -9", "+1 -0", "+1 -3", "+1 -9"]
    assert found.biases[0] is None
    assert found.keys[1] == found.keys[2], "9 are no more than the 3 that there are"
    assert found.n_measured == 3
    assert str(found) == "6 choices: 3 to measure, 3 equal to another or to no steering"
    tight = table_map([[0.5, -0.4, 0.3, -0.2]], 3)
    found = planned(Grid((0,), (0, 1, 2)), tight)
    assert len(found.choices) == 2
    assert [str(item.choice) for item in found.impossible] == ["+0 -2"]
    assert "deactivate at most 1" in found.impossible[0].why
    assert str(found) == "3 choices: 1 to measure, 1 equal to another or to no steering, 1 impossible"


def test_impossible_layers_are_listed_too() -> None:
    found = planned(Grid((1,), (0,), (None, "7", "0,9")))
    assert [item.choice.layers for item in found.impossible] == ["7", "0,9"]
    with pytest.raises(ChoiceError, match="layer 7"):
        planned(Grid((1,), (0,), ("7",)))


def test_plan_of_directions_strengths_and_layers() -> None:
    grid = Grid((1,), (0,), (None, "0", "0-1"), (None, 2.0), both_ways=True)
    found = planned(grid)
    assert len(found.choices) == 12
    by_choice = dict(zip(found.choices, found.keys, strict=True))
    assert by_choice[Choice(1, 0)] == by_choice[Choice(1, 0, "0")] == by_choice[Choice(1, 0, "0-1")]
    assert by_choice[Choice(1, 0)] != by_choice[Choice(1, 0, scale=2.0)] != by_choice[Choice(1, 0, reverse=True)]
    assert found.n_measured == 4
    assert [choice.reverse for choice in planned(Grid((1,)), reverse=True).choices] == [True]
    bias = Steering("x", expert_map=wide_map(), activate=1).build()
    with pytest.raises(UsageError, match="--map MAP"):
        plan(Steering("x", bias=bias), grid)
    preset = Steering("x", expert_map=wide_map(), activate=1, preset="safe", preset_model="m")
    assert len(plan(preset, Grid((1,), both_ways=True)).choices) == 2, "numbers of one's own are no preset"


#
# measured
#


def made_sweep(grid: Grid, **options: Any) -> tuple[FakeEvaluator, Sweep]:
    made = wide_map()
    settings = {"effect": lambda i, j: 0.02 * (i + j), "nll": lambda i, j: 0.001 * (i + j) ** 2} | options
    evaluator = FakeEvaluator(made, **settings)
    return evaluator, sweep(evaluator, Steering("made-up", expert_map=made), grid)  # type: ignore[arg-type]


def test_a_sweep() -> None:
    evaluator, result = made_sweep(Grid((0, 2, 4), (0, 5), both_ways=True), refusals=lambda i, j: 0.05 * i)
    assert [str(p.choice) for p in result.points][:4] == ["+0 -0", "+0 -0, reverse", "+0 -5", "+0 -5, reverse"]
    assert result.n_measured == 10
    assert len(evaluator.calls) == 1
    assert result.unsteered.value == pytest.approx(0.4)
    point = next(p for p in result.points if p.choice == Choice(4, 5))
    assert (point.n_active, point.n_inactive) == (4, 5)
    assert point.rate.value == pytest.approx(0.4 + 0.18, abs=0.02)
    assert point.effect.value == pytest.approx(point.rate.value - 0.4)
    assert point.gain == pytest.approx(point.effect.value)
    assert point.swing is not None
    assert point.swing.value == pytest.approx(0)
    assert point.fluency.perplexity_ratio == pytest.approx(math.exp(0.081))
    assert point.fluency.refused is not None
    assert point.fluency.refused.value == pytest.approx(0.2)
    back = next(p for p in result.points if p.choice == Choice(4, 5, reverse=True))
    assert back.gain == pytest.approx(-back.effect.value), "towards the negative side, the rate should fall"
    assert back.front is False
    assert [str(p.choice) for p in result.points if p.front] == ["+0 -5", "+2 -0", "+2 -5", "+4 -0", "+4 -5"]


def test_broken_answers_are_no_gain() -> None:
    _, result = made_sweep(Grid((0, 4), both_ways=True), effect=lambda i, j: 0.0, broken=lambda i, j: 1.0 * (i > 0))
    back = next(p for p in result.points if p.choice == Choice(4, 0, reverse=True))
    assert back.effect.value == pytest.approx(-0.4)
    assert back.gain == pytest.approx(-0.6), "the answers on the negative side are gone, too"
    assert back.front is False


def test_equal_choices_share_a_measurement() -> None:
    evaluator, result = made_sweep(Grid((0, 2), (0, 10_000, 20_000)))
    keys = [p.key for p in result.points]
    assert keys[1] == keys[2]
    assert [p.same_as for p in result.points] == [None, None, 1, None, None, 4]
    assert result.points[2].rate == result.points[1].rate
    assert len(evaluator.asked()) == result.n_measured + 1 == 4
    assert "as +0 -10000" in sweep_document(result).markdown()


def test_without_a_text() -> None:
    _, result = made_sweep(Grid((0, 2)), neutral=False)
    assert [p.front for p in result.points] == [None, None]
    assert not draw_sweep(result, [])
    assert [table.title for table in sweep_tables(result)] == ["All choices"]
    json.dumps(result.to_dict(), allow_nan=False)


def test_announced_before_anything_is_measured() -> None:
    made = wide_map()
    evaluator = FakeEvaluator(made, lambda i, j: 0.0)
    seen: list[tuple[int, int]] = []
    sweep(
        evaluator,  # type: ignore[arg-type]
        Steering("made-up", expert_map=made),
        Grid((0, 1, 2)),
        announce=lambda found: seen.append((found.n_measured, len(evaluator.calls))),
    )
    assert seen == [(2, 0)]


def test_what_is_worse_than_nothing_is_on_no_front() -> None:
    _, result = made_sweep(Grid((2, 4)), effect=lambda i, j: -0.1)
    assert [p.front for p in result.points] == [False, False]
    assert [table.title for table in sweep_tables(result)] == ["All choices"]


def test_front_over_kl() -> None:
    made = wide_map()
    evaluator = FakeEvaluator(made, lambda i, j: 0.02 * i, lambda i, j: -0.01 * i)
    steering = Steering("made-up", expert_map=made)
    by_ppl = sweep(evaluator, steering, Grid((0, 2, 4)))  # type: ignore[arg-type]
    by_kl = sweep(evaluator, steering, Grid((0, 2, 4)), cost="kl")  # type: ignore[arg-type]
    assert [p.front for p in by_ppl.points] == [False, False, True]
    assert [p.front for p in by_kl.points] == [False, True, True]


#
# reports and pictures
#


def test_table_as_csv() -> None:
    made = table_map([[0.5, -0.4, 0.3, -0.2]], 3)
    grid = Grid((0, 1), (0, 2), (None, "0"), (None, 1.5))
    result = sweep(FakeEvaluator(made, lambda i, j: 0.1 * i), Steering("x", expert_map=made), grid)  # type: ignore[arg-type]
    rows = list(csv.DictReader(io.StringIO(sweep_csv(result))))
    assert len(rows) == grid.n
    possible = [row for row in rows if not row["impossible"]]
    assert len(possible) == len(result.points) == 8
    for row, point in zip(possible, result.points, strict=True):
        assert float(row["effect"]) == point.effect.value
        assert (row["layers"], row["strength"]) == (point.choice.layers or "all", str(point.choice.scale or "hard"))
        assert row["front"] == str(int(point.front or 0))
    assert all("deactivate at most 1" in row["impossible"] for row in rows[8:])
    assert None not in rows[-1]
    assert None not in rows[-1].values()


def test_report_is_escaped_and_cut() -> None:
    made = wide_map(behaviour="<b>|x|</b>\n# h", positive="*yes*")
    evaluator = FakeEvaluator(made, lambda i, j: 0.001 * i)
    evaluator.metadata = {"model": {"file": "a|b.gguf"}}
    result = sweep(evaluator, Steering("<b>|x|", expert_map=made), Grid(tuple(range(40)), tuple(range(10))))  # type: ignore[arg-type]
    text = sweep_document(result, "steermoe sweep -o OUT", ["pareto.png"]).markdown()
    assert "<b>" not in text
    assert "the first 200 of" in text
    assert "![pareto.png](pareto.png)" in text
    assert "steermoe sweep -o OUT" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("| +")}
    assert len(widths) == 1


@pytest.mark.parametrize("both_ways", [False, True])
def test_pictures(tmp_path: Path, both_ways: bool) -> None:
    pytest.importorskip("matplotlib")
    grid = Grid(tuple(range(0, 20, 4)), tuple(range(0, 60, 10)), both_ways=both_ways)
    _, result = made_sweep(grid)
    paths = [tmp_path / "pareto.png", tmp_path / "pareto.svg"]
    assert draw_sweep(result, paths)
    first = [path.read_bytes() for path in paths]
    assert first[0].startswith(b"\x89PNG")
    ElementTree.fromstring(first[1])
    draw_sweep(result, paths)
    assert [path.read_bytes() for path in paths] == first, "the same bytes every time"


def test_picture_of_one_point(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    _, result = made_sweep(Grid((2,)), effect=lambda i, j: -0.1)
    assert draw_sweep(result, [tmp_path / "a.png"])


#
# on the embedded model
#


def small_evaluator(
    tiny_path: Path, n_items: int, kept: AnswerFile | None = None, resume: bool = False, **more: Any
) -> Any:
    from steermoe_local import SteeredLlama
    from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
    from steermoe_local.evaluation.tasks.builtin import builtin_task, default_guards
    from steermoe_local.evaluation.tasks.scorers import make_scorer

    task = builtin_task("digits-words").first(n_items)
    llama = SteeredLlama(str(tiny_path), n_ctx=64, verbose=False)
    neutral = default_guards(tiny_path)[1]
    settings = EvaluatorSettings(n_parallel=16, n_text=150, context={"n_threads": 1})
    scorer = make_scorer(task.scorer, task.options)
    return Evaluator(llama, task, scorer, neutral=neutral, settings=settings, kept=kept, resume=resume, **more)


def test_on_the_model_and_resumed(tiny_path: Path, tmp_path: Path) -> None:
    """Interrupted in the middle and gone on with: the same result, and nothing is computed twice."""
    from steermoe_local.models.shipped_maps import map_path

    steering = Steering.open(map_file=map_path("digits-words"))
    grid = Grid((0, 2), (0, 2), both_ways=True)
    with small_evaluator(tiny_path, 8) as evaluator:
        whole = sweep(evaluator, steering, grid)
        n_whole = evaluator.n_computed
    towards = next(p for p in whole.points if p.choice == Choice(2, 2))
    assert towards.swing is not None
    assert towards.swing.value > 0.8
    away = next(p for p in whole.points if p.choice == Choice(2, 2, reverse=True))
    assert away.swing == towards.swing
    assert away.rate.value < towards.rate.value

    def stop(what: str, done: int, total: int) -> None:
        if done >= 20:
            raise KeyboardInterrupt

    path = tmp_path / "records.jsonl"
    with AnswerFile(path) as kept, small_evaluator(tiny_path, 8, kept, progress=stop) as evaluator:
        with pytest.raises(KeyboardInterrupt):
            sweep(evaluator, steering, grid)
        n_first = evaluator.n_computed
    with AnswerFile(path) as kept, small_evaluator(tiny_path, 8, kept, resume=True) as evaluator:
        again = sweep(evaluator, steering, grid)
        assert evaluator.n_computed == n_whole - n_first
        evaluator.finish()
    assert 0 < n_first < n_whole
    same = [{**found.to_dict(), "about": None} for found in (whole, again)]
    assert same[0] == same[1]
    assert len(path.read_text("utf-8").splitlines()) == n_whole
    assert np.isfinite([p.gain for p in again.points]).all()
