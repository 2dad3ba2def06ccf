"""`transfer` on the embedded model; every figure of one quantization is computed again by other means."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steermoe_local import ExpertMap, ModelMismatchError, SteeredLlama, UsageError, load_pairs, record_counts
from steermoe_local.detection.token_routing import selected_experts
from steermoe_local.errors import ChoiceError, ResourceError
from steermoe_local.evaluation.measuring.evaluator import Evaluator, EvaluatorSettings
from steermoe_local.evaluation.metrics.intervals import Interval, difference
from steermoe_local.evaluation.reports.transfer_picture import draw_transfer
from steermoe_local.evaluation.reports.transfer_report import conclusions, markdown, table
from steermoe_local.evaluation.studies import quantize
from steermoe_local.evaluation.studies import transfer as module
from steermoe_local.evaluation.studies.agreement import routing_agreement, take_reference
from steermoe_local.evaluation.studies.transfer import OpenEvaluator, open_evaluators, transfer
from steermoe_local.evaluation.studies.transfer_results import Column, MapEffect, Transfer
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.neutral_text import NeutralText, load_neutral_text
from steermoe_local.evaluation.tasks.scorers import make_scorer
from steermoe_local.generation.engine import Engine
from steermoe_local.models.embedded import behaviour, data_folder
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.pairs import Pair
from steermoe_local.steering.steering import Steering
from tests.support.low_level import Context, open_model

QUANTS = ("Q8_0", "Q2_K")
N_ITEMS, N_PAIRS, N_TEXTS = 6, 10, 15
BEHAVIOUR = behaviour("digits-words")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return list(load_pairs(BEHAVIOUR.pairs))[:N_PAIRS]


@pytest.fixture(scope="module")
def neutral() -> NeutralText:
    text = load_neutral_text(data_folder() / "neutral.heldout.jsonl")
    return replace(text, passages=text.passages[:N_TEXTS])


@pytest.fixture(scope="module")
def steering(tiny_path: Path, pairs: list[Pair]) -> Steering:
    """By a map of the few pairs, so that the base's own map is the same."""
    found = ExpertMap.from_counts(record_counts(tiny_path, pairs, n_threads=1), "digits-words")
    return Steering("digits-words", expert_map=found, activate=2, deactivate=2)


@pytest.fixture(scope="module")
def evaluators(neutral: NeutralText) -> OpenEvaluator:
    task = builtin_task("digits-words").first(N_ITEMS)
    options = EvaluatorSettings(n_parallel=8, context={"n_threads": 1})
    scorer = make_scorer(task.scorer, task.options)
    return open_evaluators(task, scorer, neutral=neutral, settings=options, n_threads=1)


@dataclass
class Run:
    """A whole transfer, its folder and the maps that came of it."""

    found: Transfer
    folder: Path
    maps: dict[str, ExpertMap]

    def path(self, name: str) -> Path:
        return self.folder / f"tiny-moe-{name}.gguf"


@pytest.fixture(scope="module")
def done(
    tiny_path: Path,
    steering: Steering,
    evaluators: OpenEvaluator,
    pairs: list[Pair],
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:
    folder = tmp_path_factory.mktemp("models")
    maps: dict[str, ExpertMap] = {}
    found = transfer(
        tiny_path,
        steering,
        evaluators,
        folder=folder,
        quants=QUANTS,
        pairs=pairs,
        n_threads=1,
        on_map=maps.__setitem__,
    )
    return Run(found, folder, maps)


#
# the figures, again
#


def test_the_base(done: Run, steering: Steering, tiny_path: Path) -> None:
    base = done.found.base
    assert (base.name, base.file.file_type, base.file.seconds) == ("base", "F16", None)
    assert base.map is not None
    assert (base.map.pearson, base.map.overlap) == (1, 1), "its own map is the map"
    assert np.array_equal(done.maps["base"].rd, steering.expert_map.rd if steering.expert_map else None)
    assert base.routing is base.text is base.effect.change is None
    assert base.own_effect is not None
    assert base.own_effect.effects == base.effect.effects
    assert base.own_gain is not None
    assert base.own_gain.value == 0


def test_nearly_the_same_model(done: Run) -> None:
    column = done.found.column("Q8_0")
    assert column.map is not None
    assert column.map.pearson > 0.99
    assert column.routing is not None
    assert column.routing.same_sets > 0.9
    assert column.text is not None
    assert 0 <= column.text.kl < 1e-3
    other = done.found.column("Q2_K")
    assert other.routing is not None
    assert other.text is not None
    assert other.routing.same_sets < column.routing.same_sets
    assert other.text.kl > column.text.kl
    assert other.file.size_bytes < column.file.size_bytes < done.found.base.file.size_bytes
    with pytest.raises(KeyError):
        done.found.column("Q4_0")


def test_the_maps_agreement(done: Run, pairs: list[Pair]) -> None:
    """RD from counts of our own, correlations by numpy, overlap by sets."""
    counts = record_counts(done.path("Q2_K"), pairs, n_threads=1, n_batch=64)
    one = done.maps["base"].rd.ravel()
    two = (counts.a1 / counts.n1 - counts.a2 / counts.n2).ravel()
    assert np.allclose(done.maps["Q2_K"].rd.ravel(), two)
    found = done.found.column("Q2_K").map
    assert found is not None
    assert found.pearson == pytest.approx(np.corrcoef(one, two)[0, 1])
    assert found.pearson < 1
    ranks = [np.array([np.mean(np.flatnonzero(np.sort(v) == x)) for x in v]) for v in (one, two)]
    assert found.spearman == pytest.approx(np.corrcoef(*ranks)[0, 1])
    tops = [{(i, v[i] > 0) for i in sorted(range(len(v)), key=lambda i: (-abs(v[i]), i))[:20]} for v in (one, two)]
    assert found.overlap == len(tops[0] & tops[1]) / 20
    assert done.found.column("Q2_K").own_map_sha256 == done.maps["Q2_K"].sha256


def documents(path: Path, neutral: NeutralText) -> list[tuple[list[int], int]]:
    """(tokens, index of the first that predicts one that counts) of each passage, by llama_cpp's own template."""
    found = []
    with closing(SteeredLlama(path, n_ctx=64, n_threads=1)) as llama:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        eos, bos = (llama._model.token_get_text(t) for t in (llama.token_eos(), llama.token_bos()))
        formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos, bos)
        for prompt, text in neutral.passages:
            assert prompt is not None
            before = formatter(messages=[m.to_dict() for m in prompt]).prompt
            head, whole = (llama.tokenize(t.encode(), add_bos=False, special=True) for t in (before, before + text))
            assert whole[: len(head)] == head
            found.append((whole, len(head) - 1))
    return found


def by_hand(path: Path, texts: list[tuple[list[int], int]]) -> tuple[Any, Any]:
    """Selected experts [tokens, layer, k], sorted, and log-probabilities [tokens, vocabulary] of what counts."""
    model = open_model(path)
    chosen, logprobs = [], []
    with Context(model, capture=True, n_ctx=64) as context:
        for tokens, first in texts:
            context.seen.clear()
            logits = context.fresh(tokens[:-1])[first:].astype(np.float64)
            logits -= logits.max(axis=1, keepdims=True)
            logprobs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
            layers = [context.seen[f"ffn_moe_topk-{layer}"][0].reshape(len(tokens) - 1, -1) for layer in range(5)]
            chosen.append(np.sort(np.stack(layers, axis=1), axis=2)[first:])
    model.close()
    return np.concatenate(chosen), np.concatenate(logprobs)


def test_routing_and_predictions(done: Run, tiny_path: Path, neutral: NeutralText) -> None:
    texts = documents(tiny_path, neutral)
    (one, p), (two, q) = by_hand(tiny_path, texts), by_hand(done.path("Q2_K"), texts)
    column = done.found.column("Q2_K")
    assert column.routing is not None
    assert (column.routing.n_tokens, column.routing.n_layers) == one.shape[:2]
    assert column.routing.same_sets == pytest.approx((one == two).all(axis=2).mean())
    assert column.routing.same_sets < 1
    both = np.array([len(set(a) & set(b)) for a, b in zip(one.reshape(-1, 4), two.reshape(-1, 4), strict=True)])
    assert column.routing.overlap == pytest.approx(both.mean() / 4)
    assert column.routing.by_layer == pytest.approx((both.reshape(-1, 5) / 4).mean(axis=0).tolist())
    assert column.routing.chance == pytest.approx(4 / 24)

    targets = np.concatenate([tokens[first + 1 :] for tokens, first in texts])
    assert column.text is not None
    assert column.text.n == len(targets)
    assert column.text.kl == pytest.approx((np.exp(p) * (p - q)).sum(axis=1).mean(), rel=1e-3)
    assert column.text.same_top == pytest.approx((p.argmax(axis=1) == q.argmax(axis=1)).mean())
    nll = [-rows[np.arange(len(targets)), targets].mean() for rows in (p, q)]
    assert column.text.nll == pytest.approx(nll[1], rel=1e-3)
    assert done.found.base.perplexity == pytest.approx(math.exp(nll[0]), rel=1e-4)
    assert column.perplexity == pytest.approx(math.exp(nll[1]), rel=1e-4)


def test_the_effect(done: Run, steering: Steering) -> None:
    """Answers by llama_cpp's chat completion, scored by the task's own words."""
    values: dict[str, list[float]] = {}
    choices = {"unsteered": None, "towards": steering, "away": steering.changed(reverse=True)}
    own = steering.changed(expert_map=done.maps["Q2_K"], path=None)
    choices |= {"own towards": own, "own away": own.changed(reverse=True)}
    with closing(SteeredLlama(done.path("Q2_K"), n_ctx=64, n_threads=1, n_threads_batch=1)) as llama:
        for side, choice in choices.items():
            llama.set_bias(choice.build() if choice else None)
            for item in builtin_task("digits-words").first(N_ITEMS).items:
                messages = [message.to_dict() for message in item.messages()]
                reply: Any = llama.create_chat_completion(messages=messages, temperature=0, max_tokens=24)  # type: ignore
                text = reply["choices"][0]["message"]["content"].strip()
                values.setdefault(side, []).append(float(text[:1].isdigit()))
    means = {side: float(np.mean(found)) for side, found in values.items()}
    column = done.found.column("Q2_K")
    effect, mine = column.effect, column.own_effect
    assert mine is not None
    for side in ("unsteered", "towards", "away"):
        assert effect.rates[side].value == pytest.approx(means[side])
    assert effect.headline == "swing"
    assert effect.effect.value == pytest.approx(means["towards"] - means["away"])
    assert effect.items == tuple(np.subtract(values["towards"], values["away"]))
    assert mine.effect.value == pytest.approx(means["own towards"] - means["own away"])
    base = done.found.base.effect
    assert effect.change is not None
    assert effect.change.value == pytest.approx(effect.effect.value - base.effect.value)
    assert column.own_gain is not None
    assert column.own_gain.value == pytest.approx(mine.effect.value - effect.effect.value)
    assert base.effect.value > 0.5, "else nothing is seen"


def measured(towards: list[float], away: list[float] | None) -> Any:
    """As much of an Evaluation as `MapEffect.of` reads."""
    values = {"unsteered": [0.0] * len(towards), "towards": towards, **({} if away is None else {"away": away})}
    fluency = SimpleNamespace(perplexity_ratio=1.5)
    name = "towards" if away is None else "swing"
    return SimpleNamespace(
        sides=[
            SimpleNamespace(name=side, rate=interval(np.mean(found)), fluency=fluency) for side, found in values.items()
        ],
        measurements=[SimpleNamespace(values=np.array(found)) for found in values.values()],
        effects={"towards": interval(0.5), name: interval(0.7)},
        headline=(name, interval(0.7)),
        signatures=[SimpleNamespace(side="away", name="no room")],
    )


def test_the_change_of_an_effect() -> None:
    base = MapEffect.of(measured([1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 1, 0]), None, 0)
    assert base.items == (1, 1, 1, 1, 0, 0)
    assert (base.change, base.headline, base.effect.value) == (None, "swing", 0.7)
    assert base.signatures == ("away: no room",)
    assert base.perplexity_ratio["away"] == 1.5
    worse = MapEffect.of(measured([1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0]), base, 0)
    assert worse.items == (1, 0, 0, -1, 0, 0)
    assert worse.change is not None
    assert worse.change.value == pytest.approx(-4 / 6), "this model's less the base's"
    assert worse.change == difference(worse.items, base.items, 0)
    one_way = MapEffect.of(measured([1, 0, 1, 0, 0, 0.5], None), base, 0)
    assert (one_way.headline, one_way.items) == ("towards", (1, 0, 1, 0, 0, 0.5))


#
# which experts a token selects
#


def test_selected_experts_are_those_of_the_engine(tiny_path: Path) -> None:
    """One token at a time through `Engine.route`; long enough for several windows, short enough for all in one."""
    rng = np.random.default_rng(3)
    tokens = rng.integers(5, 1200, 150).tolist()
    with (
        closing(SteeredLlama(tiny_path, n_ctx=64, n_threads=1)) as llama,
        Engine(llama, n_ctx=256, n_threads=1) as engine,
    ):
        texts = [(tokens, 0, 150), (tokens[:20], 7, 19), (tokens, 148, 150)]
        found = list(selected_experts(llama, texts, n_threads=1, n_batch=64))
        for (text, first, last), ours in zip(texts, found, strict=True):
            assert ours.shape == (last - first, 5, 24)
            assert (ours.sum(axis=2) == 4).all()
            theirs = [engine.route(text, None, i, i + 1) for i in range(first, last)]
            # rounding differs between batches: a tie may fall the other way
            assert (ours == np.array(theirs).astype(bool)).mean() > 0.995
        for text in ((tokens, 3, 3), (tokens, 0, 151), (tokens, -1, 3)):
            with pytest.raises(UsageError, match="no tokens"):
                list(selected_experts(llama, [text]))


def test_agreement_by_hand() -> None:
    """Two tokens, three layers of which the middle one has no router, top-2 of four."""
    one = np.zeros((2, 3, 4), np.bool_)
    two = np.zeros((2, 3, 4), np.bool_)
    for table_, rows in ((one, "01 01 23 12"), (two, "01 12 01 12")):
        for place, experts in zip(((0, 0), (0, 2), (1, 0), (1, 2)), rows.split(), strict=True):
            table_[place][list(map(int, experts))] = True
    found = routing_agreement(one, two)
    assert found.same_sets == 2 / 4
    assert found.overlap == (1 + 0.5 + 0 + 1) / 4
    assert (found.layers, found.by_layer) == ((0, 2), (0.5, 0.75))
    assert (found.n_tokens, found.n_layers, found.chance) == (2, 2, 0.5)
    with pytest.raises(ModelMismatchError):
        routing_agreement(one, two[:1])
    with pytest.raises(UsageError, match="nothing to compare"):
        routing_agreement(one & False, two & False)


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float64, (6, 3, 8), elements=st.floats(0, 1, width=16)), st.integers(1, 8), st.randoms())
def test_properties_of_agreement(logits: Any, k: int, random: Any) -> None:
    def top(values: Any) -> Any:
        order = np.argsort(-values, axis=2, kind="stable")[:, :, :k]
        chosen = np.zeros(values.shape, np.bool_)
        np.put_along_axis(chosen, order, True, axis=2)
        return chosen

    one, two = top(logits), top(logits[::-1])
    same = routing_agreement(one, one)
    assert same.same_sets == same.overlap == 1
    found, back = routing_agreement(one, two), routing_agreement(two, one)
    assert (found.same_sets, found.overlap) == (back.same_sets, back.overlap)
    assert 0 <= found.same_sets <= found.overlap <= 1
    assert found.chance == pytest.approx(k / 8)
    order = list(range(8))
    random.shuffle(order)
    renamed = routing_agreement(one[:, :, order], two[:, :, order])
    assert renamed.overlap == pytest.approx(found.overlap)
    assert renamed.same_sets == found.same_sets


def test_without_a_neutral_text(evaluators: OpenEvaluator, tiny_path: Path) -> None:
    """The task's prompts serve, up to the tokens that are wanted."""
    with evaluators(tiny_path, "base") as evaluator:
        evaluator.neutral = None
        found = take_reference(evaluator, 30)
        assert sum(document.n for document in found.documents) == len(found.selected) == len(found.logprobs) == 30
        assert np.allclose(np.exp(found.logprobs).sum(axis=1), 1)


def test_a_vocabulary_too_large_to_keep(
    evaluators: OpenEvaluator, tiny_path: Path, done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer predictions are kept; routing is compared on all tokens."""
    from steermoe_local.evaluation.studies import agreement

    monkeypatch.setattr(agreement, "_MAX_FLOATS", 10 * 1280)
    with evaluators(tiny_path, "base") as evaluator:
        found = take_reference(evaluator, 60)
        assert 0 < len(found.logprobs) <= 10 < len(found.selected)
        routing, text = agreement.compare_text(evaluator, found)
        assert (routing.same_sets, text.n) == (1, len(found.logprobs))
        assert text.kl == pytest.approx(0, abs=1e-9)  # what is kept is rounded to float32
        evaluator.neutral = None
        monkeypatch.setattr(agreement, "_MAX_FLOATS", 5 * 1280)
        found = take_reference(evaluator, 60)  # the first prompt alone has more than five tokens
        assert len(found.logprobs) == 5
        assert agreement.compare_text(evaluator, found)[1].n == 5


#
# interrupted, and what else can go wrong
#


def stable(column: Column) -> dict[str, Any]:
    """A column without what differs from run to run."""
    data = column.to_dict(items=True)
    data["file"]["seconds"] = None
    del data["own_map_sha256"]  # the map says when it was made
    return data


def test_columns_survive_a_file(done: Run) -> None:
    for column in (done.found.base, *done.found.columns):
        data = json.loads(json.dumps(column.to_dict(items=True)))
        assert Column.from_dict(data, column.file.path.parent) == column
    text = json.dumps(done.found.to_dict())
    assert str(done.folder) not in text, "no folders of this machine"
    assert '"items"' not in text


def test_an_interrupted_run_goes_on(
    done: Run, tiny_path: Path, steering: Steering, evaluators: OpenEvaluator, pairs: list[Pair], tmp_path: Path
) -> None:
    kept: dict[str, Column] = {}
    opened: list[str] = []

    @contextmanager
    def counting(path: Path, name: str) -> Iterator[Evaluator]:
        opened.append(name)
        with evaluators(path, name) as evaluator:
            yield evaluator

    def keep(column: Column) -> None:
        kept[column.name] = column
        if column.name == "Q8_0":
            raise KeyboardInterrupt

    def go(on_column: Callable[[Column], None]) -> Transfer:
        return transfer(
            tiny_path,
            steering,
            counting,
            folder=tmp_path / "models",
            quants=QUANTS,
            pairs=pairs,
            keep=False,
            n_threads=1,
            done=kept,
            on_column=on_column,
        )

    with pytest.raises(KeyboardInterrupt):
        go(keep)
    assert opened == ["base", "Q8_0"]
    assert not (tmp_path / "models").exists(), "a quantization that nobody wanted to keep"
    kept = {name: Column.from_dict(json.loads(json.dumps(c.to_dict(items=True))), tmp_path) for name, c in kept.items()}
    opened.clear()
    again: list[str] = []
    found = go(lambda column: again.append(column.name))
    assert (opened, again) == (["base", "Q2_K"], ["Q2_K"])
    for name in ("base", *QUANTS):
        assert stable(found.column(name)) == stable(done.found.column(name))
    assert not (tmp_path / "models").exists()


def test_what_is_there_is_used(done: Run, tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(quantize, "quantize_file", refuse)
    columns = {"base": done.found.base}
    measured: list[str] = []

    def column(_: Any, _evaluator: Any, name: str, file: Any, *__: Any) -> Column:
        measured.append(name)
        assert file.seconds is None
        return replace(done.found.column(name), file=file)

    monkeypatch.setattr(module._Plan, "column", column)
    steering = Steering.open(map_file=map_path("digits-words"), activate=2, deactivate=2)
    task = builtin_task("digits-words").first(1)
    plain = open_evaluators(
        task, make_scorer(task.scorer, task.options), settings=EvaluatorSettings(context={"n_threads": 1})
    )
    found = transfer(tiny_path, steering, plain, folder=done.folder, quants=["q8_0", "Q8_0"], done=columns, keep=True)
    assert measured == ["Q8_0"], "named twice, measured once"
    assert done.path("Q8_0").exists()
    assert "own maps are not made" in found.warnings[0]


def test_pairs_that_are_not_the_maps(
    done: Run, tiny_path: Path, evaluators: OpenEvaluator, steering: Steering, pairs: list[Pair]
) -> None:
    columns = {column.name: column for column in (done.found.base, *done.found.columns)}

    def warnings(pairs: list[Pair]) -> tuple[str, ...]:
        options: dict[str, Any] = {"folder": done.folder, "quants": QUANTS, "done": columns}
        return transfer(tiny_path, steering, evaluators, pairs=pairs, **options).warnings

    assert warnings(pairs) == ()
    (warning,) = warnings(pairs[:-1])
    assert warning.startswith("the pairs are not those that the map was made from")


def test_an_own_map_that_cannot_steer(
    done: Run,
    tiny_path: Path,
    steering: Steering,
    evaluators: OpenEvaluator,
    pairs: list[Pair],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told, and does not end the run."""
    real = module.check_choice

    def check(choice: Steering, identity: Any) -> None:
        real(choice, identity)
        if choice.expert_map is not steering.expert_map:
            raise ChoiceError("layer 3: deactivating 9 would leave too few")

    monkeypatch.setattr(module, "check_choice", check)
    columns = {"base": done.found.base}
    options: dict[str, Any] = {"folder": done.folder, "quants": ["Q8_0"], "done": columns, "n_agreement": 5}
    found = transfer(tiny_path, steering, evaluators, pairs=pairs, **options)
    (column,) = found.columns
    assert column.notes == ("its own map cannot be steered by: layer 3: deactivating 9 would leave too few",)
    assert column.own_effect is column.own_gain is None
    assert column.map is not None
    assert column.effect.effects == done.found.column("Q8_0").effect.effects
    assert column.routing is not None
    assert column.routing.n_tokens == 5
    assert "deactivating 9" in markdown(found)


def test_refused_before_anything_is_made(
    tiny_path: Path, steering: Steering, evaluators: OpenEvaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attempt(choice: Steering = steering, **options: Any) -> None:
        transfer(tiny_path, choice, evaluators, **{"folder": tmp_path / "models", "quants": ["Q8_0"]} | options)

    monkeypatch.setattr(module.Quantizer, "make", lambda *_: pytest.fail("quantized"))
    with pytest.raises(UsageError, match="'Q9' is no quantization"):
        attempt(quants=["Q8_0", "Q9"])
    with pytest.raises(UsageError, match="needs an importance matrix"):
        attempt(quants=["IQ1_S"])
    with pytest.raises(UsageError, match="no quantizations; name one at least"):
        attempt(quants=[])
    with pytest.raises(UsageError, match="n_agreement and top_n must be at least 1"):
        attempt(n_agreement=0)
    with pytest.raises(UsageError, match="is no map"):
        attempt(Steering("ready", bias=steering.build()))
    assert steering.expert_map is not None
    for sign in (-1, 1):  # one cannot be carried out as it is, the other not in reverse
        flat = replace(steering.expert_map, rd=np.full((5, 24), sign / 10), a1=None, a2=None)
        with pytest.raises(ChoiceError, match="would leave fewer than the 4 experts"):
            attempt(steering.changed(expert_map=flat, deactivate=120))
    monkeypatch.setattr(quantize.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ResourceError, match="Q8_0 takes about"):
        attempt()
    assert not (tmp_path / "models").exists()


#
# words and pictures
#


def interval(value: float, half: float = 0.1) -> Interval:
    return Interval(value, value - half, value + half, 100, "newcombe")


def column(done: Run, name: str, effect: float, change: float | None = None, gain: float | None = None) -> Column:
    """A column with a swing of the test's choice."""
    real = done.found.column("Q8_0")
    made = replace(
        real.effect,
        effects={**real.effect.effects, "swing": interval(effect)},
        change=None if change is None else interval(change),
    )
    file = replace(real.file, file_type=name, n_fallback=0, fallback_share=0.0)
    return replace(real, name=name, file=file, effect=made, own_gain=None if gain is None else interval(gain))


def told(done: Run, base: float, *columns: Column) -> str:
    return " ".join(conclusions(replace(done.found, base=column(done, "base", base), columns=columns)))


def test_conclusions_say_what_the_intervals_say(done: Run) -> None:
    make = column
    words = told(done, 0.8, make(done, "A", 0.7, -0.1), make(done, "B", 0.3, -0.5, 0.4), make(done, "C", 0.05, -0.75))
    assert "keeps its swing (same sign, 95% interval without 0) on 2 of 3 quantizations (A, B)." in words
    assert "It is smaller than on the base (interval of the difference without 0) on B, C." in words
    assert "larger" not in words
    assert "A map made on the quantization itself does more than the base's on B." in words
    assert "milder" not in words
    assert "as large as it can be" not in words
    assert "as large as it can be" in told(done, -1.0, make(done, "A", -1.0, 0.0))
    # a map whose positive side the task counts as its negative one
    words = told(
        done, -0.8, make(done, "A", -0.2, 0.6, -0.3), make(done, "B", -1.0, -0.2, 0.2), make(done, "C", 0.5, 1.3)
    )
    assert "on 2 of 3 quantizations (A, B)." in words
    assert "It is smaller than on the base (interval of the difference without 0) on A, C." in words
    assert "It is larger than on the base (interval of the difference without 0) on B." in words
    assert "itself does more than the base's on A and does less on B." in words
    assert "no effect that could carry over" in told(done, 0.05, make(done, "A", 0.9))
    assert "is not told from the base's on any of them" in told(done, 0.8, make(done, "A", 0.8, 0.0, 0.0))
    fallen = make(done, "A", 0.8, 0.0)
    fallen = replace(fallen, file=replace(fallen.file, n_fallback=5, fallback_share=0.2))
    assert "on A rows that do not fit its blocks got another type (up to 20% of the weights, A)" in told(
        done, 0.8, fallen
    )


def test_the_table(done: Run) -> None:
    found = table(done.found)
    assert [row[0] for row in found.rows] == ["base (F16)", *QUANTS]
    cells = dict(zip(found.header, found.rows[2], strict=True))
    real = done.found.column("Q2_K")
    assert real.routing is not None
    assert real.map is not None
    assert cells["same sets"] == f"{real.routing.same_sets:.1%}"
    assert cells["RD Pearson"] == f"{real.map.pearson:.3f}"
    assert cells["bits/weight"] == f"{real.file.bits_per_weight:.2f}"
    bare = [replace(c, map=None, own_effect=None, perplexity=None) for c in (done.found.base, *done.found.columns)]
    header = table(replace(done.found, base=bare[0], columns=tuple(bare[1:]))).header
    assert not {"RD Pearson", "by own map", "perplexity"} & set(header), "columns of nothing"


def test_the_report(done: Run) -> None:
    text = markdown(done.found, "steermoe transfer -m tiny", ["transfer.png"])
    assert text.startswith("# digits-words over quantizations of tiny-moe.gguf\n")
    assert "```sh\nsteermoe transfer -m tiny\n```" in text
    assert "![transfer.png](transfer.png)" in text
    assert str(done.folder) not in text
    hostile = {**done.found.provenance["steering"], "name": "a | b\n# <script>"}
    found = replace(done.found, provenance={**done.found.provenance, "steering": hostile})
    assert "<script>" not in markdown(found)
    assert "\n# <" not in markdown(found)


def test_the_picture(done: Run, tmp_path: Path) -> None:
    one, again, bare_one = (tmp_path / name for name in ("a.svg", "b.svg", "c.png"))
    draw_transfer(done.found, [one])
    draw_transfer(done.found, [again])
    assert one.read_bytes() == again.read_bytes()
    bare = [
        replace(c, map=None, own_effect=None, own_gain=None, perplexity=None, routing=None, text=None)
        for c in (done.found.base, *done.found.columns)
    ]
    draw_transfer(replace(done.found, base=bare[0], columns=tuple(bare[1:])), [bare_one])
    assert bare_one.read_bytes().startswith(b"\x89PNG")


def test_a_preset_has_no_reverse(done: Run) -> None:
    """Then the effect to compare is the one towards."""
    effect = done.found.base.effect
    one = replace(effect, effects={"towards": effect.effects["towards"]}, headline="towards")
    assert one.effect == effect.effects["towards"]
    found = replace(done.found, base=replace(done.found.base, effect=one), columns=())
    assert "towards" in table(found).header
    assert MapEffect.from_dict(json.loads(json.dumps(one.to_dict(items=True)))) == one
