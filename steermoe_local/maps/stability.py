"""The early end of a recording: the rule that is asked for, and how the run ended, as counts and maps store it.

docs/statistics.md says what is compared, what each bound is for, and which error is left.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FormatError, UsageError
from .confidence import exact_fields

GROWTH = 1.2  # pairs of a check over those of the one before: few checks however many pairs there are
LEAST_PAIRS = 20
_AGAIN = "run steermoe detect again"


@dataclass(frozen=True)
class UntilStable:
    """When a recording ends before its last pair.

    Attributes:
        level: agreement of halves that must be reached, 0 to 1, both excluded; 0 is chance.
        first: how many experts are compared, those with the largest |RD|; at most a quarter of the experts are.
        checks: consecutive checks that must reach it.
        min_pairs: pairs of the first check, at least 20.

    Raises UsageError for values outside their ranges.
    """

    level: float = 0.7
    first: int = 20
    checks: int = 3
    min_pairs: int = 50

    def __post_init__(self) -> None:
        if isinstance(self.level, bool) or not isinstance(self.level, float | int) or not 0 < self.level < 1:
            raise UsageError(f"level of stability: {self.level!r} is not between 0 and 1; write 0.7 for 70%")
        for name, least in (("first", 1), ("checks", 1), ("min_pairs", LEAST_PAIRS)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= 1 << 31:
                raise UsageError(f"{name} of stability: {value!r} is not a whole number from {least} up")

    def looks(self, n_given: int) -> tuple[int, ...]:
        """Numbers of counted pairs after which a run of `n_given` pairs is checked, ascending, all below `n_given`."""
        found: list[int] = []
        n = self.min_pairs
        while n < n_given:
            found.append(n)
            n = math.ceil(n * GROWTH)
        return tuple(found)


@dataclass(frozen=True)
class Stability:
    """How a recording with `UntilStable` ended; `rule` is what was asked for.

    `n_given` pairs were given; the run ended after the `n_pairs` that it counted, before the last pair if `stopped`.
    `n_checks` were possible. `first` experts were compared. `agreement` is the share of the first experts, of both
    halves of the pairs and with the same sign, corrected for `chance`, the share of maps with swapped sides; `error` is
    its standard error, `lower` its lower 95% bound. `p` is that of the shuffled control, doubled as there are two
    tests; it was compared with `alpha`. The figures are None for pairs too few to be checked.

    Raises FormatError when a number is impossible.
    """

    rule: UntilStable
    n_given: int
    n_pairs: int
    n_checks: int
    stopped: bool
    first: int
    agreement: float | None = None
    chance: float | None = None
    error: float | None = None
    lower: float | None = None
    p: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        counts = (self.n_given, self.n_pairs, self.first)
        if any(type(value) is not int or not 1 <= value <= 1 << 53 for value in counts):
            raise FormatError(f"until_stable: n_given, n_pairs or first is not a count; {_AGAIN}")
        if type(self.n_checks) is not int or not 0 <= self.n_checks <= 1 << 53 or type(self.stopped) is not bool:
            raise FormatError(f"until_stable: n_checks is not a count, or stopped no truth value; {_AGAIN}")
        if self.n_pairs > self.n_given or (self.stopped and self.n_pairs == self.n_given):
            raise FormatError(f"until_stable: {self.n_pairs} pairs of {self.n_given}; {_AGAIN}")
        figures = [self.agreement, self.chance, self.error, self.lower, self.p, self.alpha]
        if figures.count(None) not in (0, len(figures)) or (self.stopped and None in figures):
            raise FormatError(f"until_stable: figures are missing; {_AGAIN}")
        for value in figures:
            # compared, not converted: an integer of JSON may be too large for a float
            number = value is None or (isinstance(value, float | int) and not isinstance(value, bool))
            if not number or (value is not None and not abs(value) <= 1e9):
                raise FormatError(f"until_stable: {str(value)[:40]} is not a figure; {_AGAIN}")

    @property
    def stable(self) -> bool:
        """Whether the last check reached the level and told the sides apart, with all pairs or before."""
        return self.lower is not None and self.lower >= self.rule.level and (self.p or 0.0) <= (self.alpha or 0.0)

    @property
    def reason(self) -> str:
        """Why the run ended, for people."""
        used = f"{self.n_pairs} of {self.n_given} pairs"
        if self.agreement is None or self.lower is None or self.error is None or self.p is None:
            return f"{used}: never checked, the first check needs {self.rule.min_pairs}"
        figures = (
            f"first {self.first} experts agree {self.agreement:.2f} +- {self.error:.2f}, at least {self.lower:.2f}; "
            f"{self.rule.level:g} asked"
        )
        if self.stopped:
            return f"{used}: stable ({figures})"
        if not self.stable and self.lower >= self.rule.level:
            return f"{used}: all, sides not told apart (p = {self.p:.2g}; {figures})"
        return f"{used}: all, {'stable only now' if self.stable else 'never stable'} ({figures})"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Stability:
        """Rebuild it from `to_dict`. Raises FormatError for missing, unknown or impossible fields."""
        given = exact_fields(data, cls, "until_stable", _AGAIN)
        try:
            rule = UntilStable(**exact_fields(given["rule"], UntilStable, "until_stable.rule", _AGAIN))
        except UsageError as error:
            raise FormatError(f"until_stable.rule: {error}") from None
        return cls(**given | {"rule": rule})
