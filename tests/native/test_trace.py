"""Traces: the experts, weights and logits of single tokens, against captured tensors and against counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local.errors import NativeError
from steermoe_local.llama import capi
from steermoe_local.llama.signatures import lib as native
from tests.native.test_native_oracle import layer_values, weight_rows
from tests.native.test_token_row_calls import REFUSED, aborting, decode, fails
from tests.support import oracle
from tests.support.low_level import F32, Context, Row, identity_of, lib, native_bias, open_model, random_signs
from tests.support.random_models import DENSE_FIRST, N_VOCAB, OLMOE, RandomModel, write_random_model
from tests.support.sequence_steering import Loaded, allowance, attach, steerings, tokens

pytestmark = pytest.mark.numeric

STATE = 6  # steermoe.h: STEERMOE_ERR_STATE
N = 33
TOKENS = np.random.default_rng(3).integers(0, N_VOCAB, N).tolist()


def final_weights(model: RandomModel) -> str:
    return (
        "ffn_moe_weights_softmax"
        if model.arch == "gpt-oss"
        else "ffn_moe_weights_norm"
        if model.norm
        else "ffn_moe_weights"
    )


def check_absent(trace: capi.Trace, token: int, layer: int) -> None:
    """Nothing of this token in this layer."""
    assert (trace.experts[token, layer] == -1).all()
    assert trace.weights is None or (trace.weights[token, layer] == 0).all()
    assert trace.logits is None or np.isnan(trace.logits[token, layer]).all()


@pytest.mark.parametrize("n_ubatch", [512, 16, 3])
@pytest.mark.parametrize("stop", [False, True])
@pytest.mark.parametrize("steered", [False, True])
def test_traces_of_captured_tensors(
    steerable: tuple[RandomModel, Path, Any], n_ubatch: int, stop: bool, steered: bool
) -> None:
    """Bit for bit, in the order of the selection; logits are those before the edit."""
    description, path, model = steerable
    identity, rng = identity_of(path), np.random.default_rng(3)
    signs = {i: random_signs(rng, description.n_expert, description.k, 1, 4) for i in range(description.n_layer)}
    wanted = rng.integers(0, 2, N).astype(bool)
    with Context(model, capture=True, n_ubatch=n_ubatch) as context:
        if steered:
            capi.attach(context.ctx, native_bias(identity, signs))
        context.decode(TOKENS)
        seen = context.seen
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)
    with Context(model, recorder=recorder, n_ubatch=n_ubatch) as context:
        recorder.bind(context.ctx)
        recorder.set_stop(stop)
        if steered:
            capi.attach(context.ctx, native_bias(identity, signs))
        for weights, logits in ((True, True), (False, False), (True, False), (False, True)):
            context.clear()
            recorder.set_trace(wanted, weights=weights, logits=logits)
            context.decode(TOKENS)
            trace = recorder.trace()
            assert (trace.weights is not None, trace.logits is not None) == (weights, logits)
            raw = "ffn_moe_logits"
            if description.arch == "gpt-oss":
                raw = "ffn_moe_logits_biased" if steered else "ffn_moe_probs"
            for layer in range(description.n_layer):
                topk = layer_values(seen, "ffn_moe_topk", layer)
                assert np.array_equal(trace.experts[:, layer], topk[wanted]), f"layer {layer}"
                if trace.weights is not None:
                    mixed = weight_rows(seen, final_weights(description), layer, description.k)
                    assert trace.weights[:, layer].tobytes() == mixed[wanted].tobytes(), f"layer {layer}"
                if trace.logits is not None:
                    z = layer_values(seen, raw, layer)
                    assert trace.logits[:, layer].tobytes() == z[wanted].tobytes(), f"layer {layer}"
    recorder.close()


@pytest.mark.parametrize("sums", [False, True])
def test_counts_and_traces_are_independent(olmoe: Loaded, sums: bool) -> None:
    """Tokens in both, in either and in neither: counts and sums as without a trace, traces as without a mask."""
    identity, model = olmoe
    rng = np.random.default_rng(5)
    bins, wanted = rng.integers(-1, 2, N), rng.integers(0, 2, N).astype(bool)
    assert len({(b >= 0, w) for b, w in zip(bins.tolist(), wanted.tolist(), strict=True)}) == 4

    def record(mask: bool, traced: npt.NDArray[np.bool_] | None, n_ubatch: int = 10) -> tuple[Any, Any]:
        recorder = capi.NativeRecorder(model.model, 2, identity.shape, sums=sums)
        with Context(model, recorder=recorder, n_ubatch=n_ubatch) as context:
            recorder.bind(context.ctx)
            if mask:
                recorder.set_mask(bins.tolist())
            if traced is not None:
                recorder.set_trace(traced, weights=True, logits=True)
            context.decode(TOKENS)
            trace = recorder.trace() if traced is not None else None
            tables = [np.array(table) for table in (*recorder.counts(), *(recorder.sums() if sums else ()))]
        recorder.close()
        return tables, trace

    alone, _ = record(mask=True, traced=None)
    together, trace = record(mask=True, traced=wanted)
    assert [table.tobytes() for table in together] == [table.tobytes() for table in alone]
    none, of_trace = record(mask=False, traced=wanted)
    assert not any(table.any() for table in none)
    for table in ("experts", "weights", "logits"):
        assert getattr(trace, table).tobytes() == getattr(of_trace, table).tobytes()
    # a trace of the counted tokens says what was counted
    _, counted = record(mask=True, traced=bins >= 0)
    counts = alone[0].reshape(2, *identity.shape)
    for number in (0, 1):
        mine = counted.experts[bins[bins >= 0] == number]
        for layer in range(identity.n_layer):
            found = np.bincount(mine[:, layer].ravel(), minlength=identity.n_expert)
            assert np.array_equal(found, counts[number, layer])


def test_the_last_layer_routes_outputs(olmoe: Loaded) -> None:
    """What is no output has no experts there; a counted one would be a failure, a traced one is not."""
    identity, model = olmoe
    outputs = [i % 4 == 1 for i in range(N)]
    wanted = np.arange(N) % 3 != 0
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)
    for stop in (False, True):
        with Context(model, recorder=recorder, n_ubatch=10) as context:
            recorder.bind(context.ctx)
            recorder.set_stop(stop)
            recorder.set_trace([True] * N, weights=True, logits=True)
            context.decode_rows([(t, i, 0, True) for i, t in enumerate(TOKENS)])
            whole = recorder.trace()
            context.clear()
            recorder.set_trace(wanted, weights=True, logits=True)
            recorder.set_mask([0 if output else -1 for output in outputs])
            context.decode_rows([(t, i, 0, outputs[i]) for i, t in enumerate(TOKENS)])
            trace = recorder.trace()
            recorder.counts()
        for place, token in enumerate(np.flatnonzero(wanted).tolist()):
            for layer in range(identity.n_layer):
                if layer == identity.n_layer - 1 and not outputs[token]:
                    check_absent(trace, place, layer)
                else:
                    assert np.array_equal(trace.experts[place, layer], whole.experts[token, layer])
    recorder.close()


def test_layers_without_a_router(random_model: Any) -> None:
    path = random_model(DENSE_FIRST)
    model = open_model(path)
    recorder = capi.NativeRecorder(model.model, 1, identity_of(path).shape)
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        recorder.set_trace([True] * N, weights=True, logits=True)
        context.decode(TOKENS)
        trace = recorder.trace()
    recorder.close()
    model.close()
    assert trace.experts.shape == (N, DENSE_FIRST.n_layer, DENSE_FIRST.k)
    assert trace.weights is not None
    for token in range(N):
        check_absent(trace, token, 0)
        assert (trace.experts[token, 1:] >= 0).all()
        assert (trace.weights[token, 1:] > 0).all()


def test_layers_that_select_fewer(random_model: Any, tmp_path: Path) -> None:
    """A file may say a top-k for each layer: the shape is the greatest, and places that are not used are empty.

    For olmoe llama.cpp takes that of the first layer for all. The sum behind the experts takes each layer's own and
    reads past their end where it is larger, so that layer is the last: nothing is selected behind it.
    """
    source, path, used, k = random_model(OLMOE), tmp_path / "model.gguf", [2, 2, 2, 5], 2
    reader = GGUFReader(source)
    writer = GGUFWriter(path, "olmoe")
    for name, entry in reader.fields.items():
        if name == "olmoe.expert_used_count":
            writer.add_key_value(name, used, GGUFValueType.ARRAY, GGUFValueType.UINT32)
        elif not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, entry.contents(), entry.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = open_model(path)
    with Context(model, capture=True) as context:
        context.decode(TOKENS)
        seen = context.seen
    recorder = capi.NativeRecorder(model.model, 1, (4, 16))
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        recorder.set_trace([True] * N, weights=True)
        context.decode(TOKENS)
        trace = recorder.trace()
    recorder.close()
    model.close()
    assert trace.experts.shape == (N, 4, 5)
    assert trace.weights is not None
    for layer in range(4):
        assert np.array_equal(trace.experts[:, layer, :k], layer_values(seen, "ffn_moe_topk", layer))
        assert trace.weights[:, layer, :k].tobytes() == weight_rows(seen, "ffn_moe_weights", layer, k).tobytes()
        assert (trace.experts[:, layer, k:] == -1).all()
        assert not trace.weights[:, layer, k:].any()


def test_a_trace_is_of_one_decode(olmoe: Loaded) -> None:
    """It stays until the next is asked for, also over decodes without one; and a reset forgets it."""
    identity, model = olmoe
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)

    def unavailable(message: str) -> None:
        with pytest.raises(NativeError, match=message) as caught:
            recorder.trace()
        assert caught.value.code == STATE

    with Context(model, recorder=recorder) as context:
        unavailable("no trace was asked for")
        recorder.set_trace([True] * 4)  # before it is bound
        recorder.bind(context.ctx)
        unavailable("computed 0 of the 4 tokens")
        context.decode(TOKENS[:4])
        first = recorder.trace().experts
        context.decode(TOKENS[4:12], 4)
        assert np.array_equal(recorder.trace().experts, first), "of a later decode"
        recorder.set_trace([False, True, False])
        unavailable("computed 0 of the 1 tokens")
        context.decode(TOKENS[12:15], 12)
        (second,) = recorder.trace().experts
        recorder.set_trace([False] * 3)
        context.decode(TOKENS[15:18], 15)
        assert recorder.trace().experts.shape == (0, identity.n_layer, identity.n_expert_used)
        recorder.set_trace([])
        unavailable("no trace was asked for")
        recorder.set_trace([True] * 5)  # more than the batch has
        context.decode(TOKENS[18:21], 18)
        unavailable("computed 3 of the 5 tokens")
        context.decode(TOKENS[21:26], 21)
        unavailable("computed 3 of the 5 tokens")
        recorder.set_trace([True])
        context.decode(TOKENS[26:28], 26)
        recorder.reset()
        unavailable("no trace was asked for")
    with Context(model, capture=True) as context:
        for start, end in ((0, 4), (4, 12), (12, 15)):
            context.decode(TOKENS[start:end], start)
        for layer in range(identity.n_layer):
            topk = layer_values(context.seen, "ffn_moe_topk", layer)
            assert np.array_equal(first[:, layer], topk[:4])
            assert np.array_equal(second[layer], topk[13])
    recorder.close()


@pytest.mark.parametrize("way", ["refused", "aborted"])
def test_a_decode_that_fails_leaves_no_trace(olmoe: Loaded, way: str) -> None:
    """Of what is missing the next decode must not give its own tokens; so with counts."""
    identity, model = olmoe
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)
    with Context(model, recorder=recorder, n_ubatch=4) as context:
        recorder.bind(context.ctx)
        recorder.set_trace([True] * 8)
        recorder.set_mask([0] * 8)
        rows: list[Row] = [(t, i, 0, True) for i, t in enumerate(TOKENS[:8])]
        if way == "refused":
            rows[5] = (10**6, *rows[5][1:])
        callback = aborting(context, 5) if way == "aborted" else None
        with fails(REFUSED if way == "refused" else 2):
            decode(context, rows)
        if callback is not None:
            lib().llama_set_abort_callback(context.ctx, type(callback)(), None)
        context.clear()
        context.decode(TOKENS[:8])
        with pytest.raises(NativeError, match="of the 8 tokens") as caught:
            recorder.trace()
        assert caught.value.code == STATE
        _, counted = recorder.counts()
        assert not any(counted), "tokens of another decode were counted"
    recorder.close()


def test_values_that_were_not_asked_for(olmoe: Loaded) -> None:
    identity, model = olmoe
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)
    functions, reals = native(), np.zeros(2 * identity.n_layer * 16, np.float32)
    pointer = reals.ctypes.data_as(functions.steermoe_recorder_trace.argtypes[2])
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        recorder.set_trace([True] * 2, weights=True)
        context.decode(TOKENS[:2])
        assert functions.steermoe_recorder_trace(recorder._handle, None, None, None) == 0
        assert functions.steermoe_recorder_trace(recorder._handle, None, pointer, None) == 0
        assert functions.steermoe_recorder_trace(recorder._handle, None, None, pointer) == STATE
        assert b"the trace keeps no such values" in functions.steermoe_last_error()
        recorder.set_trace([True] * 2, logits=True)
        context.decode(TOKENS[2:4], 2)
        assert functions.steermoe_recorder_trace(recorder._handle, None, None, pointer) == 0
        assert functions.steermoe_recorder_trace(recorder._handle, None, pointer, None) == STATE
        for status in (
            functions.steermoe_recorder_trace(None, None, None, None),
            functions.steermoe_recorder_set_trace(None, None, 0, 0),
            functions.steermoe_recorder_set_trace(recorder._handle, None, 3, 0),
            functions.steermoe_recorder_set_trace(recorder._handle, None, -1, 0),
        ):
            assert status == 5  # STEERMOE_ERR_ARGUMENT
    recorder.close()


def test_nothing_of_a_warm_up_run(olmoe: Loaded) -> None:
    """It routes every token through all experts."""
    identity, model = olmoe
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        lib().llama_set_warmup(context.ctx, True)
        recorder.set_trace([True] * 2, weights=True, logits=True)
        context.decode(TOKENS[:2])
        trace = recorder.trace()
        lib().llama_set_warmup(context.ctx, False)
    recorder.close()
    for token in range(2):
        for layer in range(identity.n_layer):
            check_absent(trace, token, layer)


def test_the_memory_is_that_of_one_decode(tmp_path: Path) -> None:
    """Traces of many decodes, each of a quarter of a megabyte: kept, they would be four times what is allowed."""
    wide = RandomModel("olmoe", n_layer=4, n_expert=256, k=8)
    model = open_model(write_random_model(tmp_path / "model.gguf", wide))
    recorder = capi.NativeRecorder(model.model, 1, (wide.n_layer, wide.n_expert))
    process, n_decodes, n_tokens = psutil.Process(), 480, 64
    one_trace = n_tokens * wide.n_layer * wide.n_expert * 4
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        recorder.set_stop(True)

        def decode(times: int) -> None:
            for _ in range(times):
                context.clear()
                recorder.set_trace([True] * n_tokens, weights=True, logits=True)
                context.decode(range(n_tokens))
                recorder.trace()

        decode(40)  # what is allocated once
        before = process.memory_info().rss
        decode(n_decodes)
        assert process.memory_info().rss - before < n_decodes * one_trace / 4
    recorder.close()
    model.close()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(1, 24), st.booleans(), st.randoms())
def test_any_layout(olmoe: Loaded, lengths: list[int], n_ubatch: int, kv_unified: bool, random: Any) -> None:
    """Of sequences, ubatches, outputs and wanted tokens: each token's values are those it has alone."""
    identity, model = olmoe
    under = steerings(identity)[: len(lengths)]
    batch: list[Row] = []
    for sequence, n in enumerate(lengths):
        batch += [(t, i, sequence, random.random() < 0.5) for i, t in enumerate(tokens(sequence, n))]
    batch = sorted(batch, key=lambda row: row[1]) if random.random() < 0.5 else batch
    batch[-1] = (*batch[-1][:3], True)
    wanted = [random.random() < 0.6 for _ in batch]
    recorder = capi.NativeRecorder(model.model, 1, identity.shape)

    def trace_of(rows: list[Row], which: list[bool], given: Any, **options: Any) -> capi.Trace:
        with Context(model, recorder=recorder, type_kv=F32, n_ctx=2048, **options) as context:
            recorder.bind(context.ctx)
            attach(context, identity, given)
            recorder.set_trace(which, weights=True, logits=True)
            context.decode_rows(rows)
            return recorder.trace()

    found = trace_of(batch, wanted, under, kv_unified=kv_unified, n_ubatch=n_ubatch)
    assert len(found.experts) == sum(wanted)
    places = np.cumsum(wanted) - 1
    for sequence in range(len(lengths)):
        mine = [i for i, row in enumerate(batch) if row[2] == sequence]
        rows: list[Row] = [(batch[i][0], batch[i][1], 0, batch[i][3]) for i in mine]
        alone = trace_of(rows, [True] * len(mine), [under[sequence]])
        assert found.logits is not None
        assert alone.logits is not None
        assert found.weights is not None
        for place, i in enumerate(mine):
            if not wanted[i]:
                continue
            z, theirs = found.logits[places[i]], alone.logits[place]
            routed = identity.n_layer if batch[i][3] else identity.n_layer - 1
            assert np.isnan(z[routed:]).all()
            np.testing.assert_allclose(z[:routed], theirs[:routed], rtol=0, atol=allowance(theirs[:routed]))
            for layer in range(routed):
                edited = under[sequence].logits(z[layer][None], layer)
                experts = found.experts[places[i], layer][None]
                assert sorted(experts[0]) == sorted(oracle.chosen(edited, OLMOE.k)[0])
                weights = oracle.weights(edited, experts, "softmax", norm=False)
                off = oracle.weight_allowance(edited, experts, "softmax")
                assert (np.abs(found.weights[places[i], layer] - weights) <= off).all()
    recorder.close()
