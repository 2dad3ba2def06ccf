"""The choice of experts that a map recommends, and what it was measured to do, as the map's file stores it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, TypeVar

from ..errors import FormatError
from .ranks import RANKS, WEIGHTS

T = TypeVar("T")
Values = tuple[tuple[int, int, float], ...]
"""Fitted values: (layer, expert, logits) of some experts, no expert twice."""

CURES = (
    "give --activate N, --deactivate N or both (steermoe tune finds good ones), or make a map that recommends a choice "
    "with steermoe learn or steermoe map recommend"
)
"""What to do with a map that recommends no choice."""
_AGAIN = "run steermoe map recommend again"
_LAYERS = re.compile(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", re.ASCII)
_MODES = ("hard", "soft", "capped")
_MAX_TEXT = 10_000
_MAX_LOGITS = 1e6
_RULE_OF = {"scale": "soft", "weights": "soft", "cap": "capped"}


def nothing_to_steer(where: object, *given: int | None) -> str:
    """The line for a map in the file `where` by which nothing would steer, where the numbers `given` are asked for."""
    why = "0 experts were asked for" if any(number is not None for number in given) else "it recommends no choice"
    return f"{where}: nothing to steer, as {why}; {CURES}"


def fitted_values(rows: object, where: str) -> Values:
    """Check fitted values, as lists or tuples, and order them by layer and expert; `where` begins the messages.

    Raises FormatError: not such rows, an expert that stands twice, logits beyond 1e6, nothing but 0.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise FormatError(f"{where}: not a list of [layer, expert, logits]; {_AGAIN}")
    found: dict[tuple[int, int], float] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, Sequence) or isinstance(row, str) or len(row) != 3:
            raise FormatError(f"{where}[{number}]: not [layer, expert, logits]; {_AGAIN}")
        layer, expert, logits = row
        if not _is_count(layer) or not _is_count(expert) or not _is_number(logits, _MAX_LOGITS):
            raise FormatError(f"{where}[{number}]: {str(row)[:60]} is not [layer, expert, logits]; {_AGAIN}")
        if (layer, expert) in found:
            raise FormatError(f"{where}[{number}]: layer {layer}, expert {expert} has a value already; {_AGAIN}")
        found[layer, expert] = float(logits)
    if not any(found.values()):
        raise FormatError(f"{where}: no value but 0, so nothing would steer; {_AGAIN}")
    return tuple((layer, expert, found[layer, expert]) for layer, expert in sorted(found))


def require_in_table(values: Values, shape: tuple[int, int], where: str) -> None:
    """Raise FormatError where fitted values are of experts that a model of `shape` [n_layer, n_expert] lacks."""
    for layer, expert, _ in values:
        if layer >= shape[0] or expert >= shape[1]:
            raise FormatError(
                f"{where}: layer {layer}, expert {expert}, but the map has {shape[0]} layers of {shape[1]} experts; "
                f"{_AGAIN}"
            )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= 1 << 31


def _is_number(value: object, most: float) -> bool:
    # compared, not converted: an integer of JSON may be too large for a float
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= most  # false for NaN


def _plain(value: object) -> str:
    """A value as rules of plans have it: whole numbers without a point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _is_cap(value: object) -> bool:
    return value in ("inf", math.inf) or (_is_number(value, 1e6) and value > 0)  # type: ignore[operator]


# The parts of a choice and what may stand there.
_PARTS: dict[str, Callable[[Any], bool]] = {
    "activate": _is_count,
    "deactivate": _is_count,
    "reverse": lambda value: type(value) is bool,
    "layers": lambda value: isinstance(value, str) and _LAYERS.fullmatch(value) is not None,
    "rank": lambda value: value in RANKS,
    "mode": lambda value: value in _MODES,
    "scale": lambda value: _is_number(value, 1e6) and value > 0,
    "cap": _is_cap,
    "weights": lambda value: value in WEIGHTS,
}


@dataclass(frozen=True)
class Recommended:
    """The choice of experts that a map recommends, and what it was measured to do.

    Attributes:
        choice: JSON fields as a choice of steering has them: activate, deactivate, reverse, layers, rank, mode, scale,
            cap ("inf" for an infinite one) and weights, those that are not the default; at least one expert. Beside
            `values` nothing but reverse.
        unsteered: Share (0 to 1) of held-out items that show the side steered to without steering; None: not measured.
        steered: The same under this choice.
        random: Mean gain of random experts of the same number, as a share (may be negative).
        n_items: Held-out items; 0: not measured.
        task: What it was measured on, in words.
        perplexity: Increase of the perplexity of text that steering should leave alone, as a share (0.03 for 3%).
        kl: KL divergence from the unsteered model on that text, nats per token.
        command: The command that measured it.
        created: When, ISO 8601.
        one_way: Whether the choice is of this side alone: nothing recommends the other one.
        values: Fitted logits of some experts in place of numbers, as they steer to the positive side; with `reverse` in
            `choice` they are recommended the other way round. () for numbers.

    Raises FormatError for values that are impossible.
    """

    choice: Mapping[str, Any]
    unsteered: float | None = None
    steered: float | None = None
    random: float | None = None
    n_items: int = 0
    task: str = ""
    perplexity: float | None = None
    kl: float | None = None
    command: str = ""
    created: str = ""
    one_way: bool = False
    values: Values = ()

    def __post_init__(self) -> None:
        choice = self.choice
        if not isinstance(choice, Mapping):
            raise FormatError(f"recommended.choice: not an object; {_AGAIN}")
        for name, value in choice.items():
            if name not in _PARTS:
                raise FormatError(f"recommended.choice.{str(name)[:40]}: not a part of a choice; {_AGAIN}")
            if not isinstance(value, str | int | float) or not _PARTS[name](value):
                raise FormatError(f"recommended.choice.{name}: {str(value)[:40]!r} is not what stands there; {_AGAIN}")
        plain = {name: "inf" if value == math.inf else value for name, value in choice.items()}
        if self.values not in ((), []):
            if more := next((name for name in plain if name != "reverse"), None):
                raise FormatError(f"recommended.choice.{more}: fitted values are not chosen by it; {_AGAIN}")
            object.__setattr__(self, "values", fitted_values(self.values, "recommended.values"))
            plain = {name: value for name, value in plain.items() if value}
        else:
            object.__setattr__(self, "values", ())
            self._check_choice(plain)
        object.__setattr__(self, "choice", MappingProxyType(plain))
        self._check_figures()

    @staticmethod
    def _check_choice(plain: Mapping[str, Any]) -> None:
        mode = plain.get("mode") or next((_RULE_OF[name] for name in _RULE_OF if name in plain), "hard")
        if wrong := [name for name, owner in _RULE_OF.items() if name in plain and owner != mode]:
            raise FormatError(f"recommended.choice.{wrong[0]}: does not belong to the {mode} rule; {_AGAIN}")
        for name, owner in (("scale", "soft"), ("cap", "capped")):
            if mode == owner and name not in plain:
                raise FormatError(f"recommended.choice.{name}: missing, the {mode} rule needs it; {_AGAIN}")
        if not plain.get("activate") and not plain.get("deactivate"):
            raise FormatError(f"recommended.choice: no experts; {_AGAIN}")

    def _check_figures(self) -> None:
        if type(self.n_items) is not int or not 0 <= self.n_items <= 1 << 53:
            raise FormatError(f"recommended.n_items: not a count; {_AGAIN}")
        if type(self.one_way) is not bool:
            raise FormatError(f"recommended.one_way: not a truth value; {_AGAIN}")
        for name, least, most in (
            ("unsteered", 0, 1),
            ("steered", 0, 1),
            ("random", -1, 1),
            ("perplexity", -1, 1e9),
            ("kl", -1e-3, 1e9),  # rounding may leave it a little below 0
        ):
            value = getattr(self, name)
            if value is not None and not (_is_number(value, 1e9) and least <= value <= most):
                raise FormatError(f"recommended.{name}: {str(value)[:40]} is not such a figure; {_AGAIN}")
        for name in ("task", "command", "created"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > _MAX_TEXT:
                raise FormatError(f"recommended.{name}: not a short text; {_AGAIN}")

    @property
    def choice_words(self) -> str:
        """The choice in a few words: "+8 -8 layers=3-7 cap=4", as rules of plans are written; of values how many."""
        choice = dict(self.choice)
        if self.values:
            return values_words(self.values) + (" reverse" if choice else "")
        numbers = [
            f"{sign}{choice.pop(name)}" for name, sign in (("activate", "+"), ("deactivate", "-")) if name in choice
        ]
        numbers += ["reverse"] if choice.pop("reverse", False) else []
        return " ".join([*numbers, *(f"{name}={_plain(value)}" for name, value in choice.items())])

    @property
    def words(self) -> str:
        """What the choice was measured to do, for people; "" if it was not."""
        if self.unsteered is None or self.steered is None:
            return ""
        parts = [f"{self.unsteered:.0%} -> {self.steered:.0%}" + (f" of {self.n_items} items" if self.n_items else "")]
        if self.random is not None:
            parts.append(f"random experts {100 * self.random:+.0f} points")
        if self.perplexity is not None:
            parts.append(f"perplexity {self.perplexity:+.1%}")
        if self.kl is not None:
            parts.append(f"KL {max(self.kl, 0.0):.3g}")
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, those that say something."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["values"] = [list(row) for row in self.values]
        said = {
            name: value for name, value in values.items() if value not in (None, "", False, []) and name != "choice"
        }
        if not self.n_items:
            said.pop("n_items", None)
        return {"choice": dict(self.choice)} | said

    @classmethod
    def from_dict(cls, data: object) -> Recommended:
        """Rebuild it from `to_dict`. Raises FormatError for missing, unknown or impossible fields."""
        if not isinstance(data, Mapping) or "choice" not in data:
            raise FormatError(f"recommended: not an object with a choice; {_AGAIN}")
        if unknown := sorted(set(data) - {item.name for item in fields(cls)}):
            raise FormatError(f"recommended.{str(unknown[0])[:40]}: unknown field; put remarks into notes")
        if empty := [name for name, value in data.items() if value is None]:
            raise FormatError(f"recommended.{empty[0]}: null; leave it out")
        return cls(**data)


def values_words(values: Values) -> str:
    """Fitted values in a few words: "fitted values of 14 experts"."""
    n = sum(logits != 0 for *_, logits in values)
    return f"fitted values of {n} expert{'s' * (n != 1)}"


def with_recommended(expert_map: T, recommended: Recommended | None) -> T:
    """The `ExpertMap` with another recommended choice, or none; its digest stays.

    Raises FormatError when the choice does not fit the map: layers, a rank or experts that it lacks.
    """
    changed: T = replace(expert_map, recommended=recommended)  # type: ignore[type-var]  # a dataclass
    return changed
