"""`fit_condition` on the embedded model: planted and random pairs, what plans compute, resuming, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import (
    ConditionOptions,
    Engine,
    ExpertMap,
    ModelMismatchError,
    Pair,
    SteeredLlama,
    UsageError,
    fit_condition,
    load_pairs,
    record_counts,
)
from steermoe_local.detection.checkpoint import CheckpointFile
from steermoe_local.detection.recording_options import RecordingProgress
from steermoe_local.detection.spans import ConditionSpan
from steermoe_local.detection.token_routing import selected_experts
from steermoe_local.evaluation.studies.conditions.fit import ConditionFit
from steermoe_local.generation.requests import FinishEvent, Request
from steermoe_local.llama.plan_state import PlanState
from steermoe_local.llama.rendering import Renderer
from steermoe_local.maps.routing_lean import RoutingLean
from steermoe_local.models.embedded import behaviour
from steermoe_local.models.shipped_maps import map_path
from steermoe_local.pairs.pairs import pairs_digest
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.bias_plan import BiasPlan, BiasRule
from steermoe_local.steering.plan_rules import Condition, Where
from steermoe_local.steering.plan_text import parse_rule
from tests.support.builders import identity
from tests.support.condition_pairs import alike, kinds_of_prompts, of_prompts, prompts
from tests.support.detecting import CACHE
from tests.support.near_ties import near_ties_of_prompts

QUICK = ConditionOptions(draws=99)


@pytest.fixture(scope="module")
def llama(tiny_f32_path: Path) -> Iterator[SteeredLlama]:
    llama = SteeredLlama(tiny_f32_path, n_ctx=64, n_threads=1, verbose=False)
    yield llama
    llama.close()


@pytest.fixture(scope="module")
def shipped() -> ExpertMap:
    return ExpertMap.load(map_path("document-memory"))


def fitted(
    model: Any, pairs: list[Pair], *more: Any, options: ConditionOptions = QUICK, **changes: Any
) -> ConditionFit:
    fields = {name: changes.pop(name) for name in list(changes) if name in ConditionOptions.__dataclass_fields__}
    options = dataclasses.replace(options, **fields)
    return fit_condition(model, pairs, *more, options=options, n_threads=1, **{**CACHE, **changes})


#
# what is found
#


def test_kinds_of_prompts_are_told_apart(llama: SteeredLlama) -> None:
    found = fitted(llama, kinds_of_prompts(40), name="numbers", steer_when="positive")
    assert found.span == ConditionSpan()
    assert found.auc is not None
    assert found.auc.value == 1
    assert 0.8 < found.auc.low < 1
    assert found.control is not None
    assert found.control.p == 0.01
    assert found.differs_from_shuffled
    assert found.warnings == ()
    assert (found.false_alarms, found.misses) == (found.misses, found.false_alarms)
    assert found.false_alarms is not None
    assert found.false_alarms.value == 0
    assert found.when is not None
    assert parse_rule(f"answer when {found.when}: none").where.when == found.condition
    assert found.when.startswith("numbers > ")
    assert found.expert_map is not None
    assert found.map_sha256 == found.expert_map.sha256
    assert found.expert_map.n_pairs == 40


def test_prompts_that_are_alike_are_not(llama: SteeredLlama) -> None:
    """Twelve random halvings of alike prompts: the interval has 0.5, but for one in twenty."""
    found = [fitted(llama, alike(30, seed), seed=seed) for seed in range(12)]
    covers = [one.auc is not None and one.auc.low < 0.5 < one.auc.high for one in found]
    # binomial at 5%: four and more of twelve in one of five hundred
    assert sum(covers) >= 9
    assert sum(one.differs_from_shuffled for one in found) <= 3
    for one in found:
        if not one.differs_from_shuffled:
            assert len(one.warnings) == 1


def test_the_end_of_replies(llama: SteeredLlama) -> None:
    """A behaviour that training planted into the experts; prompts are the same on both sides."""
    pairs = load_pairs(behaviour("refuse-comply").pairs)[:30]
    found = fitted(llama, pairs, over=5)
    assert found.auc is not None
    assert found.auc.value > 0.95
    assert found.condition is not None
    assert (found.condition.last, found.condition.below) == (5, found.condition.limit)
    with pytest.raises(Exception, match="same tokens over prompt"):
        fitted(llama, pairs, over="prompt")


def test_a_map_of_other_pairs(llama: SteeredLlama) -> None:
    """It is fixed: nothing of the new pairs changes the scores; turned round, the warning says so."""
    others, pairs = kinds_of_prompts(24), kinds_of_prompts(24, first=24)
    made = ExpertMap.from_counts(record_counts(llama, others, span=ConditionSpan(), n_threads=1, **CACHE))
    found = fitted(llama, pairs, made)
    assert found.auc is not None
    assert found.auc.value > 0.95
    assert found.expert_map is None
    assert found.map_sha256 == made.sha256
    turned = [Pair(pair.id, pair.negative, pair.positive, pair.negative_target, pair.positive_target) for pair in pairs]
    found = fitted(llama, turned, made)
    assert found.auc is not None
    assert found.auc.value < 0.05
    assert "exchange the sides" in found.warnings[0]
    again = fitted(llama, pairs[:22] + turned[22:], made)
    assert (again.scores[:22] == fitted(llama, pairs, made).scores[:22]).all()


def test_texts_of_both_sides_are_told(llama: SteeredLlama) -> None:
    """Each text is positive in one pair and negative in another: pairs in a ring are one cluster, so too few."""
    ring = prompts("refuse-comply")[:30]
    with pytest.raises(UsageError, match="30 pairs, 1 of which"):
        fitted(llama, of_prompts(ring, ring[1:] + ring[:1]))


#
# what plans compute
#


@pytest.fixture(scope="module")
def untied(tiny_f32_path: Path, llama: SteeredLlama) -> list[Pair]:
    """Pairs of prompts of which every choice of experts is the same however F32 rounds, in any batch."""
    renderer = Renderer(llama._model)

    def tokens(pair: Pair) -> list[list[int]]:
        return [prompt.tokens for prompt in ConditionSpan().prompts(renderer, pair)]

    found = [pair for pair in kinds_of_prompts(49) if not near_ties_of_prompts(tiny_f32_path, tokens(pair))]
    assert len(found) >= 20
    return found[:24]


def test_the_engine_decides_by_the_same_value(llama: SteeredLlama, untied: list[Pair], shipped: ExpertMap) -> None:
    """The lean of a request's prompt is the score that was fitted, and the condition holds where it says so."""
    found = fitted(llama, untied, shipped, name="document-memory")
    assert found.condition is not None
    lean = RoutingLean.of_map(shipped)
    bias = BiasFile.from_signs(shipped.choose(1, 1), shipped.identity)
    plan = BiasPlan((BiasRule(Where("answer", when=found.condition), bias, lean),))
    renderer = Renderer(llama._model)
    fires = []
    with Engine(llama, n_ctx=128, n_threads=1, n_slots=2, **CACHE) as engine:
        for pair, scores in zip(untied, found.scores, strict=True):
            for (side, _), score in zip(pair.sides(), scores.tolist(), strict=True):
                assert not isinstance(side, str)
                prompt = renderer.render(side[:-1])
                request = Request(prompt.tokens, plan, max_tokens=2, style=prompt.style, trace=True)
                *events, end = (event for _, event in engine.generate(request))
                assert isinstance(end, FinishEvent)
                assert end.experts is not None
                n_prompt = len(prompt.tokens)
                assert lean.of_tokens(end.experts[: n_prompt - 1]).mean() == pytest.approx(score, abs=1e-9)
                steered = [event.rule for event in events if event.token >= 0]
                assert steered == [0 if found.condition.holds(score) else None] * len(steered)
                fires += steered
    assert {0, None} == set(fires)


def test_a_plan_decides_by_the_same_value_of_a_reply(llama: SteeredLlama, shipped: ExpertMap) -> None:
    """The last tokens of a reply, each looked at as it is read; the limits are as near as rounding allows."""
    pairs, n = load_pairs(behaviour("refuse-comply").pairs)[:20], 4
    found = fitted(llama, pairs, shipped, over=n)
    lean = RoutingLean.of_map(shipped)
    bias = BiasFile.from_signs(shipped.choose(1, 1), shipped.identity)
    renderer = Renderer(llama._model)
    sides = [prompt for pair in pairs for prompt in ConditionSpan(n).prompts(renderer, pair)]
    whole = [renderer.prompt(side, target) for pair in pairs for side, target in pair.sides()]
    texts = [(prompt.tokens, 0, len(prompt.tokens)) for prompt in sides]
    selected = selected_experts(llama, texts, n_threads=1, **CACHE)
    for prompt, given, experts, score in zip(sides, whole, selected, found.scores.ravel().tolist(), strict=True):
        top_k = np.argwhere(experts)[:, 2].reshape(*experts.shape[:2], -1).astype(np.int32)
        first = given.target[0]
        for limit, holds in ((score - 1e-6, False), (score + 1e-6, True)):
            when = Condition("routing", below=limit, map="m", last=n)
            plan = BiasPlan((BiasRule(Where("answer", when=when), bias, lean),))
            state = PlanState(plan, None, lambda token: b"x")
            state.prompt(prompt.tokens[:first])
            state.first()
            for index in range(first, len(prompt.tokens)):
                state.saw_reply_routing(top_k[index - 1 : index])  # the row that drew the token
                _, decision = state.reply(prompt.tokens[index])
                if index - first + 1 < n:
                    assert decision.rule is None, "there are not so many rows yet"
            state.saw_reply_routing(top_k[-1:])
            assert (state.reply(prompt.tokens[-1])[1].rule == 0) is holds


#
# runs
#


def test_interrupted_and_resumed(tiny_path: Path, tmp_path: Path) -> None:
    """To the bit, and no pair is recorded twice; folds and options may be others then."""
    pairs = kinds_of_prompts(30)
    options = {"n_batch": 64, "n_threads": 1}
    seen: list[RecordingProgress] = []
    recorded: list[int] = []
    whole = fit_condition(
        *(tiny_path, pairs),
        options=QUICK,
        on_batch=seen.append,
        on_recorded=lambda: recorded.append(seen[-1].n_done),
        **options,
    )
    assert recorded == [30]
    assert len(seen) > 6
    file = CheckpointFile(tmp_path / "out.json")

    def stop(progress: RecordingProgress) -> None:
        if progress.n_done > 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_condition(tiny_path, pairs, options=QUICK, checkpoint=file, on_batch=stop, **options)
    at = json.loads(str(np.load(file.path)["meta"]))["next"]
    assert 10 < at < 30
    again: list[RecordingProgress] = []
    found = fit_condition(tiny_path, pairs, options=QUICK, checkpoint=file, on_batch=again.append, **options)
    assert [progress.n_done for progress in again] == [one.n_done for one in seen if one.n_done >= at]
    assert _without_time(found) == _without_time(whole)
    other = dataclasses.replace(QUICK, n_folds=3, seed=7, steer_when="positive")
    changed = fit_condition(tiny_path, pairs, options=other, checkpoint=file, **options)
    assert _without_time(changed) == _without_time(fit_condition(tiny_path, pairs, options=other, **options))
    with pytest.raises(UsageError, match="over was"):
        fit_condition(tiny_path, pairs, options=dataclasses.replace(QUICK, over=1), checkpoint=file, **options)


def _without_time(found: ConditionFit) -> dict[str, Any]:
    data = found.to_dict()
    del data["created"], data["map_sha256"]  # the map has a time, too
    return data


def test_its_dict(llama: SteeredLlama) -> None:
    pairs = kinds_of_prompts(20)
    found = fitted(llama, pairs, name="numbers", seed=3)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["when"] == found.when
    assert data["pairs_sha256"] == pairs_digest(pairs)
    assert data["cross_fitted"] is True
    assert (data["over"], data["by"], data["steer_when"], data["seed"]) == ("prompt", "rd", "negative", 3)
    assert [row["id"] for row in data["pairs"]] == [pair.id for pair in pairs]
    assert [[row["positive"], row["negative"]] for row in data["pairs"]] == found.scores.tolist()
    assert sorted({row["fold"] for row in data["pairs"]}) == list(range(5))
    assert len(data["thresholds"]) == 5


def test_pairs_that_are_left_out(llama: SteeredLlama, tmp_path: Path) -> None:
    pairs = kinds_of_prompts(21)
    same = Pair("same", pairs[0].positive, pairs[0].positive, "done", "done")
    skipped: list[str] = []
    found = fitted(llama, [*pairs[1:], same], on_skip=lambda pair, _: skipped.append(pair.id))
    assert skipped == ["same"]
    assert (found.n_skipped, len(found.scores), len(found.pair_ids)) == (1, 20, 20)
    file = CheckpointFile(tmp_path / "out")
    with pytest.raises(UsageError, match="19 pairs: "):
        fitted(llama, [*pairs[2:], same], on_skip=lambda pair, _: None, checkpoint=file)
    assert list(tmp_path.iterdir()) == []


#
# what it refuses
#


def test_what_cannot_be_fitted(llama: SteeredLlama, shipped: ExpertMap) -> None:
    pairs = kinds_of_prompts(20)
    with pytest.raises(UsageError, match=r"19 pairs.*20"):
        fitted(llama, pairs[:19])
    with pytest.raises(UsageError, match="made of these pairs"):
        fitted(llama, pairs, dataclasses.replace(shipped, pairs_sha256=("0" * 64, pairs_digest(pairs))))
    with pytest.raises(UsageError, match="no effects"):
        fitted(llama, pairs, shipped, by="effect")
    with pytest.raises(UsageError, match="give a map that has them"):
        fitted(llama, pairs, by="effect")
    other = ExpertMap(identity(), "other", np.zeros(identity().shape))
    with pytest.raises(ModelMismatchError):
        fitted(llama, pairs, other)


@pytest.mark.parametrize(
    "fields",
    [
        {"by": "logit"},
        {"steer_when": "both"},
        {"n_folds": 2},
        {"n_folds": 11},
        {"draws": 18},
        {"over": 0},
        {"over": "p"},
    ],
)
def test_options_outside_their_ranges(fields: Any) -> None:
    with pytest.raises(UsageError, match=next(iter(fields))):
        ConditionOptions(**fields)


def test_a_map_that_says_nothing(llama: SteeredLlama, shipped: ExpertMap) -> None:
    """Scores of the last layer alone count nothing: no AUC, and no threshold."""
    rd = np.zeros(shipped.identity.shape)
    rd[-1] = 0.5
    found = fitted(llama, kinds_of_prompts(20), ExpertMap(shipped.identity, "last", rd))
    assert (found.auc, found.control, found.condition, found.when) == (None, None, None, None)
    assert not found.differs_from_shuffled
    assert "no AUC" in found.warnings[0]
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["thresholds"] == [None] * 5
