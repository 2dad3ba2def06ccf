"""Shards of a recording, their merge, and pairs that are skipped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import (
    FormatError,
    ModelMismatchError,
    Pair,
    PairsError,
    RoutingCounts,
    UsageError,
    record_counts,
)
from steermoe_local.maps.counts import Source, merge_counts
from steermoe_local.pairs.pairs import pairs_digest
from tests.support.builders import identity, random_counts
from tests.support.detecting import CACHE, same, text_pairs

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
    with pytest.raises(UsageError, match="shard 5/5"):
        record_counts(tiny_f32_path, untied_pairs[:3], shard=(5, 5))
    with pytest.raises(UsageError, match="shard 0/5"):
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
    with pytest.raises(UsageError, match="pairs 00000000 and pairs 00000000:"):
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
        ({"shard": [2, 1]}, "shard: 2/1"),
        ({"shard": [0, 1]}, "shard: 0/1"),
        ({"shard": [1]}, "shard: "),
        ({"shard": [True, 1]}, "shard: "),
        ({"n_pairs": -1}, "n_pairs, n_skipped: "),
        ({"n_skipped": 1.5}, "n_pairs, n_skipped: "),
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
    with pytest.raises(PairsError, match=r"^pair 'long' .* n_ctx is 40"):
        record_counts(tiny_path, pairs, n_threads=1, n_ctx=40)
    with pytest.raises(PairsError, match="10 pairs"):
        record_counts(tiny_path, text_pairs(10), n_threads=1, n_ctx=2, on_skip=lambda pair, reason: None)
