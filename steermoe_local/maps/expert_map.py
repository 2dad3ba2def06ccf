"""Expert maps: the scores of one behaviour on one model, and the choice of experts by them; `map_json` writes them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.file_kinds import MAP, require_kind
from .._util.files import StrPath, is_sha256, parse_json, read_bytes, replacing, timestamp, tool_name
from ..errors import ChoiceError, FormatError, UsageError
from ..identity import MAX_LAYERS, ModelIdentity
from .confidence import Confidence
from .counts import RoutingCounts, dates_problem
from .effects import Effects
from .map_json import AGAIN, COUNTS, map_fields, map_text
from .map_phases import phase_problem
from .ranks import action_scores, ranks_of
from .recommended import Recommended, require_in_table
from .routing_sums import logit_difference, weight_difference
from .scores import IntArray, risk_difference, risk_difference_from
from .scores import rank as rank_experts
from .stability import Stability

_MAX_BYTES = 256 << 20


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """Risk differences of a behaviour, with their source.

    `rd` is float64 [n_layer, n_expert], within [-1, 1], 0 in dense layers. `positive` and `negative` describe the two
    sides. `n1` and `n2` are the counted target tokens, 0 when they are unknown; `a1` and `a2` the counts themselves
    (int64, shaped like `rd`), or None. `se` are standard errors of `rd` (float64, shaped like it) and `confidence` says
    how stable the scores are, both or None: see `significance.annotate`. `logit` and `weight` are further scores
    (float64, shaped like `rd`, or None): the difference of the mean router logit in units of the layer's deviation, and
    that of the mean routed weight. `effects` are those of interventions, or None. `dates` (YYYY-MM-DD) were printed by
    the chat template, none if it prints none. `stability` says how a run ended that was to end early. `phase` says of
    which tokens of the targets the map is, "" for all (`map_phases`). `recommended` is the choice that it recommends,
    if any. The arrays are copied and read-only.

    Raises FormatError when a field does not fit the others.
    """

    identity: ModelIdentity
    behaviour: str
    rd: npt.NDArray[np.float64]
    positive: str = ""
    negative: str = ""
    n1: int = 0
    n2: int = 0
    n_pairs: int = 0
    pairs_sha256: tuple[str, ...] = ()
    a1: npt.NDArray[np.int64] | None = None
    a2: npt.NDArray[np.int64] | None = None
    se: npt.NDArray[np.float64] | None = None
    confidence: Confidence | None = None
    license: str = ""
    notes: str = ""
    created: str = field(default_factory=timestamp)
    tool: str = field(default_factory=tool_name)
    dates: tuple[str, ...] = ()
    stability: Stability | None = None
    logit: npt.NDArray[np.float64] | None = None
    weight: npt.NDArray[np.float64] | None = None
    effects: Effects | None = None
    phase: str = ""
    recommended: Recommended | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rd", _table(self.rd, "rd", self.identity, np.float64))
        if not (np.isfinite(self.rd).all() and np.abs(self.rd).max() <= 1):
            raise FormatError(f"rd: values that are not within -1 to 1; {AGAIN}")
        object.__setattr__(self, "pairs_sha256", tuple(self.pairs_sha256))
        if not all(is_sha256(digest) for digest in self.pairs_sha256):
            raise FormatError(f"pairs_sha256: not SHA-256 digests; {AGAIN}")
        if problem := dates_problem(self.dates):
            raise FormatError(f"{problem}; {AGAIN}")
        object.__setattr__(self, "dates", tuple(self.dates))
        if problem := phase_problem(self.phase):
            raise FormatError(f"{problem}; {AGAIN}")
        for name in COUNTS:
            value = getattr(self, name)
            if type(value) is not int or not 0 <= value <= 1 << 53:
                raise FormatError(f"{name}: {value!r} is not a count; {AGAIN}")
        for one, two in (("se", "confidence"), ("a1", "a2")):
            if (getattr(self, one) is None) != (getattr(self, two) is None):
                raise FormatError(f"{one}, {two}: only one of them is there; give both or none")
        if self.se is not None and self.confidence is not None:
            object.__setattr__(self, "se", _table(self.se, "se", self.identity, np.float64))
            if not (np.isfinite(self.se).all() and self.se.min() >= 0):
                raise FormatError("se: values that are no standard errors; run steermoe map stats again")
            if self.confidence.moe_layers[-1] >= self.identity.n_layer or self.confidence.n_pairs != self.n_pairs:
                raise FormatError("confidence: of other pairs or layers than the map's; run steermoe map stats again")
        for name in ("logit", "weight"):
            if getattr(self, name) is not None:
                table = _table(getattr(self, name), name, self.identity, np.float64)
                if not (np.abs(table) <= 1e9).all():  # false for NaN
                    raise FormatError(f"{name}: values that are no scores; {AGAIN}")
                object.__setattr__(self, name, table)
        if self.effects is not None:
            self.effects.check(self.identity)
        if self.stability and self.stability.n_pairs != self.n_pairs:
            raise FormatError(f"until_stable: of {self.stability.n_pairs} pairs, not {self.n_pairs}; {AGAIN}")
        if self.recommended is not None:
            self._check_recommended(self.recommended)
        if self.a1 is None or self.a2 is None:
            return
        for name, a, n in (("a1", self.a1, self.n1), ("a2", self.a2, self.n2)):
            table = _table(a, name, self.identity, np.int64)
            if n == 0 or table.min() < 0 or table.max() > n:
                raise FormatError(f"{name}: counts outside 0 to {n} tokens; {AGAIN}")
            object.__setattr__(self, name, table)
        again = risk_difference_from(self.a1, self.n1, self.a2, self.n2)
        if np.abs(again - self.rd).max() > 1e-9:
            raise FormatError(f"rd: is not a1 / n1 - a2 / n2; {AGAIN}")

    @classmethod
    def from_counts(
        cls,
        counts: RoutingCounts,
        behaviour: str = "",
        *,
        positive: str = "",
        negative: str = "",
        license: str = "",
        notes: str = "",
        created: str | None = None,
    ) -> ExpertMap:
        """Score routing counts (arXiv 2509.09660, Eq. 4), and their sums where there are any.

        `behaviour` defaults to the counts', `created` to SOURCE_DATE_EPOCH or now. Raises UsageError when a side is
        empty.
        """
        return cls(
            identity=counts.identity,
            behaviour=behaviour or counts.behaviour,
            rd=risk_difference(counts),
            positive=positive,
            negative=negative,
            n1=counts.n1,
            n2=counts.n2,
            n_pairs=counts.n_pairs,
            pairs_sha256=counts.pairs_digest,
            a1=counts.a1,
            a2=counts.a2,
            license=license,
            notes=notes,
            created=timestamp(created),
            dates=counts.dates,
            stability=counts.stability,
            logit=None if counts.sums is None else logit_difference(counts.sums, counts.n1, counts.n2),
            weight=None if counts.sums is None else weight_difference(counts.sums, counts.n1, counts.n2),
            phase=counts.phase,
        )

    def top(self, n: int) -> list[tuple[int, int, float]]:
        """The first `n` experts as (layer, expert, rd): by |RD|, ties by (layer, expert).

        Raises UsageError when `n` is negative.
        """
        _require_count("n", n)
        order = rank_experts(self.rd)[:n].tolist()
        return [(layer, expert, float(self.rd[layer, expert])) for layer, expert in order]

    def choose(
        self,
        n_activate: int = 0,
        n_deactivate: int = 0,
        *,
        reverse: bool = False,
        layers: Iterable[int] | None = None,
        max_active_per_layer: int | None = None,
        rank: str = "rd",
    ) -> npt.NDArray[np.int8]:
        """Choose experts; returns signs, int8 [n_layer, n_expert]: +1, -1 or 0.

        By default in the order of |RD| (ties by layer and expert), the first `n_activate` with RD > 0 get +1 and the
        first `n_deactivate` with RD < 0 get -1, or all if there are fewer. `rank` is one of `ranks.RANKS`, which may
        score promoting and suppressing an expert apart. `reverse` flips the scores' signs first, `layers` restricts the
        choice. Of the experts with +1, a layer keeps the first `max_active_per_layer` (default and most: top-k); the
        others are dropped, not replaced (arXiv 2509.09660, Alg. 1).

        Raises ChoiceError when a layer would keep fewer than top-k experts that are not -1, or a layer does not exist;
        UsageError when a number is negative, or the map lacks what the rank needs.
        """
        _require_count("n_activate", n_activate)
        _require_count("n_deactivate", n_deactivate)
        most = self.identity.max_active
        cap = most if max_active_per_layer is None else max_active_per_layer
        if type(cap) is not int or not 0 <= cap <= most:
            raise UsageError(f"max_active_per_layer: {cap!r} is not from 0 to {most}, the experts a token uses")
        positive, negative = self._by_sign(reverse, layers, rank)
        promoted, suppressed = positive[:n_activate], negative[:n_deactivate]
        possible = _first_of_layer(suppressed, self.identity.max_inactive)
        if not possible.all():
            taken = int(np.argmin(possible))
            raise ChoiceError(
                f"layer {suppressed[taken, 0]}: deactivating {n_deactivate} would leave fewer than the "
                f"{self.identity.n_expert_used} experts that each token uses; deactivate at most {taken}"
            )
        signs = np.zeros(self.rd.shape, dtype=np.int8)
        signs[tuple(promoted[_first_of_layer(promoted, cap)].T)] = 1
        signs[tuple(suppressed.T)] = -1
        return signs

    def numbers(
        self, *, reverse: bool = False, layers: Iterable[int] | None = None, rank: str = "rd"
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The `n_activate` and the `n_deactivate` for which `choose` makes different choices, each ascending from 0.

        Values that `choose` refuses are left out, and so are those that only add experts that are dropped. Raises
        ChoiceError for a layer that does not exist, UsageError as `choose`.
        """
        positive, negative = self._by_sign(reverse, layers, rank)
        kept = _first_of_layer(positive, self.identity.max_active)
        possible = _first_of_layer(negative, self.identity.max_inactive)
        n_possible = len(negative) if possible.all() else int(np.argmin(possible))
        return (0, *(np.flatnonzero(kept) + 1).tolist()), tuple(range(n_possible + 1))

    def n_worth(
        self, *, reverse: bool = False, layers: Iterable[int] | None = None, rank: str = "rd"
    ) -> tuple[int, int]:
        """How many experts are worth promoting, and how many suppressing, by a rank. Raises as `numbers`."""
        positive, negative = self._by_sign(reverse, layers, rank)
        return len(positive), len(negative)

    def _by_sign(self, reverse: bool, layers: Iterable[int] | None, rank: str) -> tuple[IntArray, IntArray]:
        """The experts worth promoting and those worth suppressing, each as rows (layer, expert), the best first."""
        wanted, found = self._layers(layers), []
        for worth in action_scores(self, rank):
            above = np.maximum(-worth if reverse else worth, 0.0)
            order = rank_experts(above, wanted)
            found.append(order[above[order[:, 0], order[:, 1]] > 0])
        return found[0], found[1]

    def to_json(self) -> str:
        """Return the text of the file; the same map gives the same text."""
        return map_text(self)

    @cached_property
    def sha256(self) -> str:
        """SHA-256 (hex) of the file that `save` writes for the map without its recommended choice.

        So what is saved with explicit numbers (chats, plans, bias files) stays good when a choice is recommended later.
        """
        return hashlib.sha256(map_text(self, recommended=False).encode("utf-8")).hexdigest()

    def save(self, path: StrPath) -> None:
        """Write the map. Raises UsageError, StorageError when the file cannot be written."""
        with replacing(path) as temporary:
            temporary.write_bytes(self.to_json().encode("utf-8"))

    @classmethod
    def load(cls, path: StrPath) -> ExpertMap:
        """Read and validate a map. Raises FormatError, which names the file and the field."""
        require_kind(path, "an expert map", MAP)
        try:
            data = parse_json(read_bytes(path, "an expert map", _MAX_BYTES).decode("utf-8"))
        except ValueError as error:
            raise FormatError(f"{path}: not an expert map: not JSON ({error}); check the path") from None
        return cls.from_dict(data, path)

    @classmethod
    def from_dict(cls, data: object, path: StrPath = "map") -> ExpertMap:
        """Check the JSON of a map, parsed; `path` begins the messages. Raises FormatError."""
        try:
            return cls(**map_fields(data))
        except FormatError as error:
            raise FormatError(f"{path}: {error}") from None

    def _check_recommended(self, recommended: Recommended) -> None:
        """Raise FormatError for layers and experts that the model, or a rank that the map lacks."""
        choice = recommended.choice
        try:
            self._layers(parse_layers(choice["layers"]) if "layers" in choice else None)
        except (ChoiceError, UsageError) as error:
            raise FormatError(f"recommended.choice.{error}") from None
        there = ranks_of(self)
        for name in ("rank", "weights"):
            if choice.get(name, there[0]) not in there:
                raise FormatError(f"recommended.choice.{name}: the map has no score {choice[name]}")
        require_in_table(recommended.values, self.identity.shape, "recommended.values")

    def _layers(self, layers: Iterable[int] | None) -> list[int] | None:
        if layers is None:
            return None
        chosen = sorted(set(layers))
        if not chosen:
            raise ChoiceError("layers: none given; name at least one, or leave them out for all")
        for layer in chosen:
            if type(layer) is not int or not 0 <= layer < self.identity.n_layer:
                raise ChoiceError(
                    f"layers: there is no layer {layer}; {self.identity.architecture} has layers "
                    f"0 to {self.identity.n_layer - 1}"
                )
        return chosen


def _first_of_layer(experts: IntArray, n: int) -> npt.NDArray[np.bool_]:
    """Which of the experts, rows (layer, expert), are among the first `n` of their layer."""
    seen: Counter[int] = Counter()
    first = np.zeros(len(experts), dtype=np.bool_)
    for index, layer in enumerate(experts[:, 0].tolist()):
        seen[layer] += 1
        first[index] = seen[layer] <= n
    return first


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse the command line's notation of layers: "3-7,9" is (3, 4, 5, 6, 7, 9), ascending, each once.

    Raises UsageError.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        # int() alone would read digits of other scripts, and any number of them
        if not all(end.isascii() and end.isdecimal() and len(end) <= 6 for end in ends):
            raise UsageError(f"layers: {part.strip()!r} in {text!r} is not like 3-7 or 9")
        low, high = int(ends[0]), int(ends[1])
        if low > high or high >= MAX_LAYERS:
            raise UsageError(f"layers: {part.strip()!r} is empty or too high; write it like 3-7")
        chosen.update(range(low, high + 1))
    return tuple(sorted(chosen))


def format_layers(layers: Iterable[int]) -> str:
    """Ascending layers in the notation of `parse_layers`: (3, 4, 5, 9) is "3-5,9"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][1] == layer - 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in parts)


def _require_count(name: str, value: int) -> None:
    if type(value) is not int or value < 0:
        raise UsageError(f"{name}: {value!r} is not a whole number from 0 up")


def _table(value: Any, name: str, identity: ModelIdentity, dtype: type[np.generic]) -> Any:
    try:
        table = np.asarray(value)
    except ValueError:  # rows of different lengths
        table = np.empty(0)
    kinds = "iu" if dtype is np.int64 else "iuf"
    if table.shape != identity.shape or table.dtype.kind not in kinds:
        raise FormatError(f"{name}: not a table of {identity.n_layer} rows of {identity.n_expert} numbers; {AGAIN}")
    copy = np.array(table, dtype=dtype)
    copy.flags.writeable = False
    return copy
