"""`TraceReader`: every token's experts, weights and logits are the router's, whatever shares a decode."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import BiasFile, ModelMismatchError, Pair, UsageError, record_counts
from steermoe_local.detection.decoding import ContextOptions
from steermoe_local.detection.tracing import TracedText, TraceReader, phases_of, prompt_rules
from steermoe_local.llama.reasoning_styles import reasoning_style
from steermoe_local.llama.rendering import Renderer
from steermoe_local.steering.plan_rules import PHASES
from tests.support import oracle, rounding
from tests.support.detecting import CACHE
from tests.support.low_level import F32, Context, identity_of, open_model, random_signs
from tests.support.near_ties import near_ties_of_prompts
from tests.support.random_models import DENSE_FIRST, N_EMBD, N_VOCAB, OLMOE
from tests.support.traces import plan, text

GATING = {"olmoe": ("softmax", False), "qwen3moe": ("softmax", True), "gpt-oss": ("softmax-weight", False)}
U = rounding.F32


def options(**changes: Any) -> ContextOptions:
    return ContextOptions(**{"n_threads": 1, **CACHE, **changes})


def tokens_of(n: int, seed: int = 1) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, N_VOCAB, n)]


def signs(path: Path, seed: int) -> BiasFile:
    identity, rng = identity_of(path), np.random.default_rng(seed)
    k, n = identity.n_expert_used, identity.n_expert
    return BiasFile.from_signs(
        np.stack([random_signs(rng, n, k, 1, n // 3) for _ in range(identity.n_layer)]), identity
    )


def read(
    model: Any, texts: list[TracedText], bias: Any = None, context: ContextOptions | None = None, **fields: Any
) -> dict[int, tuple[Any, Any, Any]]:
    """Whole texts by their item: experts, weights, logits."""
    parts: dict[int, list[Any]] = {}
    with TraceReader(model, bias, context or options(), logits=True, **fields) as reader:
        for part in reader.read(texts):
            mine = parts.setdefault(part.text.item, [])
            assert part.first == sum(len(other) for other in mine), "in the order of the text"
            mine.append(part)
    assert list(parts) == [each.item for each in texts]
    return {
        item: tuple(np.concatenate([getattr(part, name) for part in some]) for name in ("experts", "weights", "logits"))
        for item, some in parts.items()
    }


@pytest.mark.numeric
def test_the_oracle_agrees(steerable: Any) -> None:
    """Logits are those of the graph; experts and weights follow from them under each token's steering."""
    description, path, model = steerable
    biases = [signs(path, 1), signs(path, 2)]
    soft = BiasFile.from_soft(np.random.default_rng(3).normal(size=biases[0].identity.shape), biases[0].identity)
    steering = plan(("all", biases[0]), ("answer", None), ("answer", soft))
    tokens = tokens_of(24)
    rules = [(0, -1, 2)[index % 3] for index in range(24)]
    rules[0] = -1
    experts, weights, logits = read(model, [text(tokens, rules)], steering)[0]
    gating, norm = GATING[description.arch]
    with Context(model, capture=True, n_seq_max=1, type_kv=F32) as context:
        context.decode(tokens)
        name = "ffn_moe_probs" if description.arch == "gpt-oss" else "ffn_moe_logits"  # what top-k sees is named last
        plain = context.seen[f"{name}-0"][0].reshape(24, -1)
    assert np.abs(logits[:, 0] - plain).max() <= rounding.logits(plain, 1, N_EMBD)
    for layer in range(description.n_layer):
        z = logits[:, layer]
        edited = z.copy()
        for rule, mode, bias in ((0, "hard", biases[0]), (2, "soft", soft)):
            mine = [index for index in range(24) if rules[index] == rule]
            edited[mine] = oracle.steer(z[mine], mode, bias.values[layer], bias.epsilon)
        chosen = oracle.chosen(edited, description.k)
        assert np.array_equal(experts[:, layer], chosen)
        expected = oracle.weights(edited, chosen, gating, norm)
        allowed = oracle.weight_allowance(edited, chosen, gating.replace("-", "_"), norm)
        assert (np.abs(weights[:, layer] - expected) <= allowed).all()
        total = weights[:, layer].astype(np.float64).sum(axis=1)
        if norm or gating == "softmax-weight":
            assert np.abs(total - 1).max() <= 4 * description.k * U
        else:
            assert (total < 1).all()


def test_forced_experts_at_the_steered_tokens_alone(random_model: Any) -> None:
    path = random_model(OLMOE)
    bias = signs(path, 4)
    tokens = tokens_of(40, 2)
    steered = np.arange(40) % 4 == 3
    with closing(open_model(path)) as model:
        plain, _, _ = read(model, [text(tokens)])[0]
        found, _, _ = read(model, [text(tokens, np.where(steered, 1, -1))], plan(("prompt", None), ("all", bias)))[0]
    assert np.array_equal(found[:3], plain[:3]), "nothing is steered up to the first steered token"
    forced = np.array([np.flatnonzero(bias.values[layer] > 0)[0] for layer in range(OLMOE.n_layer)])
    has = (found == forced[None, :, None]).any(axis=2)
    assert has[steered].all()
    assert (found[steered][:, :, 0] == forced).all(), "a forced expert is the first"
    assert not has[~steered].all(), "the experts are not these tokens' own, so that the test says something"
    for layer, row in bias.values.items():
        off = np.flatnonzero(row < 0)
        assert not np.isin(found[steered][:, layer], off).any()
        assert np.isin(plain[:, layer], off).any()


@pytest.mark.parametrize("share", [True, False])
def test_texts_that_share_a_decode(random_model: Any, share: bool) -> None:
    """Short and long ones, some of which begin alike: each is traced as alone, however small the batches."""
    path = random_model(OLMOE)
    begin = tokens_of(9)
    longer = [*begin, *tokens_of(30, 6)]
    texts = [begin, [*begin, 1, 2], [*begin[:4], 5], tokens_of(3, 5), longer, begin]
    assert not near_ties_of_prompts(path, texts, N_EMBD), "rounding decides about experts, and the test says nothing"
    with closing(open_model(path)) as model:
        alone = [read(model, [text(tokens)])[0] for tokens in texts]
        for n_batch in (16, 512):
            together = read(
                model,
                [text(tokens, item=item) for item, tokens in enumerate(texts)],
                context=options(n_batch=n_batch, n_ubatch=8),
                share_prefixes=share,
            )
            for item, (experts, _, logits) in enumerate(alone):
                bound = np.array([rounding.logits(logits[:, layer], layer + 1, N_EMBD) for layer in range(4)])
                assert (np.abs(together[item][2] - logits) <= bound[None, :, None]).all(), (n_batch, item)
                assert np.array_equal(together[item][0], experts)


def test_a_uniform_bias_is_the_plan_for_all_tokens(random_model: Any) -> None:
    """With texts that share their beginning, which a plan does not let them."""
    path = random_model(OLMOE)
    bias = signs(path, 8)
    texts = [text([*tokens_of(9), n], np.zeros(10), item=n) for n in range(3)]
    with closing(open_model(path)) as model:
        uniform = read(model, texts, bias)
        planned = read(model, texts, plan(("all", bias)))
    for item in uniform:
        assert np.array_equal(uniform[item][0], planned[item][0])


def test_layers_without_a_router(random_model: Any) -> None:
    with closing(open_model(random_model(DENSE_FIRST))) as model:
        experts, weights, logits = read(model, [text(tokens_of(5))])[0]
    assert (experts[:, 0] == -1).all()
    assert (weights[:, 0] == 0).all()
    assert np.isnan(logits[:, 0]).all()
    assert (experts[:, 1:] >= 0).all()
    assert np.isfinite(logits[:, 1:]).all()


def test_counts_are_those_of_detect(untied_pairs: list[Pair], tiny_f32_path: Path) -> None:
    """On every pair of which rounding decides nothing: the same counts, however either batches them."""
    counts = record_counts(tiny_f32_path, untied_pairs, n_threads=1, **CACHE)
    with closing(open_model(tiny_f32_path)) as model:
        renderer = Renderer(model)
        texts = []
        for pair in untied_pairs:
            for side in pair.sides():
                prompt = renderer.prompt(*side)
                texts.append(text(prompt.tokens, item=len(texts), target=prompt.target))
        for context in (options(), options(n_batch=64, n_ubatch=16)):
            a, n = np.zeros((2, *counts.a1.shape), np.int64), [0, 0]
            with TraceReader(model, None, context) as reader:
                for part in reader.read(texts):
                    side = part.text.item % 2
                    experts = part.experts[part.text.is_target(part.part)]
                    n[side] += len(experts)
                    for layer in range(experts.shape[1]):
                        np.add.at(a[side, layer], experts[:, layer].ravel(), 1)
            assert n == [counts.n1, counts.n2]
            assert np.array_equal(a, [counts.a1, counts.a2])


def test_errors(random_model: Any, tiny_path: Path) -> None:
    path = random_model(OLMOE)
    with closing(open_model(path)) as model:
        with TraceReader(model) as reader, pytest.raises(UsageError, match="no tokens"):
            list(reader.read([text([])]))
        with TraceReader(model, signs(tiny_path, 1)) as reader, pytest.raises(ModelMismatchError):
            list(reader.read([text([1], [0])]))


def test_rules_and_phases(random_model: Any) -> None:
    bias = signs(random_model(OLMOE), 1)
    pieces = {1: b"<think>", 2: b"so", 3: b"</think>", 4: b"yes", 5: "é".encode()[:1], 6: "é".encode()[1:]}
    style = reasoning_style("<think> </think>")
    phases = phases_of(2, [1, 2, 3, 4, 5, 6], style, pieces.__getitem__)
    assert [PHASES[phase] for phase in phases] == ["prompt"] * 2 + ["thinking"] * 3 + ["answer"] * 3
    assert set(phases_of(0, [1, 2, 3], None, pieces.__getitem__)) == {PHASES.index("answer")}
    windows = plan(("prompt[0:1]", None), ("prompt[-1:]", bias), ("answer", bias))
    for answered, expected in ((True, [-1, -1, 1, 2]), (False, [-1, -1, -1, 1])):
        found = [
            prompt_rules(each, [4] * 4, None, pieces.__getitem__, answered=answered) for each in (None, bias, windows)
        ]
        assert [rules.tolist() for rules in found] == [[-1] * 4, [0] * 4, expected]
