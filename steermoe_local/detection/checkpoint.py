"""The checkpoint of a recording: what it has counted so far, in files beside its output, so that it can be resumed.

`<output>.partial.npz` (no pickles): `a` (int64 [2, n_layer, n_expert]; positive, negative), `n` (int64 [2, n_layer])
and `meta` (a JSON text: format, version, settings, next, n_pairs, n_skipped, journal). `settings` is all that must be
the same to resume: model, pairs, and what changes the counts. `next` is the index of the first pair not counted yet.
Where targets are split into two phases there are the same tables of each phase, too (`a-0`, `a-1`, ...), and the
version is 3.

`<output>.partial.pairs`, only with per-pair counts: frames of eight bytes (two little-endian uint32: pairs, length) and
as many bytes of zlib-deflated little-endian numbers: indices of the pairs (int64), target tokens (int64 [pairs, 2]),
activations (uint32 [pairs, 2, n_layer, n_expert]). `journal` is how many bytes of it are valid. Where targets are split
there are numbers of the two phases in place of each (int64 [pairs, 2, 2], uint32 [pairs, 2, 2, n_layer, n_expert]).

The checkpoint is replaced atomically, and the journal grows, on the disk, before the checkpoint counts the new bytes: a
killed process and a power cut leave both valid. The output is locked meanwhile, so that no second process counts.
Other versions of the program, and machines of another byte order, do not read them.
"""

from __future__ import annotations

import contextlib
import json
import struct
import zlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util import npz
from .._util.disk import cannot_write, flush_file
from .._util.file_kinds import CHECKPOINT
from .._util.files import StrPath, parse_json, replacing, require_writable
from .._util.locks import OutputLock
from .._util.writing import beside, remove, remove_leftovers
from ..errors import FormatError, UsageError
from ..llama.template_date import other_date
from ..maps import routing_sums
from ..maps.routing_sums import RoutingSums

Int64 = npt.NDArray[np.int64]

_FORMAT = "steermoe-partial-counts"
_VERSION, _VERSION_WITH_PHASES = 2, 3
_META = {"format", "version", "settings", "next", "n_pairs", "n_skipped", "journal"}
_WHAT = "a checkpoint of steermoe detect"
_AGAIN = "start again with --restart"
_RESUME = "go on with the same command and --resume"
_HEADER = struct.Struct("<II")


@dataclass
class Tables:
    """What was counted of some tokens: `a` int64 [2, n_layer, n_expert], `n` int64 [2, n_layer], `sums`.

    The positive sides come first.
    """

    a: Int64
    n: Int64
    sums: RoutingSums

    @classmethod
    def zeros(cls, shape: tuple[int, int]) -> Tables:
        """Those of no token of a model of `shape` (n_layer, n_expert)."""
        return cls(np.zeros((2, *shape), np.int64), np.zeros((2, shape[0]), np.int64), RoutingSums.zeros(shape))

    def add(self, other: Tables) -> None:
        """Add what was counted of other tokens."""
        self.a += other.a
        self.n += other.n
        self.sums += other.sums


@dataclass
class Checkpoint(Tables):
    """State of a recording: the tables of all target tokens, and of the two phases if they are split.

    Pairs before index `next` are counted, or skipped.
    """

    next: int = 0
    n_pairs: int = 0
    n_skipped: int = 0
    journal: int = 0
    phases: list[Tables] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class PairRecords:
    """Counts of some pairs: `indices` [pairs] in the pairs file, `n` [pairs, 2], `a` [pairs, 2, n_layer, n_expert].

    Of targets that are split, `n` is [pairs, 2, 2] and `a` [pairs, 2, 2, n_layer, n_expert]: side, phase.
    """

    indices: Int64
    n: Int64
    a: npt.NDArray[np.uint32]

    @classmethod
    def zeros(cls, indices: Int64, shape: tuple[int, int], n_phases: int) -> PairRecords:
        """Those of pairs without a token; `n_phases` 0: targets are not split."""
        sides = (len(indices), 2, n_phases) if n_phases else (len(indices), 2)
        return cls(indices, np.zeros(sides, np.int64), np.zeros((*sides, *shape), np.uint32))

    def of(self, phase: int | None = None) -> PairRecords:
        """Those of one phase, or of all tokens."""
        if self.n.ndim == 2:
            return self
        if phase is None:
            return PairRecords(self.indices, self.n.sum(axis=2), self.a.sum(axis=2, dtype=np.uint32))
        return PairRecords(self.indices, self.n[:, :, phase], self.a[:, :, phase])


class CheckpointFile:
    """The checkpoint of one output, and its journal of per-pair counts.

    A context manager, whose block has the lock of the output; it can be entered again inside.
    """

    def __init__(self, output: StrPath) -> None:
        """`output` is the file that the run writes at its end."""
        self.path = beside(output, ".partial.npz")
        self.journal = beside(output, ".partial.pairs")
        self._lock = OutputLock(output)

    def __enter__(self) -> CheckpointFile:
        """Take the lock. Raises BusyError."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def exists(self) -> bool:
        """Is there an interrupted run?"""
        return self.path.exists()

    def remove(self) -> None:
        """Remove the checkpoint, its journal, and temporary files of a killed process. Raises StorageError."""
        for path in (self.path, self.journal):  # in this order: a checkpoint needs its journal
            remove(path)
            remove_leftovers(path)

    def load(
        self,
        settings: Mapping[str, Any],
        shape: tuple[int, int],
        may_lack: Collection[str] = (),
        *,
        n_phases: int = 0,
    ) -> Checkpoint:
        """Read the checkpoint of a model of `shape` (n_layer, n_expert); it may lack the settings `may_lack`.

        `n_phases` 2: of targets that are split.

        Raises UsageError, which names the first of `settings` that was another one, and FormatError.
        """
        with npz.opened(self.path, _WHAT, _AGAIN, CHECKPOINT) as archive:
            meta = _read_meta(archive.text("meta"), self.path)
            lacks = set(may_lack) - set(meta["settings"])
            _require_same(meta["settings"], {n: v for n, v in settings.items() if n not in lacks}, self.path)
            if meta["version"] != _version(n_phases):
                raise FormatError(f"{self.path}: of another version of steermoe-local; {_AGAIN}")
            whole, *phases = [_read_tables(archive, end, shape) for end in _ends(n_phases)]
        numbers = {name: meta[name] for name in ("next", "n_pairs", "n_skipped", "journal")}
        negative = any(table.a.min() < 0 or table.n.min() < 0 for table in (whole, *phases))
        if any(type(value) is not int or value < 0 for value in numbers.values()) or negative:
            raise FormatError(f"{self.path}: numbers below 0; {_AGAIN}")
        for name in ("a", "n") if phases else ():
            if not np.array_equal(sum(getattr(table, name) for table in phases), getattr(whole, name)):
                raise FormatError(f"{self.path}: {name} of the phases are not {name} of all tokens; {_AGAIN}")
        return Checkpoint(whole.a, whole.n, whole.sums, **numbers, phases=phases)

    def save(self, checkpoint: Checkpoint, settings: Mapping[str, Any]) -> None:
        """Replace the checkpoint. Raises UsageError and StorageError when it cannot be written."""
        version = _version(len(checkpoint.phases))
        meta: dict[str, Any] = {"format": _FORMAT, "version": version, "settings": dict(settings)}
        meta |= {name: getattr(checkpoint, name) for name in ("next", "n_pairs", "n_skipped", "journal")}
        again = _RESUME if self.exists() else ""
        with replacing(self.path, cure=again) as temporary, open(temporary, "wb") as file:
            arrays: dict[str, Any] = {}
            for end, tables in zip(_ends(len(checkpoint.phases)), [checkpoint, *checkpoint.phases], strict=True):
                arrays |= {f"a{end}": tables.a, f"n{end}": tables.n}
                arrays |= {f"{name}{end}": getattr(tables.sums, name) for name in routing_sums.MEMBERS}
            np.savez(file, **arrays, meta=np.asarray(json.dumps(meta)))

    def append(self, records: PairRecords, at: int) -> int:
        """Write a frame at byte `at` of the journal, replacing any later content; returns where it ends.

        Raises UsageError, StorageError.
        """
        parts = (records.indices.astype("<i8"), records.n.astype("<i8"), records.a.astype("<u4"))
        data = zlib.compress(b"".join(part.tobytes() for part in parts), 1)
        target = require_writable(self.journal)
        try:
            with open(target, "r+b" if at else "wb") as file:
                file.seek(at)
                file.write(_HEADER.pack(len(records.indices), len(data)) + data)
                file.truncate()
                file.flush()
                flush_file(file.fileno())
        except OSError as error:
            raise cannot_write(self.journal, error, _RESUME) from error
        return at + _HEADER.size + len(data)

    def records(self, end: int, shape: tuple[int, int], n_phases: int = 0) -> Iterator[PairRecords]:
        """Read the journal's first `end` bytes, frame by frame. Raises FormatError."""
        if not end:
            return
        sides = (2, n_phases) if n_phases else (2,)
        n_bins = 2 * max(n_phases, 1)
        per_pair = 8 + n_bins * (8 + 4 * shape[0] * shape[1])
        try:
            with open(self.journal, "rb") as file:
                at = 0
                while at < end:
                    n_pairs, length = _HEADER.unpack(file.read(_HEADER.size))
                    unpacker = zlib.decompressobj()
                    data = unpacker.decompress(file.read(length), n_pairs * per_pair + 1)
                    if len(data) != n_pairs * per_pair or not unpacker.eof:
                        raise ValueError("a frame of another length")
                    n_numbers = (1 + n_bins) * n_pairs
                    numbers = np.frombuffer(data, "<i8", n_numbers)
                    yield PairRecords(
                        indices=numbers[:n_pairs],
                        n=numbers[n_pairs:].reshape(n_pairs, *sides),
                        a=np.frombuffer(data, "<u4", offset=8 * n_numbers).reshape(n_pairs, *sides, *shape),
                    )
                    at += _HEADER.size + length
        except (OSError, ValueError, struct.error, zlib.error) as error:
            raise FormatError(f"{self.journal}: damaged ({error}); {_AGAIN}") from error


def _version(n_phases: int) -> int:
    return _VERSION_WITH_PHASES if n_phases else _VERSION


def _ends(n_phases: int) -> list[str]:
    """Ends of the names of the arrays of all tokens, and of each phase."""
    return ["", *(f"-{phase}" for phase in range(n_phases))]


def _read_tables(archive: Any, end: str, shape: tuple[int, int]) -> Tables:
    sums = routing_sums.shapes(shape).items()
    return Tables(
        archive.array(f"a{end}", "i", (2, *shape)).astype(np.int64),
        archive.array(f"n{end}", "i", (2, shape[0])).astype(np.int64),
        RoutingSums(**{name: archive.array(f"{name}{end}", "<f8", size) for name, size in sums}),
    )


def _read_meta(text: str, path: Path) -> dict[str, Any]:
    meta: Any = None
    with contextlib.suppress(ValueError):
        meta = parse_json(text)
    if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
        raise FormatError(f"{path}: not {_WHAT}; {_AGAIN}")
    known = meta.get("version") in (_VERSION, _VERSION_WITH_PHASES)
    if not known or set(meta) != _META or not isinstance(meta["settings"], dict):
        raise FormatError(f"{path}: of another version of steermoe-local; {_AGAIN}")
    return meta


def _require_same(old: dict[str, Any], new: Mapping[str, Any], path: Path) -> None:
    if old.get("date") != new.get("date"):
        raise UsageError(f"{path}: cannot go on: {other_date(old.get('date'), new.get('date'))}, or {_AGAIN}")
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            raise UsageError(
                f"{path}: cannot go on: {name} was {old.get(name)!r}, now it is {new.get(name)!r}; "
                "run with the old one, or start again with --restart"
            )
