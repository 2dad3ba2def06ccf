"""What a steering plan is for one model: biases, and the tokens that each is in force at."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..identity import ModelIdentity
from ..maps.routing_lean import RoutingLean
from .bias_file import BiasFile, none_if_empty
from .plan_rules import Where


@dataclass(frozen=True, eq=False)
class BiasRule:
    """A rule of a `BiasPlan`. `bias` None: nothing steers there. `lean` is what a condition on routing looks at."""

    where: Where
    bias: BiasFile | None
    lean: RoutingLean | None = None

    @cached_property
    def condition(self) -> tuple[Where, str]:
        """Equal for rules that match the same tokens: where, without what a map is called, and what is looked at."""
        return self.where.nameless, "" if self.lean is None else self.lean.digest

    @cached_property
    def key(self) -> str:
        """SHA-256 of what the rule does, in hex."""
        where, lean = self.condition
        parts = (repr(where), "" if self.bias is None else self.bias.key, lean)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def hides(self, later: BiasRule) -> bool:
        """Whether it is known to match every token that a later rule of the same plan matches."""
        if self.where in (Where(), Where(later.where.phase), replace(later.where, when=None)):
            return True
        return self.condition == later.condition


@dataclass(frozen=True, eq=False)
class BiasPlan:
    """Biases of one model and where each is in force: of the rules that match a token the first one steers it.

    Used wherever a `BiasFile` steers a request. Plans with one `key` steer every text alike, whatever their maps are
    called; what a token was computed under is said by the key of the bias that was in force there.
    """

    rules: tuple[BiasRule, ...]

    @cached_property
    def key(self) -> str:
        """SHA-256 of what the plan does, in hex."""
        return hashlib.sha256("\n".join(rule.key for rule in self.rules).encode()).hexdigest()

    @cached_property
    def biases(self) -> tuple[BiasFile, ...]:
        """The biases of the rules, each once."""
        return tuple({rule.bias.key: rule.bias for rule in self.rules if rule.bias is not None}.values())

    @property
    def identity(self) -> ModelIdentity:
        """The model that the biases are made for."""
        return self.biases[0].identity

    @property
    def n_active(self) -> int:
        """Experts that the rules promote, counted for each bias."""
        return sum(bias.n_active for bias in self.biases)

    @property
    def n_inactive(self) -> int:
        """Experts that the rules suppress, counted for each bias."""
        return sum(bias.n_inactive for bias in self.biases)

    @property
    def has_conditions(self) -> bool:
        """Whether it depends on a condition what steers."""
        return any(rule.where.when is not None for rule in self.rules)

    @property
    def needs_routing(self) -> bool:
        """Whether a condition looks at the routing of the text."""
        return any(rule.lean is not None for rule in self.rules)


AnyBias = BiasFile | BiasPlan
"""What a request can be steered by."""


def simplest(rules: Sequence[BiasRule]) -> AnyBias | None:
    """The plan of these rules, which keep their indices; a bias alone if the first rule is of all tokens.

    None if no rule steers that a rule before it does not hide.
    """
    kept: list[BiasRule] = []
    for rule in rules:
        if any(earlier.hides(rule) for earlier in kept):
            kept.append(BiasRule(replace(rule.where, when=None), None))  # nobody needs to look at its condition
        else:
            kept.append(BiasRule(rule.where, none_if_empty(rule.bias), rule.lean))
    while kept and kept[-1].bias is None:
        del kept[-1]  # no rule, no steering
    if not kept:
        return None
    return kept[0].bias if kept[0].where == Where() else BiasPlan(tuple(kept))
