"""Per-pair counts: written a chunk at a time, read back the same, and hostile files refused."""

from __future__ import annotations

import contextlib
import json
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local._util import npz
from steermoe_local.errors import FormatError, ModelMismatchError, UsageError
from steermoe_local.maps import pair_counts
from steermoe_local.maps.expert_map import ExpertMap
from steermoe_local.maps.pair_counts import PairCounts, PairCountsWriter, merge_pair_counts
from tests.support.builders import DATE, HEX, identity
from tests.support.random_pairs import random_pairs, write


def everything(counts: PairCounts) -> np.ndarray[Any, Any]:
    return np.concatenate([a for _, a in counts.chunks()])


@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(pair_counts, "_CHUNK_VALUES", 2 * 3 * 4 * chunk)
    ids, a, n = random_pairs(1, 10)
    path = write(tmp_path / "run.pairs.npz", (ids, a, n))
    assert [p.name for p in tmp_path.iterdir()] == ["run.pairs.npz"]
    loaded = PairCounts.load(path)
    assert (loaded.identity, loaded.moe_layers, loaded.n_pairs) == (identity(), (1, 2), 10)
    assert (loaded.pair_ids, loaded.behaviour, loaded.pairs_digest) == (tuple(ids), "digits", (HEX,))
    assert np.array_equal(loaded.n, n)
    parts = list(loaded.chunks())
    assert [part for part, _ in parts] == [slice(at, min(at + chunk, 10)) for at in range(0, 10, chunk)]
    assert {part.dtype for _, part in parts} == {np.dtype("u1")}
    assert np.array_equal(everything(loaded), a)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["a-000000"].dtype == np.uint8
        assert json.loads(str(arrays["ids-000000"])) == ids[:chunk]


def test_equal_bytes_however_grouped(tmp_path: Path) -> None:
    pairs = random_pairs(2)
    one, two = write(tmp_path / "a", pairs, step=1), write(tmp_path / "b", pairs, step=100)
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize(("tokens", "dtype"), [(255, "u1"), (256, "u2"), (65536, "u4")])
def test_smallest_type(tmp_path: Path, tokens: int, dtype: str) -> None:
    a = np.zeros((1, 2, 3, 4), dtype=np.int64)
    a[:, :, 1:, :2] = tokens
    loaded = PairCounts.load(write(tmp_path / "a", (["x"], a, np.full((1, 2), tokens))))
    assert everything(loaded).dtype == np.dtype(dtype)
    assert np.array_equal(everything(loaded), a)


def test_total_is_the_run(tmp_path: Path) -> None:
    ids, a, n = random_pairs(3)
    loaded = PairCounts.load(write(tmp_path / "a", (ids, a, n)))
    total = loaded.total()
    assert np.array_equal(total.a1, a[:, 0].sum(axis=0))
    assert np.array_equal(total.a2, a[:, 1].sum(axis=0))
    assert (total.n1, total.n2, total.n_pairs) == (*n.sum(axis=0).tolist(), len(ids))
    assert (total.behaviour, total.pairs_digest, total.moe_layers) == ("digits", (HEX,), (1, 2))
    loaded.require_total(total)
    made = ExpertMap.from_counts(total)
    loaded.require_total(made, "map.json")
    other = PairCounts.load(write(tmp_path / "b", random_pairs(4)))
    with pytest.raises(FormatError, match="take the two"):
        other.require_total(made, "map.json")
    shuffled = a.copy()
    shuffled[:, :, 1] = shuffled[:, :, 1, ::-1]
    with pytest.raises(FormatError, match="sums are not a1"):
        PairCounts.load(write(tmp_path / "c", (ids, shuffled, n))).require_total(made, "map.json")
    with pytest.raises(FormatError, match="n_pairs is 6, but 7"):
        PairCounts.load(write(tmp_path / "d", (ids[1:], a[1:], n[1:]))).require_total(total)
    stranger = identity(router_sha256="9" * 64)
    with pytest.raises(ModelMismatchError, match="made for olmoe"):
        PairCounts.load(write(tmp_path / "e", (ids, a, n), stranger)).require_total(total)


def test_merge_and_extend(tmp_path: Path) -> None:
    one, two = random_pairs(5), random_pairs(6, 3)
    paths = [write(tmp_path / "a", one), write(tmp_path / "b", two, behaviour="", pairs_digest=["a" * 64])]
    merged = merge_pair_counts(paths, tmp_path / "m")
    assert merged.pair_ids == (*one[0], *two[0])
    assert np.array_equal(everything(merged), np.concatenate([one[1], two[1]]))
    assert (merged.pairs_digest, merged.behaviour, merged.created) == ((HEX, "a" * 64), "digits", DATE)
    parts = [PairCounts.load(path).total() for path in paths]
    merged.require_total(parts[0] + parts[1])
    write(tmp_path / "c", two, identity(router_sha256="9" * 64))
    with pytest.raises(ModelMismatchError, match="made for olmoe"):
        merge_pair_counts([paths[0], tmp_path / "c"], tmp_path / "n")
    write(tmp_path / "c", two, behaviour="other")
    with pytest.raises(UsageError, match="of 'digits' and of 'other'"):
        merge_pair_counts([paths[0], tmp_path / "c"], tmp_path / "n")
    with pytest.raises(UsageError, match="least one file"):
        merge_pair_counts([], tmp_path / "n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c", "m"]


def test_the_writer_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    ids, a, n = random_pairs(1)
    with contextlib.suppress(KeyError), PairCountsWriter(path, identity()) as writer:
        writer.append(ids, a, n)
        raise KeyError
    assert not list(tmp_path.iterdir())
    writer = PairCountsWriter(path, identity())
    writer.append(ids, a, n)
    writer.abort()
    writer.abort()
    with pytest.raises(UsageError, match="already closed"):
        writer.append(ids, a, n)
    with pytest.raises(UsageError, match="no target token"):
        PairCountsWriter(path, identity()).close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match="create it first"):
        PairCountsWriter(tmp_path / "no" / "a", identity())
    writer = PairCountsWriter(path, identity())
    writer.append(ids, a, n)
    assert not path.exists()
    a[:] = 0  # the writer has copies
    writer.close()
    writer.close()
    writer.abort()
    assert PairCounts.load(path).total().a1.any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids, a, n: (ids[1:], a, n), "but 6 pairs make"),
        (lambda ids, a, n: (ids, a[:, :, :2], n), "but 7 pairs make"),
        (lambda ids, a, n: (ids, a / 1, n), "give whole numbers"),
        (lambda ids, a, n: (ids, a, n.astype(bool)), "give whole numbers"),
        (lambda ids, a, n: ([1] * 7, a, n), "pair_ids: "),
        (lambda ids, a, n: (ids, a, n + 1), "top-2 make"),
        (lambda ids, a, n: (ids, a - 1, n), "counts outside 0"),
        (lambda ids, a, n: (ids, a, n - 100), "counts outside 0"),
        (lambda ids, a, n: (ids, a * 0 + [[[0]], [[0]]], n), "no target token"),
        (lambda ids, a, n: (ids, np.roll(a, 1, axis=0), n), "counts outside 0 to 30"),
    ],
)
def test_append_refuses(tmp_path: Path, change: Any, words: str) -> None:
    ids, a, n = random_pairs(1)
    n[0], n[1] = 1, 30
    a[0] = a[1] = 0
    a[0, :, 1:, :2], a[1, :, 1:, :2] = 1, 30
    with pytest.raises((UsageError, FormatError)) as caught, PairCountsWriter(tmp_path / "a", identity()) as writer:
        writer.append(*change(ids, a, n))
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_append(tmp_path: Path) -> None:
    ids, a, n = random_pairs(1)
    with PairCountsWriter(tmp_path / "a", identity()) as writer:
        writer.append([], a[:0], n[:0])
        writer.append(ids, a, n)
    assert PairCounts.load(tmp_path / "a").n_pairs == 7


def test_a_pair_without_tokens_on_a_side(tmp_path: Path) -> None:
    ids, a, n = random_pairs(1)
    a[2, 1], n[2, 1] = 0, 0
    assert PairCounts.load(write(tmp_path / "a", (ids, a, n))).total().n_pairs == 7


def test_memory_does_not_grow_with_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing and summing holds ids, tokens and the archive's directory, but not the activations: 512 bytes a pair."""
    model = identity(8, 32, 2)
    _, a, n = random_pairs(1, 16, model)
    monkeypatch.setattr(pair_counts, "_CHUNK_VALUES", 1 << 15)
    peaks = []
    for times in (160, 800):
        tracemalloc.start()
        with PairCountsWriter(tmp_path / "a", model) as writer:
            for batch in range(times):
                writer.append([f"{batch}-{i}" for i in range(16)], a, n)
        PairCounts.load(tmp_path / "a").total()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / (640 * 16) < 150


#
# hostile files
#


def edited(path: Path, **changes: Any) -> Path:
    """A file with some members replaced (None: left out)."""
    write(path, random_pairs(1))
    with np.load(path) as arrays:
        data = dict(arrays) | {name.replace("_0", "-00000"): value for name, value in changes.items()}
    with open(path, "wb") as file:
        np.savez(file, **{name: value for name, value in data.items() if value is not None})
    return path


def meta(**changes: Any) -> Any:
    base = {
        "format": "steermoe-pair-counts",
        "version": 1,
        "model": identity().to_dict(),
        "behaviour": "",
        "n_pairs": 7,
        "n_chunks": 1,
        "pairs_sha256": [],
        "created": "",
        "tool": "",
    }
    return np.asarray(json.dumps(base | changes))


COUNTS = random_pairs(1)[1].astype(np.uint8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a_00": None}, "does not hold the 1 chunks"),
        ({"a_01": COUNTS}, "does not hold the 1 chunks"),
        ({"meta": None}, "no meta in it"),
        ({"meta": np.zeros(1)}, "meta: float64 of shape (1,), not a text"),
        ({"meta": np.asarray("{}")}, "meta: "),
        ({"meta": np.asarray("{")}, "meta: "),
        ({"meta": meta(version=2)}, "version 2, this program reads 1; upgrade"),
        ({"meta": meta(colour=1)}, "meta.colour: "),
        ({"meta": meta(tool=1)}, "meta.tool: "),
        ({"meta": meta(n_pairs=-1)}, "meta.n_pairs: -1 is not a count"),
        ({"meta": meta(n_pairs=6)}, "meta.n_pairs: 6, but"),
        ({"meta": meta(n_pairs=True)}, "meta.n_pairs"),
        ({"meta": meta(n_chunks=1 << 60)}, "meta.n_chunks"),
        ({"meta": meta(n_chunks=1 << 24)}, "does not hold"),
        ({"meta": meta(pairs_sha256=[1])}, "meta.pairs_sha256"),
        ({"meta": meta(model=1)}, "model: "),
        ({"meta": meta(model=identity(4096, 16384).to_dict())}, "a-000000: uint8 of shape (7, 2, 3, 4)"),
        ({"moe_layers": np.asarray([2, 1])}, "moe_layers: "),
        ({"moe_layers": np.asarray([], np.int64)}, "moe_layers: "),
        ({"moe_layers": np.asarray([1, 3])}, "moe_layers: "),
        ({"moe_layers": np.asarray([1])}, "counts in a layer without experts"),
        ({"moe_layers": np.asarray([0, 1, 2])}, "top-2 make"),
        ({"n_00": np.zeros((7, 3), np.int64)}, "n-000000: int64 of shape (7, 3)"),
        ({"n_00": np.full((7, 2), -1)}, "n-000000: outside 0"),
        ({"n_00": np.full((7, 2), 1 << 40)}, "n-000000: outside 0"),
        ({"n_00": random_pairs(1)[2] + 1}, "top-2 make"),
        ({"ids_00": np.asarray('["a"]')}, "n-000000: int64 of shape (7, 2), not whole numbers of shape (1, 2)"),
        ({"ids_00": np.asarray("[1, 2]")}, "ids-000000: "),
        ({"ids_00": np.asarray("[" * 99999)}, "ids-000000: "),
        ({"ids_00": np.asarray(b"[]")}, "ids-000000: |S2 of shape (), not a text"),
        ({"a_00": COUNTS.astype(np.float32)}, "a-000000: float32"),
        ({"a_00": COUNTS.astype(np.int8)}, "a-000000: int8"),
        ({"a_00": np.asfortranarray(COUNTS)}, "a-000000: uint8"),
        ({"a_00": COUNTS + np.uint8(1)}, "a-000000: "),
        ({"a_00": np.full(COUNTS.shape, (1 << 64) - 1, np.uint64)}, "a-000000: counts outside 0 to"),
    ],
)
def test_load_refuses(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = edited(tmp_path / "a.npz", **changes)
    with pytest.raises(FormatError) as caught:
        PairCounts.load(path).total()
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_members_that_are_not_as_they_should_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edited(tmp_path / "a.npz", moe_layers=np.asarray([1]))
    with pytest.raises(FormatError, match="a-000000: counts in a layer"):
        list(PairCounts.load(path).chunks())
    edited(path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}

    def written(**changes: bytes) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data + changes.get(name[0], b""))

    for member in "anm":  # m: moe_layers and meta
        written(**{member: b"more"})
        with pytest.raises(FormatError, match="shorter or longer"):
            PairCounts.load(path).total()
    written()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("n-000000.npy", members["n-000000.npy"])
    with pytest.raises(FormatError, match="not hold the 1"):
        PairCounts.load(path)
    written()
    monkeypatch.setattr(npz, "_MAX_BYTES", 100)
    with pytest.raises(FormatError, match="112 bytes; not pair"):
        PairCounts.load(path)


def test_never_unpickles(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    for name in ("a_00", "n_00", "ids_00", "meta", "moe_layers"):
        path = edited(tmp_path / "a.npz", **{name: np.asarray([Evil()], dtype=object)})
        with pytest.raises(FormatError):
            PairCounts.load(path).total()
    assert not ran.exists()


def test_forged_headers_allocate_nothing(tmp_path: Path) -> None:
    """A shape of a thousand terabytes behind a few bytes."""
    path = edited(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    for name in ("a-000000.npy", "n-000000.npy", "moe_layers.npy"):
        data = members[name]
        at = data.index(b"'shape': (")
        forged = data[: at + 10] + b"999999999999999," + data[data.index(b")", at) :]
        with zipfile.ZipFile(path, "w") as archive:
            for other, content in members.items():
                archive.writestr(other, forged if other == name else content)
        tracemalloc.start()
        with pytest.raises(FormatError):
            PairCounts.load(path).total()
        assert tracemalloc.get_traced_memory()[1] < 1 << 22
        tracemalloc.stop()


def test_not_an_archive(tmp_path: Path) -> None:
    for data, words in ((b"", "not pair counts"), (b"{}", "not pair counts"), (b"PK\x03\x04", "damaged")):
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(FormatError, match=words):
            PairCounts.load(tmp_path / "a")
    with pytest.raises(FormatError, match="cannot be read"):
        PairCounts.load(tmp_path / "none")
    with pytest.raises(FormatError, match="cannot be read"):
        PairCounts.load(tmp_path)


def test_damaged_at_any_byte(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz", random_pairs(1))
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in range(0, len(data), 53):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError):
            PairCounts.load(path)
    for at in rng.integers(0, len(data), 200).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with contextlib.suppress(FormatError):
            PairCounts.load(path).total()


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 20), st.integers(1, 20))
def test_halves_make_the_whole(seed: int, i: int, j: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids, a, n = random_pairs(seed, i + j)
        halves = [
            write(folder / "a", (ids[:i], a[:i], n[:i])),
            write(folder / "b", (ids[i:], a[i:], n[i:])),
        ]
        whole = write(folder / "w", (ids, a, n), pairs_digest=[HEX, HEX])
        assert merge_pair_counts(halves, folder / "m").path.read_bytes() == whole.read_bytes()
