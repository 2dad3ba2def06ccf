"""An evaluator whose model is a rule: which items show a behaviour under a bias is a function of its signs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from steermoe_local.evaluation.measuring.measurements import Answer, Measurement, bias_key
from steermoe_local.evaluation.tasks.neutral_text import TextScore
from steermoe_local.identity import ModelIdentity
from steermoe_local.steering.bias_file import BiasFile
from tests.support.builders import identity

Signs = npt.NDArray[np.int8]
Rule = Callable[[Signs], npt.NDArray[np.bool_]]
"""Of the signs [n_layer, n_expert], the items that show it."""


class RuledEvaluator:
    """Stands for `Evaluator`: items show the behaviour by `shows`, those of the second task by `second`.

    `same_top` gives the share of tokens; `dense` layers cannot be steered.
    """

    def __init__(
        self,
        shows: Rule,
        second: Rule | None = None,
        same_top: Callable[[Signs], float] | None = None,
        model: ModelIdentity | None = None,
        dense: Sequence[int] = (),
    ) -> None:
        self.identity = model or identity(4, 10, 2)
        self.rules = shows, second
        self.same_top = same_top
        none = np.zeros(self.identity.shape, dtype=np.int8)
        n_items, n_second = len(shows(none)), 0 if second is None else len(second(none))
        self.task = SimpleNamespace(items=_items("q", n_items), name="made-up", positive="yes")
        self.benign_task = None if second is None else SimpleNamespace(items=_items("b", n_second), name="other")
        layers = [SimpleNamespace(steerable=layer not in dense) for layer in range(self.identity.n_layer)]
        self.model = SimpleNamespace(layer_info=lambda: layers)
        self.metadata: dict[str, Any] = {}
        self.settings: dict[str, Any] = {"task_sha256": "0" * 64, "sampling": {"temperature": 0}}
        self.n_computed = 0
        self.progress: Callable[[str, int, int], None] = lambda *_: None
        self.asked: list[BiasFile | None] = []

    def measure(self, biases: Sequence[BiasFile | None], *, what: str = "") -> list[Measurement]:
        """As `Evaluator.measure`."""
        self.asked += biases
        found = []
        for n, bias in enumerate(biases):
            self.progress(what, n, len(biases))
            found.append(self._measured(bias))
        self.progress(what, len(biases), len(biases))
        return found

    def _measured(self, bias: BiasFile | None) -> Measurement:
        signs = np.zeros(self.identity.shape, dtype=np.int8) if bias is None else bias.signs
        rules = zip("qb", self.rules, strict=True)
        sides = [() if rule is None else _answers(name, rule(signs)) for name, rule in rules]
        text = None
        if self.same_top is not None:
            share = self.same_top(signs)
            text = TextScore(2.0 + 1 - share, 1 - share, share, 100)
        self.n_computed += len(sides[0]) + len(sides[1]) + (text is not None)
        return Measurement(bias, bias_key(bias), sides[0], sides[1], text)


def _items(name: str, n: int) -> tuple[SimpleNamespace, ...]:
    return tuple(SimpleNamespace(id=f"{name}{number}") for number in range(n))


def _answers(name: str, shown: npt.NDArray[np.bool_]) -> tuple[Answer, ...]:
    return tuple(
        Answer(f"{name}{n}", 0, "words", float(there), "yes" if there else "no", "stop", 5, 1.0, 0.0)
        for n, there in enumerate(shown)
    )
