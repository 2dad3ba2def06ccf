"""The rules by which routers are steered, and the fields that belong to each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from ..errors import UsageError
from ..maps.ranks import WEIGHTS
from .bias_file import Mode

RULES: tuple[Mode, ...] = get_args(Mode)
DEFAULT_CAP = 4.0
"""Logits. On the embedded model 4 move the behaviour at a tenth of the hard rule's KL, and 8 move it as far as that."""
DEFAULT_STRENGTH = 1.0
"""Logits, of a soft rule without a strength where one is taken for it."""
EQUAL = "none"
"""In place of weights: all experts get the same strength."""
MAX_CAP = 1e6

OWNERS = {"scale": "soft", "weights": "soft", "cap": "capped"}
"""The rule that each field of `Rule` belongs to."""


@dataclass(frozen=True)
class Rule:
    """A rule with what it needs: `scale` and `weights` of the soft one, `cap` of the capped one; none of the hard one.

    A strength (`scale`) is 0 or more: the other side is a matter of the choice (`reverse`), not of the rule.

    Raises UsageError for values that do not go together, or are impossible.
    """

    scale: float | None = None
    weights: str | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        if type(self.scale) is int and abs(self.scale) > 1e300:  # JSON has integers that no float holds
            raise UsageError("strength: an integer of hundreds of digits is no number of logits")
        if self.scale is not None and self.scale < 0:
            raise UsageError(
                f"strength {self.scale:g}: below 0; give the logits as a number from 0 up, and reverse the choice "
                "(--reverse, /reverse, reverse) to steer to the other side"
            )
        if self.cap is not None and self.scale is not None:
            raise UsageError("the soft rule has a strength and the capped rule a cap; give one of them")
        if self.weights is not None:
            if self.weights not in WEIGHTS:
                raise UsageError(f"weights: {self.weights!r} is none of {', '.join(WEIGHTS)}")
            if self.scale is None:
                raise UsageError(f"weights {self.weights}: belong to the soft rule, which needs a strength")
        if self.cap is not None and not (0 < self.cap <= MAX_CAP or self.cap == math.inf):
            raise UsageError(f"cap: {self.cap} is not a number of logits above 0, at most {MAX_CAP:g}, or inf")

    @property
    def name(self) -> Mode:
        """Which rule it is."""
        return "capped" if self.cap is not None else "soft" if self.scale is not None else "hard"

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `Steering` that make it steer by this rule."""
        return asdict(self)

    def changed(
        self,
        mode: str | None = None,
        scale: float | None = None,
        cap: float | None = None,
        weights: str | None = None,
        *,
        strength: float | None = None,
        names: Mapping[str, str] | None = None,
    ) -> Rule:
        """The rule that is asked for; what is None stays as it is, where it belongs to that rule.

        Without `mode` a strength or weights ask for the soft rule and a cap for the capped one. `weights` "none" gives
        all experts the same. `strength` is that of a soft rule without one; None: it has to be given. Without a cap the
        capped rule has `DEFAULT_CAP`. `names` are the names of mode, scale, cap and weights in messages.

        Raises UsageError for what does not go together.
        """
        called = {name: name for name in ("mode", *OWNERS)} | dict(names or {})
        asked: dict[str, Any] = {"scale": scale, "weights": weights, "cap": cap}
        given = [name for name, value in asked.items() if value is not None and value != EQUAL]
        if mode is None:
            owners = list(dict.fromkeys(OWNERS[name] for name in given))
            if len(owners) > 1:
                words = ", ".join(called[name] for name in given)
                raise UsageError(f"{words}: belong to the {' and the '.join(owners)} rule; give what belongs to one")
            mode = owners[0] if owners else self.name
        if mode not in RULES:
            raise UsageError(f"{called['mode']}: {mode!r} is none of {', '.join(RULES)}")
        for name in given:
            if OWNERS[name] != mode:
                has = {"hard": "has no strength", "soft": "has no cap", "capped": "has a cap, and no strength"}[mode]
                raise UsageError(f"{called[name]} goes with {called['mode']} {OWNERS[name]}; the {mode} rule {has}")
        if mode == "soft":
            scale = next((value for value in (scale, self.scale, strength) if value is not None), None)
            if scale is None:
                raise UsageError(
                    f"{called['mode']} soft: how strong? give {called['scale']}, the logits that promoted experts get"
                )
            return Rule(scale, self.weights if weights is None else None if weights == EQUAL else weights)
        if mode == "capped":
            return Rule(cap=next(value for value in (cap, self.cap, DEFAULT_CAP) if value is not None))
        return Rule()


def json_cap(cap: float | None) -> float | str | None:
    """A cap as a JSON value: "inf" for an infinite one, as JSON has no infinity."""
    return "inf" if cap == math.inf else cap
