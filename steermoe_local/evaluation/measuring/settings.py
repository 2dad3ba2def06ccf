"""How an evaluator measures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import UsageError
from ...generation.engine import Sampling
from .replies import GREEDY

__all__ = ["EvaluatorSettings", "Progress"]

Progress = Callable[[str, int, int], None]
"""Called with (what is measured, answers and texts that are done, how many are wanted)."""


@dataclass(frozen=True)
class EvaluatorSettings:
    """How to measure.

    `sampling`: temperature 0 is greedy; else every item is answered once for each of `seeds`. `n_parallel`: how many
    answers are decoded at once. `n_ctx` None: as the task needs. `n_text`: most tokens of the neutral text that count.
    `thinking`, `template_arguments`: as in `Renderer`. `context`: further arguments of `Engine`
    (n_threads, type_k, ...). Raises UsageError.
    """

    sampling: Sampling = GREEDY
    seeds: tuple[int, ...] = (0,)
    n_parallel: int = 16
    n_ctx: int | None = None
    n_text: int | None = 2000
    thinking: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    force: bool = False
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError("seeds: give at least one, and none twice")
        if self.sampling.temperature == 0 and len(self.seeds) > 1:
            raise UsageError("several seeds need a temperature above 0: a greedy answer is the same for all")
        if not 1 <= self.n_parallel <= 256:
            raise UsageError(f"n_parallel: {self.n_parallel} is not from 1 to 256")

    def to_dict(self) -> dict[str, Any]:
        """What results hang on, as plain JSON values."""
        sampling = {name: getattr(self.sampling, name) for name in self.sampling.__dataclass_fields__}
        del sampling["seed"]
        return {
            "sampling": {"temperature": 0} if self.sampling.temperature == 0 else sampling,
            "seeds": list(self.seeds),
            "n_text": self.n_text,
            "thinking": self.thinking,
            "template_arguments": dict(self.template_arguments),
        }
