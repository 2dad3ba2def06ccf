"""Routing counts: how many target tokens activated each expert, and their file.

The file is an uncompressed NumPy `.npz` without pickles: `a1` and `a2` (int64 [n_layer, n_expert]), `n1` and `n2`
(int64), `moe_layers` (int64 [n]) and `meta` (a JSON text: format, version, model, behaviour, n_pairs, pairs_sha256,
created, tool; `sources` where it is known which pairs of which file were counted, `dates` where the chat template
printed the date, `until_stable` where the run was to end early, and `phase` where the tokens are those of one phase of
the targets). With sums it is of version 2, and has the tables of `RoutingSums`, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util import npz
from .._util.file_kinds import COUNTS
from .._util.files import StrPath, is_sha256, parse_json, replacing, timestamp, tool_name
from ..errors import FormatError, ModelMismatchError, UsageError
from ..identity import ModelIdentity
from . import routing_sums
from .map_phases import phase_problem, phase_words, read_phase
from .routing_sums import RoutingSums
from .stability import Stability

_FORMAT = "steermoe-counts"
_VERSION, _VERSION_WITH_SUMS = 1, 2
_WHAT = "a counts file (.npz of steermoe detect)"
_AGAIN = "record the counts again"
_MAX_TOKENS = 1 << 53  # beyond it float64 rates would no longer be exact to one token
MAX_SOURCES = 4096  # each is compared with each other
_MEMBERS = ["a1", "a2", "meta", "moe_layers", "n1", "n2"]
METADATA = {"format", "version", "model", "behaviour", "n_pairs", "pairs_sha256", "created", "tool"}


@dataclass(frozen=True, order=True)
class Source:
    """The pairs that were counted: every n-th of the pairs with this digest, beginning at the i-th (from 1).

    `shard` is (i, n), (1, 1) for all. `n_pairs` were counted, `n_skipped` could not be.
    """

    pairs_sha256: str
    shard: tuple[int, int] = (1, 1)
    n_pairs: int = 0
    n_skipped: int = 0

    def overlaps(self, other: Source) -> bool:
        """Whether some pair is in both."""
        # i + a n = j + b m has solutions just where gcd(n, m) divides i - j
        step = math.gcd(self.shard[1], other.shard[1])
        return self.pairs_sha256 == other.pairs_sha256 and (self.shard[0] - other.shard[0]) % step == 0

    def __str__(self) -> str:
        whole = f"pairs {self.pairs_sha256[:8]}"
        return whole if self.shard == (1, 1) else f"shard {self.shard[0]}/{self.shard[1]} of {whole}"

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Source:
        """Rebuild a source from its `asdict`. Raises FormatError."""
        if not isinstance(data, dict) or set(data) != {"pairs_sha256", "shard", "n_pairs", "n_skipped"}:
            raise FormatError(f"{where}: not an object with pairs_sha256, shard, n_pairs, n_skipped; {_AGAIN}")
        shard, numbers = data["shard"], (data["n_pairs"], data["n_skipped"])
        if not is_sha256(data["pairs_sha256"]):
            raise FormatError(f"{where}.pairs_sha256: not 64 lowercase hex digits; {_AGAIN}")
        if not isinstance(shard, list) or len(shard) != 2 or any(type(part) is not int for part in shard):
            raise FormatError(f"{where}.shard: not two whole numbers; {_AGAIN}")
        if not 1 <= shard[0] <= shard[1]:
            raise FormatError(f"{where}.shard: {shard[0]}/{shard[1]} is none; {_AGAIN}")
        if any(type(number) is not int or number < 0 for number in numbers):
            raise FormatError(f"{where}: n_pairs, n_skipped: not counts; {_AGAIN}")
        return cls(data["pairs_sha256"], (shard[0], shard[1]), *numbers)


@dataclass(frozen=True, eq=False)
class RoutingCounts:
    """Target tokens that activated each expert, pooled over pairs (a and N of the paper's Eq. 3).

    `a1` and `a2` are int64 [n_layer, n_expert] for the positive and the negative sides, with rows
    of zeros for dense layers; `n1` and `n2` count the target tokens. `pairs_digest` holds the
    digest of every pairs file that was counted, sorted (a single string is accepted too).
    `sources` says which pairs these were, where that is known; their `n_pairs` then add up to `n_pairs`. `dates` are
    those (YYYY-MM-DD, sorted) that the chat template printed, if it prints one. `stability` says how a run
    ended that was to end early; a sum of counts has none. `sums` are what the routers computed for the same tokens, if
    it was recorded; counts that are added have them where all of them do. `phase` says which of the targets' tokens
    were counted, "" for all (`map_phases`). Counts of the same model, behaviour and phase add up with `+`.

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
    dates: tuple[str, ...] = ()
    stability: Stability | None = None
    sums: RoutingSums | None = None
    phase: str = ""

    def __post_init__(self) -> None:
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
        object.__setattr__(self, "dates", tuple(sorted(set(self.dates))))
        object.__setattr__(self, "n1", int(self.n1))
        object.__setattr__(self, "n2", int(self.n2))

    def validate(self, where: str = "counts") -> None:
        """Check shapes, ranges and the top-k rule: a MoE layer's counts sum to N times top-k.

        `where` starts the messages. Raises FormatError.
        """
        n_layer, n_expert = self.identity.shape
        layers = self.moe_layers
        if not layers or list(layers) != sorted(set(layers)):
            raise FormatError(f"{where}: moe_layers: empty or not ascending; {_AGAIN}")
        if not 0 <= layers[0] <= layers[-1] < n_layer:
            raise FormatError(f"{where}: moe_layers: outside 0 to {n_layer - 1}; {_AGAIN}")
        for name, a, n in (("1", self.a1, self.n1), ("2", self.a2, self.n2)):
            if a.shape != (n_layer, n_expert):
                raise FormatError(
                    f"{where}: a{name}: shape {a.shape}, but the model has {n_layer} layers of {n_expert} experts; "
                    f"{_AGAIN}"
                )
            if not 0 <= n <= _MAX_TOKENS:
                raise FormatError(f"{where}: n{name}: {n} tokens; {_AGAIN}")
            check_routing(a[None], np.array([n]), self.identity, layers, f"{where}: a{name}", _AGAIN)
        if self.sums is not None:
            self.sums.check(np.stack([self.a1, self.a2]), where, _AGAIN)
        if not all(is_sha256(digest) for digest in self.pairs_digest):
            raise FormatError(f"{where}: pairs_sha256: not 64 lowercase hex digits; {_AGAIN}")
        if type(self.n_pairs) is not int or self.n_pairs < 0:
            raise FormatError(f"{where}: n_pairs: {self.n_pairs!r} is not a count; {_AGAIN}")
        if problem := dates_problem(self.dates):
            raise FormatError(f"{where}: {problem}; {_AGAIN}")
        if self.stability and self.stability.n_pairs != self.n_pairs:
            raise FormatError(f"{where}: until_stable: of {self.stability.n_pairs} pairs, not {self.n_pairs}; {_AGAIN}")
        if problem := phase_problem(self.phase):
            raise FormatError(f"{where}: {problem}; {_AGAIN}")
        if len(self.sources) > MAX_SOURCES:
            raise FormatError(f"{where}: sources: {len(self.sources)}, more than {MAX_SOURCES}; {_AGAIN}")
        if self.sources:
            if sum(source.n_pairs for source in self.sources) != self.n_pairs:
                raise FormatError(f"{where}: sources: their pairs are not {self.n_pairs} together; {_AGAIN}")
            if {source.pairs_sha256 for source in self.sources} != set(self.pairs_digest):
                raise FormatError(f"{where}: sources: of other pairs than pairs_sha256; {_AGAIN}")

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
        behaviour = same_behaviour(self.behaviour, other.behaviour)
        if self.phase != other.phase:
            raise UsageError(
                f"counts: of {phase_words(self.phase)} and of {phase_words(other.phase)}; put together only counts of "
                "one phase"
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
            behaviour=behaviour,
            created=max(self.created, other.created),
            tool=max(self.tool, other.tool),
            # sources that cover only a part would not add up to n_pairs
            sources=self.sources + other.sources if self.sources and other.sources else (),
            dates=self.dates + other.dates,
            sums=self.sums + other.sums if self.sums and other.sums else None,
            phase=self.phase,
        )

    def save(self, path: StrPath) -> None:
        """Write the counts to `path`, whatever its suffix; the same counts give the same bytes.

        Raises FormatError when they are not valid, UsageError, StorageError when the file cannot be written.
        """
        self.validate("counts")
        metadata = {
            "format": _FORMAT,
            "version": _VERSION if self.sums is None else _VERSION_WITH_SUMS,
            "model": self.identity.to_dict(),
            "behaviour": self.behaviour,
            "n_pairs": self.n_pairs,
            "pairs_sha256": list(self.pairs_digest),
            "created": self.created,
            "tool": self.tool,
        }
        if self.sources:
            metadata["sources"] = [asdict(source) for source in self.sources]
        if self.dates:
            metadata["dates"] = list(self.dates)
        if self.stability:
            metadata["until_stable"] = self.stability.to_dict()
        if self.phase:
            metadata["phase"] = self.phase
        names = () if self.sums is None else routing_sums.MEMBERS
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(
                file,
                a1=self.a1,
                a2=self.a2,
                n1=np.int64(self.n1),
                n2=np.int64(self.n2),
                moe_layers=np.asarray(self.moe_layers, dtype=np.int64),
                meta=np.asarray(json.dumps(metadata, ensure_ascii=False)),
                **{name: getattr(self.sums, name) for name in names},
            )

    @classmethod
    def load(cls, path: StrPath) -> RoutingCounts:
        """Read counts and validate them. Raises FormatError."""
        with npz.opened(path, _WHAT, _AGAIN, COUNTS) as archive:
            members = sorted(archive.names())
            has_sums = members == sorted([*_MEMBERS, *routing_sums.MEMBERS])
            if not has_sums and members != _MEMBERS:
                raise FormatError(f"{path}: not a counts file: its arrays are {members}")
            version = _VERSION_WITH_SUMS if has_sums else _VERSION
            optional = ("sources", "dates", "until_stable", "phase")
            data = read_metadata(archive.text("meta"), str(path), _FORMAT, version, METADATA, optional)
            identity = ModelIdentity.from_dict(data["model"], f"{path}: model")
            shapes = {"a1": identity.shape, "a2": identity.shape, "n1": (), "n2": (), "moe_layers": None}
            tables: dict[str, Any] = {name: archive.array(name, "<i8", shape) for name, shape in shapes.items()}
            if has_sums:
                found = routing_sums.shapes(identity.shape).items()
                tables["sums"] = RoutingSums(**{name: archive.array(name, "<f8", shape) for name, shape in found})
        sources = data.get("sources", [])
        if not isinstance(sources, list):
            raise FormatError(f"{path}: meta.sources: not a list; {_AGAIN}")
        if problem := dates_problem(data.get("dates", [])):
            raise FormatError(f"{path}: meta.{problem}; {_AGAIN}")
        stability = None
        try:
            phase = read_phase(data, _AGAIN)
            if "until_stable" in data:
                stability = Stability.from_dict(data["until_stable"])
        except FormatError as error:
            raise FormatError(f"{path}: meta.{error}") from None
        counts = cls(
            identity=identity,
            **tables,
            pairs_digest=tuple(data["pairs_sha256"]),
            n_pairs=data["n_pairs"],
            behaviour=data["behaviour"],
            created=data["created"],
            tool=data["tool"],
            sources=tuple(Source.from_dict(item, f"{path}: sources[{i}]") for i, item in enumerate(sources)),
            dates=tuple(data.get("dates", ())),
            stability=stability,
            phase=phase,
        )
        counts.validate(str(path))
        return counts


def merge_counts(parts: Sequence[tuple[str, RoutingCounts]]) -> RoutingCounts:
    """Add the counts of several runs, each given with the name of its file for messages.

    Counts without sources are assumed to hold all pairs of their digests. Raises UsageError for pairs that are in two
    of them and for another behaviour, ModelMismatchError for another model; both name the files.
    """
    if not parts:
        raise UsageError("no counts to merge; name at least one file")
    n_sources = sum(len(counts.sources) for _, counts in parts)
    if n_sources > MAX_SOURCES:
        raise UsageError(f"counts of {n_sources} sources, more than {MAX_SOURCES}; merge fewer files")
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


def same_behaviour(one: str, other: str) -> str:
    """The behaviour of two counts that are put together; "" agrees with every one. Raises UsageError."""
    if one and other and one != other:
        raise UsageError(f"counts: of {one!r} and of {other!r}; put together only counts of one behaviour")
    return one or other


def check_routing(
    a: npt.NDArray[Any],
    n: npt.NDArray[Any],
    identity: ModelIdentity,
    moe_layers: Sequence[int] | None,
    where: str,
    again: str,
) -> npt.NDArray[np.bool_]:
    """Check counts a [..., n_layer, n_expert] against their tokens n [...] by the top-k rule.

    An expert has 0 to n activations; a layer's sum to n times top-k in `moe_layers` (None: in every layer with a
    count) and are 0 elsewhere. Returns the mask [n_layer] of layers with a count. Raises FormatError.
    """
    if not a.size:
        return np.zeros(identity.n_layer, dtype=np.bool_)
    if a.min() < 0 or (a.max(axis=(-2, -1)) > n).any():
        raise FormatError(f"{where}: counts outside 0 to {n.max()} tokens; {again}")
    sums = a.sum(axis=-1, dtype=np.int64).reshape(-1, identity.n_layer)
    routed: npt.NDArray[np.bool_] = sums.any(axis=0)
    layers = np.flatnonzero(routed) if moe_layers is None else np.asarray(moe_layers)
    expected = n.reshape(-1, 1).astype(np.int64) * identity.n_expert_used
    if len(wrong := np.argwhere(sums[:, layers] != expected)):
        row, column = wrong[0]
        raise FormatError(
            f"{where}: layer {layers[column]} has {sums[row, layers[column]]} activations, but {n.flat[row]} tokens at "
            f"top-{identity.n_expert_used} make {expected[row, 0]}; {again}"
        )
    if np.setdiff1d(np.flatnonzero(routed), layers).size:
        raise FormatError(f"{where}: counts in a layer without experts; {again}")
    return routed


def dates_problem(dates: Any) -> str | None:
    """What is wrong with the dates in a file, which are texts like 2026-01-31; None: nothing."""
    try:
        good = isinstance(dates, (list, tuple)) and all(date.fromisoformat(day).isoformat() == day for day in dates)
    except (TypeError, ValueError):
        good = False
    return None if good else f"dates: {str(dates)[:60]!r} is no list of dates like 2026-01-31"


def read_metadata(
    text: str, where: str, format_: str, version: int, fields: set[str], optional: Collection[str] = ()
) -> dict[str, Any]:
    """Parse and check the metadata of a counts file, which has `fields` and may have `optional`. Raises FormatError."""
    try:
        data = parse_json(text)
        if not isinstance(data, dict) or data.get("format") != format_:
            raise ValueError(f"no {format_} in it")
    except ValueError as error:
        raise FormatError(f"{where}: meta: {error}; not a file of this kind") from None
    if data.get("version") != version:
        raise FormatError(
            f"{where}: {format_} of format version {data.get('version')!r}, this program reads {version}; "
            "upgrade steermoe-local"
        )
    if odd := sorted((set(data) - set(optional)) ^ fields):
        raise FormatError(f"{where}: meta.{odd[0]}: missing or unknown; {_AGAIN}")
    for name in ("behaviour", "created", "tool"):
        if not isinstance(data[name], str):
            raise FormatError(f"{where}: meta.{name}: not a string; {_AGAIN}")
    digests = data["pairs_sha256"]
    if not isinstance(digests, list) or not all(is_sha256(digest) for digest in digests):
        raise FormatError(f"{where}: meta.pairs_sha256: not a list of SHA-256 digests; {_AGAIN}")
    return data
