"""Measures how a behaviour holds when random experts are steered, and on quantizations of the model (docs/audit.md)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ...._util.files import StrPath, timestamp, tool_name
from ....errors import UsageError
from ....model_files.model_info import model_info
from ....pairs.prompts import PromptItem
from ...measuring.evaluator import Evaluator, Progress
from ...measuring.measurements import Measurement
from ...metrics.crossed import crossed_difference
from ...metrics.intervals import rate as share_of
from ..transfer.agreement import Reference, compare_text, take_reference
from ..transfer.quantize import ModelFile, Quantizer, file_type
from ..transfer.transfer import BASE, N_AGREEMENT
from .perturbations import Perturbations, Plan
from .points import Key, Shown, Table, ids, point, table
from .results import LEVEL, Audit, ModelAudit, Point, Weakest

FEW = 20
"""Fewer items that show the behaviour than this are noted."""

OpenEvaluator = Callable[[Path, str], AbstractContextManager[Evaluator]]
"""Opens the evaluator on a model's file; the second argument is its name in the results ("base", "Q4_K_M", ...)."""


@dataclass(frozen=True)
class Work:
    """How much is to be measured on a model, told once its unsteered answers are there.

    `n_answers` are those to both tasks. `seconds`: about how long it takes at the speed of the unsteered model, None
    where that was not measured in this run.
    """

    name: str
    n_steerings: int
    n_answers: int
    seconds: float | None


def audit(
    evaluator: Evaluator,
    perturbations: Perturbations | None = None,
    *,
    level: float = LEVEL,
    on_work: Callable[[Work], None] | None = None,
) -> Audit:
    """Measure how the task's positive side holds on an evaluator's model when random experts are steered.

    What the unsteered model shows is compared with what it shows under each draw: item by item of the task, of the
    evaluator's second task (`benign`), which should have nothing to do with the behaviour, and token by token of its
    neutral text; each of these is optional. `level` is the share kept below which something is broken. `on_work` is
    called before the long part.

    Raises UsageError (a rate that the model cannot carry out, no item that shows the behaviour), ModelError,
    NativeError, and what the scorer raises.
    """
    study = _Study(perturbations or Perturbations(), _level(level), on_work)
    base = study.base(evaluator, None)
    return study.result(_Facts.of(evaluator), [base])


def audit_quantizations(
    base: StrPath,
    open_evaluator: OpenEvaluator,
    perturbations: Perturbations | None = None,
    *,
    quants: Sequence[str],
    folder: StrPath,
    keep: bool = True,
    level: float = LEVEL,
    n_agreement: int = N_AGREEMENT,
    n_threads: int | None = None,
    done: Mapping[str, ModelAudit] | None = None,
    on_model: Callable[[ModelAudit], None] | None = None,
    on_work: Callable[[Work], None] | None = None,
    progress: Progress | None = None,
) -> Audit:
    """As `audit` on a model, then under the same draws on quantizations of it, which are made in `folder`.

    Args:
        base: the model; of a split one the first part.
        open_evaluator: opens the evaluator on one of the models; only one is in memory at a time.
        quants: names as llama-quantize has them; may be none. keep: keep the files; else each is deleted when measured.
        n_agreement: tokens on which routing and predictions are compared. n_threads: of the quantizer.
        done: models of an interrupted run, by name. on_model: called with each when it is finished.
        progress: while quantizing.

    Raises as `audit`, and UsageError, ModelMismatchError, ResourceError (no room on the disk) of quantizing.
    """
    kinds = list({kind.name: kind for kind in map(file_type, quants)}.values())
    if n_agreement < 1:
        raise UsageError("n_agreement must be at least 1")
    study = _Study(perturbations or Perturbations(), _level(level), on_work)
    info = model_info(base)
    quantizer = Quantizer(info, folder, n_threads=n_threads, progress=progress)
    finished = dict(done or {})
    missing = [kind for kind in kinds if kind.name not in finished]
    quantizer.check_room(missing, keep)
    reference: Reference | None = None
    with open_evaluator(info.paths[0], BASE) as evaluator:
        if BASE not in finished:
            finished[BASE] = study.base(evaluator, ModelFile.of(info))
            if on_model:
                on_model(finished[BASE])
        if missing:
            reference = take_reference(evaluator, n_agreement, partial(evaluator.progress, f"routing of {BASE}"))
        facts = _Facts.of(evaluator)
    for kind in missing:
        assert reference is not None
        file = quantizer.make(kind)
        with open_evaluator(file.path, kind.name) as evaluator:
            finished[kind.name] = study.quantization(evaluator, kind.name, file, finished[BASE], reference)
        if not keep:
            quantizer.remove(kind)
        if on_model:
            on_model(finished[kind.name])
    models = [finished[BASE], *(finished[kind.name] for kind in kinds)]
    if not kinds:
        return study.result(facts, models)
    origin = {"base_sha256": quantizer.sha256, "n_agreement": n_agreement}
    return study.result(facts, models, origin, filter(None, [quantizer.warning]))


def _level(level: float) -> float:
    if not 0 < level <= 1:
        raise UsageError(f"level: {level} is no share above 0 and at most 1, like 0.8 or 80%")
    return level


class _Study:
    """What is measured on every model."""

    def __init__(self, perturbations: Perturbations, level: float, on_work: Callable[[Work], None] | None) -> None:
        self.perturbations, self.level = perturbations, level
        self._on_work = on_work or (lambda _: None)

    def base(self, evaluator: Evaluator, file: ModelFile | None) -> ModelAudit:
        """Measure the model itself, its blocks of layers included."""
        plan = self._plan(evaluator)
        unsteered, seconds = _timed(evaluator, BASE)
        shown = Shown.of(unsteered)
        if not shown.behaviour.any():
            raise UsageError(
                f"task {evaluator.task.name}: none of {shown.behaviour.size} items shows the behaviour "
                f"({evaluator.task.positive or 'value 1'}) unsteered, so nothing can be kept or lost; take items that "
                "do, or look at what the scorer makes of the answers"
            )
        self._tell(BASE, plan.n_steerings, unsteered, seconds)
        whole = _by_rate(plan)
        last = {action: rates[-1] for action, rates in plan.rates.items() if rates}
        parts = [(action, rate, block) for action, rate in last.items() for block in plan.blocks]
        measured = self._measured(evaluator, BASE, plan, [*whole, *parts], unsteered, shown)
        weakest = []
        for action, rate in last.items() if plan.blocks else ():
            tables = {block: measured[action, rate, block][1] for block in plan.blocks}
            least = min(tables, key=lambda block: float(tables[block].mean()))
            margins = tuple(
                crossed_difference(kept, tables[least], same_items=True)
                for block, kept in tables.items()
                if block != least
            )
            weakest.append(Weakest(action, least, margins))
        return ModelAudit(
            BASE,
            file,
            share_of(shown.behaviour.astype(np.float64)),
            tuple(measured[key][0] for key in whole),
            tuple(measured[key][0] for key in parts),
            tuple(weakest),
            shown=ids(evaluator.task.items, shown.behaviour),
            unrelated_shown=ids(_unrelated(evaluator), shown.unrelated),
        )

    def quantization(
        self, evaluator: Evaluator, name: str, file: ModelFile, base: ModelAudit, reference: Reference
    ) -> ModelAudit:
        """Measure a quantization under the draws of the base; what is kept is of what the unsteered base shows."""
        plan = self._plan(evaluator)
        unsteered, seconds = _timed(evaluator, name)
        shown = Shown(
            np.isin([str(item.id) for item in evaluator.task.items], base.shown),
            np.isin([str(item.id) for item in _unrelated(evaluator)], base.unrelated_shown),
        )
        here = Shown.of(unsteered)
        wanted = _by_rate(plan)
        self._tell(name, len(wanted) * plan.n_draws(), unsteered, seconds)
        measured = self._measured(evaluator, name, plan, wanted, unsteered, shown)
        routing, text = compare_text(evaluator, reference, partial(evaluator.progress, f"routing of {name}"))
        unrelated = here.unrelated[shown.unrelated].astype(np.float64)
        return ModelAudit(
            name,
            file,
            share_of(here.behaviour.astype(np.float64)),
            tuple(found for found, _ in measured.values()),
            kept=share_of(here.behaviour[shown.behaviour].astype(np.float64)),
            unrelated_kept=share_of(unrelated) if unrelated.size else None,
            routing=routing,
            text=text,
        )

    def result(
        self,
        facts: _Facts,
        models: Sequence[ModelAudit],
        origin: Mapping[str, Any] | None = None,
        notes: Iterable[str] = (),
    ) -> Audit:
        """The result; `origin` are further facts of the models."""
        n_shown = len(models[0].shown)
        found = list(notes)
        if n_shown < FEW:
            found.append(f"{n_shown} of {facts.n_items} items show the behaviour unsteered, so the intervals are wide")
        if facts.unrelated is not None and not models[0].unrelated_shown:
            found.append(f"no item of {facts.unrelated} shows its positive side unsteered, so it is not compared")
        if facts.settings["sampling"]["temperature"]:
            found.append("answers are sampled, so items are lost and gained without any perturbation, too")
        return Audit(
            task=facts.task,
            positive=facts.positive,
            unrelated=facts.unrelated if models[0].unrelated_shown else None,
            level=self.level,
            models=tuple(models),
            notes=tuple(found),
            provenance={
                **facts.metadata,
                "settings": facts.settings,
                "perturbations": asdict(self.perturbations),
                "n_items": facts.n_items,
                "n_shown": n_shown,
                "seed": self.perturbations.seed,
                **(origin or {}),
                "created": timestamp(),
                "tool": tool_name(),
            },
        )

    def _plan(self, evaluator: Evaluator) -> Plan:
        layers = [index for index, info in enumerate(evaluator.model.layer_info()) if info.steerable]
        return self.perturbations.plan(evaluator.identity, layers)

    def _tell(self, name: str, n_steerings: int, unsteered: Measurement, seconds: float | None) -> None:
        n_answers = n_steerings * (len(unsteered.answers) + len(unsteered.benign))
        self._on_work(Work(name, n_steerings, n_answers, None if seconds is None else seconds * n_steerings))

    def _measured(
        self,
        evaluator: Evaluator,
        name: str,
        plan: Plan,
        wanted: Sequence[Key],
        unsteered: Measurement,
        shown: Shown,
    ) -> dict[Key, tuple[Point, Table]]:
        """The point of each key, and what each item showed under each of its draws.

        One key after the other, so that no more answers than its own are in use, and with one progress over all in
        steerings: answers come fast and texts slowly, and each key has both.
        """
        found: dict[Key, tuple[Point, Table]] = {}
        show, total = evaluator.progress, sum(plan.n_draws(block) for *_, block in wanted)
        done = 0
        try:
            for key in wanted:
                biases = plan.biases(*key)
                evaluator.progress = partial(_show_steerings, show, f"audit of {name}", done, len(biases), total)
                draws = evaluator.measure(biases)
                found[key] = point(plan, key, draws, unsteered, shown), table(draws, shown.behaviour)
                done += len(biases)
        finally:
            evaluator.progress = show
        return found


@dataclass(frozen=True)
class _Facts:
    """Facts of an evaluator that a result needs, when it is closed already."""

    task: str
    positive: str
    unrelated: str | None
    n_items: int
    metadata: Mapping[str, Any]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, evaluator: Evaluator) -> _Facts:
        return cls(
            evaluator.task.name,
            evaluator.task.positive,
            None if evaluator.benign_task is None else evaluator.benign_task.name,
            len(evaluator.task.items),
            dict(evaluator.metadata),
            evaluator.settings,
        )


def _unrelated(evaluator: Evaluator) -> tuple[PromptItem, ...]:
    """The items of the evaluator's second task; none without one."""
    return () if evaluator.benign_task is None else evaluator.benign_task.items


def _show_steerings(show: Progress, what: str, before: int, n: int, of: int, _: str, done: int, total: int) -> None:
    """Show `done` of `total` results of `n` steerings as so many of `of` steerings, behind those `before`."""
    show(what, before + n * done // total, of)


def _by_rate(plan: Plan) -> list[Key]:
    return [(action, rate, None) for action, rates in plan.rates.items() for rate in rates]


def _timed(evaluator: Evaluator, name: str) -> tuple[Measurement, float | None]:
    """The unsteered model's measurement, and the seconds that it took; None if some of it was kept from before."""
    before, start = evaluator.n_computed, time.monotonic()
    (found,) = evaluator.measure([None], what=f"{name} unsteered")
    n = len(found.answers) + len(found.benign) + (found.text is not None)
    return found, time.monotonic() - start if evaluator.n_computed - before == n else None
