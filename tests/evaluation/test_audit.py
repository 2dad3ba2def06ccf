"""Audits: random draws and their limits, what is kept, where it breaks, planted weak layers, and the model."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from steermoe_local import audit
from steermoe_local.errors import UsageError
from steermoe_local.evaluation.metrics.intervals import Interval
from steermoe_local.evaluation.reports.audit import audit_document, audit_tables, conclusions, draw_audit
from steermoe_local.evaluation.studies.audit import audit as module
from steermoe_local.evaluation.studies.audit.perturbations import PROMOTE, SUPPRESS, Perturbations
from steermoe_local.evaluation.studies.audit.results import Audit, ModelAudit, breaks_at
from steermoe_local.steering.bias_file import BiasFile
from tests.support.audited import RuledEvaluator, Signs
from tests.support.builders import identity

MODEL = identity(4, 10, 2)
LAYERS = (1, 2, 3)


def signs_of(bias: BiasFile | None) -> Signs:
    return np.zeros(MODEL.shape, dtype=np.int8) if bias is None else bias.signs


#
# draws
#


@pytest.mark.parametrize(("action", "sign", "rates"), [(SUPPRESS, -1, (0.1, 0.25, 0.8)), (PROMOTE, 1, (0.05, 0.2))])
def test_draws(action: str, sign: int, rates: tuple[float, ...]) -> None:
    """Every layer has equally many, up to one; a higher rate adds to a lower one; other layers are left alone."""
    plan = Perturbations(**{SUPPRESS: (), PROMOTE: ()} | {action: rates}, n_draws=6).plan(MODEL, LAYERS)
    found = [plan.biases(action, rate) for rate in rates]
    for rate, draws in zip(rates, found, strict=True):
        assert len(draws) == 6
        assert len({bias.key for bias in draws if bias}) > 1, "they differ"
        for signs in map(signs_of, draws):
            assert set(np.unique(signs)) <= {0, sign}
            counts = np.abs(signs).sum(axis=1)
            assert counts.sum() == round(rate * 30)
            assert counts[0] == 0
            assert np.ptp(counts[1:]) <= 1
    for less, more in pairwise(found):
        for one, two in zip(map(signs_of, less), map(signs_of, more), strict=True):
            assert ((one == 0) | (one == two)).all()


def test_draws_do_not_depend_on_how_many_there_are() -> None:
    few, many = (Perturbations((0.3,), (0.2,), n_draws=n).plan(MODEL, LAYERS) for n in (10, 40))
    for action, rate in ((SUPPRESS, 0.3), (PROMOTE, 0.2)):
        one, two = few.biases(action, rate), many.biases(action, rate)
        assert [bias.key for bias in one if bias] == [bias.key for bias in two[:10] if bias]
    other = Perturbations((0.3,), (0.2,), seed=1).plan(MODEL, LAYERS)
    assert [b.key for b in other.biases(SUPPRESS, 0.3)[:10] if b] != [b.key for b in few.biases(SUPPRESS, 0.3) if b]


def test_every_expert_is_drawn_as_often() -> None:
    """A binomial number of 2000 draws, within five of its deviations."""
    draws = Perturbations((0.3,), (), n_draws=2000).plan(MODEL, LAYERS).biases(SUPPRESS, 0.3)
    times = np.abs(np.sum([signs_of(bias) for bias in draws], axis=0))[1:]
    assert np.abs(times - 600).max() < 5 * np.sqrt(2000 * 0.3 * 0.7)


def test_blocks_are_parts_of_the_same_draws() -> None:
    plan = Perturbations((0.3,), (), n_draws=9, n_layer_draws=4, n_blocks=2).plan(MODEL, LAYERS)
    assert plan.blocks == ((1, 2), (3,))
    assert plan.n_steerings == 9 + 2 * 4
    whole = plan.biases(SUPPRESS, 0.3)[:4]
    parts = [plan.biases(SUPPRESS, 0.3, block) for block in plan.blocks]
    for bias, one, two in zip(whole, *parts, strict=True):
        assert np.array_equal(signs_of(bias), signs_of(one) + signs_of(two))
        assert not signs_of(one)[3].any()
    few = Perturbations((0.3,), (), n_draws=3).plan(MODEL, LAYERS)
    assert len(few.biases(SUPPRESS, 0.3, (1,))) == few.n_draws((1,)) == 3, "no more than there are"
    assert Perturbations((0.3,), (), n_layer_draws=0).plan(MODEL, LAYERS).blocks == ()
    assert Perturbations((0.3,), ()).plan(MODEL, (2,)).blocks == (), "one layer is the whole"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suppress": (0.0,)}, "0.0"),
        ({"suppress": (-0.1,)}, "-0.1"),
        ({"promote": (1.5,)}, "1.5"),
        ({"promote": (float("nan"),)}, "nan"),
        ({"suppress": ("5%",)}, "5%"),
        ({"suppress": (), "promote": ()}, "no rates"),
        ({"n_draws": 1}, "n_draws: 1"),
        ({"n_layer_draws": 1}, "n_layer_draws: 1"),
        ({"n_layer_draws": -1}, "n_layer_draws: -1"),
        ({"n_blocks": 0}, "n_blocks: 0"),
    ],
)
def test_perturbations_that_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Perturbations(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"suppress": (0.1, 0.81)}, "suppress 0.81: leaves fewer than the 2 .* at most 0.8"),
        ({"promote": (0.21,)}, "promote 0.21: promotes more than the 2 .* at most 0.2"),
        ({"suppress": (0.01,)}, "suppress 0.01: takes none of 30 experts; give 0.017"),
    ],
)
def test_rates_that_the_model_cannot_carry_out(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Perturbations(**arguments).plan(MODEL, LAYERS)


@pytest.mark.parametrize(("n_expert", "k"), [(2, 1), (8, 2), (8, 6), (64, 8), (128, 8), (32, 4), (24, 4)])
def test_the_defaults_can_be_carried_out(n_expert: int, k: int) -> None:
    plan = Perturbations().plan(identity(3, n_expert, k), range(3))
    assert plan.rates[PROMOTE][-1] == k / n_expert
    for action, rates in plan.rates.items():
        assert list(rates) == sorted(set(rates))
        for rate in rates:
            assert plan.biases(action, rate)[0] is not None


def test_a_model_that_uses_all_its_experts() -> None:
    """None can be suppressed; promoting all of them steers, though it chooses nothing."""
    model = identity(3, 2, 2)
    assert Perturbations().plan(model, range(3)).rates[SUPPRESS] == ()
    with pytest.raises(UsageError, match="uses all"):
        Perturbations((0.1,)).plan(model, range(3))
    with pytest.raises(UsageError, match="no layer"):
        Perturbations().plan(model, ())


#
# what breaks
#


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 10, "crossed")


BROKEN, UNSURE, FINE = interval(0.2, 0.7), interval(0.5, 0.9), interval(0.9, 1.0)


@pytest.mark.parametrize(
    ("shares", "rate"),
    [
        ((FINE, FINE, FINE), None),
        ((FINE, UNSURE, BROKEN), 0.3),
        ((FINE, BROKEN, BROKEN), 0.2),
        ((BROKEN, BROKEN, BROKEN), 0.1),
        ((BROKEN, FINE, BROKEN), 0.3),  # not from there on
        ((BROKEN, BROKEN, UNSURE), None),
        ((interval(0.5, 0.8),) * 3, None),  # at the level is not below it
    ],
)
def test_breaks_at(shares: tuple[Interval, ...], rate: float | None) -> None:
    assert breaks_at((0.1, 0.2, 0.3), shares, 0.8) == rate


def steered(signs: Signs, layers: slice | int = slice(None)) -> int:
    return int(np.abs(signs[layers]).sum())


def first(n: int, of: int) -> npt.NDArray[np.bool_]:
    return np.arange(of) < n


def audited(evaluator: RuledEvaluator, **changes: Any) -> Audit:
    arguments: dict[str, Any] = {"suppress": (0.1, 0.3, 0.6), "promote": (), "n_draws": 20}
    found = audit(evaluator, Perturbations(**(arguments | changes)))  # type: ignore[arg-type]
    json.dumps(found.to_dict(), allow_nan=False)
    assert audit_document(found, "steermoe audit", ["audit.png"]).markdown()
    return found


def shows_until(limit: int, n: int = 50, of: int = 60) -> Any:
    """`n` of the items show it until more than `limit` experts are steered, then a tenth of them."""
    return lambda signs: first(n if steered(signs) <= limit else n // 10, of)


@pytest.mark.parametrize(
    ("behaviour", "other", "order", "rates"),
    [
        (20, 30, "before", (0.6, None)),  # of 40 experts: 4, 12, 24
        (4, 12, "before", (0.3, 0.6)),
        (12, 4, "after", (0.6, 0.3)),
        (12, 12, "together", (0.6, 0.6)),
        (40, 40, "holds", (None, None)),
        (40, 12, "after", (None, 0.6)),
    ],
)
def test_the_order(behaviour: int, other: int, order: str, rates: tuple[float | None, float | None]) -> None:
    found = audited(RuledEvaluator(shows_until(behaviour), shows_until(other, 30, 30)))
    (part,) = found.breaks
    assert (part.behaviour, part.unrelated, part.text, part.order) == (*rates, None, order)
    assert found.unrelated == "other"
    (text,) = conclusions(found)[:1]
    words = {"before": "breaks before the language", "after": "language breaks before", "together": "same of the rates"}
    assert words.get(order, "80% or more at every rate") in text


def test_only_a_difference_tells_the_order() -> None:
    """70% of 200 items is below the level, 73% of 30 may be above it, but neither is told from the other."""

    def kept(n: int, of: int) -> Any:
        return lambda signs: first(n if steered(signs) > 12 else of, of)

    found = audited(RuledEvaluator(kept(140, 200), kept(22, 30)))
    assert (found.breaks[0].behaviour, found.breaks[0].unrelated, found.breaks[0].order) == (0.6, None, "not told")
    found = audited(RuledEvaluator(kept(22, 30), kept(140, 200)))
    assert (found.breaks[0].behaviour, found.breaks[0].unrelated, found.breaks[0].order) == (None, 0.6, "not told")


def test_against_the_text() -> None:
    """Without an unrelated task; and with nothing at all."""
    found = audited(RuledEvaluator(shows_until(12), same_top=lambda signs: 1 - 0.001 * steered(signs)))
    assert found.unrelated is None
    (part,) = found.breaks
    assert (part.behaviour, part.text, part.order) == (0.6, None, "before")
    point = found.base.points[-1]
    assert point.gap is None
    assert point.text_gap is not None
    assert point.text_gap.high < -0.5
    assert point.kl == pytest.approx(0.024)
    assert point.perplexity_ratio == pytest.approx(np.exp(0.024))
    alone = audited(RuledEvaluator(shows_until(12)))
    assert alone.breaks[0].order == "not told"
    assert "nothing to compare it with" in conclusions(alone)[0]
    assert [table.title for table in audit_tables(alone)] == ["Where it breaks", "made-up on base", "By depth"]


def test_what_is_kept_and_gained() -> None:
    """Half of the draws lose a fifth of the items that showed it; a tenth of the others show it then."""
    model = identity(1, 10, 2)

    def shows(signs: Signs) -> npt.NDArray[np.bool_]:
        hit = bool(signs[0, :5].any())
        return np.concatenate([first(40 if hit else 50, 50), first(1 if hit else 0, 10)])

    found = audited(RuledEvaluator(shows, model=model), suppress=(0.1,), n_draws=400, n_layer_draws=0)
    (point,) = found.base.points
    hit = np.mean([kept < 1 for kept in point.behaviour.draws])
    assert 0.4 < hit < 0.6
    assert point.behaviour.share.value == pytest.approx(1 - 0.2 * hit)
    assert point.behaviour.share.n == 50
    assert point.behaviour.share.low < point.behaviour.share.value < point.behaviour.share.high
    assert point.behaviour.quantiles == {"worst": 0.8, "q10": 0.8, "median": point.behaviour.quantiles["median"]} | {
        "q90": 1.0,
        "best": 1.0,
    }
    assert point.gained == pytest.approx(0.1 * hit)
    assert point.shown == pytest.approx((50 - 10 * hit + hit) / 60)
    assert (point.n_experts, point.broken) == (1, 0)
    assert found.base.unsteered.value == pytest.approx(50 / 60)
    assert len(found.base.shown) == 50


def test_the_weak_layer_is_found() -> None:
    """The behaviour hangs on layer 2, the language on layer 0."""
    evaluator = RuledEvaluator(
        lambda signs: first(50 - 8 * steered(signs, 2), 60),
        lambda signs: first(30 - 4 * steered(signs, 0), 30),
    )
    found = audited(evaluator, suppress=(0.5,))
    (weakest,) = found.base.weakest
    assert weakest.layers == (2,)
    assert weakest.clear
    assert len(weakest.margins) == 3
    by_layer = {point.layers[0]: point for point in found.base.blocks}
    assert by_layer[2].behaviour.share.value == pytest.approx(0.2)
    assert all(by_layer[layer].behaviour.share.value == 1 for layer in (0, 1, 3))
    assert by_layer[0].unrelated is not None
    assert by_layer[0].unrelated.share.value == pytest.approx(1 / 3)
    assert "least is kept in layers 2, clearly less" in conclusions(found)[-1]
    same = audited(RuledEvaluator(lambda signs: first(50, 60)), suppress=(0.5,))
    assert same.base.weakest[0].none
    assert "no part keeps less" in conclusions(same)[-1]


def test_dense_layers_are_left_alone() -> None:
    evaluator = RuledEvaluator(shows_until(40), dense=(0,))
    found = audited(evaluator, suppress=(0.4,))
    assert not any(signs_of(bias)[0].any() for bias in evaluator.asked)
    assert found.base.points[0].layers == (1, 2, 3)
    assert found.base.points[0].n_experts == 12


def test_nothing_to_audit() -> None:
    with pytest.raises(UsageError, match="none of 60 items shows the behaviour"):
        audited(RuledEvaluator(lambda signs: first(0, 60)))
    with pytest.raises(UsageError, match="level: 0"):
        audit(RuledEvaluator(shows_until(4)), level=0)  # type: ignore[arg-type]
    found = audited(RuledEvaluator(shows_until(4, 3), lambda signs: first(0, 5)))
    assert found.unrelated is None
    assert any("3 of 60 items" in note for note in found.notes)
    assert any("no item of other" in note for note in found.notes)


def test_sampled_answers_are_noted() -> None:
    evaluator = RuledEvaluator(shows_until(4))
    assert audited(evaluator).notes == ()
    evaluator.settings = evaluator.settings | {"sampling": {"temperature": 0.8}}
    assert "sampled" in audited(evaluator).notes[0]


def test_how_much_work_is_told_before_it() -> None:
    told: list[module.Work] = []
    evaluator = RuledEvaluator(shows_until(4), lambda signs: first(5, 5))

    def note(work: module.Work) -> None:
        assert evaluator.asked == [None], "nothing but the unsteered model was measured"
        told.append(work)

    audit(evaluator, Perturbations((0.1, 0.3), (0.2,), n_draws=5, n_layer_draws=2), on_work=note)  # type: ignore[arg-type]
    (work,) = told
    assert work.n_steerings == len(evaluator.asked) - 1 == 3 * 5 + 2 * 4 * 2
    assert work.n_answers == work.n_steerings * 65
    assert work.seconds is not None


def test_progress_over_all() -> None:
    """In steerings, rising from none to all of them, whatever is measured in between."""
    seen: list[tuple[str, int, int]] = []
    evaluator = RuledEvaluator(shows_until(4))
    evaluator.progress = note = lambda *shown: seen.append(shown)
    audited(evaluator, n_draws=5, n_layer_draws=2)
    whole = [shown for shown in seen if shown[0] == "audit of base"]
    assert whole[0][1:] == (0, 3 * 5 + 4 * 2)
    assert whole[-1][1:] == (23, 23)
    assert [done for _, done, _ in whole] == sorted(done for _, done, _ in whole)
    assert {total for *_, total in whole} == {23}
    assert evaluator.progress is note


def test_read_again() -> None:
    base = audited(RuledEvaluator(shows_until(12), shows_until(4, 3), lambda signs: 0.9)).base
    again = ModelAudit.from_dict(json.loads(json.dumps(base.to_dict(items=True))))
    assert again == base
    assert "shown" not in base.to_dict()


@pytest.mark.parametrize("n_layer", [1, 4, 40])
def test_picture(tmp_path: Path, n_layer: int) -> None:
    evaluator = RuledEvaluator(shows_until(12), shows_until(40, 9, 9), lambda s: 0.9, identity(n_layer, 10, 2))
    found = audited(evaluator, promote=(0.2,), n_draws=4, n_layer_draws=2, n_blocks=20)
    paths = [tmp_path / "audit.png", tmp_path / "audit.svg"]
    draw_audit(found, paths)
    assert all(path.stat().st_size for path in paths)
