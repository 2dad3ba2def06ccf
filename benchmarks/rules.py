"""Compares rules of steering at equal cost: what causes.py and small.py have in common.

A rule is a set of choices (numbers of experts, strengths, caps), of which that one is taken that moves the margin of
some items most within a budget of KL on one text. What is reported was measured on other items and another text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.attribution.decoding import InterventionDecoder
from steermoe_local.attribution.items import Item
from steermoe_local.evaluation.metrics.intervals import Interval, bootstrap, difference
from steermoe_local.evaluation.tasks.neutral_text import Document
from steermoe_local.llama.steered_llama import SteeredLlama
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.steering.bias_file import BiasFile, read_bias
from steermoe_local.steering.steering import Steering

FloatArray = npt.NDArray[np.float64]
Both = tuple[BiasFile, BiasFile]
"""Towards a side, and away from it."""

N_RANDOM = 20
SCALES = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
CAPS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass(frozen=True)
class Method:
    """A rule, and the choices among which its strength is chosen; each is a pair of biases (towards, away)."""

    name: str
    choices: tuple[tuple[str, BiasFile, BiasFile], ...]


class Measured:
    """Margins and costs of steerings of one model."""

    def __init__(
        self,
        llama: SteeredLlama,
        items: tuple[Sequence[Item], Sequence[Item]],
        texts: tuple[Sequence[Document], Sequence[Document]],
        steer: str = "all",
    ) -> None:
        """`items` and `texts`: those to choose on, and those to report on. `steer`: "all", or the "answer" alone."""
        self.fitted, self.held = items
        self.texts = texts
        every, documents = [*self.fitted, *self.held], [*texts[0], *texts[1]]
        self.decoder = InterventionDecoder(
            llama._model, every, documents, n_steerings=64, steer="all" if steer == "all" else "answer", n_threads=1
        )

    def margins(self, biases: Sequence[BiasFile | None], items: Sequence[Item]) -> FloatArray:
        """[n_biases, n_items]"""
        return self._blocks(biases, lambda: np.array([self.decoder.margins(item) for item in items]).T)

    def costs(self, biases: Sequence[BiasFile | None], documents: Sequence[Document]) -> FloatArray:
        """KL in nats per token, [n_biases]."""
        n = sum(document.n for document in documents)
        return self._blocks(biases, lambda: sum(self.decoder.divergences(document) for document in documents) / n)

    def _blocks(self, biases: Sequence[BiasFile | None], measure: Callable[[], Any]) -> FloatArray:
        found = []
        size = self.decoder.n_steerings
        for start in range(0, len(biases), size):
            self.decoder.steer_by(biases[start : start + size])
            found.append(measure())
        return np.concatenate(found)


def both_ways(expert_map: ExpertMap, numbers: tuple[int, int], **fields: Any) -> Both | None:
    """The same number of experts towards the one side and towards the other; None where the map has none to choose."""
    towards = Steering("towards", expert_map=expert_map, activate=numbers[0], deactivate=numbers[1], **fields)
    away = towards.changed(activate=numbers[1], deactivate=numbers[0], reverse=True)
    one, two = towards.bias_file(), away.bias_file()
    return None if one is None or two is None else (one, two)


def methods(expert_map: ExpertMap, n: tuple[int, int], fitted: Mapping[str, Path]) -> list[Method]:
    """The rules that are compared, with `n` promoted and suppressed experts, or half as many."""
    half = ((n[0] + 1) // 2, (n[1] + 1) // 2)

    def method(name: str, numbers: tuple[int, int], *choices: tuple[str, dict[str, float]], **fields: Any) -> Method:
        made = ((label, both_ways(expert_map, numbers, **fields, **strength)) for label, strength in choices)
        return Method(name, tuple((label, *both) for label, both in made if both is not None))

    scaled = [(f"strength {scale:g}", {"scale": scale}) for scale in SCALES]
    capped = [(f"cap {cap:g}", {"cap": cap}) for cap in CAPS]
    every: tuple[str, dict[str, float]] = ("all", {})
    found = [
        method("RD, hard", n, every),
        method("RD, hard, half as many", half, ("half", {})),
        method("RD, soft", n, *scaled),
        method("log-odds, soft, weighted", n, *scaled, rank="log-odds", weights="log-odds"),
        method("RD, capped", n, *capped),
        method("effect, hard", n, every, rank="effect"),
        method("effect, hard, half as many", half, ("half", {}), rank="effect"),
        method("effect, soft, weighted", n, *scaled, rank="effect", weights="effect"),
        method("effect, capped", n, *capped, rank="effect"),
    ]
    found = [one for one in found if one.choices]
    if fitted:
        found.append(Method("fitted", (("fit", read_bias(fitted["towards"]), read_bias(fitted["away"])),)))
    return found


def randoms(expert_map: ExpertMap, numbers: tuple[int, int], seed: int = 0) -> list[Both]:
    """Hard choices of as many random experts, as the control; "away" swaps promoted and suppressed."""
    rng = np.random.default_rng(seed)
    layers = np.flatnonzero(np.abs(expert_map.rd).sum(axis=1) > 0)
    found = []
    for _ in range(N_RANDOM):
        scores = np.zeros(expert_map.rd.shape)
        scores[layers] = rng.uniform(-1, 1, (len(layers), expert_map.rd.shape[1]))
        drawn = ExpertMap(expert_map.identity, "random", scores)
        found.append(
            (
                BiasFile.from_signs(drawn.choose(*numbers), expert_map.identity),
                BiasFile.from_signs(drawn.choose(*numbers[::-1], reverse=True), expert_map.identity),
            )
        )
    return found


def compare(
    measured: Measured,
    compared: Sequence[Method],
    budget: float,
    drawn: Sequence[Both],
    rates_of: Callable[[Sequence[BiasFile]], Sequence[FloatArray]],
) -> tuple[list[dict[str, Any]], list[Both]]:
    """A row for each rule at its best within the budget, and one for the random choices `drawn`; the rules' biases.

    `rates_of` measures the values of the prompts under each bias. Each row's difference is to the first rule.
    """
    biases = [bias for method in compared for _, *pair in method.choices for bias in pair]
    margins = measured.margins([None, *biases], measured.fitted)[1:].mean(axis=1).reshape(-1, 2)
    costs = measured.costs(biases, measured.texts[0]).reshape(-1, 2).mean(axis=1)
    swings = margins[:, 0] - margins[:, 1]
    chosen: list[tuple[str, str, BiasFile, BiasFile]] = []
    at = 0
    for method in compared:
        here = range(at, at + len(method.choices))
        at = here.stop
        within = [i for i in here if costs[i] <= budget * 1.05]  # the first rule itself, whatever rounding does
        best = max(within, key=lambda i: float(swings[i])) if within else min(here, key=lambda i: float(costs[i]))
        label, towards, away = method.choices[best - here.start]
        chosen.append((method.name, label + ("" if within else " (above the cost)"), towards, away))
    pairs = [(towards, away) for _, _, towards, away in chosen]
    both = [bias for pair in (*pairs, *drawn) for bias in pair]
    held = measured.margins(both, measured.held).reshape(len(both) // 2, 2, -1)
    held_swing = held[:, 0] - held[:, 1]
    held_cost = measured.costs(both, measured.texts[1]).reshape(-1, 2).mean(axis=1)
    rates = rates_of(both)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "strength": label,
            "n": [towards.n_active, towards.n_inactive],
            "swing": plain(bootstrap(held_swing[i])),
            "more_than_rd": None if i == 0 else plain(bootstrap(held_swing[i] - held_swing[0])),
            "cost": float(held_cost[i]),
            "rate": plain(difference(rates[2 * i], rates[2 * i + 1])),
            "rates": [float(rates[2 * i].mean()), float(rates[2 * i + 1].mean())],
        }
        for i, (name, label, towards, _) in enumerate(chosen)
    ]
    if drawn:
        first = len(chosen)
        control = held_swing[first:].mean(axis=1)
        control_rates = [float(rates[2 * j].mean() - rates[2 * j + 1].mean()) for j in range(first, len(both) // 2)]
        rows.append(
            {
                "name": f"{len(drawn)} random choices, hard",
                "strength": "all",
                "n": [drawn[0][0].n_active, drawn[0][0].n_inactive],
                "swing": {"value": float(control.mean()), "low": float(control.min()), "high": float(control.max())},
                "more_than_rd": None,
                "cost": float(held_cost[first:].mean()),
                "rate": {"value": float(np.mean(control_rates)), "low": min(control_rates), "high": max(control_rates)},
                "rates": None,
            }
        )
    return rows, pairs


def plain(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def span(found: Mapping[str, float], sign: str = "", digits: int = 2) -> str:
    return f"{found['value']:{sign}.{digits}f} ({found['low']:{sign}.{digits}f} to {found['high']:{sign}.{digits}f})"
