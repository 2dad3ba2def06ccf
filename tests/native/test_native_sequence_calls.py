"""Steering per sequence: sequences come and go, wrong arguments, what other calls say of it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.errors import ModelError, ModelMismatchError, NativeError
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi, signatures
from steermoe_local.steering.bias_file import BiasFile, write_bias
from tests.support.low_level import F32, Context, Row, identity_of, lib, native_bias, open_model, random_signs
from tests.support.random_models import DENSE_FIRST, OLMOE
from tests.support.sequence_steering import (
    ARGUMENT,
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
            assert re.match(
                f"steering: token 0 .* the sequences {named}", signatures.lib().steermoe_last_error().decode()
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
        with pytest.raises(NativeError, match="must not be NULL"):
            capi.attach_sequence(None, 0, None)
        with pytest.raises(NativeError, match="must not be NULL"):
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
    with Context(dense) as context, pytest.raises(ModelError, match="layer 0 cannot be steered:"):
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
        with Context(model, recorder=recorder, n_ubatch=16, n_ctx=4096, n_seq_max=16, kv_unified=unified) as context:
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
