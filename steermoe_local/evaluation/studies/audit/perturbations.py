"""Random perturbations of a model's routing: which experts are suppressed or promoted at which rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ....errors import UsageError
from ....identity import ModelIdentity
from ....steering.bias_file import BiasFile
from ..layers import only_layers

SUPPRESS, PROMOTE = "suppress", "promote"
_SIGNS = {SUPPRESS: -1, PROMOTE: 1}
SUPPRESSED = (0.05, 0.1, 0.2, 0.4)
"""Rates at which experts are suppressed, unless others are asked for."""
PROMOTED = (0.25, 0.5, 1.0)
"""Rates at which experts are promoted, unless others are asked for, as parts of the largest possible one."""
MAX_DRAWS = 10_000
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Perturbations:
    """Which random experts are steered, by the hard rule.

    `suppress`, `promote`: rates, each the share of the experts of every layer; () for none, None for those of
    `SUPPRESSED` and `PROMOTED` that the model can carry out. `n_draws` draws at each rate. The first `n_layer_draws` of
    them (all, if they are fewer) are also applied to single layers at the highest rate: to `n_blocks` blocks of
    neighbouring layers, where there are more layers; 0 for none. `seed` is that of the draws.

    Raises UsageError for rates that are not above 0 and at most 1, and for impossible numbers.
    """

    suppress: tuple[float, ...] | None = None
    promote: tuple[float, ...] | None = None
    n_draws: int = 20
    n_layer_draws: int = 10
    n_blocks: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for action in _SIGNS:
            rates = getattr(self, action)
            if rates is None:
                continue
            if wrong := [rate for rate in rates if not (isinstance(rate, int | float) and 0 < rate <= 1)]:
                raise UsageError(f"{action}: {wrong[0]} is no rate above 0 and at most 1, like 0.1 or 10%")
            object.__setattr__(self, action, tuple(sorted({float(rate) for rate in rates})))
        # one draw says nothing about others
        limits = {"n_draws": (2, MAX_DRAWS), "n_layer_draws": (0, MAX_DRAWS), "n_blocks": (1, MAX_DRAWS)}
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"{name}: {value} is not from {least} to {most}")
        if self.n_layer_draws == 1:
            raise UsageError("n_layer_draws: 1 draw says nothing about others; give 2 or more, or 0 for none")
        if self.suppress == self.promote == ():
            raise UsageError("no rates; give some to suppress experts at, to promote them at, or both")

    def plan(self, identity: ModelIdentity, layers: Sequence[int]) -> Plan:
        """What is measured on a model, whose steerable `layers` are perturbed.

        Raises UsageError for a rate that the model cannot carry out: one that would leave fewer experts in a layer than
        a token uses, promote more than it uses, or take none at all.
        """
        if not layers:
            raise UsageError(f"{identity.short} has no layer whose experts can be steered; take another model")
        rates = {}
        for action in _SIGNS:
            wanted = getattr(self, action)
            if wanted is None:
                rates[action] = _defaults(action, identity, len(layers))
                continue
            for rate in wanted:
                if why := _problem(action, rate, identity, len(layers)):
                    raise UsageError(f"{action} {rate:g}: {why}")
            rates[action] = wanted
        if not any(rates.values()):
            raise UsageError(
                f"{identity.short}: no rate can be carried out; a token uses all experts, or name rates yourself"
            )
        return Plan(self, identity, tuple(layers), rates)


@dataclass(frozen=True, eq=False)
class Plan:
    """The perturbations of one model: `rates` of each action, rising, in `layers`."""

    of: Perturbations
    identity: ModelIdentity
    layers: tuple[int, ...]
    rates: Mapping[str, tuple[float, ...]]

    @property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Blocks of neighbouring layers that are perturbed alone; () for none, and for a single one."""
        n = min(self.of.n_blocks, len(self.layers))
        if n < 2 or not self.of.n_layer_draws:
            return ()
        return tuple(tuple(part.tolist()) for part in np.array_split(np.asarray(self.layers), n))

    def n_draws(self, block: Sequence[int] | None = None) -> int:
        """How many draws there are at each rate, or in a block of layers."""
        return self.of.n_draws if block is None else min(self.of.n_layer_draws, self.of.n_draws)

    @property
    def n_steerings(self) -> int:
        """How many perturbed models are measured."""
        n_actions = sum(1 for rates in self.rates.values() if rates)
        n_rates = sum(len(rates) for rates in self.rates.values())
        return n_rates * self.n_draws() + n_actions * sum(map(self.n_draws, self.blocks))

    def n_experts(self, rate: float) -> int:
        """How many experts of all layers a rate takes."""
        return _number(rate, self.identity, len(self.layers))

    def biases(self, action: str, rate: float, block: Sequence[int] | None = None) -> list[BiasFile | None]:
        """The bias of each draw, or what of it lies in a block of layers; None where that is nothing.

        A draw is an order of all experts in which a rising rate takes them, so a draw at a higher rate steers all that
        it steers at a lower one, and rates are compared on the same draws. Every layer has equally many, up to one.
        """
        n = self.n_experts(rate)
        found: list[BiasFile | None] = []
        for number in range(self.n_draws(block)):
            # a generator of its own for each draw: the first 20 of 40 are the same as 20
            rng = np.random.default_rng([self.of.seed, list(_SIGNS).index(action), number])
            signs = _taken(n, self.identity, self.layers, rng) * np.int8(_SIGNS[action])
            bias = BiasFile.from_signs(signs, self.identity)
            found.append(bias if block is None else only_layers(bias, block))
        return found


def _taken(n: int, identity: ModelIdentity, layers: Sequence[int], rng: np.random.Generator) -> npt.NDArray[np.int8]:
    """1 at the first `n` experts of a random order, [n_layer, n_expert]: a layer has at most one more than another."""
    taken = np.zeros(identity.shape, dtype=np.int8)
    each, more = divmod(n, len(layers))
    for place, index in enumerate(rng.permutation(len(layers)).tolist()):
        order = rng.permutation(identity.n_expert)
        taken[layers[index], order[: each + (place < more)]] = 1
    return taken


def _number(rate: float, identity: ModelIdentity, n_layers: int) -> int:
    return round(rate * identity.n_expert * n_layers)


def _most(action: str, identity: ModelIdentity) -> int:
    return identity.max_inactive if action == SUPPRESS else identity.max_active


def _problem(action: str, rate: float, identity: ModelIdentity, n_layers: int) -> str:
    """Why a model cannot carry out a rate, and the cure; "" if it can."""
    n, most = _number(rate, identity, n_layers), _most(action, identity)
    experts = f"{identity.n_expert} experts of a layer"
    if n < 1:
        least = math.ceil(500 / (identity.n_expert * n_layers)) / 1000
        return f"takes none of {identity.n_expert * n_layers} experts; give {least:g} or more"
    if rate * identity.n_expert <= most + _ROUNDING:  # and so in every layer, one more or not
        return ""
    if not most:
        return f"a token uses all {experts}, so none can be suppressed; leave it out"
    limit = math.floor(1000 * most / identity.n_expert) / 1000
    used = identity.n_expert_used
    if action == SUPPRESS:
        return f"leaves fewer than the {used} that a token uses of {experts}; give at most {limit:g}"
    return f"promotes more than the {used} that a token uses of {experts}; give at most {limit:g}"


def _defaults(action: str, identity: ModelIdentity, n_layers: int) -> tuple[float, ...]:
    """The default rates that a model can carry out."""
    limit = _most(action, identity) / identity.n_expert
    wanted = SUPPRESSED if action == SUPPRESS else tuple(part * limit for part in PROMOTED)
    return tuple(rate for rate in wanted if not _problem(action, rate, identity, n_layers))
