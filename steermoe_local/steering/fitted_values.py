"""Steering by fitted values: what may not stand beside them, and the bias that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import UsageError
from ..identity import ModelIdentity
from ..maps.recommended import Values, require_in_table
from .bias_file import BiasFile

_CHOOSING = ("activate", "deactivate", "layers", "preset", "weights", "cap")


def require_no_choice(where: object, fields: Mapping[str, Any]) -> None:
    """Raise UsageError, which begins with `where`, for fields of a `Steering` that choose experts beside its values."""
    wrong = next((name for name in _CHOOSING if fields[name]), "rank" if fields["rank"] != "rd" else None)
    if wrong is None and fields["scale"] is None:
        wrong = "hard rule"
    if wrong:
        raise UsageError(
            f"{where}: steers by fitted values, which have no {wrong}; give numbers of experts (activate, deactivate) "
            "as well to choose experts in their place"
        )


def fitted_bias(
    values: Values, identity: ModelIdentity, scale: float, reverse: bool, provenance: Mapping[str, str]
) -> BiasFile:
    """The soft bias of `scale` times fitted values, negated with `reverse`. Raises FormatError."""
    require_in_table(values, identity.shape, "values")
    table = np.zeros(identity.shape)
    for layer, expert, logits in values:
        table[layer, expert] = -logits if reverse else logits
    return BiasFile.from_soft(table, identity, scale, provenance)
