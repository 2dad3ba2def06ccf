"""Measures whether a map made on one quantization of a model serves the others (docs/transfer.md)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from ...._util.files import StrPath, timestamp, tool_name
from ....detection.recorder import record_counts
from ....errors import ChoiceError, UsageError
from ....maps.expert_map import ExpertMap
from ....maps.significance import TOP_N, compare
from ....model_files.model_info import model_info
from ....pairs.pairs import Pair, pairs_digest
from ....steering.steering import Steering
from ...measuring.evaluator import Evaluator, Progress
from ...metrics.intervals import difference
from ..evaluate import evaluate
from ..steerings import both_ways, side_biases, steering_facts
from .agreement import Reference, compare_text, take_reference
from .quantize import QUANTS, ModelFile, Quantizer, file_type
from .results import Column, MapEffect, Transfer

BASE = "base"
N_AGREEMENT = 500

OpenEvaluator = Callable[[Path, str], AbstractContextManager[Evaluator]]
"""Opens the evaluator on a model's file; the second argument is the column's name ("base", "Q4_K_M", ...)."""


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
        top_n: first experts by |RD| whose overlap is reported. n_agreement: tokens on which routing is compared.
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
    both_ways(steering, quantizer.identity)  # a model that cannot carry it out is reported before long work
    finished = dict(done or {})
    missing = [kind for kind in kinds if kind.name not in finished]
    quantizer.check_room(missing, keep)
    digest = None if pairs is None else pairs_digest(pairs)
    study = _Study(steering, steering.expert_map, pairs, top_n, seed, on_map)
    with open_evaluator(info.paths[0], BASE) as evaluator:
        if BASE not in finished:
            finished[BASE] = study.column(evaluator, BASE, ModelFile.of(info), None, None)
            if on_column:
                on_column(finished[BASE])
        task = evaluator.task
        provenance = {
            **evaluator.metadata,
            "base_sha256": quantizer.sha256,
            "steering": steering_facts(steering),
            "pairs_sha256": digest,
            "n_pairs": None if pairs is None else len(pairs),
            "settings": evaluator.settings,
            "top_n": top_n,
            "n_agreement": n_agreement,
            "router_sha256": quantizer.identity.router_sha256,
            "seed": seed,
        }
        # the reference is not kept over an interruption, but quickly computed again
        reference = take_reference(evaluator, n_agreement, _shown(evaluator, "routing of base")) if missing else None
    for kind in missing:
        file = quantizer.make(kind)
        with open_evaluator(file.path, kind.name) as evaluator:
            finished[kind.name] = study.column(evaluator, kind.name, file, finished[BASE].effect, reference)
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
        warnings=tuple(filter(None, [quantizer.warning, _pairs_warning(steering.expert_map, digest)])),
        provenance={**provenance, "created": timestamp(), "tool": tool_name()},
    )


@dataclass(frozen=True, eq=False)
class _Study:
    """What is measured on every model."""

    steering: Steering
    expert_map: ExpertMap
    pairs: Collection[Pair] | None
    top_n: int
    seed: int
    on_map: Callable[[str, ExpertMap], None] | None

    def column(
        self, evaluator: Evaluator, name: str, file: ModelFile, base: MapEffect | None, reference: Reference | None
    ) -> Column:
        """Measure one model; `base` is the effect on the base model, None for that model itself."""
        steerings, own = [self.steering], self._own_map(evaluator, name)
        notes: tuple[str, ...] = ()
        if own is not None:
            try:
                if self.steering.values:
                    raise UsageError("the values were fitted to another model; give numbers of experts")
                changed = self.steering.changed(expert_map=own, path=None)
                both_ways(changed, own.identity)
                steerings.append(changed)
            except (ChoiceError, UsageError) as error:  # one model's own map must not end the run over all of them
                notes = (f"its own map cannot be steered by: {error}",)
        # all at once: the neutral text is then predicted under all of them together
        biases = [bias for one in steerings for bias in side_biases(one, evaluator.identity).values()]
        evaluator.measure(biases, what=name)
        found = [evaluate(evaluator, steering, controls=None, seed=self.seed) for steering in steerings]
        effect = MapEffect.of(found[0], base, self.seed)
        column = Column(name, file, effect, perplexity=found[0].sides[0].fluency.perplexity, notes=notes)
        if len(found) > 1:
            own_effect = MapEffect.of(found[1], base or effect, self.seed)
            gain = difference(own_effect.items, effect.items, self.seed)
            column = replace(column, own_effect=own_effect, own_gain=gain)
        if own is not None:
            if self.on_map:
                self.on_map(name, own)
            column = replace(column, map=compare(self.expert_map, own, self.top_n), own_map_sha256=own.sha256)
        if reference is not None:
            routing, text = compare_text(evaluator, reference, _shown(evaluator, f"routing of {name}"))
            column = replace(column, routing=routing, text=text)
        return column

    def _own_map(self, evaluator: Evaluator, name: str) -> ExpertMap | None:
        """The map of the pairs by this model's own routing: RD alone, as effects were measured on another model."""
        if self.pairs is None:
            return None
        base = self.expert_map
        recording = evaluator.recording_arguments(f"pairs on {name}")
        counts = record_counts(evaluator.model, self.pairs, behaviour=base.behaviour, **recording)
        notes = f"made on {name} for steermoe transfer"
        return ExpertMap.from_counts(counts, positive=base.positive, negative=base.negative, notes=notes)


def _shown(evaluator: Evaluator, what: str) -> Callable[[int, int], None]:
    return lambda done, total: evaluator.progress(what, done, total)


def _pairs_warning(expert_map: ExpertMap, digest: str | None) -> str:
    """A warning about the pairs to read before figures of own maps."""
    if digest is None:
        return "no pairs: the quantizations' own maps are not made; give the pairs that the map was made from"
    if expert_map.pairs_sha256 and digest not in expert_map.pairs_sha256:
        return (
            "the pairs are not those that the map was made from: own maps differ by the pairs as well; the base's own "
            "map shows by how much"
        )
    return ""
