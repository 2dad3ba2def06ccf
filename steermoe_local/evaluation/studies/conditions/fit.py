"""Finds the threshold of a condition on routing, and measures on held-out pairs how well it tells the sides apart."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ...._util.files import timestamp, tool_name
from ....detection.checkpoint import CheckpointFile
from ....detection.recorder import record_counts
from ....detection.recording_options import PairSink, RecordingProgress
from ....detection.spans import ConditionSpan, usual_span
from ....errors import UsageError
from ....identity import ModelIdentity
from ....maps.confidence import SHUFFLED_LEVEL, Control
from ....maps.expert_map import ExpertMap
from ....maps.kept_pairs import KeptPairs
from ....maps.routing_lean import RoutingLean
from ....maps.significance import DRAWS, control_of
from ....pairs.pairs import Pair, PairsFile, pairs_digest
from ....steering.plan_rules import BY, Condition
from ....steering.plan_text import format_condition
from ...metrics.intervals import Interval, wilson
from ...metrics.separation import Numbers, Scores, auc_interval, best_threshold
from .cross_fitting import CrossFittedScores, FixedScores, PairScores, clusters_of

SteerWhen = Literal["positive", "negative"]

LEAST_PAIRS = 20
FOLDS = (3, 10)
_DRAWS_AT_A_TIME = 256


@dataclass(frozen=True)
class ConditionOptions:
    """What `fit_condition` is to find.

    Attributes:
        over: what is scored of each side: "prompt", or so many last tokens of its reply. None: the prompt, where the
            prompts of at least half of the pairs differ, else the last 16 tokens.
        by: the scores of the map, "rd" or "effect"; a map that is made of the pairs has only the former.
        steer_when: the side whose spans the condition is to hold for.
        n_folds: folds of the pairs, 3 to 10. draws: swaps of the sides, for the control. seed: of both.
        name: the name of the map in the condition.
        force: also take a map of another model of the same shape.

    Raises UsageError for values outside their ranges.
    """

    over: Literal["prompt"] | int | None = None
    by: str = "rd"
    steer_when: SteerWhen = "negative"
    n_folds: int = 5
    draws: int = DRAWS
    seed: int = 0
    name: str = "map"
    force: bool = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.by not in BY:
            raise UsageError(f"by: {self.by!r} is none of {', '.join(BY)}")
        if self.steer_when not in get_args(SteerWhen):
            raise UsageError(f"steer_when: {self.steer_when!r} is none of {', '.join(get_args(SteerWhen))}")
        if not FOLDS[0] <= self.n_folds <= FOLDS[1]:
            raise UsageError(f"n_folds: {self.n_folds} is not from {FOLDS[0]} to {FOLDS[1]}")
        if not 19 <= self.draws <= 99_999:
            raise UsageError(f"draws: {self.draws} is not from 19 to 99999")
        _ = self.span

    @property
    def span(self) -> ConditionSpan | None:
        """What is scored, None: it depends on the pairs. Raises UsageError."""
        if self.over is None:
            return None
        if self.over != "prompt" and type(self.over) is not int:
            raise UsageError(f"over: {self.over!r} is neither 'prompt' nor a number of tokens")
        return ConditionSpan(None if self.over == "prompt" else self.over)


@dataclass(frozen=True, eq=False)
class ConditionFit:
    """A condition, and how well it tells the sides of pairs apart that chose neither its map nor its threshold.

    Attributes:
        condition: what to write into a rule; None where all scores are the same.
        auc: probability that the lean of a positive side is above that of a negative one. None: all are the same.
        control: the AUC among those of pairs whose sides were swapped at random; None as `auc`.
        false_alarms, misses: of the sides that should not steer, the share for which the condition holds, and of those
            that should, the share for which it does not; each with the threshold of the other folds.
        scores: float64 [n_pairs, 2] (positive, negative), of the held-out pairs; `folds` [n_pairs].
        thresholds: of each fold, made of the others; NaN where all scores of them are the same.
        n_clusters: pairs, those that share a text counted as one.
        expert_map: the map of all pairs' spans; None if one was given, whose digest is `map_sha256`.
    """

    options: ConditionOptions
    span: ConditionSpan
    identity: ModelIdentity
    pairs_sha256: str
    pair_ids: tuple[str, ...]
    n_skipped: int
    n_clusters: int
    scores: Scores
    folds: Numbers
    thresholds: tuple[float, ...]
    condition: Condition | None
    auc: Interval | None
    control: Control | None
    false_alarms: Interval | None
    misses: Interval | None
    expert_map: ExpertMap | None
    map_sha256: str
    created: str = field(default_factory=timestamp)
    tool: str = field(default_factory=tool_name)

    @property
    def when(self) -> str | None:
        """The condition in the text form of a rule, like "faithful < 0.11 over prompt"."""
        return None if self.condition is None else format_condition(self.condition)

    @property
    def differs_from_shuffled(self) -> bool:
        """Whether the AUC is above those of swapped sides, at 5%. Needed for a condition, and not enough."""
        return self.control is not None and self.control.p <= SHUFFLED_LEVEL

    @property
    def warnings(self) -> tuple[str, ...]:
        """What speaks against steering by the condition, a sentence each."""
        if self.auc is None or self.control is None:
            return ("all spans have the same score, so there is no AUC and no threshold; take another map or span",)
        if self.auc.high < 0.5 and self.expert_map is None:
            return ("the negative sides lean to the map's positive side; exchange the sides of the pairs",)
        if self.auc.high < 0.5:
            return (
                "held-out pairs lean the other way than those that the map is made of, as if the same text were on "
                "the positive side of some and on the negative side of others; give pairs that share no text",
            )
        if not self.differs_from_shuffled:
            p = f"p = {self.control.p:.2g}"
            return (f"the lean tells the sides apart no better than with sides swapped at random ({p})",)
        return ()

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON values, the scores of each pair included; the map that was made is left out."""
        fits = zip(self.pair_ids, self.scores.tolist(), self.folds.tolist(), strict=True)
        options = asdict(self.options)
        del options["over"], options["force"]
        return {
            "when": self.when,
            "threshold": None if self.condition is None else self.condition.limit,
            "over": str(self.span),
            **options,
            "model": self.identity.to_dict(),
            "map_sha256": self.map_sha256,
            "cross_fitted": self.expert_map is not None,
            "pairs_sha256": self.pairs_sha256,
            "n_pairs": len(self.pair_ids),
            "n_skipped": self.n_skipped,
            "n_clusters": self.n_clusters,
            "auc": None if self.auc is None else asdict(self.auc),
            "control": None if self.control is None else asdict(self.control),
            "differs_from_shuffled": self.differs_from_shuffled,
            "false_alarms": None if self.false_alarms is None else asdict(self.false_alarms),
            "misses": None if self.misses is None else asdict(self.misses),
            "thresholds": [None if np.isnan(limit) else limit for limit in self.thresholds],
            "pairs": [{"id": name, "positive": one, "negative": two, "fold": f} for name, (one, two), f in fits],
            "created": self.created,
            "tool": self.tool,
        }


def fit_condition(
    model: str | os.PathLike[str] | Any,
    pairs: Iterable[Pair] | PairsFile,
    expert_map: ExpertMap | None = None,
    *,
    options: ConditionOptions | None = None,
    checkpoint: CheckpointFile | None = None,
    on_skip: Callable[[Pair, str], None] | None = None,
    on_batch: Callable[[RecordingProgress], None] | None = None,
    on_recorded: Callable[[], None] | None = None,
    **recording: Any,
) -> ConditionFit:
    """Find the threshold of a condition on routing, and its held-out AUC, false alarms and misses.

    Args:
        model: as in `record_counts`, which runs the pairs, unsteered, in one pass.
        pairs: contrastive pairs, of which the prompts, or the ends of the replies, are scored.
        expert_map: a map of other pairs. None: cross-fitting, by the risk differences of the other folds' spans.
        options: what is to be found.
        checkpoint, on_skip, on_batch, recording: as in `record_counts`, and its options.
        on_recorded: called when all pairs are recorded; what follows is arithmetic alone.

    Raises UsageError (too few pairs; a map that was made of these pairs, or has no effects), ModelMismatchError (a map
    of another model), and what `record_counts` raises.
    """
    options = options or ConditionOptions()
    source: Collection[Pair] = pairs if isinstance(pairs, PairsFile) else list(pairs)
    if expert_map is None and options.by != "rd":
        raise UsageError(f"by {options.by}: a map that is made of the pairs has no effects; give a map that has them")
    lean = None if expert_map is None else RoutingLean.of_map(expert_map, options.by)
    digest = pairs_digest(source)
    if expert_map is not None and digest in expert_map.pairs_sha256:
        raise UsageError(
            "the map was made of these pairs, so none of them is held out; give other pairs, or leave out the map and "
            "let one be made of each part of them"
        )
    span = options.span or usual_span(source)
    contents = {pair.id: span.content(pair) for pair in source}
    _require_pairs(clusters_of(list(contents.values())), len(contents), options)
    kept = KeptPairs()

    def sink(identity: ModelIdentity, _: str) -> PairSink:
        if expert_map is not None:
            expert_map.identity.require_same(identity, "the map", "the model", options.force)
        return kept

    counts = record_counts(
        model,
        source,
        checkpoint=checkpoint,
        per_pair=sink,
        on_skip=on_skip,
        on_batch=on_batch,
        span=span,
        **recording,
    )
    if on_recorded:
        on_recorded()
    clusters = clusters_of([contents[name] for name in kept.ids])
    try:
        _require_pairs(clusters, len(kept), options)
    except UsageError:
        if checkpoint is not None:
            checkpoint.remove()  # another start would skip the others all the same
        raise
    scores: PairScores
    if lean is None:
        scores = CrossFittedScores(kept, clusters, options.n_folds, options.seed)
        made = ExpertMap.from_counts(counts, notes=f"of the spans of a condition: over {span}")
    else:
        scores, made = FixedScores(kept, clusters, options.n_folds, options.seed, lean), None
    used = made or expert_map
    assert used is not None
    return ConditionFit(
        options=options,
        span=span,
        identity=counts.identity,
        pairs_sha256=digest,
        pair_ids=tuple(kept.ids),
        n_skipped=counts.n_skipped,
        n_clusters=len(np.unique(clusters)),
        folds=scores.folds,
        expert_map=made,
        map_sha256=used.sha256,
        **judged(scores, span, options),
    )


def judged(scores: PairScores, span: ConditionSpan, options: ConditionOptions) -> dict[str, Any]:
    """The fields of `ConditionFit` that follow from scores."""
    held_out = scores.held_out()
    fields: dict[str, Any] = {"scores": held_out}
    fields |= dict.fromkeys(("condition", "auc", "control", "false_alarms", "misses"))
    limits = [best_threshold(scores.training(fold)) for fold in range(scores.n_folds)]
    fields["thresholds"] = tuple(float("nan") if limit is None else limit for limit in limits)
    final = best_threshold(held_out)
    if final is None or not any(np.ptp(held_out[scores.strata == stratum]) for stratum in np.unique(scores.strata)):
        return fields
    holds = np.zeros(held_out.shape, dtype=np.bool_)
    for fold, limit in enumerate(limits):
        at = scores.folds == fold
        if limit is not None:
            holds[at] = np.vectorize(_condition(limit, span, options).holds)(held_out[at])
    wanted = 0 if options.steer_when == "positive" else 1
    swapped = np.concatenate([scores.swapped_aucs(swaps) for swaps in _swaps(scores.clusters, options)])
    interval = auc_interval(held_out, scores.strata, scores.clusters, swapped if scores.depend else None)
    return fields | {
        "condition": _condition(final, span, options),
        "auc": interval,
        "control": control_of(np.concatenate([[interval.value], swapped])),
        "false_alarms": wilson(int(holds[:, 1 - wanted].sum()), len(holds)),
        "misses": wilson(int((~holds[:, wanted]).sum()), len(holds)),
    }


def _condition(limit: float, span: ConditionSpan, options: ConditionOptions) -> Condition:
    side = "below" if options.steer_when == "negative" else "above"
    return Condition("routing", map=options.name, by=options.by, last=span.last, **{side: limit})


def _swaps(clusters: Numbers, options: ConditionOptions) -> Iterator[npt.NDArray[np.bool_]]:
    """Which pairs have their sides exchanged, bool [draws, n_pairs] at a time; the pairs of a cluster all together."""
    numbers, cluster = np.unique(clusters, return_inverse=True)
    rng = np.random.default_rng(options.seed)
    for start in range(0, options.draws, _DRAWS_AT_A_TIME):
        n = min(_DRAWS_AT_A_TIME, options.draws - start)
        yield rng.integers(0, 2, (n, len(numbers)), dtype=np.uint8).astype(np.bool_)[:, cluster]


def _require_pairs(clusters: Numbers, n_pairs: int, options: ConditionOptions) -> None:
    found, least = len(np.unique(clusters)), max(LEAST_PAIRS, 2 * options.n_folds)
    if found < least:
        what = f"{n_pairs} pairs" if found == n_pairs else f"{n_pairs} pairs, {found} of which share no text"
        raise UsageError(f"{what}: a condition needs {least} pairs with texts of their own; give more")
