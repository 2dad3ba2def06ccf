"""Finds how many experts to steer: the strongest effect inside a budget of side effects.

`algorithm` has the search, `candidate_evaluator` measures what it asks for. Here the pick is judged on items that the
search never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ....errors import UsageError
from ....steering.bias_file import BiasFile
from ...measuring.json_values import plain
from ...measuring.measurements import Measurement
from ...measuring.side_effects import Fluency, fluency
from ...metrics.intervals import Interval, difference, rate
from ..steerings import study_metadata
from .algorithm import Candidate, Search, SearchLog, Trial, pick, strongest, within_error
from .candidate_evaluator import CandidateEvaluator
from .objective import Budget, standard_error

if TYPE_CHECKING:
    from ....steering.steering import Steering
    from ...measuring.evaluator import Evaluator

Outcome = Literal["found", "nothing inside the budget", "no effect", "not confirmed"]


@dataclass(frozen=True)
class Gain:
    """Rates of a steering on one part of the items, and its `gain`: how much more it shows the side steered to.

    The gain counts broken answers for neither side (`objective.objective_values`).
    """

    unsteered: Interval
    steered: Interval
    gain: Interval

    @property
    def certain(self) -> bool:
        """Whether the gain's interval is above 0."""
        return self.gain.low > 0


@dataclass(frozen=True)
class Evaluated:
    """A candidate that was measured: numbers of `ExpertMap.choose`, mean gain on the choosing part and its error.

    `over` says which limit it broke, "" for none; the gain is then None. `costs` are (increase of the perplexity as a
    share, KL in nats). `answered`: the answers were measured, not the text alone.
    """

    activate: int
    deactivate: int
    n_active: int
    n_inactive: int
    gain: float | None
    error: float | None
    costs: tuple[float, float]
    over: str
    answered: bool
    step: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Tuning:
    """The result of a search. `method` is "ladder" (`tune`) or "grid" (`exhaustive`), `outcome` says whether a choice
    can be used.

    `chosen` is the pick (None if nothing inside the budget has an effect), `strongest` the candidate with the largest
    gain on the choosing part. `choosing`, `heldout` and `fluency` are the pick's; `heldout_strongest` is the other's.
    `bias` is None unless the outcome is "found". `trials` are all `n_tried` candidates in the order in which they were
    measured, `n_measured` of them with answers. `n_grid` is how many different choices there are, `n_answers` counts
    the answers to items that were needed. `why` has a line for each part of the search.
    """

    metadata: dict[str, Any] = field(metadata={"json": "about"})
    budget: Budget
    method: Literal["ladder", "grid"]
    outcome: Outcome
    reason: str
    chosen: Evaluated | None = None
    strongest: Evaluated | None
    choosing: Gain | None = None
    heldout: Gain | None = None
    heldout_strongest: Gain | None = None
    fluency: Fluency | None = None
    unsteered_fluency: Fluency
    bias: BiasFile | None = None
    trials: tuple[Evaluated, ...]
    why: tuple[str, ...]
    n_tried: int
    n_measured: int
    n_grid: int
    n_answers: int
    choosing_items: tuple[str, ...]
    heldout_items: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values, without the bias."""
        return plain(self, without=["bias"])


def tune(
    evaluator: Evaluator,
    steering: Steering,
    budget: Budget,
    *,
    seed: int = 0,
    share: float = 0.5,
    max_activate: int | None = None,
    max_deactivate: int | None = None,
    max_trials: int = 100,
) -> Tuning:
    """Search for the numbers of experts with the strongest effect inside the budget.

    The steering gives map, direction, layers and strength; its numbers do not count. `share` of the items, drawn with
    `seed`, are for choosing, and the effect is reported on the others. At most `max_trials` candidates are measured,
    with up to `max_activate` and `max_deactivate` experts.

    Raises UsageError (a bias file, too few items, no neutral text), ChoiceError (layers that are not there), and what
    `Evaluator.measure` raises.
    """
    for name, most in (("max_activate", max_activate), ("max_deactivate", max_deactivate)):
        if most is not None and most < 0:
            raise UsageError(f"{name}: {most} is not a number from 0 up")
    if max_trials < 1:
        raise UsageError(f"max_trials: {max_trials} is not a number from 1 up")
    limits = [None if most is None else range(most + 1) for most in (max_activate, max_deactivate)]
    candidates = CandidateEvaluator(evaluator, steering, budget, seed, share, *limits, max_trials=max_trials)
    return _result(candidates, "ladder", _search(candidates, max_trials))


def _search(candidates: CandidateEvaluator, max_trials: int, stop: Callable[[], bool] = lambda: False) -> SearchLog:
    """Search among the candidates; `stop` ends it."""
    largest = candidates.counts[0][-1], candidates.counts[1][-1]
    return Search(
        lambda candidate, step: candidates.evaluate([candidate], step)[0], largest, candidates.ceiling, max_trials, stop
    ).run()


@dataclass(frozen=True, eq=False)
class Pick:
    """What a search chose, before anything confirmed it: "found" says that the gain on the choosing items is no chance.

    `chosen` is the pick, None unless the outcome is "found"; `strongest` the candidate with the largest gain.
    `unsteered` is the mean value of the unsteered model. `trials` and `why` are as in `Tuning`.
    """

    outcome: Outcome
    reason: str
    unsteered: float
    chosen: Evaluated | None
    strongest: Evaluated | None
    trials: tuple[Evaluated, ...]
    why: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return plain(self)


def pick_numbers(
    evaluator: Evaluator,
    steering: Steering,
    budget: Budget,
    *,
    seed: int = 0,
    max_trials: int = 100,
    stop: Callable[[], bool] = lambda: False,
) -> Pick:
    """Search as `tune` does, on all of the evaluator's items: for callers that confirm the pick on items of their own.

    `stop` is asked before each candidate; once it says so, the pick is made of those that were measured. Raises as
    `tune`.
    """
    candidates = CandidateEvaluator(
        evaluator, steering, budget, seed, 1.0, None, None, all_items=True, max_trials=max_trials
    )
    log = _search(candidates, max_trials, stop)
    others = [trial for trial in log.trials if trial.candidate != (0, 0)]
    unsteered = next(trial for trial in log.trials if trial.candidate == (0, 0))
    chosen, best = pick(log.trials), strongest(others)
    assert chosen is not None  # the unsteered model is inside of every budget
    outcome, reason = _judge(candidates, others, unsteered, chosen, best)
    return Pick(
        outcome,
        reason,
        1 - candidates.ceiling,
        _evaluated(candidates, chosen) if outcome == "found" else None,
        _evaluated(candidates, best) if best else None,
        tuple(_evaluated(candidates, trial) for trial in others),
        log.steps,
    )


def exhaustive(
    evaluator: Evaluator,
    steering: Steering,
    budget: Budget,
    *,
    seed: int = 0,
    share: float = 0.5,
    activate: Iterable[int] | None = None,
    deactivate: Iterable[int] | None = None,
) -> Tuning:
    """Measure every candidate, with the same budget, parts and pick: what `tune` is to be compared with.

    `activate` and `deactivate`: only these numbers; None: all. Raises as `tune`.
    """
    candidates = CandidateEvaluator(evaluator, steering, budget, seed, share, activate, deactivate)
    trials = candidates.evaluate([(i, j) for i in candidates.counts[0] for j in candidates.counts[1]], "grid")
    return _result(candidates, "grid", SearchLog(tuple(trials), ("every choice was looked at",)))


def _result(candidates: CandidateEvaluator, method: Literal["ladder", "grid"], log: SearchLog) -> Tuning:
    """Judge the pick on the held-out items, which are measured here for the first time."""
    others = [trial for trial in log.trials if trial.candidate != (0, 0)]
    unsteered = next(trial for trial in log.trials if trial.candidate == (0, 0))
    chosen, best = pick(log.trials), strongest(others)
    assert chosen is not None  # the unsteered model is inside of every budget
    outcome, reason = _judge(candidates, others, unsteered, chosen, best)
    effects: dict[str, Any] = {}
    if outcome == "found":
        assert best is not None
        choosing, *_ = _gain(candidates, chosen.candidate, candidates.choosing)
        heldout, measured, base = _gain(candidates, chosen.candidate, candidates.heldout)
        effects = {
            "chosen": _evaluated(candidates, chosen),
            "choosing": choosing,
            "heldout": heldout,
            "heldout_strongest": _gain(candidates, best.candidate, candidates.heldout)[0],
            "fluency": fluency(measured, base),
        }
        over = candidates.budget.over_answers(measured, base)
        if not heldout.certain or over:
            outcome = "not confirmed"
            reason = f"on the held-out items: {over or f'the gain is {_points(heldout.gain)}, which may be none'}"
        else:
            effects["bias"] = candidates.build(chosen.candidate)
            reason = f"on the held-out items the gain is {_points(heldout.gain)}"
    n_choosing = len(candidates.choosing)
    n_seeds = len(candidates.base.answers) // n_choosing  # of choices each item is answered once
    n_items = sum(n_choosing if trial.answered else 1 for trial in log.trials)
    return Tuning(
        metadata={**study_metadata(candidates.evaluator, candidates.steering), "seed": candidates.seed},
        budget=candidates.budget,
        method=method,
        outcome=outcome,
        reason=reason,
        strongest=_evaluated(candidates, best) if best else None,
        unsteered_fluency=fluency(candidates.base, candidates.base),
        trials=tuple(_evaluated(candidates, trial) for trial in others),
        why=log.steps,
        n_tried=len(others),
        n_measured=sum(trial.answered for trial in others),
        n_grid=candidates.n_choices,
        n_answers=n_items * n_seeds,
        choosing_items=candidates.choosing,
        heldout_items=candidates.heldout,
        **effects,
    )


def _gain(
    candidates: CandidateEvaluator, candidate: Candidate, items: Sequence[str]
) -> tuple[Gain, Measurement, Measurement]:
    base, measured = candidates.measure([None, candidates.build(candidate)], items, "check")
    gain = difference(candidates.values(measured), candidates.values(base), candidates.seed)
    rates = [rate(found.values, candidates.seed) for found in (base, measured)]
    return Gain(rates[0], rates[1], gain), measured, base


def _evaluated(candidates: CandidateEvaluator, trial: Trial) -> Evaluated:
    activate, deactivate = candidates.numbers(trial.candidate)
    return Evaluated(
        activate,
        deactivate,
        *trial.candidate,
        gain=None if trial.gains is None else trial.gain,
        error=None if trial.gains is None else standard_error(trial.gains),
        costs=trial.costs,
        over=trial.over,
        answered=trial.answered,
        step=trial.step,
    )


def _judge(
    candidates: CandidateEvaluator, others: Sequence[Trial], unsteered: Trial, chosen: Trial, best: Trial | None
) -> tuple[Outcome, str]:
    """The outcome on the choosing part alone, and its reason."""
    if candidates.ceiling == 0:
        return "no effect", "there is nothing to gain: the unsteered model shows the side in every answer"
    if not others:
        return "no effect", "the map has no experts to choose in this direction"
    if best is None:
        return "nothing inside the budget", f"the smallest choices break it, by {others[0].over}"
    if chosen is unsteered or within_error(unsteered, best):
        return "no effect", f"the largest gain, {100 * best.gain:+.0f} points, is within one standard error of none"
    return "found", ""


def _points(found: Interval) -> str:
    return f"{100 * found.value:+.0f} points ({100 * found.low:+.0f} to {100 * found.high:+.0f})"
