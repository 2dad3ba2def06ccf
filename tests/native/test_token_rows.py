"""Steering per token: the result of each token depends on its row and on the tokens before it, on no other row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.llama import capi
from tests.support import oracle
from tests.support.low_level import F32, Context, Row, identity_of, lib
from tests.support.random_models import OLMOE, RandomModel
from tests.support.sequence_steering import (
    NONE,
    Loaded,
    Steering,
    allowance,
    attach,
    steerings,
    tokens,
    turns,
)
from tests.support.token_rows import KEPT_GRAPHS, RowContext, alone, check_ubatches, number_of

pytestmark = pytest.mark.numeric


def random_places(rng: np.random.Generator, n_tokens: int, n_under: int) -> list[int]:
    return rng.integers(0, n_under, n_tokens).tolist()


@pytest.mark.parametrize("n_ubatch", [512, 7])
def test_rows_in_one_prompt_against_the_oracle(steerable: tuple[RandomModel, Path, Any], n_ubatch: int) -> None:
    """Every edited logit, choice and weight of a prompt under all rules and none, then of single tokens."""
    model, path, loaded = steerable
    identity = identity_of(path)
    under = steerings(identity)
    of_tokens = random_places(np.random.default_rng(5), 60, len(under))
    assert set(of_tokens) == set(range(len(under)))
    with RowContext(loaded, identity, under, capture=True, n_ubatch=n_ubatch) as context:
        context.decode_under([(t, i, 0, True) for i, t in enumerate(tokens(0, 56))], of_tokens[:56])
        for i in range(56, 60):
            context.decode_under([(i, i, 0, True)], of_tokens[i : i + 1])
        sizes = [56] if n_ubatch > 56 else [n_ubatch] * (56 // n_ubatch)
        check_ubatches(model, context, under, of_tokens, [*sizes, 1, 1, 1, 1])


@pytest.mark.parametrize("places", [(0, 1, 2), (3, 2, 8), (7, 6, 1)])
def test_three_rows_in_one_prompt(steerable: tuple[RandomModel, Path, Any], places: tuple[int, int, int]) -> None:
    """Two rules and no steering in runs of tokens, as a plan has them: some ubatches are of one steering alone."""
    model, path, loaded = steerable
    identity = identity_of(path)
    under = [steerings(identity)[place] for place in places]
    of_tokens = [1] * 20 + [0] * 36 + [2] * 16 + [0] * 24
    with RowContext(loaded, identity, under, capture=True, n_ubatch=40) as context:
        context.decode_under([(t, i, 0, True) for i, t in enumerate(tokens(0, 96))], of_tokens)
        check_ubatches(model, context, under, of_tokens, [40, 40, 16])


def test_unsteered_tokens_have_the_bits_of_an_unsteered_run(olmoe: Loaded) -> None:
    """Up to the first steered token, which is the first to differ, wherever it is."""
    identity, model = olmoe
    batch: list[Row] = [(t, i, 0, True) for i, t in enumerate(tokens(0, 20))]
    with Context(model) as context:
        plain = context.decode_rows(batch)
    for steering in (steerings(identity)[0], steerings(identity)[1], steerings(identity)[7]):
        for first in (0, 1, 13, 19):
            with RowContext(model, identity, [steering, NONE]) as context:
                places = [1] * first + [0] + [1] * (19 - first)
                found = context.decode_under(batch, places)
            assert found[:first].tobytes() == plain[:first].tobytes(), f"first steered token {first}"
            assert not np.array_equal(found[first], plain[first])


def test_batches_of_one_shape_agree_bit_for_bit(olmoe: Loaded) -> None:
    """A sequence's logits do not depend on the rows of the others' tokens."""
    identity, model = olmoe
    under = steerings(identity)
    rng = np.random.default_rng(11)
    n, n_tokens = 5, 12
    batch = turns(n, 0, n_tokens)
    patterns = [random_places(rng, n_tokens, len(under)) for _ in range(n)]

    def run(patterns: Sequence[Sequence[int]]) -> Any:
        with RowContext(model, identity, under) as context:
            logits = context.decode_under(batch, [patterns[s][i] for _, i, s, _ in batch])
        return logits.reshape(n_tokens, n, -1)

    mixed = run(patterns)
    for sequence in range(n):
        others = [random_places(rng, n_tokens, len(under)) for _ in range(n)]
        others[sequence] = patterns[sequence]
        assert run(others)[:, sequence].tobytes() == mixed[:, sequence].tobytes(), f"sequence {sequence}"
        uniform = [[2] * n_tokens] * n  # all others unsteered
        uniform[sequence] = patterns[sequence]
        assert run(uniform)[:, sequence].tobytes() == mixed[:, sequence].tobytes(), f"sequence {sequence}"


def test_one_row_for_all_is_the_steering_of_the_context(olmoe: Loaded) -> None:
    """The same bits, the same nodes; and no nodes where all tokens are unsteered, whatever their sequences have."""
    identity, model = olmoe
    under = steerings(identity)
    batch: list[Row] = [(t, i, 0, True) for i, t in enumerate(tokens(0, 40))]
    with Context(model, capture=True) as context:
        unsteered, plain_ops = context.decode_rows(batch), context.ops
    assert not any("steered" in name for name in plain_ops)
    for place, steering in enumerate(under):
        if not steering.rows:
            continue
        with Context(model, capture=True) as context:
            capi.attach(context.ctx, steering.native(identity))
            attached, ops = context.decode_rows(batch), context.ops
        with RowContext(model, identity, under, capture=True) as context:
            found = context.decode_under(batch, [place] * 40)
            assert found.tobytes() == attached.tobytes(), f"steering {place}"
            # a context with a capped row reserves more, but builds no more
            assert context.ops == ops, f"steering {place}"
            for attach_it in (capi.attach, lambda ctx, bias: capi.attach_sequence(ctx, 0, bias)):
                attach_it(context.ctx, steering.native(identity))
                context.clear()
                context.ops.clear()
                assert context.decode_under(batch, [2] * 40).tobytes() == unsteered.tobytes()
                assert context.ops == plain_ops


def test_rows_are_for_one_decode_and_before_sequences(olmoe: Loaded) -> None:
    identity, model = olmoe
    one, other, third = (steerings(identity)[place] for place in (0, 1, 4))
    batch: list[Row] = [(t, i, 0, True) for i, t in enumerate(tokens(0, 9))]

    def of_context(steering: Steering) -> bytes:
        with Context(model) as context:
            capi.attach(context.ctx, steering.native(identity))
            return context.decode_rows(batch).tobytes()

    with RowContext(model, identity, [one, other]) as context:
        capi.attach(context.ctx, other.native(identity))
        attach(context, identity, [third])
        for given in (True, False, True, False):
            context.clear()
            found = context.decode_under(batch, [0] * 9) if given else context.decode_rows(batch)
            assert found.tobytes() == of_context(one if given else third), given
        context.clear()
        capi.set_token_rows(context.ctx, [context.numbers[1]] * 9)
        capi.set_token_rows(context.ctx, [context.numbers[0]] * 9)  # instead
        assert context.decode_rows(batch).tobytes() == of_context(one)
        context.clear()
        capi.set_token_rows(context.ctx, np.full(9, context.numbers[0]))
        capi.set_token_rows(context.ctx, [])
        assert context.decode_rows(batch).tobytes() == of_context(third)


@pytest.mark.parametrize("kv_unified", [True, False])
@pytest.mark.parametrize("outputs", ["all", "last"])
@pytest.mark.parametrize("n_ubatch", [512, 8])
def test_split_and_reordered_batches(olmoe: Loaded, kv_unified: bool, outputs: str, n_ubatch: int) -> None:
    """Prompts of different lengths and rows: each sequence's logits are those it has alone."""
    identity, model = olmoe
    under = steerings(identity)
    lengths = [9, 4, 12, 7, 1, 10]
    rng = np.random.default_rng(7)
    batch: list[Row] = []
    for sequence, n in enumerate(lengths):
        batch += [(t, i, sequence, outputs == "all" or i == n - 1) for i, t in enumerate(tokens(sequence, n))]
    order = rng.permutation(len(batch))
    batch = sorted((batch[i] for i in order), key=lambda row: row[1])  # positions of a sequence must ascend
    places = random_places(rng, len(batch), len(under))
    options = {"kv_unified": kv_unified, "n_ubatch": n_ubatch, "n_ctx": 2048, "type_kv": F32}
    with RowContext(model, identity, under, **options) as context:
        found = context.decode_under(batch, places)
    asked = [row for row in batch if row[3]]
    for sequence in range(len(lengths)):
        mine = [i for i, row in enumerate(batch) if row[2] == sequence]
        wanted = alone(olmoe, under, [batch[i] for i in mine], [places[i] for i in mine])
        logits = found[[i for i, row in enumerate(asked) if row[2] == sequence]]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=allowance(wanted), err_msg=f"sequence {sequence}")
        other = alone(olmoe, under, [batch[i] for i in mine], [(places[i] + 1) % len(under) for i in mine])
        assert np.abs(other - wanted).max() > 10 * allowance(wanted), "other rows would not show"


def test_a_token_of_sequences_that_are_steered_differently(olmoe: Loaded) -> None:
    """Its row steers it, for all of its sequences."""
    identity, model = olmoe
    one, other = steerings(identity)[0], steerings(identity)[1]
    llama = lib()
    ids = tokens(0, 6)
    with RowContext(model, identity, [one, other, NONE], type_kv=F32) as context:
        attach(context, identity, [one, other])
        batch = llama.llama_batch_init(len(ids), 0, 2)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.logits[i], batch.n_seq_id[i] = token, i, True, 2
                batch.seq_id[i][0], batch.seq_id[i][1] = 0, 1
            assert llama.llama_decode(context.ctx, batch) == -1, "without rows it has two steerings"
            places = [2, 0, 0, 1, 2, 1]
            capi.set_token_rows(context.ctx, [context.numbers[place] for place in places])
            assert llama.llama_decode(context.ctx, batch) == 0
            size = len(ids), model.n_vocab()
            found = np.ctypeslib.as_array(llama.llama_get_logits(context.ctx), size).copy()
        finally:
            llama.llama_batch_free(batch)
        then = [(9, 6, s, True) for s in (0, 1)]
        found = np.concatenate([found, context.decode_under(then, [0, 1])])
    rows: list[Row] = [(t, i, 0, True) for i, t in enumerate([*ids, 9])]
    for sequence in (0, 1):
        wanted = alone(olmoe, [one, other, NONE], rows, [*places, sequence])
        mine = found[[*range(6), 6 + sequence]]
        np.testing.assert_allclose(mine, wanted, rtol=0, atol=allowance(wanted))


def test_many_rows(olmoe: Loaded) -> None:
    """More rows than sequences, each with a steering of its own."""
    identity, model = olmoe
    rng = np.random.default_rng(23)
    under = [Steering({s % 4: rng.normal(size=16).astype(np.float32)}, "soft") if s % 5 else NONE for s in range(400)]
    of_tokens = rng.permutation(400).tolist()
    with RowContext(model, identity, under, capture=True) as context:
        context.decode_under([(t, i, 0, True) for i, t in enumerate(tokens(0, 400))], of_tokens)
        check_ubatches(OLMOE, context, under, of_tokens, [400])


def n_reused(context: Context) -> int:
    return int(lib().llama_perf_context(context.ctx).n_reused)


def test_other_rows_of_the_same_rules_keep_the_graph(olmoe: Loaded) -> None:
    """Token by token under rows of other values; equal steering in any number of rows needs no more memory."""
    identity, model = olmoe
    same_rules = [steerings(identity, seed)[0] for seed in range(3)]
    with RowContext(model, identity, [*same_rules, NONE]) as context:
        for i in range(2):
            context.decode_under([(5, i, 0, True)], [0])
        before = n_reused(context)
        for i in range(2, 8):
            # a bank of four rows is full: one more would be another bank, and another graph
            capi.attach_row(context.ctx, 100 + i, same_rules[i % 3].native(identity))
            attach(context, identity, [same_rules[i % 3]])
            context.decode_under([(5, i, 0, True)], [i % 3])
        assert n_reused(context) - before == 6
        # rows that no token has are free for others
        capi.detach_row(context.ctx, context.numbers[1])
        for i in (4, 7):
            capi.detach_row(context.ctx, 100 + i)
        attach(context, identity, [NONE])
        capi.attach_row(context.ctx, number_of(1), steerings(identity, 9)[0].native(identity))
        context.decode_under([(5, 8, 0, True)], [1])
        before = n_reused(context)
        context.decode_under([(5, 9, 0, True)], [2])
        assert n_reused(context) - before == 1


def test_steering_in_turns_keeps_the_graph(olmoe: Loaded) -> None:
    """Of rules of different layers and none: their nodes stay for some tokens, in which they change no bit."""
    identity, model = olmoe
    rules = steerings(identity)
    under = [NONE, rules[3], rules[4], rules[5]]  # the last layer, the first two, a soft one of the second
    turns_of = [1, 0, 0, 2, 0, 3, 1, 3, 0, 0, 2, 0] * 3
    rest = [0] * (KEPT_GRAPHS + 2)
    found, reused, edited = [], [], []
    with RowContext(model, identity, under, capture=True) as context:
        for i, place in enumerate([*turns_of, *rest]):
            before = n_reused(context)
            context.seen.clear()
            context.ubatches.clear()
            found.append(context.decode_under([(i, i, 0, True)], [place]))
            reused.append(n_reused(context) - before)
            edited.append([layer for layer in range(4) if f"ffn_moe_logits_steered-{layer}" in context.seen])
    # when a rule of other layers comes, when its nodes are no longer needed, and nothing between
    assert [i for i, same in enumerate(reused) if not same] == [
        0,
        3,
        len(turns_of) + KEPT_GRAPHS - 6,
        len(turns_of) + KEPT_GRAPHS - 2,
    ]
    assert edited[2] == [3]
    assert edited[len(turns_of)] == [0, 1, 3]
    assert edited[-1] == []
    with RowContext(model, identity, under) as context:
        for i, place in enumerate([*turns_of, *rest]):
            # a batch without rows forgets what was needed: its graph has what its token needs alone
            capi.attach_sequence(context.ctx, 0, under[place].native(identity))
            assert context.decode_rows([(i, i, 0, True)]).tobytes() == found[i].tobytes(), f"token {i}"


LAYOUTS = st.lists(st.integers(1, 9), min_size=1, max_size=5)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(LAYOUTS, st.integers(1, 24), st.booleans(), st.booleans(), st.integers(0, 2**32 - 1))
def test_any_layout(olmoe: Loaded, lengths: list[int], n_ubatch: int, kv_unified: bool, turns: bool, seed: int) -> None:
    """Of sequences, ubatches, outputs and rows: logits as alone; choices as the oracle has them from traced logits."""
    identity, model = olmoe
    rng = np.random.default_rng(seed)
    under = steerings(identity)
    batch: list[Row] = []
    for sequence, n in enumerate(lengths):
        batch += [(t, i, sequence, bool(rng.integers(0, 2))) for i, t in enumerate(tokens(sequence, n))]
    batch = sorted(batch, key=lambda row: row[1]) if turns else batch
    batch[-1] = (*batch[-1][:3], True)
    places = random_places(rng, len(batch), len(under))
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)
    options = {"kv_unified": kv_unified, "n_ubatch": n_ubatch, "n_ctx": 2048, "type_kv": F32}
    with RowContext(model, identity, under, recorder=recorder, **options) as context:
        recorder.bind(context.ctx)
        recorder.set_trace([True] * len(batch), logits=True)
        found = context.decode_under(batch, places)
        trace = recorder.trace()
    recorder.close()
    assert trace.logits is not None
    for layer in range(identity.n_layer):
        for i, place in enumerate(places):
            if layer == identity.n_layer - 1 and not batch[i][3]:
                assert (trace.experts[i, layer] == -1).all()
                continue
            z = under[place].logits(trace.logits[i, layer][None], layer)
            wanted = oracle.chosen(z, identity.n_expert_used)
            assert set(trace.experts[i, layer].tolist()) == set(wanted[0].tolist()), f"token {i}, layer {layer}"
    asked = [i for i, row in enumerate(batch) if row[3]]
    for sequence in range(len(lengths)):
        mine = [i for i, row in enumerate(batch) if row[2] == sequence]
        if not any(batch[i][3] for i in mine):
            continue
        wanted = alone(olmoe, under, [batch[i] for i in mine], [places[i] for i in mine])
        logits = found[[asked.index(i) for i in mine if batch[i][3]]]
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=allowance(wanted), err_msg=f"sequence {sequence}")
