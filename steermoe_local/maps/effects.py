"""Effects of experts, estimated by interventions, as an expert map stores them beside its risk differences.

docs/attribution.md says how they are estimated, and what is assumed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .._util.files import is_sha256
from ..errors import FormatError
from ..identity import ModelIdentity
from .confidence import exact_fields

FloatArray = npt.NDArray[np.float64]

PROMOTE, SUPPRESS = 1, -1
ACTIONS = {"promote": PROMOTE, "suppress": SUPPRESS}
ATTRIBUTE = "steermoe attribute -m MODEL --pairs PAIRS --map MAP -o MAP2"  # the command that adds effects to a map
LEVEL = 0.05  # share of false discoveries among the effects that are called significant
_AGAIN = "run steermoe attribute again"
_FIGURES = ("effect", "effect_se", "p", "cost", "cost_se", "confirm", "confirm_se")
_OPTIONAL = ("cost", "cost_se", "confirm", "confirm_se")
COLUMNS = (*_FIGURES, "significant", "control")
"""What `Effects.at` may say of an action on an expert."""
_NONNEGATIVE = ("effect_se", "p", "cost_se", "confirm_se")


@dataclass(frozen=True)
class Attribution:
    """How the effects of a map were estimated.

    Attributes:
        response: "pairs", or the name of the task whose items' choices were compared.
        items_sha256: SHA-256 (hex) of the pairs or of the task.
        n_items: items on which the effects were estimated.
        n_confirm: other items, on which the first experts were confirmed.
        neutral: name of the neutral text, "" without costs; `n_text` of its tokens count.
        n_draws: random interventions of each action.
        rate: probability with which a draw takes a candidate, for each action.
        steer: "answer" or "all": which tokens were steered.
        seed: seed of candidates, items and draws.
        r2: share of the variance of the response that the effects predict on held-out draws, for each action.
        r2_cost: the same of the cost.
        first: how many of the first experts were compared; another run would agree in the share `agreement` of them.
        stable: whether that share reached the level that was asked for, for each action.

    Raises FormatError when a value is impossible.
    """

    response: str
    items_sha256: str
    n_items: int
    n_confirm: int
    neutral: str
    n_text: int
    n_draws: Mapping[str, int]
    rate: Mapping[str, float]
    steer: str
    seed: int
    r2: Mapping[str, float]
    r2_cost: Mapping[str, float]
    first: int
    agreement: Mapping[str, float]
    stable: Mapping[str, bool]

    def __post_init__(self) -> None:
        for name in ("response", "neutral", "steer"):
            if not isinstance(getattr(self, name), str):
                raise FormatError(f"attribution.{name}: not a text; {_AGAIN}")
        if self.steer not in ("answer", "all"):
            raise FormatError(f"attribution.steer: {self.steer!r} is neither answer nor all; {_AGAIN}")
        if not is_sha256(self.items_sha256):
            raise FormatError(f"attribution.items_sha256: not a SHA-256 digest; {_AGAIN}")
        for name in ("n_items", "n_confirm", "n_text", "seed", "first"):
            if type(value := getattr(self, name)) is not int or not 0 <= value <= 1 << 53:
                raise FormatError(f"attribution.{name}: not a count; {_AGAIN}")
        actions = set(self.n_draws) if isinstance(self.n_draws, Mapping) else set()
        for name in ("n_draws", "rate", "r2", "r2_cost", "agreement", "stable"):
            of = getattr(self, name)
            same = isinstance(of, Mapping) and (set(of) == actions or (name == "r2_cost" and not of))
            if not same or not actions or not actions <= set(ACTIONS):
                raise FormatError(f"attribution.{name}: not one value for each of promote and suppress; {_AGAIN}")
            kind = {"n_draws": int, "stable": bool}.get(name)
            for value in of.values():
                number = isinstance(value, float | int) and not isinstance(value, bool) and abs(value) <= 1e300
                right = number if kind is None else type(value) is kind
                if not right or (name == "n_draws" and value < 0) or (name == "rate" and not 0 <= value <= 1):
                    raise FormatError(f"attribution.{name}: {str(value)[:40]} is not what stands there; {_AGAIN}")
            object.__setattr__(self, name, {key: value if kind else float(value) for key, value in of.items()})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: object) -> Attribution:
        """Rebuild it from `to_dict`. Raises FormatError for missing, unknown or impossible fields."""
        return cls(**exact_fields(data, cls, "attribution", _AGAIN))


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of promoting or suppressing single experts; each row is one action on one expert.

    All arrays have one length. `layer`, `expert` are int64; `action` int8, +1 promotes, -1 suppresses. `effect` is the
    change of the mean log-probability margin per token of the positive over the negative answer, in nats, and
    `effect_se` its standard error: what is above 0 steers towards the positive side, whatever the action. `p` is the
    two-sided p-value of effect = 0, corrected for the number of rows (Benjamini and Hochberg). `cost` is the mean
    KL(unsteered || steered) per token of the neutral text, in nats, `cost_se` its standard error; both NaN without one.
    `confirm`, `confirm_se`: the effect of the action alone on other items than those that estimated it, NaN where it
    was not tried. `control`: a candidate that was drawn at random, not one of the first by RD.

    Raises FormatError when the arrays do not fit each other.
    """

    facts: Attribution
    layer: npt.NDArray[np.int64]
    expert: npt.NDArray[np.int64]
    action: npt.NDArray[np.int8]
    effect: FloatArray
    effect_se: FloatArray
    p: FloatArray
    cost: FloatArray
    cost_se: FloatArray
    confirm: FloatArray
    confirm_se: FloatArray
    control: npt.NDArray[np.bool_]

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"layer": np.int64, "expert": np.int64, "action": np.int8, "control": np.bool_}
        kinds |= dict.fromkeys(_FIGURES, np.float64)
        n = len(self.layer)
        for name, kind in kinds.items():
            column = np.array(getattr(self, name), dtype=kind)
            if column.shape != (n,):
                raise FormatError(f"effects: {name}: not {n} values; {_AGAIN}")
            column.flags.writeable = False
            object.__setattr__(self, name, column)
        if not n:
            raise FormatError(f"effects: none; {_AGAIN}")
        if not np.isin(self.action, (PROMOTE, SUPPRESS)).all():
            raise FormatError(f"effects: an action that is neither promote nor suppress; {_AGAIN}")
        if missing := [
            name for name, sign in ACTIONS.items() if sign in self.action and name not in self.facts.n_draws
        ]:
            raise FormatError(f"effects: {missing[0]}: an action of which attribution says nothing; {_AGAIN}")
        if len(np.unique(np.stack([self.layer, self.expert, self.action]), axis=1).T) < n:
            raise FormatError(f"effects: an action on an expert that is there twice; {_AGAIN}")
        for name in _FIGURES:
            column = getattr(self, name)
            known = column if name not in _OPTIONAL else column[~np.isnan(column)]
            least = 0 if name in _NONNEGATIVE else -1e9
            if not ((known >= least) & (known <= (1 if name == "p" else 1e9))).all():  # false for NaN
                raise FormatError(f"effects: {name}: a value that is no figure; {_AGAIN}")

        for name in ("cost", "confirm"):
            if (np.isnan(getattr(self, name)) != np.isnan(getattr(self, f"{name}_se"))).any():
                raise FormatError(f"effects: {name}, {name}_se: only one of them is there; {_AGAIN}")

    def check(self, identity: ModelIdentity) -> None:
        """Raise FormatError for an expert that the model does not have."""
        n_layer, n_expert = identity.shape
        inside = (self.layer >= 0) & (self.layer < n_layer) & (self.expert >= 0) & (self.expert < n_expert)
        if not inside.all():
            raise FormatError(f"effects: an expert outside {n_layer} layers of {n_expert}; {_AGAIN}")

    @property
    def nbytes(self) -> int:
        """Size of the arrays."""
        columns = ("layer", "expert", "action", *_FIGURES, "control")
        return sum(int(getattr(self, name).nbytes) for name in columns)

    @cached_property
    def significant(self) -> npt.NDArray[np.bool_]:
        """Rows whose effect is not 0: of these, 5% are expected to be false (`LEVEL`)."""
        return self.p <= LEVEL

    @cached_property
    def efficiency(self) -> FloatArray:
        """Effect for each nat of cost: effect / max(cost, cost_se), as a cost below its error is not known to be lower.

        NaN without costs; the effect itself over 1e-9 nats where cost and error are 0.
        """
        return self.effect / np.maximum(np.maximum(self.cost, self.cost_se), 1e-9)

    def first(self, n: int | None = None) -> npt.NDArray[np.int64]:
        """Indices of the first `n` rows: the significant ones by |effect|, then the others, ties in the rows' order."""
        order = np.lexsort((-np.abs(self.effect), ~self.significant))
        return order[:n].astype(np.int64)

    def numbers(self, action: int) -> dict[str, int]:
        """How many experts the action was tried on, and how many effects are significant: `n`, `n_significant`.

        `n_random` and `n_random_significant` are the same of the candidates that were drawn at random.
        """
        rows = self.action == action
        found = {"n": rows, "n_significant": rows & self.significant}
        found |= {"n_random": rows & self.control, "n_random_significant": rows & self.control & self.significant}
        return {name: int(marks.sum()) for name, marks in found.items()}

    def at(self, layer: int, expert: int) -> dict[str, dict[str, Any]]:
        """The rows of an expert, by the action's name, each with `significant`; {} for one that was not tried."""
        return self._by_expert.get((layer, expert), {})

    @cached_property
    def _by_expert(self) -> dict[tuple[int, int], dict[str, dict[str, Any]]]:
        found: dict[tuple[int, int], dict[str, dict[str, Any]]] = {}
        for row, significant in zip(self.rows(), self.significant.tolist(), strict=True):
            place, action = (row.pop("layer"), row.pop("expert")), row.pop("action")
            found.setdefault(place, {})[action] = row | {"significant": significant}
        return found

    def table(self, action: int, name: str, shape: tuple[int, int]) -> FloatArray:
        """A column of one action as float64 `shape` [n_layer, n_expert], NaN where it was not tried."""
        table = np.full(shape, np.nan)
        rows = self.action == action
        table[self.layer[rows], self.expert[rows]] = np.asarray(getattr(self, name), dtype=np.float64)[rows]
        return table

    def rows(self) -> list[dict[str, Any]]:
        """The rows as plain JSON values, in their order; what is not known is left out."""
        names = {value: name for name, value in ACTIONS.items()}
        found: list[dict[str, Any]] = []
        for i in range(len(self.layer)):
            row: dict[str, Any] = {
                "layer": int(self.layer[i]),
                "expert": int(self.expert[i]),
                "action": names[int(self.action[i])],
            }
            values = {name: float(getattr(self, name)[i]) for name in _FIGURES}
            row |= {name: value for name, value in values.items() if not math.isnan(value)}
            found.append({**row, "control": bool(self.control[i])})
        return found

    @classmethod
    def from_rows(cls, facts: Attribution, rows: object) -> Effects:
        """Rebuild it from `rows`. Raises FormatError for missing, unknown or impossible values."""
        if not isinstance(rows, Sequence) or isinstance(rows, str):
            raise FormatError(f"effects: not a list; {_AGAIN}")
        needed = {"layer", "expert", "action", "control"} | (set(_FIGURES) - set(_OPTIONAL))
        columns: dict[str, Any] = {name: [] for name in (*sorted(needed), *_OPTIONAL)}
        for number, row in enumerate(rows):
            if not isinstance(row, dict) or not needed <= set(row) <= set(columns):
                raise FormatError(f"effects: row {number}: fields are missing or unknown; {_AGAIN}")
            for name, column in columns.items():
                column.append(_value(name, row.get(name, math.nan), number))
        return cls(facts, **columns)


def _value(name: str, value: Any, number: int) -> Any:
    """A value of a row. Raises FormatError for one of another type, and for numbers beyond any model's."""
    if name == "action" and isinstance(value, str) and value in ACTIONS:
        return ACTIONS[value]
    if name == "control" and type(value) is bool:
        return value
    if name in ("layer", "expert") and type(value) is int and 0 <= value <= 1 << 31:
        return value
    # compared, not converted: an integer of JSON may be too large for a float
    if name in _FIGURES and isinstance(value, float | int) and not isinstance(value, bool) and not abs(value) > 1e9:
        return value
    raise FormatError(f"effects: row {number}: {name}: {str(value)[:40]} is not what stands there; {_AGAIN}")
