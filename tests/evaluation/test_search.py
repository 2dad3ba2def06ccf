"""The search for numbers of experts, on formulas against brute force; its pick, its space and its budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.errors import ChoiceError, UsageError
from steermoe_local.evaluation.measuring.measurements import Answer, Measurement
from steermoe_local.evaluation.studies.search.algorithm import (
    Candidate,
    Search,
    Trial,
    _outwards,
    pick,
    strongest,
    within_error,
)
from steermoe_local.evaluation.studies.search.candidate_evaluator import split
from steermoe_local.evaluation.studies.search.objective import Budget, objective_values, search_space, standard_error
from steermoe_local.steering.steering import Steering
from tests.support.builders import table_map
from tests.support.fake_evaluator import SURFACES, Surface, rising, wide_map

LAST = (20, 41)


N_ITEMS = 60


def surface_search(effect: Surface, nll: Surface, noise: float = 0.0, seed: int = 0, **limits: Any) -> Any:
    """(the search, everything there is as trials, expected gain of a candidate) on a formula."""
    latent = np.random.default_rng(seed).permutation(N_ITEMS) / N_ITEMS

    def rate(candidate: Candidate) -> float:
        return float(np.clip(0.4 + effect(*candidate), 0, 1))

    base = (latent < 0.4).astype(float)
    asked: list[Candidate] = []

    def evaluate(candidate: Candidate, step: str) -> Trial:
        asked.append(candidate)
        if candidate == (0, 0):
            return Trial(candidate, np.zeros(N_ITEMS), "", step)
        if nll(*candidate) > 0.05:
            return Trial(candidate, None, "perplexity", step)
        shift = np.random.default_rng([seed, *candidate]).normal(0, noise, N_ITEMS) if noise else 0.0
        return Trial(candidate, (latent + shift < rate(candidate)).astype(float) - base, "", step)

    search = Search(evaluate, LAST, float((1 - base).mean()), **limits)
    found = search.run()
    assert len(set(asked)) == len(asked), "a candidate was evaluated twice"
    return found, evaluate, lambda candidate: rate(candidate) - 0.4


def best_expected(nll: Surface, gain: Callable[[Candidate], float]) -> float:
    candidates = [(i, j) for i in range(LAST[0] + 1) for j in range(LAST[1] + 1) if nll(i, j) <= 0.05]
    return max(gain(candidate) for candidate in candidates)


@pytest.mark.parametrize("name", SURFACES)
def test_against_brute_force(name: str) -> None:
    """Without noise: nearly the best gain there is, for a few of all choices, never outside the budget."""
    effect, nll = SURFACES[name]
    found, _, gain = surface_search(effect, nll)
    chosen = pick(found.trials)
    best = best_expected(nll, gain)
    assert chosen is not None
    assert chosen.gains is not None
    assert nll(*chosen.candidate) <= 0.05
    most = strongest(found.trials)
    assert most is not None
    assert gain(most.candidate) >= best - 0.04, f"{most.candidate}: {gain(most.candidate)} of {best}"
    assert gain(chosen.candidate) >= gain(most.candidate) - 0.04, (
        "within one standard error: one of 60 items, and rounding"
    )
    assert len(found.trials) - 1 <= 60
    assert len(found.trials) < 0.07 * (LAST[0] + 1) * (LAST[1] + 1)


@pytest.mark.parametrize("name", SURFACES)
@pytest.mark.parametrize("seed", range(3))
def test_with_noise(name: str, seed: int) -> None:
    """Items that answer by chance too: the pick stays within 1.5 standard errors of a rate from the best."""
    effect, nll = SURFACES[name]
    found, _, gain = surface_search(effect, nll, noise=0.08, seed=seed)
    chosen = pick(found.trials)
    assert chosen is not None
    assert nll(*chosen.candidate) <= 0.05
    assert gain(chosen.candidate) >= best_expected(nll, gain) - 1.5 * (0.25 / N_ITEMS) ** 0.5
    assert len(found.trials) - 1 <= 80


def test_flat_negative_and_forbidden() -> None:
    for effect in (lambda i, j: 0.0, lambda i, j: -0.3 * rising(i + j, 5)):
        found, _, _ = surface_search(effect, lambda i, j: 0.0)
        chosen = pick(found.trials)
        assert chosen is not None
        assert chosen.candidate == (0, 0)
    found, _, _ = surface_search(lambda i, j: 0.5, lambda i, j: 1.0)
    chosen = pick(found.trials)
    assert chosen is not None
    assert chosen.candidate == (0, 0)
    assert len(found.trials) - 1 <= 6, "each axis stops after two broken budgets"
    assert all("the budget was broken 2 times in a row, last: perplexity" in step for step in found.steps)


def test_early_stops() -> None:
    """Full: nothing larger is tried. Beyond the peak: two worse steps end it. One broken step does not."""
    found, _, _ = surface_search(lambda i, j: 0.6 if j >= 4 or i >= 2 else 0.0, lambda i, j: 0.0)
    assert max(trial.candidate[1] for trial in found.trials) == 4
    assert pick(found.trials).candidate == (2, 0)  # type: ignore[union-attr]
    assert (4, 0) not in [trial.candidate for trial in found.trials]

    found, _, _ = surface_search(lambda i, j: 0.4 if 2 <= j <= 6 and not i else 0.0, lambda i, j: 0.0)
    assert [trial.candidate[1] for trial in found.trials][1:8] == [1, 2, 4, 8, 16, 3, 0], "growing steps, then the gaps"
    assert found.steps[0] == "more suppressed alone: the gain was beyond its peak 2 times in a row"

    found, _, _ = surface_search(lambda i, j: 0.01 * j, lambda i, j: 1.0 if j == 8 or i else 0.0)
    assert [trial.candidate[1] for trial in found.trials][1:8] == [1, 2, 4, 8, 16, 32, 41]


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(0, 12), st.integers(0, 25))
def test_whatever_the_surface(seed: int, max_trials: int, last_i: int, last_j: int) -> None:
    """On any surface: within the limits, each candidate once, pick inside the budget and as the rule says."""
    rng = np.random.default_rng(seed)
    asked: list[Candidate] = []

    def evaluate(candidate: Candidate, step: str) -> Trial:
        asked.append(candidate)
        inside = candidate == (0, 0) or rng.random() < 0.7
        gains = np.zeros(9) if candidate == (0, 0) else rng.integers(-1, 2, 9).astype(float)
        return Trial(candidate, gains if inside else None, "" if inside else "no", step)

    found = Search(evaluate, (last_i, last_j), 1.0, max_trials=max_trials).run()
    assert asked[0] == (0, 0)
    assert len(set(asked)) == len(asked) <= max_trials + 1
    assert all(0 <= i <= last_i and 0 <= j <= last_j for i, j in asked)
    chosen, best = pick(found.trials), strongest(found.trials)
    assert chosen is not None
    assert best is not None
    assert chosen.gains is not None
    assert chosen.n_experts <= best.n_experts
    assert within_error(chosen, best)


@given(st.integers(0, 3000), st.integers(0, 3000))
def test_outwards(start: int, last: int) -> None:
    last = max(start, last)
    up, down = _outwards(start, last)
    assert up == sorted(set(up))
    assert down == sorted(set(down), reverse=True)
    assert all(start < n <= last for n in up)
    assert all(0 <= n < start for n in down)
    assert not up or up[-1] == last
    assert not down or down[-1] == 0
    assert len(up) + len(down) <= 40


def trial(candidate: Candidate, *gains: float) -> Trial:
    return Trial(candidate, np.array(gains))


def test_one_standard_error() -> None:
    """By hand: 1 of 4 items behind is 0.25 with a standard error of 0.25; 2 of 4 are 0.5 with one of 0.289."""
    best = trial((4, 4), 1, 1, 1, 1)
    one, two = trial((1, 0), 1, 1, 1, 0), trial((0, 1), 1, 1, 0, 0)
    assert standard_error(best.gains - one.gains) == pytest.approx(0.25)  # type: ignore[operator]
    assert standard_error(best.gains - two.gains) == pytest.approx(0.5 / 3**0.5)  # type: ignore[operator]
    assert within_error(one, best)
    assert not within_error(two, best)
    assert pick([trial((0, 0), 0, 0, 0, 0), best, one, two]) is one
    assert pick([best, trial((2, 6), 1, 1, 1, 1)]) is best
    assert strongest([one, trial((1, 1), 1, 1, 1, 0)]) is one
    assert pick([Trial((1, 1), None, "no")]) is None
    assert standard_error(np.array([1.0])) == 0


#
# what is chosen from
#


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(2, 9), st.booleans())
def test_space_is_all_different_choices(seed: int, n_layer: int, n_expert: int, reverse: bool) -> None:
    """Against choosing every number: the same choices, each once, and only those that the model can carry out."""
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, n_expert))
    made = table_map(np.round(rng.uniform(-1, 1, (n_layer, n_expert)), 1), k)
    steering = Steering("x", expert_map=made, reverse=reverse)

    def choices(**numbers: int) -> bytes | None:
        try:
            return made.choose(numbers.get("a", 0), numbers.get("d", 0), reverse=reverse).tobytes()
        except ChoiceError:
            return None

    found = search_space(steering)
    numbers = range(n_layer * n_expert + 1)
    for given_, axis in ((found.activate, "a"), (found.deactivate, "d")):
        every = [choices(**{axis: n}) for n in numbers]
        ours = [choices(**{axis: n}) for n in given_]
        assert None not in ours
        assert len(set(ours)) == len(ours)
        assert set(ours) == set(every) - {None}
        assert given_[0] == 0
        assert list(given_) == sorted(given_)
    assert found.n_choices == len(found.activate) * len(found.deactivate) - 1


def test_space_needs_a_map_and_layers_that_are_there(tmp_path: Path) -> None:
    made = wide_map()
    assert (
        search_space(Steering("x", expert_map=made, layers="2")).n_choices
        < search_space(Steering("x", expert_map=made)).n_choices
    )
    with pytest.raises(ChoiceError, match="layer 9"):
        search_space(Steering("x", expert_map=made, layers="9"))
    bias = Steering("x", expert_map=made, activate=1).build()
    with pytest.raises(UsageError, match=r"x: .*--map"):
        search_space(Steering("x", bias=bias))


def test_split() -> None:
    ids = [f"q{i}" for i in range(41)]
    one, two = split(ids, seed=3)
    assert sorted(one + two) == sorted(ids)
    assert list(one) == [name for name in ids if name in one], "in the items' order"
    assert abs(len(one) - len(two)) <= 1
    assert split(ids, seed=3) == (one, two)
    assert split(ids, seed=4) != (one, two)
    assert len(split(ids, share=0.25)[0]) == 10
    for bad in ({"share": 0.0}, {"share": 1.0}, {"share": float("nan")}):
        with pytest.raises(UsageError, match="share"):
            split(ids, **bad)
    with pytest.raises(UsageError, match="7 items"):
        split(ids[:7])
    split(ids[:8])


def test_broken_answers_are_on_no_side() -> None:
    def answer(item: str, value: float, label: str, text: str = "x", seed: int = 0) -> Answer:
        return Answer(item, seed, text, value, label, "stop", 3, 1.0, 0.0)

    answers = (
        answer("a", 1, "positive"),
        answer("b", 0, "negative"),
        answer("c", 0, "ill-formed"),
        answer("d", 0, "negative", text=" \n"),
        answer("e", 1, "positive"),
        answer("e", 0, "negative", seed=1),
    )
    measured = Measurement(None, "unsteered", answers)
    assert objective_values(measured).tolist() == [1, 0, 0, 0, 0.5]
    assert objective_values(measured, reverse=True).tolist() == [0, 1, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({}, "--max-ppl-increase, --max-kl"),
        ({"max_refusal_increase": 0.1}, "--max-ppl-increase, --max-kl"),
        ({"max_kl": -1.0}, "max_kl: -1.0"),
        ({"max_ppl_increase": float("nan")}, "max_ppl_increase: nan"),
        ({"max_ppl_increase": float("inf")}, "max_ppl_increase: inf"),
    ],
)
def test_budgets(limits: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Budget(**limits)
    assert str(Budget(0.05, 0.1)) == "perplexity at most +5%, KL at most 0.1 nats"
