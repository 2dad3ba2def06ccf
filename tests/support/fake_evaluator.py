"""An evaluator whose model is a formula: rates and costs are functions of how many experts a bias steers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from steermoe_local.evaluation.measuring.measurements import Answer, Measurement, bias_key
from steermoe_local.evaluation.measuring.workload import Work, Workload
from steermoe_local.evaluation.tasks.neutral_text import TextScore
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.steering import Steering
from tests.support.builders import table_map

Surface = Callable[[int, int], float]
"""Of the numbers of experts that are promoted and suppressed."""

UNSTEERED_RATE = 0.4


def rising(n: float, scale: float) -> float:
    """Towards 1, saturating."""
    return 1 - float(np.exp(-n / scale))


# effect and increase of nll (budget: 0.05), of i promoted and j suppressed
SURFACES: dict[str, tuple[Surface, Surface]] = {
    "both help, saturating": (lambda i, j: 0.6 * rising(i + j, 6), lambda i, j: 0.001 * (i + j)),
    "suppressed only": (lambda i, j: 0.5 * rising(j, 8), lambda i, j: 0.002 * j + 0.01 * i),
    "promoted only": (lambda i, j: 0.5 * rising(i, 3), lambda i, j: 0.002 * (i + j)),
    "collapsing": (lambda i, j: 0.5 * rising(j, 5) - 0.004 * max(0, j - 15) ** 2, lambda i, j: 0.0001 * (i + j)),
    "only together": (lambda i, j: 0.6 * rising(min(i, j), 4), lambda i, j: 0.001 * (i + j)),
    "a tight budget": (lambda i, j: 0.3 * rising(i, 5) + 0.3 * rising(j, 10), lambda i, j: 0.003 * i + 0.0015 * j),
    "late": (lambda i, j: 0.5 / (1 + float(np.exp(-(j - 20) / 2))), lambda i, j: 0.001 * j),
    "monotone, no price": (lambda i, j: 0.014 * (i + j) * 60 / 61, lambda i, j: 0.0),
}


def wide_map(n_layer: int = 6, n_expert: int = 40, k: int = 8, seed: int = 0, **changes: Any) -> ExpertMap:
    """A map with experts of both signs in all layers."""
    rng = np.random.default_rng(seed)
    rd = np.round(np.clip(rng.standard_t(3, size=(n_layer, n_expert)) / 20, -1, 1), 3)
    names = {"positive": "yes", "negative": "no", "behaviour": "made-up"}
    return table_map(rd, k, **(names | {"n1": 100, "n2": 90, "n_pairs": 5} | changes))


class FakeEvaluator:
    """Stands for `Evaluator`: the same answers for the same bias, item and seed, and all calls are recorded.

    `effect` is added to the rate, `nll` to the text's, and `refusals`, `looping`, `broken` are shares. With `noise`,
    items answer by more than the rate alone, as a model's do.
    """

    def __init__(
        self,
        expert_map: ExpertMap,
        effect: Surface,
        nll: Surface = lambda i, j: 0.0,
        *,
        n_items: int = 60,
        noise: float = 0.0,
        seed: int = 0,
        neutral: bool = True,
        refusals: Surface | None = None,
        looping: Surface = lambda i, j: 0.0,
        broken: Surface = lambda i, j: 0.0,
    ) -> None:
        self.identity = expert_map.identity
        self.effect, self.nll, self.refusals, self.looping, self.broken = effect, nll, refusals, looping, broken
        self.noise, self.seed = noise, seed
        self.neutral = object() if neutral else None
        self.benign_task = None if refusals is None else object()
        items = tuple(SimpleNamespace(id=f"q{i}") for i in range(n_items))
        self.task = SimpleNamespace(items=items, positive="yes", negative="no", name="made-up")
        self.metadata: dict[str, Any] = {}
        self.settings: dict[str, Any] = {"task": "made-up", "task_sha256": "0" * 64, "seeds": [0]}
        self.latent = np.random.default_rng(seed).permutation(n_items) / n_items
        self.calls: list[dict[str, Any]] = []
        self.told: list[Work] = []
        self.workload = Workload(lambda *_: None, self.told.append)

    def work(self, biases: Sequence[BiasFile | None] | int, *, items: Sequence[str] | None = None, **_: Any) -> Work:
        """As `Evaluator.work`, of answers to items alone."""
        n = biases if isinstance(biases, int) else len(biases)
        return Work(n * len(self.task.items if items is None else items))

    def steering(self, expert_map: ExpertMap, **choice: Any) -> Steering:
        """A steering by the map."""
        return Steering("made-up", expert_map=expert_map, **choice)

    def rate(self, i: int, j: int) -> float:
        """The rate that is expected of so many experts."""
        return float(np.clip(UNSTEERED_RATE + self.effect(i, j), 0, 1))

    def measure(
        self,
        biases: Sequence[BiasFile | None],
        *,
        items: Iterable[str] | None = None,
        text: bool = True,
        benign: bool = True,
        what: str = "",
    ) -> list[Measurement]:
        """As `Evaluator.measure`."""
        wanted = None if items is None else set(items)
        chosen = [i for i, item in enumerate(self.task.items) if wanted is None or item.id in wanted]
        assert chosen, "an evaluator measures at least one item"
        self.calls.append({"items": [f"q{i}" for i in chosen], "keys": [bias_key(b) for b in biases], "what": what})
        return [self._measured(bias, chosen, text and self.neutral is not None, benign) for bias in biases]

    def _measured(self, bias: BiasFile | None, chosen: Sequence[int], text: bool, benign: bool) -> Measurement:
        key = bias_key(bias)
        i, j = (bias.n_active, bias.n_inactive) if bias else (0, 0)
        seed = int(key, 16) if bias is not None and bias.layers else 0
        shift = np.random.default_rng([self.seed, seed]).normal(0, self.noise, len(self.latent)) if self.noise else 0
        shown = (self.latent + shift < self.rate(i, j)).astype(float)
        n_broken, n_looping = (round(share(i, j) * len(shown)) for share in (self.broken, self.looping))
        answers = []
        for n in chosen:
            label = "ill-formed" if n < n_broken else "positive" if shown[n] else "negative"
            value = 0.0 if n < n_broken else float(shown[n])
            loop = 0.9 if n < n_looping else 0.0
            answers.append(Answer(f"q{n}", 0, "words", value, label, "stop", 5, 1.0, loop))
        prompts: tuple[Answer, ...] = ()
        if benign and self.refusals is not None:
            n_refused = round(20 * self.refusals(i, j))
            prompts = tuple(Answer(f"b{n}", 0, "x", float(n < n_refused), "", "stop", 5, 1.0, 0.0) for n in range(20))
        score = TextScore(2.0 + self.nll(i, j), abs(self.nll(i, j)), 1.0, 100) if text else None
        return Measurement(bias, key, tuple(answers), prompts, score)

    def asked(self) -> set[str]:
        """Keys of all biases that were measured."""
        return {key for call in self.calls for key in call["keys"]}
