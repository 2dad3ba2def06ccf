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
import numpy.typing as npt

from ...._util.files import StrPath, timestamp, tool_name
from ....errors import UsageError
from ....model_files.model_info import model_info
from ....steering.bias_file import BiasFile
from ...measuring.evaluator import Evaluator, Progress
from ...measuring.measurements import Answer, Measurement
from ...measuring.side_effects import LOOPING
from ...metrics.crossed import crossed_difference
from ...metrics.intervals import rate as share_of
from ..transfer.agreement import Reference, compare_text, take_reference
from ..transfer.quantize import ModelFile, Quantizer, file_type
from ..transfer.transfer import BASE, N_AGREEMENT
from .perturbations import Perturbations, Plan
from .results import LEVEL, Audit, Kept, ModelAudit, Point, Weakest

SHOWN = 0.5
"""An item shows a behaviour if its value, the mean over its seeds, is at least this."""
FEW = 20
"""Fewer items that show the behaviour than this are noted."""

Mask = npt.NDArray[np.bool_]
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


def unrelated_to(evaluator: Evaluator) -> str | None:
    """The name of the evaluator's second task; None without one."""
    return None if evaluator.benign_task is None else evaluator.benign_task.name


def _level(level: float) -> float:
    if not 0 < level <= 1:
        raise UsageError(f"level: {level} is no share above 0 and at most 1, like 0.8 or 80%")
    return level


@dataclass(frozen=True)
class _Shown:
    """Which items of the task, and of the unrelated one, showed it on the unsteered base."""

    behaviour: Mask
    unrelated: Mask

    @classmethod
    def of(cls, measured: Measurement) -> _Shown:
        return cls(_shows(measured.values), _shows(measured.benign_values))


class _Study:
    """What is measured on every model."""

    def __init__(self, perturbations: Perturbations, level: float, on_work: Callable[[Work], None] | None) -> None:
        self.perturbations, self.level = perturbations, level
        self._on_work = on_work or (lambda _: None)

    def base(self, evaluator: Evaluator, file: ModelFile | None) -> ModelAudit:
        """Measure the model itself, its blocks of layers included."""
        plan = self._plan(evaluator)
        unsteered, seconds = _timed(evaluator, BASE)
        shown = _Shown.of(unsteered)
        if not shown.behaviour.any():
            raise UsageError(
                f"task {evaluator.task.name}: none of {shown.behaviour.size} items shows the behaviour "
                f"({evaluator.task.positive or 'value 1'}) unsteered, so nothing can be kept or lost; take items that "
                "do, or look at what the scorer makes of the answers"
            )
        self._tell(evaluator, BASE, plan, plan.n_steerings, seconds)
        whole = _by_rate(plan)
        last = {action: rates[-1] for action, rates in plan.rates.items() if rates}
        parts = [(action, rate, block) for action, rate in last.items() for block in plan.blocks]
        measured = self._measured(evaluator, BASE, plan, [*whole, *parts])
        points = [_point(plan, key, found, unsteered, shown) for key, found in measured.items()]
        weakest = []
        for action, rate in last.items() if plan.blocks else ():
            tables = {b: _table(measured[action, rate, b], shown.behaviour) for b in plan.blocks}
            least = min(tables, key=lambda block: float(tables[block].mean()))
            margins = tuple(
                crossed_difference(table, tables[least], same_items=True)
                for block, table in tables.items()
                if block != least
            )
            weakest.append(Weakest(action, least, margins))
        return ModelAudit(
            BASE,
            file,
            share_of(shown.behaviour.astype(np.float64)),
            tuple(points[: len(whole)]),
            tuple(points[len(whole) :]),
            tuple(weakest),
            shown=_ids(evaluator.task.items, shown.behaviour),
            unrelated_shown=_ids(evaluator.benign_task.items if evaluator.benign_task else (), shown.unrelated),
        )

    def quantization(
        self, evaluator: Evaluator, name: str, file: ModelFile, base: ModelAudit, reference: Reference
    ) -> ModelAudit:
        """Measure a quantization under the draws of the base; what is kept is of what the unsteered base shows."""
        plan = self._plan(evaluator)
        unsteered, seconds = _timed(evaluator, name)
        shown = _Shown(
            np.isin([str(item.id) for item in evaluator.task.items], base.shown),
            np.isin(
                [str(item.id) for item in (evaluator.benign_task.items if evaluator.benign_task else ())],
                base.unrelated_shown,
            ),
        )
        here = _Shown.of(unsteered)
        wanted = _by_rate(plan)
        self._tell(evaluator, name, plan, len(wanted) * self.perturbations.n_draws, seconds)
        measured = self._measured(evaluator, name, plan, wanted)
        routing, text = compare_text(evaluator, reference, partial(evaluator.progress, f"routing of {name}"))
        unrelated = here.unrelated[shown.unrelated].astype(np.float64)
        return ModelAudit(
            name,
            file,
            share_of(here.behaviour.astype(np.float64)),
            tuple(_point(plan, key, found, unsteered, shown) for key, found in measured.items()),
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

    def _tell(self, evaluator: Evaluator, name: str, plan: Plan, n_steerings: int, seconds: float | None) -> None:
        n_items = len(evaluator.task.items) + len(evaluator.benign_task.items if evaluator.benign_task else ())
        whole = None if seconds is None else seconds * n_steerings
        self._on_work(Work(name, n_steerings, n_steerings * n_items, whole))

    def _measured(
        self, evaluator: Evaluator, name: str, plan: Plan, wanted: Sequence[_Key]
    ) -> dict[_Key, list[Measurement]]:
        """The draws of each key. All at once: one bar then shows how long all takes."""
        biases: dict[_Key, list[BiasFile | None]] = {key: plan.biases(*key) for key in wanted}
        found = iter(evaluator.measure([bias for draws in biases.values() for bias in draws], what=f"audit of {name}"))
        return {key: [next(found) for _ in draws] for key, draws in biases.items()}


_Key = tuple[str, float, tuple[int, ...] | None]
"""An action, its rate, and the block of layers that it is restricted to; None: all."""


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
            unrelated_to(evaluator),
            len(evaluator.task.items),
            dict(evaluator.metadata),
            evaluator.settings,
        )


def _by_rate(plan: Plan) -> list[_Key]:
    return [(action, rate, None) for action, rates in plan.rates.items() for rate in rates]


def _timed(evaluator: Evaluator, name: str) -> tuple[Measurement, float | None]:
    """The unsteered model's measurement, and the seconds that it took; None if some of it was kept from before."""
    before, start = evaluator.n_computed, time.monotonic()
    (found,) = evaluator.measure([None], what=f"{name} unsteered")
    n = len(found.answers) + len(found.benign) + (found.text is not None)
    return found, time.monotonic() - start if evaluator.n_computed - before == n else None


def _point(plan: Plan, key: _Key, draws: Sequence[Measurement], unsteered: Measurement, shown: _Shown) -> Point:
    """What the draws of a key keep of `shown`; the text is compared with this model `unsteered`."""
    action, rate, block = key
    table, others = _table(draws, shown.behaviour), _table(draws, ~shown.behaviour)
    unrelated = text = gap = text_gap = kl = ratio = None
    if shown.unrelated.any():
        other = np.stack([_shows(found.benign_values)[shown.unrelated] for found in draws], axis=1)
        unrelated, gap = Kept.of(other), crossed_difference(table, other)
    scores = [found.text for found in draws if found.text is not None]
    if scores and unsteered.text is not None:
        tokens = np.array([[score.same_top for score in scores]])
        text, text_gap = Kept.of(tokens), crossed_difference(table, tokens)
        kl = float(np.mean([score.kl for score in scores]))
        ratio = float(np.exp(np.mean([score.nll for score in scores]) - unsteered.text.nll))
    return Point(
        action=action,
        rate=rate,
        layers=plan.layers if block is None else block,
        n_experts=max(sum(found.n_experts) for found in draws),
        behaviour=Kept.of(table),
        gained=float(others.mean()) if others.size else None,
        shown=float(np.mean([_shows(found.values).mean() for found in draws])),
        broken=float(np.mean([_broken(answer) for found in draws for answer in found.answers])),
        unrelated=unrelated,
        text=text,
        kl=kl,
        perplexity_ratio=ratio,
        gap=gap,
        text_gap=text_gap,
    )


def _table(draws: Sequence[Measurement], items: Mask) -> npt.NDArray[np.float64]:
    """1 where an item shows the behaviour under a draw, 0 where it does not, [n_items, n_draws]."""
    return np.stack([_shows(found.values)[items] for found in draws], axis=1).astype(np.float64)


def _shows(values: npt.NDArray[np.float64]) -> Mask:
    return values >= SHOWN


def _broken(answer: Answer) -> bool:
    return answer.label == "ill-formed" or answer.empty or answer.loop >= LOOPING


def _ids(items: Sequence[Any], mask: Mask) -> tuple[str, ...]:
    return tuple(str(item.id) for item, there in zip(items, mask, strict=True) if there)
