"""Files that unpack to far more than they are, and rows without an end."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from steermoe_local._util import compressed, records
from steermoe_local.errors import PairsError


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_refused_before_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pack: Callable[[bytes], bytes]
) -> None:
    monkeypatch.setattr(compressed, "_FREE", 1 << 16)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(pack(b"\n" * (1 << 22)))
    with pytest.raises(PairsError, match="200 times"):
        list(records.rows(path))
    path.write_bytes(pack(b'{"a": 1}\n' * 5000))  # a data set may repeat itself
    assert len(list(records.rows(path))) == 5000


def test_a_row_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "_MAX_ROW", 1000)
    path = tmp_path / "rows.csv"
    for text in ("x" * 5000, '"' + "a\n" * 5000, '"a\n"\n' * 3 + '"' + "b\n" * 600):
        path.write_text(f"prompt\n{text}")
        tracemalloc.start()
        try:
            with pytest.raises(PairsError, match="a row of more than"):
                list(records.csv_rows(path, ["prompt"]))
        finally:
            tracemalloc.stop()
    path.write_text("prompt\n" + '"a\nb"\n' * 1000)  # the limit is of one row
    assert len(list(records.csv_rows(path, ["prompt"]))) == 1000


def test_a_header_of_a_megabyte(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("prompt," + "," * (1 << 20) + "\n1\n")
    with pytest.raises(PairsError, match="header of more than 1024 KiB"):
        list(records.csv_rows(path, ["prompt"]))


def test_a_text_that_many_rows_of_parquet_share(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table({"prompt": pyarrow.array(["x" * 1_000_000] * 300)}), path, compression="zstd")
    assert path.stat().st_size < 2000
    before = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    allocated = max(pyarrow.total_allocated_bytes() - before for _ in records.rows(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(allocated, peak) < 100 << 20  # 16 rows; all would be 300 MB
