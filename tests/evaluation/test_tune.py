"""The search for numbers of experts: on formulas against brute force, its rules one by one, and on the model."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.errors import ChoiceError, UsageError
from steermoe_local.evaluation.measuring.measurements import Answer, Measurement, bias_key
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
from steermoe_local.evaluation.studies.search.tune import Tuning, exhaustive, tune
from steermoe_local.steering.steering import Steering
from tests.support.builders import table_map
from tests.support.fake_evaluator import FakeEvaluator, Surface, wide_map
from tests.support.paths import ROOT

LAST = (20, 41)


def rising(n: float, scale: float) -> float:
    """Towards 1, saturating."""
    return 1 - float(np.exp(-n / scale))


# effect and increase of nll (budget: 0.05), of i promoted and j suppressed
SURFACES: dict[str, tuple[Surface, Surface]] = {
    "both help, saturating": (lambda i, j: 0.6 * rising(i + j, 6), lambda i, j: 0.001 * (i + j)),
    "suppressed only": (lambda i, j: 0.5 * rising(j, 8), lambda i, j: 0.002 * j + 0.01 * i),
    "promoted only": (lambda i, j: 0.5 * rising(i, 3), lambda i, j: 0.002 * (i + j)),
    "collapsing": (lambda i, j: 0.5 * rising(j, 5) - 0.004 * max(0, j - 15) ** 2, lambda i, j: 0.0001 * (i + j)),
    "only together": (lambda i, j: 0.6 * rising(min(i, j), 4), lambda i, j: 0.001 * (i + j)),
    "a tight budget": (lambda i, j: 0.3 * rising(i, 5) + 0.3 * rising(j, 10), lambda i, j: 0.003 * i + 0.0015 * j),
    "late": (lambda i, j: 0.5 / (1 + float(np.exp(-(j - 20) / 2))), lambda i, j: 0.001 * j),
    "monotone, no price": (lambda i, j: 0.014 * (i + j) * 60 / 61, lambda i, j: 0.0),
}
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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=40, deadline=None)
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
    with pytest.raises(ChoiceError, match="no layer 9"):
        search_space(Steering("x", expert_map=made, layers="9"))
    bias = Steering("x", expert_map=made, activate=1).build()
    with pytest.raises(UsageError, match=r"give the map with --map MAP"):
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
    with pytest.raises(UsageError, match="7 items are too few"):
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
        ({}, "a fluency budget is needed"),
        ({"max_refusal_increase": 0.1}, "a fluency budget is needed"),
        ({"max_kl": -1.0}, "max_kl: -1.0 is not a limit"),
        ({"max_ppl_increase": float("nan")}, "max_ppl_increase: nan"),
        ({"max_ppl_increase": float("inf")}, "max_ppl_increase: inf"),
    ],
)
def test_budgets(limits: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Budget(**limits)
    assert str(Budget(0.05, 0.1)) == "perplexity at most +5%, KL at most 0.1 nats"


#
# with an evaluator
#

STRONG: tuple[Surface, Surface] = (lambda i, j: 0.5 * rising(j + 2 * i, 6), lambda i, j: 0.001 * (i + j))


def fake(effect: Surface = STRONG[0], nll: Surface = STRONG[1], **options: Any) -> tuple[FakeEvaluator, Any]:
    made = wide_map()
    evaluator = FakeEvaluator(made, effect, nll, **options)
    return evaluator, made


def run(evaluator: Any, made: Any, method: Any = tune, **options: Any) -> Tuning:
    budget = options.pop("budget", Budget(max_ppl_increase=0.05))
    choice = {name: options.pop(name) for name in ("reverse", "layers", "scale") if name in options}
    result = method(evaluator, Steering("made-up", expert_map=made, **choice), budget, **options)
    assert isinstance(result, Tuning)
    json.dumps(result.to_dict(), allow_nan=False)
    return result


def test_a_tuning() -> None:
    evaluator, made = fake(noise=0.05, n_items=120)
    result = run(evaluator, made)
    assert result.outcome == "found"
    assert result.bias is not None
    assert result.chosen is not None
    assert result.heldout is not None
    assert result.choosing is not None
    assert result.fluency is not None
    assert (result.bias.n_active, result.bias.n_inactive) == (result.chosen.n_active, result.chosen.n_inactive)
    assert json.loads(result.bias.provenance["choice"])["activate"] == result.chosen.activate
    assert json.loads(result.bias.provenance["choice"])["deactivate"] == result.chosen.deactivate
    assert result.bias.provenance["map_sha256"] == made.sha256
    assert result.heldout.gain.n == len(result.heldout_items) == 60
    assert result.heldout.certain
    assert result.heldout.gain.value == pytest.approx(result.heldout.steered.value - result.heldout.unsteered.value)
    assert result.fluency.perplexity_ratio is not None
    assert result.fluency.perplexity_ratio <= 1.05
    assert result.n_measured <= len(result.trials) < 0.02 * result.n_grid
    assert result.n_grid == search_space(Steering("x", expert_map=made)).n_choices


def test_held_out_items_are_never_seen_by_the_search() -> None:
    """All calls but the last ones ask for items of the choosing part alone."""
    for method in (tune, exhaustive):
        evaluator, made = fake(noise=0.05)
        limits: dict[str, Any] = {} if method is tune else {"activate": range(6), "deactivate": range(6)}
        result = run(evaluator, made, method, **limits)
        choosing, heldout = set(result.choosing_items), set(result.heldout_items)
        assert not choosing & heldout
        seen = [bool(set(call["items"]) & heldout) for call in evaluator.calls]
        first = seen.index(True)
        assert all(call["what"] == "check" for call in evaluator.calls[first:])
        # what is asked of them: the unsteered model, the pick, and the strongest
        asked = {key for call in evaluator.calls for key in call["keys"] if set(call["items"]) & heldout}
        assert len(asked) <= 3
        assert all(set(call["items"]) <= choosing for call in evaluator.calls[:first])


def test_other_held_out_values_do_not_change_the_choice() -> None:
    """What the model does on the held-out part cannot have steered the search."""
    evaluator, made = fake(noise=0.05)
    result = run(evaluator, made)
    other, _ = fake(noise=0.05)
    for n, item in enumerate(other.task.items):
        if item.id in result.heldout_items:
            other.latent[n] = 1 - other.latent[n]
    again = run(other, made)
    assert [t.gain for t in again.trials] == [t.gain for t in result.trials]
    assert again.chosen == result.chosen
    assert again.heldout != result.heldout


def test_text_before_answers() -> None:
    """A choice whose text breaks the budget is asked for one item alone, and never for more."""
    evaluator, made = fake(nll=lambda i, j: 0.01 * (i + j))
    result = run(evaluator, made)
    over = [t for t in result.trials if t.over]
    assert over
    assert not any(t.answered for t in over)
    assert all(t.gain is None for t in over)
    steering = Steering("made-up", expert_map=made)
    for t in over:
        key = bias_key(steering.changed(activate=t.activate, deactivate=t.deactivate).build())
        assert {len(call["items"]) for call in evaluator.calls if key in call["keys"]} == {1}
    inside = sum(t.answered for t in result.trials)
    assert result.n_answers == (inside + 1) * len(result.choosing_items) + len(over)


@pytest.mark.parametrize("limit", ["ppl", "kl", "refusal", "looping"])
def test_each_limit_is_kept(limit: str) -> None:
    budgets = {
        "ppl": Budget(max_ppl_increase=float(np.expm1(0.008))),
        "kl": Budget(max_kl=0.008),
        "refusal": Budget(max_kl=1.0, max_refusal_increase=0.1),
        "looping": Budget(max_kl=1.0, max_looping_increase=0.1),
    }
    share: Surface = lambda i, j: min(1.0, 0.0125 * (i + j))  # noqa: E731
    evaluator, made = fake(lambda i, j: 0.02 * (i + j), lambda i, j: 0.001 * (i + j), refusals=share, looping=share)
    result = run(evaluator, made, budget=budgets[limit])
    assert result.chosen is not None
    assert 0 < result.chosen.n_active + result.chosen.n_inactive <= 10, "more would be stronger, and break the limit"
    assert all(t.gain is None for t in result.trials if t.over)
    assert any(t.over for t in result.trials)
    words = {"ppl": "perplexity", "kl": "KL", "refusal": "refuses", "looping": "loop"}
    assert all(words[limit] in t.over for t in result.trials if t.over)


def test_the_other_side() -> None:
    """Reversed: the gain is of the negative side, and stammering is no gain."""
    evaluator, made = fake(lambda i, j: -0.3 * rising(i + j, 4))
    result = run(evaluator, made, reverse=True)
    assert result.outcome == "found"
    assert result.heldout is not None
    assert result.heldout.gain.value > 0.2
    assert result.heldout.steered.value < result.heldout.unsteered.value
    assert result.bias is not None
    assert json.loads(result.bias.provenance["choice"])["reverse"] is True

    evaluator, made = fake(lambda i, j: 0.0, broken=lambda i, j: 0.0 if i + j == 0 else 0.6)
    result = run(evaluator, made, reverse=True)
    assert result.outcome == "no effect"


def test_honest_ends() -> None:
    evaluator, made = fake(nll=lambda i, j: 1.0 * (i + j > 0))
    result = run(evaluator, made)
    assert result.outcome == "nothing inside the budget"
    assert "perplexity +171.8%" in result.reason
    evaluator, made = fake(lambda i, j: 0.0)
    assert run(evaluator, made).outcome == "no effect"
    evaluator, made = fake(lambda i, j: 0.6, looping=lambda i, j: 0.0)
    evaluator.latent = np.zeros_like(evaluator.latent)
    result = run(evaluator, made)
    assert result.outcome == "no effect"
    assert "nothing to gain" in result.reason
    made = table_map(np.full((2, 6), -0.1), 2)
    result = run(FakeEvaluator(made, lambda i, j: 0.0), made, max_deactivate=0)
    assert result.outcome == "no effect"
    assert "no experts" in result.reason
    for outcome in (result,):
        assert outcome.bias is None
        assert outcome.chosen is None
        assert outcome.heldout is None


def test_not_confirmed() -> None:
    """A gain that is there on the choosing part alone: reported, but no bias."""
    evaluator, made = fake(lambda i, j: 0.0, n_items=80)
    choosing, _ = split([item.id for item in evaluator.task.items])
    places = {name: n for n, name in enumerate(item.id for item in evaluator.task.items)}
    evaluator.effect = lambda i, j: 0.2 * (i + j > 0)
    evaluator.latent[:] = 0.9
    for name in choosing[:12]:
        evaluator.latent[places[name]] = 0.5
    result = run(evaluator, made)
    assert result.outcome == "not confirmed"
    assert result.bias is None
    assert result.chosen is not None
    assert result.choosing is not None
    assert result.choosing.gain.value == pytest.approx(0.3)
    assert result.heldout is not None
    assert result.heldout.gain.value == 0
    assert "may be none" in result.reason


def test_noise_alone_is_rarely_called_an_effect() -> None:
    """A map without an effect: the held-out part sorts out what the search took for one."""
    outcomes = []
    for seed in range(12):
        evaluator, made = fake(lambda i, j: 0.0, noise=0.2, seed=seed)
        outcomes.append(run(evaluator, made, seed=seed).outcome)
    assert outcomes.count("found") <= 1


def test_usage() -> None:
    evaluator, made = fake(neutral=False)
    with pytest.raises(UsageError, match="--neutral FILE"):
        run(evaluator, made)
    evaluator, made = fake()
    with pytest.raises(UsageError, match="--benign FILE"):
        run(evaluator, made, budget=Budget(max_kl=1.0, max_refusal_increase=0.1))
    assert not evaluator.calls, "told before anything is measured"
    for bad in ({"max_trials": 0}, {"max_activate": -1}, {"max_deactivate": -2}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            run(evaluator, made, **bad)


def test_a_limit_far_beyond_all_experts() -> None:
    """It is no limit; and it is not counted up to."""
    evaluator, made = fake()
    assert run(evaluator, made, max_activate=10**12, max_deactivate=10**12).n_grid == run(evaluator, made).n_grid


def test_against_the_grid() -> None:
    """The same pick rule on every choice there is: about the same gain, for a small part of the answers."""
    for name in ("both help, saturating", "a tight budget", "collapsing"):
        effect, nll = SURFACES[name]
        evaluator, made = fake(effect, nll, n_items=120)
        ours = run(evaluator, made, max_activate=20, max_deactivate=41)
        grid = run(evaluator, made, exhaustive, activate=range(21), deactivate=range(42))
        assert ours.outcome == grid.outcome == "found"
        assert ours.n_grid == grid.n_grid == len(grid.trials)
        assert ours.heldout is not None
        assert grid.heldout is not None
        assert ours.heldout.gain.value >= grid.heldout.gain.value - 0.12
        assert ours.n_answers < 0.15 * grid.n_answers


def test_numbers_of_a_coarse_grid() -> None:
    evaluator, made = fake()
    result = run(evaluator, made, exhaustive, activate=(0, 4), deactivate=(2, 10_000))
    numbers = {(t.n_active, t.n_inactive) for t in result.trials}
    most = len(search_space(Steering("x", expert_map=made)).deactivate) - 1
    assert result.n_grid == len(result.trials) == 5
    for found in result.trials:
        bias = Steering("x", expert_map=made, activate=found.activate, deactivate=found.deactivate).build()
        assert bias is not None
        assert (bias.n_active, bias.n_inactive) == (found.n_active, found.n_inactive)
    assert {j for _, j in numbers} == {0, 2, most}
    assert {i for i, _ in numbers} == {0, 4}


#
# the page and the benchmark
#


def test_the_python_of_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "tuning.md").read_text("utf-8")
    scripts = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(scripts) == 1
    exec(compile(scripts[0], "docs/tuning.md", "exec"), {})
    outcome, activate, deactivate = capsys.readouterr().out.split()
    assert outcome == "found"
    assert 0 < int(activate) + int(deactivate) < 20


def test_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On few prompts and a small grid: a row for each side, both methods under the same terms."""
    from steermoe_local.models.embedded import behaviour

    spec = importlib.util.spec_from_file_location("tuning_benchmark", ROOT / "benchmarks" / "tuning.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRID", (0, 2))
    monkeypatch.setattr(module, "N_TEXT", 100)
    monkeypatch.setattr(module, "behaviours", lambda: (behaviour("refuse-comply"),))
    module.main(["--items", "12", str(tmp_path / "tuning.json")])
    data = json.loads((tmp_path / "tuning.json").read_text("utf-8"))
    assert [row["side"] for row in data["rows"]] == ["refuse", "comply"]
    for row in data["rows"]:
        assert row["grid"]["n_tried"] == 3
        assert row["ladder"]["n_grid"] == row["n_choices"]
        assert row["ladder"]["heldout"]["gain"]["n"] == row["grid"]["heldout"]["gain"]["n"] == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert "% saved" in lines[-1]
