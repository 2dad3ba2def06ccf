"""The result of `learn`, and its verdict in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .judging import Confirmed

Outcome = Literal["works", "did not work"]
WORKS: Outcome = "works"
FAILED: Outcome = "did not work"

ADVICE: Mapping[str, str] = {
    "answers": (
        "take instructions that change every answer of this model (try them with steermoe chat --system), or give "
        "pairs with --pairs"
    ),
    "detect": "the sides of the pairs do not differ for the router: give more or clearer pairs, or try --thorough",
    "tune": (
        "try --thorough, another model, a contrast that shows in every word of an answer, or a larger budget with "
        "--max-ppl-increase"
    ),
    "confirm": "try --thorough, more or clearer pairs, or another model",
}
"""What to try after the step that failed."""
ALREADY = (
    "the model shows this side without steering, so nothing can be gained; swap the two sides to learn the other one"
)
"""What to say where the unsteered model shows the side in every answer."""


@dataclass(frozen=True)
class LearnResult:
    """What a run found.

    `outcome` is "works" or "did not work", `verdict` says it in one sentence. `step` is the step that failed, "" for
    none, and `advice` what to try then. `choice` are the fields of the recommended choice, None without one; of a run
    that failed in its last step those that were not confirmed are `tried`. `clock` has expected and spent seconds,
    `notes` are remarks for the report, `facts` further ones of the run, as JSON values.
    """

    name: str
    folder: Path
    outcome: Outcome
    verdict: str
    step: str = ""
    advice: str = ""
    choice: Mapping[str, Any] | None = None
    tried: Mapping[str, Any] | None = None
    confirmed: Confirmed | None = None
    clock: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def works(self) -> bool:
        """Whether the steering works."""
        return self.outcome == WORKS

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: the content of learn.json."""
        return {
            "format": "steermoe-learn",
            "version": 1,
            "name": self.name,
            "folder": str(self.folder),
            "outcome": self.outcome,
            "verdict": self.verdict,
            "step": self.step,
            "advice": self.advice,
            "choice": None if self.choice is None else dict(self.choice),
            "tried": None if self.tried is None else dict(self.tried),
            "confirmed": None if self.confirmed is None else self.confirmed.to_dict(),
            "clock": dict(self.clock),
            "notes": list(self.notes),
            **self.facts,
        }


def works_sentence(found: Confirmed, positive: str) -> str:
    """The verdict on a steering that works."""
    rates = f"held out {found.unsteered.value:.0%} -> {found.steered.value:.0%} {positive}"
    text = f"text unharmed (perplexity {found.perplexity:+.0%})"
    return f"{WORKS}: {rates}; random experts {100 * found.random:.0f} points; {text}"


def failed_sentence(problem: str) -> str:
    """The verdict on a run that failed."""
    return f"{FAILED}: {problem}"
