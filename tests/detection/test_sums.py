"""Sums of what the routers compute: against captured logits and weights, and the same whatever is decoded together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ExpertMap, NativeError, Pair, RoutingCounts, record_counts
from steermoe_local.identity import ModelIdentity
from steermoe_local.llama import capi
from steermoe_local.maps.counts import merge_counts
from steermoe_local.maps.routing_sums import MEMBERS, RoutingSums
from tests.native.test_native_oracle import layer_values, weight_rows
from tests.support import oracle, rounding
from tests.support.detecting import CACHE, sums_bytes
from tests.support.low_level import Context, Row, identity_of, native_bias, open_model, random_signs
from tests.support.random_models import DENSE_FIRST, N_VOCAB, OLMOE, RandomModel

BINS = 3


@pytest.fixture(scope="module")
def olmoe(random_model: Any) -> Iterator[tuple[ModelIdentity, Any]]:
    path = random_model(OLMOE)
    model = open_model(path)
    yield identity_of(path), model
    model.close()


def tables_of(recorder: Any, shape: tuple[int, int], n_bins: int = BINS) -> dict[str, Any]:
    found = (np.array(table).reshape(n_bins, shape[0], -1) for table in recorder.sums(n_bins))
    return dict(zip(MEMBERS, found, strict=True))


def expected(
    seen: dict[str, list[Any]], model: RandomModel, bins: list[int], n_bins: int = BINS
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The oracle's sums of captured tensors, rows in the order of the batch, and how far they may be off."""
    raw = "ffn_moe_probs" if model.arch == "gpt-oss" else "ffn_moe_logits"
    last = "ffn_moe_weights_softmax" if model.arch == "gpt-oss" else "ffn_moe_weights_norm"
    last = last if model.norm or model.arch == "gpt-oss" else "ffn_moe_weights"
    widths = dict(zip(MEMBERS, (model.n_expert, 1, model.n_expert), strict=True))
    tables = {name: np.zeros((n_bins, model.n_layer, width)) for name, width in widths.items()}
    allowed = {name: np.zeros((n_bins, model.n_layer, 1)) for name in MEMBERS}
    for layer in range(model.n_dense, model.n_layer):
        z, topk = layer_values(seen, raw, layer), layer_values(seen, "ffn_moe_topk", layer)
        weights = weight_rows(seen, last, layer, model.k)
        for number in range(n_bins):
            mine = np.asarray(bins) == number
            for name, values in zip(MEMBERS, oracle.sums(z[mine], topk[mine], weights[mine]), strict=True):
                tables[name][number, layer] = values
                allowed[name][number, layer] = oracle.sums_allowance(z[mine], weights[mine], name)
    return tables, allowed


@pytest.mark.numeric
@pytest.mark.parametrize("n_ubatch", [64, 16, 3])
@pytest.mark.parametrize("stop", [False, True])
def test_sums_of_captured_tensors(steerable: tuple[RandomModel, Path, Any], n_ubatch: int, stop: bool) -> None:
    """In several decodes and ubatches, stopped behind the last router or not."""
    description, path, model = steerable
    shape = identity_of(path).shape
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, N_VOCAB, 40).tolist()
    bins = rng.integers(-1, BINS, 40).tolist()
    with Context(model, capture=True, n_ubatch=n_ubatch) as context:
        context.decode(tokens[:37])
        for i, token in enumerate(tokens[37:], 37):
            context.decode([token], i)
        wanted, allowed = expected(context.seen, description, bins)
    recorder = capi.NativeRecorder(model.model, BINS, shape, sums=True)
    with Context(model, recorder=recorder, n_ubatch=n_ubatch) as context:
        recorder.bind(context.ctx)
        recorder.set_stop(stop)
        recorder.set_mask(bins[:37])
        context.decode(tokens[:37])
        for i, token in enumerate(tokens[37:], 37):
            recorder.set_mask([bins[i]])
            context.decode([token], i)
        found = tables_of(recorder, shape)
        counts = np.array(recorder.counts()[0]).reshape(BINS, *shape)
    recorder.close()
    for name in MEMBERS:
        assert (np.abs(found[name] - wanted[name]) <= allowed[name]).all(), name
        assert found[name].any(), name
    assert ((found["weights"] > 0) == (counts > 0)).all()


@pytest.mark.numeric
def test_dense_layers_have_no_sums(random_model: Any) -> None:
    path = random_model(DENSE_FIRST)
    model = open_model(path)
    shape = identity_of(path).shape
    recorder = capi.NativeRecorder(model.model, 1, shape, sums=True)
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        recorder.set_mask([0] * 8)
        context.decode(range(8))
        found = tables_of(recorder, shape, 1)
        for name in MEMBERS:
            rows = found[name].any(axis=2)[0]
            assert not rows[: DENSE_FIRST.n_dense].any(), name
            assert rows[DENSE_FIRST.n_dense :].all(), name
    recorder.close()
    model.close()


@pytest.mark.numeric
def test_sums_are_of_logits_before_they_are_steered(olmoe: Any) -> None:
    """Of sequences in one batch, each with a bin of its own: their first layer sees the same, steered or not."""
    shape = (OLMOE.n_layer, OLMOE.n_expert)
    identity_file, model = olmoe
    signs = random_signs(np.random.default_rng(1), OLMOE.n_expert, OLMOE.k, 1, 4)
    recorder = capi.NativeRecorder(model.model, 2, shape, sums=True)
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)
        capi.attach_sequence(context.ctx, 1, native_bias(identity_file, {0: signs}))
        rows: list[Row] = [(token, token, sequence, True) for token in range(9) for sequence in (0, 1)]
        recorder.set_mask([row[2] for row in rows])
        context.decode_rows(rows)
        found = tables_of(recorder, shape, 2)
    recorder.close()
    for name in ("logits", "spread"):
        assert found[name][0, 0].tobytes() == found[name][1, 0].tobytes()
        assert not np.array_equal(found[name][0, 1], found[name][1, 1]), "what follows is another token's"
    assert not np.array_equal(found["weights"][0, 0], found["weights"][1, 0])
    assert not found["weights"][1, 0][signs < 0].any()


@pytest.mark.numeric
def test_several_decodes_and_reset_of_sums(olmoe: Any) -> None:
    shape = (OLMOE.n_layer, OLMOE.n_expert)
    _, model = olmoe
    recorder = capi.NativeRecorder(model.model, BINS, shape, sums=True)
    with Context(model, recorder=recorder) as context:
        recorder.bind(context.ctx)

        def decode(number: int) -> dict[str, Any]:
            context.clear()
            recorder.set_mask([number] * 10)
            context.decode(range(10))
            return tables_of(recorder, shape)

        first = decode(1)
        twice = decode(1)
        third = decode(2)
        for name in MEMBERS:
            # the second time each term is added to another sum: 20 roundings of at most the largest sum
            off = 20 * 2.0**-53 * np.abs(twice[name]).max()
            assert (np.abs(twice[name] - 2 * first[name]) <= off).all()
            assert third[name][:2].tobytes() == twice[name][:2].tobytes()
            assert third[name][2].tobytes() == first[name][1].tobytes()
        recorder.reset()
        assert not any(table.any() for table in tables_of(recorder, shape).values())
        assert not np.array(recorder.counts()[0]).any()
        again = decode(1)
        assert all(again[name].tobytes() == first[name].tobytes() for name in MEMBERS)
        with pytest.raises(NativeError, match="n_bins: 4 of a recorder of 3"):
            recorder.sums(BINS + 1)
    recorder.close()


def test_sums_that_are_not_kept(olmoe: Any) -> None:
    recorder = capi.NativeRecorder(olmoe[1].model, 1, (OLMOE.n_layer, OLMOE.n_expert))
    with pytest.raises(NativeError, match="no sums are kept"):
        recorder.sums()
    recorder.close()


#
# record_counts
#


def sums_of(counts: RoutingCounts) -> RoutingSums:
    assert counts.sums is not None
    return counts.sums


def assert_close(one: RoutingCounts, two: RoutingCounts) -> None:
    """As near as F32 values of the same tokens are in batches of other shapes.

    A layer's logits may be off by `share` of their deviation from their token's mean, each of them, and a weight by
    twice as much as the logits; a squared deviation is off by twice its share.
    """
    mine, theirs = sums_of(one), sums_of(two)
    share = rounding.logits([-1.0, 1.0], **rounding.TINY)
    n_tokens, n_expert = np.array([two.n1, two.n2])[:, None], two.identity.n_expert
    off = share * np.sqrt(theirs.spread / (n_tokens * n_expert))  # of one logit, [2, n_layer]
    total = (n_tokens * off)[:, :, None]
    assert (np.abs(mine.logits - theirs.logits) <= total).all()
    assert (np.abs(mine.weights - theirs.weights) <= 2 * total).all()
    assert (np.abs(mine.spread - theirs.spread) <= (2 * share + share**2) * theirs.spread).all()


def test_of_the_embedded_model(tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    """Prompts alone, together and with their beginnings shared; shards that are merged; twice the same."""
    options: dict[str, Any] = {"n_threads": 1, **CACHE}
    pairs = untied_pairs[:12]
    whole = record_counts(tiny_f32_path, pairs, **options)
    assert sums_bytes(record_counts(tiny_f32_path, pairs, **options).sums) == sums_bytes(whole.sums)
    for other in ({"n_batch": 96}, {"share_prefixes": False}, {"n_batch": 96, "n_ubatch": 32, "share_prefixes": False}):
        assert_close(record_counts(tiny_f32_path, pairs, **options, **other), whole)
    shards = [(f"{i}", record_counts(tiny_f32_path, pairs, **options, shard=(i, 3))) for i in (1, 2, 3)]
    merged = merge_counts(shards)
    assert_close(merged, whole)
    assert merged.n_pairs == whole.n_pairs


def test_they_are_the_means_of_the_tokens(tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    """A token's weights are shares of a softmax, of which the model keeps those of the selected; RD has their signs."""
    counts = record_counts(tiny_f32_path, untied_pairs[:4], n_threads=1, **CACHE)
    found = sums_of(counts)
    shares = found.weights.sum(axis=2) / np.array([[counts.n1], [counts.n2]])
    assert ((shares > 0.25) & (shares <= 1 + 1e-6)).all()
    made = ExpertMap.from_counts(counts)
    assert made.logit is not None
    assert made.weight is not None
    assert np.allclose(made.weight.sum(axis=1), shares[0] - shares[1])
    assert np.allclose(made.logit.sum(axis=1), 0, atol=1e-9)
    # experts that a side uses more have a higher logit there
    busy = np.abs(made.rd) > 0.3
    assert busy.sum() > 10
    assert (np.sign(made.logit[busy]) == np.sign(made.rd[busy])).mean() > 0.9
    assert (np.sign(made.weight[busy]) == np.sign(made.rd[busy])).mean() > 0.9


def test_a_router_that_overflows_has_no_sums(
    tiny_path: Path, untied_pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts are kept all the same."""
    from steermoe_local.detection.decoding import GroupDecoder

    plain = GroupDecoder.sums

    def overflowing(self: GroupDecoder, n_bins: int) -> Any:
        logits, spread, weights = plain(self, n_bins)
        logits[0, -1, 0], spread[0, -1] = -np.inf, np.nan
        return logits, spread, weights

    monkeypatch.setattr(GroupDecoder, "sums", overflowing)
    counts = record_counts(tiny_path, untied_pairs[:2], n_threads=1)
    assert counts.sums is None
    assert counts.a1.any()
    assert ExpertMap.from_counts(counts).logit is None
