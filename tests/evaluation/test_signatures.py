"""Each failure signature fires on real steerings of the embedded model, and none on a healthy one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, write_bias
from steermoe_local.evaluation.measuring.evaluator import EvaluatorSettings
from steermoe_local.evaluation.measuring.measurements import Measurement
from steermoe_local.evaluation.metrics.intervals import Interval, newcombe
from steermoe_local.evaluation.studies.controls.controls import ControlResult
from steermoe_local.evaluation.studies.evaluate import Evaluation, run_evaluation
from steermoe_local.evaluation.studies.signatures import NAMES, Thresholds, effect_signatures, guard_signatures
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.neutral_text import TextScore
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.models.embedded import behaviour
from tests.evaluation.test_side_effects import answer, measurement
from tests.support.low_level import identity_of

#
# real ones
#


@pytest.fixture(scope="module")
def evaluated(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Evaluation]:
    """Evaluate by a map's name, or by signs."""
    folder = tmp_path_factory.mktemp("biases")

    def run(signs: Any = None, **options: Any) -> Evaluation:
        if signs is not None:
            write_bias(BiasFile.from_signs(signs, identity_of(tiny_path)), folder / "bias.gguf")
            options["bias"] = folder / "bias.gguf"
        settings = EvaluatorSettings(context={"n_threads": 1}, n_text=60)
        defaults: dict[str, Any] = {"n_items": 12, "controls": None, "benign": None, "settings": settings}
        return run_evaluation("tiny", n_threads=1, **{**defaults, **options})

    return run


def names(evaluation: Evaluation) -> set[tuple[str, str]]:
    return {(signature.name, signature.side) for signature in evaluation.signatures}


def test_a_healthy_steering_has_none(evaluated: Callable[..., Evaluation]) -> None:
    benign = replace(builtin_task("neutral"), scorer="refusal", options={}).first(8)
    found = evaluated(map="digits-words", benign=(benign, make_scorer("refusal")))
    assert found.signatures == ()
    assert found.effects["swing"].value == 1
    assert evaluated(map="digits-words", reverse=True).signatures == (), "the sides are the map's, not the flag's"


def test_too_much_collapses(evaluated: Callable[..., Evaluation]) -> None:
    found = evaluated(map="digits-words", activate=20, deactivate=60, strength=20.0)
    assert names(found) == {("fluency collapse", "towards"), ("fluency collapse", "away")}
    towards = found.signatures[0]
    assert towards.figures["perplexity ratio"] > 1.5
    assert towards.figures["KL"] > 0.5
    assert "perplexity ratio 2" in towards.found
    assert "above 1.5 times" in towards.rule


def test_refusing_what_is_benign(evaluated: Callable[..., Evaluation], tiny_path: Path) -> None:
    signs = np.zeros(identity_of(tiny_path).shape, dtype=np.int8)
    for place in behaviour("refuse-comply").planted_positive:
        signs[place] = 1
    task = replace(builtin_task("refuse-comply"), scorer="refusal", options={}).first(16)
    found = evaluated(signs, task="builtin:refuse-comply", benign=(task, make_scorer("refusal")))
    assert ("over-refusal", "steered") in names(found)
    refusal = next(s for s in found.signatures if s.name == "over-refusal")
    assert refusal.figures["refused"] == 1
    assert refusal.figures["low"] > 0


def test_breaking_most_experts(evaluated: Callable[..., Evaluation], tiny_path: Path) -> None:
    n_layer, n_expert = identity_of(tiny_path).shape
    rng = np.random.default_rng(1)
    signs = np.full((n_layer, n_expert), -1, dtype=np.int8)
    for row in signs:
        row[rng.choice(n_expert, 4, replace=False)] = 0
    found = evaluated(signs, task="builtin:digits-words")
    assert {("ill-formed answers", "steered"), ("wrong way", "steered")} <= names(found)
    assert found.side("steered").labels["ill-formed"] >= 0.25


def test_the_experts_of_something_else_have_no_effect(evaluated: Callable[..., Evaluation]) -> None:
    found = evaluated(map="document-memory", task="builtin:digits-words")
    assert {name for name, _ in names(found)} == {"no effect"}
    assert ("no effect", "swing") in names(found)


def test_the_other_side_of_a_map(evaluated: Callable[..., Evaluation]) -> None:
    """A task whose positive side is the map's negative one."""
    task = builtin_task("digits-words").first(12)
    swapped = [
        replace(item, extra={"positive": item.extra["negative"], "negative": item.extra["positive"]})
        for item in task.items
    ]
    found = evaluated(map="digits-words", task=replace(task, items=tuple(swapped), options={}))
    assert {("wrong way", "swing"), ("wrong way", "towards")} <= names(found)


def test_at_the_end_of_the_scale(evaluated: Callable[..., Evaluation]) -> None:
    """With prompts alone that are answered so anyway, towards has no room."""
    task = builtin_task("digits-words")
    unsteered = evaluated(map="digits-words", neutral=None).measurements[0]
    shown = {answer.item for answer in unsteered.answers if answer.value == 1}
    digits = tuple(item for item in task.items if item.id in shown)
    found = evaluated(map="digits-words", task=replace(task, items=digits), neutral=None)
    assert ("no room", "towards") in names(found)
    assert "100% already" in found.signatures[0].found


#
# by construction: each limit, from both sides
#


def items(n: int, n_marked: int, **marked: Any) -> Measurement:
    return measurement(*(answer(str(i), **(marked if i < n_marked else {})) for i in range(n)))


@pytest.mark.parametrize(
    ("marked", "name", "limit"),
    [
        ({"loop": 0.6}, "fluency collapse", 10),
        ({"text": ""}, "fluency collapse", 10),
        ({"finish": "length"}, "fluency collapse", 20),
        ({"label": "ill-formed"}, "ill-formed answers", 10),
    ],
)
def test_shares(marked: dict[str, Any], name: str, limit: int) -> None:
    base = items(100, 0)
    assert guard_signatures("towards", items(100, limit - 1, **marked), base) == ()
    (found,) = guard_signatures("towards", items(100, limit, **marked), base)
    assert (found.name, found.side) == (name, "towards")
    assert f"{limit} points" in found.found
    assert guard_signatures("towards", items(100, limit, **marked), items(100, 1, **marked)) == (), "against unsteered"
    # few items: the share is there, but so is chance
    assert guard_signatures("towards", items(4, 1, **marked), items(4, 0)) == ()


def test_text_limits() -> None:
    base = measurement(answer(), text=TextScore(1.0, 0.0, 1.0, 9))

    def fired(nll: float, kl: float, limits: Thresholds | None = None) -> int:
        steered = measurement(answer(), text=TextScore(nll, kl, 0.5, 9))
        return len(guard_signatures("away", steered, base, limits))

    assert fired(1.0 + np.log(1.49), 0.49) == 0
    assert fired(1.0 + np.log(1.51), 0.0) == 1
    assert fired(1.0, 0.51) == 1
    assert fired(0.2, 0.0) == 0
    assert fired(float("nan"), 0.0) == 1
    assert fired(1.0, float("inf")) == 1
    assert fired(1.0, 0.51, Thresholds(kl=0.6)) == 0


def test_refusal_limits() -> None:
    def refusing(n: int, of: int = 100) -> Measurement:
        return measurement(answer(), benign=tuple(answer(str(i), float(i < n)) for i in range(of)))

    assert guard_signatures("towards", refusing(9), refusing(0)) == ()
    (found,) = guard_signatures("towards", refusing(10), refusing(0))
    assert found.name == "over-refusal"
    assert guard_signatures("towards", refusing(30), refusing(28)) == ()
    assert guard_signatures("towards", refusing(1, 5), refusing(0, 5)) == ()
    assert guard_signatures("towards", refusing(0), refusing(50)) == (), "fewer refusals are no fault"


def effect(risen: int, fallen: int, n: int = 100) -> Interval:
    """Items that changed to the one and to the other side."""
    one = [1] * risen + [0] * fallen + [1] * (n - risen - fallen)
    two = [0] * risen + [1] * fallen + [1] * (n - risen - fallen)
    return newcombe(one, two)


def control(kind: str, percentile: float | None) -> ControlResult:
    return ControlResult(kind, 20, 0.3, True, percentile=percentile)


def only(*arguments: Any, **options: Any) -> str:
    found = effect_signatures(*arguments, **options)
    assert len(found) <= 1
    return found[0].name if found else ""


def test_effects() -> None:
    for wanted, (up, down) in ((1, (30, 2)), (-1, (2, 30))):
        assert only("towards", effect(up, down), wanted=wanted) == ""
        assert only("towards", effect(down, up), wanted=wanted) == "wrong way"
        assert only("towards", effect(5, 4), wanted=wanted) == "no effect"
    assert only("swing", Interval(-0.2, -0.45, 0.05, 20, "newcombe")) == "no effect", "not surely the wrong way"
    assert only("swing", effect(8, 0, 200), limits=Thresholds(effect=0.03)) == ""
    assert only("swing", effect(40, 0, 1000)) == "no effect", "below the least size, however sure"
    assert only("swing", effect(0, 40, 1000)) == "no effect", "as small to the other side"
    assert only("swing", effect(0, 0)) == "no effect"
    assert only("swing", effect(60, 0, 1000)) == ""


def test_room() -> None:
    assert only("towards", effect(3, 0), unsteered_rate=0.96) == "no room"
    assert only("towards", effect(3, 0), unsteered_rate=0.94) == "no effect"
    assert only("away", effect(0, 3), wanted=-1, unsteered_rate=0.04) == "no room"
    assert only("away", effect(0, 30), wanted=-1, unsteered_rate=0.96) == ""
    assert only("towards", effect(0, 30), unsteered_rate=0.96) == "wrong way", "that is worse than no room"


def test_controls_of_an_effect() -> None:
    strong = effect(30, 2)
    assert only("swing", strong, controls=[control("random", 1.0)]) == ""
    assert only("swing", strong, controls=[control("random", 0.95)]) == ""
    assert only("swing", strong, controls=[control("bottom", 1.0), control("random", 0.9)]) == "no effect"
    for kind in ("matched", "bottom", "shuffled"):
        assert only("swing", strong, controls=[control(kind, 0.0)]) == "", "read in their table, with their notes"
    assert only("swing", strong, controls=[control("random", None)]) == ""


def test_every_name_is_listed_and_reported() -> None:
    found = [
        *guard_signatures("towards", items(100, 50, loop=0.9, label="ill-formed"), items(100, 0)),
        *effect_signatures("towards", effect(0, 30)),
        *effect_signatures("towards", effect(3, 0), unsteered_rate=1.0),
        *effect_signatures("swing", effect(0, 0)),
    ]
    assert {signature.name for signature in found} == set(NAMES) - {"over-refusal"}
    for signature in found:
        assert signature.rule
        assert signature.found
        assert str(signature).startswith(f"{signature.name} ({signature.side}): ")
        assert asdict(signature)["figures"] == dict(signature.figures)
