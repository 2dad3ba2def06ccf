"""`transfer` on the embedded model; every figure of one quantization is computed again by other means."""

from __future__ import annotations

import itertools
import math
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steermoe_local import ModelMismatchError, SteeredLlama, UsageError, record_counts
from steermoe_local.detection.token_routing import selected_experts
from steermoe_local.evaluation.metrics.intervals import difference
from steermoe_local.evaluation.studies.transfer.agreement import routing_agreement, take_reference
from steermoe_local.evaluation.studies.transfer.results import MapEffect
from steermoe_local.evaluation.studies.transfer.transfer import OpenEvaluator
from steermoe_local.evaluation.tasks.builtin import builtin_task
from steermoe_local.evaluation.tasks.neutral_text import NeutralText
from steermoe_local.generation.engine import Engine
from steermoe_local.pairs.pairs import Pair
from steermoe_local.steering.steering import Steering
from tests.support.low_level import F32, Context, open_model
from tests.support.near_ties import near_ties_of_prompts
from tests.support.transfer_run import N_ITEMS, TransferRun, interval


@pytest.fixture
def done(transferred: TransferRun) -> TransferRun:
    return transferred


@pytest.fixture
def pairs(transferred: TransferRun) -> list[Pair]:
    return transferred.pairs


@pytest.fixture
def steering(transferred: TransferRun) -> Steering:
    return transferred.steering


@pytest.fixture
def evaluators(transferred: TransferRun) -> OpenEvaluator:
    return transferred.evaluators


@pytest.fixture
def neutral(transferred: TransferRun) -> NeutralText:
    return transferred.neutral


#
# the figures, again
#


def test_the_base(done: TransferRun, steering: Steering, tiny_path: Path) -> None:
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


def test_nearly_the_same_model(done: TransferRun) -> None:
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


def test_the_maps_agreement(done: TransferRun, pairs: list[Pair]) -> None:
    """RD from counts of our own, correlations by numpy, overlap by sets."""
    counts = record_counts(done.path("Q2_K"), pairs, n_threads=1, n_batch=64, flash_attn=False)
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


def test_routing_and_predictions(done: TransferRun, tiny_path: Path, neutral: NeutralText) -> None:
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


def test_the_effect(done: TransferRun, steering: Steering) -> None:
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


def test_selected_experts_are_those_of_the_engine(tiny_f32_path: Path) -> None:
    """One token at a time through `Engine.route`; long enough for several windows, short enough for all in one.

    The tokens are such that rounding in F32 decides no choice.
    """
    drawn = (np.random.default_rng(seed).integers(5, 1200, 150).tolist() for seed in itertools.count(3))
    tokens = next(tokens for tokens in drawn if not near_ties_of_prompts(tiny_f32_path, [tokens]))
    cache = {"type_k": F32, "type_v": F32}
    with (
        closing(SteeredLlama(tiny_f32_path, n_ctx=64, n_threads=1)) as llama,
        Engine(llama, n_ctx=256, n_threads=1, **cache) as engine,
    ):
        texts = [(tokens, 0, 150), (tokens[:20], 7, 19), (tokens, 148, 150)]
        found = list(selected_experts(llama, texts, n_threads=1, n_batch=64, **cache))
        for (text, first, last), ours in zip(texts, found, strict=True):
            assert ours.shape == (last - first, 5, 24)
            assert (ours.sum(axis=2) == 4).all()
            theirs = [engine.route(text, None, i, i + 1) for i in range(first, last)]
            assert np.array_equal(ours, np.array(theirs).astype(bool))
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


@settings(max_examples=50)
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
    evaluators: OpenEvaluator, tiny_path: Path, done: TransferRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer predictions are kept; routing is compared on all tokens."""
    from steermoe_local.evaluation.studies.transfer import agreement

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
