"""Measures controls of a steering: the effects of experts that were not chosen for the behaviour.

The draws of all kinds are measured in one call, on the task alone. docs/experiments.md says how they are drawn and why
they are compared by size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ....errors import ChoiceError, FormatError, PairsError, UsageError
from ....steering.steering import Steering
from ...measuring.evaluator import Evaluator
from ...measuring.json_values import plain
from ...measuring.workload import Work
from .draws import ALL, ControlPlan, Controls, Kind

__all__ = ["ALL", "CONTROLS", "ControlResult", "Controls", "control_work", "run_controls"]

CONTROLS = "controls"
"""Names the controls among the parts of a study."""

_EQUAL = 1e-12  # effects that differ by less are the same up to rounding
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class ControlResult:
    """Effects of one kind of control, compared with the `real` one.

    `both_ways`: effects are differences of rates between both directions; else to the unsteered rate. `effects` are
    those of all `n` draws, signed, and `labels` say which draw is which. `mean`, `low` and `high` are the mean and the
    95% quantile range of their sizes |effect|. `percentile` is the share of the draws whose size is below the real
    value, `p` is (1 + draws of at least that size) / (1 + n) (Phipson and Smyth 2010). The real value counts with its
    sign (the opposite of a reversed steering's), so one in the wrong direction has percentile 0 and p = 1. All of these
    are None without draws. `note` says why a kind was left out, or what to bear in mind; `details` are further
    facts as plain JSON values.
    """

    kind: str
    n: int
    real: float
    both_ways: bool = field(metadata={"json": "away"})
    effects: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    percentile: float | None = None
    p: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        kind: str,
        effects: Sequence[float],
        labels: Sequence[str],
        real: float,
        *,
        both_ways: bool = True,
        sign: int = 1,
        note: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> ControlResult:
        """Summarise the effects of the draws; without any, the kind was left out. `sign`: that of the wanted effect."""
        n = len(effects)
        found = cls(
            kind, n, real, both_ways, tuple(map(float, effects)), tuple(labels), note=note, details=details or {}
        )
        if not n:
            return found
        sizes = np.abs(np.asarray(effects, dtype=np.float64))
        below = int((sizes < sign * real - _EQUAL).sum())
        low, high = (float(value) for value in np.quantile(sizes, _QUANTILES))
        return replace(
            found, mean=float(sizes.mean()), low=low, high=high, percentile=below / n, p=(1 + n - below) / (1 + n)
        )

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


def control_work(
    evaluator: Evaluator,
    steering: Steering,
    controls: Controls,
    *,
    both_ways: bool = True,
    items: Sequence[str] | None = None,
) -> Work:
    """What `run_controls` will have to measure, at most: draws may be equal, and some may turn out to be impossible."""
    n_draws = sum(controls.n_expected(kind, steering) for kind in controls.kinds)
    found = evaluator.work(n_draws * (2 if both_ways else 1), items=items, text=False, benign=False)
    return found if both_ways else found + evaluator.work([None], items=items, text=False, benign=False)


def run_controls(
    evaluator: Evaluator,
    steering: Steering,
    controls: Controls,
    *,
    real_effect: float,
    both_ways: bool = True,
    reverse: Steering | None = None,
    items: Iterable[str] | None = None,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> tuple[ControlResult, ...]:
    """Measure controls of a steering on the evaluator's task; one result for each of their kinds, in that order.

    `real_effect` is the steering's own: the rate under it minus that under its reverse if `both_ways`, else minus the
    unsteered rate. `reverse` is what steers in the other direction, where it is not the reversed choice. `items` as in
    `Evaluator.measure`. `log` is called with a line on what is being done. Kinds that are impossible (no pairs, no
    counts, no room) come back without draws and with a note.

    Raises UsageError for a steering that chooses no experts, ChoiceError for a steering whose reverse cannot be carried
    out, and what `Evaluator.measure` raises.
    """
    plan = ControlPlan(evaluator, steering, controls, both_ways=both_ways, reverse=reverse, seed=seed, log=log)
    found: dict[str, Kind] = {}
    for kind in controls.kinds:
        try:
            found[kind] = plan.draws(kind)
        except (ChoiceError, FormatError, PairsError, UsageError) as error:
            found[kind] = Kind(note=f"left out: {error}")
    n_draws = sum(len(kind.draws) for kind in found.values())
    rates: dict[str, list[list[float]]] = {name: [] for name in found}
    unsteered = 0.0
    if n_draws:
        wanted = [bias for kind in found.values() for draw in kind.draws for bias in draw.biases]
        measured = iter(
            evaluator.measure(
                wanted if both_ways else [*wanted, None],
                items=None if items is None else list(items),
                text=False,
                benign=False,
                what=CONTROLS,
            )
        )
        rates = {
            name: [[next(measured).rate for _ in draw.biases] for draw in kind.draws] for name, kind in found.items()
        }
        unsteered = 0.0 if both_ways else next(measured).rate
    return tuple(
        ControlResult.of(
            name,
            [rate[0] - (rate[1] if both_ways else unsteered) for rate in rates[name]],
            [draw.label for draw in kind.draws],
            real_effect,
            both_ways=both_ways,
            sign=-1 if steering.reverse else 1,
            note=kind.note,
            details=kind.details,
        )
        for name, kind in found.items()
    )
