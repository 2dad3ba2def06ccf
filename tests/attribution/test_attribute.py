"""`attribute` on known surfaces, against interventions one by one, and on the experts planted in the embedded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ExpertMap, SteeredLlama, load_pairs
from steermoe_local.attribution import attribute as module
from steermoe_local.attribution.attribute import AttributionOptions, attribute
from steermoe_local.attribution.decoding import InterventionDecoder
from steermoe_local.attribution.design import Design, choose_candidates, default_rate
from steermoe_local.attribution.estimates import estimate, least_draws
from steermoe_local.attribution.items import Answer, Item, pair_items, split
from steermoe_local.errors import ModelMismatchError, UsageError
from steermoe_local.evaluation.tasks.neutral_text import Document, NeutralText
from steermoe_local.llama.loaded_model import loaded_identity
from steermoe_local.llama.rendering import Renderer
from steermoe_local.maps.effects import PROMOTE, SUPPRESS, Effects
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path
from tests.support.builders import identity, table_map
from tests.support.interventions import DECODER, Alone, KnownSurface
from tests.support.random_models import OLMOE

Array = np.ndarray[Any, Any]

MODEL = identity(4, 16, 4)
RD = np.random.default_rng(1).uniform(-1, 1, MODEL.shape)
MAP = table_map(RD, 4)


def some_items(n: int) -> list[Item]:
    return [Item(f"item-{i}", (1, 2), (Answer((3,), (0,), 1.0), Answer((4,), (0,), -1.0))) for i in range(n)]


class FixedText:
    """Stands for a neutral text."""

    name, sha256 = "text", "ab" * 32

    def longest(self, renderer: Any) -> int:
        return 0

    def documents(self, renderer: Any, n_ctx: int, max_tokens: int) -> list[Document]:
        return [Document(tuple(range(11)), 0), Document(tuple(range(8)), 2)]


TEXT: Any = FixedText()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Attribute on a known surface: (surface, map, items, **options) -> effects."""

    def call(surface: KnownSurface, items: list[Item], expert_map: ExpertMap = MAP, **options: Any) -> Effects:
        monkeypatch.setattr(module, "InterventionDecoder", surface)
        llama: Any = SimpleNamespace(_model=None)
        found = attribute(llama, items, expert_map, renderer=Any, **options).effects  # type: ignore[arg-type]
        assert found is not None
        found.check(expert_map.identity)
        return found

    return call


def row_of(effects: Effects, layer: int, expert: int, action: int) -> int:
    (row,) = np.flatnonzero((effects.layer == layer) & (effects.expert == expert) & (effects.action == action))
    return int(row)


#
# known surfaces
#


def test_effects_and_costs_of_a_known_surface(run: Any) -> None:
    """Exact where effects add up: of both actions, on these items and on others, and the cost of a token."""
    rng = np.random.default_rng(3)
    effects, costs = rng.normal(size=MODEL.shape), rng.uniform(0, 0.1, MODEL.shape)
    items = some_items(9)
    scales = {item.id: 1 + 0.1 * i for i, item in enumerate(items)}
    surface = KnownSurface(MODEL, effects, costs, scales=scales)
    found = run(surface, items, neutral=TEXT, n_candidates=8, draws=150, seed=4)
    one, other = (np.mean([scales[item.id] for item in part]) for part in split(items, None, 4))
    assert len(found.layer) == 32
    assert found.control.tolist() == ([False] * 8 + [True] * 8) * 2
    n_confirmed = 0
    for i in range(32):
        size = {SUPPRESS: 1.0, PROMOTE: -0.5}[int(found.action[i])]
        truth = size * effects[found.layer[i], found.expert[i]]
        assert found.effect[i] == pytest.approx(one * truth, abs=1e-12)
        assert found.cost[i] == pytest.approx(size * costs[found.layer[i], found.expert[i]], abs=1e-12)
        if not np.isnan(found.confirm[i]):
            assert found.confirm[i] == pytest.approx(other * truth, abs=1e-12)
            n_confirmed += 1
    assert n_confirmed == 16
    assert found.significant.all()
    facts = found.facts
    assert (facts.n_items, facts.n_confirm, facts.n_text) == (5, 4, 15)
    assert facts.n_draws == {"promote": 150, "suppress": 150}
    assert facts.r2 == pytest.approx({"promote": 1, "suppress": 1})
    assert facts.agreement == {"promote": 1, "suppress": 1}
    # 150 draws are two blocks of 64 and one of 22; each action's first 8 are confirmed beside the unsteered model
    assert surface.blocks == [64, 64, 22] * 2 + [9] * 2


def test_confirmation_has_the_spread_over_items(run: Any) -> None:
    effects = np.random.default_rng(3).normal(size=MODEL.shape)
    items = some_items(12)
    scales = {item.id: 1 + 0.1 * i for i, item in enumerate(items)}
    found = run(KnownSurface(MODEL, effects, scales=scales), items, n_candidates=4, draws=64, actions=("suppress",))
    sizes = [scales[item.id] for item in split(items, None, 0)[1]]
    confirmed = ~np.isnan(found.confirm)
    truth = effects[found.layer, found.expert][confirmed]
    np.testing.assert_allclose(found.confirm_se[confirmed], np.abs(truth) * np.std(sizes, ddof=1) / np.sqrt(6))


def test_experts_without_an_effect_are_not_significant(run: Any) -> None:
    """Six experts matter, of which two are among the controls; noise of a draw's own on all."""
    effects = np.zeros(MODEL.shape)
    first = choose_candidates(MAP, [0, 1, 2, 3], 16, 0)
    acting = [tuple(cell) for cell in first.experts[[0, 3, 5, 9, 17, 20]].tolist()]
    for layer, expert in acting:
        effects[layer, expert] = 0.5
    found = run(
        KnownSurface(MODEL, effects, noise=0.1), some_items(4), n_candidates=16, draws=512, actions=("suppress",)
    )
    cells = list(zip(found.layer.tolist(), found.expert.tolist(), strict=True))
    assert {cell for cell, yes in zip(cells, found.significant, strict=True) if yes} >= set(acting)
    # of the rest, 5% are expected to be called significant by mistake at most: of 26, four or more in 1 run of 20
    assert int(found.significant.sum()) <= len(acting) + 4
    off = np.abs(found.effect - effects[found.layer, found.expert])
    assert (off < 5 * found.effect_se).all()
    assert int(found.control[[cells.index(cell) for cell in acting]].sum()) == 2


def test_auto_stops_when_the_first_experts_are_stable(run: Any) -> None:
    effects = np.where(np.abs(RD) > 0.6, np.sign(RD), 0.0)
    steps: list[tuple[str, int, int]] = []
    lines: list[str] = []
    clear = run(
        KnownSurface(MODEL, effects, noise=0.01),
        some_items(4),
        n_candidates=8,
        progress=lambda *step: steps.append(step),
        log=lines.append,
    )
    most = 64 * int(np.ceil(16 * 17 / 64))
    assert set(clear.facts.n_draws.values()) == {192}  # two checks, from 128 draws on
    assert clear.facts.stable == {"promote": True, "suppress": True}
    assert [done for _, done, _ in steps] == list(range(1, len(steps) + 1))
    assert {total for _, _, total in steps} == {2 * (2 * most // 64 + 2)}
    assert str(most) in lines[0], "what it takes at most is said before it starts"
    noise = run(KnownSurface(MODEL, np.zeros(MODEL.shape), noise=1.0), some_items(4), n_candidates=8)
    assert set(noise.facts.n_draws.values()) == {most}
    assert noise.facts.stable == {"promote": False, "suppress": False}
    assert max(noise.facts.agreement.values()) < 0.8


def test_layers_that_cannot_be_steered_have_no_effects(run: Any) -> None:
    surface = KnownSurface(MODEL, RD, layers=[1, 3])
    found = run(surface, some_items(3), n_candidates=10, draws=64)
    assert set(found.layer.tolist()) == {1, 3}


@pytest.mark.parametrize(("n", "n_confirm"), [(1, 0), (2, 0), (3, 0), (4, 2)])
def test_few_items_confirm_nothing(run: Any, n: int, n_confirm: int) -> None:
    """An error over items takes two of them at least."""
    found = run(KnownSurface(MODEL, RD), some_items(n), n_candidates=4, draws=32)
    assert found.facts.n_confirm == n_confirm
    assert np.isnan(found.confirm).all() == (n_confirm == 0)
    assert np.isnan(found.cost).all()
    assert found.facts.neutral == ""


def test_an_expert_that_no_draw_took_has_no_effect(run: Any) -> None:
    found = run(KnownSurface(MODEL, RD), some_items(1), n_candidates=4, draws=32, rate=1e-9)
    assert (found.effect == 0).all()
    assert (found.effect_se == 1e9).all()
    assert not found.significant.any()


#
# what is refused
#


@pytest.mark.parametrize(
    "wrong",
    [
        {"draws": 0},
        {"draws": "many"},
        {"draws": 64.0},
        {"n_candidates": 0},
        {"n_items": 0},
        {"actions": ()},
        {"actions": ("promote", "promote")},
        {"actions": ("mask",)},
        {"rate": 0.0},
        {"rate": 1.0},
        {"rate": float("nan")},
        {"steer": "prompt"},
        {"first": 0},
        {"n_text": 0},
        {"n_batch": True},
    ],
    ids=str,
)
def test_options_outside_their_ranges_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UsageError, match=name):
        AttributionOptions(**wrong)


def test_inputs_that_give_no_estimate_are_refused(run: Any) -> None:
    surface = KnownSurface(MODEL, RD)
    with pytest.raises(UsageError, match="items"):
        run(surface, [])
    with pytest.raises(UsageError, match="item-1"):
        run(surface, [*some_items(2), some_items(2)[1]])
    with pytest.raises(UsageError, match=str(least_draws(16))):
        run(surface, some_items(2), n_candidates=8, draws=least_draws(16) - 1)
    with pytest.raises(UsageError, match=r"65.*64"):
        run(surface, some_items(2), n_candidates=65)
    for other in (identity(4, 16, 4, router_sha256="1" * 64), identity(5, 16, 4), identity(4, 17, 4)):
        with pytest.raises(ModelMismatchError):
            run(KnownSurface(other, np.zeros(other.shape)), some_items(2))
    run(
        surface,
        some_items(2),
        replace(MAP, identity=identity(4, 16, 4, router_sha256="1" * 64)),
        draws=64,
        force=True,
        n_candidates=4,
    )
    assert surface.blocks, "only the last one has run"


#
# a model
#


@pytest.fixture(scope="module")
def olmoe(random_model: Any) -> Iterator[Alone]:
    one = Alone(random_model(OLMOE))
    yield one
    one.close()


@pytest.mark.numeric
@pytest.mark.parametrize("steer", ["answer", "all"])
def test_estimates_are_those_of_interventions_one_by_one(olmoe: Alone, steer: Any) -> None:
    """The whole way: the same draws by SteeredLlama, their margins by NumPy, the same regression."""
    model = loaded_identity(olmoe.model)
    expert_map = replace(table_map(np.random.default_rng(2).uniform(-1, 1, model.shape)), identity=model)
    items = olmoe.items(4)[:2]
    options = {**DECODER, "n_candidates": 3, "draws": 20, "actions": ("suppress",), "steer": steer, "seed": 5}
    found = attribute(olmoe.llama, items, expert_map, **options).effects
    assert found is not None
    candidates = choose_candidates(expert_map, list(range(model.n_layer)), 3, 5)
    design = Design("suppress", candidates, model, default_rate("suppress", candidates, model), 5)
    draws = design.draws(0, 64)[:20]
    biases = [BiasFile.from_signs(design.signs(draw), model) for draw in draws]
    expected = estimate(draws, [np.mean([olmoe.margin(item, bias, steer) for item in items]) for bias in biases])
    # a coefficient is a sum of responses with weights: the rows of the pseudo-inverse
    weights = np.linalg.pinv(np.column_stack([np.ones(20), draws]))[1:]
    off = 2 * olmoe.off * np.abs(weights).sum(axis=1)
    assert (np.abs(found.effect - expected.effect) <= off).all()
    assert np.abs(expected.effect).max() > 100 * off.max()


class Planted:
    """Document / memory of the embedded model: items, map, and the truth by suppressing every expert alone."""

    SEED, N_ITEMS = 2, 32

    def __init__(self, path: Path) -> None:
        self.llama = SteeredLlama(path, n_ctx=64, n_threads=1)
        self.facts = behaviour("document-memory")
        self.items = pair_items(Renderer(self.llama._model), load_pairs(self.facts.pairs))
        self.map = ExpertMap.load(map_path("document-memory"))
        estimating, _ = split(self.items, self.N_ITEMS, self.SEED)
        model = self.map.identity
        cells = list(np.ndindex(model.shape))
        self.truth = np.zeros(model.shape)
        with InterventionDecoder(self.llama._model, estimating, [], n_steerings=61, n_threads=1) as decoder:
            for start in range(0, len(cells), 60):
                alone: list[BiasFile | None] = [None]
                for cell in cells[start : start + 60]:
                    signs = np.zeros(model.shape, np.int8)
                    signs[cell] = SUPPRESS
                    alone.append(BiasFile.from_signs(signs, model))
                decoder.steer_by(alone)
                margins = np.mean([decoder.margins(item) for item in estimating], axis=0)
                for cell, margin in zip(cells[start : start + 60], margins[1:], strict=True):
                    self.truth[cell] = margin - margins[0]


@pytest.fixture(scope="module")
def planted(tiny_path: Path) -> Iterator[Planted]:
    one = Planted(tiny_path)
    yield one
    one.llama.close()


@pytest.mark.numeric
def test_half_of_the_planted_experts_are_idle(planted: Planted) -> None:
    """The truth, with no estimate in it: those of layers 1 and 2 matter, those of 3 and 4, of the same RD, do not."""
    tied = planted.facts.planted_positive | planted.facts.planted_negative
    assert len(tied) == 16
    for layer, expert in tied:
        assert abs(planted.map.rd[layer, expert]) > 0.97
        # suppressing an expert of the positive side lowers the margin
        towards = 1 if (layer, expert) in planted.facts.planted_negative else -1
        if layer in (1, 2):
            assert towards * planted.truth[layer, expert] > 0.2
        else:
            assert abs(planted.truth[layer, expert]) < 0.05


@pytest.mark.numeric
def test_attribution_finds_the_planted_experts_that_matter(planted: Planted) -> None:
    found = attribute(
        planted.llama,
        planted.items,
        planted.map,
        n_items=planted.N_ITEMS,
        n_candidates=20,
        draws=384,
        actions=("suppress",),
        seed=planted.SEED,
        n_threads=1,
    ).effects
    assert found is not None
    for layer, expert in planted.facts.planted_positive | planted.facts.planted_negative:
        i = row_of(found, layer, expert, SUPPRESS)
        assert not found.control[i]
        if layer in (1, 2):
            assert found.significant[i]
            assert np.sign(found.effect[i]) == np.sign(planted.truth[layer, expert])
            # alone, on items that chose nothing
            assert found.confirm[i] * np.sign(found.effect[i]) > 2 * found.confirm_se[i]
        else:
            assert not found.significant[i] or abs(found.effect[i]) < 0.05
    truth = planted.truth[found.layer, found.expert]
    assert np.corrcoef(truth, found.effect)[0, 1] > 0.9
    rd = planted.map.rd[found.layer, found.expert]
    assert np.corrcoef(truth, -rd)[0, 1] < np.corrcoef(truth, found.effect)[0, 1]
    assert found.facts.r2["suppress"] > 0.5
    first = np.argsort(-np.abs(found.effect))[:8]
    assert set(found.layer[first].tolist()) == {1, 2}


@pytest.mark.numeric
def test_costs_of_the_embedded_model(planted: Planted) -> None:
    """The largest cost is that of suppressing the expert alone, within its error."""
    text = NeutralText("text", ((None, "the quick brown fox jumps over the lazy dog and goes home again to sleep"),))
    found = attribute(
        planted.llama,
        planted.items[:2],
        planted.map,
        neutral=text,
        n_candidates=60,
        draws=least_draws(120),
        actions=("suppress",),
        n_text=12,
        n_threads=1,
    ).effects
    assert found is not None
    assert found.facts.n_text == 12
    first = int(np.nanargmax(found.cost))
    signs = np.zeros(planted.map.identity.shape, np.int8)
    signs[found.layer[first], found.expert[first]] = SUPPRESS
    (document,) = text.documents(Renderer(planted.llama._model), 32, 12)
    with InterventionDecoder(planted.llama._model, planted.items[:1], [document], n_steerings=2, n_threads=1) as one:
        one.steer_by([None, BiasFile.from_signs(signs, planted.map.identity)])
        nothing, alone = one.divergences(document) / 12
    assert nothing == pytest.approx(0, abs=1e-5)
    assert alone > 0
    assert found.cost[first] == pytest.approx(alone, abs=6 * found.cost_se[first])
