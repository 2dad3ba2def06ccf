"""Standard errors, p-values, stability and control: tables by hand, simulation, other formulas, properties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.errors import FormatError, UsageError
from steermoe_local.maps import significance
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts
from tests.support.builders import identity
from tests.support.random_pairs import random_pairs, write

Array = np.ndarray[Any, Any]


@dataclass
class InMemory:
    """Pairs as `PairCounts` serves them, in chunks of `step`."""

    a: Array
    n: Array
    moe_layers: tuple[int, ...] = (0,)
    step: int = 1000

    def chunks(self) -> Iterator[tuple[slice, Array]]:
        for at in range(0, len(self.n), self.step):
            part = slice(at, min(at + self.step, len(self.n)))
            yield part, self.a[part]

    @property
    def rd(self) -> Array:
        sums, tokens = self.a.sum(axis=0), self.n.sum(axis=0)
        return sums[0] / tokens[0] - sums[1] / tokens[1]


def table(a: Any, n: Any) -> InMemory:
    """One layer from a [pairs, 2, n_expert]."""
    return InMemory(np.asarray(a, dtype=np.uint16)[:, :, None, :], np.asarray(n))


def clustered(
    rng: np.random.Generator, n_pairs: int, differences: Any, spread: float = 0.6, tokens: tuple[int, int] = (10, 30)
) -> InMemory:
    """Pairs of which each has a taste of its own for every expert, alike on its two sides.

    An expert's rate in a pair is a Beta whose mean is 0.3 +- half the expert's difference.
    """
    shift = np.asarray(differences) / 2
    n = rng.integers(*tokens, size=(n_pairs, 2))
    own = rng.normal(size=(n_pairs, 1, len(shift))) * spread + rng.normal(size=(n_pairs, 2, len(shift))) * spread / 2
    logits = own + np.log(3 / 7)
    # the mean over pairs must be exactly known: shift the rate, not the logit
    rates = 0.2 + 0.4 / (1 + np.exp(-logits)) + np.stack([shift, -shift])
    return table(rng.binomial(n[:, :, None], rates), n)


#
# standard errors and intervals
#


def test_by_hand() -> None:
    """Three pairs, one expert: p1 = 6/12, p2 = 3/9, u by fractions."""
    a, n = [[[3], [1]], [[2], [0]], [[1], [2]]], [[4, 3], [4, 2], [4, 4]]
    p1, p2 = Fraction(6, 12), Fraction(3, 9)
    u = [(x - p1 * m) / 12 - (y - p2 * k) / 9 for ((x,), (y,)), (m, k) in zip(a, n, strict=True)]
    assert sum(u) == 0
    variance = Fraction(3, 2) * sum(x * x for x in u)
    se = significance.standard_errors(table(a, n))
    assert se.shape == (1, 1)
    assert se[0, 0] == pytest.approx(math.sqrt(variance), rel=1e-14)
    # t with two degrees of freedom has closed forms
    t = float(p1 - p2) / math.sqrt(variance)
    assert significance.p_values([[1 / 6]], se, 3)[0, 0] == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert significance.half_widths(se, 3)[0, 0] == pytest.approx(se[0, 0] * math.sqrt(2 * 0.95**2 / (1 - 0.95**2)))


def test_one_token_a_pair_is_mcnemar() -> None:
    """2 x 2 table of matched pairs with one token a side: var = (b + c - (b - c)^2 / G) / (G (G - 1))."""
    both, only1, only2, neither = 5, 9, 3, 13
    cells = [(1, 1)] * both + [(1, 0)] * only1 + [(0, 1)] * only2 + [(0, 0)] * neither
    g = len(cells)
    pairs = table([[[x], [y]] for x, y in cells], np.ones((g, 2), dtype=int))
    expected = math.sqrt((only1 + only2 - (only1 - only2) ** 2 / g) / (g * (g - 1)))
    assert significance.standard_errors(pairs)[0, 0] == pytest.approx(expected, rel=1e-13)
    assert pairs.rd[0, 0] == pytest.approx((only1 - only2) / g)


def test_independent_sides_are_the_textbook_table() -> None:
    """A token a cluster, each cluster on one side alone: p1 (1 - p1) / N1 + p2 (1 - p2) / N2."""
    n = np.array([[1, 0]] * 40 + [[0, 1]] * 60)
    a = np.zeros((100, 2, 1), dtype=int)
    a[:10, 0], a[40:85, 1] = 1, 1
    expected = math.sqrt((0.25 * 0.75 / 40 + 0.75 * 0.25 / 60) * 100 / 99)
    assert significance.standard_errors(table(a, n))[0, 0] == pytest.approx(expected, rel=1e-13)


def test_against_the_bootstrap() -> None:
    """Resampling pairs gives the same standard errors, within what 2000 draws can tell."""
    rng = np.random.default_rng(3)
    pairs = clustered(rng, 150, [0.0, 0.1, -0.2, 0.3])
    drawn = rng.multinomial(150, np.full(150, 1 / 150), size=2000)
    sums = np.einsum("bp,pse->bse", drawn, pairs.a[:, :, 0])
    tokens = drawn @ pairs.n
    rd = sums[:, 0] / tokens[:, :1] - sums[:, 1] / tokens[:, 1:]
    assert significance.standard_errors(pairs)[0] == pytest.approx(rd.std(axis=0), rel=0.06)
    low, high = np.quantile(rd, [0.025, 0.975], axis=0)
    half = significance.half_widths(significance.standard_errors(pairs), 150)[0]
    assert pairs.rd[0] - half == pytest.approx(low, abs=0.12 * half.max())
    assert pairs.rd[0] + half == pytest.approx(high, abs=0.12 * half.max())


@pytest.mark.parametrize(("n_pairs", "n_runs"), [(12, 500), (80, 300)])
def test_coverage(n_pairs: int, n_runs: int) -> None:
    """A 95% interval covers the truth in about 95% of simulated runs; one that counts tokens as independent does not.

    Sides get tastes of their own here, so that the binomial interval is too narrow.
    """
    truth = np.array([0.0, 0.05, -0.15, 0.25])
    rng = np.random.default_rng(5)
    covered, naive, runs = 0, 0, 0
    for _ in range(n_runs):
        pairs = clustered(rng, n_pairs, truth, spread=2.0, tokens=(5, 60))
        rd = pairs.rd[0]
        half = significance.half_widths(significance.standard_errors(pairs), n_pairs)[0]
        tokens = pairs.n.sum(axis=0)
        p = pairs.a.sum(axis=0)[:, 0] / tokens[:, None]
        binomial = 1.96 * np.sqrt((p * (1 - p) / tokens[:, None]).sum(axis=0))
        covered += int((np.abs(rd - truth) <= half).sum())
        naive += int((np.abs(rd - truth) <= binomial).sum())
        runs += len(truth)
    assert 0.92 <= covered / runs <= 0.98
    assert naive / runs < 0.90


def test_p_values_are_uniform_without_an_effect() -> None:
    rng = np.random.default_rng(6)
    p = np.concatenate(
        [
            significance.p_values(pairs.rd, significance.standard_errors(pairs), 40).ravel()
            for pairs in (clustered(rng, 40, np.zeros(10), spread=2.0) for _ in range(100))
        ]
    )
    for level in (0.05, 0.2, 0.5, 0.8):
        assert (p <= level).mean() == pytest.approx(level, abs=4 * math.sqrt(level * (1 - level) / len(p)))


def test_holm_keeps_its_promise() -> None:
    """Without an effect, some expert is called significant in at most about 5% of maps; uncorrected in most."""
    rng = np.random.default_rng(7)
    wrong, uncorrected = 0, 0
    for _ in range(200):
        pairs = clustered(rng, 40, np.zeros(40), spread=2.0)
        p = significance.p_values(pairs.rd, significance.standard_errors(pairs), 40)
        wrong += int(significance.holm(p).min() <= 0.05)
        uncorrected += int(p.min() <= 0.05)
    assert wrong / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert uncorrected / 200 > 0.6


def test_no_spread() -> None:
    """Never selected: no difference. Always on one side, never on the other: all that so few pairs can show."""
    a = np.zeros((5, 2, 3), dtype=int)
    a[:, 0, 1], a[:, :, 2] = 7, 7
    pairs = table(a, np.full((5, 2), 7))
    se = significance.standard_errors(pairs)
    assert se.tolist() == [[0, 0, 0]]
    assert significance.p_values(pairs.rd, se, 5).tolist() == [[1, 2**-4, 1]]
    # rates of 0.7 and 0.1 in every pair: what is left is rounding
    tens = np.random.default_rng(0).integers(1, 1000, size=(50, 2))
    pairs = table(np.stack([7 * tens, tens], axis=2), 10 * tens)
    assert significance.standard_errors(pairs).tolist() == [[0, 0]]


def test_few_pairs_and_empty_sides() -> None:
    for function in (significance.standard_errors, significance.split_half):
        with pytest.raises(UsageError, match="at least two"):
            function(table([[[1], [1]]], [[1, 1]]))
    for function in (significance.standard_errors, significance.shuffled_control):
        with pytest.raises(UsageError, match="without target tokens"):
            function(table([[[1], [0]]] * 3, [[1, 0]] * 3))
    for level in (0.0, 1.0, -1.0, 95.0):
        with pytest.raises(UsageError, match="level: "):
            significance.t_quantile(level, 3)
    with pytest.raises(UsageError, match="at least two"):
        significance.t_quantile(0.95, 0)


@pytest.mark.parametrize(
    ("df", "t"),
    [
        (1, math.tan(0.475 * math.pi)),
        (2, math.sqrt(2 * 0.95**2 / (1 - 0.95**2))),
        (5, 2.570582),
        (10, 2.228139),
        (30, 2.042272),
        (120, 1.979930),
        (1000, 1.962339),
    ],
)
def test_student(df: int, t: float) -> None:
    """Closed forms and printed tables of Student's t (two-sided 5%), and the integral of its density."""
    assert significance.t_quantile(0.95, df) == pytest.approx(t, rel=1e-12 if df < 3 else 3e-7)
    for at in (0.01, 0.5, 1.0, 3.0, 8.0):
        p = float(significance.p_values([at], [1.0], df + 1)[0])
        # the substitution t = at / s turns the tail into an integral over 0 to 1 (midpoint rule)
        s = (np.arange(200_000) + 0.5) / 200_000
        log_density = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(df * math.pi)
        density = np.exp(log_density - (df + 1) / 2 * np.log1p((at / s) ** 2 / df))
        tail = 2 * float((density * at / s**2).mean())
        assert p == pytest.approx(max(tail, 2.0**-df), rel=1e-6)


def test_student_at_the_ends() -> None:
    p = significance.p_values([0.0, 1.0, 1e200, 1e-200], [0.0, 0.0, 1.0, 1.0], 100_000)
    assert p[0] == p[3] == 1
    assert 0 < p[1] == p[2] < 1e-290
    assert significance.t_quantile(0.95, 10**9) == pytest.approx(1.95996, rel=1e-3)
    falling = significance.p_values(np.linspace(0, 30, 400), np.ones(400), 3000)
    assert (np.diff(falling) < 0).all()
    assert 0 < falling[-1] < 1e-150


#
# corrections
#


def test_corrections_by_hand() -> None:
    p = [[0.01, 0.04], [0.03, 0.005]]
    assert significance.holm(p) == pytest.approx(np.array([[0.03, 0.06], [0.06, 0.02]]))
    assert significance.benjamini_hochberg(p) == pytest.approx(np.array([[0.02, 0.04], [0.04, 0.02]]))
    assert significance.holm([1.0, 0.9]).tolist() == [1, 1]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrections_are_ordered(values: list[float]) -> None:
    p = np.array(values)
    by_holm, by_bh = significance.holm(p), significance.benjamini_hochberg(p)
    tolerance = 1e-12
    assert (p <= by_bh + tolerance).all()
    assert (by_bh <= by_holm + tolerance).all()
    assert (by_holm <= np.minimum(p * len(p), 1) + tolerance).all()
    order = np.argsort(p, kind="stable")
    assert (np.diff(by_holm[order]) >= 0).all()
    assert (np.diff(by_bh[order]) >= 0).all()


#
# properties
#


def tables(data: Any) -> InMemory:
    n_pairs, n_expert = data.draw(st.integers(2, 8)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    n = rng.integers(1, 20, size=(n_pairs, 2))
    return table(rng.integers(0, n[:, :, None] + 1, size=(n_pairs, 2, n_expert)), n)


@given(st.data())
def test_swapping_all_sides_negates(data: Any) -> None:
    pairs = tables(data)
    swapped = InMemory(pairs.a[:, ::-1], pairs.n[:, ::-1])
    assert swapped.rd == pytest.approx(-pairs.rd)
    assert significance.standard_errors(swapped) == pytest.approx(significance.standard_errors(pairs), abs=1e-15)
    assert significance.split_half(swapped, 2, 5) == significance.split_half(pairs, 2, 5)


@settings(max_examples=50)
@given(st.data(), st.integers(1, 8))
def test_order_and_chunks_do_not_matter(data: Any, step: int) -> None:
    pairs = tables(data)
    order = np.random.default_rng(1).permutation(len(pairs.n))
    other = InMemory(pairs.a[order], pairs.n[order], step=step)
    assert significance.standard_errors(other) == pytest.approx(
        significance.standard_errors(pairs), rel=1e-9, abs=1e-15
    )
    chunked = InMemory(pairs.a, pairs.n, step=step)
    assert significance.split_half(chunked, 2, 5) == significance.split_half(pairs, 2, 5)


@given(st.data())
def test_all_pairs_twice_halve_the_variance(data: Any) -> None:
    """Var = G/(G-1) sum u^2: u is halved, there are twice as many."""
    pairs = tables(data)
    g = len(pairs.n)
    twice = InMemory(np.concatenate([pairs.a, pairs.a]), np.concatenate([pairs.n, pairs.n]))
    factor = math.sqrt((g - 1) / (2 * g - 1))
    expected = significance.standard_errors(pairs) * factor
    assert significance.standard_errors(twice) == pytest.approx(expected, rel=1e-9, abs=1e-15)


#
# correlations and overlap
#


def test_correlations_by_hand() -> None:
    assert significance.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert significance.pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert significance.spearman([1, 2, 3, 4], [1, 100, 2, 1000]) == pytest.approx(0.8)
    # ties: ranks 1, 2.5, 2.5, 4 against 1..4
    assert significance.spearman([1, 5, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert significance.pearson([1, 1], [1, 2]) == 0


def test_overlap_is_signed() -> None:
    x = np.array([[0.5, -0.4, 0.3, 0.0]])
    assert significance.overlap(x, x, 2) == 1
    assert significance.overlap(x, -x, 2) == 0
    assert significance.overlap(x, np.array([[0.5, 0.4, 0.0, 0.1]]), 2) == 0.5
    assert significance.overlap(x, x, 99) == 1


#
# halves and the shuffled control
#


def test_halves_tell_signal_from_noise() -> None:
    rng = np.random.default_rng(8)
    signal = significance.split_half(clustered(rng, 100, np.linspace(-0.3, 0.3, 30)), 8, 40)
    noise = significance.split_half(clustered(rng, 100, np.zeros(30)), 8, 40)
    assert signal.spearman > 0.9
    assert signal.overlap > 0.7
    assert abs(noise.spearman) < 0.3
    # by chance two sets of 8 of 30 with one of two signs each share 8/30/2
    assert noise.overlap < 0.35
    assert significance.split_half(clustered(np.random.default_rng(8), 100, np.zeros(30)), 8, 40, seed=1).repeats == 40


def test_halves_by_hand() -> None:
    """Two pairs have one halving: RD of the one against RD of the other, each by its own tokens."""
    pairs = table([[[1, 2, 0, 1], [6, 0, 3, 2]], [[8, 1, 5, 9], [0, 2, 1, 0]]], [[2, 9], [10, 2]])
    one, two = ([x / n for x in a] for a, n in ((pairs.a[0, 0, 0], 2), (pairs.a[1, 0, 0], 10)))
    one -= pairs.a[0, 1, 0] / 9
    two -= pairs.a[1, 1, 0] / 2
    made = significance.split_half(pairs, 2, 7)
    # RD of the pairs: -1/6 1 -1/3 5/18 and 4/5 -9/10 0 9/10
    assert made.spearman == pytest.approx(significance.spearman(np.abs(one), np.abs(two)))
    assert two == pytest.approx([0.8, -0.9, 0, 0.9])
    # the first three are +1 -2 +3 and -1 +3 +0
    assert made.overlap == 0
    assert significance.split_half(pairs, 3, 7).overlap == pytest.approx(1 / 3)


def test_control_tells_signal_from_noise() -> None:
    rng = np.random.default_rng(9)
    largest, summed = significance.shuffled_control(clustered(rng, 60, [0.2] + [0.0] * 20), 5, 499)
    assert largest.p == summed.p == 1 / 500
    assert largest.value > largest.q95 > largest.median > 0
    passed = 0
    for _ in range(100):
        one, two = significance.shuffled_control(clustered(rng, 30, np.zeros(20), spread=2.0), 5, 99)
        passed += int(2 * min(one.p, two.p) <= 0.05)
    assert passed <= 11  # 5 expected; 3 standard deviations


def test_control_of_few_pairs_by_all_swaps() -> None:
    """Three pairs have 8 swaps; the share of them at least as large as the map is what many draws approach."""
    pairs = table([[[5, 0], [1, 2]], [[4, 1], [2, 2]], [[1, 3], [2, 1]]], [[5, 3], [5, 4], [4, 3]])
    sizes = []
    for swaps in np.ndindex(2, 2, 2):
        picks = np.stack([np.asarray(swaps), 1 - np.asarray(swaps)], axis=1)
        a = np.take_along_axis(pairs.a[:, :, 0], picks[:, :, None], axis=1).sum(axis=0)
        n = np.take_along_axis(pairs.n, picks, axis=1).sum(axis=0)
        sizes.append(np.abs(a[0] / n[0] - a[1] / n[1]).max())
    exact = float(np.mean(np.asarray(sizes) >= sizes[0] - 1e-12))
    assert sizes[0] == pytest.approx(np.abs(pairs.rd).max())
    largest, _ = significance.shuffled_control(pairs, 1, 4000)
    assert largest.value == pytest.approx(sizes[0])
    assert largest.p == pytest.approx(exact, abs=0.03)


#
# annotating a map
#


def made_map(tmp_path: Path, n_pairs: int = 30) -> tuple[ExpertMap, PairCounts]:
    pairs = PairCounts.load(write(tmp_path / "a.npz", random_pairs(1, n_pairs)))
    return ExpertMap.from_counts(pairs.total()), pairs


def test_annotate(tmp_path: Path) -> None:
    expert_map, pairs = made_map(tmp_path)
    annotated = significance.annotate(expert_map, pairs, draws=99, repeats=10)
    assert np.array_equal(annotated.rd, expert_map.rd)
    assert annotated.se is not None
    assert np.array_equal(annotated.se, significance.standard_errors(pairs))
    confidence = annotated.confidence
    assert confidence is not None
    assert (confidence.n_pairs, confidence.moe_layers, confidence.top_n) == (30, (1, 2), 8)
    assert not confidence.differs_from_shuffled  # random choices
    annotated.save(tmp_path / "map.json")
    again = ExpertMap.load(tmp_path / "map.json")
    assert again.to_json() == annotated.to_json()
    assert again.confidence == confidence
    assert significance.annotate(expert_map, pairs, draws=99, repeats=10).to_json() == annotated.to_json()
    p = significance.corrected_p(annotated)
    assert (p[0] == 1).all()
    raw = significance.p_values(annotated.rd[1:], annotated.se[1:], 30)
    assert np.array_equal(p[1:], significance.holm(raw))
    with pytest.raises(UsageError, match="steermoe map stats"):
        significance.corrected_p(expert_map)


def test_annotate_refuses_other_pairs(tmp_path: Path) -> None:
    expert_map, _ = made_map(tmp_path)
    other = PairCounts.load(write(tmp_path / "b.npz", random_pairs(2, 30)))
    with pytest.raises(FormatError, match="take the two"):
        significance.annotate(expert_map, other)


def test_annotate_one_pair(tmp_path: Path) -> None:
    expert_map, pairs = made_map(tmp_path, 1)
    assert significance.annotate(expert_map, pairs) is expert_map


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_the_model_need_not_be_small(seed: int) -> None:
    """Chunked files and arrays in memory give the same."""
    model = identity(4, 9, 3)
    _, a, n = random_pairs(seed, 5, model)
    pairs = InMemory(a, n, (1, 2, 3), step=2)
    se = significance.standard_errors(pairs)
    assert (se[0] == 0).all()
    # a layer's rates sum to k on both sides, so a pair's contributions of a layer sum to 0
    totals = n.sum(axis=0)
    u = (a - (a.sum(axis=0) / totals[:, None, None]) * n[:, :, None, None]) / totals[:, None, None]
    assert (u[:, 0] - u[:, 1]).sum(axis=2) == pytest.approx(0, abs=1e-12)
