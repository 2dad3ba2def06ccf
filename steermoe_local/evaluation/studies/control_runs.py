"""Controls beside a result: what steering does with experts that were not chosen for the behaviour.

The draws of all kinds are measured in one go, on the task alone. docs/experiments.md says how they are drawn and why
they are compared by size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import ChoiceError, FormatError, PairsError, UsageError
from ...maps.counts import RoutingCounts
from ...pairs.pairs import Pair
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator
from .control_draws import ALL, Kind, Plan

__all__ = ["ALL", "ControlResult", "run_controls"]

_EQUAL = 1e-12  # effects that differ by less are the same up to rounding
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class ControlResult:
    """Effects of one kind of control, beside the `real` one.

    `away`: effects are swings, rate towards - rate away; else rate towards - unsteered rate. `effects` are those of
    all `n` draws, signed, and `labels` say which draw is which. `mean`, `low` and `high` are the mean and the 95%
    quantile range of their sizes |effect|. `percentile` is the share of the draws whose size is below the real value,
    `p` is (1 + draws of at least that size) / (1 + n) (Phipson and Smyth 2010). The real value counts with its sign (of
    a reversed steering turned), so one in the wrong direction has percentile 0 and p = 1. All of these are None without
    draws. `note` says why a kind was left out, or what to bear in mind; `details` are further facts as plain JSON
    values.
    """

    kind: str
    n: int
    real: float
    away: bool
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
        away: bool = True,
        aim: int = 1,
        note: str = "",
        details: Mapping[str, Any] | None = None,
    ) -> ControlResult:
        """Summarise the effects of the draws; without any, the kind was left out. `aim`: the sign that `real` wants."""
        n = len(effects)
        if not n:
            return cls(kind, 0, real, away, note=note, details=dict(details or {}))
        sizes = np.abs(np.asarray(effects, dtype=np.float64))
        below = int((sizes < aim * real - _EQUAL).sum())
        low, high = (float(value) for value in np.quantile(sizes, _QUANTILES))
        return cls(
            kind=kind,
            n=n,
            real=real,
            away=away,
            effects=tuple(float(effect) for effect in effects),
            labels=tuple(labels),
            mean=float(sizes.mean()),
            low=low,
            high=high,
            percentile=below / n,
            p=(1 + n - below) / (1 + n),
            note=note,
            details=dict(details or {}),
        )

    @property
    def beaten(self) -> bool | None:
        """Is the real value larger than every draw's? None without draws."""
        return None if self.percentile is None else self.percentile == 1

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        data = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {**data, "effects": list(self.effects), "labels": list(self.labels), "details": dict(self.details)}


def run_controls(
    evaluator: Evaluator,
    steering: Steering,
    *,
    real_effect: float,
    away: bool = True,
    n_draws: int = 20,
    n_maps: int = 10,
    kinds: Sequence[str] = ALL,
    reverse: Steering | None = None,
    pairs: Sequence[Pair] | None = None,
    counts: RoutingCounts | None = None,
    recording: Mapping[str, Any] | None = None,
    items: Iterable[str] | None = None,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> tuple[ControlResult, ...]:
    """Measure controls of a steering on the evaluator's task; one result for each of `kinds`, in their order.

    `real_effect` is the steering's own: its swing (rate towards - rate away, the reverse) if `away`, else rate towards
    - unsteered rate. `reverse` is what steers away, where it is not the reversed choice. There are `n_draws` random and
    matched draws, and `n_maps` maps of shuffled pairs and of one side. `pairs` are those that the map was made of, for
    the kinds that are maps; `counts`, of any text, give activation frequencies in place of the map's. `recording` are
    arguments of `recorder.record_counts` that differ from the evaluator's. `items` as in `Evaluator.measure`. Kinds
    that cannot be had (no pairs, no counts, no room) come back without draws and with a note.

    Raises UsageError for a steering that chooses no experts, unknown kinds or n_draws below 1, ChoiceError for a
    steering whose reverse cannot be carried out, and what `Evaluator.measure` raises.
    """
    if unknown := [kind for kind in kinds if kind not in ALL]:
        raise UsageError(f"{unknown[0]}: no kind of control; take some of {', '.join(ALL)}")
    for name, number in (("n_draws", n_draws), ("n_maps", n_maps)):
        if number < 1:
            raise UsageError(f"{name}: {number} is not from 1 up")
    say = log or (lambda _: None)
    plan = Plan(evaluator, steering, away, reverse, (n_draws, n_maps), pairs, counts, recording or {}, seed, say)
    found: dict[str, Kind] = {}
    for kind in kinds:
        try:
            found[kind] = getattr(plan, kind.replace("-", "_"))()
        except (ChoiceError, FormatError, PairsError, UsageError) as error:
            found[kind] = Kind(note=f"left out: {error}")
    wanted = [bias for one in found.values() for draw in one.draws for bias in draw.biases]
    if not wanted:
        return tuple(ControlResult.of(kind, (), (), real_effect, away=away, note=found[kind].note) for kind in kinds)
    what = f"controls ({sum(len(one.draws) for one in found.values())} draws)"
    if not away:
        wanted.append(None)
    ids = None if items is None else list(items)
    measured = iter(evaluator.measure(wanted, items=ids, text=False, benign=False, what=what))
    rates = {kind: [[next(measured).rate for _ in draw.biases] for draw in one.draws] for kind, one in found.items()}
    unsteered = 0.0 if away else next(measured).rate
    return tuple(
        ControlResult.of(
            kind,
            [rate[0] - (rate[1] if away else unsteered) for rate in rates[kind]],
            [draw.label for draw in found[kind].draws],
            real_effect,
            away=away,
            aim=-1 if steering.reverse else 1,
            note=found[kind].note,
            details=found[kind].details,
        )
        for kind in kinds
    )
