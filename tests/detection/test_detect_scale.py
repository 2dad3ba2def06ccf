"""Recording at scale: shared beginnings, interrupted runs, shards, memory, skipped pairs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import (
    ExpertMap,
    FormatError,
    ModelError,
    ModelMismatchError,
    Pair,
    PairsError,
    RoutingCounts,
    UsageError,
    load_pairs,
    record_counts,
    save_pairs,
)
from steermoe_local.cli import main
from steermoe_local.detection.checkpoint import Checkpoint, CheckpointFile, PairRecords
from steermoe_local.detection.decoding import ContextOptions, GroupDecoder, can_share, is_causal
from steermoe_local.detection.grouping import Group, GroupBuilder
from steermoe_local.detection.recorder import RecordingProgress
from steermoe_local.llama.rendering import Prompt
from steermoe_local.maps.counts import Source, merge_counts
from steermoe_local.maps.pair_counts import PairCounts
from steermoe_local.pairs.pairs import PairsFile, pairs_digest
from tests.support.architectures import widen, write_upstream
from tests.support.builders import identity, random_counts
from tests.support.held import HELD, hold, patience
from tests.support.low_level import F32, identity_of, open_model
from tests.support.near_ties import near_ties_of_pairs
from tests.support.paths import BUILD, ROOT
from tests.support.random_models import OLMOE

PROGRAM = "from steermoe_local.cli import main; main()"
DATA = ROOT / "steermoe_local" / "data"


@pytest.fixture(scope="module")
def chat_pairs() -> list[Pair]:
    """Chat pairs that share the template's text, questions and, on both sides, targets."""
    files = ("digits-words", "document-memory", "refuse-comply")
    return [pair for name in files for pair in load_pairs(DATA / f"{name}.pairs.jsonl")[:16]]


def text_pairs(n: int) -> list[Pair]:
    return [Pair(f"p{i}", f"Count up: {i}, {i + 1}", f"Count down: {i + 1}, {i}", f"{i}", f"{i}") for i in range(n)]


def same(one: RoutingCounts, two: RoutingCounts) -> bool:
    numbers = one.n1 == two.n1 and one.n2 == two.n2 and one.n_pairs == two.n_pairs
    return numbers and np.array_equal(one.a1, two.a1) and np.array_equal(one.a2, two.a2)


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
    """A stand-in for a model: the expert of a token hangs on it and on all that stands before it."""
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


@settings(max_examples=300, deadline=None)
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


CACHE = {"type_k": F32, "type_v": F32}


@pytest.fixture(scope="module")
def untied_pairs(chat_pairs: list[Pair], tiny_f32_path: Path) -> list[Pair]:
    """Pairs of which every choice of experts is the same however F32 rounds: other batches count the same, exactly."""
    found = [pair for pair in chat_pairs if not near_ties_of_pairs(tiny_f32_path, [pair])]
    assert len(found) >= 40
    return found


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


#
# shards
#


def test_shards_add_up(tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    whole = record_counts(tiny_f32_path, untied_pairs, n_threads=1, **CACHE)
    parts = [record_counts(tiny_f32_path, untied_pairs, n_threads=1, shard=(i, 5), **CACHE) for i in range(1, 6)]
    assert [part.n_pairs for part in parts] == [len(untied_pairs[i::5]) for i in range(5)]
    assert {part.pairs_digest for part in parts} == {(pairs_digest(untied_pairs),)}
    total = parts[0]
    for part in parts[1:]:
        total += part
    assert total.n_pairs == len(untied_pairs)
    assert same(total, whole)
    first = record_counts(tiny_f32_path, untied_pairs[::5], n_threads=1, **CACHE)
    assert same(first, parts[0]), "shard 1/5 is pairs 1, 6, 11, ..."
    with pytest.raises(UsageError, match=r"shard 5/5: empty"):
        record_counts(tiny_f32_path, untied_pairs[:3], shard=(5, 5))
    with pytest.raises(UsageError, match=r"shard 0/5"):
        record_counts(tiny_f32_path, untied_pairs, shard=(0, 5))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12))
def test_overlap_of_shards(i: int, n: int, j: int, m: int) -> None:
    i, j = 1 + i % n, 1 + j % m
    one, two = Source("0" * 64, (i, n)), Source("0" * 64, (j, m))
    places = set(range(i - 1, 200, n)) & set(range(j - 1, 200, m))
    assert one.overlaps(two) == two.overlaps(one) == bool(places)
    assert not one.overlaps(Source("1" * 64, (j, m)))


def counts_with(*sources: Source, **changes: Any) -> RoutingCounts:
    total = sum(source.n_pairs for source in sources)
    digests = tuple(source.pairs_sha256 for source in sources)
    return random_counts(1, sources=sources, n_pairs=total, pairs_digest=digests, **changes)


def test_sources_of_counts(tmp_path: Path) -> None:
    first, second = Source("0" * 64, (1, 2), 5, 1), Source("0" * 64, (2, 2), 4, 0)
    other = Source("1" * 64, (1, 1), 3, 2)
    total = counts_with(second) + counts_with(other) + counts_with(first)
    assert total.sources == (first, second, other)
    assert (total.n_pairs, total.n_skipped) == (12, 3)
    total.save(tmp_path / "a.npz")
    again = RoutingCounts.load(tmp_path / "a.npz")
    assert again.sources == total.sources
    with pytest.raises(UsageError, match="shard 1/2 of pairs 00000000 and pairs 00000000: some pairs"):
        total + counts_with(Source("0" * 64, (1, 1), 9))
    assert (total + random_counts(1)).sources == (), "what the other holds is not known"
    for changes, words in (
        ({"n_pairs": 13}, "sources: their pairs are not 13"),
        ({"pairs_digest": ("2" * 64,)}, "sources: of other pairs"),
    ):
        with pytest.raises(FormatError, match=words):
            replace(total, **changes).save(tmp_path / "b.npz")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shard": [2, 1]}, "2/1 is none"),
        ({"shard": [0, 1]}, "0/1 is none"),
        ({"shard": [1]}, "shard: not two"),
        ({"shard": [True, 1]}, "shard: not two"),
        ({"n_pairs": -1}, "not counts"),
        ({"n_skipped": 1.5}, "not counts"),
        ({"pairs_sha256": "x"}, "64 lowercase hex"),
        ({"colour": 1}, "not an object with"),
    ],
)
def test_sources_that_are_none(change: dict[str, Any], words: str) -> None:
    good = {"pairs_sha256": "0" * 64, "shard": [1, 2], "n_pairs": 1, "n_skipped": 0}
    assert Source.from_dict(good, "x") == Source("0" * 64, (1, 2), 1, 0)
    with pytest.raises(FormatError, match=words):
        Source.from_dict(good | change, "x")


def test_merging_names_the_files() -> None:
    part = counts_with(Source("0" * 64, (1, 2), 5))
    old = random_counts(2, pairs_digest="0" * 64)  # a file without sources: all pairs
    with pytest.raises(UsageError, match=r"^b\.npz \(pairs 00000000\) and a\.npz \(shard 1/2"):
        merge_counts([("a.npz", part), ("b.npz", old)])
    stranger = counts_with(Source("1" * 64, (1, 1), 5), behaviour="other")
    with pytest.raises(UsageError, match=r"^b\.npz: counts: of "):
        merge_counts([("a.npz", part), ("b.npz", stranger)])
    elsewhere = replace(counts_with(Source("1" * 64)), identity=identity(router_sha256="9" * 64))
    with pytest.raises(ModelMismatchError, match=r"a\.npz"):
        merge_counts([("a.npz", part), ("b.npz", elsewhere)])
    with pytest.raises(UsageError, match="no counts"):
        merge_counts([])


#
# skipped pairs
#


def test_skipped_pairs(tiny_path: Path) -> None:
    long = "word " * 60
    pairs = [*text_pairs(3), Pair("long", long + "1", "short 1", "1", "1"), *text_pairs(6)[3:]]
    skipped: list[tuple[str, str]] = []
    counts = record_counts(
        tiny_path, pairs, n_threads=1, n_ctx=40, on_skip=lambda pair, reason: skipped.append((pair.id, reason))
    )
    assert [name for name, _ in skipped] == ["long"]
    assert "n_ctx is 40" in skipped[0][1]
    assert "(-c " in skipped[0][1]
    assert (counts.n_pairs, counts.n_skipped) == (6, 1)
    assert same(counts, record_counts(tiny_path, text_pairs(6), n_threads=1))
    with pytest.raises(PairsError, match=r"^pair 'long' needs \d+ tokens of context, but n_ctx is 40"):
        record_counts(tiny_path, pairs, n_threads=1, n_ctx=40)
    with pytest.raises(PairsError, match="none of the 10 pairs"):
        record_counts(tiny_path, text_pairs(10), n_threads=1, n_ctx=2, on_skip=lambda pair, reason: None)


#
# checkpoints
#

SETTINGS = {"model": "m", "pairs": "0" * 64, "n_batch": 512, "shard": [1, 1]}
SHAPE = (3, 4)


def checkpoint_of(seed: int) -> Checkpoint:
    rng = np.random.default_rng(seed)
    return Checkpoint(rng.integers(0, 9, (2, *SHAPE)), rng.integers(0, 9, (2, SHAPE[0])), 7, 6, 1, 0)


def records_of(seed: int, n: int) -> PairRecords:
    rng = np.random.default_rng(seed)
    a = rng.integers(0, 9, (n, 2, *SHAPE)).astype(np.uint32)
    return PairRecords(np.arange(n) + 10 * seed, rng.integers(0, 9, (n, 2)), a)


def test_checkpoint_file(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "m[1].json")
    assert not file.exists()
    state = checkpoint_of(1)
    end = file.append(records_of(0, 3), 0)
    # what a killed process wrote behind its checkpoint is written over
    file.append(records_of(9, 20), end)
    end = file.append(records_of(1, 1), end)
    end = file.append(records_of(2, 5), end)
    state.journal = end
    file.save(state, SETTINGS)
    again = file.load(SETTINGS, SHAPE)
    assert again.__dict__.keys() == state.__dict__.keys()
    for name, value in state.__dict__.items():
        assert np.array_equal(getattr(again, name), value)
    again.a += 1  # it is gone on with
    found = list(file.records(again.journal, SHAPE))
    for seed, (n, records) in enumerate(zip((3, 1, 5), found, strict=True)):
        for name in ("indices", "n", "a"):
            assert np.array_equal(getattr(records, name), getattr(records_of(seed, n), name))
    (tmp_path / ".m[1].json.partial.npz.abc.tmp").touch()
    (tmp_path / ".m1.json.partial.npz.abc.tmp").touch()
    file.remove()
    file.remove()
    assert [path.name for path in tmp_path.iterdir()] == [".m1.json.partial.npz.abc.tmp"]


@pytest.mark.parametrize("name", SETTINGS)
def test_another_run_is_refused_and_named(tmp_path: Path, name: str) -> None:
    file = CheckpointFile(tmp_path / "m.json")
    file.save(checkpoint_of(1), SETTINGS)
    with pytest.raises(UsageError) as caught:
        file.load(SETTINGS | {name: "other"}, SHAPE)
    assert f"{name} was {SETTINGS[name]!r}, now it is 'other'" in str(caught.value)
    assert "--restart" in str(caught.value)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "m.json")
    file.save(checkpoint_of(1), SETTINGS)
    data = file.path.read_bytes()
    rng = np.random.default_rng(2)
    for cut in range(0, len(data), 97):
        file.path.write_bytes(data[:cut])
        with pytest.raises(FormatError, match=r"--restart|not a checkpoint"):
            file.load(SETTINGS, SHAPE)
    for at in rng.integers(0, len(data), 200).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        file.path.write_bytes(broken)
        with contextlib.suppress(FormatError, UsageError):
            file.load(SETTINGS, SHAPE)
    file.path.write_bytes(data)
    with pytest.raises(FormatError):
        file.load(SETTINGS, (3, 5))
    end = file.append(records_of(1, 4), 0)
    journal = file.journal.read_bytes()
    for at in range(0, len(journal), 3):
        broken = bytearray(journal)
        broken[at] ^= 16
        file.journal.write_bytes(broken)
        with contextlib.suppress(FormatError):
            list(file.records(end, SHAPE))
        file.journal.write_bytes(journal[:at])
        with pytest.raises(FormatError, match="damaged"):
            list(file.records(end, SHAPE))


def interrupted(path: Path, pairs: list[Pair], file: CheckpointFile, after: int, **options: Any) -> None:
    """Stop a run after some batches."""

    def stop(progress: RecordingProgress) -> None:
        nonlocal after
        after -= 1
        if not after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_counts(path, pairs, n_threads=1, checkpoint=file, on_batch=stop, **options)


def test_resume_at_every_batch(tiny_path: Path, tmp_path: Path, chat_pairs: list[Pair]) -> None:
    """An interrupted run comes to the counts of one that was not, bit for bit, and computes no pair again."""
    pairs = chat_pairs[::2]
    seen: list[RecordingProgress] = []
    whole = record_counts(tiny_path, pairs, n_threads=1, n_batch=128, on_batch=seen.append)
    assert len(seen) >= 6
    file = CheckpointFile(tmp_path / "m.json")
    done = [progress.n_done for progress in seen]
    for batch in range(len(seen)):
        again: list[RecordingProgress] = []
        interrupted(tiny_path, pairs, file, 1 if not batch else 2, n_batch=128)  # the first report is the old state
        state = json.loads(str(np.load(file.path)["meta"]))
        assert state["next"] == done[batch] or batch == len(seen) - 1
        counts = None
        if batch in (2, len(seen) - 1):
            copy = CheckpointFile(tmp_path / f"copy{batch}")
            copy.path.write_bytes(file.path.read_bytes())
            counts = record_counts(tiny_path, pairs, n_threads=1, n_batch=128, checkpoint=copy, on_batch=again.append)
            assert [progress.n_done for progress in again] == done[batch:]
            assert same(counts, whole)
            assert copy.exists(), "it is the caller's to remove, once the result is saved"


def test_resume_of_skipped_and_sharded(tiny_path: Path, tmp_path: Path) -> None:
    pairs = [Pair("bad", "a " * 90 + "b", "b", "b", "b"), *text_pairs(30)]
    options: dict[str, Any] = {"n_batch": 40, "n_ctx": 60, "shard": (1, 2)}
    skipped: list[str] = []

    def skip(pair: Pair, reason: str) -> None:
        skipped.append(pair.id)

    whole = record_counts(tiny_path, pairs, n_threads=1, on_skip=skip, **options)
    file = CheckpointFile(tmp_path / "m.json")
    interrupted(tiny_path, pairs, file, 2, on_skip=skip, **options)
    counts = record_counts(tiny_path, pairs, n_threads=1, on_skip=skip, checkpoint=file, **options)
    assert same(counts, whole)
    assert counts.sources == whole.sources
    assert (counts.n_pairs, counts.n_skipped) == (15, 1)
    assert skipped == ["bad"] * 2, "reported once by a run, not again when it goes on"


def test_resume_refuses_other_settings(tiny_path: Path, tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "m.json")
    interrupted(tiny_path, text_pairs(40), file, 1, n_batch=40)
    before = file.path.read_bytes()
    for pairs, options, words in (
        (text_pairs(39), {}, "pairs was"),
        (text_pairs(40), {"n_batch": 48}, "n_batch was 40, now it is 48"),
        (text_pairs(40), {"behaviour": "x"}, "behaviour was"),
        (text_pairs(40), {"shard": (1, 2)}, "shard was"),
        (text_pairs(40), {"share_prefixes": False}, "share_prefixes was"),
        (text_pairs(40), {"n_ctx": 100}, "n_ctx was"),
        (text_pairs(40), {"type_k": 0}, "type_k was"),
        (text_pairs(40), {"template_arguments": {"x": 1}}, "template_arguments was"),
        (text_pairs(40), {"per_pair": lambda identity, digest: None}, "per_pair was"),
    ):
        with pytest.raises(UsageError, match=words):
            record_counts(tiny_path, pairs, n_threads=1, checkpoint=file, **({"n_batch": 40} | options))
    assert file.path.read_bytes() == before
    # threads and where the layers lie change no setting
    record_counts(tiny_path, text_pairs(40), n_threads=2, n_batch=40, checkpoint=file)


#
# the command
#


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="steermoe")


def quantized(source: Path, target: Path) -> Path:
    from tests.support.low_level import internals, lib

    internals()
    params = lib().llama_model_quantize_default_params()
    params.nthread, params.ftype = 1, 7  # Q8_0
    assert lib().llama_model_quantize(str(source).encode(), str(target).encode(), params) == 0
    return target


@pytest.fixture
def pairs_file(tmp_path: Path, chat_pairs: list[Pair]) -> Path:
    path = tmp_path / "behaviour.jsonl"
    save_pairs(chat_pairs, path)
    return path


def next_of(path: Path) -> int:
    try:
        with np.load(path) as arrays:
            return int(json.loads(str(arrays["meta"]))["next"])
    except FileNotFoundError:
        return 0


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_at_any_moment(tiny_path: Path, tmp_path: Path, pairs_file: Path) -> None:
    """kill -9 again and again; the run goes on from what it had, and the end is that of an undisturbed run."""
    flags = ["-m", "tiny", "--pairs", pairs_file, "-t", "1", "-b", "48", "-ub", "48"]
    undisturbed = ["--counts", tmp_path / "u.npz", "--per-pair", tmp_path / "u.pairs.npz", "-o", tmp_path / "u.json"]
    done = run("detect", *flags, *undisturbed)
    assert done.exit_code == 0, done.stderr
    output, partial = tmp_path / "m.json", tmp_path / "m.json.partial.npz"
    files = ["--counts", tmp_path / "c.npz", "--per-pair", tmp_path / "p.npz", "-o", output]
    rng = np.random.default_rng(int(time.time()) if os.environ.get("STEERMOE_RANDOM_KILLS") else 5)
    command = ["detect", *map(str, [*flags, *files]), "--resume"]
    last = 0
    for n_checkpoints in (1, 3, 5):
        # it waits a little later, so that it cannot end before it is killed
        env = os.environ | hold(checkpoints=n_checkpoints + 4)
        with subprocess.Popen([*HELD, *command], stdout=subprocess.DEVNULL, env=env) as process:
            for _ in range(n_checkpoints):
                patience(process, lambda before=last: next_of(partial) != before)
                now = next_of(partial)
                assert now > last
                last = now
            time.sleep(rng.uniform(0, 0.03))  # anywhere within a batch, or within the writing of a checkpoint
            process.kill()
        assert process.returncode == -signal.SIGKILL
        assert not output.exists()
        assert next_of(partial) >= last, "what was counted is lost"
        last = next_of(partial)
    done = run(*command)
    assert done.exit_code == 0, done.stderr
    one, two = RoutingCounts.load(tmp_path / "u.npz"), RoutingCounts.load(tmp_path / "c.npz")
    assert same(one, two)
    assert one.sources == two.sources
    mine, theirs = PairCounts.load(tmp_path / "p.npz"), PairCounts.load(tmp_path / "u.pairs.npz")
    assert mine.pair_ids == theirs.pair_ids
    assert np.array_equal(mine.n, theirs.n)
    for (_, a), (_, b) in zip(mine.chunks(), theirs.chunks(), strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(ExpertMap.load(output).rd, ExpertMap.load(tmp_path / "u.json").rd)
    assert not list(tmp_path.glob("*partial*")), "nothing of the checkpoint is left"
    assert not list(tmp_path.glob(".m.json*"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_interrupted_resumed_restarted(tmp_path: Path, pairs_file: Path) -> None:
    output, partial = tmp_path / "m.json", tmp_path / "m.json.partial.npz"
    flags = ["detect", "-m", "tiny", "--pairs", pairs_file, "-t", "1", "-b", "32", "-o", output]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = os.environ | hold(checkpoints=6)  # each counts at least one pair more
    with subprocess.Popen([*HELD, *map(str, flags)], env=env, **pipes) as process:  # type: ignore[call-overload]
        patience(process, lambda: next_of(partial) >= 4)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "of 48 pairs" in stderr
    assert "--resume" in stderr
    at = next_of(partial)
    assert 4 <= at < 48

    refused = run(*flags)
    assert refused.exit_code == 2
    assert refused.stderr.count("\n") == 1
    assert "--resume" in refused.stderr
    assert "--restart" in refused.stderr
    both = run(*flags, "--resume", "--restart")
    assert both.exit_code == 2

    other = quantized(DATA / "tiny-moe.gguf", tmp_path / "q8.gguf")
    for words, change in (
        ("model file was", ["-m", other]),
        ("pairs was", ["--pairs", DATA / "digits-words.pairs.jsonl", "--behaviour", "behaviour"]),
        ("n_batch was 32, now it is 33", ["-b", "33"]),
    ):
        refused = run(*flags, *change, "--resume")
        assert refused.exit_code == 2, refused.stderr
        assert refused.stderr.count("\n") == 1
        assert words in refused.stderr
    assert next_of(partial) == at, "a refused run changes nothing"

    resumed = run(*flags, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    figures = json.loads(resumed.stdout)
    assert figures["n_pairs"] == 48
    resumed_rd = ExpertMap.load(output).rd
    assert not partial.exists()
    fresh = run(*flags, "--restart", "--json")
    again = json.loads(fresh.stdout)
    assert again["n_tokens"] > figures["n_tokens"], "the resumed run did not start over"
    assert np.array_equal(resumed_rd, ExpertMap.load(output).rd)


def test_shards_and_merge(tmp_path: Path, tiny_f32_path: Path, untied_pairs: list[Pair]) -> None:
    pairs_file, n_pairs, names = tmp_path / "behaviour.jsonl", len(untied_pairs), {}
    save_pairs(untied_pairs, pairs_file)
    for part in ("1/1", "1/2", "2/2", "1/3"):
        name = part.replace("/", "-")
        names[part] = [tmp_path / f"{name}.npz", tmp_path / f"{name}.pairs.npz"]
        done = run(
            *("detect", "-m", tiny_f32_path, "-ctk", "f32", "-ctv", "f32", "--pairs", pairs_file, "-t", 1),
            *("--shard", part, "-o", tmp_path / f"{name}.json"),
            *("--counts", names[part][0], "--per-pair", names[part][1], "--json"),
        )
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["shard"] == part
    merged = [tmp_path / "sum.npz", tmp_path / "sum.pairs.npz"]
    done = run(
        *("map", "merge", *names["1/2"], *names["2/2"], "-o", tmp_path / "sum.json"),
        *("--counts", merged[0], "--per-pair", merged[1], "--positive", "yes", "--json"),
    )
    assert done.exit_code == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["n_files"], facts["n_pairs"]) == (2, n_pairs)
    assert [source["shard"] for source in facts["sources"]] == ["1/2", "2/2"]
    whole, total = RoutingCounts.load(names["1/1"][0]), RoutingCounts.load(merged[0])
    assert same(whole, total)
    assert PairCounts.load(merged[1]).n_pairs == n_pairs
    expert_map = ExpertMap.load(tmp_path / "sum.json")
    assert np.array_equal(expert_map.rd, ExpertMap.load(tmp_path / "1-1.json").rd)
    assert (expert_map.behaviour, expert_map.positive) == ("behaviour", "yes")
    assert expert_map.se is not None
    for files, words in (
        ([names["1/2"][0], names["1/2"][0]], "named twice"),
        ([names["1/2"][0], names["1/3"][0]], "would count twice"),  # pair 1 is in both
        ([names["1/1"][0], merged[0]], "would count twice"),
        ([names["1/2"][0], names["2/2"][0], names["2/2"][1]], f"n_pairs is {len(untied_pairs[1::2])}, but {n_pairs}"),
        ([names["1/2"][1]], "name the counts"),
        ([pairs_file], "not a counts file"),
    ):
        refused = run("map", "merge", *files, "-o", tmp_path / "no.json")
        assert refused.exit_code != 0
        assert words in refused.stderr, refused.stderr
        assert refused.stderr.count("\n") == 1
    refused = run("map", "merge", names["1/2"][0], "--per-pair", merged[1], "-o", tmp_path / "no.json")
    assert "no per-pair counts among the files" in refused.stderr
    assert PairCounts.load(merged[1]).n_pairs == n_pairs
    assert not (tmp_path / "no.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_merge_of_different_pairs_files(tmp_path: Path, tiny_path: Path, chat_pairs: list[Pair]) -> None:
    for name, pairs in (("a", chat_pairs[:9]), ("b", chat_pairs[9:20])):
        record_counts(tiny_path, pairs, n_threads=1).save(tmp_path / f"{name}.npz")
    done = run("map", "merge", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "m.json", "--behaviour", "x")
    assert done.exit_code == 0, done.stderr
    expert_map = ExpertMap.load(tmp_path / "m.json")
    assert expert_map.n_pairs == 20
    assert set(expert_map.pairs_sha256) == {pairs_digest(chat_pairs[:9]), pairs_digest(chat_pairs[9:20])}


def test_a_map_of_shuffled_pairs_is_warned_of(tmp_path: Path, tiny_path: Path) -> None:
    """Sides swapped at random are noise; detect and merge say so, and say nothing of the pairs as they were."""
    from steermoe_local.models.embedded import behaviour

    for shuffled in (False, True):
        pairs = tmp_path / "b.jsonl"
        save_pairs(load_pairs(behaviour("digits-words").pairs)[:40], pairs)
        if shuffled:
            done = run("pairs", "shuffle", pairs, "-o", tmp_path / "s.jsonl", "--seed", 2)
            assert done.exit_code == 0, done.stderr
            pairs = tmp_path / "s.jsonl"
        name = [tmp_path / f"{shuffled}.{end}" for end in ("json", "npz", "pairs.npz", "merged.json")]
        detected = run(
            *("detect", "-m", "tiny", "--pairs", pairs, "-t", 1, "-o", name[0], "--counts", name[1], "--per-pair"),
            name[2],
        )
        merged = run("map", "merge", name[1], name[2], "-o", name[3])
        for done, output in ((detected, name[0]), (merged, name[3])):
            assert done.exit_code == 0, done.stderr
            warning = f"warning: {output}: not separable from maps of shuffled pairs"
            assert done.stderr.startswith(warning) if shuffled else not done.stderr, done.stderr


def test_skipped_pairs_of_the_command(tmp_path: Path) -> None:
    pairs = [*text_pairs(4), Pair("too long", "word " * 60 + "1", "1", "1", "1")]
    save_pairs(pairs, tmp_path / "p.jsonl")
    flags = ["detect", "-m", "tiny", "--pairs", tmp_path / "p.jsonl", "-t", 1, "-o", tmp_path / "m.json"]
    done = run(*flags, "-c", 40, "--json", "--counts", tmp_path / "c.npz")
    assert done.exit_code == 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("skipped: pair 'too long': needs 6")
    assert json.loads(done.stdout)["n_skipped"] == 1
    assert RoutingCounts.load(tmp_path / "c.npz").n_skipped == 1
    assert ExpertMap.load(tmp_path / "m.json").n_pairs == 4
    none = run(*flags[:-1], tmp_path / "n.json", "-c", 3)
    assert none.exit_code == 1
    assert none.stderr.count("skipped: ") == 5
    assert none.stderr.splitlines()[-1].startswith("error: none of the 5 pairs could be counted")
    assert not (tmp_path / "n.json").exists()
    assert not list(tmp_path.glob("*.partial.*"))


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_progress_on_a_terminal(tmp_path: Path, pairs_file: Path) -> None:
    """Pairs, tokens per second and the time that is left, on stderr; nothing of it where that is no terminal."""
    import pty

    flags = ["detect", "-m", "tiny", "--pairs", pairs_file, "-t", "1", "-b", "32", "-o", tmp_path / "m.json", "--json"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, flags)],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "100"},
    )
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # EIO: the other end is closed
        while data := os.read(ours, 65536):
            seen += data
    stdout, _ = process.communicate(timeout=60)
    os.close(ours)
    text = seen.decode()
    assert process.returncode == 0
    assert "48/48" in text
    assert "tokens/s" in text
    assert "0:00:" in text
    assert json.loads(stdout)["tokens_per_second"] > 0
    assert run(*flags).stderr == ""


#
# memory
#

MEMORY = """
import sys
from pathlib import Path
from steermoe_local import record_counts
from steermoe_local.cli import main
from steermoe_local.detection.checkpoint import CheckpointFile
from steermoe_local.pairs.pairs import PairsFile
model, pairs, output = sys.argv[1:]
class Sink:
    def append(self, *arrays): pass
sizes = []
def resident(_):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            sizes.append(int(line.split()[1]) / 1024)
record_counts(model, PairsFile(pairs), n_threads=1, checkpoint=CheckpointFile(output), on_batch=resident,
              per_pair=lambda *_: Sink())
print(sizes[3], max(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_memory_does_not_grow_with_the_pairs(tiny_path: Path, tmp_path: Path) -> None:
    peaks = {}
    for n in (200, 5000):
        path = tmp_path / f"{n}.jsonl"
        with open(path, "w") as file:
            for i in range(n):  # half a kilobyte of ids: kept pairs would be seen
                pair = Pair(f"{i}{'-' * 500}", f"x {i}", f"y {i}", f"{i}", f"{i}")
                file.write(json.dumps(pair.to_dict()) + "\n")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tiny_path), str(path), str(tmp_path / f"{n}.json")],
            capture_output=True,
            text=True,
            check=True,
        )
        early, peak = map(float, done.stdout.split())
        assert peak - early < 3, f"{n} pairs: {early} MB after four batches, {peak} MB at most"
        peaks[n] = peak
    assert peaks[5000] - peaks[200] < 4, peaks


def test_pairs_file_is_read_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    save_pairs(text_pairs(5), path)
    pairs = PairsFile(path)
    assert len(pairs) == 5
    assert list(pairs) == load_pairs(path) == list(pairs)
    assert text_pairs(5)[3] in pairs
    assert pairs.digest == pairs_digest(text_pairs(5))
    save_pairs(text_pairs(6), path)
    with pytest.raises(PairsError, match="was changed while it was read"):
        list(pairs)
    path.write_text("")
    with pytest.raises(PairsError, match="no pairs"):
        PairsFile(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_pairs_from_a_pipe(tmp_path: Path) -> None:
    save_pairs(text_pairs(5), tmp_path / "p.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["sh", "-c", f"cat {tmp_path}/p.jsonl > {tmp_path}/pipe"]):
        pairs = PairsFile(tmp_path / "pipe")
    assert list(pairs) == list(pairs) == text_pairs(5)
