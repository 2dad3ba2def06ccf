"""Routing counts of every pair, kept beside the pooled ones, and their file: what confidence intervals need.

The file is a deflated NumPy `.npz` without pickles, written a chunk at a time and read a chunk at a time, so that
neither needs memory for more than one chunk of counts. Chunk i holds `a-<i>` (unsigned [pairs, 2, n_layer, n_expert];
2: positive, negative), `n-<i>` (int64 [pairs, 2], target tokens) and `ids-<i>` (a JSON list as text); i has six digits.
`moe_layers` (int64 [n]) and `meta` (a JSON text: format, version, model, behaviour, n_pairs, n_chunks, pairs_sha256,
created, tool) come last.
"""

from __future__ import annotations

import json
import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util import npz
from .._util.files import StrPath, is_sha256, parse_json, require_writable, timestamp, tool_name
from ..errors import FormatError, ModelMismatchError, UsageError
from ..identity import ModelIdentity
from .counts import RoutingCounts

__all__ = ["PairCounts", "PairCountsWriter", "merge_pair_counts"]

_FORMAT = "steermoe-pair-counts"
_VERSION = 1
_META = {"format", "version", "model", "behaviour", "n_pairs", "n_chunks", "pairs_sha256", "created", "tool"}
_WHAT = "pair counts (.npz of steermoe detect --per-pair)"
_AGAIN = "record the pairs again"
_CHUNK_VALUES = 1 << 20  # counts in a chunk; at 16 layers of 64 experts 512 pairs
_MAX_PAIRS = 1 << 24
_MAX_TOKENS = (1 << 32) - 1  # of one side of one pair: far above any context
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same counts give the same bytes

Counts = npt.NDArray[np.unsignedinteger[Any]]
Tokens = npt.NDArray[np.int64]


def _members(n_chunks: int) -> set[str]:
    return {f"{name}-{chunk:06d}" for chunk in range(n_chunks) for name in ("a", "n", "ids")} | {"moe_layers", "meta"}


def _pairs_of_a_chunk(identity: ModelIdentity) -> int:
    return max(1, min(4096, _CHUNK_VALUES // (2 * identity.n_layer * identity.n_expert)))


class PairCountsWriter:
    """Write per-pair counts as they come; the file appears under its name on `close`.

        with PairCountsWriter("run.pairs.npz", identity, behaviour="digits", pairs_digest=digest) as writer:
            writer.append(["pair-1"], a, n)

    The block's end closes it; an error in the block removes what was written. The same pairs in the same order give the
    same bytes, however they were grouped.

    Raises UsageError when the file cannot be written.
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
        self._meta: dict[str, Any] = {
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
        self._target = require_writable(path)
        self._temporary = self._target.with_name(f".{self._target.name}.{secrets.token_hex(6)}.tmp")
        self._size = _pairs_of_a_chunk(identity)
        self._ids: list[str] = []
        self._a: list[npt.NDArray[Any]] = []
        self._n: list[Tokens] = []
        self._routed: npt.NDArray[np.bool_] = np.zeros(identity.n_layer, dtype=np.bool_)
        try:
            # zipfile then writes each member's sizes into its header, and no second copy of them behind it
            self._archive: zipfile.ZipFile | None = zipfile.ZipFile(self._temporary, "w", zipfile.ZIP_DEFLATED)
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror or error}") from error

    @property
    def n_pairs(self) -> int:
        """Pairs appended so far."""
        return int(self._meta["n_pairs"]) + len(self._ids)

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
        """Add all pairs of a file: to go on from it, or to put shards together. Memory holds one chunk.

        Raises ModelMismatchError for another model, UsageError for another behaviour.
        """
        self._identity.require_same(other.identity, "first pair counts", "the model of the second")
        mine = self._meta["behaviour"]
        if mine and other.behaviour and mine != other.behaviour:
            raise UsageError(f"pair counts: of {mine!r} and of {other.behaviour!r}; put together only one behaviour's")
        for part, a in other.chunks():
            self.append(other.pair_ids[part], a, other.n[part])

    def _flush(self) -> None:
        if not self._ids:
            return
        a = np.stack(self._a)
        chunk = self._meta["n_chunks"]
        self._write(f"a-{chunk:06d}", a.astype(np.min_scalar_type(int(a.max()))))
        self._write(f"n-{chunk:06d}", np.stack(self._n))
        self._write(f"ids-{chunk:06d}", np.asarray(json.dumps(self._ids)))
        self._meta["n_chunks"] += 1
        self._meta["n_pairs"] += len(self._ids)
        self._ids, self._a, self._n = [], [], []

    def _write(self, name: str, array: npt.NDArray[Any]) -> None:
        assert self._archive is not None
        info = zipfile.ZipInfo(f"{name}.npy", _EPOCH)
        info.compress_type = zipfile.ZIP_DEFLATED
        try:
            with self._archive.open(info, "w", force_zip64=array.nbytes > 1 << 30) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
        except OSError as error:
            raise UsageError(f"{self._given}: cannot be written: {error.strerror or error}") from error

    def close(self) -> None:
        """Write what is left and give the file its name. A second call does nothing.

        Raises UsageError when no token was counted or the file cannot be written; the temporary file is gone then.
        """
        if self._archive is None:
            return
        try:
            if not self._routed.any():
                raise UsageError(f"{self._given}: no target token was counted; give at least one pair")
            self._flush()
            self._write("moe_layers", np.flatnonzero(self._routed).astype(np.int64))
            self._write("meta", np.asarray(json.dumps(self._meta, ensure_ascii=False)))
            self._archive.close()
            self._archive = None
            os.replace(self._temporary, self._target)
        except OSError as error:
            raise UsageError(f"{self._given}: cannot be written: {error.strerror or error}") from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Remove what was written. After `close` it does nothing."""
        archive, self._archive = self._archive, None
        try:
            if archive is not None:
                archive.close()
        except (OSError, ValueError):
            pass  # the disk may be full, or a member still open; it is removed anyway
        finally:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> PairCountsWriter:
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close the file, or remove it after an error."""
        if kind is None:
            self.close()
        else:
            self.abort()


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Per-pair counts in a file: ids and target tokens in memory, the activations read when they are asked for.

    `n` is int64 [n_pairs, 2], target tokens of the positive and negative sides. `pair_ids` need not be unique once
    shards of several pairs files were put together. `load` makes one.
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
        """How many pairs there are."""
        return len(self.pair_ids)

    @classmethod
    def load(cls, path: StrPath) -> PairCounts:
        """Read everything but the activations, and check it. Raises FormatError."""
        with npz.opened(path, _WHAT, _AGAIN) as archive:
            meta = _read_meta(archive.text("meta"), path)
            n_chunks = meta["n_chunks"]
            held = archive.names()
            if len(held) != 3 * n_chunks + 2 or set(held) != _members(n_chunks):
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
        with npz.opened(self.path, _WHAT, _AGAIN) as archive:
            for chunk, size in enumerate(self._sizes):
                name = f"a-{chunk:06d}"
                part = slice(start, start + size)
                a = archive.array(name, "u", (size, 2, *self.identity.shape))
                _check(a, self.n[part], self.identity, self.moe_layers, f"{self.path}: {name}")
                yield part, a
                start += size

    def total(self) -> RoutingCounts:
        """Pool all pairs: the counts of the run. Raises FormatError."""
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
        for name in ("n_pairs", "n1", "n2"):
            mine, other = getattr(total, name), getattr(counts, name)
            if mine != other:
                raise FormatError(
                    f"{self.path}: {name} is {mine}, but {other} in {where}; take the two files of one run"
                )
        for name in ("a1", "a2"):
            other = getattr(counts, name)
            if other is not None and not np.array_equal(getattr(total, name), other):
                raise FormatError(f"{self.path}: its sums are not {name} of {where}; take the two files of one run")


def merge_pair_counts(paths: Sequence[StrPath], output: StrPath) -> PairCounts:
    """Put the pairs of several runs or shards of one model and behaviour into one file, in the order given.

    Raises UsageError, FormatError or ModelMismatchError as `PairCountsWriter.extend`.
    """
    loaded = [PairCounts.load(path) for path in paths]
    if not loaded:
        raise UsageError("no pair counts to put together; name at least one file")
    behaviour = next((part.behaviour for part in loaded if part.behaviour), "")
    digests = [digest for part in loaded for digest in part.pairs_digest]
    created = max(part.created for part in loaded)
    writer = PairCountsWriter(
        output, loaded[0].identity, behaviour=behaviour, pairs_digest=digests, created=created or None
    )
    with writer:
        for part in loaded:
            writer.extend(part)
    return PairCounts.load(output)


def _check(
    a: npt.NDArray[Any], n: npt.NDArray[Any], identity: ModelIdentity, moe_layers: Sequence[int] | None, where: str
) -> npt.NDArray[np.bool_]:
    """Check the top-k rule of each pair; returns which layers routed a token."""
    if not a.size:
        return np.zeros(identity.n_layer, dtype=np.bool_)
    if int(a.min()) < 0 or int(n.min()) < 0 or int(n.max()) > _MAX_TOKENS:
        raise FormatError(f"{where}: counts outside 0 to {_MAX_TOKENS}; {_AGAIN}")
    if (a.max(axis=3) > n[:, :, None]).any():
        raise FormatError(f"{where}: an expert with more activations than there are tokens; {_AGAIN}")
    sums = a.sum(axis=3, dtype=np.int64)
    routed: npt.NDArray[np.bool_] = sums.any(axis=(0, 1))
    layers = np.flatnonzero(routed) if moe_layers is None else np.asarray(moe_layers)
    if (sums[:, :, layers] != n[:, :, None] * identity.n_expert_used).any():
        raise FormatError(f"{where}: activations that are not tokens times top-{identity.n_expert_used}; {_AGAIN}")
    if np.setdiff1d(np.flatnonzero(routed), layers).size:
        raise FormatError(f"{where}: counts in a layer without experts; {_AGAIN}")
    return routed


def _read_ids(text: str, path: StrPath, chunk: int) -> list[str]:
    try:
        ids = parse_json(text)
        if not isinstance(ids, list) or not all(isinstance(name, str) for name in ids):
            raise ValueError("not a list of texts")
    except ValueError as error:
        raise FormatError(f"{path}: ids-{chunk:06d}: {error}; {_AGAIN}") from None
    return ids


def _read_meta(text: str, path: StrPath) -> dict[str, Any]:
    try:
        meta = parse_json(text)
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise ValueError(f"no {_FORMAT} in it")
    except ValueError as error:
        raise FormatError(f"{path}: meta: {error}; not pair counts") from None
    if meta.get("version") != _VERSION:
        raise FormatError(
            f"{path}: pair counts of format version {meta.get('version')!r}, this program reads {_VERSION}; "
            "upgrade steermoe-local"
        )
    if set(meta) != _META:
        raise FormatError(f"{path}: meta.{sorted(set(meta) ^ _META)[0]}: missing or unknown; {_AGAIN}")
    for name in ("behaviour", "created", "tool"):
        if not isinstance(meta[name], str):
            raise FormatError(f"{path}: meta.{name}: not a string; {_AGAIN}")
    for name in ("n_pairs", "n_chunks"):
        if type(meta[name]) is not int or not 0 <= meta[name] <= _MAX_PAIRS:
            raise FormatError(f"{path}: meta.{name}: {meta[name]!r} is not a count of pairs; {_AGAIN}")
    digests = meta["pairs_sha256"]
    if not isinstance(digests, list) or not all(is_sha256(digest) for digest in digests):
        raise FormatError(f"{path}: meta.pairs_sha256: not a list of SHA-256 digests; {_AGAIN}")
    return meta
