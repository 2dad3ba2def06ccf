"""Routing counts of every pair, which confidence intervals need, and their file.

The file is a deflated NumPy `.npz` without pickles. It is written and read a chunk at a time, so that memory holds one
chunk. Chunk i has `a-<i>` (unsigned [pairs, 2, n_layer, n_expert]; 2: positive, negative), `n-<i>` (int64 [pairs, 2],
target tokens) and `ids-<i>` (a JSON list as text); i has six digits. `moe_layers` (int64 [n]) and `meta` (a JSON text:
format, version, model, behaviour, n_pairs, n_chunks, pairs_sha256, created, tool) come last.
"""

from __future__ import annotations

import contextlib
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util import npz
from .._util.disk import cannot_write
from .._util.file_kinds import PAIR_COUNTS
from .._util.files import StrPath, parse_json, timestamp, tool_name
from .._util.writing import Replacement
from ..errors import FormatError, ModelMismatchError, UsageError
from ..identity import ModelIdentity
from .counts import METADATA, RoutingCounts, check_routing, read_metadata, same_behaviour

_FORMAT = "steermoe-pair-counts"
_VERSION = 1
_WHAT = "pair counts (.npz of steermoe detect --per-pair)"
_AGAIN = "record the pairs again"
_CHUNK_VALUES = 1 << 20  # counts in a chunk; at 16 layers of 64 experts 512 pairs
_MAX_PAIRS = 1 << 24
_MAX_TOKENS = (1 << 32) - 1  # of one side of one pair: far above any context
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same counts give the same bytes

Counts = npt.NDArray[np.unsignedinteger[Any]]
Tokens = npt.NDArray[np.int64]


class PairCountsWriter:
    """Writes per-pair counts as they come; the file appears under its name on `close`.

        with PairCountsWriter("run.pairs.npz", identity, behaviour="digits", pairs_digest=digest) as writer:
            writer.append(["pair-1"], a, n)

    The end of the block closes the file; an error in the block removes it. The same pairs in the same order give the
    same bytes, however they were grouped.

    Raises UsageError, StorageError when the file cannot be written.
    """

    def __init__(
        self,
        path: StrPath,
        identity: ModelIdentity,
        *,
        behaviour: str = "",
        pairs_digest: str | Iterable[str] = (),
        created: str | None = None,
    ) -> None:
        self._identity = identity
        digests = (pairs_digest,) if isinstance(pairs_digest, str) else pairs_digest
        self._metadata: dict[str, Any] = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": identity.to_dict(),
            "behaviour": behaviour,
            "n_pairs": 0,
            "n_chunks": 0,
            "pairs_sha256": sorted(digests),
            "created": timestamp(created),
            "tool": tool_name(),
        }
        self._given = path
        self._file = Replacement(path)
        self._size = max(1, min(4096, _CHUNK_VALUES // (2 * identity.n_layer * identity.n_expert)))  # pairs of a chunk
        self._ids: list[str] = []
        self._a: list[npt.NDArray[Any]] = []
        self._n: list[Tokens] = []
        self._routed: npt.NDArray[np.bool_] = np.zeros(identity.n_layer, dtype=np.bool_)
        self._archive: zipfile.ZipFile | None = None
        with self._writing():
            # a seekable file: zipfile then writes each member's sizes into its header alone
            self._archive = zipfile.ZipFile(self._file.path, "w", zipfile.ZIP_DEFLATED)

    @property
    def n_pairs(self) -> int:
        """Pairs appended so far."""
        return int(self._metadata["n_pairs"]) + len(self._ids)

    def append(self, pair_ids: Sequence[str], a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Add pairs: `a` whole numbers [pairs, 2, n_layer, n_expert], `n` [pairs, 2] target tokens.

        Index 0 is the positive side, 1 the negative. In every layer with a router, a sums to n times top-k; the rows
        of other layers are 0.

        Raises UsageError for arrays of another shape or type, FormatError for counts that break the rule.
        """
        if self._archive is None:
            raise UsageError(f"{self._given}: already closed; make a new writer")
        counts, tokens, ids = np.asarray(a), np.asarray(n), list(pair_ids)
        if counts.dtype.kind not in "iu" or tokens.dtype.kind not in "iu":
            raise UsageError(f"a, n: of types {counts.dtype} and {tokens.dtype}; give whole numbers")
        if counts.shape != (len(ids), 2, *self._identity.shape) or tokens.shape != (len(ids), 2):
            raise UsageError(
                f"a, n: shapes {counts.shape} and {tokens.shape}, but {len(ids)} pairs make "
                f"{(len(ids), 2, *self._identity.shape)} and {(len(ids), 2)}"
            )
        if not all(isinstance(name, str) for name in ids):
            raise UsageError("pair_ids: not all are texts")
        if self.n_pairs + len(ids) > _MAX_PAIRS:
            raise UsageError(f"{self._given}: more than {_MAX_PAIRS} pairs; leave out the per-pair counts")
        self._routed |= _check(counts, tokens, self._identity, None, "pair counts")
        at = 0
        while at < len(ids):
            end = at + self._size - len(self._ids)
            self._ids += ids[at:end]
            # copies: the caller may use its arrays again
            self._a += list(counts[at:end].astype(np.uint32))
            self._n += list(tokens[at:end].astype(np.int64))
            at = end
            if len(self._ids) == self._size:
                self._flush()

    def extend(self, other: PairCounts) -> None:
        """Append all pairs of a file. Memory holds one chunk.

        Raises ModelMismatchError for another model, UsageError for another behaviour.
        """
        self._identity.require_same(other.identity, "first pair counts", "the model of the second")
        same_behaviour(self._metadata["behaviour"], other.behaviour)
        for part, a in other.chunks():
            self.append(other.pair_ids[part], a, other.n[part])

    def _flush(self) -> None:
        if not self._ids:
            return
        a = np.stack(self._a)
        chunk = self._metadata["n_chunks"]
        self._write(f"a-{chunk:06d}", a.astype(np.min_scalar_type(int(a.max()))))
        self._write(f"n-{chunk:06d}", np.stack(self._n))
        self._write(f"ids-{chunk:06d}", np.asarray(json.dumps(self._ids)))
        self._metadata["n_chunks"] += 1
        self._metadata["n_pairs"] += len(self._ids)
        self._ids, self._a, self._n = [], [], []

    def _write(self, name: str, array: npt.NDArray[Any]) -> None:
        assert self._archive is not None
        info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
        info.compress_type = zipfile.ZIP_DEFLATED
        with self._writing(), self._archive.open(info, "w", force_zip64=array.nbytes > 1 << 30) as file:
            np.lib.format.write_array(file, array, allow_pickle=False)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._given, error) from error

    def close(self) -> None:
        """Write the last chunk and give the file its name. A second call does nothing.

        Raises UsageError when no token was counted or the file cannot be written; the temporary file is then removed.
        """
        if self._archive is None:
            return
        try:
            if not self._routed.any():
                raise UsageError(f"{self._given}: no target token was counted; give at least one pair")
            self._flush()
            self._write("moe_layers", np.flatnonzero(self._routed).astype(np.int64))
            self._write("meta", np.asarray(json.dumps(self._metadata, ensure_ascii=False)))
            with self._writing():
                self._archive.close()
                self._archive = None
                self._file.commit()
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written. After `close` it does nothing."""
        archive, self._archive = self._archive, None
        try:
            if archive is not None:
                archive.close()
        except (OSError, ValueError):
            pass  # the disk may be full, or a member still open; the file is removed anyway
        finally:
            self._file.abort()

    def __enter__(self) -> PairCountsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Per-pair counts in a file, by `load`: ids and target tokens in memory, the activations read on request.

    `n` is int64 [n_pairs, 2], target tokens of the positive and negative sides. `pair_ids` may repeat when files of
    several runs were merged.
    """

    path: Path
    identity: ModelIdentity
    moe_layers: tuple[int, ...]
    pair_ids: tuple[str, ...]
    n: Tokens
    behaviour: str
    pairs_digest: tuple[str, ...]
    created: str
    tool: str
    _sizes: tuple[int, ...]

    @property
    def n_pairs(self) -> int:
        return len(self.pair_ids)

    @classmethod
    def load(cls, path: StrPath) -> PairCounts:
        """Read everything but the activations, and check it. Raises FormatError."""
        with npz.opened(path, _WHAT, _AGAIN, PAIR_COUNTS) as archive:
            fields = METADATA | {"n_chunks"}
            meta = read_metadata(archive.text("meta"), str(path), _FORMAT, _VERSION, fields)
            for name in ("n_pairs", "n_chunks"):
                if type(meta[name]) is not int or not 0 <= meta[name] <= _MAX_PAIRS:
                    raise FormatError(f"{path}: meta.{name}: {meta[name]!r} is not a count of pairs; {_AGAIN}")
            n_chunks, held = meta["n_chunks"], archive.names()
            members = (f"{name}-{chunk:06d}" for chunk in range(n_chunks) for name in ("a", "n", "ids"))
            if len(held) != 3 * n_chunks + 2 or set(held) != {*members, "moe_layers", "meta"}:
                raise FormatError(f"{path}: does not hold the {n_chunks} chunks that it names; {_AGAIN}")
            identity = ModelIdentity.from_dict(meta["model"], f"{path}: model")
            ids: list[str] = []
            tokens: list[Tokens] = []
            for chunk in range(n_chunks):
                part = _read_ids(archive.text(f"ids-{chunk:06d}"), path, chunk)
                n = archive.array(f"n-{chunk:06d}", "i", (len(part), 2))
                if n.size and not 0 <= int(n.min()) <= int(n.max()) <= _MAX_TOKENS:
                    raise FormatError(f"{path}: n-{chunk:06d}: outside 0 to {_MAX_TOKENS} tokens; {_AGAIN}")
                ids += part
                tokens.append(n.astype(np.int64))
                if len(ids) > meta["n_pairs"]:
                    break
            if len(ids) != meta["n_pairs"] or not ids:
                raise FormatError(f"{path}: meta.n_pairs: {meta['n_pairs']}, but it holds others; {_AGAIN}")
            layers = archive.array("moe_layers", "i", None).tolist()
            if not layers or layers != sorted(set(layers)) or not 0 <= layers[0] <= layers[-1] < identity.n_layer:
                raise FormatError(f"{path}: moe_layers: empty, not ascending or not of the model; {_AGAIN}")
        n = np.concatenate(tokens)
        n.flags.writeable = False
        return cls(
            path=Path(path),
            identity=identity,
            moe_layers=tuple(layers),
            pair_ids=tuple(ids),
            n=n,
            behaviour=meta["behaviour"],
            pairs_digest=tuple(meta["pairs_sha256"]),
            created=meta["created"],
            tool=meta["tool"],
            _sizes=tuple(len(part) for part in tokens),
        )

    def chunks(self) -> Iterator[tuple[slice, Counts]]:
        """Yield (pairs, activations) in order: a slice of `n`, unsigned [pairs, 2, n_layer, n_expert].

        Raises FormatError when the activations do not fit the tokens.
        """
        start = 0
        with npz.opened(self.path, _WHAT, _AGAIN, PAIR_COUNTS) as archive:
            for chunk, size in enumerate(self._sizes):
                name = f"a-{chunk:06d}"
                part = slice(start, start + size)
                a = archive.array(name, "u", (size, 2, *self.identity.shape))
                _check(a, self.n[part], self.identity, self.moe_layers, f"{self.path}: {name}")
                yield part, a
                start += size

    def total(self) -> RoutingCounts:
        """The counts of the whole run, summed over the pairs. Raises FormatError."""
        a = np.zeros((2, *self.identity.shape), dtype=np.int64)
        for _, part in self.chunks():
            a += part.sum(axis=0, dtype=np.int64)
        n1, n2 = self.n.sum(axis=0).tolist()
        counts = RoutingCounts(
            identity=self.identity,
            a1=a[0],
            a2=a[1],
            n1=n1,
            n2=n2,
            moe_layers=self.moe_layers,
            pairs_digest=self.pairs_digest,
            n_pairs=self.n_pairs,
            behaviour=self.behaviour,
            created=self.created,
            tool=self.tool,
        )
        counts.validate(str(self.path))
        return counts

    def require_total(self, counts: Any, where: str = "counts") -> None:
        """Check that these pairs make up `counts`: a `RoutingCounts`, or an `ExpertMap` with or without tables.

        Raises ModelMismatchError for another model, FormatError for other numbers.
        """
        if self.identity != counts.identity:
            raise ModelMismatchError(
                f"{self.path}: made for {self.identity.short}, but {where} for {counts.identity.short}; "
                "take the two files of one run"
            )
        total = self.total()
        for name in ("n_pairs", "n1", "n2", "a1", "a2"):
            mine, other = getattr(total, name), getattr(counts, name)
            if other is None or np.array_equal(mine, other):
                continue
            sums = isinstance(other, np.ndarray)
            what = f"its sums are not {name} of {where}" if sums else f"{name} is {mine}, but {other} in {where}"
            raise FormatError(f"{self.path}: {what}; take the two files of one run")


def merge_pair_counts(paths: Sequence[StrPath], output: StrPath) -> PairCounts:
    """Write the pairs of several files of one model and behaviour into one file, in the order given.

    Raises UsageError, FormatError or ModelMismatchError as `PairCountsWriter.extend`.
    """
    loaded = [PairCounts.load(path) for path in paths]
    if not loaded:
        raise UsageError("no pair counts to put together; name at least one file")
    behaviour = next((part.behaviour for part in loaded if part.behaviour), "")
    digests = [digest for part in loaded for digest in part.pairs_digest]
    created = max(part.created for part in loaded) or None
    first = loaded[0].identity
    with PairCountsWriter(output, first, behaviour=behaviour, pairs_digest=digests, created=created) as writer:
        for part in loaded:
            writer.extend(part)
    return PairCounts.load(output)


def _check(
    a: npt.NDArray[Any], n: npt.NDArray[Any], identity: ModelIdentity, moe_layers: Sequence[int] | None, where: str
) -> npt.NDArray[np.bool_]:
    """`check_routing` of a chunk, after its numbers of tokens."""
    if n.size and not 0 <= int(n.min()) <= int(n.max()) <= _MAX_TOKENS:
        raise FormatError(f"{where}: counts outside 0 to {_MAX_TOKENS} tokens; {_AGAIN}")
    return check_routing(a, n, identity, moe_layers, where, _AGAIN)


def _read_ids(text: str, path: StrPath, chunk: int) -> list[str]:
    try:
        ids = parse_json(text)
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError("not a list of texts")
    except ValueError as error:
        raise FormatError(f"{path}: ids-{chunk:06d}: {error}; {_AGAIN}") from None
    return ids
