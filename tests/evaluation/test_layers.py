"""Effects by depth: what the parts are, that they add up to the whole, which third is named, and the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import UsageError
from steermoe_local.evaluation.measuring.json_values import from_plain
from steermoe_local.evaluation.reports.layers import draw_layers
from steermoe_local.evaluation.studies.layers import LayerEffects, by_layer, only_layers, thirds
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.steering import Steering
from tests.evaluation.test_sweep import small_evaluator
from tests.support.builders import table_map
from tests.support.fake_evaluator import FakeEvaluator, wide_map


@given(st.lists(st.integers(0, 100), unique=True, max_size=20))
def test_thirds(layers: list[int]) -> None:
    layers.sort()
    found = thirds(layers)
    assert [layer for part in found.values() for layer in part] == layers
    sizes = [len(part) for part in found.values()]
    assert all(sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert list(found) == ["early", "middle", "late"][: len(layers)]


def test_thirds_of_five() -> None:
    assert thirds(range(5)) == {"early": (0, 1), "middle": (2, 3), "late": (4,)}


class LayerEvaluator(FakeEvaluator):
    """Each layer with a steered expert adds its weight to the rate, or takes it when steered the other way."""

    def __init__(self, expert_map: Any, weights: dict[int, float], **options: Any) -> None:
        super().__init__(expert_map, lambda i, j: 0.0, **options)
        self.weights, self.plus = weights, np.sign(expert_map.rd)
        self.bias: BiasFile | None = None

    def _measured(self, bias: BiasFile | None, *rest: Any) -> Any:
        self.bias = bias
        return super()._measured(bias, *rest)

    def rate(self, i: int, j: int) -> float:
        change = 0.0
        for layer in self.bias.layers if self.bias else ():
            assert self.bias is not None
            way = float((self.bias.signs[layer] * self.plus[layer]).sum())
            change += np.sign(way) * self.weights.get(layer, 0.0)
        return float(np.clip(0.5 + change, 0, 1))


def effects(weights: dict[int, float], n_layer: int = 6, noise: float = 0.0, **choice: Any) -> LayerEffects:
    made = wide_map(n_layer)
    evaluator = LayerEvaluator(made, weights, n_items=100, noise=noise)
    choice = {"activate": 24, "deactivate": 60} | choice
    result = by_layer(evaluator, Steering("made-up", expert_map=made, **choice))  # type: ignore[arg-type]
    json.dumps(result.to_dict(), allow_nan=False)
    assert len(evaluator.calls) == 1
    return result


def test_parts_add_up() -> None:
    result = effects({2: 0.2, 3: 0.1, 5: 0.05})
    whole = result.of("whole")[0]
    for kind in ("third", "layer"):
        assert sum(part.n_active for part in result.of(kind)) == whole.n_active == 24
        assert sum(part.n_inactive for part in result.of(kind)) == whole.n_inactive == 60
    assert [part.name for part in result.of("third")] == ["early", "middle", "late"]
    assert [part.layers for part in result.of("layer")] == [(i,) for i in range(6)]
    for third, rest in zip(result.of("third"), result.of("without"), strict=True):
        assert rest.name == f"all but {third.name}"
        assert sorted(third.layers + rest.layers) == list(range(6))
        assert third.n_active + rest.n_active == whole.n_active
    assert whole.effect.value == pytest.approx(0.7, abs=0.02)
    by_name = {part.name: part.effect.value for part in result.parts}
    assert by_name["middle"] == pytest.approx(0.6, abs=0.02)
    assert by_name["late"] == pytest.approx(0.1, abs=0.02)
    assert by_name["early"] == pytest.approx(0, abs=0.02)
    assert by_name["all but middle"] == pytest.approx(0.1, abs=0.02)
    assert by_name["layer 2"] == pytest.approx(0.4, abs=0.02)


def test_the_same_experts_as_a_choice_in_those_layers() -> None:
    """Choosing with `layers`, as many as the whole choice has there, gives the same bias."""
    made = wide_map(6, 40, 8)
    steering = Steering("x", expert_map=made, activate=20, deactivate=50)
    whole = steering.build()
    assert whole is not None
    for layers in ((0, 1), (2, 3), (5,)):
        part = only_layers(whole, layers)
        assert part is not None
        words = ",".join(map(str, layers))
        again = steering.changed(layers=words, activate=part.n_active, deactivate=part.n_inactive).build()
        assert again is not None
        assert np.array_equal(part.dense(), again.dense())
    assert only_layers(whole, ()) is None


def test_the_largest_third() -> None:
    result = effects({2: 0.2, 3: 0.1, 5: 0.05})
    assert result.largest == "middle"
    assert result.clear
    assert set(result.margins) == {"early", "late"}
    assert result.margins["late"].value == pytest.approx(0.5, abs=0.02)
    assert "agrees with the paper's finding" in result.verdict
    result = effects({0: 0.3, 2: 0.05})
    assert result.largest == "early"
    assert result.clear
    assert "differs from the paper's finding" in result.verdict


def test_items_that_are_all_alike_are_no_certainty() -> None:
    """Ten items that all turn: a bootstrap alone would give an interval without width."""
    made = wide_map(6)
    evaluator = LayerEvaluator(made, {2: 0.5, 3: 0.5}, n_items=10)
    result = by_layer(evaluator, Steering("x", expert_map=made, activate=24, deactivate=60))  # type: ignore[arg-type]
    margin = result.margins["late"]
    assert (margin.value, margin.method) == (1.0, "newcombe")
    assert 0 < margin.low < 0.8
    mirrored = Steering("x", expert_map=made, activate=24, deactivate=60, reverse=True)
    assert by_layer(evaluator, mirrored).margins["late"] == margin  # type: ignore[arg-type]


def test_not_certain_and_nothing() -> None:
    result = effects({2: 0.11, 5: 0.1}, noise=0.3)
    assert not result.clear
    assert "neither confirms nor refutes" in result.verdict
    result = effects({})
    assert not result.clear
    assert result.verdict == "No third has an effect of its own."


def test_reversed_and_one_way() -> None:
    """A reversed steering wants the rate down: its largest third takes most. A preset has no reverse."""
    result = effects({2: 0.3, 5: 0.05}, reverse=True)
    assert result.largest == "middle"
    assert result.margins["late"].value == pytest.approx(0.5, abs=0.02)
    assert result.of("third")[1].steered.value == pytest.approx(-0.3, abs=0.02)
    result = effects({2: 0.3, 5: 0.05}, preset="safe", preset_model="m")
    assert all(part.reversed is None and part.both is None for part in result.parts)
    assert result.of("third")[1].effect.value == pytest.approx(0.3, abs=0.02)
    made = wide_map(6)
    bias = Steering("x", expert_map=made, activate=24, deactivate=60).build()
    evaluator = LayerEvaluator(made, {2: 0.3})
    result = by_layer(evaluator, Steering("x", bias=bias))  # type: ignore[arg-type]
    assert result.largest == "middle"
    assert result.of("whole")[0].both is None


def test_dense_and_few_layers() -> None:
    rd = np.full((4, 6), 0.1)
    rd[0] = 0
    rd[3, 0] = -0.4
    made = table_map(rd, 2)
    result = by_layer(LayerEvaluator(made, {}), Steering("x", expert_map=made, activate=3))  # type: ignore[arg-type]
    assert result.of("whole")[0].layers == (1, 2, 3), "layer 0 has no router"
    assert result.of("third")[2].n_active == 0, "in this third nothing was chosen"
    few = table_map(rd[2:], 2)
    result = by_layer(LayerEvaluator(few, {0: 0.3}), Steering("x", expert_map=few, activate=3))  # type: ignore[arg-type]
    assert "too few layers" in result.verdict
    one = table_map(rd[3:], 2)
    result = by_layer(LayerEvaluator(one, {0: 0.3}), Steering("x", expert_map=one, activate=3))  # type: ignore[arg-type]
    assert not result.clear
    json.dumps(result.to_dict(), allow_nan=False)


def test_nothing_to_steer() -> None:
    made = wide_map()
    for steering in (Steering("x", expert_map=made), Steering("x", expert_map=made, layers="0", activate=0)):
        with pytest.raises(UsageError, match="activate, deactivate"):
            by_layer(LayerEvaluator(made, {}), steering)  # type: ignore[arg-type]


@pytest.mark.parametrize("n_layer", [2, 6, 40])
def test_picture(tmp_path: Path, n_layer: int) -> None:
    pytest.importorskip("matplotlib")
    result = effects({1: 0.2}, n_layer)
    paths = [tmp_path / "layers.png", tmp_path / "layers.svg"]
    draw_layers(result, paths)
    assert all(path.stat().st_size for path in paths)


def test_read_again() -> None:
    result = effects({1: 0.2}, 6)
    again = from_plain(LayerEffects, json.loads(json.dumps(result.to_dict())))
    assert again.to_dict() == result.to_dict()
    assert again.verdict == result.verdict


def test_on_the_model(tiny_path: Path) -> None:
    """The whole is what `measure` gives for the whole choice, and the experts of each part are the planted ones."""
    from steermoe_local.models.embedded import behaviour
    from steermoe_local.models.shipped_maps import map_path

    planted = behaviour("digits-words")
    steering = Steering.open(
        map_file=map_path("digits-words"), activate=planted.n_activate, deactivate=planted.n_deactivate
    )
    with small_evaluator(tiny_path, 8) as evaluator:
        result = by_layer(evaluator, steering)
        base, towards, away = evaluator.measure([None, steering.build(), steering.changed(reverse=True).build()])
    whole = result.of("whole")[0]
    assert whole.both is not None
    assert whole.both.value == pytest.approx(towards.rate - away.rate)
    assert result.unsteered == base.rate
    touched = {part.layers[0] for part in result.of("layer") if part.n_active + part.n_inactive}
    assert touched == {layer for layer, _ in planted.planted_positive | planted.planted_negative} & touched
    assert sum(part.n_active + part.n_inactive for part in result.of("third")) == whole.n_active + whole.n_inactive
    untouched: Callable[[Any], bool] = lambda part: not part.n_active + part.n_inactive  # noqa: E731
    assert all(part.steered.value == 0 for part in result.parts if untouched(part))
