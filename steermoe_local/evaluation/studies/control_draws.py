"""How the controls of a steering are drawn: the biases of each kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import ChoiceError, UsageError
from ...maps.counts import RoutingCounts
from ...maps.expert_map import ExpertMap, parse_layers
from ...maps.significance import pearson
from ...pairs.pairs import Pair
from ...steering.bias_file import BiasFile
from ...steering.control_choices import activation_frequency, bottom_signs, draw_experts
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator
from .control_maps import ControlMap, HalvedMaps, halved_maps, superficial_maps

__all__ = ["ALL", "Draw", "Kind", "Plan", "reversed_bias"]

ALL = ("random", "matched", "bottom", "superficial", "shuffled", "same-side")
"""Kinds of control: random experts, random experts of matched activation frequency, those with the smallest |RD|, maps
of superficial pairs, maps of pairs with shuffled sides, maps of pairs that show one behaviour on both sides."""


def reversed_bias(steering: Steering, evaluator: Evaluator) -> BiasFile:
    """The bias that steers away: of the reversed choice; of a bias file its negation.

    Raises ChoiceError or FormatError when the model cannot carry it out.
    """
    if steering.bias is not None:
        bias = steering.bias
        values = {layer: -row for layer, row in bias.values.items()}
        return BiasFile(bias.identity, bias.mode, values, bias.epsilon)
    return _built(steering.changed(reverse=not steering.reverse, preset=None, preset_model=None), evaluator)


def _built(steering: Steering, evaluator: Evaluator) -> BiasFile:
    built = steering.bias_file(evaluator.identity)
    if built is None:
        raise UsageError(f"{steering.name}: chooses no experts, so there is nothing to control for")
    return built


@dataclass(frozen=True)
class Draw:
    """The biases of one control: towards, and away where it is wanted."""

    label: str
    biases: tuple[BiasFile | None, ...]


@dataclass(frozen=True)
class Kind:
    """All draws of one kind, or a note on why there are none."""

    draws: Sequence[Draw] = ()
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Plan:
    """Makes the draws of each kind; a kind's method has its name. They raise ChoiceError, FormatError, PairsError."""

    def __init__(
        self,
        evaluator: Evaluator,
        steering: Steering,
        away: bool,
        reverse: Steering | None,
        numbers: tuple[int, int],
        pairs: Sequence[Pair] | None,
        counts: RoutingCounts | None,
        recording: Mapping[str, Any],
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.evaluator, self.steering, self.away = evaluator, steering, away
        self.n_draws, self.n_maps = numbers
        self.pairs, self.counts, self.recording, self.seed, self.say = pairs, counts, recording, seed, say
        self.identity = evaluator.identity
        self.real = [_built(steering, evaluator)]
        if not self.real[0].layers:
            raise UsageError(f"{steering.name}: chooses no experts, so there is nothing to control for")
        self.reverse = reverse
        if away:
            self.real.append(reversed_bias(steering, evaluator) if reverse is None else _built(reverse, evaluator))
        self.tables = [bias.dense() for bias in self.real]
        self.layers = self._scope()
        self._halves: HalvedMaps | None = None

    def _scope(self) -> tuple[int, ...]:
        """The layers of which controls may take experts: those that the real choice could have taken."""
        expert_map = self.steering.expert_map
        if expert_map is not None:
            layers = np.flatnonzero(expert_map.rd.any(axis=1)).tolist()
        else:
            layers = [index for index, info in enumerate(self.evaluator.model.layer_info()) if info.steerable]
        scope = None if self.steering.layers is None else parse_layers(self.steering.layers)
        return tuple(layer for layer in layers if scope is None or layer in scope)

    def random(self) -> Kind:
        return self._drawn("random", None)

    def matched(self) -> Kind:
        frequency = self._frequency()
        if frequency is None:
            return Kind(note="left out: the map has no counts of activations; give the pairs, or counts of them")
        return self._drawn("matched", frequency)

    def _drawn(self, kind: str, frequency: npt.NDArray[np.float64] | None) -> Kind:
        draws, gaps, even = [], [], []
        for number in range(self.n_draws):
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
            note = f"{linked:.0%} of the drawn experts have an |RD| as large as the chosen: they are tied to it as well"
        return Kind(draws, note, details)

    def _linked(self, draws: Sequence[Draw]) -> float | None:
        """Share of the drawn experts whose |RD| is at least the smallest of the chosen ones; None without a map."""
        if self.steering.expert_map is None:
            return None
        sizes = np.abs(self.steering.expert_map.rd)
        least = sizes[self.tables[0] != 0].min()
        drawn = [sizes[draw.biases[0].dense() != 0] for draw in draws if draw.biases[0] is not None]
        return float(np.mean(np.concatenate(drawn) >= least))

    def bottom(self) -> Kind:
        expert_map = self.steering.expert_map
        if expert_map is None:
            return Kind(note="left out: a bias file has no scores; give the map that it was built from")
        tables = []
        for bias, reverse in zip(self.real, (self.steering.reverse, not self.steering.reverse), strict=False):
            rd = -expert_map.rd if reverse else expert_map.rd
            signs = bottom_signs(rd, bias.n_active, bias.n_inactive, self.identity, self.layers)
            strength = np.float32(1 if self.steering.scale is None else self.steering.scale)
            tables.append(signs.astype(np.float32) * strength)
        if any(np.array_equal(table, real) for table in tables for real in self.tables):
            return Kind(note="left out: the choice takes all experts, so those with the smallest |RD| are the same")
        shared = [
            float(((table != 0) & (table == real)).sum()) for table, real in zip(tables, self.tables, strict=True)
        ]
        note = "one draw: p cannot be below 0.5"
        return Kind([self._draw("smallest |RD|", tables)], note, {"shared_experts": int(sum(shared))})

    def superficial(self) -> Kind:
        if not self.pairs:
            return Kind(note="left out: no pairs to make superficial ones of; give those of the map")
        self.say(f"counting {len(self.pairs)} superficial pairs")
        return self._of_maps(
            superficial_maps(self.evaluator.model, self.pairs, recording=self._recording("superficial pairs"))
        )

    def shuffled(self) -> Kind:
        if not self.pairs:
            return Kind(note="left out: no pairs to shuffle; give those of the map")
        found = self._of_maps(self._recorded().shuffled)
        either = [max(fact["shared"], fact["shared_reversed"]) for fact in found.details["maps"]]
        if either and max(either) > 0.5:
            note = "shuffled sides hide the direction, not the experts, and the rule does not see how small RD is"
            return dataclasses.replace(found, note="; ".join(filter(None, [found.note, note])))
        return found

    def same_side(self) -> Kind:
        if not self.pairs:
            return Kind(note="left out: no pairs whose sides could be divided; give those of the map")
        return self._of_maps(self._recorded().same_side)

    def _of_maps(self, maps: Sequence[ControlMap]) -> Kind:
        """Draws of other maps, chosen from with the same numbers, layers and rule as the real one."""
        draws, facts, notes = [], [], []
        scores = self.steering.expert_map
        for made in maps:
            try:
                biases = self._chosen(made.expert_map)
            except ChoiceError as error:
                notes.append(f"{made.label} left out: {error}")
                continue
            draws.append(Draw(made.label, tuple(biases)))
            first = np.zeros(self.identity.shape) if biases[0] is None else biases[0].dense()
            same, other = (
                float(((first == table) & (first != 0)).sum() / (table != 0).sum())
                for table in (self.tables[0], -self.tables[0])
            )
            fact: dict[str, Any] = {
                "label": made.label,
                "n_pairs": made.expert_map.n_pairs,
                "shared": same,
                "shared_reversed": other,
            }
            if scores is not None:
                fact["pearson"] = pearson(made.expert_map.rd[list(self.layers)], scores.rd[list(self.layers)])
            facts.append(fact)
        if alike := sum(fact["shared"] == 1 for fact in facts):
            notes.append(f"{alike} of these maps choose the very experts of the real one")
        return Kind(draws, "; ".join(notes), {"maps": facts})

    def _chosen(self, expert_map: ExpertMap) -> list[BiasFile | None]:
        """The biases of another map, as the real ones were built."""
        real = self.steering
        if real.bias is not None:
            common = {"epsilon": real.bias.epsilon}
            if real.mode == "soft":
                common = {"scale": float(np.abs(self.tables[0]).max())}
            real = Steering(
                real.name,
                expert_map=expert_map,
                activate=real.bias.n_active,
                deactivate=real.bias.n_inactive,
                **common,  # type: ignore[arg-type]  # epsilon or scale
            )
        made = real.changed(expert_map=expert_map, path=None, preset=None, preset_model=None)
        other = self.reverse or made.changed(reverse=not made.reverse)
        turned = made.changed(reverse=other.reverse, activate=other.activate, deactivate=other.deactivate)
        back = [turned] if len(self.real) > 1 else []
        return [one.bias_file(self.identity) for one in (made, *back)]

    def _recorded(self) -> HalvedMaps:
        if self._halves is None:
            assert self.pairs is not None
            self.say(f"counting {len(self.pairs)} pairs")
            self._halves = halved_maps(
                self.evaluator.model, self.pairs, self.n_maps, seed=self.seed, recording=self._recording("pairs")
            )
        return self._halves

    def _recording(self, what: str) -> dict[str, Any]:
        """How pairs are counted: rendered and computed as the evaluator does its prompts, if nothing else is said."""
        return {**self.evaluator.recording_arguments(what), **self.recording}

    def _frequency(self) -> npt.NDArray[np.float64] | None:
        """Activation frequency of all experts: of the counts given, else of the map's, else of the pairs."""
        source: Any = self.counts or self.steering.expert_map
        if source is not None and source.a1 is None:
            source = None
        if source is None and self.pairs:
            source = self._recorded().real
        if source is None:
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
            else:
                biases.append(BiasFile.from_signs(table, self.identity, real.epsilon))
        return Draw(label, tuple(biases))
