"""`tune` on an evaluator whose model is a formula, and on the embedded model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import UsageError
from steermoe_local.evaluation.measuring.measurements import bias_key
from steermoe_local.evaluation.studies.search.candidate_evaluator import split
from steermoe_local.evaluation.studies.search.objective import Budget, search_space
from steermoe_local.evaluation.studies.search.tune import Tuning, exhaustive, tune
from steermoe_local.steering.steering import Steering
from tests.support.builders import table_map
from tests.support.fake_evaluator import SURFACES, FakeEvaluator, Surface, rising, wide_map
from tests.support.paths import ROOT
from tests.support.scripts import load_script

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

    module = load_script("benchmarks/tuning.py")
    monkeypatch.setattr(module, "GRID", (0, 2))
    monkeypatch.setattr(module, "N_TEXT", 100)
    monkeypatch.setattr(module, "behaviours", lambda: (behaviour("refuse-comply"),))
    module.main(["--items", "12", str(tmp_path / "tuning.json")])
    data = json.loads((tmp_path / "tuning.json").read_text("utf-8"))
    assert [row["side"] for row in data["rows"]] == ["refuse", "comply"]
    for row in data["rows"]:
        assert row["grid"]["n_tried"] == 3
        assert row["search"]["n_grid"] == row["n_choices"]
        assert row["search"]["heldout"]["gain"]["n"] == row["grid"]["heldout"]["gain"]["n"] == 6
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].count("|") == lines[2].count("|") == lines[3].count("|")
    assert "% saved" in lines[-1]
