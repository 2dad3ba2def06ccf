"""What requests and files choose of a map: the fields of `SteeringChoice`, applied to a `Steering` and taken of one."""

from __future__ import annotations

import logging
from typing import Any

from ..steering.steering import Steering
from .schemas import RegisterRequest, SteeringChoice

log = logging.getLogger("steermoe.server")

NUMBERS = ("activate", "deactivate", "reverse", "layers")
"""The fields of a choice that say which experts."""
RULE = ("scale", "weights", "cap")
"""The fields of a choice that say by which rule, as a `Steering` has them."""

_FIELDS = (*NUMBERS, "preset", "rank", "mode", *RULE)


def has_choice(choice: SteeringChoice | RegisterRequest) -> bool:
    """Whether a request changes anything of the steering that it names."""
    return any(getattr(choice, name) is not None for name in _FIELDS)


def with_choice(steering: Steering, choice: SteeringChoice | RegisterRequest) -> Steering:
    """The steering with what a request changes. Raises UsageError, also for a bias file; warnings go to the log."""
    if not has_choice(choice):
        return steering
    steering, warnings = steering.with_choice({name: getattr(choice, name) for name in _FIELDS})
    for line in warnings:
        log.warning("%s", line)
    return steering


def whole_choice(steering: Steering) -> dict[str, Any]:
    """All that is chosen of a map, as JSON values; applied to the bare map, or to the values that it recommends where
    there are no numbers, it gives the same again.
    """
    if not steering.has_experts and steering.recommended is not None:  # left out, they would be the recommended ones
        return {"activate": 0, "deactivate": 0}
    if steering.values:
        return {"reverse": steering.reverse, "scale": steering.scale}
    fields = ("preset", "layers", "scale") if steering.preset else (*NUMBERS, "scale")
    return {field: getattr(steering, field) for field in fields if getattr(steering, field)} | steering.further
