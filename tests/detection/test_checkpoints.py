"""Checkpoints of interrupted recordings: files, damage, resuming."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local import (
    FormatError,
    Pair,
    UsageError,
    record_counts,
)
from steermoe_local.detection.checkpoint import Checkpoint, CheckpointFile, PairRecords
from steermoe_local.detection.recording_options import RecordingProgress
from steermoe_local.maps.routing_sums import RoutingSums
from tests.support.detecting import same, sums_bytes, text_pairs

#
# checkpoints
#

SETTINGS = {"model": "m", "pairs": "0" * 64, "n_batch": 512, "shard": [1, 1]}
SHAPE = (3, 4)


def checkpoint_of(seed: int) -> Checkpoint:
    rng = np.random.default_rng(seed)
    sums = RoutingSums(rng.normal(size=(2, *SHAPE)), rng.random((2, SHAPE[0])), rng.random((2, *SHAPE)))
    return Checkpoint(rng.integers(0, 9, (2, *SHAPE)), rng.integers(0, 9, (2, SHAPE[0])), sums, 7, 6, 1, 0)


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
        if name == "sums":
            assert sums_bytes(again.sums) == sums_bytes(value)
        else:
            assert np.array_equal(getattr(again, name), value)
    again.a += 1  # it is gone on with
    found = list(file.records(again.journal, SHAPE))
    for seed, (n, records) in enumerate(zip((3, 1, 5), found, strict=True)):
        for name in ("indices", "n", "a"):
            assert np.array_equal(getattr(records, name), getattr(records_of(seed, n), name))
    (tmp_path / ".m[1].json.partial.npz.0123456789ab.tmp").touch()
    (tmp_path / ".m1.json.partial.npz.0123456789ab.tmp").touch()
    file.remove()
    file.remove()
    assert [path.name for path in tmp_path.iterdir()] == [".m1.json.partial.npz.0123456789ab.tmp"]


@pytest.mark.parametrize("name", SETTINGS)
def test_another_run_is_refused_and_named(tmp_path: Path, name: str) -> None:
    file = CheckpointFile(tmp_path / "m.json")
    file.save(checkpoint_of(1), SETTINGS)
    with pytest.raises(UsageError) as caught:
        file.load(SETTINGS | {name: "other"}, SHAPE)
    assert f"{name} was {SETTINGS[name]!r}" in str(caught.value)
    assert "'other'" in str(caught.value)
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
    """Stop a run after some batches of its own."""
    left = after + 1  # the first report is from before the first batch

    def stop(progress: RecordingProgress) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_counts(path, pairs, n_threads=1, checkpoint=file, on_batch=stop, **options)


def test_resume_at_every_batch(tiny_path: Path, tmp_path: Path, chat_pairs: list[Pair]) -> None:
    """An interrupted run comes to the counts of one that was not, bit for bit, and computes no pair again."""
    pairs = chat_pairs[::2]
    seen: list[RecordingProgress] = []
    whole = record_counts(tiny_path, pairs, n_threads=1, n_batch=128, on_batch=seen.append)
    first, *seen = seen
    assert first.n_done == 0, "nothing is done before the first batch"
    assert len(seen) >= 6
    file = CheckpointFile(tmp_path / "m.json")
    done = [progress.n_done for progress in seen]
    for batch in range(len(seen)):
        again: list[RecordingProgress] = []
        interrupted(tiny_path, pairs, file, 1, n_batch=128)
        state = json.loads(str(np.load(file.path)["meta"]))
        assert state["next"] == done[batch] or batch == len(seen) - 1
        counts = None
        if batch in (2, len(seen) - 1):
            copy = CheckpointFile(tmp_path / f"copy{batch}")
            copy.path.write_bytes(file.path.read_bytes())
            counts = record_counts(tiny_path, pairs, n_threads=1, n_batch=128, checkpoint=copy, on_batch=again.append)
            assert [progress.n_done for progress in again] == done[batch:]
            assert same(counts, whole)
            assert sums_bytes(counts.sums) == sums_bytes(whole.sums)
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
    assert sums_bytes(counts.sums) == sums_bytes(whole.sums)
    assert counts.sources == whole.sources
    assert (counts.n_pairs, counts.n_skipped) == (15, 1)
    assert skipped == ["bad"] * 2, "reported once by a run, not again when it goes on"


def test_resume_refuses_other_settings(tiny_path: Path, tmp_path: Path) -> None:
    file = CheckpointFile(tmp_path / "m.json")
    interrupted(tiny_path, text_pairs(40), file, 1, n_batch=40)
    before = file.path.read_bytes()
    for pairs, options, words in (
        (text_pairs(39), {}, "pairs was"),
        (text_pairs(40), {"n_batch": 48}, "n_batch was 40.* 48"),
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
