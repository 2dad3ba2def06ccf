"""The stability of a map's scores, as an expert map stores it beside the standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import FormatError

SHUFFLED_LEVEL = 0.05  # false positive rate for a map without any difference between the sides


@dataclass(frozen=True)
class SplitHalf:
    """Agreement of maps made from random halves of the pairs, averaged over `repeats` splits.

    `spearman` is the rank correlation of |RD| over all experts of the MoE layers, `overlap` the share of the top_n
    experts by |RD| that are the same, with the same sign, in both halves.
    """

    repeats: int
    spearman: float
    overlap: float


@dataclass(frozen=True)
class Control:
    """A statistic of the map among maps whose sides were swapped at random, pair by pair.

    `value` is the map's own, `median` and `q95` are quantiles of the shuffled maps, and `p` is the share of maps, the
    map itself among them, whose statistic is at least as large.
    """

    value: float
    median: float
    q95: float
    p: float


@dataclass(frozen=True)
class Confidence:
    """Stability and control of a map, over `n_pairs` pairs and the experts of `moe_layers`.

    `max_rd` is the control of the largest |RD|, `sum_top` that of the sum of the `top_n` largest. Raises FormatError
    when a number is impossible.
    """

    n_pairs: int
    moe_layers: tuple[int, ...]
    top_n: int
    seed: int
    split_half: SplitHalf
    draws: int
    max_rd: Control
    sum_top: Control

    def __post_init__(self) -> None:
        object.__setattr__(self, "moe_layers", tuple(self.moe_layers))
        layers = self.moe_layers
        if not layers or any(type(i) is not int or i < 0 for i in layers) or list(layers) != sorted(set(layers)):
            raise FormatError("confidence.moe_layers: not ascending layers; run steermoe map stats again")
        counts = (self.n_pairs, self.top_n, self.draws, self.split_half.repeats)
        if any(type(value) is not int or not 1 <= value <= 1 << 53 for value in counts):
            raise FormatError(
                "confidence: n_pairs, top_n, draws or repeats is not a count; run steermoe map stats again"
            )
        if type(self.seed) is not int or self.seed < 0:
            raise FormatError(f"confidence.seed: {self.seed!r} is not a whole number from 0 up")
        shares = [self.split_half.overlap, self.max_rd.p, self.sum_top.p]
        shares += [getattr(self.max_rd, name) for name in ("value", "median", "q95")]
        for value in (*shares, self.split_half.spearman, *asdict(self.sum_top).values()):
            # compared, not converted: an integer of JSON may be too large for a float
            if not isinstance(value, float | int) or isinstance(value, bool) or not abs(value) <= 1e300:
                raise FormatError("confidence: a value that is not a number; run steermoe map stats again")
        if min(shares) < 0 or max(shares) > 1 + 1e-9 or abs(self.split_half.spearman) > 1 + 1e-9:
            raise FormatError("confidence: a share outside 0 to 1; run steermoe map stats again")

    @property
    def differs_from_shuffled(self) -> bool:
        """Whether the map differs from maps of shuffled pairs: the smaller of its two p-values, doubled, is at most 5%.

        Doubled (Bonferroni), as either statistic suffices. Needed for a map to show a behaviour, and not enough: maps
        of random weights differ as well, since other tokens are always routed otherwise.
        """
        return 2 * min(self.max_rd.p, self.sum_top.p) <= SHUFFLED_LEVEL

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self) | {"moe_layers": list(self.moe_layers)}

    @classmethod
    def from_dict(cls, data: object) -> Confidence:
        """Rebuild it from `to_dict`. Raises FormatError for missing, unknown or impossible fields."""
        fields = exact_fields(data, cls, "confidence")
        fields["split_half"] = SplitHalf(**exact_fields(fields["split_half"], SplitHalf, "confidence.split_half"))
        for name in ("max_rd", "sum_top"):
            fields[name] = Control(**exact_fields(fields[name], Control, f"confidence.{name}"))
        if not isinstance(fields["moe_layers"], list):
            raise FormatError("confidence.moe_layers: not a list; run steermoe map stats again")
        return cls(**fields)


def exact_fields(data: object, of: Any, where: str, again: str = "run steermoe map stats again") -> dict[str, Any]:
    """The fields of a JSON object that has just those of the dataclass `of`. Raises FormatError."""
    if not isinstance(data, Mapping) or set(data) != set(of.__dataclass_fields__):
        names = ", ".join(of.__dataclass_fields__)
        raise FormatError(f"{where}: not an object with {names}; {again}")
    return dict(data)
