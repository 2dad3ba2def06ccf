"""Files of traces: three forms with the same values, whole or not there, in memory that does not grow."""

from __future__ import annotations

import csv
import errno
import gc
import json
import os
import sys
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import ModelIdentity, StorageError, UsageError
from steermoe_local._util import npz_parts, parquet_parts
from steermoe_local._util.file_kinds import TRACE, kind_of
from steermoe_local.detection.trace_files import (
    MOST_ID,
    TraceShape,
    bytes_of_tokens,
    require_room,
    trace_file,
    trace_kind,
)
from steermoe_local.detection.tracing import TracedText, TracedTokens
from tests.support.traces import arrays_of, text

IDENTITY = ModelIdentity("olmoe", n_layer=3, n_expert=6, n_expert_used=2, router_sha256="0" * 64)
FORMS = (".npz", ".csv", ".parquet")
HOSTILE = ['a,"b"\n\r\n', "=1+1", "\0", "\ufffd\u2028é", "", "NA", "x" * 1000, "'; drop"]


def token_text(token: int) -> str:
    return HOSTILE[token % len(HOSTILE)]


def traced(of: TracedText, first: int, n: int, *, logits: bool = True, seed: int = 0) -> TracedTokens:
    """Tokens of a text; layer 1 has no router."""
    rng = np.random.default_rng([seed, first, of.item])
    experts = rng.permuted(np.tile(np.arange(6, dtype=np.int32), (n, 3, 1)), axis=2)[:, :, :2]
    weights, values = rng.random((n, 3, 2), np.float32), rng.normal(size=(n, 3, 6)).astype(np.float32)
    experts[:, 1], weights[:, 1], values[:, 1] = -1, 0, np.nan
    values[0, 0, 0] = np.inf
    return TracedTokens(of, first, experts, weights, values if logits else None)


def parts() -> list[TracedTokens]:
    """Texts with hostile names, in several parts, of prompts and of sides of a pair."""
    found = []
    for item, name in enumerate(HOSTILE):
        of = text(range(item, item + 7), [-1, 0, 0, 1, -1, 300, 0], item, id=name)
        of.phases[:] = [0, 0, 0, 1, 1, 2, 2]
        found += [traced(of, 0, 4), traced(of, 4, 3)]
    for side in ("positive", "negative"):
        of = text(range(5), None, 8, id="pair", side=side, target=[1, 3])
        found.append(traced(of, 0, 5, seed=1 if side == "positive" else 2))
    return found


def write(path: Path, tokens: Iterable[TracedTokens], *, logits: bool = True) -> None:
    with trace_file(path, TraceShape(IDENTITY, logits), token_text, {"source": "here"}) as writer:
        for part in tokens:
            writer.add(part)


def rows_of_npz(path: Path) -> list[dict[str, Any]]:
    """The rows of the table, made of the arrays."""
    z = arrays_of(path)
    meta = json.loads(str(z["meta"]))
    names = dict(zip(z["vocabulary"].tolist(), z["vocabulary_texts"].tolist(), strict=True))
    rows = []
    for i in range(meta["n_tokens"]):
        at = int(z["texts"][i])
        for layer in range(z["experts"].shape[1]):
            if z["experts"][i, layer, 0] < 0:
                continue
            row: dict[str, Any] = {
                "item": int(z["items"][at]),
                "id": str(z["ids"][at]),
                "side": meta["sides"][z["sides"][at]],
                "position": int(z["positions"][i]),
                "token": int(z["tokens"][i]),
                "text": names[int(z["tokens"][i])],
                "phase": meta["phases"][z["phases"][i]],
                "target": int(z["targets"][i]),
                "rule": int(z["rules"][i]),
                "layer": layer,
            }
            row |= {f"expert_{k}": int(value) for k, value in enumerate(z["experts"][i, layer])}
            row |= {f"weight_{k}": np.float32(value) for k, value in enumerate(z["weights"][i, layer])}
            row |= {f"logit_{e}": np.float32(value) for e, value in enumerate(z["logits"][i, layer])}
            rows.append(row)
    return rows


def typed(row: dict[str, str]) -> dict[str, Any]:
    def value(name: str, cell: str) -> Any:
        if name in ("id", "side", "text", "phase"):
            return cell
        return np.float32(cell) if name.startswith(("weight", "logit")) else int(cell)

    return {name: value(name, cell) for name, cell in row.items()}


def test_the_forms_hold_the_same_values(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for form in FORMS:
        write(tmp_path / f"t{form}", parts())
    rows = rows_of_npz(tmp_path / "t.npz")
    assert len(rows) == (7 * len(HOSTILE) + 2 * 5) * 2
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert [typed(row) for row in csv.DictReader(file)] == [
            # a NumPy text ends before its NULs
            {**row, "id": row["id"] or HOSTILE[row["item"]], "text": row["text"] or HOSTILE[row["token"] % 8]}
            for row in rows
        ]
    table = parquet.read_table(tmp_path / "t.parquet")
    with open(tmp_path / "t.csv", encoding="utf-8", newline="") as file:
        assert table.to_pylist() == [typed(row) for row in csv.DictReader(file)]
    about = json.loads(parquet.read_metadata(tmp_path / "t.parquet").metadata[b"steermoe"])
    assert about["n_tokens"] == 7 * len(HOSTILE) + 10
    assert about["n_texts"] == len(HOSTILE) + 2
    assert about["source"] == "here"
    assert about["model"] == IDENTITY.to_dict()


def test_the_arrays_are_what_was_added(tmp_path: Path) -> None:
    given = parts()
    write(tmp_path / "t.npz", given)
    z = arrays_of(tmp_path / "t.npz")
    assert np.array_equal(z["experts"], np.concatenate([part.experts for part in given]))
    assert np.array_equal(z["weights"], np.concatenate([part.weights for part in given]))
    assert np.array_equal(z["logits"], np.concatenate([part.logits for part in given if part.logits is not None]), True)
    assert z["first"].tolist() == [*range(0, 7 * len(HOSTILE), 7), 7 * len(HOSTILE), 7 * len(HOSTILE) + 5]
    assert z["rules"][:7].tolist() == [-1, 0, 0, 1, -1, 300, 0]
    assert z["targets"].tolist()[-5:] == [False, True, False, True, False]
    assert all(len(name) <= MOST_ID for name in z["ids"])
    assert z["ids"][6] == "x" * (MOST_ID - 1) + "…"
    write(tmp_path / "again.npz", given)
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "t.npz").read_bytes()
    write(tmp_path / "few.npz", [traced(text([1]), 0, 1, logits=False)], logits=False)
    assert "logits" not in arrays_of(tmp_path / "few.npz")
    assert kind_of(tmp_path / "few.npz") is TRACE


def many(n_texts: int, n_tokens: int) -> Any:
    for item in range(n_texts):
        of = text(np.arange(n_tokens) % 8, None, item)
        for first in range(0, n_tokens, 50):
            yield traced(of, first, min(50, n_tokens - first))


def peak(work: Callable[[], None]) -> int:
    """Most bytes of Python objects and NumPy arrays during some work, beyond those before it."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the texts, or twice their length, and the same memory."""
    if form == ".parquet":
        pytest.importorskip("pyarrow")
        monkeypatch.setattr(parquet_parts, "_GROUP", 1 << 16)
    monkeypatch.setattr(npz_parts, "_COPIED", 1 << 14)

    def writing(n_texts: int, n_tokens: int) -> Callable[[], None]:
        def work() -> None:
            write(tmp_path / f"t{form}", many(n_texts, n_tokens))

        return work

    writing(2, 100)()  # what is imported and cached once
    small = peak(writing(40, 100))
    size = (tmp_path / f"t{form}").stat().st_size
    for n_texts, n_tokens in ((80, 100), (40, 200)):
        large = peak(writing(n_texts, n_tokens))
        grown = (tmp_path / f"t{form}").stat().st_size - size
        # a long text itself is the caller's, with 4 bytes for each token; Parquet lists its row groups
        assert large - small < grown / 16, (n_texts, n_tokens)
        assert grown > 100_000


@pytest.mark.parametrize("form", FORMS)
def test_a_failure_leaves_nothing(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the middle, also of the disk: what was there stays, and nothing lies beside it."""
    if form == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"t{form}"
    path.write_text("old")

    def failing() -> Any:
        yield from parts()[:3]
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write(path, failing())
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes")
@pytest.mark.parametrize("n_texts", [1, 400])
@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk(form: str, n_texts: int, tmp_path: Path) -> None:
    """Met while it is written, or at its end."""
    import resource

    if form == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"t{form}"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(StorageError) as found:
            write(path, many(n_texts, 50))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in str(found.value)
    assert os.listdir(tmp_path) == []


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("t", "t.json", "npz", "t.npz.gz"):
        with pytest.raises(UsageError, match=r"\.npz, \.csv or \.parquet"):
            trace_kind(tmp_path / name)
    assert trace_kind(tmp_path / "T.NPZ") == ".npz"
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(UsageError, match="folder"):
        write(tmp_path / "folder.csv", parts())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"steermoe-local\[trace\]"):
        trace_kind(tmp_path / "t.parquet")


def test_sizes_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of .npz exactly: twice the tokens of the same text, less the same headers."""
    shape = TraceShape(IDENTITY, True)
    for n in (50, 100):
        write(tmp_path / f"{n}.npz", [traced(text(np.arange(n) % 8), 0, n)])
    grown = (tmp_path / "100.npz").stat().st_size - (tmp_path / "50.npz").stat().st_size
    assert abs(grown - bytes_of_tokens("x.npz", shape, 50)) <= 8, "digits of numbers in the texts"
    require_room(tmp_path / "x.npz", shape, 1000)
    with pytest.raises(StorageError, match="free"):
        require_room(tmp_path / "x.npz", shape, 1 << 50)


def test_an_archive_of_no_rows(tmp_path: Path) -> None:
    with npz_parts.NpzParts(tmp_path / "t.npz") as made:
        made.add(numbers=np.zeros((0, 3), np.int16))
        made.finish(whole=np.asarray("text"))
    assert arrays_of(tmp_path / "t.npz")["numbers"].shape == (0, 3)
