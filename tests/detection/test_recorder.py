"""The recorder against a count of the choices that were copied out of the same graph, and `record_counts`."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ModelError, NativeError, Pair, PairsError, UsageError, record_counts
from steermoe_local.llama import capi
from tests.support.low_level import F32, Context, Row, identity_of, lib, native_bias, open_model, random_signs
from tests.support.near_ties import near_ties_of_pairs
from tests.support.random_models import DENSE_FIRST, N_VOCAB, OLMOE, RandomModel

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng(9)
BINS = 3


@contextmanager
def recording(model: Any, shape: tuple[int, int], n_bins: int = BINS, **options: Any) -> Iterator[tuple[Context, Any]]:
    """A context and the recorder that is bound to it."""
    recorder = capi.NativeRecorder(model.model, n_bins, shape)
    with Context(model, recorder=recorder, **options) as context:
        recorder.bind(context.ctx)
        yield context, recorder
    recorder.close()


def counts_of(recorder: Any, shape: tuple[int, int], n_bins: int = BINS) -> tuple[Any, Any]:
    counts, tokens = recorder.counts()
    return (
        np.array(counts).reshape(n_bins, *shape),
        np.array(tokens).reshape(n_bins, shape[0]),
    )


def rows_of(lengths: list[int], interleaved: bool = False) -> list[Row]:
    """A batch of several sequences of random tokens; every token an output."""
    rows = [(int(RNG.integers(N_VOCAB)), i, s, True) for s, n in enumerate(lengths) for i in range(n)]
    return sorted(rows, key=lambda row: row[1]) if interleaved else rows


def expected_counts(
    model: Any, description: RandomModel, batches: list[list[Row]], masks: list[Any], bias: Any = None
) -> Any:
    """Counts from ffn_moe_topk of the same decodes, one ubatch each, so that rows are the batch's tokens."""
    counts = np.zeros((BINS, description.n_layer, description.n_expert), np.int64)
    with Context(model, capture=True) as context:
        if bias is not None:
            capi.attach(context.ctx, bias)
        for rows, mask in zip(batches, masks, strict=True):
            context.seen.clear()
            # one sequence after the other: a decode of one sequence is never reordered
            for sequence in sorted({row[2] for row in rows}):
                places = [i for i, row in enumerate(rows) if row[2] == sequence]
                context.decode_rows([rows[i] for i in places])
                for layer in range(description.n_dense, description.n_layer):
                    topk = context.seen[f"ffn_moe_topk-{layer}"][-1].reshape(len(places), description.k)
                    for place, chosen in zip(places, topk, strict=True):
                        if mask[place] >= 0:
                            counts[mask[place], layer, chosen] += 1
    return counts


def random_mask(n: int) -> list[int]:
    return RNG.integers(-1, BINS, n).tolist()


@pytest.mark.parametrize("n_ubatch", [512, 16, 3])
@pytest.mark.parametrize("lengths", [[20], [7, 12, 1, 5]])
@pytest.mark.parametrize("interleaved", [False, True])
def test_counts(steerable: tuple[RandomModel, Path, Any], lengths: list[int], interleaved: bool, n_ubatch: int) -> None:
    description, _, model = steerable
    shape = (description.n_layer, description.n_expert)
    rows = rows_of(lengths, interleaved)
    mask = random_mask(len(rows))
    with recording(model, shape, n_ubatch=n_ubatch) as (context, recorder):
        recorder.set_mask(mask)
        context.decode_rows(rows)
        counts, tokens = counts_of(recorder, shape)
    assert np.array_equal(counts, expected_counts(model, description, [rows], [mask]))
    assert np.array_equal(
        tokens, np.repeat(np.bincount(np.add(mask, 1), minlength=BINS + 1)[1:, None], shape[0], axis=1)
    )
    assert (counts.sum(axis=2) == tokens * description.k).all(), "every token selects k experts"


def test_dense_layers_have_no_counts(random_model: Any) -> None:
    model = open_model(random_model(DENSE_FIRST))
    shape = (DENSE_FIRST.n_layer, DENSE_FIRST.n_expert)
    rows = rows_of([9])
    for stop in (False, True):
        with recording(model, shape, n_ubatch=4) as (context, recorder):
            recorder.set_stop(stop)
            recorder.set_mask([0] * 9)
            context.decode_rows(rows)
            counts, tokens = counts_of(recorder, shape)
        assert tokens.tolist() == [[0, 9, 9], [0, 0, 0], [0, 0, 0]]
        assert np.array_equal(counts, expected_counts(model, DENSE_FIRST, [rows], [[0] * 9]))
    model.close()


@pytest.fixture(scope="module")
def olmoe(random_model: Any) -> Iterator[Any]:
    model = open_model(random_model(OLMOE))
    yield model
    model.close()


SHAPE = (OLMOE.n_layer, OLMOE.n_expert)


def test_several_decodes_and_reset(olmoe: Any) -> None:
    batches = [rows_of([8]), [(5, 8, 0, True)], [(6, 9, 0, True), (7, 10, 0, True)]]
    masks = [random_mask(len(rows)) for rows in batches]
    expected = expected_counts(olmoe, OLMOE, batches, masks)
    with recording(olmoe, SHAPE) as (context, recorder):
        for _ in range(2):
            context.clear()
            for rows, mask in zip(batches, masks, strict=True):
                recorder.set_mask(mask)
                context.decode_rows(rows)
            assert np.array_equal(counts_of(recorder, SHAPE)[0], expected)
            recorder.reset()
            counts, tokens = counts_of(recorder, SHAPE)
            assert not counts.any()
            assert not tokens.any()


def test_a_mask_serves_one_decode(olmoe: Any) -> None:
    with recording(olmoe, SHAPE) as (context, recorder):
        context.decode(range(4))  # no mask yet
        recorder.set_mask([0, 1, -1, 2])
        context.decode(range(4), 4)
        once = counts_of(recorder, SHAPE)[0]
        context.decode(range(4), 8)
        assert np.array_equal(counts_of(recorder, SHAPE)[0], once), "counted again without a new mask"
        recorder.set_mask([])
        context.decode(range(4), 12)
        recorder.set_mask([0] * 2)  # shorter than the batch: the rest is not counted
        context.decode(range(4), 16)
        assert counts_of(recorder, SHAPE)[1][:, 0].tolist() == [3, 1, 1]


def test_a_longer_mask_is_not_left_over(olmoe: Any) -> None:
    with recording(olmoe, SHAPE) as (context, recorder):
        recorder.set_mask([0] * 8)
        context.decode(range(4))
        recorder.set_mask([1] * 4)
        context.decode(range(8), 4)
        assert counts_of(recorder, SHAPE)[1][:, 0].tolist() == [4, 4, 0]


def test_counted_tokens_must_be_outputs(olmoe: Any) -> None:
    rows = rows_of([6])
    for i in (1, 2, 4):
        rows[i] = (*rows[i][:3], False)
    with recording(olmoe, SHAPE) as (context, recorder):
        recorder.set_mask([0, -1, -1, 0, -1, 0])
        context.decode_rows(rows)
        expected = expected_counts(olmoe, OLMOE, [rows_all_outputs(rows)], [[0, -1, -1, 0, -1, 0]])
        assert np.array_equal(counts_of(recorder, SHAPE)[0], expected), (
            "rows of the last layer are not matched to tokens"
        )
        context.clear()
        recorder.set_mask([0] * 6)
        context.decode_rows(rows)
        with pytest.raises(NativeError, match=r"3 counted tokens .*batch\.logits"):
            recorder.counts()
        with pytest.raises(NativeError):
            recorder.counts()
        recorder.reset()
        assert not counts_of(recorder, SHAPE)[0].any()


def test_counted_tokens_without_any_output(olmoe: Any) -> None:
    with recording(olmoe, SHAPE) as (context, recorder):
        recorder.set_mask([0] * 4)
        context.decode_rows([(*row[:3], False) for row in rows_of([4])])
        with pytest.raises(NativeError, match="4 counted tokens"):
            recorder.counts()


def rows_all_outputs(rows: list[Row]) -> list[Row]:
    return [(*row[:3], True) for row in rows]


def test_warm_up_is_not_counted(olmoe: Any) -> None:
    with recording(olmoe, SHAPE) as (context, recorder):
        lib().llama_set_warmup(context.ctx, True)
        recorder.set_mask([0] * 4)
        context.decode(range(4))
        lib().llama_set_warmup(context.ctx, False)
        counts, tokens = counts_of(recorder, SHAPE)
        assert not counts.any(), "a warm-up routes through all experts"
        assert not tokens.any()
        context.clear()
        # another number of tokens: llama.cpp reuses the warm-up's graph for a batch of the same size
        recorder.set_mask([0] * 5)
        context.decode(range(5))
        assert counts_of(recorder, SHAPE)[0].sum() == 5 * OLMOE.k * OLMOE.n_layer


def test_nothing_is_counted_before_bind(olmoe: Any) -> None:
    recorder = capi.NativeRecorder(olmoe.model, BINS, SHAPE)
    with Context(olmoe, recorder=recorder) as context:
        recorder.set_mask([0] * 4)
        logits = context.decode(range(4))
        recorder.bind(context.ctx)
        assert not counts_of(recorder, SHAPE)[0].any()
    with Context(olmoe) as context:
        assert np.array_equal(context.decode(range(4)), logits), "an idle recorder changes the logits"
    recorder.close()


@pytest.mark.parametrize("n_ubatch", [512, 5])
def test_stop_counts_the_same(steerable: tuple[RandomModel, Path, Any], n_ubatch: int) -> None:
    description, _, model = steerable
    shape = (description.n_layer, description.n_expert)
    batches = [rows_of([11, 4]), rows_of([3])]
    batches[1] = [(t, 11 + p, s, o) for t, p, s, o in batches[1]]  # on top of a memory that a stopped graph wrote
    masks = [random_mask(len(rows)) for rows in batches]
    found = []
    for stop in (False, True):
        with recording(model, shape, n_ubatch=n_ubatch) as (context, recorder):
            recorder.set_stop(stop)
            for rows, mask in zip(batches, masks, strict=True):
                recorder.set_mask(mask)
                context.decode_rows(rows)
            found.append(counts_of(recorder, shape))
    assert np.array_equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(found[0][0], expected_counts(model, description, batches, masks))


def test_stop_leaves_uncounted_decodes_alone(olmoe: Any) -> None:
    with recording(olmoe, SHAPE) as (context, recorder):
        recorder.set_stop(True)
        recorder.set_mask([0] * 4)
        assert not context.decode(range(4)).size, "a stopped graph has no logits to keep"
        recorder.set_stop(False)
        logits = context.decode([7], 4)
        assert logits.size
    with Context(olmoe) as context:
        context.decode(range(4))
        np.testing.assert_array_equal(context.decode([7], 4), logits, "the memory is not right after a stopped graph")


def test_a_steered_context_counts_the_steered_choice(olmoe: Any, random_model: Any) -> None:
    rng = np.random.default_rng(1)
    rows, mask = rows_of([20]), [0] * 20
    layers = {layer: random_signs(rng, OLMOE.n_expert, OLMOE.k, 2, 3) for layer in range(OLMOE.n_layer)}
    bias = native_bias(identity_of(random_model(OLMOE)), layers)
    with recording(olmoe, SHAPE) as (context, recorder):
        capi.attach(context.ctx, bias)
        recorder.set_mask(mask)
        context.decode_rows(rows)
        counts = counts_of(recorder, SHAPE)[0]
    assert np.array_equal(counts, expected_counts(olmoe, OLMOE, [rows], [mask], bias))
    for layer, row in layers.items():
        assert (counts[0, layer, row > 0] == 20).all()
        assert not counts[0, layer, row < 0].any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow(olmoe: Any) -> None:
    """Per token nothing is kept: a choice of 4 layers, 4 experts and 64 tokens is 4 KB a decode, 480 KB in all."""
    mask = (ctypes.c_int32 * 64)()
    with recording(olmoe, SHAPE) as (context, recorder):
        recorder.set_stop(True)

        def decode(times: int) -> None:
            for _ in range(times):
                context.clear()
                recorder.set_mask(mask)
                context.decode(range(64))

        decode(40)
        before = resident_bytes()
        decode(120)
        assert resident_bytes() - before < 1 << 18
        assert counts_of(recorder, SHAPE)[1][0].tolist() == [160 * 64] * OLMOE.n_layer


def test_bad_arguments(olmoe: Any) -> None:
    with pytest.raises(NativeError, match="n_bins"):
        capi.NativeRecorder(olmoe.model, 0, SHAPE)
    with recording(olmoe, SHAPE) as (_, recorder):
        for bins in ([0, -2], [0, 0, BINS]):
            with pytest.raises(NativeError, match=rf"bin {bins[-1]} .*\b{BINS} bins"):
                recorder.set_mask(bins)


def test_a_recorder_of_another_model(olmoe: Any, random_model: Any) -> None:
    other = open_model(random_model(DENSE_FIRST))
    recorder = capi.NativeRecorder(other.model, 1, (DENSE_FIRST.n_layer, DENSE_FIRST.n_expert))
    with Context(olmoe) as context, pytest.raises(NativeError, match="another model"):
        recorder.bind(context.ctx)
    recorder.close()
    other.close()


#
# record_counts
#


def pairs(n: int = 6) -> list[Pair]:
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    out = []
    for i in range(n):
        digits = ", ".join(str(1 + (i + j) % 9) for j in range(3 + i))
        names = ", ".join(words[(i + j) % 9] for j in range(2 + i))
        out.append(Pair(f"p{i}", f"Count: {digits}", f"Count: {names}", digits, names))
    return out


def test_batch_sizes_do_not_change_the_counts(tiny_f32_path: Path) -> None:
    """All is computed in F32; no choice is so near a tie that rounding could decide it."""
    assert near_ties_of_pairs(tiny_f32_path, pairs()) == 0
    cache: dict[str, Any] = {"type_k": F32, "type_v": F32, "flash_attn": False}
    base = record_counts(tiny_f32_path, pairs(), n_threads=1, **cache)
    assert base.n1 > 0
    assert base.n2 > 0
    assert base.n1 != base.n2
    for n_batch, n_ubatch in ((512, 16), (64, 64), (7, 7), (64, 5)):
        other = record_counts(tiny_f32_path, pairs(), n_threads=1, n_batch=n_batch, n_ubatch=n_ubatch, **cache)
        assert (other.n1, other.n2) == (base.n1, base.n2)
        for one, two in ((base.a1, other.a1), (base.a2, other.a2)):
            assert np.array_equal(one, two), (n_batch, n_ubatch)


def test_a_llama_keeps_its_context(tiny_path: Path) -> None:
    llama = lib().Llama(str(tiny_path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    tokens = llama.tokenize(b"one, two")
    llama.eval(tokens)
    before = np.array(llama.scores[: len(tokens)])
    counts = record_counts(llama, pairs(2), n_threads=1, behaviour="digits")
    assert counts.behaviour == "digits"
    assert np.array_equal(counts.a1, record_counts(tiny_path, pairs(2), n_threads=1).a1)
    assert llama.n_tokens == len(tokens)
    llama.reset()
    llama.eval(tokens)
    assert np.array_equal(np.array(llama.scores[: len(tokens)]), before)
    llama.close()


def text_of(model: Any, tokens: list[int]) -> str:
    return str(model.detokenize(tokens, special=False).decode())


def test_counts_of_two_texts_by_hand(tiny_path: Path, tiny_model: Any) -> None:
    """The target's tokens count at their own place, in every layer, the first and the last included."""
    pair = Pair("p", "a b c d", "d c b a", "c d", "b a")
    counts = record_counts(tiny_path, [pair], n_threads=1)
    identity = identity_of(tiny_path)
    assert counts.identity == identity
    for side, target, a, n in (("a b c d", "c d", counts.a1, counts.n1), ("d c b a", "b a", counts.a2, counts.n2)):
        tokens = tiny_model.tokenize(side.encode(), True, True)
        with Context(tiny_model, capture=True) as context:
            context.decode(tokens)
            expected = np.zeros(identity.shape, np.int64)
            for layer in range(identity.n_layer):
                topk = context.seen[f"ffn_moe_topk-{layer}"][0].reshape(len(tokens), -1)
                for chosen in topk[-n:]:
                    expected[layer, chosen] += 1
        assert text_of(tiny_model, tokens[-n:]).strip() == target
        assert np.array_equal(a, expected)


def test_progress(tiny_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    record_counts(tiny_path, pairs(4), n_threads=1, n_batch=48, progress=lambda *call: calls.append(call))
    assert [total for _, total in calls] == [8] * len(calls)
    assert calls[-1] == (8, 8)
    assert calls == sorted(calls)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"pairs": []}, UsageError, "no pairs"),
        ({"n_batch": 0}, UsageError, "n_batch"),
        ({"n_ctx": 4}, PairsError, "pair 'p0' needs .* n_ctx is 4"),
        ({"pairs": [Pair("q", "x", "y", "x", "y")], "model": "missing.gguf"}, ModelError, "no such file"),
    ],
)
def test_record_counts_refuses(tiny_path: Path, options: dict[str, Any], kind: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {"model": tiny_path, "pairs": pairs(2)} | options
    with pytest.raises(kind, match=words):
        record_counts(arguments.pop("model"), arguments.pop("pairs"), **arguments)


def test_unknown_keywords(tiny_path: Path) -> None:
    call: Callable[..., Any] = record_counts
    with pytest.raises(TypeError, match="n_thread"):
        call(tiny_path, pairs(1), n_thread=1)
