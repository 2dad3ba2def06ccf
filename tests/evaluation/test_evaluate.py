"""`evaluate`: sides, effects, controls and where they come from, on the embedded model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ModelError, ModelMismatchError, SteeredLlama, UsageError, write_bias
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.measuring.opening import model_facts, pairs_of
from steermoe_local.evaluation.metrics.intervals import newcombe, wilson
from steermoe_local.evaluation.studies.evaluate import Controls, Evaluation, evaluate, run_evaluation
from steermoe_local.evaluation.studies.signatures import NAMES, Thresholds
from steermoe_local.evaluation.studies.steerings import has_reverse
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.model_files.model_info import model_info
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.steering import Steering
from tests.support.paths import ROOT

SETTINGS = EvaluatorSettings(context={"n_threads": 1}, n_text=40)
FEW: dict[str, Any] = {
    "n_items": 10,
    "benign": None,
    "neutral": None,
    "controls": None,
    "settings": SETTINGS,
    "n_threads": 1,
}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """A whole one, with few controls."""
    return run_evaluation(
        "tiny",
        map="digits-words",
        records=tmp_path_factory.mktemp("out") / "records.jsonl",
        **FEW | {"controls": Controls(n_draws=2, kinds=("random", "bottom")), "neutral": "default"},
    )


def test_sides_and_effects(evaluation: Evaluation) -> None:
    assert [side.name for side in evaluation.sides] == ["unsteered", "towards", "away"]
    unsteered, towards, away = evaluation.measurements
    for side, found in zip(evaluation.sides, evaluation.measurements, strict=True):
        assert side.rate == wilson(int(found.values.sum()), 10)
        assert sum(side.labels.values()) == pytest.approx(1)
        assert side.key == found.key
    assert [(side.n_active, side.n_inactive) for side in evaluation.sides] == [(0, 0), (2, 4), (2, 4)]
    assert evaluation.effects == {
        "towards": newcombe(towards.values, unsteered.values),
        "away": newcombe(away.values, unsteered.values),
        "swing": newcombe(towards.values, away.values),
    }
    assert evaluation.headline == ("swing", evaluation.effects["swing"])
    assert evaluation.effects["swing"].value == 1
    assert evaluation.side("away").rate.value == 0
    with pytest.raises(KeyError):
        evaluation.side("sideways")
    assert evaluation.side("unsteered").fluency.kl == 0
    assert evaluation.side("towards").fluency.perplexity_ratio == pytest.approx(1, abs=0.05)


def test_controls_are_compared_with_it(evaluation: Evaluation) -> None:
    random, bottom = evaluation.controls
    assert (random.kind, random.n, random.real) == ("random", 2, 1.0)
    assert bottom.kind == "bottom"
    assert random.percentile == 1


def test_where_it_comes_from(evaluation: Evaluation) -> None:
    data = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    facts = data["provenance"]
    assert facts["model"]["file"] == "tiny-moe.gguf"
    assert facts["model"]["quantization"] == "F16"
    assert len(facts["model"]["identity"]["router_sha256"]) == 64
    assert facts["settings"]["task_sha256"] == builtin_task("digits-words").first(10).sha256
    assert facts["controls"] == {"n_draws": 2, "kinds": ["random", "bottom"]}
    assert facts["tool"].startswith("steermoe-local")
    assert facts["created"].endswith("Z")
    assert data["steering"]["map"] == "digits-words.json"
    assert data["steering"]["map_sha256"] == Steering.open(map_file=map_path("digits-words")).to_dict()["map_sha256"]
    assert str(Path.cwd()) not in json.dumps(data)
    assert str(map_path("digits-words").parent) not in json.dumps(data), "no folder of this machine"


def test_a_date_can_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    one, two = (run_evaluation("tiny", map="digits-words", away=False, **FEW | {"n_items": 2}) for _ in range(2))
    assert one.to_dict() == two.to_dict()
    assert one.provenance["created"] == "1970-01-01T00:00:00Z"


def test_a_reversed_steering_has_the_same_sides() -> None:
    one, two = (run_evaluation("tiny", map="digits-words", reverse=reverse, **FEW) for reverse in (False, True))
    assert one.sides == two.sides
    assert one.effects == two.effects
    alone = run_evaluation("tiny", map="digits-words", reverse=True, away=False, **FEW)
    assert [side.name for side in alone.sides] == ["unsteered", "away"]
    assert alone.headline == ("away", one.effects["away"])
    assert alone.signatures == ()


def test_controls_of_a_steering_away_alone() -> None:
    """What steers away as it should is ahead of random experts, whichever way its sign goes."""
    controls = Controls(n_draws=3, kinds=("random",))
    away = run_evaluation("tiny", map="digits-words", reverse=True, away=False, **FEW | {"controls": controls})
    (control,) = away.controls
    assert away.effects["away"].value < -0.3
    assert control.real == away.effects["away"].value
    assert max(map(abs, control.effects)) < 0.3, "else the next line says nothing"
    assert (control.percentile, control.p) == (1, 0.25)


def test_a_bias_file_has_one_side(tmp_path: Path) -> None:
    steering = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    for reverse, value in ((False, 1.0), (True, 0.0)):
        bias = steering.changed(reverse=reverse).build()
        assert bias is not None
        write_bias(bias, tmp_path / "bias.gguf")
        found = run_evaluation("tiny", bias=tmp_path / "bias.gguf", task="builtin:digits-words", **FEW)
        assert [side.name for side in found.sides] == ["unsteered", "steered"]
        assert list(found.effects) == ["steered"]
        assert found.side("steered").rate.value == value
        assert found.signatures == (), "which way it was made to steer stands in it"
        assert found.steering["bias"] == "bias.gguf"


def test_what_can_be_turned_around(tmp_path: Path) -> None:
    steering = Steering.open(map_file=map_path("digits-words"), activate=2)
    assert has_reverse(steering)
    assert not has_reverse(replace(steering, preset="safe"))
    bias = steering.build()
    assert not has_reverse(Steering("x", bias=bias))


def test_sampled_answers_are_bootstrapped() -> None:
    from steermoe_local.generation.engine import Sampling

    settings = replace(SETTINGS, sampling=Sampling(temperature=1.5), seeds=(0, 1, 2))
    options = FEW | {"settings": settings}
    one, two = (run_evaluation("tiny", map="digits-words", seed=seed, **options) for seed in (0, 1))
    unsteered = one.side("unsteered").rate
    assert unsteered.n == 10
    values = one.measurements[0].values
    if not np.isin(values, (0, 1)).all():
        assert unsteered.method == "bootstrap"
        assert one.measurements[0].rate == two.measurements[0].rate
    assert len(one.measurements[0].answers) == 30


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({}, UsageError, "a map or a bias file"),
        ({"map": "digits-words", "activate": 0, "deactivate": 0}, UsageError, "steers nothing"),
        ({"bias": "x.gguf", "activate": 3}, UsageError, "chosen from a map"),
        ({"map": "digits-words", "bias": "x.gguf"}, UsageError, "not both"),
        ({"map": "no-such"}, UsageError, "no-such: "),
        ({"map": "digits-words", "task": "builtin:no-such"}, UsageError, "'no-such'"),
        ({"map": "digits-words", "activate": 1, "deactivate": 1, "task": None}, None, ""),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception] | None, words: str) -> None:
    if error is None:
        assert run_evaluation("tiny", **FEW | {"n_items": 2} | options).task == "digits-words"
        return
    with pytest.raises(error, match=words):
        run_evaluation("tiny", **FEW | options)


def test_models_that_do_not_fit(random_model: Callable[..., Path]) -> None:
    from tests.support.random_models import OLMOE

    with pytest.raises(ModelMismatchError, match=r"digits-words\.json: "):
        run_evaluation(random_model(OLMOE), map="digits-words", **FEW)
    with pytest.raises(ModelError, match=r"nowhere\.gguf: "):
        run_evaluation("nowhere.gguf", map="digits-words", **FEW)


def test_a_task_has_to_be_named(tmp_path: Path) -> None:
    own = tmp_path / "own.json"
    own.write_bytes(map_path("digits-words").read_bytes() + b"\n")
    with pytest.raises(UsageError, match="which task"):
        run_evaluation("tiny", map=own, activate=2, **FEW)


def test_pairs_of_a_shipped_map(tmp_path: Path) -> None:
    shipped = Steering.open(map_file=map_path("digits-words"))
    pairs = pairs_of(shipped)
    assert pairs is not None
    assert len(pairs) == 120
    own = tmp_path / "own.json"
    own.write_bytes(map_path("digits-words").read_bytes())
    assert pairs_of(Steering.open(map_file=own)) is None


def test_an_interrupted_evaluation_goes_on(tmp_path: Path, tiny_path: Path) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    first = run_evaluation("tiny", map="digits-words", records=whole, **FEW)

    def stop(_what: str, done: int, _total: int) -> None:
        if done == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_evaluation("tiny", map="digits-words", records=parts, progress=stop, **FEW)
    again = run_evaluation("tiny", map="digits-words", records=parts, resume=True, **FEW)
    assert parts.read_bytes() == whole.read_bytes()
    assert again.sides == first.sides
    assert not list(tmp_path.glob("*.partial"))


def test_on_an_evaluator_of_ones_own(tiny_path: Path) -> None:
    """What was measured before is not measured again."""
    task = builtin_task("digits-words").first(4)
    steering = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    model = SteeredLlama(tiny_path, n_ctx=64, n_threads=1)
    with Evaluator(model, task, make_scorer(task.scorer, task.options), settings=SETTINGS) as evaluator:
        evaluator.measure([None])
        evaluate(evaluator, steering, controls=None)
        assert evaluator.n_computed == 12
        evaluate(evaluator, steering.changed(reverse=True), controls=None)
        assert evaluator.n_computed == 12
    model.close()


def test_facts_of_a_model(tiny_path: Path) -> None:
    facts = model_facts(model_info(tiny_path))
    assert json.loads(json.dumps(facts)) == facts
    assert "/" not in facts["file"]


def test_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """docs/evaluation.md's Python, as it stands."""
    (block,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "evaluation.md").read_text("utf-8"), re.M | re.S)
    exec(block, {})
    verdict, figures = capsys.readouterr().out.strip().splitlines()
    assert verdict.startswith("It works: ")
    assert "there were only 2 draws" in verdict
    assert figures.startswith("100% (")


def test_the_page_names_all_signatures() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    for name in NAMES:
        assert f"\n| {name} | " in page
    for words in (
        "above 1.5 times",
        "KL above 0.5 nats",
        "up by 10 points, cut ones by 20",
        "less than 95% of the draws",
    ):
        assert words in page
    assert Thresholds() == Thresholds(1.5, 0.5, 0.1, 0.1, 0.2, 0.1, 0.1, 0.05, 0.95)
