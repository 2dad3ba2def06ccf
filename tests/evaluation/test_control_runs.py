"""Controls beside a result: on a made-up evaluator whose answers are known, and on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steermoe_local.detection.recorder import record_counts
from steermoe_local.errors import ChoiceError, PairsError, UsageError
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.studies.controls import draws as control_draws
from steermoe_local.evaluation.studies.controls.controls import ALL, ControlResult, Controls, run_controls
from steermoe_local.evaluation.studies.controls.maps import HalvedMaps, halved_maps, superficial_maps
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.scores import rank
from steermoe_local.models.embedded import behaviour, embedded_model
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.pairs import Pair, load_pairs
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.steering import Steering
from tests.support.builders import identity, table_map

ONE_THREAD = {"n_threads": 1}
MODEL = identity(4, 8, 2)
KINDS = ("random", "matched", "bottom")


class MadeUpEvaluator:
    """An evaluator whose rate is known: 0.5 plus what the steered experts are worth, by `worth` [n_layer, n_expert]."""

    def __init__(self, worth: Any, model: Any = MODEL) -> None:
        self.worth = np.asarray(worth, dtype=np.float64)
        self.identity = model
        self.asked: list[BiasFile | None] = []
        self.calls: list[dict[str, Any]] = []
        layers = [SimpleNamespace(steerable=layer > 0) for layer in range(model.n_layer)]
        self.model = SimpleNamespace(layer_info=lambda: layers)

    def rate(self, bias: BiasFile | None) -> float:
        return 0.5 if bias is None else 0.5 + float((self.worth * bias.dense()).sum())

    def recording_arguments(self, what: str) -> dict[str, Any]:
        return {"thinking": True, "n_threads": 7}

    def measure(self, biases: Sequence[BiasFile | None], **options: Any) -> list[Any]:
        self.asked += biases
        self.calls.append(options)
        return [SimpleNamespace(rate=self.rate(bias)) for bias in biases]


def made_map(**changes: Any) -> ExpertMap:
    """Experts 0 and 1 of layers 1 to 3 (layer 0 is dense) are the behaviour's, the others hardly."""
    rng = np.random.default_rng(0)
    rd = rng.choice([-1, 1], MODEL.shape) * rng.uniform(0.01, 0.02, MODEL.shape)
    rd[:, 0], rd[:, 1] = 0.8, -0.8
    rd[0] = 0
    fields: dict[str, Any] = {"identity": MODEL, "behaviour": "b", "rd": rd}
    return ExpertMap(**(fields | changes))


def counted_map() -> ExpertMap:
    n = 1000
    rng = np.random.default_rng(1)
    a2 = rng.integers(0, 600, MODEL.shape)
    a1 = a2 + rng.integers(-1, 2, MODEL.shape).clip(-a2, n)
    a1[:, 0], a2[:, 0], a1[:, 1], a2[:, 1] = 900, 100, 100, 900
    # one expert of each layer is as busy and has nothing to do with it
    a1[:, 2:4], a2[:, 2:4] = 501, 500
    a1[0] = a2[0] = 0
    rd = (a1 - a2) / n
    return made_map(rd=rd, a1=a1, a2=a2, n1=n, n2=n)


def steering(expert_map: ExpertMap | None = None, **choice: Any) -> Steering:
    return Steering("b", expert_map=expert_map or made_map(), **({"activate": 2, "deactivate": 2} | choice))


def worth() -> Any:
    table = np.zeros(MODEL.shape)
    table[1:, 0], table[1:, 1] = 0.1, -0.1
    return table


def run(evaluator: Any, choice: Steering, **options: Any) -> dict[str, ControlResult]:
    real = options.pop("real_effect", None)
    if real is None:
        back = choice.changed(reverse=not choice.reverse) if choice.expert_map else choice
        real = evaluator.rate(choice.build()) - evaluator.rate(back.build())
    controls = Controls(**{name: options.pop(name) for name in Controls.__dataclass_fields__ if name in options})
    return {found.kind: found for found in run_controls(evaluator, choice, controls, real_effect=real, **options)}


#
# the statistics
#


def test_a_summary_by_hand() -> None:
    found = ControlResult.of("random", [0.1, -0.3, 0.0, 0.2], ["1", "2", "3", "4"], 0.25)
    assert (found.n, found.mean, found.percentile) == (4, pytest.approx(0.15), 0.75)
    assert found.p == pytest.approx((1 + 1) / 5), "-0.3 is as large as 0.25"
    assert (found.low, found.high) == (pytest.approx(0.0075), pytest.approx(0.2925))
    assert ControlResult.of("random", [0.1], ["1"], 0.2).percentile == 1


def test_a_tie_is_no_win() -> None:
    for effect, real in ((0.3, 0.3), (0.1 + 0.2, 0.3), (0.3, 0.1 + 0.2)):
        found = ControlResult.of("random", [effect], ["1"], real)
        assert (found.percentile, found.p) == (0, 1)


def test_the_wrong_way_never_wins() -> None:
    """The real value has a sign, a random draw has none."""
    found = ControlResult.of("random", [0.1, 0.0], ["1", "2"], -0.9)
    assert (found.percentile, found.p) == (0, 1)
    turned = ControlResult.of("random", [0.1, 0.0], ["1", "2"], -0.9, sign=-1)
    assert (turned.percentile, turned.p) == (1, pytest.approx(1 / 3))


def test_a_kind_that_was_left_out() -> None:
    found = ControlResult.of("matched", [], [], 0.5, note="left out: no counts")
    assert (found.n, found.mean, found.percentile, found.p) == (0, None, None, None)
    assert json.loads(json.dumps(found.to_dict()))["note"] == "left out: no counts"


#
# draws on a made-up evaluator
#


def test_random_draws_of_a_map_that_works() -> None:
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, steering(), kinds=["random"], n_draws=50)["random"]
    assert found.n == 50
    assert found.real == pytest.approx(0.8)
    assert found.percentile is not None
    assert found.percentile > 0.95
    assert found.mean is not None
    assert found.mean < 0.4
    assert found.p == pytest.approx((1 + sum(abs(e) >= 0.8 - 1e-12 for e in found.effects)) / 51)
    # each draw is its effect: positive, then negative steering, which is its reverse
    for towards, away, effect in zip(evaluator.asked[::2], evaluator.asked[1::2], found.effects, strict=True):
        assert towards is not None
        assert away is not None
        assert np.array_equal(towards.dense(), -away.dense())
        assert effect == pytest.approx(evaluator.rate(towards) - evaluator.rate(away))
        assert (towards.n_active, towards.n_inactive) == (2, 2)
        assert 0 not in towards.layers, "layer 0 does not route"
    assert evaluator.calls == [{"items": None, "text": False, "benign": False, "what": "controls"}]


def test_random_is_no_different_from_random() -> None:
    """A map of no worth: its percentile is anywhere, and p is not small as a rule."""
    rng = np.random.default_rng(0)
    p = []
    for seed in range(40):
        evaluator = MadeUpEvaluator(rng.normal(size=MODEL.shape))
        rd = rng.uniform(-1, 1, MODEL.shape)
        rd[0] = 0
        found = run(evaluator, steering(made_map(rd=rd)), kinds=["random"], n_draws=19, seed=seed)["random"]
        p.append(found.p)
    assert np.mean(np.asarray(p) <= 0.05) <= 0.15
    assert np.mean(p) > 0.5, "a map that goes the wrong way has p = 1"


def test_one_call_measures_all() -> None:
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, steering(counted_map()), kinds=KINDS, n_draws=3, items=["a"])
    assert [result.n for result in found.values()] == [3, 3, 1]
    assert len(evaluator.calls) == 1
    assert evaluator.calls[0]["items"] == ["a"]
    assert len(evaluator.asked) == 2 * (3 + 3 + 1)


def test_towards_alone() -> None:
    evaluator = MadeUpEvaluator(worth())
    real = evaluator.rate(steering().build()) - 0.5
    found = run(evaluator, steering(), kinds=["random"], n_draws=5, both_ways=False, real_effect=real)["random"]
    assert not found.both_ways
    assert evaluator.asked[-1] is None, "the unsteered model"
    assert found.effects == tuple(pytest.approx(evaluator.rate(bias) - 0.5) for bias in evaluator.asked[:-1])


def test_draws_are_the_same_again_and_the_first_of_more() -> None:
    results = [
        run(MadeUpEvaluator(worth()), steering(counted_map()), kinds=kinds, n_draws=n, seed=seed)
        for kinds, n, seed in ((KINDS, 4, 0), (("matched", "random"), 9, 0), (KINDS, 4, 1))
    ]
    for kind in ("random", "matched"):
        assert results[0][kind].effects == results[1][kind].effects[:4]
    assert results[0]["random"].effects != results[2]["random"].effects


def test_layers_and_rule_of_the_real_one() -> None:
    evaluator = MadeUpEvaluator(worth())
    choice = steering(counted_map(), layers="2-3", scale=1.5)
    run(evaluator, choice, kinds=KINDS, n_draws=6)
    assert len(evaluator.asked) == 26
    for bias in evaluator.asked:
        assert bias is not None
        assert set(bias.layers) <= {2, 3}
        assert bias.mode == "soft"
        assert set(np.abs(bias.dense()).ravel().tolist()) == {0, 1.5}
    evaluator = MadeUpEvaluator(worth())
    run(evaluator, steering(epsilon=0.5), kinds=["random"], n_draws=2)
    assert {bias.epsilon for bias in evaluator.asked if bias} == {0.5}


def test_matched_draws_are_as_busy() -> None:
    """In each layer two experts are as busy as those chosen and have nothing to do with the behaviour."""
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, steering(counted_map()), kinds=["random", "matched"], n_draws=20)
    matched = found["matched"]
    assert matched.details["frequency_gap"] < 0.2 * matched.details["frequency_gap_of_even_draws"]
    assert matched.details["linked"] < 0.5
    assert matched.note == ""
    assert matched.mean is not None
    assert found["random"].mean is not None
    assert matched.percentile == 1


def test_matched_draws_that_are_the_behaviours_own_are_reported() -> None:
    expert_map = counted_map()
    assert expert_map.a1 is not None
    assert expert_map.a2 is not None
    a1, a2 = expert_map.a1.copy(), expert_map.a2.copy()
    a1[1:, 2:], a2[1:, 2:] = 10, 10  # nobody else is busy
    changed = made_map(rd=(a1 - a2) / 1000, a1=a1, a2=a2, n1=1000, n2=1000)
    found = run(MadeUpEvaluator(worth()), steering(changed, activate=1, deactivate=1), kinds=["matched"])["matched"]
    assert found.details["linked"] >= 0.5
    assert "tied to it as well" in found.note


def test_the_smallest_rd() -> None:
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, steering(), kinds=["bottom"])["bottom"]
    assert (found.n, found.p, found.effects) == (1, 0.5, (pytest.approx(0),))
    towards = evaluator.asked[0]
    assert towards is not None
    order = rank(made_map().rd, (1, 2, 3)).tolist()[::-1]
    smallest = {sign: [tuple(c) for c in order if np.sign(made_map().rd[tuple(c)]) == sign][:2] for sign in (1, -1)}
    for sign, cells in smallest.items():
        assert sorted(map(tuple, np.argwhere(towards.dense() == sign).tolist())) == sorted(cells)


@pytest.mark.parametrize("cap", [1.5, float("inf")])
def test_draws_of_a_capped_bias_have_its_cap(cap: float) -> None:
    evaluator = MadeUpEvaluator(worth())
    signs = made_map().choose(2, 2)
    real = BiasFile.from_capped(signs, MODEL, cap, 0.5)
    run(evaluator, Steering("b", bias=real), kinds=["random"], n_draws=3, real_effect=0.8)
    drawn = [bias for bias in evaluator.asked if bias is not None]
    assert len(drawn) == 6
    assert {(bias.mode, bias.cap, bias.epsilon) for bias in drawn} == {("capped", cap, 0.5)}
    assert all((bias.n_active, bias.n_inactive) == (2, 2) for bias in drawn)


def test_a_reversed_choice_wants_the_other_direction() -> None:
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, steering(reverse=True), kinds=["random"], n_draws=30)["random"]
    assert found.real == pytest.approx(-0.8)
    assert found.percentile is not None
    assert found.percentile > 0.9
    wrong = run(MadeUpEvaluator(-worth()), steering(reverse=True), kinds=["random"], n_draws=30)["random"]
    assert wrong.percentile == 0


def test_bottom_of_a_reversed_choice() -> None:
    one, other = MadeUpEvaluator(worth()), MadeUpEvaluator(worth())
    run(one, steering(), kinds=["bottom"])
    run(other, steering(reverse=True), kinds=["bottom"])
    assert [bias.dense().tolist() for bias in one.asked if bias] == [
        bias.dense().tolist() for bias in reversed(other.asked) if bias
    ]


def test_a_choice_of_all_experts_has_no_bottom() -> None:
    rd = np.zeros((1, 4))
    rd[0] = [0.5, 0.4, -0.5, -0.4]
    expert_map = table_map(rd, 2)
    evaluator = MadeUpEvaluator(np.zeros((1, 4)), expert_map.identity)
    evaluator.model.layer_info()[0].steerable = True
    found = run(evaluator, steering(expert_map), kinds=["bottom", "random"], n_draws=2)
    assert found["bottom"].n == 0
    assert "the choice takes all experts" in found["bottom"].note
    assert found["random"].n == 2


def test_what_is_left_out_says_why() -> None:
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, steering(), n_draws=2)
    assert {kind for kind, result in found.items() if result.n} == {"random", "bottom"}
    assert tuple(found) == ALL
    assert "no counts of activations" in found["matched"].note
    for kind in ("superficial", "shuffled", "same-side"):
        assert found[kind].note.startswith("left out: no pairs")
    # a single pair cannot be halved: a note, not an end
    pair = Pair("1", "a b", "c d", "b", "d")
    found = run(evaluator, steering(), n_draws=2, kinds=["shuffled", "random"], pairs=[pair])
    assert "two pairs at least" in found["shuffled"].note
    assert found["random"].n == 2


def test_pairs_are_counted_as_the_evaluator_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its template, context and threads, unless a caller says otherwise."""
    got: list[dict[str, Any]] = []

    def none(*_: Any, recording: dict[str, Any], **__: Any) -> Any:
        got.append(recording)
        raise PairsError("none")

    monkeypatch.setattr(control_draws, "halved_maps", none)
    monkeypatch.setattr(control_draws, "superficial_maps", none)
    pairs = [Pair(str(i), "a b", "c d", "b", "d") for i in range(3)]
    evaluator = MadeUpEvaluator(worth())
    run(evaluator, steering(), n_draws=1, kinds=["shuffled", "superficial"], pairs=pairs, recording={"n_threads": 1})
    assert got == [{"thinking": True, "n_threads": 1}] * 2


def test_a_bias_file() -> None:
    bias = steering().build()
    assert bias is not None
    choice = Steering("file", bias=bias)
    evaluator = MadeUpEvaluator(worth())
    found = run(evaluator, choice, n_draws=4, real_effect=0.8)
    assert found["random"].n == 4
    assert found["bottom"].note.startswith("left out: a bias file has no scores")
    assert all(bias is not None and 0 not in bias.layers for bias in evaluator.asked), (
        "layers that do not route are left out"
    )
    alone = run(MadeUpEvaluator(worth()), choice, n_draws=4, kinds=["random"], both_ways=False, real_effect=0.4)
    assert alone["random"].n == 4


def test_a_reverse_of_its_own() -> None:
    evaluator = MadeUpEvaluator(worth())
    back = steering(activate=1, deactivate=3, reverse=True)
    run(evaluator, steering(activate=3, deactivate=1), kinds=["random"], n_draws=3, reverse=back, real_effect=1)
    for towards, away in zip(evaluator.asked[::2], evaluator.asked[1::2], strict=True):
        assert towards is not None
        assert away is not None
        assert (towards.n_active, towards.n_inactive, away.n_active, away.n_inactive) == (3, 1, 1, 3)
        assert np.array_equal(towards.dense(), -away.dense())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ["randon"]}, "randon: .*random, matched"),
        ({"n_draws": 0}, "n_draws: 0"),
        ({"n_maps": 0}, "n_maps: 0"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(MadeUpEvaluator(worth()), steering(), **options)


def test_nothing_to_control_for() -> None:
    for choice in (steering(activate=0, deactivate=0), Steering("none")):
        with pytest.raises(UsageError, match=f"{choice.name}: "):
            run(MadeUpEvaluator(worth()), choice, real_effect=0)
    with pytest.raises(ChoiceError):  # the reverse of many promoted experts cannot be carried out
        run(MadeUpEvaluator(worth()), steering(activate=0, deactivate=99), real_effect=0)


def test_maps_that_agree_with_the_real_one_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = made_map()
    other = made_map(rd=-real.rd)
    halves = HalvedMaps(real, {"1": real, "2": other}, {"3": other})
    monkeypatch.setattr(control_draws, "halved_maps", lambda *_, **__: halves)
    pair = Pair("1", "a b", "c d", "b", "d")
    found = run(MadeUpEvaluator(worth()), steering(), kinds=["shuffled", "same-side"], pairs=[pair])
    shuffled = found["shuffled"]
    assert shuffled.effects == (pytest.approx(0.8), pytest.approx(-0.8))
    assert "1 of these maps choose the very experts" in shuffled.note
    assert "hide the direction, not the experts" in shuffled.note
    assert [(fact["shared"], fact["shared_reversed"]) for fact in shuffled.details["maps"]] == [(1, 0), (0, 1)]
    assert [fact["pearson"] for fact in shuffled.details["maps"]] == [pytest.approx(1), pytest.approx(-1)]
    assert found["same-side"].note == ""


#
# on the embedded model
#


@pytest.fixture(scope="module")
def tiny() -> Iterator[SteeredLlama]:
    llama = SteeredLlama(embedded_model(), n_ctx=64, n_batch=64, n_threads=1, verbose=False)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(load_pairs(behaviour("digits-words").pairs))[:24]


def test_halves_of_pairs_by_hand(tiny: SteeredLlama, pairs: list[Pair]) -> None:
    """The same as recording the pairs as they come out."""
    made = halved_maps(tiny, pairs, 2, seed=5, recording=ONE_THREAD)
    again = halved_maps(tiny, pairs, 1, seed=5, recording=ONE_THREAD)
    assert np.array_equal(made.shuffled["shuffle 1"].rd, again.shuffled["shuffle 1"].rd)
    real = ExpertMap.from_counts(record_counts(tiny, pairs, **ONE_THREAD))
    assert np.array_equal(made.real.rd, real.rd)
    half = np.random.default_rng([5, 1]).permutation(len(pairs))[: len(pairs) // 2].tolist()
    swapped = [
        Pair(p.id, p.negative, p.positive, p.negative_target, p.positive_target) if i in half else p
        for i, p in enumerate(pairs)
    ]
    assert np.array_equal(
        made.shuffled["shuffle 2"].rd, ExpertMap.from_counts(record_counts(tiny, swapped, **ONE_THREAD)).rd
    )
    # the negative sides alone, one half against the other
    ours = [p for i, p in enumerate(pairs) if i in half]
    rest = [p for i, p in enumerate(pairs) if i not in half]
    counts = [record_counts(tiny, part, **ONE_THREAD) for part in (ours, rest)]
    assert list(made.same_side) == ["positive side, halves 1", "negative side, halves 2"]
    found = made.same_side["negative side, halves 2"]
    assert np.array_equal(found.rd, counts[0].a2 / counts[0].n2 - counts[1].a2 / counts[1].n2)


def test_superficial_maps(tiny: SteeredLlama, pairs: list[Pair]) -> None:
    made = superficial_maps(tiny, pairs, recording=ONE_THREAD)
    assert list(made) == ["length", "casing", "format", "all kinds"]
    assert made["all kinds"].n_pairs == sum(made[kind].n_pairs for kind in ("length", "casing", "format"))
    assert made["all kinds"].a1 is not None
    assert np.array_equal(
        made["all kinds"].a1, sum(np.asarray(made[kind].a1) for kind in ("length", "casing", "format"))
    )
    with pytest.raises(PairsError, match="superficial"):
        superficial_maps(tiny, [], recording=ONE_THREAD)


def test_controls_of_a_planted_behaviour(tiny: SteeredLlama, pairs: list[Pair]) -> None:
    """The map has a full effect; evenly drawn experts, and one side against itself, have almost none."""
    task = builtin_task("digits-words").first(10)
    choice = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    with Evaluator(
        tiny, task, make_scorer(task.scorer, task.options), settings=EvaluatorSettings(context=ONE_THREAD)
    ) as evaluator:
        towards, away = evaluator.measure([choice.build(), choice.changed(reverse=True).build()])
        real = towards.rate - away.rate
        assert real == 1
        said: list[str] = []
        controls = Controls(n_draws=4, n_maps=4, pairs=pairs, recording=ONE_THREAD)
        found = run_controls(evaluator, choice, controls, real_effect=real, log=said.append)
        n_computed = evaluator.n_computed
        again = run_controls(evaluator, choice, controls, real_effect=real)
        assert evaluator.n_computed == n_computed, "measured once"
        assert again == found
    by_kind = {result.kind: result for result in found}
    assert tuple(by_kind) == ALL
    assert [result.n for result in found] == [4, 4, 1, 4, 4, 4]
    for kind in ("random", "bottom", "same-side"):
        assert by_kind[kind].percentile == 1
        assert by_kind[kind].mean is not None
        assert by_kind[kind].mean < 0.4
    assert by_kind["matched"].details["frequency_gap"] < 0.1
    assert said == ["counting 24 superficial pairs", "counting 24 pairs"]
    json.dumps([result.to_dict() for result in found])
