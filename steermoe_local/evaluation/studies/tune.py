"""Finds how many experts to steer: the strongest effect inside a budget of fluency.

`ladder` has the search. Here are what it asks (the neutral text first, which is cheap; the answers only of choices that
are inside the budget) and what is made of its pick: the effect on items that the search never saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ...errors import UsageError
from ...steering.bias_file import BiasFile
from ..measuring.measurements import Measurement
from ..measuring.side_effects import Fluency, fluency
from ..metrics.intervals import Interval, difference, rate
from .candidate_evaluator import Probe
from .objective import Budget, aimed_values, facts, standard_error
from .search import Found, Place, Search, Trial, pick, strongest, within_error

if TYPE_CHECKING:
    from ...steering.steering import Steering
    from ..measuring.evaluator import Evaluator

__all__ = ["Effect", "Evaluated", "Outcome", "Tuning", "exhaustive", "tune"]

Outcome = Literal["found", "nothing inside the budget", "no effect", "not confirmed"]


@dataclass(frozen=True)
class Effect:
    """A steering on one part of the items: both rates, and `gain`, by which it shows more of the side steered to.

    The gain counts broken answers for neither side (`aims.aimed_values`).
    """

    unsteered: Interval
    steered: Interval
    gain: Interval

    @property
    def certain(self) -> bool:
        """Is the gain's interval above 0?"""
        return self.gain.low > 0


@dataclass(frozen=True)
class Evaluated:
    """A choice that was looked at: numbers of `ExpertMap.choose`, mean gain on the choosing part with standard error.

    `over` says which limit it broke, "" for none; the gain is then None. `costs` are (increase of the perplexity as a
    share, KL in nats). `answered`: the answers were looked at, not the text alone.
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


@dataclass(frozen=True, eq=False)
class Tuning:
    """What a search came to. `method` is "ladder" or "grid", `outcome` says whether a choice can be used.

    `chosen` is the pick (None if nothing inside the budget has an effect), `strongest` the choice with the largest gain
    on the choosing part. `choosing`, `heldout` and `fluency` are the pick's; `heldout_strongest` is the other's. `bias`
    is None unless the outcome is "found". `trials` are all choices in the order in which they were looked at,
    `n_measured` of them with answers, and `n_grid` is how many different choices there are; `n_answers` counts the
    answers to items that were needed. `why` has a line for each part of the search.
    """

    about: dict[str, Any]
    budget: Budget
    method: Literal["ladder", "grid"]
    outcome: Outcome
    reason: str
    chosen: Evaluated | None
    strongest: Evaluated | None
    choosing: Effect | None
    heldout: Effect | None
    heldout_strongest: Effect | None
    fluency: Fluency | None
    unsteered_fluency: Fluency
    bias: BiasFile | None
    trials: tuple[Evaluated, ...]
    why: tuple[str, ...]
    n_grid: int
    n_answers: int
    choosing_items: tuple[str, ...]
    heldout_items: tuple[str, ...]

    @property
    def n_measured(self) -> int:
        """Choices whose answers were looked at, without the unsteered model."""
        return sum(trial.answered for trial in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        names = ("chosen", "strongest", "choosing", "heldout", "heldout_strongest", "fluency")
        parts = {name: getattr(self, name) for name in names}
        return {
            "about": self.about,
            "budget": self.budget.to_dict(),
            "method": self.method,
            "outcome": self.outcome,
            "reason": self.reason,
            **{name: None if part is None else asdict(part) for name, part in parts.items()},
            "unsteered_fluency": self.unsteered_fluency.to_dict(),
            "trials": [asdict(trial) for trial in self.trials],
            "why": list(self.why),
            "n_tried": len(self.trials),
            "n_measured": self.n_measured,
            "n_grid": self.n_grid,
            "n_answers": self.n_answers,
            "choosing_items": list(self.choosing_items),
            "heldout_items": list(self.heldout_items),
        }


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
    """Search for the numbers of experts with the strongest effect inside the budget, by `ladder`.

    The steering gives map, direction, layers and strength; its numbers do not count. `share` of the items, drawn with
    `seed`, are for choosing, and the effect is reported on the others. At most `max_trials` choices are looked at, with
    up to `max_activate` and `max_deactivate` experts.

    Raises UsageError (a bias file, too few items, no neutral text), ChoiceError (layers that are not there), and what
    `Evaluator.measure` raises.
    """
    for name, most in (("max_activate", max_activate), ("max_deactivate", max_deactivate)):
        if most is not None and most < 0:
            raise UsageError(f"{name}: {most} is not a number from 0 up")
    if max_trials < 1:
        raise UsageError(f"max_trials: {max_trials} is not a number from 1 up")
    limits = [None if most is None else range(most + 1) for most in (max_activate, max_deactivate)]
    probe = Probe(evaluator, steering, budget, seed, share, *limits)
    search = Search(probe.look, (probe.counts[0][-1], probe.counts[1][-1]), probe.room, max_trials)
    return _result(probe, "ladder", search.run())


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
    """Look at every choice, with the same budget, parts and pick: what `tune` is to be compared with.

    `activate` and `deactivate`: only these numbers; None: all. Raises as `tune`.
    """
    probe = Probe(evaluator, steering, budget, seed, share, activate, deactivate)
    places = [(i, j) for i in probe.counts[0] for j in probe.counts[1]]
    found = Found(tuple(probe.look_at(places, "grid")), ("every choice was looked at",))
    return _result(probe, "grid", found)


def _result(probe: Probe, method: Literal["ladder", "grid"], found: Found) -> Tuning:
    """Judge the pick on the held-out items, which are looked at here for the first time."""
    others = [trial for trial in found.trials if trial.place != (0, 0)]
    unsteered = next(trial for trial in found.trials if trial.place == (0, 0))
    chosen, best = pick(found.trials), strongest(others)
    assert chosen is not None  # the unsteered model is inside of every budget
    outcome, reason = _judge(probe, others, unsteered, chosen, best)
    effects: dict[str, Any] = {}
    bias = None
    if outcome == "found":
        assert best is not None
        choosing, measured, base = _effect(probe, chosen.place, probe.choosing)
        heldout, measured, base = _effect(probe, chosen.place, probe.heldout)
        over = probe.budget.over_answers(measured, base)
        if not heldout.certain or over:
            outcome = "not confirmed"
            reason = f"on the held-out items: {over or f'the gain is {_points(heldout.gain)}, which may be none'}"
        else:
            bias = probe.build(chosen.place)
            reason = f"on the held-out items the gain is {_points(heldout.gain)}"
        effects = {
            "choosing": choosing,
            "heldout": heldout,
            "heldout_strongest": _effect(probe, best.place, probe.heldout)[0],
            "fluency": fluency(measured, base),
        }
    n_seeds = len(probe.base.answers) // len(probe.choosing)  # of choices each item is answered once
    n_items = sum(len(probe.choosing) if t.place in probe.answered else 1 for t in found.trials)
    return Tuning(
        about={**facts(probe.evaluator, probe.steering), "seed": probe.seed},
        budget=probe.budget,
        method=method,
        outcome=outcome,
        reason=reason,
        chosen=_evaluated(probe, chosen) if effects else None,
        strongest=_evaluated(probe, best) if best else None,
        **{"choosing": None, "heldout": None, "heldout_strongest": None, "fluency": None, **effects},
        unsteered_fluency=fluency(probe.base, probe.base),
        bias=bias,
        trials=tuple(_evaluated(probe, trial) for trial in others),
        why=found.steps,
        n_grid=probe.n_choices,
        n_answers=n_items * n_seeds,
        choosing_items=probe.choosing,
        heldout_items=probe.heldout,
    )


def _effect(probe: Probe, place: Place, items: Sequence[str]) -> tuple[Effect, Measurement, Measurement]:
    base, measured = probe.measure([None, probe.build(place)], items, "check")
    reverse, seed = probe.steering.reverse, probe.seed
    gain = difference(aimed_values(measured, reverse), aimed_values(base, reverse), seed)
    return Effect(rate(base.values, seed), rate(measured.values, seed), gain), measured, base


def _evaluated(probe: Probe, trial: Trial) -> Evaluated:
    activate, deactivate = probe.numbers(trial.place)
    gain, error = (None, None) if trial.gains is None else (trial.gain, standard_error(trial.gains))
    costs = probe.costs.get(trial.place, (0.0, 0.0))
    return Evaluated(
        activate, deactivate, *trial.place, gain, error, costs, trial.over, trial.place in probe.answered, trial.step
    )


def _judge(
    probe: Probe, others: Sequence[Trial], unsteered: Trial, chosen: Trial, best: Trial | None
) -> tuple[Outcome, str]:
    """What the choosing part alone says."""
    if probe.room == 0:
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
