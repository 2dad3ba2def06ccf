"""The result of an audit: what of a behaviour is kept at each rate, in each block of layers and on each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ...measuring.json_values import from_plain, plain
from ...metrics.crossed import crossed_share
from ...metrics.intervals import Interval
from ...tasks.neutral_text import TextScore
from ..transfer.agreement import RoutingAgreement
from ..transfer.quantize import ModelFile
from .perturbations import PROMOTE, SUPPRESS

QUANTILES = {"worst": 0.0, "q10": 0.1, "median": 0.5, "q90": 0.9, "best": 1.0}
LEVEL = 0.8
"""The share kept below which something is broken, unless another is asked for."""
HOLDS, BEFORE, AFTER, TOGETHER, UNTOLD = "holds", "before", "after", "together", "not told"
"""What a behaviour does against the language: it does not break at any rate and is told to be above the level at all;
it breaks before it, after it, at the same rate; the intervals do not tell."""


@dataclass(frozen=True)
class Kept:
    """The share of what showed unsteered that still shows, over items (or tokens) and draws.

    `share` with its interval over both; `quantiles` over the draws ("worst" to "best"), `draws` the share of each.
    """

    share: Interval
    quantiles: Mapping[str, float]
    draws: tuple[float, ...]

    @classmethod
    def of(cls, table: npt.NDArray[Any]) -> Kept:
        """Of values from 0 to 1, [n_items, n_draws]."""
        draws = np.asarray(table, dtype=np.float64).mean(axis=0)
        quantiles = {name: float(np.quantile(draws, at)) for name, at in QUANTILES.items()}
        return cls(crossed_share(table), quantiles, tuple(draws.tolist()))


@dataclass(frozen=True)
class Point:
    """What was measured under all draws of one action at one rate, in some layers.

    `n_experts` are steered, at most, in `layers`. `behaviour`: the items that show the task's positive side unsteered;
    `gained`: the share of its other items that show it, None without others; `shown`: the share of all items. `broken`:
    share of its answers that are ill-formed, empty or loop. `unrelated`: the same as `behaviour` of the unrelated
    task's items. `text`: tokens of the neutral text whose likeliest token is the unsteered model's; `kl`, in nats, and
    `perplexity_ratio`, to the unsteered model: mean, and geometric mean, over the draws. `gap` and `text_gap`: the
    behaviour's share kept less that of the unrelated task, and of the text, under the same draws. None: not measured.
    """

    action: str
    rate: float
    layers: tuple[int, ...]
    n_experts: int
    behaviour: Kept
    gained: float | None
    shown: float
    broken: float
    unrelated: Kept | None = None
    text: Kept | None = None
    kl: float | None = None
    perplexity_ratio: float | None = None
    gap: Interval | None = None
    text_gap: Interval | None = None

    @property
    def language(self) -> Kept | None:
        """What the behaviour is compared with: the unrelated task, or the text where there is none."""
        return self.unrelated or self.text

    @property
    def language_gap(self) -> Interval | None:
        """The behaviour's share kept less that of `language`."""
        return self.gap if self.unrelated else self.text_gap


@dataclass(frozen=True)
class Weakest:
    """The block of layers in which an action keeps least of the behaviour.

    `margins`: by how much each other block keeps more, over the same items and draws, by depth.
    """

    action: str
    layers: tuple[int, ...]
    margins: tuple[Interval, ...]

    @property
    def clear(self) -> bool:
        """Whether all others keep more, beyond the 95% intervals."""
        return all(margin.low > 0 for margin in self.margins)

    @property
    def none(self) -> bool:
        """Whether no block keeps more than another."""
        return all(margin.value == 0 for margin in self.margins)


@dataclass(frozen=True)
class ModelAudit:
    """One model: the base, or a quantization of it.

    `unsteered`: share of the items that show the behaviour. `kept`, `unrelated_kept`: what of that which the base shows
    unsteered this model shows unsteered; `routing` and `text` compare with the base likewise; all None on the base.
    `points` by action and rising rate, `blocks` by action and depth at the highest rate, base alone.
    """

    name: str
    file: ModelFile | None
    unsteered: Interval
    points: tuple[Point, ...]
    blocks: tuple[Point, ...] = ()
    weakest: tuple[Weakest, ...] = ()
    kept: Interval | None = None
    unrelated_kept: Interval | None = None
    routing: RoutingAgreement | None = None
    text: TextScore | None = None
    shown: tuple[str, ...] = field(default=(), repr=False)
    """Ids of the items that show the behaviour unsteered."""
    unrelated_shown: tuple[str, ...] = field(default=(), repr=False)

    def of(self, action: str) -> tuple[Point, ...]:
        """The points of an action, by rising rate."""
        return tuple(point for point in self.points if point.action == action)

    def to_dict(self, items: bool = False) -> dict[str, Any]:
        """As plain JSON values; with the items it can be read again."""
        return plain(self, without=() if items else ("shown", "unrelated_shown"))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelAudit:
        """Read what `to_dict(items=True)` made."""
        found: ModelAudit = from_plain(cls, data)
        return found


@dataclass(frozen=True)
class Break:
    """Where something breaks under an action on a model: the rates, None where it does not at any that was measured.

    `order`: `HOLDS`, `BEFORE`, `AFTER`, `TOGETHER` or `UNTOLD`, of the behaviour against the unrelated task, or the
    text where there is none.
    """

    model: str
    action: str
    behaviour: float | None
    unrelated: float | None
    text: float | None
    order: str


@dataclass(frozen=True)
class Audit:
    """How a behaviour holds on a model, and on its quantizations, in the order in which they were asked for."""

    task: str
    positive: str
    unrelated: str | None
    level: float
    models: tuple[ModelAudit, ...]
    notes: tuple[str, ...]
    provenance: Mapping[str, Any]

    @property
    def base(self) -> ModelAudit:
        return self.models[0]

    @property
    def breaks(self) -> tuple[Break, ...]:
        """Where it breaks, for each model and action."""
        found = ((model, action, model.of(action)) for model in self.models for action in (SUPPRESS, PROMOTE))
        return tuple(_break(model.name, action, points, self.level) for model, action, points in found if points)

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        models = [model.to_dict() for model in self.models]
        for data, model in zip(models, self.models, strict=True):
            for part, weakest in zip(data["weakest"], model.weakest, strict=True):
                part["clear"] = weakest.clear
        return {**plain(self), "models": models, "breaks": [plain(found) for found in self.breaks]}


def breaks_at(rates: Sequence[float], shares: Sequence[Interval], level: float) -> float | None:
    """The lowest of the rising `rates` from which on every interval lies below `level`; None: it does not break.

    From the highest rate down, each is only looked at if the one above it is broken, so the chance that anything is
    called broken wrongly stays that of one interval, 2.5%, however many rates there are (Maurer, Hothorn and Lehmacher,
    1995: testing in a fixed order).
    """
    found = None
    for rate, share in zip(reversed(rates), reversed(shares), strict=True):
        if share.high >= level:
            break
        found = rate
    return found


def _break(model: str, action: str, points: Sequence[Point], level: float) -> Break:
    rates = [point.rate for point in points]

    def at(kept: Sequence[Kept | None]) -> float | None:
        shares = [found.share for found in kept if found is not None]
        return breaks_at(rates, shares, level) if len(shares) == len(rates) else None

    behaviour = at([point.behaviour for point in points])
    unrelated, text = at([point.unrelated for point in points]), at([point.text for point in points])
    language = unrelated if points[0].unrelated else text
    order = _order(points, behaviour, language, level)
    return Break(model, action, behaviour, unrelated, text, order)


def _order(points: Sequence[Point], behaviour: float | None, language: float | None, level: float) -> str:
    by_rate = {point.rate: point for point in points}
    if behaviour is None and language is None:
        return HOLDS if all(point.behaviour.share.low >= level for point in points) else UNTOLD
    if behaviour == language:
        return TOGETHER
    if language is None or (behaviour is not None and behaviour < language):
        gap = by_rate[behaviour].language_gap  # type: ignore[index]  # one of them breaks
        return BEFORE if gap is not None and gap.high < 0 else UNTOLD
    gap = by_rate[language].language_gap
    return AFTER if gap is not None and gap.low > 0 else UNTOLD
