"""Reports on the routing of an answer: which experts it used, and what steering changed."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from ..maps.expert_map import ExpertMap
from ..steering.bias_plan import AnyBias, BiasPlan
from .slots import Key

Int64 = npt.NDArray[np.int64]
Signs = npt.NDArray[np.int8]


@dataclass(frozen=True)
class ExpertUse:
    """How often an answer used an expert.

    `slots`: tokens that selected it. `share`: of its layer's slots (tokens times top-k). `of_tokens`: of the tokens.
    `sign`: +1 promoted, -1 suppressed, 0 neither, when the answer was computed. `rd`: None without a map.
    `promote`, `suppress`: the effect of that action on it in nats a token, None where the map does not have it.
    """

    expert: int
    slots: int
    share: float
    of_tokens: float
    sign: int
    rd: float | None
    promote: float | None = None
    suppress: float | None = None


@dataclass(frozen=True)
class LayerUse:
    """A layer's experts that were used or chosen, the most used first."""

    layer: int
    experts: tuple[ExpertUse, ...]


@dataclass(frozen=True)
class AnswerRouting:
    """The routing behind an answer, in the layers that route.

    `n_tokens`: rows that were counted, those whose logits gave the answer's tokens. `promoted` and `suppressed`: share
    of all slots that promoted, suppressed experts took. `mean_rd`: the mean over all slots of the RD of the expert in
    it. RD sums to 0 in every layer, so an even use of all experts has mean RD 0; above 0 the answer used the experts of
    the map's positive side. `position` puts it on the map's own scale: 0 is the mean RD of the negative side's target
    tokens, 1 that of the positive side's. Both None without a map; `position` also without its counts.
    """

    n_tokens: int
    n_expert_used: int
    layers: tuple[LayerUse, ...]
    promoted: float
    suppressed: float
    mean_rd: float | None
    position: float | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SlotChange:
    """Slots that the experts of one sign took: unsteered, and as the answer was computed.

    Shares are of all slots. `moved` counts what steering did: slots forced in for promoted experts, slots taken away
    for suppressed ones. It is a difference of counts, so only the soft rule can make it negative.
    """

    sign: int
    n_experts: int
    unsteered: int
    steered: int
    share_unsteered: float
    share_steered: float

    @property
    def moved(self) -> int:
        """Slots forced in (promoted) or suppressed."""
        return self.sign * (self.steered - self.unsteered)


@dataclass(frozen=True)
class LayerChange:
    """One layer's part of a `WhyReport`; shares are of the layer's slots."""

    layer: int
    promoted: SlotChange
    suppressed: SlotChange
    changed: int


@dataclass(frozen=True)
class WhyReport:
    """How steering changed the routing of an answer.

    The same tokens, the answer's own, are read by the model once unsteered (teacher forcing) and compared with the
    routing that produced them. `changed`: slots that hold another expert than unsteered, at the least: half the sum of
    |steered - unsteered| over experts.
    """

    n_tokens: int
    n_expert_used: int
    n_slots: int
    promoted: SlotChange
    suppressed: SlotChange
    changed: int
    layers: tuple[LayerChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        data = asdict(self)
        for part, source in [(data, self), *zip(data["layers"], self.layers, strict=True)]:
            for name in ("promoted", "suppressed"):
                part[name]["moved"] = getattr(source, name).moved
        return data


def signs_in_force(bias: AnyBias | None, keys: Collection[Key]) -> Signs | None:
    """Which experts were promoted (+1) and suppressed (-1) in a text, int8 [n_layer, n_expert]; None: none were.

    `keys` are those of the biases at its tokens; only these count of a plan. An expert that some of them promote and
    others suppress counts for neither.
    """
    if not isinstance(bias, BiasPlan):
        return None if bias is None else bias.signs
    in_force = set(keys)
    signs = [one.signs for one in bias.biases if one.key in in_force]
    if not signs:
        return None
    up, down = np.any([one > 0 for one in signs], axis=0), np.any([one < 0 for one in signs], axis=0)
    return np.asarray(up.astype(np.int8) - down, np.int8)


def answer_routing(
    counts: Int64, n_expert_used: int, signs: Signs | None = None, expert_map: ExpertMap | None = None
) -> AnswerRouting:
    """Report selections `counts` [n_layer, n_expert] of an answer.

    `signs` [n_layer, n_expert] are what steered it. Raises UsageError when nothing was counted.
    """
    slots, n_tokens = _slots(counts, n_expert_used)
    signs = np.zeros(counts.shape, np.int8) if signs is None else signs
    rd = None if expert_map is None else expert_map.rd
    layers = []
    for layer in np.flatnonzero(slots).tolist():
        row = counts[layer]
        shown = np.flatnonzero((row > 0) | (signs[layer] != 0))
        order = shown[np.lexsort((shown, -row[shown]))].tolist()
        layers.append(
            LayerUse(
                layer,
                tuple(
                    ExpertUse(
                        expert=expert,
                        slots=int(row[expert]),
                        share=float(row[expert] / slots[layer]),
                        of_tokens=float(row[expert] * n_expert_used / slots[layer]),
                        sign=int(signs[layer, expert]),
                        rd=None if rd is None else float(rd[layer, expert]),
                        **_effects(expert_map, layer, expert),
                    )
                    for expert in order
                ),
            )
        )
    total = int(slots.sum())
    return AnswerRouting(
        n_tokens=n_tokens,
        n_expert_used=n_expert_used,
        layers=tuple(layers),
        promoted=float(counts[signs > 0].sum() / total),
        suppressed=float(counts[signs < 0].sum() / total),
        mean_rd=None if rd is None else _mean_rd(counts, rd),
        position=None if expert_map is None else _position(counts, expert_map),
    )


def why(unsteered: Int64, steered: Int64, n_expert_used: int, signs: Signs) -> WhyReport:
    """Compare selections [n_layer, n_expert] of the same tokens. Raises UsageError when nothing was counted."""
    slots, n_tokens = _slots(steered, n_expert_used)
    if (unsteered.sum(axis=1) != slots).any():
        raise UsageError("the two routings are not of the same tokens")
    layers = [
        LayerChange(
            layer,
            _change(+1, unsteered[layer], steered[layer], signs[layer]),
            _change(-1, unsteered[layer], steered[layer], signs[layer]),
            int(np.abs(steered[layer] - unsteered[layer]).sum()) // 2,
        )
        for layer in np.flatnonzero(slots).tolist()
    ]
    return WhyReport(
        n_tokens=n_tokens,
        n_expert_used=n_expert_used,
        n_slots=int(slots.sum()),
        promoted=_change(+1, unsteered, steered, signs),
        suppressed=_change(-1, unsteered, steered, signs),
        changed=sum(layer.changed for layer in layers),
        layers=tuple(layers),
    )


def _slots(counts: Int64, n_expert_used: int) -> tuple[Int64, int]:
    """(slots of each layer, tokens)."""
    slots: Int64 = counts.sum(axis=1)
    if not slots.any():
        raise UsageError("the answer has no token whose routing was counted; ask something first")
    return slots, int(slots.max()) // n_expert_used


def _change(sign: int, unsteered: Int64, steered: Int64, signs: Signs) -> SlotChange:
    chosen, total = signs == sign, int(steered.sum())
    before, after = int(unsteered[chosen].sum()), int(steered[chosen].sum())
    return SlotChange(sign, int(chosen.sum()), before, after, before / total, after / total)


def _effects(expert_map: ExpertMap | None, layer: int, expert: int) -> dict[str, float]:
    """The effects of the actions on an expert, by the action's name."""
    if expert_map is None or expert_map.effects is None:
        return {}
    return {action: row["effect"] for action, row in expert_map.effects.at(layer, expert).items()}


def _mean_rd(counts: Int64, rd: npt.NDArray[np.float64]) -> float:
    return float((counts * rd).sum() / counts.sum())


def _position(counts: Int64, expert_map: ExpertMap) -> float | None:
    """0: as the negative side's target tokens, 1: as the positive side's."""
    if expert_map.a1 is None or expert_map.a2 is None:
        return None
    first, second = _mean_rd(expert_map.a1, expert_map.rd), _mean_rd(expert_map.a2, expert_map.rd)
    return (_mean_rd(counts, expert_map.rd) - second) / (first - second) if first > second else None
