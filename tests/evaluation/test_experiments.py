"""Named experiments on the embedded model: few items and draws; what they say follows from their figures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import UsageError
from steermoe_local.evaluation.experiments import findings as words
from steermoe_local.evaluation.experiments.experiment import Sides
from steermoe_local.evaluation.experiments.experiments import (
    EXPERIMENTS,
    ExperimentResult,
    ExperimentSetup,
    run_experiment,
)
from steermoe_local.evaluation.experiments.picture import draw_experiment
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.measuring.measurements import Answer, Measurement
from steermoe_local.evaluation.metrics.intervals import Interval
from steermoe_local.evaluation.reports.html_report import html_report
from steermoe_local.evaluation.studies.controls.controls import ControlResult
from steermoe_local.evaluation.tasks.builtin import builtin_task, default_guards
from steermoe_local.evaluation.tasks.neutral_text import TextScore
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.models.embedded import behaviour, embedded_model
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.pairs import load_pairs
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.steering import Steering

MAP_FACT = {"label": "length", "n_pairs": 3, "shared": 0.0, "shared_reversed": 0.0, "pearson": 0.1}
SETTINGS = EvaluatorSettings(context={"n_threads": 1}, n_text=100)


@pytest.fixture(scope="module")
def setup() -> Iterator[ExperimentSetup]:
    """Six items; the benign prompts are few, too."""
    llama = SteeredLlama(embedded_model(), n_ctx=64, n_batch=64, n_threads=1, verbose=False)
    task = builtin_task("digits-words").first(6)
    (benign, scorer), neutral = default_guards("tiny")
    neutral_task = builtin_task("neutral").first(6)
    with Evaluator(
        llama,
        task,
        make_scorer(task.scorer, task.options),
        benign=(benign.first(4), scorer),
        neutral=neutral,
        settings=SETTINGS,
        metadata={"model": {"file": "tiny-moe.gguf"}},
    ) as evaluator:
        yield ExperimentSetup(
            evaluator,
            Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2),
            pairs=list(load_pairs(behaviour("digits-words").pairs))[:24],
            ability=(neutral_task, make_scorer(neutral_task.scorer, neutral_task.options)),
            settings=SETTINGS,
            n_draws=3,
            recording={"n_threads": 1},
        )
    llama.close()


@pytest.fixture(scope="module")
def found(setup: ExperimentSetup) -> dict[str, ExperimentResult]:
    return {name: run_experiment(name, setup) for name in EXPERIMENTS}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_answers(found: dict[str, ExperimentResult], setup: ExperimentSetup, name: str) -> None:
    experiment = found[name]
    assert (experiment.name, experiment.question) == (name, EXPERIMENTS[name].question)
    assert experiment.question.endswith("?")
    assert experiment.finding.endswith(".")
    assert "None" not in experiment.finding
    assert "nan" not in experiment.finding
    data = json.loads(json.dumps(experiment.to_dict(), allow_nan=False))
    assert data["verdict"] in ("for", "against", "open")
    about = data["about"]
    assert about["model"] == {"file": "tiny-moe.gguf"}
    assert about["map_sha256"] == setup.steering.to_dict()["map_sha256"]
    assert about["task_sha256"] == setup.evaluator.task.sha256
    assert about["seed"] == 0
    assert {"tool", "created", "settings", "n_items"} <= set(about)
    assert "/" not in str(about["steering"]["map"]), "no folders of the person who ran it"
    for table in experiment.tables:
        assert table.rows
        assert all(len(row) == len(table.header) for row in table.rows), table.title
    text = experiment.document(f"steermoe experiment {name}").markdown()
    assert text.startswith(f"# {name}\n")
    assert f"steermoe experiment {name}\n" in text
    assert all(f"## {table.title.split('(')[0].strip()}"[:12] in text for table in experiment.tables)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_picture(found: dict[str, ExperimentResult], name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw_experiment(found[name], [tmp_path / "a.png", tmp_path / "a.svg"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    page = html_report(found[name].document("steermoe experiment", ["a.png"]), tmp_path)
    assert page.count("data:image/png;base64,") == 1
    assert page.index("This s") < page.index("data:image/png")


def test_experiments_are_repeated_without_computing(setup: ExperimentSetup, found: dict[str, ExperimentResult]) -> None:
    n_computed = setup.evaluator.n_computed
    assert run_experiment("top20", setup).figures == found["top20"].figures
    assert setup.evaluator.n_computed == n_computed


def test_random10(found: dict[str, ExperimentResult]) -> None:
    figures = found["random10"].figures
    assert figures["random"]["n"] == 3
    for draw in found["random10"].tables[-1].rows:
        assert draw[1].startswith(("+", "-"))
    steered = found["random10"].tables[0].rows[1]
    assert steered[1] == "5 / 5", "ten experts"
    assert figures["swing"]["value"] == 1
    assert found["random10"].verdict == "open", "three draws are too few"
    assert "too few draws" in found["random10"].finding


def test_top20_takes_the_first_twenty_both_ways(found: dict[str, ExperimentResult], setup: ExperimentSetup) -> None:
    expert_map = setup.steering.expert_map
    assert expert_map is not None
    top = expert_map.top(20)
    figures = found["top20"].figures
    assert figures["n_plus"] == sum(rd > 0 for *_, rd in top)
    assert figures["n_minus"] == sum(rd < 0 for *_, rd in top)
    assert figures["rates"]["away"] == 0
    assert figures["rates"]["towards"] == 1
    assert "to 100% towards and 0% away" in found["top20"].finding
    assert set(figures["controls"]) == {"random", "bottom"}


def test_activate_benign_suppresses_nothing(found: dict[str, ExperimentResult]) -> None:
    rows = found["activate-benign"].tables[0].rows
    assert [row[0] for row in rows] == ["unsteered", "towards", "other side", "random 1", "random 2", "random 3"]
    assert [row[1] for row in rows] == ["0 / 0", *["2 / 0"] * 5]
    assert found["activate-benign"].verdict == "for"
    assert found["activate-benign"].figures["ability"]["towards"] == 1
    assert found["activate-benign"].figures["perplexity_ratio"] < 1.05


def test_superficial_tells_each_map(found: dict[str, ExperimentResult]) -> None:
    experiment = found["superficial"]
    rows = experiment.tables[-1].rows
    assert [row[0] for row in rows[:4]] == ["length", "casing", "format", "all kinds"]
    effects = experiment.figures["controls"]["superficial"]["effects"]
    strong = [effect for effect in effects if abs(effect) >= experiment.figures["swing"]["value"] / 2]
    assert (experiment.verdict == "against") == bool(strong)
    assert (f"{len(strong)} steer the behaviour" in experiment.finding) == bool(strong)


def test_layers_choose_in_each_part(found: dict[str, ExperimentResult]) -> None:
    figures = found["layers"].figures
    assert set(figures["chosen_in"]) == {"early", "middle", "late", *(f"layer {i}" for i in range(5))}
    rows = found["layers"].tables[0].rows
    assert [row[2] for row in rows] == ["2 / 2"] * 8
    # the behaviour was planted in layers 1 to 4, not in layer 0
    swings = [figures["chosen_in"][f"layer {layer}"]["swing"]["value"] for layer in range(5)]
    assert swings[0] < 0.3 < min(swings[1:])


def test_routing_kinds(found: dict[str, ExperimentResult]) -> None:
    experiment = found["routing-kinds"]
    assert [row[0] for row in experiment.tables[0].rows] == [
        "hard",
        "hard, promote only",
        "hard, suppress only",
        *(f"soft {scale:g}" for scale in words.SCALES),
    ]
    assert experiment.tables[1].rows == (("0-4", "softmax", "4", "no", "no", "yes"),)
    assert experiment.finding.startswith("On softmax routers the hard rule swings the rate by +100")


#
# what cannot be run
#


def test_a_setup_needs_a_map_and_both_ways(setup: ExperimentSetup) -> None:
    bias = setup.steering.build()
    assert isinstance(bias, BiasFile)
    with pytest.raises(UsageError, match=r"file: .*--map"):
        replace(setup, steering=Steering("file", bias=bias))
    with pytest.raises(UsageError, match="reverse and preset"):
        replace(setup, steering=setup.steering.changed(reverse=True))


def test_what_an_experiment_lacks(setup: ExperimentSetup) -> None:
    with pytest.raises(UsageError, match=r"'top21'.*random10, top20"):
        run_experiment("top21", setup)
    with pytest.raises(UsageError, match=r"superficial: .*--pairs"):
        run_experiment("superficial", replace(setup, pairs=None))
    with pytest.raises(UsageError, match=r"activate-benign .*--activate"):
        run_experiment("activate-benign", replace(setup, steering=setup.steering.changed(activate=0)))
    with pytest.raises(UsageError, match=r"digits-words: .*--activate N, --deactivate N"):
        run_experiment("random-matched", replace(setup, steering=setup.steering.changed(activate=0, deactivate=0)))


#
# sentences that must be honest
#


def interval(value: float, low: float, high: float) -> Interval:
    return Interval(value, low, high, 50, "newcombe")


def control(*effects: float, real: float = 0.4) -> ControlResult:
    return ControlResult.of("random", effects, [str(i) for i in range(len(effects))], real)


def test_a_map_that_is_ahead() -> None:
    swing, draws = interval(0.4, 0.2, 0.6), control(*[0.1] * 20)
    assert words.ahead(swing, draws) == "for"
    assert words.compared("the map", swing, draws) == (
        "the map by +40 (+20 to +60) points, more than 100% of 20 draws (p = 0.048)"
    )


def test_a_map_that_is_no_different_from_random() -> None:
    swing, draws = interval(0.4, 0.2, 0.6), control(*[0.1] * 18, 0.5, -0.6)
    assert words.ahead(swing, draws) == "against"
    assert "no different from random: only 90% of 20 draws are smaller" in words.compared("the map", swing, draws)


@pytest.mark.parametrize("swing", [interval(0.4, -0.1, 0.6), interval(0.03, 0.01, 0.05), interval(-0.4, -0.6, -0.2)])
def test_no_effect_is_said_whatever_the_draws_do(swing: Interval) -> None:
    draws = control(*[0.0] * 20, real=swing.value)
    assert words.ahead(swing, draws) == "against"
    assert words.compared("the map", swing, draws).endswith("which is no effect")


def measured(values: list[float], *, nll: float = 1.0, benign: list[float] | None = None) -> Measurement:
    def answers(scores: list[float]) -> tuple[Answer, ...]:
        return tuple(
            Answer(str(i), 0, "x", value, "positive" if value else "negative", "stop", 1, 1.0, 0.0)
            for i, value in enumerate(scores)
        )

    return Measurement(None, "k", answers(values), answers(benign or []), TextScore(nll, 0.01, 1.0, 10))


def test_harm_is_reported() -> None:
    base = measured([0.0] * 20, benign=[0.0] * 40)
    kept = words.guard_harms(measured([1.0] * 20, nll=1.04, benign=[0.0] * 40), base)
    assert kept[0] == []
    assert len(kept[1]) == 2
    harms, fine, figures = words.guard_harms(measured([1.0] * 20, nll=1.06, benign=[1.0] * 8 + [0.0] * 32), base)
    assert [harm.partition(" (")[0] for harm in harms] == ["perplexity +6.2%", "refusals of benign prompts +20"]
    assert fine == []
    assert figures["refused_change"]["value"] == pytest.approx(0.2)
    # a perplexity that is no number is harm
    assert words.guard_harms(measured([1.0], nll=float("inf")), measured([1.0]))[0]


def test_a_map_without_effect_is_no_measure_for_superficial_ones(
    setup: ExperimentSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = sides([0.0] * 20, [0.0] * 20)
    control = ControlResult.of("superficial", [-0.2], ["length"], 0.0, details={"maps": [MAP_FACT]})
    monkeypatch.setattr(ExperimentSetup, "compare", lambda *_: (nothing, {"superficial": control}))
    found = run_experiment("superficial", setup)
    assert found.verdict == "against"
    assert "which is no effect" in found.finding
    assert "half" not in found.finding, "half of nothing is no measure"


@pytest.mark.parametrize(
    ("n", "n_below", "verdict"),
    [(3, 3, "open"), (18, 18, "open"), (19, 19, "for"), (19, 18, "against"), (3, 2, "against")],
)
def test_how_many_draws_tell(n: int, n_below: int, verdict: str) -> None:
    swing = sides([1.0] * 20, [0.0] * 20).effect
    control = ControlResult.of("random", [0.1] * n_below + [1.0] * (n - n_below), [str(i) for i in range(n)], 1.0)
    assert words.ahead(swing, control) == verdict
    assert ("too few draws" in words.compared("the map", swing, control)) == (verdict == "open")


def test_thirds_of_few_equal_items_are_not_distinguished() -> None:
    """Two items that say the same are no proof, though a bootstrap of them has no spread."""
    found = {"early": sides([0.9] * 2, [0.0] * 2), "middle": sides([1.0] * 2, [0.0] * 2)}
    assert words.works(found["middle"].effect)
    assert words.depth_finding(found, 0)[1] == "open"


def sides(towards: list[float], away: list[float]) -> Sides:
    return Sides(measured([0.0] * len(towards)), measured(towards), measured(away), 0)


@pytest.mark.parametrize(
    ("effects", "verdict", "says"),
    [
        ({"early": 0, "middle": 20, "late": 0}, "for", "the middle third is ahead, which agrees with"),
        ({"early": 20, "middle": 0, "late": 0}, "against", "the early third is ahead, which differs from"),
        ({"early": 10, "middle": 11, "late": 10}, "open", "no third is clearly ahead"),
        ({"early": 0, "middle": 0, "late": 0}, "against", "no third swings the rate"),
        ({"early": 20}, "open", "too few layers"),
    ],
)
def test_depth(effects: dict[str, int], verdict: str, says: str) -> None:
    found = {name: sides([1.0] * n + [0.0] * (20 - n), [0.0] * 20) for name, n in effects.items()}
    sentence, got = words.depth_finding(found, 0)
    assert says in sentence
    assert got == verdict


def test_rules() -> None:
    hard, weak, none = (
        sides([1.0] * 20, [0.0] * 20),
        sides([1.0] * 10 + [0.0] * 10, [0.0] * 20),
        sides([0.0] * 20, [0.0] * 20),
    )
    kinds = [("0-3", "softmax", "4", "no", "no", "yes")]
    reached = words.rules_finding({"hard": hard, "soft 1": weak, "soft 2": hard}, kinds)
    assert "reaches nine tenths of it from 2 logits on" in reached
    never = words.rules_finding({"hard": hard, "soft 1": weak}, kinds)
    assert "no soft rule up to 16 logits comes within a tenth of it" in never
    nothing = words.rules_finding({"hard": none, "soft 1": weak}, kinds)
    assert "which is no effect; the best soft rule (soft 1) gives +50" in nothing


def test_router_kinds() -> None:
    def info(**changes: Any) -> Any:
        fields = {"n_expert": 8, "gating": "softmax", "n_expert_used": 2, "selection_bias": False}
        return SimpleNamespace(**(fields | {"expert_groups": False, "steerable": True} | changes))

    layers = [info(n_expert=0), info(), info(), info(gating="sigmoid", selection_bias=True), info()]
    evaluator: Any = SimpleNamespace(model=SimpleNamespace(layer_info=lambda: layers))
    assert words.router_kinds(evaluator) == (
        ("1-2,4", "softmax", "2", "no", "no", "yes"),
        ("3", "sigmoid", "2", "yes", "no", "yes"),
    )


def test_layer_names() -> None:
    assert words.layer_names([]) == ""
    assert words.layer_names([0, 1, 2, 4, 6, 7]) == "0-2,4,6-7"
    assert words.layer_names(np.array([3]).tolist()) == "3"
