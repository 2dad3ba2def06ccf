"""Counts: their rules, their sum and their file."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local._util.zip_files import zip_archive
from steermoe_local.errors import FormatError, ModelMismatchError, UsageError
from steermoe_local.maps.counts import RoutingCounts, Source, merge_counts
from tests.support.builders import identity, random_counts

FIELDS = ("identity", "n1", "n2", "moe_layers", "pairs_digest", "n_pairs", "behaviour", "created")


def same(one: RoutingCounts, two: RoutingCounts) -> bool:
    plain = all(getattr(one, name) == getattr(two, name) for name in (*FIELDS, "tool"))
    return plain and np.array_equal(one.a1, two.a1) and np.array_equal(one.a2, two.a2)


def test_round_trip_and_equal_bytes(tmp_path: Path) -> None:
    counts = random_counts(3)
    counts.save(tmp_path / "a.npz")
    counts.save(tmp_path / "without-suffix")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "without-suffix"]
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "without-suffix").read_bytes()
    assert same(RoutingCounts.load(tmp_path / "a.npz"), counts)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["a1"].dtype == np.int64
        assert arrays["n2"] == 11
        assert json.loads(str(arrays["meta"]))["model"]["architecture"] == "olmoe"


def test_arrays_are_copied_and_read_only() -> None:
    table = random_counts(1).a1.copy()
    counts = random_counts(1, a1=table)
    table[1, 0] += 1
    counts.validate()
    with pytest.raises(ValueError, match="read-only"):
        counts.a1[1, 0] = 0
    assert random_counts(1, pairs_digest="0" * 64).pairs_digest == ("0" * 64,)
    with pytest.raises(UsageError, match="a1: counts of type"):
        random_counts(1, a1=table / 2)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_sum_is_associative_and_commutative(i: int, j: int, k: int) -> None:
    x, y, z = (random_counts(seed, n1=seed, n2=seed + 1) for seed in (i, j, k))
    assert same((x + y) + z, x + (y + z))
    assert same(x + y, y + x)
    total = x + y
    total.validate()
    assert (total.n1, total.n2, total.n_pairs) == (i + j, i + j + 2, 6)
    assert len(total.pairs_digest) == 2


def test_sum_refuses_strangers() -> None:
    counts = random_counts(1)
    with pytest.raises(ModelMismatchError, match="made for olmoe"):
        counts + random_counts(1, identity(router_sha256="9" * 64))
    with pytest.raises(ModelMismatchError, match="different MoE layers"):
        counts + random_counts(1, moe_layers=(1,))
    with pytest.raises(UsageError, match="of 'digits-words' and of 'other'"):
        counts + random_counts(1, behaviour="other")
    assert (counts + random_counts(1, behaviour="")).behaviour == "digits-words"
    with pytest.raises(TypeError):
        counts + 1  # type: ignore[operator]


def edited(row: int, column: int, by: int) -> Any:
    table = random_counts(1).a1.copy()
    table[row, column] += by
    return table


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a1": edited(1, 0, 1)}, "layer 1 has 15 activations, but 7 tokens at top-2 make 14"),
        ({"a1": edited(1, 0, 100)}, "a1: counts outside 0 to 7"),
        ({"a1": edited(1, 0, -100)}, "a1: counts outside 0 to 7"),
        ({"a1": edited(0, 0, 1)}, "a1: "),
        ({"a1": np.zeros((2, 4), int)}, "a1: shape (2, 4), but the model has 3 layers of 4"),
        ({"n1": 8}, "8 tokens at top-2 make 16"),
        ({"n2": -1}, "n2: -1 tokens"),
        ({"n2": 1 << 60}, "n2: "),
        ({"moe_layers": ()}, "moe_layers: "),
        ({"moe_layers": (2, 1)}, "moe_layers: "),
        ({"moe_layers": (1, 3)}, "moe_layers: outside 0 to 2"),
        ({"moe_layers": (0, 1, 2)}, "layer 0 has 0 activations"),
        ({"pairs_digest": ("x",)}, "pairs_sha256"),
        ({"n_pairs": -1}, "n_pairs"),
    ],
)
def test_validate(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    counts = replace(random_counts(1), **changes)
    with pytest.raises(FormatError) as caught:
        counts.save(tmp_path / "a.npz")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


def saved(path: Path, **changes: Any) -> Path:
    """A counts file with some of its arrays replaced (None: left out)."""
    random_counts(1).save(path)
    with np.load(path) as arrays:
        data = dict(arrays) | changes
    with open(path, "wb") as file:
        np.savez(file, **{key: value for key, value in data.items() if value is not None})
    return path


def meta(**changes: Any) -> Any:
    base = {
        "format": "steermoe-counts",
        "version": 1,
        "model": identity().to_dict(),
        "behaviour": "",
        "n_pairs": 1,
        "pairs_sha256": [],
        "created": "",
        "tool": "",
    }
    return np.asarray(json.dumps(base | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"a1": None}, "not a counts file: its arrays are"),
        ({"extra": np.zeros(1)}, "not a counts file"),
        ({"a1": np.zeros((3, 4))}, "a1: float64 of shape (3, 4)"),
        ({"a1": np.zeros(4, np.int64)}, "a1: int64 of shape (4,)"),
        ({"n1": np.zeros(1, np.int64)}, "n1: int64 of shape (1,)"),
        ({"meta": np.zeros(1)}, "meta: float64 of shape (1,)"),
        ({"meta": np.asarray("{}")}, "meta: "),
        ({"meta": np.asarray("{")}, "meta: "),
        ({"meta": meta(version=2)}, "version 2, this program reads 1; upgrade"),
        ({"meta": meta(colour=1)}, "meta.colour: "),
        ({"meta": meta(tool=1)}, "meta.tool: "),
        ({"meta": meta(pairs_sha256="x")}, "meta.pairs_sha256"),
        ({"meta": meta(pairs_sha256=[1])}, "meta.pairs_sha256"),
        ({"meta": meta(n_pairs="1")}, "n_pairs: '1' is not a count"),
        ({"meta": meta(model=1)}, "model: "),
        ({"a1": edited(1, 0, 1)}, "layer 1 has 15 activations"),
    ],
)
def test_load_refuses(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    path = saved(tmp_path / "a.npz", **changes)
    with pytest.raises(FormatError) as caught:
        RoutingCounts.load(path)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_never_unpickles(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    saved(path, a1=np.asarray([Evil()], dtype=object))
    with pytest.raises(FormatError, match="a1: object of shape"):
        RoutingCounts.load(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(FormatError, match="not a counts file"):
        RoutingCounts.load(path)
    assert not ran.exists()


def test_archive_that_unpacks_to_too_much(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.npz")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    forged = bytearray(path.read_bytes())
    at = forged.rindex(b"PK\x01\x02")
    forged[at + 24 : at + 28] = b"\xff\xff\xff\x7f"  # uncompressed size in the directory
    path.write_bytes(forged)
    with pytest.raises(FormatError, match="meta: shorter or longer"):
        RoutingCounts.load(path)


def test_sources_and_layers_are_bounded(tmp_path: Path) -> None:
    sources = [{"pairs_sha256": "0" * 64, "shard": [n + 1, 5000], "n_pairs": 0, "n_skipped": 0} for n in range(5000)]
    path = saved(tmp_path / "a.npz", meta=meta(n_pairs=0, sources=sources, pairs_sha256=["0" * 64]))
    with pytest.raises(FormatError, match="sources: 5000, more than 4096"):
        RoutingCounts.load(path)
    with pytest.raises(FormatError, match="moe_layers"):  # before millions of numbers become objects
        RoutingCounts.load(saved(tmp_path / "b.npz", moe_layers=np.arange(100_000)))
    shards = [
        (f"{begin}", replace(random_counts(1), n_pairs=0, pairs_digest="0" * 64, sources=tuple(some)))
        for begin in (0, 2500)
        if (some := [Source("0" * 64, (n + 1, 5000)) for n in range(begin, begin + 2500)])
    ]
    with pytest.raises(UsageError, match="5000 sources, more than 4096"):
        merge_counts(shards)


def test_the_list_of_members_grows_with_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steermoe_local._util.zip_files._MAX_DIRECTORY", 1000)
    for n_bytes in (5000, 0):
        with zipfile.ZipFile(tmp_path / f"{n_bytes}.zip", "w") as archive:
            for n in range(100):
                archive.writestr(f"{n}", bytes(n_bytes))
    with open(tmp_path / "5000.zip", "rb") as file, zip_archive(file) as found:
        assert len(found.namelist()) == 100
    with open(tmp_path / "0.zip", "rb") as file, pytest.raises(zipfile.BadZipFile, match="list of members"):
        zip_archive(file).__enter__()


def test_damaged_at_any_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    random_counts(1).save(path)
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in range(0, len(data), 31):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError):
            RoutingCounts.load(path)
    for at in rng.integers(0, len(data), 300).tolist():
        broken = bytearray(data)
        broken[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        with contextlib.suppress(FormatError):
            RoutingCounts.load(path)
