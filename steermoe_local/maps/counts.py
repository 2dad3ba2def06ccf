"""Routing counts: how many target tokens activated each expert, and their file.

The file is an uncompressed NumPy `.npz` without pickles: `a1` and `a2` (int64 [n_layer,
n_expert]), `n1` and `n2` (int64), `moe_layers` (int64 [n]) and `meta` (a JSON text: format,
version, model, behaviour, n_pairs, pairs_sha256, created, tool, and `sources` where it is known
which pairs of which file were counted).
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.files import StrPath, is_sha256, parse_json, read_bytes, replacing, timestamp, tool_name
from ..errors import FormatError, ModelMismatchError, UsageError
from ..identity import ModelIdentity

__all__ = ["RoutingCounts", "Source", "merge_counts"]

_FORMAT = "steermoe-counts"
_VERSION = 1
_MAX_BYTES = 1 << 30
_MAX_TOKENS = 1 << 53  # beyond it float64 rates would no longer be exact to one token
_MEMBERS = {"a1", "a2", "n1", "n2", "moe_layers", "meta"}
_META = {"format", "version", "model", "behaviour", "n_pairs", "pairs_sha256", "created", "tool"}


@dataclass(frozen=True, order=True)
class Source:
    """Pairs that went into counts: of the pairs of this digest, those at places i, i + n, i + 2n, ... (from 1).

    `shard` is (i, n), (1, 1) for all. `n_pairs` were counted, `n_skipped` could not be.
    """

    pairs_sha256: str
    shard: tuple[int, int] = (1, 1)
    n_pairs: int = 0
    n_skipped: int = 0

    def overlaps(self, other: Source) -> bool:
        """Do both hold some place of the same pairs?"""
        # i + a n = j + b m has solutions just where gcd(n, m) divides i - j
        step = math.gcd(self.shard[1], other.shard[1])
        return self.pairs_sha256 == other.pairs_sha256 and (self.shard[0] - other.shard[0]) % step == 0

    def __str__(self) -> str:
        """For messages."""
        whole = f"pairs {self.pairs_sha256[:8]}"
        return whole if self.shard == (1, 1) else f"shard {self.shard[0]}/{self.shard[1]} of {whole}"

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Source:
        """Read what `dataclasses.asdict` made of one. Raises FormatError."""
        again = "record the counts again"
        if not isinstance(data, dict) or set(data) != {"pairs_sha256", "shard", "n_pairs", "n_skipped"}:
            raise FormatError(f"{where}: not an object with pairs_sha256, shard, n_pairs, n_skipped; {again}")
        shard, numbers = data["shard"], (data["n_pairs"], data["n_skipped"])
        if not is_sha256(data["pairs_sha256"]):
            raise FormatError(f"{where}.pairs_sha256: not 64 lowercase hex digits; {again}")
        if not isinstance(shard, list) or len(shard) != 2 or any(type(part) is not int for part in shard):
            raise FormatError(f"{where}.shard: not two whole numbers; {again}")
        if not 1 <= shard[0] <= shard[1]:
            raise FormatError(f"{where}.shard: {shard[0]}/{shard[1]} is none; {again}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise FormatError(f"{where}: n_pairs, n_skipped: not counts; {again}")
        return cls(data["pairs_sha256"], (shard[0], shard[1]), *numbers)


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Target tokens that activated each expert, pooled over pairs (a and N of the paper's Eq. 3).

    `a1` and `a2` are int64 [n_layer, n_expert] for the positive and the negative sides, with rows
    of zeros for dense layers; `n1` and `n2` count the target tokens. `pairs_digest` holds the
    digest of every pairs file that was counted, sorted (a single string is accepted too).
    `sources` says more exactly which pairs these were, where that is known; then they come to `n_pairs`.
    Counts of the same model and behaviour add up with `+`.

    The arrays are copied and read-only. `validate` checks what they must satisfy.
    """

    identity: ModelIdentity
    a1: npt.NDArray[np.int64]
    a2: npt.NDArray[np.int64]
    n1: int
    n2: int
    moe_layers: tuple[int, ...]
    pairs_digest: tuple[str, ...] = ()
    n_pairs: int = 0
    behaviour: str = ""
    created: str = field(default_factory=timestamp)
    tool: str = field(default_factory=tool_name)
    sources: tuple[Source, ...] = ()

    def __post_init__(self) -> None:
        """Bring the fields into their final form and check them."""
        for name in ("a1", "a2"):
            value = np.asarray(getattr(self, name))
            if value.dtype.kind not in "iu":
                raise UsageError(f"{name}: counts of type {value.dtype}; give whole numbers")
            table = np.array(value, dtype=np.int64)
            table.flags.writeable = False
            object.__setattr__(self, name, table)
        digests = (self.pairs_digest,) if isinstance(self.pairs_digest, str) else self.pairs_digest
        object.__setattr__(self, "pairs_digest", tuple(sorted(digests)))
        object.__setattr__(self, "moe_layers", tuple(int(layer) for layer in self.moe_layers))
        object.__setattr__(self, "sources", tuple(sorted(self.sources)))
        object.__setattr__(self, "n1", int(self.n1))
        object.__setattr__(self, "n2", int(self.n2))

    def validate(self, where: str = "counts") -> None:
        """Check shapes, ranges and the top-k rule: a MoE layer's counts sum to N times top-k.

        `where` starts the messages. Raises FormatError.
        """
        again = "record the counts again"
        n_layer, n_expert = self.identity.shape
        layers = self.moe_layers
        if not layers or list(layers) != sorted(set(layers)):
            raise FormatError(f"{where}: moe_layers: empty or not ascending; {again}")
        if not 0 <= layers[0] <= layers[-1] < n_layer:
            raise FormatError(f"{where}: moe_layers: outside 0 to {n_layer - 1}; {again}")
        dense = np.setdiff1d(np.arange(n_layer), layers)
        for name, a, n in (("a1", self.a1, self.n1), ("a2", self.a2, self.n2)):
            if a.shape != (n_layer, n_expert):
                raise FormatError(
                    f"{where}: {name}: shape {a.shape}, but the model has {n_layer} layers of "
                    f"{n_expert} experts; {again}"
                )
            if not 0 <= n <= _MAX_TOKENS:
                raise FormatError(f"{where}: {name.replace('a', 'n')}: {n} tokens; {again}")
            if a.min() < 0 or a.max() > n:
                raise FormatError(f"{where}: {name}: counts outside 0 to {n} tokens; {again}")
            k = self.identity.n_expert_used
            sums = a.sum(axis=1)
            for layer in layers:
                if sums[layer] != n * k:
                    raise FormatError(
                        f"{where}: {name}: layer {layer} has {sums[layer]} activations, but {n} "
                        f"tokens at top-{k} make {n * k}; {again}"
                    )
            if sums[dense].any():
                raise FormatError(f"{where}: {name}: counts in a layer without experts; {again}")
        if not all(is_sha256(digest) for digest in self.pairs_digest):
            raise FormatError(f"{where}: pairs_sha256: not 64 lowercase hex digits; {again}")
        if type(self.n_pairs) is not int or self.n_pairs < 0:
            raise FormatError(f"{where}: n_pairs: {self.n_pairs!r} is not a count; {again}")
        if self.sources:
            if sum(source.n_pairs for source in self.sources) != self.n_pairs:
                raise FormatError(f"{where}: sources: their pairs are not {self.n_pairs} together; {again}")
            if {source.pairs_sha256 for source in self.sources} != set(self.pairs_digest):
                raise FormatError(f"{where}: sources: of other pairs than pairs_sha256; {again}")

    @property
    def n_skipped(self) -> int:
        """Pairs that could not be counted, as far as the sources tell."""
        return sum(source.n_skipped for source in self.sources)

    def __add__(self, other: RoutingCounts) -> RoutingCounts:
        """Pool two runs on the same model; digests are kept, the later date stays.

        Raises ModelMismatchError for another model, UsageError for another behaviour and for pairs whose sources say
        that they are in both.
        """
        if not isinstance(other, RoutingCounts):
            return NotImplemented
        self.identity.require_same(other.identity, "first counts", "the model of the second counts")
        if self.moe_layers != other.moe_layers:
            raise ModelMismatchError("counts: the two runs saw different MoE layers; record both with one version")
        if self.behaviour and other.behaviour and self.behaviour != other.behaviour:
            raise UsageError(
                f"counts: of {self.behaviour!r} and of {other.behaviour!r}; add only counts of one behaviour"
            )
        for mine in self.sources:
            for theirs in other.sources:
                if mine.overlaps(theirs):
                    raise UsageError(f"counts: {mine} and {theirs}: some pairs would count twice; leave one out")
        return RoutingCounts(
            identity=self.identity,
            a1=self.a1 + other.a1,
            a2=self.a2 + other.a2,
            n1=self.n1 + other.n1,
            n2=self.n2 + other.n2,
            moe_layers=self.moe_layers,
            pairs_digest=self.pairs_digest + other.pairs_digest,
            n_pairs=self.n_pairs + other.n_pairs,
            behaviour=self.behaviour or other.behaviour,
            created=max(self.created, other.created),
            tool=max(self.tool, other.tool),
            # of one that is known in part nothing can be said as a whole
            sources=self.sources + other.sources if self.sources and other.sources else (),
        )

    def save(self, path: StrPath) -> None:
        """Write the counts to `path`, whatever its suffix; the same counts give the same bytes.

        Raises FormatError when they are not valid, UsageError when the file cannot be written.
        """
        self.validate("counts")
        meta = {
            "format": _FORMAT,
            "version": _VERSION,
            "model": self.identity.to_dict(),
            "behaviour": self.behaviour,
            "n_pairs": self.n_pairs,
            "pairs_sha256": list(self.pairs_digest),
            "created": self.created,
            "tool": self.tool,
        }
        if self.sources:
            meta["sources"] = [asdict(source) for source in self.sources]
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                a1=self.a1,
                a2=self.a2,
                n1=np.int64(self.n1),
                n2=np.int64(self.n2),
                moe_layers=np.asarray(self.moe_layers, dtype=np.int64),
                meta=np.asarray(json.dumps(meta, ensure_ascii=False)),
            )

    @classmethod
    def load(cls, path: StrPath) -> RoutingCounts:
        """Read counts and validate them. Raises FormatError."""
        arrays = _read_npz(path)
        for name in ("a1", "a2", "n1", "n2", "moe_layers"):
            ndim = {"a1": 2, "a2": 2, "moe_layers": 1}.get(name, 0)
            if arrays[name].dtype != np.int64 or arrays[name].ndim != ndim:
                raise FormatError(f"{path}: {name}: not int64 with {ndim} dimensions")
        meta = _read_meta(arrays["meta"], path)
        counts = cls(
            identity=ModelIdentity.from_dict(meta["model"], f"{path}: model"),
            a1=arrays["a1"],
            a2=arrays["a2"],
            n1=int(arrays["n1"]),
            n2=int(arrays["n2"]),
            moe_layers=tuple(arrays["moe_layers"].tolist()),
            pairs_digest=tuple(meta["pairs_sha256"]),
            n_pairs=meta["n_pairs"],
            behaviour=meta["behaviour"],
            created=meta["created"],
            tool=meta["tool"],
            sources=tuple(
                Source.from_dict(data, f"{path}: sources[{index}]")
                for index, data in enumerate(meta.get("sources", ()))
            ),
        )
        counts.validate(str(path))
        return counts


def merge_counts(parts: Sequence[tuple[str, RoutingCounts]]) -> RoutingCounts:
    """Add the counts of several runs, each with the name of its file, for messages.

    Counts without sources are taken for all pairs of their digests. Raises UsageError for pairs that are in two of them
    and for another behaviour, ModelMismatchError for another model; both name the files.
    """
    if not parts:
        raise UsageError("no counts to merge; name at least one file")
    taken: list[tuple[str, Source]] = []
    for name, counts in parts:
        for source in counts.sources or [Source(digest) for digest in dict.fromkeys(counts.pairs_digest)]:
            for other, theirs in taken:
                if other != name and source.overlaps(theirs):
                    raise UsageError(
                        f"{name} ({source}) and {other} ({theirs}) share pairs, which would count twice; leave one out"
                    )
            taken.append((name, source))
    names = [name for name, _ in parts]
    if len(set(names)) < len(names):
        raise UsageError(f"{next(name for name in names if names.count(name) > 1)}: named twice; leave one out")
    first, total = parts[0]
    for name, counts in parts[1:]:
        total.identity.require_same(counts.identity, first, name)
        try:
            total += counts
        except (UsageError, ModelMismatchError) as error:
            raise type(error)(f"{name}: {error}") from None
    return total


def _read_npz(path: StrPath) -> dict[str, npt.NDArray[Any]]:
    data = read_bytes(path, "counts", _MAX_BYTES)
    if not data.startswith(b"PK"):
        raise FormatError(f"{path}: not a counts file (.npz); run steermoe detect to make one")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {info.filename.removesuffix(".npy") for info in archive.infolist()}
            # A few bytes of a compressed archive may unpack to any size.
            unpacked = sum(info.file_size for info in archive.infolist())
        if names != _MEMBERS:
            raise FormatError(f"{path}: not a counts file: its arrays are {sorted(names)}")
        if unpacked > _MAX_BYTES:
            raise FormatError(f"{path}: its arrays take {unpacked} bytes; not a counts file")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in _MEMBERS}
    except FormatError:
        raise
    except Exception as error:  # zipfile and NumPy raise a dozen types on damaged archives
        raise FormatError(f"{path}: damaged counts file ({error}); record it again") from error


def _read_meta(array: npt.NDArray[Any], path: StrPath) -> dict[str, Any]:
    try:
        if array.dtype.kind != "U" or array.ndim:
            raise ValueError("not a text")
        meta = parse_json(str(array))
        if not isinstance(meta, dict) or meta.get("format") != _FORMAT:
            raise ValueError("no steermoe-counts in it")
    except ValueError as error:
        raise FormatError(f"{path}: meta: {error}; not a counts file") from None
    if meta.get("version") != _VERSION:
        raise FormatError(
            f"{path}: counts of format version {meta.get('version')!r}, this program reads "
            f"{_VERSION}; upgrade steermoe-local"
        )
    if odds := sorted(set(meta) - {"sources"} ^ _META):
        odd = odds[0]
        raise FormatError(f"{path}: meta.{odd}: missing or unknown; record the counts again")
    for name in ("behaviour", "created", "tool"):
        if not isinstance(meta[name], str):
            raise FormatError(f"{path}: meta.{name}: not a string; record the counts again")
    digests = meta["pairs_sha256"]
    if not isinstance(digests, list) or not all(is_sha256(digest) for digest in digests):
        raise FormatError(f"{path}: meta.pairs_sha256: not a list of SHA-256 digests")
    if not isinstance(meta.get("sources", []), list):
        raise FormatError(f"{path}: meta.sources: not a list; record the counts again")
    return meta
