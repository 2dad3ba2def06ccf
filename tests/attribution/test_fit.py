"""`fit` on the embedded model: what is measured on which items, its figures, interruptions, and what it refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap, SteeredLlama, load_pairs
from steermoe_local.attribution import search
from steermoe_local.attribution.attribute import attribute
from steermoe_local.attribution.decoding import InterventionDecoder
from steermoe_local.attribution.fit import fit, split_as_attributed
from steermoe_local.attribution.fitted import Fit, FitOptions
from steermoe_local.attribution.items import Item, pair_items
from steermoe_local.attribution.texts import documents, other_documents
from steermoe_local.errors import FormatError, ModelMismatchError, UsageError
from steermoe_local.evaluation.measuring.opening import open_guards
from steermoe_local.evaluation.tasks.neutral_text import Document, NeutralText
from steermoe_local.generation.answer_file import AnswerFile
from steermoe_local.llama import capi
from steermoe_local.llama.rendering import Renderer
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.steering.bias_file import read_bias, write_bias
from tests.support.builders import table_map
from tests.support.interrupting import interrupted_after

NAME = "document-memory"
QUICK: dict[str, Any] = {"budget": 0.05, "population": 8, "evaluations": 24, "n_experts": 6, "n_text": 32}


class Ground:
    """The embedded model, items, and a map whose effects were estimated on some of them."""

    def __init__(self, llama: SteeredLlama) -> None:
        self.llama = llama
        self.renderer = Renderer(llama._model)
        self.items = pair_items(self.renderer, load_pairs(behaviour(NAME).pairs)[::5])
        text = open_guards("tiny")[1]
        assert text is not None
        self.text: NeutralText = text
        self.map = attribute(
            llama,
            self.items,
            ExpertMap.load(map_path(NAME)),
            neutral=self.text,
            renderer=self.renderer,
            n_candidates=16,
            draws=128,
            n_items=20,
            n_text=32,
            actions=("suppress",),
            n_threads=1,
        )
        assert self.map.effects is not None
        self.estimating, self.confirming = split_as_attributed(self.items, self.map.effects)

    def fit(self, *, items: list[Item] | None = None, **changed: Any) -> Fit:
        given = {"neutral": self.text, "renderer": self.renderer, "n_threads": 1, **QUICK, **changed}
        expert_map = given.pop("expert_map", self.map)
        return fit(self.llama, self.items if items is None else items, expert_map, **given)


@pytest.fixture(scope="module")
def ground(tiny_path: Path) -> Iterator[Ground]:
    llama = SteeredLlama(str(tiny_path), n_ctx=64, n_threads=1, verbose=False)
    yield Ground(llama)
    llama.close()


@pytest.fixture(scope="module")
def fitted(ground: Ground) -> Fit:
    return ground.fit()


#
# what it finds
#


def test_it_moves_the_margin_within_the_budget(fitted: Fit) -> None:
    assert fitted.fitted_on.fitted.change > 1
    assert fitted.fitted_on.fitted.kl <= 0.05 * 1.001  # rounding: it was searched in a batch of another shape
    assert fitted.is_confirmed
    assert fitted.bias.mode == "soft"
    assert np.abs(fitted.bias.dense()).max() <= 8
    assert {(int(layer), int(expert)) for layer, expert in np.argwhere(fitted.start.dense())} == set(fitted.experts)
    assert fitted.n_evaluations == 2 * 8 + fitted.n_generations * 8 + 8


def test_the_other_side(ground: Ground) -> None:
    found = ground.fit(reverse=True, method="none")
    assert found.fitted_on.fitted.change < -0.5
    assert found.is_confirmed
    assert not set(found.experts) & set(ground.fit(method="none").experts)


def test_its_figures_one_by_one(ground: Ground, fitted: Fit) -> None:
    """Means and errors on the confirming items and text, each computed under one steering at a time."""
    rest = other_documents(ground.text, ground.renderer, 32, 32)
    values: dict[str, list[float]] = {}
    with InterventionDecoder(ground.llama._model, ground.items, rest, n_steerings=1, n_threads=1) as decoder:
        for name, bias in (("unsteered", None), ("start", fitted.start), ("fitted", fitted.bias)):
            decoder.steer_by([bias])
            values[name] = [float(decoder.margins(item)[0]) for item in ground.confirming]
            values[f"{name} kl"] = [float(decoder.divergences(document)[0]) for document in rest]
    found = fitted.confirmed_on
    assert found is not None
    assert found.n_items == len(ground.confirming) == 10
    assert found.n_text == sum(document.n for document in rest) == 32
    assert found.unsteered == pytest.approx(np.mean(values["unsteered"]), abs=1e-3)
    for name, shift in (("start", found.start), ("fitted", found.fitted)):
        change = np.subtract(values[name], values["unsteered"])
        assert shift.change == pytest.approx(change.mean(), abs=1e-3)
        assert shift.change_se == pytest.approx(change.std(ddof=1) / np.sqrt(10), abs=1e-3)
        assert shift.margin == pytest.approx(np.mean(values[name]), abs=1e-3)
        assert shift.kl == pytest.approx(sum(values[f"{name} kl"]) / 32, abs=1e-3)
    assert found.difference == pytest.approx(found.fitted.change - found.start.change)


def test_the_provenance(ground: Ground, fitted: Fit, tmp_path: Path) -> None:
    write_bias(fitted.bias, tmp_path / "b.gguf")
    read = read_bias(tmp_path / "b.gguf")
    assert read.key == fitted.bias.key
    assert read.provenance["map_sha256"] == ground.map.sha256
    assert read.provenance["behaviour"] == ground.map.behaviour
    made = json.loads(read.provenance["fit"])
    assert {name: made[name] for name in QUICK if name != "evaluations"} == {
        name: value for name, value in QUICK.items() if name != "evaluations"
    }
    assert made["n_evaluations"] == fitted.n_evaluations


def test_the_same_seed_the_same_bias(ground: Ground, fitted: Fit) -> None:
    again = ground.fit()
    assert again.bias.key == fitted.bias.key
    assert again.to_dict() == fitted.to_dict()
    json.dumps(again.to_dict())


def test_without_a_search(ground: Ground, fitted: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The start alone, without the package cma."""
    monkeypatch.setitem(sys.modules, "cma", None)
    found = ground.fit(method="none")
    assert (found.n_generations, found.n_evaluations, found.choice) == (0, 16, None)
    assert found.bias.key == found.start.key
    assert found.fitted_on.n_items == 10  # no items are kept to choose
    with pytest.raises(UsageError, match="cma"):
        ground.fit()


#
# which items see what
#


def test_the_confirming_items_and_text_are_measured_last(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, under three steerings, when the bias is chosen; the choosing ones before them; no item is in two parts."""
    order: list[tuple[object, int]] = []
    margins, divergences = InterventionDecoder.margins, InterventionDecoder.divergences

    def seen_margins(self: InterventionDecoder, item: Item) -> Any:
        order.append((item.id, len(self.attached or ())))
        return margins(self, item)

    def seen_divergences(self: InterventionDecoder, document: Document) -> Any:
        order.append((document, len(self.attached or ())))
        return divergences(self, document)

    monkeypatch.setattr(InterventionDecoder, "margins", seen_margins)
    monkeypatch.setattr(InterventionDecoder, "divergences", seen_divergences)
    found = ground.fit()
    confirming = {item.id for item in ground.confirming}
    text = documents(ground.text, ground.renderer, 32)
    rest = other_documents(ground.text, ground.renderer, 32, 32)
    last = len(confirming) + len(rest)
    assert [name for name, _ in order[-last:]] == [*(item.id for item in ground.confirming), *rest]
    assert {n for _, n in order[-last:]} == {3}
    before = {name for name, _ in order[:-last]}
    assert not before & (confirming | set(rest))
    assert not {document.tokens for document in text} & {document.tokens for document in rest}
    searched = {name for name, n in order[:-last] if n == 8 and isinstance(name, str)}
    estimating = {item.id for item in ground.estimating}
    choosing = estimating - searched
    assert found.choice is not None
    assert (len(searched), len(choosing)) == (found.fitted_on.n_items, found.choice.n_items) == (6, 4)
    assert [n for name, n in order if name in choosing] == [3] * len(choosing)
    assert before - set(text) == estimating
    choosing_text = {name for name, n in order[:-last] if isinstance(name, Document) and n == 3} - {
        name for name, n in order[:-last] if isinstance(name, Document) and n == 8
    }
    assert 0 < sum(document.n for document in choosing_text) == found.choice.n_text
    assert found.choice.n_text + found.fitted_on.n_text == 32


@pytest.mark.parametrize("n_items", [3, 4, 5, 9])
def test_the_attributions_own_split(ground: Ground, n_items: int) -> None:
    """Also where a single item confirms, of which the map says nothing."""
    found = attribute(
        ground.llama,
        ground.items,
        ground.map,
        renderer=ground.renderer,
        n_candidates=1,
        draws=8,
        n_items=n_items,
        seed=5,
        n_threads=1,
    )
    assert found.effects is not None
    estimating, confirming = split_as_attributed(ground.items[::-1], found.effects)
    assert len(estimating) == found.effects.facts.n_items
    assert len(estimating) + len(confirming) == n_items


def test_the_text_that_was_cut_goes_on_behind_its_document(ground: Ground) -> None:
    """The last document of the search may be cut; what confirms begins behind all of it."""
    whole = ground.text.documents(ground.renderer, 1000, None)
    n = whole[0].n + 1  # a single token of the second document
    text = documents(ground.text, ground.renderer, n)
    assert text[0] == whole[0]
    assert text[1].n == 1
    rest = other_documents(ground.text, ground.renderer, n, 40)
    assert rest[0] == whole[2]
    assert sum(document.n for document in rest) == 40


@pytest.mark.parametrize("changed", [{"method": "none", "budget": 1e-4}, {"evaluations": 400}])
def test_the_progress_ends_with_its_last_step(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any]
) -> None:
    """Also where a small budget takes a second grid, and where a search comes to rest before its evaluations end."""

    def squares(self: InterventionDecoder, document: Document) -> Any:
        biases = self.attached or ()
        return np.array([0 if bias is None else document.n * (bias.dense() ** 2).sum() for bias in biases], np.float64)

    monkeypatch.setattr(InterventionDecoder, "divergences", squares)
    monkeypatch.setattr(search, "_TOLERANCES", {"tolx": 1e3, "tolfun": 1e3})
    steps: list[tuple[int, int]] = []
    found = ground.fit(**changed, progress=lambda _, done, total: steps.append((done, total)))
    assert found.n_evaluations == 3 * 8 if "budget" in changed else found.n_evaluations < 2 * 8 + 400
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize(("most", "together"), [(10, 4), (4, 1)])
def test_a_population_that_does_not_fit_a_batch(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, most: int, together: int
) -> None:
    """In groups of as many steerings as the sequences allow, with the same figures up to rounding."""
    whole = ground.fit(method="none")
    attached: list[int] = []
    steer_by = InterventionDecoder.steer_by

    def seen(self: InterventionDecoder, biases: Any) -> None:
        attached.append(len(biases))
        steer_by(self, biases)

    monkeypatch.setattr(capi, "MAX_SEQUENCES", most)
    monkeypatch.setattr(InterventionDecoder, "steer_by", seen)
    steps: list[tuple[int, int]] = []
    found = ground.fit(method="none", progress=lambda _, done, total: steps.append((done, total)))
    assert max(attached) == together
    assert found.n_evaluations == whole.n_evaluations
    assert steps[-1][0] == steps[-1][1]
    assert found.confirmed_on is not None
    assert whole.confirmed_on is not None
    assert found.confirmed_on.unsteered == pytest.approx(whole.confirmed_on.unsteered, abs=1e-3)
    # scales of nearly equal gain may change places by rounding; their neighbours are a fifth apart, or two steps
    assert found.start.dense() == pytest.approx(whole.start.dense(), rel=0.5)


#
# interruptions
#


@pytest.mark.parametrize("n", [1, 9, 45, 60])
def test_resumed_to_the_bit(ground: Ground, fitted: Fit, tmp_path: Path, n: int) -> None:
    with interrupted_after(n), AnswerFile(tmp_path / "b.gguf") as kept, pytest.raises(KeyboardInterrupt):
        ground.fit(kept=kept)
    steps: list[tuple[int, int]] = []
    with AnswerFile(tmp_path / "b.gguf") as kept:
        found = ground.fit(kept=kept, resume=True, progress=lambda _, done, total: steps.append((done, total)))
        assert kept.n_kept > n
    assert found.bias.key == fitted.bias.key
    assert found.to_dict() == fitted.to_dict()
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]


def test_resumed_with_more_evaluations(ground: Ground, tmp_path: Path) -> None:
    with AnswerFile(tmp_path / "b.gguf") as kept:
        ground.fit(kept=kept)
        n = kept.n_kept
    with AnswerFile(tmp_path / "b.gguf") as kept:
        found = ground.fit(kept=kept, resume=True, evaluations=40)
        added = kept.n_kept - n
    assert found.to_dict() == ground.fit(evaluations=40).to_dict()
    # two more generations, and what follows from them; nothing of the first ones again
    assert added <= 3 * 7 + 4 + 6 + 10 + 20
    with AnswerFile(tmp_path / "b.gguf") as kept, pytest.raises(UsageError, match="seed"):
        ground.fit(kept=kept, resume=True, seed=1)


@pytest.mark.parametrize("values", ["[0.5]", '"x"', "[null]", "[true, 1, 2]", "{}"])
def test_a_kept_part_that_is_none(ground: Ground, tmp_path: Path, values: str) -> None:
    path = tmp_path / "b.gguf.partial"
    with interrupted_after(12), AnswerFile(tmp_path / "b.gguf") as kept, pytest.raises(KeyboardInterrupt):
        ground.fit(kept=kept)
    lines = path.read_text("utf-8").splitlines()
    name = json.loads(lines[-1])["id"]
    path.write_text("\n".join([*lines[:-1], f'{{"id": {json.dumps(name)}, "values": {values}}}', ""]), "utf-8")
    with AnswerFile(tmp_path / "b.gguf") as kept, pytest.raises(FormatError, match="--restart"):
        ground.fit(kept=kept, resume=True)


#
# what it refuses
#


@pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf"), "0.1", True])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(UsageError, match="budget"):
        FitOptions(budget=budget)


@pytest.mark.parametrize(
    "changed",
    [
        {"n_experts": 0},
        {"evaluations": 0},
        {"n_experts": 1025},
        {"population": 3},
        {"population": 1025},
        {"bound": 0.0},
        {"n_text": 0},
        {"seed": -1},
        {"method": "adam"},
        {"n_batch": 1.5},
    ],
)
def test_options_outside_their_ranges(changed: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(changed))):
        FitOptions(budget=0.1, **changed)


def test_no_budget_at_all(ground: Ground) -> None:
    with pytest.raises(UsageError, match="budget"):
        fit(ground.llama, ground.items, ground.map, neutral=ground.text)


def test_a_budget_below_any_steering(ground: Ground) -> None:
    with pytest.raises(UsageError, match="give a larger budget"):
        ground.fit(budget=1e-30, method="none", items=ground.items)


def test_a_map_without_effects(ground: Ground) -> None:
    with pytest.raises(UsageError, match="steermoe attribute"):
        ground.fit(expert_map=replace(ground.map, effects=None))


def test_no_significant_effect(ground: Ground) -> None:
    assert ground.map.effects is not None
    idle = replace(ground.map.effects, p=np.ones(len(ground.map.effects.p)))
    with pytest.raises(UsageError, match="significant"):
        ground.fit(expert_map=replace(ground.map, effects=idle))


def test_other_items(ground: Ground) -> None:
    """Fewer of the attribution's, or one that differs by a token; items that the attribution left out may be absent."""
    used = [*ground.estimating, *ground.confirming]
    with pytest.raises(UsageError, match="not those"):
        ground.fit(items=used[1:])
    changed = replace(used[3], prompt=(*used[3].prompt, 5))
    with pytest.raises(UsageError, match="not those"):
        ground.fit(items=[*used[:3], changed, *used[4:]])
    with pytest.raises(UsageError, match="not those"):
        ground.fit(items=[])


def test_another_model(ground: Ground) -> None:
    other = replace(ground.map.identity, router_sha256="ab" * 32)
    with pytest.raises(ModelMismatchError):
        ground.fit(expert_map=replace(ground.map, identity=other))
    forced = ground.fit(expert_map=replace(ground.map, identity=other), force=True, method="none")
    assert forced.bias.identity == ground.map.identity
    smaller = replace(table_map(np.zeros((1, 2)), 1), effects=_single_effect(ground))
    with pytest.raises(ModelMismatchError):
        ground.fit(expert_map=smaller, force=True)


def _single_effect(ground: Ground) -> Any:
    """The largest effect, as if of an expert that a smaller model has, too."""
    effects = ground.map.effects
    assert effects is not None
    best = int(np.argmax(np.where(effects.significant, effects.effect, -1)))
    names = ("layer", "expert", "action", "effect", "effect_se", "p", "cost", "cost_se", "confirm", "confirm_se")
    columns: dict[str, Any] = {name: getattr(effects, name)[best : best + 1] for name in (*names, "control")}
    return replace(effects, **(columns | {"layer": np.array([0]), "expert": np.array([0])}))


def test_no_text_or_too_little(ground: Ground) -> None:
    with pytest.raises(UsageError, match="neutral text"):
        ground.fit(neutral=None)
    with pytest.raises(UsageError, match="short"):
        ground.fit(neutral=NeutralText("short", ground.text.passages[:2]))
