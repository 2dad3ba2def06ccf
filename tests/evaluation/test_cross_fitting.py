"""Cross-fitted and fixed scores: other computations of them, what a fold must not see, simulation without a model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steermoe_local import UsageError
from steermoe_local.detection.spans import ConditionSpan
from steermoe_local.evaluation.metrics.separation import auc
from steermoe_local.evaluation.studies.conditions import cross_fitting
from steermoe_local.evaluation.studies.conditions.cross_fitting import (
    CrossFittedScores,
    FixedScores,
    PairScores,
    clusters_of,
    folds_of,
)
from steermoe_local.evaluation.studies.conditions.fit import ConditionOptions, judged
from steermoe_local.maps.kept_pairs import KeptPairs
from steermoe_local.maps.routing_lean import RoutingLean

Array = np.ndarray[Any, Any]
SHAPE = (4, 16)
TOP_K = 4
FOLDS = 5


def routing(rng: np.random.Generator, n_pairs: int, shift: float = 0.0) -> tuple[Array, Array]:
    """Counts [n_pairs, 2, n_layer, n_expert] and tokens [n_pairs, 2]; each side routes by a taste of its own.

    `shift` is how much more the positive sides like expert 0 of each layer.
    """
    n = rng.integers(5, 15, (n_pairs, 2))
    taste = rng.normal(size=(n_pairs, 1, *SHAPE)) + rng.normal(size=(n_pairs, 2, *SHAPE))
    taste[:, 0, :, 0] += shift
    a = np.zeros((n_pairs, 2, *SHAPE), dtype=np.int64)
    for pair, side, layer in np.ndindex(n_pairs, 2, SHAPE[0]):
        noisy = taste[pair, side, layer] + rng.gumbel(size=(n[pair, side], SHAPE[1]))
        chosen = np.argsort(-noisy, axis=1)[:, :TOP_K]
        a[pair, side, layer] = np.bincount(chosen.ravel(), minlength=SHAPE[1])
    return a, n


def kept(a: Array, n: Array) -> KeptPairs:
    found = KeptPairs()
    found.append([f"p{i}" for i in range(len(a))], a, n)
    return found


def cross_fitted(a: Array, n: Array, clusters: Array | None = None) -> CrossFittedScores:
    return CrossFittedScores(kept(a, n), np.arange(len(a)) if clusters is None else clusters, FOLDS, 0)


def lean_of(a: Array, n: Array) -> RoutingLean:
    sums, tokens = a.sum(axis=0), n.sum(axis=0)
    return RoutingLean(sums[0] / tokens[0] - sums[1] / tokens[1])


def scored(lean: RoutingLean, a: Array, n: Array) -> Array:
    """One span at a time."""
    found = [
        [lean.of_counts(counts, int(tokens)) for counts, tokens in zip(*pair, strict=True)]
        for pair in zip(a, n, strict=True)
    ]
    return np.array(found)


#
# other computations
#


def test_scores_of_held_out_pairs() -> None:
    a, n = routing(np.random.default_rng(1), 30)
    scores = cross_fitted(a, n)
    for fold in range(FOLDS):
        out = scores.folds == fold
        assert scores.held_out()[out] == pytest.approx(scored(lean_of(a[~out], n[~out]), a[out], n[out]), abs=1e-9)
        training = np.zeros((30, 2))
        for other in set(range(FOLDS)) - {fold}:
            at, rest = scores.folds == other, (scores.folds != other) & ~out
            training[at] = scored(lean_of(a[rest], n[rest]), a[at], n[at])
        assert scores.training(fold) == pytest.approx(training[~out], abs=1e-9)


def test_the_last_layer_counts_nothing() -> None:
    a, n = routing(np.random.default_rng(2), 20, shift=2.0)
    other = a.copy()
    other[:, :, -1] = np.roll(a[:, :, -1], 3, axis=-1)
    assert (cross_fitted(a, n).held_out() == cross_fitted(other, n).held_out()).all()


def test_scores_by_a_fixed_map() -> None:
    rng = np.random.default_rng(3)
    a, n = routing(rng, 30)
    lean = RoutingLean(rng.normal(size=SHAPE))
    scores = FixedScores(kept(a, n), np.arange(30), FOLDS, 0, lean)
    assert scores.held_out() == pytest.approx(scored(lean, a, n), abs=1e-9)
    assert (scores.training(2) == scores.held_out()[scores.folds != 2]).all()
    assert set(scores.strata.tolist()) == {0}


@pytest.mark.parametrize(("fixed", "block"), [(False, 1 << 22), (False, 1), (True, 1)])
def test_swapped_sides_are_computed_again(fixed: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The AUC of each draw is that of pairs whose sides were exchanged before anything was computed."""
    monkeypatch.setattr(cross_fitting, "_BLOCK", block)  # as many draws at a time as it holds, or one
    rng = np.random.default_rng(4)
    a, n = routing(rng, 24, shift=1.0)
    lean = RoutingLean(rng.normal(size=SHAPE))

    def scores(a: Array, n: Array) -> PairScores:
        return FixedScores(kept(a, n), np.arange(24), FOLDS, 0, lean) if fixed else cross_fitted(a, n)

    swaps = rng.integers(0, 2, (9, 24)).astype(np.bool_)
    swaps[0] = False
    expected = []
    for swap in swaps:
        turned_a, turned_n = a.copy(), n.copy()
        turned_a[swap], turned_n[swap] = a[swap][:, ::-1], n[swap][:, ::-1]
        again = scores(turned_a, turned_n)
        parts = [again.held_out()[again.strata == stratum] for stratum in np.unique(again.strata)]
        expected.append(sum(len(part) * auc(*part.T) for part in parts) / 24)
    assert scores(a, n).swapped_aucs(swaps) == pytest.approx(expected, abs=1e-12)


#
# what a fold must not see
#


def test_nothing_of_a_fold_depends_on_its_own_pairs() -> None:
    """Other counts in a fold change neither the scores that its threshold is made of, nor those of its other pairs."""
    a, n = routing(np.random.default_rng(5), 30)
    before = cross_fitted(a, n)
    options, span = ConditionOptions(draws=19), ConditionSpan()
    limits = judged(before, span, options)["thresholds"]
    for fold in range(FOLDS):
        at = np.flatnonzero(before.folds == fold)
        changed_a, changed_n = a.copy(), n.copy()
        changed_a[at[1:]], changed_n[at[1:]] = routing(np.random.default_rng(99), len(at) - 1, shift=9.0)
        after = cross_fitted(changed_a, changed_n)
        assert (after.training(fold) == before.training(fold)).all()
        assert (after.held_out()[at[0]] == before.held_out()[at[0]]).all()
        found = judged(after, span, options)["thresholds"]
        assert found[fold] == limits[fold]
        assert found != limits, "another fold does not see the change either: the test checks nothing"


def own_experts(rng: np.random.Generator, n_texts: int) -> tuple[Array, Array]:
    """Texts that each use experts of their own: a map made of a text knows it again, and says nothing of others."""
    n = np.full(n_texts, 40)
    a = np.zeros((n_texts, 8, 64), dtype=np.int64)
    for text, layer in np.ndindex(n_texts, 8):
        a[text, layer, rng.permutation(64)[:TOP_K]] = 40
    return a, n


def test_a_map_that_saw_the_pairs_would_separate_them() -> None:
    areas = []
    for seed in range(5):
        a, n = own_experts(np.random.default_rng(seed), 80)
        a, n = a.reshape(40, 2, 8, 64), n.reshape(40, 2)
        leak = FixedScores(kept(a, n), np.arange(40), FOLDS, 0, lean_of(a, n))
        assert auc(*leak.held_out().T) > 0.99
        found = judged(cross_fitted(a, n), ConditionSpan(), ConditionOptions(draws=99))
        areas.append(found["auc"].value)
        assert found["auc"].low < 0.5 < found["auc"].high
        assert found["control"].p > 0.05
    assert np.mean(areas) == pytest.approx(0.5, abs=0.12)


def test_a_text_in_two_pairs_would_be_known_again() -> None:
    """Positive texts that stand in two pairs; those pairs are of one cluster, and of one fold."""
    rng = np.random.default_rng(6)
    a, n = own_experts(rng, 120)
    positive, negative = np.tile(np.arange(40), 2), 40 + np.arange(80)
    at = np.stack([positive, negative], axis=1)
    contents = [(bytes([one]), bytes([two])) for one, two in at.tolist()]
    clusters = clusters_of(contents)
    assert len(np.unique(clusters)) == 40
    apart = judged(cross_fitted(a[at], n[at]), ConditionSpan(), ConditionOptions(draws=19))["auc"]
    together = cross_fitted(a[at], n[at], clusters)
    for cluster in np.unique(clusters):
        assert len(set(together.folds[clusters == cluster])) == 1
    found = judged(together, ConditionSpan(), ConditionOptions(draws=99))
    assert apart.low > 0.6
    assert found["auc"].low < 0.5 < found["auc"].high


def test_a_threshold_that_saw_the_pairs_would_have_fewer_errors() -> None:
    """Without any difference the held-out errors sum to 1, and those of the threshold's own pairs do not."""
    own, held_out = [], []
    for seed in range(40):
        a, n = routing(np.random.default_rng(seed), 20)
        found = judged(cross_fitted(a, n), ConditionSpan(), ConditionOptions(draws=19))
        scores, limit = found["scores"], found["condition"].limit
        own.append((scores[:, 0] < limit).mean() + (scores[:, 1] > limit).mean())
        held_out.append(found["false_alarms"].value + found["misses"].value)
    assert np.mean(own) < 0.9
    assert np.mean(held_out) == pytest.approx(1, abs=0.08)


#
# clusters and folds
#


def test_clusters() -> None:
    """a-b, b-c share through b; a text that is positive here and negative there joins, too."""
    pairs = [(b"a", b"x"), (b"p", b"q"), (b"b", b"y"), (b"x", b"b"), (b"z", b"z")]
    assert clusters_of(pairs).tolist() == [0, 1, 0, 0, 4]
    assert clusters_of([]).tolist() == []


@pytest.mark.parametrize("seed", range(3))
def test_folds_hold_whole_clusters_and_are_even(seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(30) * 7, rng.integers(1, 4, 30))
    folds = folds_of(clusters, FOLDS, seed)
    assert sorted(set(folds.tolist())) == list(range(FOLDS))
    for cluster in np.unique(clusters):
        assert len(set(folds[clusters == cluster])) == 1
    sizes = np.bincount(folds)
    assert sizes.max() - sizes.min() <= 1
    assert (folds == folds_of(clusters, FOLDS, seed)).all()
    assert (folds != folds_of(clusters, FOLDS, seed + 1)).any()
    with pytest.raises(UsageError, match="fewer folds"):
        folds_of(np.arange(9), FOLDS, seed)


#
# simulation
#


def test_without_a_difference_the_interval_covers_one_half() -> None:
    """0.5 is in the interval, and the control's p is above 5%, in 95 of 100 runs (docs/conditions.md)."""
    covers, significant = [], []
    for seed in range(60):
        a, n = routing(np.random.default_rng(100 + seed), 20)
        found = judged(cross_fitted(a, n), ConditionSpan(), ConditionOptions(draws=99, seed=seed))
        covers.append(found["auc"].low <= 0.5 <= found["auc"].high)
        significant.append(found["control"].p <= 0.05)
    # binomial: nine and more of sixty at 5% in one of three hundred
    assert sum(covers) >= 52
    assert sum(significant) <= 8


@pytest.mark.parametrize("steer_when", ["positive", "negative"])
def test_a_planted_difference_is_found(steer_when: Any) -> None:
    a, n = routing(np.random.default_rng(8), 40, shift=6.0)
    options = ConditionOptions(draws=99, steer_when=steer_when, name="planted")
    found = judged(cross_fitted(a, n), ConditionSpan(3), options)
    assert found["auc"].value > 0.97
    assert found["control"].p == 0.01
    assert found["false_alarms"].value + found["misses"].value < 0.3
    condition = found["condition"]
    assert (condition.map, condition.last) == ("planted", 3)
    fires = [np.mean([condition.holds(score) for score in side]) for side in found["scores"].T]
    assert fires[steer_when == "negative"] > 0.8
    assert fires[steer_when == "positive"] < 0.2


def test_constant_scores() -> None:
    """Every side routes alike: no AUC, no threshold, and no figure of them."""
    a, n = np.full((20, 2, *SHAPE), 4), np.full((20, 2), 16)
    n[::3], a[::3] = 32, 8  # other lengths, the same shares
    found = judged(cross_fitted(a, n), ConditionSpan(), ConditionOptions(draws=19))
    assert np.ptp(found["scores"]) == 0
    assert np.isnan(found["thresholds"]).all()
    assert {found[name] for name in ("condition", "auc", "control", "false_alarms", "misses")} == {None}
