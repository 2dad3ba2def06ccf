"""Does a map made on one quantization of a model serve the others? docs/transfer.md says what is measured and why."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..._util.files import StrPath, timestamp, tool_name
from ...detection.recorder import record_counts
from ...errors import ChoiceError, UsageError
from ...identity import ModelIdentity
from ...maps.expert_map import ExpertMap
from ...maps.significance import TOP_N, compare
from ...model_files.model_info import model_info
from ...pairs.pairs import Pair, PairsFile, pairs_digest
from ...steering.steering import Steering
from ..measuring.evaluator import Evaluator, EvaluatorSettings, Progress
from ..metrics.intervals import difference
from ..tasks.neutral_text import NeutralText
from ..tasks.tasks import Scorer, Task
from .agreement import Reference, compare_text, take_reference
from .evaluate import evaluate, has_reverse, side_biases, steering_facts
from .file_types import QUANTS, file_type
from .opening import open_evaluator as open_evaluator_on
from .quantize import ModelFile, Quantizer
from .transfer_results import Column, MapEffect, Transfer

__all__ = ["BASE", "N_AGREEMENT", "Column", "MapEffect", "OpenEvaluator", "Transfer", "open_evaluators", "transfer"]

BASE = "base"
N_AGREEMENT = 500

OpenEvaluator = Callable[[Path, str], AbstractContextManager[Evaluator]]
"""Opens the evaluator on a model's file; the second argument is the column's name ("base", "Q4_K_M", ...)."""


def open_evaluators(
    task: Task,
    scorer: Scorer,
    *,
    neutral: NeutralText | None = None,
    benign: tuple[Task, Scorer] | None = None,
    settings: EvaluatorSettings | None = None,
    progress: Progress | None = None,
    **model_arguments: Any,
) -> OpenEvaluator:
    """An opener of evaluators for `transfer`, with these arguments of `Evaluator` and of `SteeredLlama`."""

    fixed: dict[str, Any] = {"neutral": neutral, "benign": benign, "settings": settings, "progress": progress}

    def open_column(path: Path, _: str) -> AbstractContextManager[Evaluator]:
        return open_evaluator_on(path, task, scorer=scorer, **fixed, **model_arguments)

    return open_column


def transfer(
    base: StrPath,
    steering: Steering,
    open_evaluator: OpenEvaluator,
    *,
    folder: StrPath,
    quants: Sequence[str] = QUANTS,
    pairs: Collection[Pair] | None = None,
    keep: bool = True,
    top_n: int = TOP_N,
    n_agreement: int = N_AGREEMENT,
    n_threads: int | None = None,
    seed: int = 0,
    done: Mapping[str, Column] | None = None,
    on_column: Callable[[Column], None] | None = None,
    on_map: Callable[[str, ExpertMap], None] | None = None,
    progress: Progress | None = None,
) -> Transfer:
    """Quantize a model and measure one steering, and each quantization's own map, on all of them.

    Args:
        base: the model to quantize; of a split one the first part.
        steering: a choice of experts from a map made on it.
        open_evaluator: opens the evaluator on one of the models; only one is in memory at a time.
        folder: where the quantizations go. Those that were made there from the same base are used again.
        quants: names as llama-quantize has them.
        pairs: what the map was made from, for each model's own map; None: no own maps.
        keep: keep the quantizations; else each is deleted when it is measured.
        top_n: first experts by |RD| whose overlap is told. n_agreement: tokens on which routing is compared.
        n_threads: of the quantizer. seed: of bootstraps.
        done: columns of an interrupted run, by name. on_column: called with each column when it is finished.
        on_map: called with (column's name, its own map). progress: while quantizing.

    Raises UsageError, ModelError, ModelMismatchError, ResourceError (no room on the disk), NativeError, and what the
    evaluator raises.
    """
    kinds = list({kind.name: kind for kind in map(file_type, quants)}.values())
    if not kinds:
        raise UsageError("no quantizations; name one at least, like Q4_K_M")
    if steering.expert_map is None:
        raise UsageError(f"{steering.name}: is no map; what is compared between quantizations are maps (--map MAP)")
    if n_agreement < 1 or top_n < 1:
        raise UsageError("n_agreement and top_n must be at least 1")
    info = model_info(base)
    quantizer = Quantizer(info, folder, n_threads=n_threads, progress=progress)
    warnings = [*filter(None, [quantizer.warning]), *_pairs_warnings(steering.expert_map, pairs)]
    check_choice(steering, quantizer.identity)
    finished = dict(done or {})
    missing = [kind for kind in kinds if kind.name not in finished]
    quantizer.check_room(missing, keep)
    plan = _Plan(steering, pairs, top_n, n_agreement, seed, on_map)
    with open_evaluator(info.paths[0], BASE) as evaluator:
        if BASE not in finished:
            finished[BASE] = plan.column(evaluator, BASE, ModelFile.of(info), None, None)
            if on_column:
                on_column(finished[BASE])
        task = evaluator.task
        provenance = {**evaluator.metadata, **plan.facts(evaluator, quantizer)}
        # what the base did with the text is not kept over an interruption, but quick to have again
        reference = take_reference(evaluator, n_agreement, _shown(evaluator, "routing of base")) if missing else None
    for kind in missing:
        file = quantizer.make(kind)
        with open_evaluator(file.path, kind.name) as evaluator:
            finished[kind.name] = plan.column(evaluator, kind.name, file, finished[BASE].effect, reference)
        if not keep:
            quantizer.remove(kind)
        if on_column:
            on_column(finished[kind.name])
    return Transfer(
        base=finished[BASE],
        columns=tuple(finished[kind.name] for kind in kinds),
        task=task.name,
        positive=task.positive,
        negative=task.negative,
        warnings=tuple(warnings),
        provenance={**provenance, "created": timestamp(), "tool": tool_name()},
    )


def check_choice(steering: Steering, identity: ModelIdentity) -> None:
    """Tell before long work what the model cannot carry out, one way or the other. Raises ChoiceError."""
    steering.build(identity)
    if has_reverse(steering):
        steering.changed(reverse=not steering.reverse).build(identity)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is measured on every model."""

    steering: Steering
    pairs: Collection[Pair] | None
    top_n: int
    n_agreement: int
    seed: int
    on_map: Callable[[str, ExpertMap], None] | None

    def facts(self, evaluator: Evaluator, quantizer: Quantizer) -> dict[str, Any]:
        """Where the figures come from, besides the evaluator's own facts."""
        return {
            "base_sha256": quantizer.sha256,
            "steering": steering_facts(self.steering),
            "pairs_sha256": None if self.pairs is None else _digest(self.pairs),
            "n_pairs": None if self.pairs is None else len(self.pairs),
            "settings": evaluator.settings,
            "top_n": self.top_n,
            "n_agreement": self.n_agreement,
            "router_sha256": quantizer.identity.router_sha256,
            "seed": self.seed,
        }

    def column(
        self, evaluator: Evaluator, name: str, file: ModelFile, base: MapEffect | None, reference: Reference | None
    ) -> Column:
        """Measure one model."""
        wanted, own = [self.steering], None
        notes: tuple[str, ...] = ()
        if self.pairs is not None and self.steering.expert_map is not None:
            own = self._own_map(evaluator, name, self.steering.expert_map)
            try:
                changed = self.steering.changed(expert_map=own, path=None)
                check_choice(changed, own.identity)
                wanted.append(changed)
            except ChoiceError as error:  # one model's own map must not end the run over all of them
                notes = (f"its own map cannot be steered by: {error}",)
        # all at once: the neutral text is then predicted under all of them together
        biases = [
            bias for steering in wanted for bias in side_biases(evaluator, steering, has_reverse(steering)).values()
        ]
        evaluator.measure(biases, what=name)
        found = [evaluate(evaluator, steering, controls=None, seed=self.seed) for steering in wanted]
        effect = MapEffect.of(found[0], base, self.seed)
        column = Column(name, file, effect, perplexity=found[0].sides[0].fluency.perplexity, notes=notes)
        if len(found) > 1:
            mine = MapEffect.of(found[1], base or effect, self.seed)
            column = replace(column, own_effect=mine, own_gain=difference(mine.items, effect.items, self.seed))
        if own is not None and self.steering.expert_map is not None:
            if self.on_map:
                self.on_map(name, own)
            agreement = compare(self.steering.expert_map, own, self.top_n)
            column = replace(column, map=agreement, own_map_sha256=own.sha256)
        if reference is not None:
            routing, text = compare_text(evaluator, reference, _shown(evaluator, f"routing of {name}"))
            column = replace(column, routing=routing, text=text)
        return column

    def _own_map(self, evaluator: Evaluator, name: str, base: ExpertMap) -> ExpertMap:
        """The map that this model's own routing makes of the pairs."""
        counts = record_counts(
            evaluator.model,
            self.pairs or (),
            behaviour=base.behaviour,
            **evaluator.recording_arguments(f"pairs on {name}"),
        )
        return ExpertMap.from_counts(
            counts, positive=base.positive, negative=base.negative, notes=f"made on {name} for steermoe transfer"
        )


def _shown(evaluator: Evaluator, what: str) -> Callable[[int, int], None]:
    return lambda done, total: evaluator.progress(what, done, total)


def _digest(pairs: Collection[Pair]) -> str:
    return pairs.digest if isinstance(pairs, PairsFile) else pairs_digest(pairs)


def _pairs_warnings(expert_map: ExpertMap, pairs: Collection[Pair] | None) -> list[str]:
    """What must be said of the pairs before figures of own maps are read."""
    if pairs is None:
        return ["no pairs: the quantizations' own maps are not made; give the pairs that the map was made from"]
    if expert_map.pairs_sha256 and _digest(pairs) not in expert_map.pairs_sha256:
        return [
            "the pairs are not those that the map was made from: own maps differ by the pairs as well; the base's own "
            "map shows by how much"
        ]
    return []
