"""Steering per sequence: the result of each token of a batch depends only on its own sequence's steering."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from steermoe_local.llama import capi
from tests.native.test_native_oracle import layer_values
from tests.support.low_level import F32, Context, Row, identity_of, lib, open_model
from tests.support.random_models import OLMOE, RandomModel
from tests.support.sequence_steering import (
    NONE,
    Loaded,
    Steering,
    allowance,
    attach,
    check_layer,
    steerings,
    tokens,
    turns,
)

pytestmark = pytest.mark.numeric


def test_mixed_batches_against_the_oracle(steerable: tuple[RandomModel, Path, Any]) -> None:
    """Prompts that take turns, split into ubatches, then single tokens: every edited logit, choice and weight."""
    model, path, loaded = steerable
    identity = identity_of(path)
    context_wide = Steering({0: np.eye(model.n_expert, dtype=np.float32)[2] * 4}, "soft")
    given: list[Steering | None] = [*steerings(identity), None]
    under = [context_wide if s is None else s for s in given]
    with Context(loaded, capture=True, n_ubatch=12, n_seq_max=16) as context:
        capi.attach(context.ctx, context_wide.native(identity))
        attach(context, identity, given)
        batches = [turns(len(given), 0, 6), *(turns(len(given), i, i + 1) for i in range(6, 9))]
        for batch in batches:
            context.decode_rows(batch)
        of_rows = np.array([row[2] for batch in batches for row in batch])
        for layer in range(model.n_layer):
            check_layer(model, context.seen, layer, under, of_rows)


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
    hard, soft, capped = steerings(identity)[0], steerings(identity)[1], steerings(identity)[7]
    for under in ([NONE, hard], [NONE, hard, soft], [NONE, capped], [NONE, soft, capped, hard]):
        with Context(loaded, capture=True) as context:
            attach(context, identity, under)
            batch = turns(len(under), 0, 8)
            context.decode_rows(batch)
            mine = np.array([row[2] for row in batch]) == 0
            z = layer_values(context.seen, "ffn_moe_logits", 1)[mine]
            assert {np.inf, -np.inf} <= set(z.ravel().tolist())
            assert layer_values(context.seen, "ffn_moe_logits_steered", 1)[mine].tobytes() == z.tobytes()
    for steering in (hard, capped):
        with Context(loaded, capture=True) as context:
            attach(context, identity, [steering])
            context.decode_rows(turns(1, 0, 8))
            z, edited = (layer_values(context.seen, f"ffn_moe_logits{end}", 1) for end in ("", "_steered"))
            untouched = steering.rows[1] == 0
            assert not np.isfinite(z[:, untouched]).all()
            assert edited[:, untouched].tobytes() == z[:, untouched].tobytes(), (
                "the edit changes other logits of its token"
            )
    loaded.close()


def test_batches_of_one_shape_agree_bit_for_bit(olmoe: Loaded) -> None:
    """A sequence's logits among others of other steering are those it has when all are under its own."""
    identity, model = olmoe
    under = steerings(identity)

    def run(given: Sequence[Steering]) -> Any:
        with Context(model, n_seq_max=16) as context:
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
    lengths = [9, 4, 12, 7, 1, 10, 6, 8, 3, 11, 5]

    def prompt(sequence: int) -> list[Row]:
        n = lengths[sequence]
        return [(t, i, sequence, outputs == "all" or i == n - 1) for i, t in enumerate(tokens(sequence, n))]

    def single(sequence: int, step: int) -> Row:
        return (step + sequence, lengths[sequence] + step, sequence, True)

    with Context(model, kv_unified=kv_unified, n_ctx=4096, n_seq_max=16, type_kv=F32) as context:
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
