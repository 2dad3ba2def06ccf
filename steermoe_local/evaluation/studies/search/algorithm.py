"""The search of `tune` over both numbers of experts, without models; docs/tuning.md describes its steps.

A candidate (i, j) promotes i experts and suppresses j, each in the order of |RD|, so that candidates along an axis are
nested. The search assumes that fluency falls along an axis, and that the effect rises, stays, and may fall again; where
that is wrong it can miss the best candidate, but never leaves the budget.

The pick is the smallest candidate whose gain is within one standard error of the largest gain (Breiman et al.,
Classification and Regression Trees, 1984, section 3.4.3), the error being that of the paired difference over the items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from ...metrics.intervals import Values
from .objective import standard_error

Candidate = tuple[int, int]
"""How many experts are promoted and suppressed."""

_PATIENCE = 2  # steps in a row that must be worse: one may be an accident
_FINEST = 8  # gaps below this part of a number are not halved: of 100 experts, 12 more or less are no matter
_MAX_ROUNDS = 4
_NAMES = ("promoted", "suppressed")


@dataclass(frozen=True, eq=False)
class Trial:
    """A candidate that was evaluated.

    `gains` [n_items] are the items' gains over the unsteered model; None if it broke the budget, and `over` says which
    limit. `step` names the part of the search that asked for it. `costs` are (increase of the perplexity as a share, KL
    in nats). `answered`: the answers were measured, not the text alone.
    """

    candidate: Candidate
    gains: Values | None
    over: str = ""
    step: str = ""
    costs: tuple[float, float] = (0.0, 0.0)
    answered: bool = True

    @property
    def gain(self) -> float:
        """Mean gain; below any other where the budget was broken."""
        return float("-inf") if self.gains is None else float(self.gains.mean())

    @property
    def n_experts(self) -> int:
        """How many experts are steered."""
        return sum(self.candidate)


@dataclass(frozen=True, eq=False)
class SearchLog:
    """The trials of a search in their order, and why each part of it stopped, a line each."""

    trials: tuple[Trial, ...]
    steps: tuple[str, ...]


def within_error(trial: Trial, best: Trial) -> bool:
    """Whether a trial's gain is within one standard error of the best one's, or above it.

    The error is that of their difference over the items.
    """
    if trial.gains is None or best.gains is None:
        return False
    behind = best.gains - trial.gains
    return float(behind.mean()) <= standard_error(behind) + 1e-12


def strongest(trials: Iterable[Trial]) -> Trial | None:
    """The trial with the largest gain inside the budget, of equal ones the smallest; None if there is none."""
    inside = [trial for trial in trials if trial.gains is not None]
    return max(inside, key=lambda trial: (trial.gain, -trial.n_experts), default=None)


def pick(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the fewest experts among those within one standard error of the strongest; None if there is none.

    Of equally small ones that with the larger gain.
    """
    best = strongest(trials)
    if best is None:
        return None
    same = [trial for trial in trials if within_error(trial, best)]
    return min(same, key=lambda trial: (trial.n_experts, -trial.gain))


@dataclass(eq=False)
class Search:
    """A search over candidates up to `last`; `evaluate(candidate, step)` measures one.

    `ceiling` is the largest gain that is possible, `max_trials` how many candidates may be tried besides (0, 0).
    `stop` is asked before each candidate; once it says so, no more are tried.
    """

    evaluate: Callable[[Candidate, str], Trial]
    last: Candidate
    ceiling: float
    max_trials: int = 100
    stop: Callable[[], bool] = lambda: False
    trials: dict[Candidate, Trial] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)

    def run(self) -> SearchLog:
        """Search; the first trial is (0, 0), the unsteered model."""
        self._try((0, 0), "unsteered")
        for axis in (1, 0):
            self._line((0, 0), axis)
        self._both_at_once()
        if pick(list(self.trials.values())) is not self.trials[0, 0]:
            self._alternate()
        return SearchLog(tuple(self.trials.values()), tuple(self.steps))

    def _alternate(self) -> None:
        for number in range(1, _MAX_ROUNDS + 1):
            before = self._best()
            if self._is_full(before):
                self.steps.append("more gain is not possible: stopped")
                return
            first = 1 if before.candidate[1] == 0 else 0  # an axis that was not used yet
            for axis in (first, 1 - first):
                self._line(self._best().candidate, axis)
            if self._used_up:
                self.steps.append(f"{len(self.trials) - 1} choices were tried, no more may be: stopped")
                return
            if within_error(before, self._best()):
                self.steps.append(f"round {number}: no gain beyond one standard error: stopped")
                return
        self.steps.append(f"{_MAX_ROUNDS} rounds: stopped")

    @property
    def _used_up(self) -> bool:
        return len(self.trials) > self.max_trials or (len(self.trials) > 1 and self.stop())

    def _try(self, candidate: Candidate, step: str) -> Trial | None:
        """The trial of a candidate; None if no more may be tried."""
        if candidate not in self.trials:
            if self._used_up:
                return None
            self.trials[candidate] = self.evaluate(candidate, step)
        return self.trials[candidate]

    def _best(self) -> Trial:
        best = strongest(self.trials.values())
        assert best is not None  # the unsteered model is inside of every budget
        return best

    def _is_full(self, trial: Trial) -> bool:
        return trial.gain >= self.ceiling - 1e-9

    def _line(self, start: Candidate, axis: int) -> None:
        """Search along one axis, from `start` upwards and downwards."""
        other = start[1 - axis]
        words = f"{_NAMES[axis]}, with {other} {_NAMES[1 - axis]}" if other else f"{_NAMES[axis]} alone"
        line = _Line(axis, other)
        up, down = _outwards(start[axis], self.last[axis])
        self._climb(start, [line.candidate(n) for n in up], f"more {words}")
        self._climb(start, [line.candidate(n) for n in down], f"fewer {words}")
        self._refine(line, words)

    def _both_at_once(self) -> None:
        """As many promoted as suppressed."""
        if not all(self.last):
            return
        up, _ = _outwards(0, max(self.last))
        candidates = dict.fromkeys((min(n, self.last[0]), min(n, self.last[1])) for n in up)
        self._climb((0, 0), list(candidates), "both at once")

    def _climb(self, start: Candidate, candidates: Sequence[Candidate], words: str) -> None:
        """Step after step until there is a reason to stop."""
        if not candidates:
            return
        broken = beyond = 0
        peak = self.trials[start]
        why = "came to the end"
        for candidate in candidates:
            if self._is_full(best := self._best()) and sum(candidate) >= best.n_experts:
                why = "more gain, or as much with fewer experts, is not possible"
                break
            trial = self._try(candidate, words)
            if trial is None:
                why = "no more choices may be tried"
                break
            broken = broken + 1 if trial.gains is None else 0
            if broken == _PATIENCE:
                why = f"the budget was broken {_PATIENCE} times in a row, last: {trial.over}"
                break
            if trial.gains is None:
                continue
            worse = _matters(peak) and not within_error(trial, peak)
            beyond = beyond + 1 if worse else 0
            if trial.gain > peak.gain:
                peak = trial
            if beyond == _PATIENCE:
                why = f"the gain was beyond its peak {_PATIENCE} times in a row"
                break
        self.steps.append(f"{words}: {why}")

    def _refine(self, line: _Line, words: str) -> None:
        """Halve the gaps beside the best choice of a line: upwards for gain, downwards for fewer experts."""
        best = strongest(line.of(self.trials).values())
        if best is None or best.candidate == (0, 0) or not within_error(best, self._best()):
            return
        low = best.candidate[line.axis]
        high = min((n for n in line.of(self.trials) if n > low), default=low)
        while high - low > max(1, low // _FINEST) and not self._is_full(best):
            trial = self._try(line.candidate(middle := (low + high) // 2), f"between: {words}")
            if trial is None:
                return
            if trial.gain > best.gain:
                best, low = trial, middle
            else:
                high = middle
        high = min(n for n, trial in line.of(self.trials).items() if within_error(trial, best))
        low = max((n for n in line.of(self.trials) if n < high), default=high)
        while high - low > max(1, high // _FINEST):
            trial = self._try(line.candidate(middle := (low + high) // 2), f"between: {words}")
            if trial is None:
                return
            if within_error(trial, best):
                high = middle
            else:
                low = middle


@dataclass(frozen=True)
class _Line:
    """The candidates along `axis` whose number on the other axis is `other`."""

    axis: int
    other: int

    def candidate(self, n: int) -> Candidate:
        return (n, self.other) if self.axis == 0 else (self.other, n)

    def of(self, trials: dict[Candidate, Trial]) -> dict[int, Trial]:
        """The trials on the line, by their number."""
        return {found[self.axis]: t for found, t in trials.items() if found[1 - self.axis] == self.other}


def _matters(trial: Trial) -> bool:
    """Whether a gain is more than noise, two standard errors above 0: only then can another be beyond the peak."""
    return trial.gains is not None and trial.gain > 2 * standard_error(trial.gains)


def _outwards(start: int, last: int) -> tuple[list[int], list[int]]:
    """Numbers above `start` in growing steps, up to `last`, and below it in the same way, down to 0.

    From 0 these are 1, 2, 4, 8, ...; from another number half of it more each time, as the neighbourhood matters there.
    """
    up, n = [], start
    while n < last:
        n = min(last, max(n + 1, 2 * n if start == 0 else n + n // 2))
        up.append(n)
    down, n = [], start
    while n > 0:
        n = min(n - 1, n * 2 // 3)
        down.append(n)
    return up, down
