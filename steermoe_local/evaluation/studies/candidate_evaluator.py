"""Looks at choices for a search: the neutral text first, which is cheap, then the answers of those it leaves."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...errors import UsageError
from ...steering.bias_file import BiasFile
from ..measuring.measurements import Measurement
from .objective import Budget, aimed_values, space, text_costs
from .search import Place, Trial

if TYPE_CHECKING:
    from ...steering.steering import Steering
    from ..measuring.evaluator import Evaluator

__all__ = ["Probe", "split"]

_LEAST = 4  # items of each part


def split(ids: Sequence[str], seed: int = 0, share: float = 0.5) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two parts of the items, drawn at random: for choosing, and held out; each in the items' order.

    `share` of them are for choosing. Raises UsageError where a part would have fewer than 4.
    """
    if not 0 < share < 1:
        raise UsageError(f"share: {share} is not between 0 and 1")
    n = round(share * len(ids))
    if min(n, len(ids) - n) < _LEAST:
        raise UsageError(
            f"{len(ids)} items are too few to choose on {n} of them and to check on the others; "
            f"each part needs {_LEAST}, and 50 would be better"
        )
    drawn = set(np.random.default_rng(seed).permutation(len(ids))[:n].tolist())
    parts = (tuple(name for i, name in enumerate(ids) if (i in drawn) == wanted) for wanted in (True, False))
    choosing, heldout = parts
    return choosing, heldout


class Probe:
    """Looks at choices on the choosing part of the items; `activate` and `deactivate` leave only these numbers.

    A place is how many experts are promoted and suppressed, and `counts` are those there are, ascending from 0 on each
    axis. `base` is the unsteered model on the choosing part, `room` the largest gain that is possible. `costs` are
    (increase of the perplexity, KL) of the places that were looked at; `answered` are those of which the answers were.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        steering: Steering,
        budget: Budget,
        seed: int,
        share: float,
        activate: Iterable[int] | None,
        deactivate: Iterable[int] | None,
    ) -> None:
        """Measure the unsteered model. Raises as `tune`."""
        budget.check_guards(evaluator.benign_task, evaluator.neutral)
        self.space = space(steering)
        self.counts = _counts(self.space.activate, activate), _counts(self.space.deactivate, deactivate)
        self.evaluator, self.steering, self.budget, self.seed = evaluator, steering, budget, seed
        self.choosing, self.heldout = split([str(item.id) for item in evaluator.task.items], seed, share)
        self.base = self.measure([None], self.choosing)[0]
        self.aims = aimed_values(self.base, steering.reverse)
        self.room = float(1 - self.aims.mean())
        self.costs: dict[Place, tuple[float, float]] = {}
        self.answered: set[Place] = {(0, 0)}
        self.built: dict[Place, BiasFile | None] = {(0, 0): None}

    @property
    def n_choices(self) -> int:
        """How many choices that steer something there are."""
        return len(self.counts[0]) * len(self.counts[1]) - 1

    def measure(self, biases: Sequence[BiasFile | None], items: Iterable[str], what: str = "tune") -> list[Measurement]:
        """Measure biases on some items, with what the budget needs."""
        return self.evaluator.measure(biases, items=items, text=True, benign=self.budget.wants_benign, what=what)

    def build(self, place: Place) -> BiasFile | None:
        """The bias of a place, with where it comes from."""
        if place not in self.built:
            activate, deactivate = self.numbers(place)
            changed = self.steering.changed(activate=activate, deactivate=deactivate)
            self.built[place] = changed.build(self.evaluator.identity)
        return self.built[place]

    def numbers(self, place: Place) -> tuple[int, int]:
        """The numbers for `ExpertMap.choose` that a place stands for."""
        return self.space.activate[place[0]], self.space.deactivate[place[1]]

    def look(self, place: Place, step: str) -> Trial:
        """The trial of one place."""
        return self.look_at([place], step)[0]

    def look_at(self, places: Sequence[Place], step: str) -> list[Trial]:
        """The trials of places: their texts first, then the answers of those that the text leaves."""
        # an evaluator measures some item always: one of the choosing part, which is needed anyway if the text allows
        texts = self.evaluator.measure(
            [self.build(place) for place in places], items=self.choosing[:1], text=True, benign=False, what="text"
        )
        over: dict[Place, str] = {}
        for place, measured in zip(places, texts, strict=True):
            assert measured.text is not None
            assert self.base.text is not None
            self.costs[place] = text_costs(measured.text, self.base.text)
            over[place] = self.budget.over_text(measured.text, self.base.text)
        inside = [place for place in places if not over[place]]
        gains = {}
        self.answered |= set(inside)
        if inside:
            answers = self.measure([self.build(place) for place in inside], self.choosing)
            for place, measured in zip(inside, answers, strict=True):
                over[place] = self.budget.over_answers(measured, self.base)
                if not over[place]:
                    gains[place] = aimed_values(measured, self.steering.reverse) - self.aims
        return [Trial(place, gains.get(place), over[place], step) for place in places]


def _counts(numbers: tuple[int, ...], wanted: Iterable[int] | None) -> tuple[int, ...]:
    """How many experts the wanted numbers come to, ascending from 0; None: all that there are."""
    if wanted is None:
        return tuple(range(len(numbers)))
    found = {0}
    for n in wanted:
        if n < 0:
            raise UsageError(f"number of experts: {n} is below 0")
        found.add(bisect_right(numbers, n) - 1)
        if n >= numbers[-1] and isinstance(wanted, range):
            break  # a limit far beyond: all further numbers come to the same
    return tuple(sorted(found))
