"""Steering per sequence: the result of each token of a batch depends only on its own sequence's steering."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from steermoe_local.errors import ModelError, ModelMismatchError, NativeError
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.steering.bias_file import BiasFile, write_bias
from tests.native.test_native_oracle import layer_values, weight_rows
from tests.support import oracle, rounding
from tests.support.low_level import F32, Context, Row, identity_of, lib, native_bias, open_model, random_signs
from tests.support.random_models import DENSE_FIRST, N_EMBD, N_VOCAB, OLMOE, RandomModel

pytestmark = pytest.mark.numeric

Loaded = tuple[ModelIdentity, Any]
ARGUMENT = 5  # steermoe.h: STEERMOE_ERR_ARGUMENT


@dataclass(frozen=True)
class Steering:
    """What a sequence is under: rows by layer; no rows: unsteered."""

    rows: dict[int, Any] = field(default_factory=dict)
    mode: str = "hard"
    epsilon: float = 0.01

    def native(self, identity: ModelIdentity) -> capi.NativeBias:
        return native_bias(identity, self.rows, self.mode, self.epsilon)

    def logits(self, z: Any, layer: int) -> Any:
        """The oracle's edit of one layer's logits."""
        row = self.rows.get(layer)
        return z if row is None else oracle.steer(z, self.mode, row, self.epsilon)


NONE = Steering()


def allowance(logits: Any) -> float:
    """Of the logits of OLMOE with a cache in F32."""
    return rounding.logits(logits, OLMOE.n_layer, N_EMBD)


def steerings(identity: ModelIdentity, seed: int = 1) -> list[Steering]:
    """Hard rules of different layers and epsilon, soft ones, and none."""
    rng = np.random.default_rng(seed)
    n, k, layers = identity.n_expert, identity.n_expert_used, range(identity.n_layer)

    def signs(n_plus: int, n_minus: int) -> Any:
        return random_signs(rng, n, k, n_plus, n_minus)

    return [
        Steering({layer: signs(1, n // 2) for layer in layers}),
        Steering({layer: rng.normal(scale=2, size=n).astype(np.float32) for layer in layers}, "soft"),
        NONE,
        Steering({identity.n_layer - 1: signs(k, n - k)}, epsilon=2.5),
        Steering({0: signs(0, n - k), 1: signs(1, 0)}, epsilon=20.0),
        Steering({1: np.linspace(-30, 30, n, dtype=np.float32)}, "soft"),
        Steering({layer: signs(k, 0) for layer in layers}, epsilon=1e-3),
    ]


def attach(context: Context, identity: ModelIdentity, given: Sequence[Steering | None]) -> None:
    """Steer sequence s by given[s]; None: leave it to the context."""
    for sequence, steering in enumerate(given):
        if steering is not None:
            capi.attach_sequence(context.ctx, sequence, steering.native(identity) if steering.rows else None)


def tokens(sequence: int, n: int) -> list[int]:
    rng = np.random.default_rng(100 + sequence)
    return [int(token) for token in rng.integers(0, N_VOCAB, n)]


def turns(n_sequences: int, first: int, last: int) -> list[Row]:
    """Positions first..last of all sequences, taking turns; every token is an output."""
    ids = [tokens(s, last) for s in range(n_sequences)]
    return [(ids[s][i], i, s, True) for i in range(first, last) for s in range(n_sequences)]


@pytest.fixture(scope="module")
def olmoe(random_model: Any) -> Iterator[Loaded]:
    path = random_model(OLMOE)
    model = open_model(path)
    yield identity_of(path), model
    model.close()


def test_mixed_batches_against_the_oracle(steerable: tuple[RandomModel, Path, Any]) -> None:
    """Prompts that take turns, split into ubatches, then single tokens: every edited logit, choice and weight."""
    model, path, loaded = steerable
    identity = identity_of(path)
    context_wide = Steering({0: np.eye(model.n_expert, dtype=np.float32)[2] * 4}, "soft")
    given: list[Steering | None] = [*steerings(identity), None]
    under = [context_wide if s is None else s for s in given]
    with Context(loaded, capture=True, n_ubatch=12) as context:
        capi.attach(context.ctx, context_wide.native(identity))
        attach(context, identity, given)
        batches = [turns(len(given), 0, 6), *(turns(len(given), i, i + 1) for i in range(6, 9))]
        for batch in batches:
            context.decode_rows(batch)
        of_rows = np.array([row[2] for batch in batches for row in batch])
        for layer in range(model.n_layer):
            check_layer(model, context.seen, layer, under, of_rows)


def check_layer(
    model: RandomModel, seen: dict[str, list[Any]], layer: int, under: Sequence[Steering], of_rows: Any
) -> None:
    steered_here = any(layer in s.rows for s in under)
    gpt_oss = model.arch == "gpt-oss"
    raw, steered = "ffn_moe_logits", "ffn_moe_logits_steered"
    if gpt_oss:
        raw, steered = "ffn_moe_logits_biased" if steered_here else "ffn_moe_probs", "ffn_moe_probs"
    else:
        assert (f"{steered}-{layer}" in seen) == steered_here
    z = layer_values(seen, raw, layer)
    expected = z.copy()
    for sequence, steering in enumerate(under):
        mine = of_rows == sequence
        expected[mine] = steering.logits(z[mine], layer)
    if steered_here:
        edited = layer_values(seen, steered, layer)
        assert (edited + np.float32(0)).tobytes() == (expected + np.float32(0)).tobytes(), f"layer {layer}"
        untouched = expected == z
        assert edited[untouched].tobytes() == z[untouched].tobytes(), f"layer {layer}: untouched logits changed"
    topk = layer_values(seen, "ffn_moe_topk", layer)
    wanted = oracle.chosen(expected, model.k)
    assert np.array_equal(np.sort(topk, axis=1), np.sort(wanted, axis=1)), f"layer {layer}: another choice"
    gating = "softmax-weight" if gpt_oss else "softmax"
    last = "ffn_moe_weights_softmax" if gpt_oss else "ffn_moe_weights_norm" if model.norm else "ffn_moe_weights"
    weights = weight_rows(seen, last, layer, model.k)
    np.testing.assert_array_less(
        np.abs(weights - oracle.weights(expected, topk, gating, model.norm)),
        oracle.weight_allowance(expected, topk, gating.replace("-", "_"), model.norm),
    )


def test_infinite_logits_of_unsteered_tokens_stay(random_model: Any, tmp_path: Path) -> None:
    """A router that overflows: what a neighbour's steering computes does not spread into an unsteered token."""
    path = tmp_path / "model.gguf"
    shutil.copy(random_model(OLMOE), path)
    for tensor in GGUFReader(path, "r+").tensors:
        if tensor.name == "blk.1.ffn_gate_inp.weight":
            tensor.data[::3] *= 1e38 / np.abs(tensor.data[::3]).max()
            tensor.data[::3] *= 3
    loaded = open_model(path)
    identity = identity_of(path)
    hard, soft = steerings(identity)[0], steerings(identity)[1]
    for under in ([NONE, hard], [NONE, hard, soft]):
        with Context(loaded, capture=True) as context:
            attach(context, identity, under)
            batch = turns(len(under), 0, 8)
            context.decode_rows(batch)
            mine = np.array([row[2] for row in batch]) == 0
            z = layer_values(context.seen, "ffn_moe_logits", 1)[mine]
            assert {np.inf, -np.inf} <= set(z.ravel().tolist())
            assert layer_values(context.seen, "ffn_moe_logits_steered", 1)[mine].tobytes() == z.tobytes()
    with Context(loaded, capture=True) as context:
        attach(context, identity, [hard])
        context.decode_rows(turns(1, 0, 8))
        z, edited = (layer_values(context.seen, f"ffn_moe_logits{end}", 1) for end in ("", "_steered"))
        untouched = hard.rows[1] == 0
        assert not np.isfinite(z[:, untouched]).all()
        assert edited[:, untouched].tobytes() == z[:, untouched].tobytes(), "the edit changes other logits of its token"
    loaded.close()


def test_batches_of_one_shape_agree_bit_for_bit(olmoe: Loaded) -> None:
    """A sequence's logits among others of other steering are those it has when all are under its own."""
    identity, model = olmoe
    under = steerings(identity)

    def run(given: Sequence[Steering]) -> Any:
        with Context(model) as context:
            attach(context, identity, given)
            parts = [context.decode_rows(turns(len(given), 0, 8))]
            parts += [context.decode_rows(turns(len(given), i, i + 1)) for i in range(8, 12)]
        return np.concatenate(parts).reshape(12, len(given), -1)

    mixed = run(under)
    for sequence, steering in enumerate(under):
        alike = run([steering] * len(under))
        assert mixed[:, sequence].tobytes() == alike[:, sequence].tobytes(), f"sequence {sequence}"
        assert sequence == 0 or not np.array_equal(mixed[:, 0], alike[:, 0])


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("outputs", ["all", "last"])
def test_sequences_agree_with_each_alone(olmoe: Loaded, kv_unified: bool, outputs: str) -> None:
    """Prompts of different lengths; where not all tokens are outputs, the last layer routes the outputs alone."""
    identity, model = olmoe
    under = steerings(identity)
    lengths = [9, 4, 12, 7, 1, 10, 6]

    def prompt(sequence: int) -> list[Row]:
        n = lengths[sequence]
        return [(t, i, sequence, outputs == "all" or i == n - 1) for i, t in enumerate(tokens(sequence, n))]

    def single(sequence: int, step: int) -> Row:
        return (step + sequence, lengths[sequence] + step, sequence, True)

    with Context(model, kv_unified=kv_unified, n_ctx=4096, type_kv=F32) as context:
        attach(context, identity, under)
        batch = [row for sequence in range(len(under)) for row in prompt(sequence)]
        asked = [row for row in batch if row[3]]
        found = [(row[2], logits) for row, logits in zip(asked, context.decode_rows(batch), strict=True)]
        for step in range(3):
            batch = [single(sequence, step) for sequence in range(len(under))]
            found += [(row[2], logits) for row, logits in zip(batch, context.decode_rows(batch), strict=True)]
    for sequence, steering in enumerate(under):
        with Context(model, type_kv=F32) as context:
            if steering.rows:
                capi.attach(context.ctx, steering.native(identity))
            alone = [context.decode_rows([(t, p, 0, o) for t, p, _, o in prompt(sequence)])]
            for step in range(3):
                token, position, _, _ = single(sequence, step)
                alone.append(context.decode([token], position))
        mine = np.array([logits for s, logits in found if s == sequence])
        wanted = np.concatenate(alone)
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=allowance(wanted), err_msg=f"sequence {sequence}")


def test_greedy_text_of_the_embedded_model(tiny_path: Path, tiny_model: Any) -> None:
    """Four prompts at once, each under two steerings: the same text and the same choice of experts as each alone."""
    identity = identity_of(tiny_path)
    under = [steerings(identity)[i] for i in (0, 1, 2, 3, 1, 2, 0, 0)]
    prompts = ["The red fox", "Question: what is", "1, 2, 3,", "one, two,"] * 2
    ids = [tiny_model.tokenize(text.encode(), True, True) for text in prompts]
    n_new = 12

    def greedy(given: Sequence[Steering], prompts: Sequence[list[int]]) -> tuple[list[list[int]], list[Any]]:
        texts: list[list[int]] = [[] for _ in prompts]
        with Context(tiny_model, capture=True) as context:
            attach(context, identity, given)
            batch = [(t, i, s, i == len(p) - 1) for s, p in enumerate(prompts) for i, t in enumerate(p)]
            context.decode_rows(batch)
            logits = np.array(
                [
                    np.ctypeslib.as_array(lib().llama_get_logits_ith(context.ctx, i), (tiny_model.n_vocab(),)).copy()
                    for i, row in enumerate(batch)
                    if row[3]
                ]
            )
            context.seen.clear()
            for step in range(n_new):
                for s, row in enumerate(logits):
                    texts[s].append(int(row.argmax()))
                batch = [(texts[s][-1], len(p) + step, s, True) for s, p in enumerate(prompts)]
                logits = context.decode_rows(batch)
            chosen = [np.stack(context.seen[f"ffn_moe_topk-{layer}"]) for layer in range(identity.n_layer)]
        return texts, chosen

    texts, chosen = greedy(under, ids)
    assert [texts[s] != texts[s + 4] for s in range(4)] == [True] * 4, "steering does not show"
    for s, steering in enumerate(under):
        (alone,), selected = greedy([steering], [ids[s]])
        assert texts[s] == alone, f"sequence {s}"
        for layer in range(identity.n_layer):
            mine = chosen[layer].reshape(n_new, len(under), -1)[:, s]
            theirs = selected[layer].reshape(n_new, -1)
            assert np.array_equal(np.sort(mine, axis=1), np.sort(theirs, axis=1)), f"sequence {s}, layer {layer}"


def test_equal_steering_has_the_graph_of_the_context(olmoe: Loaded) -> None:
    """Sixteen sequences with equal biases, each created separately: the graph and the bits of a steered context."""
    identity, model = olmoe
    one, soft = steerings(identity)[:2]
    batch = turns(16, 0, 2)
    name = "ffn_moe_logits_steered-0"
    with Context(model, capture=True, n_seq_max=16) as context:
        capi.attach(context.ctx, one.native(identity))
        plain = context.decode_rows(batch)
        plain_ops = context.ops[name]
    with Context(model, capture=True, n_seq_max=16) as context:
        attach(context, identity, [one] * 16)
        assert context.decode_rows(batch).tobytes() == plain.tobytes()
        assert context.ops[name] == plain_ops
        capi.attach_sequence(context.ctx, 3, soft.native(identity))
        context.clear()
        context.decode_rows(batch)
        assert context.ops[name][-1] == plain_ops[0], "the soft rule needs no nodes that the hard rule does not have"
        attach(context, identity, [None] * 3 + [one])
        context.clear()
        assert context.decode_rows(batch).tobytes() == plain.tobytes()
        assert context.ops[name][-1] == plain_ops[0]
        # all unsteered: nothing is edited
        context.seen.clear()
        attach(context, identity, [NONE] * 16)
        context.clear()
        unsteered = context.decode_rows(batch)
        assert name not in context.seen
    with Context(model, n_seq_max=16) as context:
        assert context.decode_rows(batch).tobytes() == unsteered.tobytes()


def test_changes_between_decodes(olmoe: Loaded) -> None:
    """In any order of changes, a batch computes what it computes in a context that was made for it."""
    identity, model = olmoe
    pool: list[Steering | None] = [*steerings(identity), *steerings(identity, seed=2), None]
    own_pool = [steerings(identity)[1], steerings(identity, 3)[0], NONE]
    rng = np.random.default_rng(17)
    given: list[Steering | None] = [None] * 4
    own = NONE
    batch = turns(4, 0, 3)
    seen = set()
    with Context(model) as context:
        for step in range(40):
            s = int(rng.integers(0, 4))
            choice = int(rng.integers(0, len(pool)))
            given[s] = pool[choice]
            if given[s] is None:
                capi.detach_sequence(context.ctx, s)
            else:
                attach(context, identity, [None] * s + [given[s]])
            if step % 5 == 4:
                own = own_pool[int(rng.integers(0, 3))]
                capi.attach(context.ctx, own.native(identity))  # without values: those without their own run plain
            if step == 27:
                capi.detach(context.ctx)
                given, own = [None] * 4, NONE
            context.clear()
            found = context.decode_rows(batch)
            with Context(model) as fresh:
                if own.rows:
                    capi.attach(fresh.ctx, own.native(identity))
                attach(fresh, identity, given)
                assert fresh.decode_rows(batch).tobytes() == found.tobytes(), f"step {step}"
            seen.add(found.tobytes())
    assert len(seen) > 20


def n_reused(context: Context) -> int:
    return int(lib().llama_perf_context(context.ctx).n_reused)


def test_new_values_keep_the_graph(olmoe: Loaded) -> None:
    """A change of one sequence's values between single tokens: the next graph is the last one again."""
    identity, model = olmoe
    variants = [steerings(identity, seed) for seed in range(6)]
    with Context(model) as context:
        attach(context, identity, [variants[0][0], variants[0][1], NONE])
        for position in range(3):
            context.decode_rows(turns(3, position, position + 1))
        before = n_reused(context)
        for step in range(1, 6):
            attach(context, identity, [variants[step][0], variants[step][1]])
            context.decode_rows(turns(3, 2 + step, 3 + step))
        assert n_reused(context) - before == 5
        # the fifth steering is one more than the bank holds: one new graph, then the same again
        attach(context, identity, [None] * 3 + [variants[0][0], variants[1][0], variants[2][0]])
        for position in range(8, 11):
            context.decode_rows(turns(3, position, position + 1))
        assert n_reused(context) - before == 5 + 2


def test_new_values_of_one_sequence_alone_keep_the_graph(olmoe: Loaded) -> None:
    identity, model = olmoe
    with Context(model) as context:
        attach(context, identity, [NONE, steerings(identity, 0)[0]])
        for position in range(3):
            context.decode_rows([(5, position, 1, True)])
        before = n_reused(context)
        for step in range(1, 6):
            attach(context, identity, [None, steerings(identity, step)[0]])
            context.decode_rows([(5, 2 + step, 1, True)])
        assert n_reused(context) - before == 5


def test_sequences_of_the_same_rules_share_a_graph(olmoe: Loaded) -> None:
    """Single tokens of sequences with other values and epsilons: only other rules in a layer build a new graph."""
    identity, model = olmoe
    rng = np.random.default_rng(29)
    under = [Steering({0: random_signs(rng, 16, 4, 1, 5)}, epsilon=1 + s / 4) for s in range(3)]
    under += [Steering({0: np.ones(16, np.float32)}, "soft"), Steering({0: under[0].rows[0], 1: under[0].rows[0]})]
    with Context(model) as context:
        attach(context, identity, under)
        context.decode_rows([(5, 0, 0, True)])
        for sequence, reused in enumerate((1, 1, 1, 0, 0)):
            before = n_reused(context)
            context.decode_rows([(6, 1 if sequence == 0 else 0, sequence, True)])
            assert n_reused(context) - before == reused, f"sequence {sequence}"


def test_equal_rows_of_different_epsilon(olmoe: Loaded) -> None:
    identity, model = olmoe
    near = steerings(identity)[0]
    far = Steering(near.rows, epsilon=5.0)
    with Context(model) as context:
        attach(context, identity, [near, far, near])
        mixed = context.decode_rows(turns(3, 0, 4)).reshape(4, 3, -1)
    for sequence, steering in enumerate((near, far, near)):
        with Context(model) as context:
            attach(context, identity, [steering] * 3)
            alike = context.decode_rows(turns(3, 0, 4)).reshape(4, 3, -1)
        assert alike[:, sequence].tobytes() == mixed[:, sequence].tobytes()
        assert not np.array_equal(alike[:, 1 - sequence % 2], mixed[:, 1 - sequence % 2])


def test_a_change_leaves_those_of_equal_steering(olmoe: Loaded) -> None:
    """Equal steering is kept once; a change of one of its sequences must not change it for the others."""
    identity, model = olmoe
    one, other = steerings(identity, 1)[0], steerings(identity, 2)[0]
    batch = turns(4, 0, 3)
    for first in ([one, one, one], [None, one, None]):  # shared among sequences, and with the context
        with Context(model) as context:
            capi.attach(context.ctx, one.native(identity))
            attach(context, identity, first)
            context.decode_rows(batch)
            attach(context, identity, [None, other])
            context.clear()
            found = context.decode_rows(batch)
            capi.attach(context.ctx, other.native(identity))
            context.clear()
            after = context.decode_rows(batch)
        with Context(model) as context:
            attach(context, identity, [one, other, one, one])
            assert context.decode_rows(batch).tobytes() == found.tobytes()
            attach(context, identity, [s or other for s in first] + [other])
            attach(context, identity, [None, other])
            context.clear()
            assert context.decode_rows(batch).tobytes() == after.tobytes()


def test_sequences_come_and_go(olmoe: Loaded) -> None:
    """One sequence is emptied and takes another request under another steering; its neighbour does not notice."""
    identity, model = olmoe
    first, second, third = steerings(identity)[0], steerings(identity)[1], steerings(identity)[4]

    def stay(position: int) -> Row:
        return (tokens(0, 20)[position], position, 0, True)

    with Context(model, type_kv=F32) as context:
        attach(context, identity, [first, second])
        found = []
        for position in range(12):
            if position in (4, 9):
                context.remove(1)
                attach(context, identity, [None, third if position == 4 else NONE])
            other = position - (0 if position < 4 else 4 if position < 9 else 9)
            found.append(context.decode_rows([stay(position), (tokens(1, 20)[other], other, 1, True)]))
    with Context(model, type_kv=F32) as context:
        capi.attach(context.ctx, first.native(identity))
        alone = np.concatenate([context.decode([stay(p)[0]], p) for p in range(12)])
    np.testing.assert_allclose(np.array(found)[:, 0], alone, rtol=0, atol=allowance(alone))
    for start, end, steering in ((0, 4, second), (4, 9, third), (9, 12, NONE)):
        with Context(model, type_kv=F32) as context:
            attach(context, identity, [steering])
            alone = np.concatenate([context.decode([tokens(1, 20)[i]], i) for i in range(end - start)])
        np.testing.assert_allclose(np.array(found)[start:end, 1], alone, rtol=0, atol=allowance(alone))


def test_as_many_sequences_as_there_may_be(olmoe: Loaded) -> None:
    identity, model = olmoe
    rng = np.random.default_rng(23)
    under = [
        Steering({s % 4: random_signs(rng, 16, 4, 1, 5)}, epsilon=0.01 + s / 16) if s % 3 else NONE for s in range(256)
    ]
    with Context(model, capture=True, n_seq_max=256, n_ctx=1024) as context:
        attach(context, identity, under)
        batch = turns(256, 0, 2)
        context.decode_rows(batch)
        of_rows = np.array([row[2] for row in batch])
        for layer in range(OLMOE.n_layer):
            check_layer(OLMOE, context.seen, layer, under, of_rows)
        for sequence in range(256):
            capi.detach_sequence(context.ctx, sequence)
        context.clear()
        found = context.decode_rows(batch)
    with Context(model, n_seq_max=256, n_ctx=1024) as context:
        assert context.decode_rows(batch).tobytes() == found.tobytes()


def test_detach_ends_all(olmoe: Loaded) -> None:
    identity, model = olmoe
    batch = turns(3, 0, 4)
    with Context(model) as context:
        plain = context.decode_rows(batch)
        capi.attach(context.ctx, steerings(identity)[1].native(identity))
        attach(context, identity, steerings(identity)[:3])
        context.clear()
        assert not np.array_equal(context.decode_rows(batch), plain)
        assert all(capi.layer_info(context.ctx, layer).steered for layer in range(4))
        capi.detach(context.ctx)
        assert not any(capi.layer_info(context.ctx, layer).steered for layer in range(4))
        context.clear()
        assert context.decode_rows(batch).tobytes() == plain.tobytes()


def test_layer_info_tells_of_any_sequence(olmoe: Loaded) -> None:
    identity, model = olmoe
    with Context(model) as context:
        attach(context, identity, [Steering({2: np.eye(16)[1]}), NONE, Steering({0: np.eye(16)[1]}, "soft")])
        assert [capi.layer_info(context.ctx, layer).steered for layer in range(4)] == [True, False, True, False]
        attach(context, identity, [NONE])
        assert [capi.layer_info(context.ctx, layer).steered for layer in range(4)] == [True, False, False, False]


def decode_shared(context: Context, sequences: Sequence[int], position: int) -> int:
    """llama_decode of a token of the first sequence and one that belongs to all of them."""
    batch = lib().llama_batch_init(2, 0, len(sequences))
    try:
        batch.n_tokens = 2
        for i, mine in enumerate((sequences, sequences[:1])):
            batch.token[i], batch.pos[i], batch.logits[i] = 5, position + i, True
            batch.n_seq_id[i] = len(mine)
            for place, sequence in enumerate(mine):
                batch.seq_id[i][place] = sequence
        return int(lib().llama_decode(context.ctx, batch))
    finally:
        lib().llama_batch_free(batch)


def test_a_token_of_two_steerings_is_refused(olmoe: Loaded) -> None:
    identity, model = olmoe
    one, other = steerings(identity)[0], steerings(identity)[1]
    memory_of = lib().llama_get_memory
    with Context(model) as context:
        attach(context, identity, [one, other, one])
        before = context.decode_rows(turns(3, 0, 4))
        for sequences, named in (([1, 0], "0 and 1"), ([0, 2, 1], "[01] and [12]")):
            assert decode_shared(context, sequences, 4) == -1
            assert re.fullmatch(
                f"steering: token 0 of the batch belongs to the sequences {named}, which are steered differently; "
                "give each a token of its own",
                capi._lib().steermoe_last_error().decode(),
            )
        # nothing has changed
        assert [lib().llama_memory_seq_pos_max(memory_of(context.ctx), s) for s in range(3)] == [3, 3, 3]
        after = context.decode_rows(turns(3, 4, 5))
    with Context(model) as context:
        attach(context, identity, [one, other, one])
        assert context.decode_rows(turns(3, 0, 4)).tobytes() == before.tobytes()
        assert context.decode_rows(turns(3, 4, 5)).tobytes() == after.tobytes()
        # those of one steering may share
        for sequences, status in (([0, 2], 0), ([3, 4], 0), ([2, 3], -1), ([3, 1], -1), ([0, 2, 3], -1)):
            context.clear()
            assert decode_shared(context, sequences, 0) == status, sequences


def test_the_reason_of_a_refused_batch(olmoe: Loaded) -> None:
    _, model = olmoe
    with Context(model, n_seq_max=2, kv_unified=False) as context:
        batch = lib().llama_batch_init(1, 0, 1)
        with pytest.raises(NativeError, match=r"llama_decode refuses the batch: .*invalid seq_id\[0\]\[0\] = 7"):
            capi.decode(context.ctx, batch, [(1, 0, 7, True)])
        lib().llama_batch_free(batch)


def test_wrong_arguments(olmoe: Loaded) -> None:
    identity, model = olmoe
    steering = steerings(identity)[0]
    with Context(model, n_seq_max=3, kv_unified=False) as apart, Context(model, n_seq_max=3) as unified:
        for context, n in ((apart, 3), (unified, 256)):
            for sequence in (-1, n, 1 << 30, -(1 << 31)):
                message = f"sequence {sequence} does not exist: the context has the sequences 0 to {n - 1}"
                for call in (
                    lambda c=context, s=sequence: capi.attach_sequence(c.ctx, s, steering.native(identity)),
                    lambda c=context, s=sequence: capi.attach_sequence(c.ctx, s, None),
                    lambda c=context, s=sequence: capi.detach_sequence(c.ctx, s),
                ):
                    with pytest.raises(NativeError, match=message) as caught:
                        call()
                    assert caught.value.code == ARGUMENT
            capi.attach_sequence(context.ctx, n - 1, steering.native(identity))
        with pytest.raises(NativeError, match="ctx must not be NULL"):
            capi.attach_sequence(None, 0, None)
        with pytest.raises(NativeError, match="ctx must not be NULL"):
            capi.detach_sequence(None, 0)


def test_an_error_leaves_the_steering(olmoe: Loaded, random_model: Any) -> None:
    identity, model = olmoe
    under = steerings(identity)[:3]
    other = ModelIdentity(**(identity.to_dict() | {"router_sha256": "0" * 64}))
    batch = turns(3, 0, 3)
    with Context(model) as context:
        attach(context, identity, under)
        before = context.decode_rows(batch)
        for sequence in (0, 2):
            with pytest.raises(ModelMismatchError, match="force it"):
                capi.attach_sequence(context.ctx, sequence, under[1].native(other))
        context.clear()
        assert context.decode_rows(batch).tobytes() == before.tobytes()
        capi.attach_sequence(context.ctx, 0, under[1].native(other), force=True)
        context.clear()
        forced = context.decode_rows(batch)
    with Context(model) as context:
        attach(context, identity, [under[1], under[1], NONE])
        assert context.decode_rows(batch).tobytes() == forced.tobytes()
    path = random_model(DENSE_FIRST)
    dense = open_model(path)
    with Context(dense) as context, pytest.raises(ModelError, match="layer 0 cannot be steered: it has no router"):
        capi.attach_sequence(context.ctx, 0, native_bias(identity_of(path), {0: np.eye(DENSE_FIRST.n_expert)[1]}))
    dense.close()


def test_the_environment_steers_the_others(olmoe: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    identity, model = olmoe
    signs = np.zeros(identity.shape)
    signs[:, 3], signs[:, 5] = 1, -1
    write_bias(BiasFile.from_signs(signs, identity), tmp_path / "bias.gguf")
    named = Steering({layer: row.astype(np.float32) for layer, row in enumerate(signs)})
    batch = turns(3, 0, 4)
    with Context(model) as context:
        attach(context, identity, [NONE, named, steerings(identity)[0]])
        expected = context.decode_rows(batch)
    monkeypatch.setenv("STEERMOE_BIAS", str(tmp_path / "bias.gguf"))
    with Context(model) as context:
        monkeypatch.delenv("STEERMOE_BIAS")
        attach(context, identity, [NONE, None, steerings(identity)[0]])
        assert context.decode_rows(batch).tobytes() == expected.tobytes()
    assert "STEERMOE_BIAS" not in os.environ


@pytest.mark.parametrize("kv_unified", [True, False])
def test_recorder_counts_by_sequence(olmoe: Loaded, kv_unified: bool) -> None:
    """With a bin for each sequence, the counts of a mixed batch are those of each sequence alone."""
    identity, model = olmoe
    under = steerings(identity)

    def count(given: Sequence[Steering], sequences: Sequence[int], unified: bool) -> tuple[Any, Any]:
        recorder = capi.NativeRecorder(model.model, len(given), identity.shape)
        with Context(model, recorder=recorder, n_ubatch=16, n_ctx=4096, kv_unified=unified) as context:
            recorder.bind(context.ctx)
            attach(context, identity, given)
            prompt = [(t, i, s, True) for s, seed in enumerate(sequences) for i, t in enumerate(tokens(seed, 9))]
            single = [(7, 9, s, True) for s in range(len(given))]
            for batch in (prompt, single):
                recorder.set_mask([row[2] for row in batch])
                context.decode_rows(batch)
            counts, n_tokens = recorder.counts()
        found = np.array(counts).reshape(len(given), *identity.shape), np.array(n_tokens).reshape(len(given), -1)
        recorder.close()
        return found

    counts, n_tokens = count(under, range(len(under)), kv_unified)
    assert (n_tokens == 10).all()
    for sequence, steering in enumerate(under):
        alone, _ = count([steering], [sequence], True)
        assert np.array_equal(counts[sequence], alone[0]), f"sequence {sequence}"
    assert not np.array_equal(counts[0], counts[2])
