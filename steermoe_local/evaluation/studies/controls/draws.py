"""Draws the controls of a steering: the biases of each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ....errors import ChoiceError, UsageError
from ....maps.counts import RoutingCounts
from ....maps.expert_map import ExpertMap, parse_layers
from ....maps.ranks import OBSERVED, action_scores, observed_score
from ....maps.significance import pearson
from ....pairs.builders import Tally
from ....pairs.control_pairs import superficial_pairs
from ....pairs.pairs import Pair
from ....steering.bias_file import BiasFile
from ....steering.control_choices import activation_frequency, bottom_signs, draw_experts
from ....steering.steering import Steering
from ...measuring.evaluator import Evaluator
from .maps import HalvedMaps, halved_maps, superficial_maps

ALL = ("random", "matched", "bottom", "superficial", "shuffled", "same-side")
"""Kinds of control: random experts, random experts of matched activation frequency, those with the smallest |RD|, maps
of superficial pairs, maps of pairs with shuffled sides, maps of pairs that show one behaviour on both sides."""


@dataclass(frozen=True)
class Controls:
    """Which controls are measured: `kinds` of `ALL`, `n_draws` of each random kind, `n_maps` of shuffled pairs and of
    one side.

    `pairs` are those that the map was made from, for the kinds that are maps. `recording`: arguments of `record_counts`
    that differ from the evaluator's. `counts`, of any text, give activation frequencies in place of the map's. Raises
    UsageError for unknown kinds and numbers below 1.
    """

    n_draws: int = 20
    kinds: Sequence[str] = ALL
    pairs: Sequence[Pair] | None = None
    recording: Mapping[str, Any] | None = None
    n_maps: int = 10
    counts: RoutingCounts | None = None

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in ALL]:
            raise UsageError(f"{unknown[0]}: no kind of control; take some of {', '.join(ALL)}")
        for name in ("n_draws", "n_maps"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}: {getattr(self, name)} is not from 1 up")

    def n_expected(self, kind: str, steering: Steering) -> int:
        """How many draws of a kind there will be, at most."""
        of_map = steering.expert_map
        if kind == "random":
            return self.n_draws
        if kind == "matched":
            known = self.counts is not None or (of_map is not None and of_map.a1 is not None) or bool(self.pairs)
            return self.n_draws if known else 0
        if kind == "bottom":
            return 1 if of_map is not None else 0
        if not self.pairs or any(name not in ("rd", "log-odds") for name in _ranks(steering)):
            return 0
        if kind != "superficial":
            return self.n_maps if len(self.pairs) > 1 else 0
        kinds = {pair.id.rpartition("~")[2] for pair in superficial_pairs(self.pairs, Tally())}
        return len(kinds) + (len(kinds) > 1)  # and all kinds together


@dataclass(frozen=True)
class Draw:
    """The biases of one control: in the steering's direction, and in the other where it is wanted."""

    label: str
    biases: tuple[BiasFile | None, ...]


@dataclass(frozen=True)
class Kind:
    """All draws of one kind, or a note on why there are none."""

    draws: Sequence[Draw] = ()
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


def _ranks(steering: Steering) -> list[str]:
    """The scores that experts are chosen and weighted by."""
    return [name for name in (steering.rank, steering.weights) if name]


class ControlPlan:
    """What the controls of a steering are drawn from: its biases `real`, the layers in scope, pairs and counts.

    With `both_ways` there is a bias for each direction; `reverse` is what steers in the other one, where it is not the
    reversed choice. Raises UsageError for a steering that chooses no experts, ChoiceError for one whose reverse cannot
    be carried out.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        steering: Steering,
        controls: Controls,
        *,
        both_ways: bool = True,
        reverse: Steering | None = None,
        seed: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self.evaluator, self.steering, self.controls, self.reverse = evaluator, steering, controls, reverse
        self.identity, self.seed = evaluator.identity, seed
        self.log = log or (lambda _: None)
        self.real = [self._built(steering)]
        if not self.real[0].layers:
            raise UsageError(f"{steering.name}: chooses no experts, so there is nothing to control for")
        if both_ways:
            self.real.append(self._reversed())
        self.tables = [bias.dense() for bias in self.real]
        self.layers = self._scope()

    def draws(self, kind: str) -> Kind:
        """The draws of one of `ALL`. Raises ChoiceError, FormatError, PairsError, UsageError where it has none."""
        for name in _ranks(self.steering):
            if kind in ("superficial", "shuffled", "same-side") and name not in ("rd", "log-odds"):
                return Kind(note=f"left out: maps of other pairs have counts alone, and experts are chosen by {name}")
        found: Kind = getattr(self, f"_{kind.replace('-', '_')}")()
        return found

    def _reversed(self) -> BiasFile:
        """The bias in the other direction: of the reversed choice; of a bias file its negation."""
        bias = self.steering.bias
        if self.reverse is None and bias is not None:
            negated = {layer: -row for layer, row in bias.values.items()}
            return BiasFile(bias.identity, bias.mode, negated, bias.epsilon, cap=bias.cap)
        other = {"reverse": not self.steering.reverse, "preset": None, "preset_model": None}
        return self._built(self.reverse or self.steering.changed(**other))

    def _built(self, steering: Steering) -> BiasFile:
        built = steering.bias_file(self.identity)
        if built is None:
            raise UsageError(f"{steering.name}: chooses no experts, so there is nothing to control for")
        return built

    def _scope(self) -> tuple[int, ...]:
        """The layers of which controls may take experts: those that the real choice could have taken."""
        expert_map = self.steering.expert_map
        if expert_map is not None:
            layers = np.flatnonzero(expert_map.rd.any(axis=1)).tolist()
        else:
            layers = [index for index, info in enumerate(self.evaluator.model.layer_info()) if info.steerable]
        scope = None if self.steering.layers is None else parse_layers(self.steering.layers)
        return tuple(layer for layer in layers if scope is None or layer in scope)

    def _random(self) -> Kind:
        return self._drawn("random", None)

    def _matched(self) -> Kind:
        frequency = self._frequency()
        if frequency is None:
            return Kind(note="left out: the map has no counts of activations; give the pairs, or counts of them")
        return self._drawn("matched", frequency)

    def _drawn(self, kind: str, frequency: npt.NDArray[np.float64] | None) -> Kind:
        draws, gaps, even = [], [], []
        for number in range(self.controls.n_draws):
            # a generator of its own for each draw: the first 20 of 40 are the same as 20
            rng = np.random.default_rng([self.seed, ALL.index(kind), number])
            moved = draw_experts(self.tables, self.identity, self.layers, rng, frequency=frequency)
            draws.append(self._draw(str(number + 1), [moved.apply(table) for table in self.tables]))
            if frequency is not None:
                gaps.append(moved.frequency_gap(frequency))
                rng = np.random.default_rng([self.seed, ALL.index("random"), number])
                even.append(draw_experts(self.tables, self.identity, self.layers, rng).frequency_gap(frequency))
        if frequency is None:
            return Kind(draws)
        linked = self._linked(draws)
        details = {
            "frequency_gap": float(np.mean(gaps)),
            "frequency_gap_of_even_draws": float(np.mean(even)),
            "linked": linked,
        }
        note = ""
        if linked is not None and linked >= 0.5:
            score = "an |RD|" if self.steering.rank == "rd" else f"a score ({self.steering.rank})"
            note = f"{linked:.0%} of the drawn experts have {score} as large as the chosen: they are tied to it as well"
        return Kind(draws, note, details)

    def _linked(self, draws: Sequence[Draw]) -> float | None:
        """Share of the drawn experts whose score is at least the smallest of the chosen ones'; None without a map.

        The score is that of the rank by which they were chosen: |RD|, unless another one is named.
        """
        if self.steering.expert_map is None:
            return None
        # the larger of what either action is worth: |RD| where experts are chosen by it
        sizes = np.maximum(*map(np.abs, action_scores(self.steering.expert_map, self.steering.rank)))
        least = sizes[self.tables[0] != 0].min()
        drawn = [sizes[draw.biases[0].dense() != 0] for draw in draws if draw.biases[0] is not None]
        return float(np.mean(np.concatenate(drawn) >= least))

    def _bottom(self) -> Kind:
        expert_map = self.steering.expert_map
        if expert_map is None:
            return Kind(note="left out: a bias file has no scores; give the map that it was built from")
        # effects are known of the candidates alone, so the least of all experts are those of RD
        rank = self.steering.rank if self.steering.rank in OBSERVED else "rd"
        score, tables = observed_score(expert_map, rank), []
        for bias, reverse in zip(self.real, (self.steering.reverse, not self.steering.reverse), strict=False):
            signs = bottom_signs(
                -score if reverse else score, bias.n_active, bias.n_inactive, self.identity, self.layers
            )
            strength = np.float32(1 if self.steering.scale is None else self.steering.scale)
            table = signs.astype(np.float32) * strength
            if self.steering.weights is not None or self.steering.values:  # the same strengths as the real ones
                for sign in (1, -1):
                    table[signs == sign] = bias.dense()[bias.signs == sign]
            tables.append(table)
        smallest = f"the smallest |{rank.upper() if rank == 'rd' else rank}|"
        if any(np.array_equal(table, real) for table in tables for real in self.tables):
            return Kind(note=f"left out: the choice takes all experts, so those with {smallest} are the same")
        shared = sum(
            int(((table != 0) & (table == real)).sum()) for table, real in zip(tables, self.tables, strict=True)
        )
        note = "one draw: p cannot be below 0.5"
        return Kind([self._draw(smallest.removeprefix("the "), tables)], note, {"shared_experts": shared})

    def _superficial(self) -> Kind:
        pairs = self.controls.pairs
        if not pairs:
            return Kind(note="left out: no pairs to make superficial ones of; give those of the map")
        self.log(f"counting {len(pairs)} superficial pairs")
        return self._of_maps(
            superficial_maps(self.evaluator.model, pairs, recording=self._recording("superficial pairs"))
        )

    def _shuffled(self) -> Kind:
        if not self.controls.pairs:
            return Kind(note="left out: no pairs to shuffle; give those of the map")
        found = self._of_maps(self._halves.shuffled)
        either = [max(fact["shared"], fact["shared_reversed"]) for fact in found.details["maps"]]
        if either and max(either) > 0.5:
            note = "shuffled sides hide the direction, not the experts, and the rule does not see how small RD is"
            return dataclasses.replace(found, note="; ".join(filter(None, [found.note, note])))
        return found

    def _same_side(self) -> Kind:
        if not self.controls.pairs:
            return Kind(note="left out: no pairs whose sides could be divided; give those of the map")
        return self._of_maps(self._halves.same_side)

    def _of_maps(self, maps: Mapping[str, ExpertMap]) -> Kind:
        """Draws of other maps, chosen from with the same numbers, layers and rule as the real one."""
        draws, notes = [], []
        facts: list[dict[str, Any]] = []
        scores = self.steering.expert_map
        for label, expert_map in maps.items():
            try:
                biases = self._chosen(expert_map)
            except ChoiceError as error:
                notes.append(f"{label} left out: {error}")
                continue
            draws.append(Draw(label, tuple(biases)))
            first = np.zeros(self.identity.shape) if biases[0] is None else biases[0].dense()
            same, other = (
                float(((first == table) & (first != 0)).sum() / (table != 0).sum())
                for table in (self.tables[0], -self.tables[0])
            )
            facts.append({"label": label, "n_pairs": expert_map.n_pairs, "shared": same, "shared_reversed": other})
            if scores is not None:
                layers = list(self.layers)
                facts[-1]["pearson"] = pearson(expert_map.rd[layers], scores.rd[layers])
        if alike := sum(fact["shared"] == 1 for fact in facts):
            notes.append(f"{alike} of these maps choose the very experts of the real one")
        return Kind(draws, "; ".join(notes), {"maps": facts})

    def _chosen(self, expert_map: ExpertMap) -> list[BiasFile | None]:
        """The biases of another map, as the real ones were built."""
        real = self.steering
        if real.bias is not None or real.values:
            made = self.real[0]
            common = {"epsilon": made.epsilon} | ({"cap": made.cap} if made.cap else {})
            if real.mode == "soft":
                common = {"scale": float(np.abs(self.tables[0]).max())}
            real = Steering(
                real.name,
                expert_map=expert_map,
                activate=made.n_active,
                deactivate=made.n_inactive,
                reverse=real.reverse,
                **common,  # type: ignore[arg-type]  # epsilon and cap, or scale
            )
        choices = [real.changed(expert_map=expert_map, path=None, preset=None, preset_model=None)]
        if len(self.real) > 1:
            other = self.reverse or choices[0].changed(reverse=not real.reverse)
            numbers = {"activate": other.activate, "deactivate": other.deactivate}
            choices.append(choices[0].changed(reverse=other.reverse, **numbers))
        return [choice.bias_file(self.identity) for choice in choices]

    @cached_property
    def _halves(self) -> HalvedMaps:
        """Maps of the pairs in halves; they are counted once for all kinds."""
        pairs = self.controls.pairs or ()
        self.log(f"counting {len(pairs)} pairs")
        recording = self._recording("pairs")
        return halved_maps(self.evaluator.model, pairs, self.controls.n_maps, seed=self.seed, recording=recording)

    def _recording(self, what: str) -> dict[str, Any]:
        """Arguments of `record_counts`: as the evaluator computes its prompts, unless the caller differs."""
        return {**self.evaluator.recording_arguments(what), **(self.controls.recording or {})}

    def _frequency(self) -> npt.NDArray[np.float64] | None:
        """Activation frequency of all experts: of the counts given, else of the map's, else of the pairs."""
        source: Any = self.controls.counts or self.steering.expert_map
        if (source is None or source.a1 is None) and self.controls.pairs:
            source = self._halves.real
        if source is None or source.a1 is None:
            return None
        if source.identity.shape != self.identity.shape:
            raise UsageError(f"counts of {source.identity.short}, but the model is {self.identity.short}")
        return activation_frequency(source.a1, source.n1, source.a2, source.n2)

    def _draw(self, label: str, tables: Sequence[npt.NDArray[Any]]) -> Draw:
        """A draw by its values, under the rule of the real steering."""
        biases = []
        for table, real in zip(tables, self.real, strict=True):
            if real.mode == "soft":
                biases.append(BiasFile.from_soft(table, self.identity))
            elif real.cap is not None:
                biases.append(BiasFile.from_capped(table, self.identity, real.cap, real.epsilon))
            else:
                biases.append(BiasFile.from_signs(table, self.identity, real.epsilon))
        return Draw(label, tuple(biases))
