"""How a recording runs, how far it is, and who takes what it counts of each pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy.typing as npt

from ..errors import UsageError
from ..llama.template_date import AnyDate
from ..maps.map_phases import PhaseSplit
from ..maps.stability import UntilStable
from .decoding import ContextOptions
from .spans import ConditionSpan


class PairSink(Protocol):
    """Receiver of per-pair counts, for example `PairCountsWriter`."""

    def append(self, pair_ids: Sequence[str], a: npt.ArrayLike, n: npt.ArrayLike) -> None:
        """Add some pairs: `a` [pairs, 2, n_layer, n_expert], `n` [pairs, 2]; positive, negative."""


@dataclass(frozen=True)
class RecordingProgress:
    """Progress of a run. Pairs of an earlier, interrupted run count as done, their tokens do not."""

    n_done: int  # pairs counted or skipped
    n_total: int  # pairs of the run (of its shard)
    n_skipped: int
    n_tokens: int  # of the prompts that this process worked on, up to the targets' ends
    n_decoded: int  # tokens that this process computed; fewer where prompts share their beginning


@dataclass(frozen=True)
class RecordingOptions:
    """How `record_counts` runs the pairs.

    Attributes:
        behaviour: name kept in the counts.
        n_ctx: longest prompt in tokens; 0 takes the longest of the pairs.
        n_batch: tokens of one llama_decode. Short prompts share one as parallel sequences.
        n_ubatch, n_threads, n_gpu_layers, type_k, type_v: as in `llama_cpp.Llama`.
        flash_attn: use flash attention, which is faster for prompts; "auto": where the backend has it. Where two router
            logits are nearly equal, another expert may be counted than without it.
        thinking, template_arguments: the chat template's switch for thinking, and further variables for it.
        date: for templates that print one (a `datetime.date`, or YYYY-MM-DD). None: that of the run's start.
        share_prefixes: compute what prompts begin with once. The mathematics is the same; float rounding may differ, as
            it does between any two batch sizes. Models with recurrent layers never share.
        shard: (i, n): only pairs i, i + n, i + 2n, ... of the file, counted from 1.
        verbose: let llama.cpp log to stderr.
        repack: as in `SteeredLlama`, for a model that is given by its path.
        until_stable: end as soon as the first experts are settled; the pairs then come in an order that does not depend
            on their order in the file, and they and their counts are kept in memory. Not with a shard.
        span: count the tokens that a condition of a steering plan looks at, in place of the targets.
        phase: count the tokens of two phases of each target apart, too (`record_phases`).

    Raises UsageError for values outside their ranges.
    """

    behaviour: str = ""
    n_ctx: int = 0
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = 0
    type_k: int | None = None
    type_v: int | None = None
    flash_attn: bool | Literal["auto"] = "auto"
    thinking: bool = False
    template_arguments: Mapping[str, Any] | None = None
    date: AnyDate = None
    share_prefixes: bool = True
    shard: tuple[int, int] = (1, 1)
    verbose: bool = False
    repack: bool = True
    until_stable: UntilStable | None = None
    span: ConditionSpan | None = None
    phase: PhaseSplit | None = None

    def __post_init__(self) -> None:
        if self.n_batch < 1 or self.n_ubatch < 1 or self.n_ctx < 0:
            raise UsageError("n_batch and n_ubatch must be at least 1, n_ctx at least 0")
        if not 1 <= self.shard[0] <= self.shard[1]:
            raise UsageError(f"shard {self.shard[0]}/{self.shard[1]}: the first number is not from 1 to the second")
        if self.until_stable is not None and self.shard != (1, 1):
            raise UsageError(
                f"shard {self.shard[0]}/{self.shard[1]}: a shard alone cannot tell when all pairs are stable; "
                "leave out --shard or --until-stable"
            )

        if self.span is not None and self.phase is not None:
            raise UsageError("span, phase: both say which tokens are counted; give one")

    @property
    def context(self) -> ContextOptions:
        """The part of the options that llama.cpp's context takes."""
        return ContextOptions(self.n_batch, self.n_ubatch, self.n_threads, self.type_k, self.type_v, self.flash_attn)

    def pairs_before(self, n_pairs: int) -> int:
        """How many of the first `n_pairs` pairs of a file belong to the shard."""
        return len(range(self.shard[0] - 1, n_pairs, self.shard[1]))
