"""500 pairs: the counts of transformers and of `record_counts` are the same, and what quantizing changes.

The 360 pairs of the embedded model, and 140 of our own making from them that are longer: several turns, a system
message, plain texts, the same target on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.detection.recorder import record_counts
from steermoe_local.llama import capi
from steermoe_local.maps.counts import RoutingCounts
from steermoe_local.maps.scores import risk_difference
from steermoe_local.model_files.model_info import model_info
from steermoe_local.pairs.pairs import Message, Pair, load_pairs
from tests.integration.reference import cases, native
from tests.integration.reference.hf_olmoe import HfOlmoe

pytestmark = pytest.mark.reference

MODEL = native.data_file("tiny-moe.gguf")
N_PAIRS, N_MADE = 500, 140
QUANTIZED = {"Q8_0": 7, "Q4_0": 2}  # llama.h: enum llama_ftype
EVERY = 5  # of which pairs single tokens are compared


@dataclass
class PerPair:
    """Counts of each pair, as `record_counts` hands them out."""

    ids: list[str] = field(default_factory=list)
    a: list[Any] = field(default_factory=list)  # [2, layers, experts]
    n: list[Any] = field(default_factory=list)  # [2]

    def append(self, pair_ids: Sequence[str], a: Any, n: Any) -> None:
        self.ids += pair_ids
        self.a += list(a.astype(np.int64))
        self.n += list(n)


def made_pair(number: int, one: Pair, two: Pair) -> Pair:
    """A longer pair of two; four kinds in turn."""
    first, second = one.positive, two.negative
    assert not isinstance(first, str)
    assert not isinstance(second, str)
    assert not isinstance(two.positive, str)
    kind, name = number % 4, f"made-{number}"
    if kind == 0:  # a talk of two turns
        return Pair(name, first + two.positive, first + second, two.positive_target, two.negative_target)
    if kind == 1:
        system = (Message("system", "Answer as briefly as you can."),)
        return Pair(name, system + two.positive, system + second, two.positive_target, two.negative_target)
    question = first[0].content
    if kind == 2:  # the same target, behind another beginning or behind the same one
        sides = (first, (Message("system", "Be kind."), *first)) if number % 8 == 2 else (first, first)
        return Pair(name, sides[0], sides[1], question, question)
    return Pair(name, f"{question} {one.positive_target}", f"{question} {two.negative_target}", question, question)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    found = [pair for name in cases.BEHAVIOURS for pair in load_pairs(native.data_file(f"{name}.pairs.jsonl"))]
    found += [made_pair(i, found[(i * 7) % 360], found[(i * 11 + 5) % 360]) for i in range(N_MADE)]
    assert len(found) == len({pair.id for pair in found}) == N_PAIRS
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("routing")


@pytest.fixture(scope="module")
def hf(folder: Path) -> HfOlmoe:
    return HfOlmoe(MODEL, folder)


@pytest.fixture(scope="module")
def f32_model(folder: Path) -> Path:
    return native.write_f32(MODEL, folder / "f32.gguf")


def tokens_of(hf: HfOlmoe, side: Any, target: str) -> tuple[list[int], list[int]]:
    text = side if isinstance(side, str) else hf.render([message.to_dict() for message in side])
    return hf.target(text, target)


def record(model: Path, pairs: list[Pair], **options: Any) -> tuple[RoutingCounts, PerPair]:
    sink = PerPair()
    in_f32 = {"type_k": native.F32, "type_v": native.F32, "flash_attn": False}
    counts = record_counts(model, pairs, n_threads=1, per_pair=lambda *_: sink, **in_f32, **options)
    assert sink.ids == [pair.id for pair in pairs]
    return counts, sink


@pytest.fixture(scope="module")
def ours(f32_model: Path, pairs: list[Pair]) -> tuple[RoutingCounts, PerPair]:
    return record(f32_model, pairs)


def test_the_same_counts(
    hf: HfOlmoe, pairs: list[Pair], ours: tuple[RoutingCounts, PerPair], record_property: pytest.RecordProperty
) -> None:
    """Pair by pair, side by side, layer by layer. Only where two experts all but tie may float noise decide."""
    counts, mine = ours
    total = np.zeros((2, hf.n_layer, hf.n_expert), np.int64)
    n_tokens, n_ties, n_different = 0, 0, 0
    for index, pair in enumerate(pairs):
        for side, (messages, target) in enumerate(pair.sides()):
            tokens, places = tokens_of(hf, messages, target)
            run = hf.run(tokens)
            theirs = np.stack(
                [np.bincount(run.selected[layer, places].ravel(), minlength=hf.n_expert) for layer in range(hf.n_layer)]
            )
            ties = (run.margin[:, places] < native.NEAR_TIE).sum(axis=1)
            assert mine.n[index][side] == len(places), f"{pair.id}: other target tokens"
            difference = np.abs(mine.a[index][side] - theirs)
            assert (difference <= ties[:, None]).all(), f"{pair.id}, side {side}: {difference.sum()} counts differ"
            n_tokens += len(places)
            n_ties += int(ties.sum())
            n_different += int(difference.sum())
            total[side] += theirs
    selections = int(total.sum())
    print(
        f"{len(pairs)} pairs, {n_tokens} target tokens, {selections} selections: {n_different} counts differ, "
        f"{n_ties} near ties"
    )
    record_property("counts_that_differ", n_different)
    assert np.abs(np.stack([counts.a1, counts.a2]) - total).sum() <= n_different
    assert n_tokens == counts.n1 + counts.n2


def test_sharing_and_batches_change_nothing(
    f32_model: Path, pairs: list[Pair], ours: tuple[RoutingCounts, PerPair]
) -> None:
    """The decoder's ways to put prompts together, against the one without any: F32, so that only ties may flip."""
    for options in ({"share_prefixes": False}, {"n_batch": 2048}, {"n_batch": 64, "n_ubatch": 32}):
        _, other = record(f32_model, pairs, **options)
        assert np.array_equal(np.array(other.n), np.array(ours[1].n))
        different = np.abs(np.array(other.a) - np.array(ours[1].a)).sum()
        print(f"{options}: {different} counts differ")
        assert different <= 4


def quantize(source: Path, target: Path, kind: str) -> Path:
    lib = capi.llama_cpp()
    params = lib.llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, QUANTIZED[kind]
    assert lib.llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return target


def choices(model: Path, prompts: list[tuple[list[int], list[int]]]) -> np.ndarray:
    """Experts of every target token, [tokens, layers, k] ascending."""
    llama = native.load(model, n_ctx=16)
    identity = model_info(model).require_moe()
    found = [native.selected(llama, tokens, None, identity.shape)[:, places] for tokens, places in prompts]
    llama.close()
    return np.concatenate(found, axis=1).transpose(1, 0, 2)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_what_quantizing_changes(
    hf: HfOlmoe,
    folder: Path,
    f32_model: Path,
    pairs: list[Pair],
    ours: tuple[RoutingCounts, PerPair],
    kind: str,
    record_property: pytest.RecordProperty,
) -> None:
    """It is reported, and within bounds that a mistake in the recorder would break."""
    quantized = quantize(f32_model, folder / f"{kind}.gguf", kind)
    counts, _ = record(quantized, pairs)
    assert (counts.n1, counts.n2) == (ours[0].n1, ours[0].n2)
    worst = 0.0
    for number in range(len(cases.BEHAVIOURS)):
        part = pairs[number * 120 : number * 120 + 120]
        rd = [risk_difference(record(model, part)[0]) for model in (f32_model, quantized)]
        worst = max(worst, float(np.abs(rd[0] - rd[1]).max()))
    prompts = [tokens_of(hf, *side) for pair in pairs[::EVERY] for side in pair.sides()]
    one, two = choices(f32_model, prompts), choices(quantized, prompts)
    kept = (one[..., :, None] == two[..., None, :]).any(axis=-1)
    other = 1 - float(kept.mean())
    tokens = 1 - float(kept.all(axis=-1).mean())
    print(
        f"{kind}: {other:.2%} of {kept.size} choices differ (in {tokens:.2%} of the layers' tokens); "
        f"largest |RD difference| {worst:.4f} over three behaviours"
    )
    record_property("choices_that_differ", other)
    record_property("largest_rd_difference", worst)
    bounds = {"Q8_0": (0.02, 0.1), "Q4_0": (0.1, 0.4)}[kind]
    assert 0 < other < bounds[0]
    assert worst < bounds[1]
