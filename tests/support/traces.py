"""Texts to trace, and what a file of a trace holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from steermoe_local.detection.tracing import UNSTEERED, TracedText
from steermoe_local.steering.bias_file import BiasFile
from steermoe_local.steering.bias_plan import BiasPlan, BiasRule
from steermoe_local.steering.plan_text import parse_rule


def plan(*rules: tuple[str, BiasFile | None]) -> BiasPlan:
    """A plan of places in their text form, and what steers there."""
    return BiasPlan(tuple(BiasRule(parse_rule(f"{where}: none").where, bias) for where, bias in rules))


def text(tokens: Sequence[int], rules: Sequence[int] | None = None, item: int = 0, **fields: Any) -> TracedText:
    """A text that is all prompt; `rules` None: unsteered."""
    steered = np.full(len(tokens), UNSTEERED) if rules is None else np.asarray(rules)
    phases = np.zeros(len(tokens), np.int8)
    return TracedText(item, fields.pop("id", f"t{item}"), list(tokens), phases, steered.astype(np.int16), **fields)


def arrays_of(path: Path) -> dict[str, Any]:
    """All members of a `.npz` file, without pickles."""
    with np.load(path, allow_pickle=False) as found:
        return {name: found[name] for name in found.files}


def counts_of(arrays: dict[str, Any], wanted: Any, n_expert: int) -> Any:
    """Selections by layer and expert of the tokens that a mask wants."""
    experts = arrays["experts"][wanted]
    return np.stack([np.bincount(experts[:, layer].ravel(), minlength=n_expert) for layer in range(experts.shape[1])])
