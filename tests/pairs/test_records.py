"""Rows of untrusted data files: compressed, streamed, hostile and damaged ones."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from steermoe_local._util.records import rows
from steermoe_local.errors import PairsError
from tests.pairs.test_pair_builders import COLUMNS, RATED, write_parquet


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_compression_is_told_from_the_content(tmp_path: Path, pack: Any) -> None:
    path = tmp_path / "blob"  # the hub's cache names files by their hash
    path.write_bytes(pack(b"\xef\xbb\xbf\n" + "".join(json.dumps(row) + "\r\n" for row in RATED).encode()))
    assert list(rows(path)) == RATED


def test_rows_are_streamed(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\nbroken\n')
    assert [row["a"] for row in islice(rows(path), 2)] == [1, 2]
    with pytest.raises(PairsError, match=r"r.jsonl:3: not JSON \("):
        list(rows(path))


HOSTILE = {
    "empty": b"",
    "blank": b"\n\n \n",
    "text": b"hello\nworld\n",
    "number": b"3\n",
    "string": b'"x"\n',
    "array of numbers": b"[1, 2]",
    "deep": b"[" * 200_000,
    "deep row": b'{"a": 1}\n{"a": ' + b"[" * 200_000 + b"\n",
    "not UTF-8": b'{"a": "\xff"}\n',
    "row that is an array": b'{"a": 1}\n[2]\n',
    "huge number": b'{"a": 1}\n{"a": ' + b"9" * 10_000 + b"}\n",
    "cut gzip": gzip.compress(b'{"a": 1}\n' * 1000)[:-20],
    "gzip of junk": gzip.compress(bytes(range(256))),
    "flipped xz": lzma.compress(b'{"a": 1}\n' * 1000)[:40] + b"\0" * 60,
    "cut bz2": bz2.compress(b'{"a": 1}\n' * 1000)[:-5],
    "zstd": b"\x28\xb5\x2f\xfd\x00\x00",
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94.",
    "zip": b"PK\x03\x04" + b"\0" * 40,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(tmp_path: Path, name: str) -> None:
    path = tmp_path / "data"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(PairsError, match=str(path)) as caught:
        list(rows(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"PAR1", b"PAR1" + b"\0" * 100, b"PAR1" + b"\xff" * 100 + b"\xff\xff\xff\x7fPAR1"])
def test_hostile_parquet(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "data.parquet"
    path.write_bytes(data)
    with pytest.raises(PairsError, match=r"data\.parquet"):
        list(rows(path))


def test_damaged_parquet_is_an_error_or_rows(tmp_path: Path) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", COLUMNS * 20).read_bytes()
    path = tmp_path / "cut.parquet"
    refused = 0
    for place in range(4, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            list(rows(path))
        except PairsError:
            refused += 1
    assert refused > 5


def test_parquet_without_the_wanted_columns(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", [{"x": 1}])
    with pytest.raises(PairsError, match="columns 'context', 'question'; it has 'x'"):
        list(rows(path, ("context", "question")))


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1" + b"\0" * 20)
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(PairsError, match=r'run pip install "steermoe-local\[hub\]"'):
        list(rows(tmp_path / "t.parquet"))


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(PairsError, match=r"cannot be read: .*; check"):
            list(rows(path))
