"""Measures candidates of a search: the cheap neutral text first, then the answers of those inside the budget."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ....errors import UsageError
from ....steering.bias_file import BiasFile
from ...measuring.measurements import Measurement
from ...measuring.workload import Work
from ...metrics.intervals import Values
from .algorithm import Candidate, Trial
from .objective import Budget, objective_values, search_space, text_costs

if TYPE_CHECKING:
    from ....steering.steering import Steering
    from ...measuring.evaluator import Evaluator

_LEAST = 4  # items of each part


def split(ids: Sequence[str], seed: int = 0, share: float = 0.5) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Divide the items at random into two parts, for choosing and held out, each in the items' order.

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
    choosing = tuple(name for i, name in enumerate(ids) if i in drawn)
    return choosing, tuple(name for i, name in enumerate(ids) if i not in drawn)


class CandidateEvaluator:
    """Measures candidates on the choosing part of the items, and effects on either part.

    `activate` and `deactivate` limit the search space to these numbers; `counts` are the numbers of experts that they
    come to, ascending from 0 on each axis. `base` is the unsteered model on the choosing part, `ceiling` the largest
    gain that is possible.
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
        *,
        max_trials: int | None = None,
    ) -> None:
        """Announce the search, of `max_trials` candidates at most (None: of all), and measure the unsteered model.

        Raises as `tune`.
        """
        budget.check_guards(evaluator.benign_task, evaluator.neutral)
        self.space = search_space(steering)
        self.counts = _counts(self.space.activate, activate), _counts(self.space.deactivate, deactivate)
        self.evaluator, self.steering, self.budget, self.seed = evaluator, steering, budget, seed
        self.choosing, self.heldout = split([str(item.id) for item in evaluator.task.items], seed, share)
        self._expect(self.n_choices if max_trials is None else min(max_trials, self.n_choices))
        self.base = self.measure([None], self.choosing)[0]
        self.ceiling = float(1 - self.values(self.base).mean())
        self._built: dict[Candidate, BiasFile | None] = {(0, 0): None}

    @property
    def n_choices(self) -> int:
        """How many candidates that steer something there are."""
        return len(self.counts[0]) * len(self.counts[1]) - 1

    def measure(self, biases: Sequence[BiasFile | None], items: Iterable[str], what: str = "tune") -> list[Measurement]:
        """Measure biases on some items, with what the budget needs."""
        return self.evaluator.measure(biases, items=items, text=True, benign=self.budget.wants_benign, what=what)

    def _expect(self, n: int) -> None:
        """Announce a search that looks at `n` candidates at most, and checks two of them on the held-out items."""
        benign, of = self.budget.wants_benign, self.evaluator.work
        searched = of(n + 1, items=self.choosing, benign=benign)
        # the unsteered model, the pick and the strongest one; what is predicted of the text is known by then
        checked = of(3, items=self.heldout, text=False, benign=False)
        parts = {"tune": searched, "check": checked, "text": Work(0)}
        self.evaluator.workload.expect("tune", parts, search=True)

    def values(self, measured: Measurement) -> Values:
        """The objective's value of each item."""
        return objective_values(measured, self.steering.reverse)

    def build(self, candidate: Candidate) -> BiasFile | None:
        """The bias of a candidate, with its provenance; None for (0, 0)."""
        if candidate not in self._built:
            activate, deactivate = self.numbers(candidate)
            changed = self.steering.changed(activate=activate, deactivate=deactivate)
            self._built[candidate] = changed.build(self.evaluator.identity)
        return self._built[candidate]

    def numbers(self, candidate: Candidate) -> tuple[int, int]:
        """The candidate's numbers for `ExpertMap.choose`."""
        return self.space.activate[candidate[0]], self.space.deactivate[candidate[1]]

    def evaluate(self, candidates: Sequence[Candidate], step: str) -> list[Trial]:
        """Measure candidates: their texts, then the answers of those whose text is inside the budget."""
        # an evaluator measures some item always: one of the choosing part, which is needed anyway if the text allows
        texts = self.evaluator.measure(
            [self.build(candidate) for candidate in candidates],
            items=self.choosing[:1],
            text=True,
            benign=False,
            what="text",
        )
        trials: dict[Candidate, Trial] = {}
        for candidate, measured in zip(candidates, texts, strict=True):
            assert measured.text is not None
            assert self.base.text is not None
            over = self.budget.over_text(measured.text, self.base.text)
            costs = text_costs(measured.text, self.base.text)
            trials[candidate] = Trial(candidate, None, over, step, costs, answered=not over)
        inside = [candidate for candidate in candidates if trials[candidate].answered]
        if inside:
            answers = self.measure([self.build(candidate) for candidate in inside], self.choosing)
            for candidate, measured in zip(inside, answers, strict=True):
                over = self.budget.over_answers(measured, self.base)
                gains = None if over else self.values(measured) - self.values(self.base)
                trials[candidate] = replace(trials[candidate], gains=gains, over=over)
        return list(trials.values())


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
