"""Tiny random models of many architectures: the patched llama.cpp against transformers, unsteered and steered.

The weights go through the converter of llama.cpp, the routers of transformers through the definition in hooks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.reference import convert, hooks
from tests.integration.reference.architectures import CASES, VOCAB, Case
from tests.integration.reference.architectures_table import DIFFERS, LEFT_OUT, REFERENCES, SMALL_DIFFERENCES
from tests.integration.reference.gguf_run import Runner
from tests.integration.reference.hf_olmoe import Steering

pytestmark = pytest.mark.reference

# Of the largest logit. transformers unhooked computes as the reference does, but GELU by another formula than the table
# in half precision of gemma4 (architectures_table.SMALL_DIFFERENCES): an F16 value is off by 2^-11 of itself.
ORIGINAL = 2.0**-11
# Not derived: what was seen, of the largest logit, where a step magnifies the error of its input. A state that goes
# from token to token carries the errors of all tokens before; Granite multiplies embeddings, scores and residuals; a
# GELU out of a table in half precision (gemma4) rounds near ties to neighbours.
CARRIED = {
    "qwen3next",
    "qwen3.5-moe",
    "jamba",
    "kimi-linear",
    "granite-hybrid",
    "granite-swa",
    "granitemoe-shared",
    "gemma4",
}
TOLERANCE = 1e-4
MARGIN = 1e-4  # of the scores that decide a choice; rounding moves them by about 1e-6
TOKENS = np.random.default_rng(5).integers(0, VOCAB, 20).tolist()
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="session")
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Case, Any, Path]]:
    """Case, transformers model and GGUF file by name. All that this session tests are converted at once."""
    names = {getattr(item, "callspec", None) and item.callspec.params.get("name") for item in request.session.items}
    folder = tmp_path_factory.mktemp("architectures")
    made = {name: convert.make_model(case) for name, case in BY_NAME.items() if name in names}
    for name, model in made.items():
        convert.save(BY_NAME[name], model, folder / name)
    convert.convert([(BY_NAME[name], folder / name, folder / f"{name}.gguf") for name in made])
    return lambda name: (BY_NAME[name], made[name], folder / f"{name}.gguf")


@pytest.fixture(scope="module")
def compared(name: str, models: Callable[[str], tuple[Case, Any, Path]]) -> Iterator[tuple[Case, Any, Runner]]:
    """The case, its model in transformers, and the same under llama.cpp."""
    case, model, path = models(name)
    runner = Runner(path)
    yield case, model, runner
    runner.close()


def kinds(case: Case) -> list[str]:
    """Ways to steer the case."""
    return ["hard", "hard-only-k-remain", *["hard-outside-groups"] * (case.routing.n_group > 1), "soft"]


each_case = pytest.mark.parametrize("name", list(BY_NAME), scope="module")


def steering_of(case: Case, kind: str, moe_layers: list[int], shape: tuple[int, int]) -> Steering:
    """Every MoE layer steered by random values."""
    rng = np.random.default_rng([case.seed, len(kind)])
    k, n_expert = case.routing.k, shape[1]
    values = np.zeros(shape, dtype=np.float32)
    for layer in moe_layers:
        order = rng.permutation(n_expert)
        if kind == "soft":
            values[layer] = rng.normal(size=n_expert)
        elif kind == "hard":
            n_plus = int(rng.integers(1, k + 1))
            values[layer, order[:n_plus]] = 1
            values[layer, order[n_plus : n_plus + 3]] = -1
        elif kind == "hard-only-k-remain":
            values[layer, order[k:]] = -1
        else:
            # one in each group, of which only some can be chosen
            first = np.arange(0, n_expert, n_expert // case.routing.n_group)
            values[layer, first + rng.integers(0, n_expert // case.routing.n_group, len(first))] = 1
    return Steering("soft" if kind == "soft" else "hard", values, 0.5 if kind == "hard-only-k-remain" else 0.01)


def relative(ours: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference, in terms of the largest logit."""
    return float(np.abs(ours - reference).max() / np.abs(reference).max())


def tolerance(case: Case, runner: Runner, logits: np.ndarray) -> float:
    """Of these logits computed twice in F32, in terms of the largest."""
    return TOLERANCE if case.name in CARRIED else runner.allowance(logits) / float(np.abs(logits).max())


def assert_same(case: Case, reference: hooks.Trace, runner: Runner) -> float:
    """Same logits, same best token, same experts of every token and layer; no selection depends on rounding."""
    ours = runner.logits(TOKENS)
    z, selected = runner.routing(TOKENS)
    assert sorted(z) == sorted(reference.layers)
    for layer, expected in reference.layers.items():
        error = float(np.abs(z[layer] - expected.z.numpy()).max())
        assert expected.margin > max(MARGIN, 20 * error), f"layer {layer}: choose another seed"
        assert np.array_equal(selected[layer], expected.selected.numpy()), f"layer {layer}"
    difference = relative(ours, reference.logits)
    assert difference <= tolerance(case, runner, reference.logits)
    assert np.array_equal(ours.argmax(axis=1), reference.logits.argmax(axis=1))
    return difference


@each_case
def test_unsteered(compared: tuple[Case, Any, Runner], name: str) -> None:
    case, model, runner = compared
    assert runner.architecture == case.arch
    runner.steer(None)
    difference = assert_same(case, hooks.run(case, model, TOKENS), runner)
    original = relative(runner.logits(TOKENS), hooks.run_original(model, TOKENS))
    print(f"{name}, unsteered: difference {difference:.1e}, from transformers unhooked {original:.1e}")
    if name in DIFFERS:
        assert original > 1e-2  # or the note is out of date
    else:
        assert original <= ORIGINAL


@pytest.mark.parametrize(
    ("name", "kind"), [(case.name, kind) for case in CASES for kind in kinds(case)], scope="module"
)
def test_steered(compared: tuple[Case, Any, Runner], name: str, kind: str) -> None:
    case, model, runner = compared
    unsteered = hooks.run(case, model, TOKENS)
    moe_layers = sorted(unsteered.layers)
    steering = steering_of(case, kind, moe_layers, runner.identity.shape)
    reference = hooks.run(case, model, TOKENS, steering)
    for layer, seen in reference.layers.items():
        signs = steering.values[layer]
        if steering.mode == "hard":
            chosen = seen.selected.numpy()
            assert all(set(np.nonzero(signs > 0)[0]) <= set(row) for row in chosen)
            assert not (signs[chosen] < 0).any()
    runner.steer({layer: steering.values[layer] for layer in moe_layers}, steering.mode, steering.epsilon)
    difference = assert_same(case, reference, runner)
    effect = relative(reference.logits, unsteered.logits)
    print(f"{name}, {kind}: difference {difference:.1e}, effect of steering {effect:.2f}")
    assert effect > 1e-2  # or nothing was compared


@pytest.mark.parametrize("name", ["olmoe", "deepseek-v3", "qwen3next"], scope="module")
@pytest.mark.parametrize("kind", ["unsteered", "hard"])
def test_one_token_at_a_time(compared: tuple[Case, Any, Runner], kind: str) -> None:
    case, model, runner = compared
    moe_layers = sorted(hooks.run(case, model, TOKENS).layers)
    steering = None if kind == "unsteered" else steering_of(case, kind, moe_layers, runner.identity.shape)
    reference = hooks.run(case, model, TOKENS, steering)
    if steering is None:
        runner.steer(None)
    else:
        runner.steer({layer: steering.values[layer] for layer in moe_layers}, steering.mode, steering.epsilon)
    found = runner.logits_one_by_one(TOKENS)
    assert relative(found, reference.logits) <= tolerance(case, runner, reference.logits)


def test_table() -> None:
    assert set(BY_NAME) >= CARRIED
    assert len(BY_NAME) == len(CASES)
    assert {*DIFFERS, *SMALL_DIFFERENCES} <= set(BY_NAME)
    assert not set(REFERENCES) & set(LEFT_OUT)


@pytest.mark.parametrize("name", ["phimoe"], scope="module")
def test_phimoe_differs_by_mixer_and_norm(compared: tuple[Case, Any, Runner]) -> None:
    """With the sparse mixer and LayerNorm put back into the reference it is transformers' own model again."""
    case, model, _ = compared
    case = replace(case, rms_norm=False)
    original = hooks.run_original(model, TOKENS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "route", lambda z, how, bias, signs: (*sparse_mixer(z, how.k), 1.0))
        assert relative(hooks.run(case, model, TOKENS).logits, original) <= 1e-6
    assert relative(hooks.run(case, model, TOKENS).logits, original) > 1e-2


def sparse_mixer(z: torch.Tensor, k: int, jitter: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """Phi-3.5-MoE as published: experts one after the other, each weighed among the logits near the best one left."""
    left, experts, weights = z.clone(), [], []
    for _ in range(k):
        best, index = left.max(dim=-1, keepdim=True)
        far = (best - z) / z.abs().clamp(min=best) > 2 * jitter
        near = left.masked_fill(far, -torch.inf).softmax(-1)
        experts.append(index)
        weights.append(near.gather(-1, index))
        left = left.scatter(-1, index, -torch.inf)
    return torch.cat(experts, -1), torch.cat(weights, -1)


@pytest.mark.parametrize("name", ["deepseek-v2"], scope="module")
def test_deepseek_v2_group_score_is_the_only_difference(compared: tuple[Case, Any, Runner]) -> None:
    """With groups scored by their best expert the reference is transformers' own model again."""
    case, model, _ = compared
    by_best = replace(case, routing=replace(case.routing, group_best=1))
    original = hooks.run_original(model, TOKENS)
    assert relative(hooks.run(by_best, model, TOKENS).logits, original) <= 1e-6
    assert relative(hooks.run(case, model, TOKENS).logits, original) > 1e-2


@pytest.mark.parametrize("name", ["gpt-oss"], scope="module")
def test_gpt_oss_yarn_range_is_rounded(compared: tuple[Case, Any, Runner]) -> None:
    """llama.cpp rounds the bounds of YaRN's range of dimensions; gpt-oss is published with truncate = false.

    The converter writes nothing of it, so the same file stands for both. No matter of routing.
    """
    case, _, runner = compared
    rope = case.config["rope_parameters"] | {"truncate": False}
    published = convert.make_model(replace(case, config=case.config | {"rope_parameters": rope}))
    runner.steer(None)
    ours, reference = runner.logits(TOKENS), hooks.run_original(published, TOKENS)
    # the first position is not rotated
    assert relative(ours[:1], reference[:1]) <= tolerance(case, runner, reference[:1])
    assert relative(ours, reference) > 10 * tolerance(case, runner, reference)
