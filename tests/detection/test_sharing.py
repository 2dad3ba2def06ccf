"""Groups of prompts with a shared beginning: they count what single prompts count, on every kind of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import (
    ModelError,
    Pair,
    record_counts,
)
from steermoe_local.detection.decoding import ContextOptions, GroupDecoder, can_share, is_causal
from steermoe_local.detection.grouping import Group, GroupBuilder
from steermoe_local.detection.recording_options import RecordingProgress
from steermoe_local.llama.rendering import Prompt
from tests.support.architectures import widen, write_upstream
from tests.support.detecting import CACHE, same, text_pairs
from tests.support.low_level import identity_of, open_model
from tests.support.near_ties import near_ties_of_pairs
from tests.support.paths import BUILD
from tests.support.random_models import OLMOE

#
# groups of prompts
#


@st.composite
def prompts(draw: st.DrawFn) -> list[Prompt]:
    """An even number of prompts over few tokens, so that many begin alike; targets anywhere."""
    found = []
    for _ in range(2 * draw(st.integers(1, 6))):
        tokens = draw(st.lists(st.integers(0, 2), min_size=1, max_size=9))
        places = draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1))
        found.append(Prompt(tokens, sorted(places)))
    return found


def routed(before: Sequence[int]) -> int:
    """A stand-in for a model: the expert of a token depends on it and on all tokens before it."""
    return hashlib.sha256(bytes(before)).digest()[0] % 7


def memory_of(group: Group, kept: Sequence[int]) -> list[list[int]]:
    """Decode a group by llama.cpp's rules: each sequence's tokens, and the experts counted for it by bins."""
    held = [list(kept[: group.n_kept]) for _ in range(group.n_prompts)]
    counters = np.zeros((len(group.members), 7), np.int64)
    start = 0
    for row, end in enumerate(group.ends):
        sequences = group.sequences[start:end].tolist()
        start = int(end)
        assert sequences, "a row that is nobody's"
        assert sequences == sorted(set(sequences))
        before = held[sequences[0]]
        # all of a row's sequences must have come to the same place by the same tokens
        assert all(held[sequence] == before for sequence in sequences)
        assert group.positions[row] == len(before)
        after = [*before, int(group.tokens[row])]
        for sequence in sequences:
            held[sequence] = after
        if group.bins[row] >= 0:
            counters[group.bins[row], routed(after)] += 1
    assert start == len(group.sequences)
    counts = [counters[group.members[:, prompt]].sum(axis=0).tolist() for prompt in range(group.n_prompts)]
    return [[*tokens, *count] for tokens, count in zip(held, counts, strict=True)]


@settings(max_examples=300)
@given(
    prompts(), st.integers(1, 30), st.integers(2, 12), st.integers(3, 20), st.lists(st.integers(0, 2)), st.booleans()
)
def test_groups_count_what_single_prompts_count(
    given_prompts: list[Prompt], n_rows: int, n_prompts: int, n_bins: int, kept: list[int], share: bool
) -> None:
    """Whatever is shared, each prompt is decoded as it is and gets the counts that it has alone, bit for bit."""
    kept = kept if share else []
    builder = GroupBuilder(n_rows=n_rows, n_prompts=n_prompts, n_bins=n_bins, kept=kept, share=share)
    groups: list[tuple[Group, list[Prompt]]] = []
    members: list[Prompt] = []
    for first in range(0, len(given_prompts), 2):
        pair = given_prompts[first : first + 2]
        if not builder.add(pair):
            groups.append((builder.build(), members))
            builder.clear()
            members = []
            assert builder.add(pair), "an empty group takes any pair"
        members = members + pair
    groups.append((builder.build(), members))
    assert sum(len(part) for _, part in groups) == len(given_prompts)
    for group, part in groups:
        assert group.n_prompts == len(part) <= n_prompts
        assert len(group.members) <= n_bins
        assert len(group.tokens) <= n_rows or len(part) == 2
        assert group.members.any(axis=1).all(), "a counter for nobody"
        if not share:
            assert len(group.tokens) == sum(len(prompt.tokens) for prompt in part)
        expected = []
        for prompt in part:
            count = [0] * 7
            for place in prompt.target:
                count[routed(prompt.tokens[: place + 1])] += 1
            expected.append([*prompt.tokens, *count])
        assert memory_of(group, kept) == expected


def test_a_group_shares_all_that_it_can() -> None:
    builder = GroupBuilder(n_rows=100, n_prompts=8, n_bins=16, kept=[1, 2, 3])
    assert builder.add([Prompt([1, 2, 3, 4, 5], [4]), Prompt([1, 2, 3, 4, 6], [4])])
    assert builder.add([Prompt([1, 2, 3, 4, 5, 7], [5]), Prompt([1, 2, 9], [2])])
    group = builder.build()
    assert group.n_kept == 2, "the last prompt goes another way at the third token"
    assert group.tokens.tolist() == [3, 4, 5, 6, 7, 9]
    assert group.positions.tolist() == [2, 3, 4, 4, 5, 2]


#
# the same counts
#


@pytest.mark.parametrize("n_batch", [512, 48])
def test_sharing_does_not_change_the_counts(tiny_f32_path: Path, untied_pairs: list[Pair], n_batch: int) -> None:
    """The shared path decodes less and counts the same."""
    seen: dict[bool, list[RecordingProgress]] = {True: [], False: []}
    shared, plain = (
        record_counts(
            tiny_f32_path,
            untied_pairs,
            n_threads=1,
            n_batch=n_batch,
            share_prefixes=share,
            on_batch=seen[share].append,
            **CACHE,
        )
        for share in (True, False)
    )
    assert (shared.n1, shared.n2, shared.n_pairs) == (plain.n1, plain.n2, plain.n_pairs)
    assert same(shared, plain)
    last, last_plain = seen[True][-1], seen[False][-1]
    assert last.n_tokens == last_plain.n_tokens == last_plain.n_decoded
    assert last.n_decoded < 0.7 * last.n_tokens
    assert last.n_done == last.n_total == len(untied_pairs)


def test_targets_in_a_shared_beginning_count_for_both_sides(tiny_path: Path, tiny_model: Any) -> None:
    """The same target at the same place of both sides is computed once and counted twice."""
    pair = Pair("p", "one two three, four", "one two three, five", "two three", "two three")
    counts = record_counts(tiny_path, [pair], n_threads=1)
    assert counts.n1 == counts.n2 > 1
    assert np.array_equal(counts.a1, counts.a2)
    alone = record_counts(tiny_path, [pair], n_threads=1, share_prefixes=False)
    assert same(counts, alone)


def test_pairs_longer_than_a_batch(tiny_f32_path: Path) -> None:
    """They are decoded in pieces; both sides at once where the context has room, else one after the other."""
    story = "The cat saw a mouse. " * 12
    texts = [Pair(f"p{i}", f"{story}{i} {'x ' * i}a b", f"{story}{i} c", "a b", "c") for i in range(3)]
    assert near_ties_of_pairs(tiny_f32_path, texts) == 0
    base = record_counts(tiny_f32_path, texts, n_threads=1, **CACHE)
    longest = 200
    for options in ({"n_batch": 32}, {"n_batch": 32, "n_ctx": longest}, {"n_batch": 7, "n_ubatch": 5}, {"n_batch": 1}):
        other = record_counts(tiny_f32_path, texts, n_threads=1, **CACHE, **options)
        assert same(other, base), options


def test_per_pair_counts(tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    """Each pair's counts are those of a run with this pair alone."""

    class Sink:
        def __init__(self) -> None:
            self.ids: list[str] = []
            self.a: list[Any] = []
            self.n: list[Any] = []

        def append(self, pair_ids: Sequence[str], a: Any, n: Any) -> None:
            self.ids += pair_ids
            self.a += list(a)
            self.n += list(n)

    sink = Sink()
    total = record_counts(tiny_f32_path, untied_pairs, n_threads=1, per_pair=lambda identity, digest: sink, **CACHE)
    assert sink.ids == [pair.id for pair in untied_pairs]
    assert np.array_equal(np.sum(sink.a, axis=0, dtype=np.int64), np.stack([total.a1, total.a2]))
    assert np.sum(sink.n, axis=0).tolist() == [total.n1, total.n2]
    for place in (0, 5, 20, -1):
        alone = record_counts(tiny_f32_path, [untied_pairs[place]], n_threads=1, **CACHE)
        assert sink.n[place].tolist() == [alone.n1, alone.n2]
        assert np.array_equal(sink.a[place], np.stack([alone.a1, alone.a2]))


# ways to keep memory: plain, sliding window, compressed (MLA), sparse, with several positions a token; own states
@pytest.mark.parametrize(
    ("arch", "shares"),
    [
        *((arch, True) for arch in ("olmoe", "gpt-oss", "llama4", "deepseek2", "deepseek32", "qwen3vlmoe")),
        *((arch, False) for arch in ("qwen3next", "lfm2moe", "minimax-01", "deepseek4", "llada-moe")),
    ],
)
def test_every_kind_of_memory(tool: Any, tmp_path: Path, arch: str, shares: bool) -> None:
    """Prompts together, with what they share where that is right, count what each counts alone."""
    tool("test-llama-archs", "-h")  # skips or fails when it is not built
    (path,) = write_upstream(BUILD / "bin" / "test-llama-archs", tmp_path, arch)
    model = open_model(widen(path, tmp_path / "wide.gguf"))
    shape = identity_of(tmp_path / "wide.gguf").shape
    rng = np.random.default_rng(4)
    begin = rng.integers(0, 64, 10).tolist()
    members = []
    for _ in range(3):
        middle = rng.integers(0, 64, 5).tolist()
        for _ in range(2):
            tokens = [*begin, *middle, *rng.integers(0, 64, rng.integers(2, 6)).tolist()]
            members.append(Prompt(tokens, list(range(len(begin) + 4, len(tokens)))))

    def counted(at_once: int, share: bool, n_batch: int, n_ubatch: int) -> Any:
        options = ContextOptions(n_batch, n_ubatch, 1, type_k=0, type_v=0)
        found = []
        with GroupDecoder(model, shape, options) as decoder:
            decoder.kept = begin if share else ()
            builder = GroupBuilder(n_rows=n_batch, n_prompts=9, n_bins=18, kept=decoder.kept, share=share)
            for first in range(0, len(members), at_once):
                builder.clear()
                assert builder.add(members[first : first + at_once])
                group = builder.build()
                counts, _ = decoder.count(group)
                found += [counts[group.members[:, prompt]].sum(axis=0) for prompt in range(group.n_prompts)]
        return np.stack(found)

    assert can_share(model) == shares
    alone = counted(1, False, 128, 128)
    assert alone.any()
    for n_batch, n_ubatch in ((128, 128), (128, 16)) if is_causal(model) else ((128, 128),):
        together = counted(6, shares, n_batch, n_ubatch)
        assert np.abs(together - alone).sum() <= 0.01 * alone.sum()
    model.close()


def test_a_model_without_a_tokenizer(random_model: Any) -> None:
    with pytest.raises(ModelError, match="no tokenizer"):
        record_counts(random_model(OLMOE), text_pairs(2))
