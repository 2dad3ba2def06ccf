"""Measures steerings of one model on one task: all answers, their scores, and how well a neutral text is predicted.

The studies (evaluate, sweep, tune, transfer, audit, experiments) ask an `Evaluator` for `Measurement`s and compute
with them. Results are kept by steering, item and seed, so nothing is measured twice, also after an interruption.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...generation.answer_file import AnswerFile
from ...generation.engine import Engine, Sampling
from ...identity import ModelIdentity
from ...llama.rendering import Renderer, vocabulary_renderer
from ...llama.steered_llama import SteeredLlama
from ...llama.template_date import AnyDate, may_lack, template_date
from ...model_files.model_info import model_info
from ...pairs.prompts import PromptItem
from ...steering.bias_file import BiasFile
from ...steering.bias_plan import AnyBias, BiasPlan
from ...steering.old_digests import record_name
from ...steering.plan import SteeringPlan
from ..tasks.neutral_text import NeutralText, TextScore, score_text
from ..tasks.tasks import Scorer, Task
from .measurements import UNSTEERED, Answer, Measurement, bias_key, record_of
from .rendered_tasks import Source, context_size, source
from .replies import GREEDY, Job, replies
from .scoring import Scoring
from .workload import OnWork, Work, Workload

Progress = Callable[[str, int, int], None]
"""Called with (what is measured, answers and texts that are done, how many are wanted)."""


@dataclass(frozen=True)
class EvaluatorSettings:
    """How an `Evaluator` measures.

    `sampling`: temperature 0 is greedy; else every item is answered once for each of `seeds`. `n_parallel`: how many
    answers are decoded at once. `n_ctx` None: as the task needs. `n_text`: most tokens of the neutral text that count.
    `thinking`, `template_arguments`, `date`: as in `Renderer`; with None the date is that on which these settings were
    made. `placement`: a plan whose windows and conditions all that is measured is in force at, in the place of what
    the plan steers by; None: at all tokens. `record`: have a recorder, which plans with conditions on routing need,
    also without a `placement` that has some. `context`: further arguments of `Engine` (n_threads, type_k, ...).
    Raises UsageError.
    """

    sampling: Sampling = GREEDY
    seeds: tuple[int, ...] = (0,)
    n_parallel: int = 16
    n_ctx: int | None = None
    n_text: int | None = 2000
    thinking: bool = False
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    date: AnyDate = None
    force: bool = False
    placement: SteeringPlan | None = None
    record: bool = False
    context: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "date", template_date(self.date))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError("seeds: give at least one, and none twice")
        if self.sampling.temperature == 0 and len(self.seeds) > 1:
            raise UsageError("several seeds need a temperature above 0: a greedy answer is the same for all")
        if not 1 <= self.n_parallel <= 256:
            raise UsageError(f"n_parallel: {self.n_parallel} is not from 1 to 256")

    def to_dict(self) -> dict[str, Any]:
        """The settings that results depend on, as plain JSON values."""
        names = [name for name in self.sampling.__dataclass_fields__ if name != "seed"]
        sampling = {name: getattr(self.sampling, name) for name in names}
        return {
            "sampling": {"temperature": 0} if self.sampling.temperature == 0 else sampling,
            "seeds": list(self.seeds),
            "n_text": self.n_text,
            "thinking": self.thinking,
            "template_arguments": dict(self.template_arguments),
            **({} if self.placement is None else _placement_settings(self.placement)),
        }

    @property
    def needs_recorder(self) -> bool:
        """Whether the engine records the routing, for `record` or for a condition of `placement`."""
        return self.record or (self.placement is not None and self.placement.needs_routing)

    def placed(self, bias: AnyBias | None) -> AnyBias | None:
        """What is measured for a bias: itself, or a plan that has it where `placement` steers."""
        return bias if self.placement is None or not isinstance(bias, BiasFile) else self.placement.placed(bias)


def _placement_settings(placement: SteeringPlan) -> dict[str, Any]:
    """Where a plan steers, with the digests of the maps that its conditions look at: their names say too little."""
    maps = [rule.looks_at.sha256 for rule in placement.rules if rule.looks_at is not None]
    return {"placement": placement.windows} | ({"placement_maps": maps} if maps else {})


def plan(
    path: Path,
    task: Task,
    scorer: Scorer,
    *,
    benign: tuple[Task, Scorer] | None = None,
    neutral: NeutralText | None = None,
    settings: EvaluatorSettings | None = None,
) -> int:
    """Tokens of context of each sequence of an `Evaluator`, by the model's vocabulary alone: before its weights are
    loaded.

    Raises UsageError (a prompt that does not fit), FormatError (an item that cannot be scored), ModelError.
    """
    settings = settings or EvaluatorSettings()
    with vocabulary_renderer(
        path, thinking=settings.thinking, template_arguments=settings.template_arguments, date=settings.date
    ) as renderer:
        sources = _sources(renderer, (task, scorer), benign, settings.seeds)
        trained = model_info(path, routers=False).context_length
        n_ctx = context_size(sources, neutral, renderer, trained, settings.n_ctx)
        if neutral is not None:
            neutral.documents(renderer, n_ctx, settings.n_text)
        return n_ctx


def _sources(
    renderer: Renderer, task: tuple[Task, Scorer], benign: tuple[Task, Scorer] | None, seeds: tuple[int, ...]
) -> list[Source]:
    """The rendered task, and the benign prompts, to which one answer each is enough: they are a guard, not a result."""
    return [source(renderer, *task, seeds), *([source(renderer, *benign, seeds[:1])] if benign else [])]


class Evaluator:
    """A context manager over an engine on a model's weights, for one task; the model's own context is not touched."""

    def __init__(
        self,
        model: SteeredLlama,
        task: Task,
        scorer: Scorer,
        *,
        benign: tuple[Task, Scorer] | None = None,
        neutral: NeutralText | None = None,
        settings: EvaluatorSettings | None = None,
        kept: AnswerFile | None = None,
        resume: bool = False,
        metadata: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
        on_work: OnWork | None = None,
    ) -> None:
        """Render all prompts and make the context.

        `benign` is a second task, which every steering answers as well: one whose positive side is a refusal, to count
        over-refusal, or whatever a study compares with. `neutral` is a text to predict. None: not measured. Results
        are kept in `kept`, where it is given: a new file, or with `resume` what an interrupted run left, if the
        settings and `metadata` (facts of the caller that results depend on, such as the model's file) are the same.
        `on_work` is told how much there is to measure before it is begun.

        Raises UsageError (a prompt that does not fit, other settings), FormatError (an item that cannot be scored),
        ModelError.
        """
        self.model, self.task, self.scorer = model, task, scorer
        self.metadata = dict(metadata or {})
        self.benign_task = benign[0] if benign else None
        self.neutral = neutral
        self.n_computed = 0
        """Answers and texts that were computed here, not taken from what was kept."""
        self._settings = settings or EvaluatorSettings()
        self._kept = kept
        self.progress: Progress = progress or (lambda *_: None)
        """Called while something is measured; studies call it for other long work on the model."""
        self.workload = Workload(lambda *shown: self.progress(*shown), on_work)
        """Studies of several calls of `measure` tell it beforehand what these come to."""
        self.renderer = Renderer(
            model._model,
            thinking=self._settings.thinking,
            template_arguments=self._settings.template_arguments,
            date=self._settings.date,
        )
        sources = _sources(self.renderer, (task, scorer), benign, self._settings.seeds)
        self._task, self._benign = sources[0], sources[1] if benign else None
        context = dict(self._settings.context)
        # text is predicted beside the unsteered model
        n_slots = max(self._settings.n_parallel, 1 if neutral is None else 2)
        context["n_batch"] = max(context.get("n_batch") or 512, n_slots)
        with ExitStack() as stack:
            self.engine = stack.enter_context(
                Engine(
                    model,
                    n_ctx=context_size(
                        sources, neutral, self.renderer, int(model._model.n_ctx_train()), self._settings.n_ctx
                    ),
                    n_slots=n_slots,
                    record=self._settings.needs_recorder,
                    force=self._settings.force,
                    **context,
                )
            )
            self._documents = (
                [] if neutral is None else neutral.documents(self.renderer, self.engine.n_ctx, self._settings.n_text)
            )
            self._wanted: dict[str, None] = {}  # ids in the order in which they were asked for
            self._records = self._begin(resume)
            self._resumed_names = {str(record["bias"]) for record in self._records.values()}
            self._stack = stack.pop_all()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def n_kept(self) -> int:
        """Number of results, of this run and of the one that it resumes."""
        return len(self._records)

    @property
    def identity(self) -> ModelIdentity:
        """The model's identity. Raises UsageError for a model without experts."""
        if self.engine.identity is None:
            raise UsageError("the model has no experts to steer; choose a Mixture-of-Experts model")
        return self.engine.identity

    @property
    def context_arguments(self) -> dict[str, Any]:
        """Arguments of `Engine` that the settings name (n_threads, type_k, ...), for further contexts like its own."""
        return {name: value for name, value in self._settings.context.items() if value is not None}

    def recording_arguments(self, what: str) -> dict[str, Any]:
        """Arguments of `record_counts` to run pairs as this evaluator runs its prompts; `what` names the bar."""
        return {
            "flash_attn": False,  # unless they say so, as for prompts
            **self.context_arguments,
            "thinking": self._settings.thinking,
            "template_arguments": dict(self._settings.template_arguments),
            "date": self._settings.date,
            "progress": lambda done, total: self.progress(what, done, total),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All that results depend on besides the model and the biases, as plain JSON values."""
        return {
            "task": self.task.name,
            "task_sha256": self.task.sha256,
            "benign_sha256": None if self.benign_task is None else self.benign_task.sha256,
            "neutral_sha256": None if self.neutral is None else self.neutral.sha256,
            **self._settings.to_dict(),
            **({} if self.renderer.date is None else {"date": self.renderer.date}),
        }

    def measure(
        self,
        biases: Sequence[AnyBias | None],
        *,
        items: Iterable[str] | None = None,
        text: bool = True,
        benign: bool = True,
        what: str = "",
    ) -> list[Measurement]:
        """Measure steerings, in their order; None is the unsteered model.

        `items`: ids of the items to answer; None: all. `text`, `benign`: also predict the neutral text, and answer the
        benign prompts, where the evaluator has them. Biases that steer equally are measured once; with `placement` in
        the settings each is in force where that steers. `what` is shown with the progress. Raises
        UsageError, ModelMismatchError, NativeError, and what the scorer raises.
        """
        placed = [self._settings.placed(bias) for bias in biases]
        keys = [self._name(bias) for bias in placed]
        by_key = {key: None if key == UNSTEERED else bias for key, bias in zip(keys, placed, strict=True)}
        self._check(by_key.values())
        wanted = None if items is None else {str(name) for name in items}
        chosen = [item for item in self.task.items if wanted is None or str(item.id) in wanted]
        if not chosen:
            raise UsageError("no items to measure; give at least one")
        with_benign, with_text = self._benign if benign else None, text and bool(self._documents)
        jobs = {
            key: (
                self._jobs(key, bias, self._task, chosen),
                self._jobs(key, bias, with_benign, with_benign.task.items, "benign/") if with_benign else [],
            )
            for key, bias in by_key.items()
        }
        texts = {key: bias for key, bias in by_key.items() if with_text and _text_id(key) not in self._records}
        missing: list[Job] = []
        for key, (answers, benigns) in jobs.items():
            ids = [job.id for job in (*answers, *benigns)]
            self._wanted |= dict.fromkeys([*ids, _text_id(key)] if with_text else ids)
            missing += [job for job in (*answers, *benigns) if job.id not in self._records]
        done, show = 0, self.workload.begin(what, Work(len(missing), len(texts), what=what))

        def keep(record: dict[str, Any]) -> None:
            nonlocal done
            self._keep(record)
            done += 1
            show(done)

        if missing:
            self._answer(missing, keep)
        if texts:
            self._predict(texts, keep)
        found = {}
        for key, sides in jobs.items():
            answered, refused = (tuple(Answer.from_record(self._records[job.id]) for job in side) for side in sides)
            score = TextScore.from_record(self._records[_text_id(key)]) if with_text else None
            bias = by_key[key]
            conditional = isinstance(bias, BiasPlan) and bias.has_conditions
            found[key] = Measurement(bias, key, answered, refused, score, conditional)
        return [replace(found[key], bias=bias) for key, bias in zip(keys, biases, strict=True)]

    def work(
        self,
        biases: Sequence[AnyBias | None] | int,
        *,
        items: Sequence[str] | None = None,
        text: bool = True,
        benign: bool = True,
    ) -> Work:
        """What `measure` will have to do for these steerings. A number of steerings that are not made yet is counted
        as if they all differed, and none were kept.
        """
        n_items = len(self.task.items if items is None else items)
        of_each = n_items * len(self._settings.seeds)
        with_benign = len(self._benign.task.items) if self._benign and benign else 0
        with_text = text and bool(self._documents)
        if isinstance(biases, int):
            return Work(biases * (of_each + with_benign), biases * with_text, at_most=True)
        keys = {self._name(self._settings.placed(bias)) for bias in biases}
        wanted = None if items is None else {str(name) for name in items}
        ids = [
            f"{key}/{seed}/{item.id}"
            for key in keys
            for seed in self._settings.seeds
            for item in self.task.items
            if wanted is None or str(item.id) in wanted
        ]
        if self._benign and benign:
            seed = self._settings.seeds[0]
            ids += [f"{key}/benign/{seed}/{item.id}" for key in keys for item in self._benign.task.items]
        return Work(
            sum(name not in self._records for name in ids),
            sum(_text_id(key) not in self._records for key in keys) if with_text else 0,
        )

    def _check(self, biases: Iterable[AnyBias | None]) -> None:
        """Refuse biases that cannot steer this model, before long work. Raises as `measure`."""
        steered = [bias for bias in biases if bias is not None]
        if steered:
            _ = self.identity
            for bias in steered:
                self.engine.check(bias)

    def _begin(self, resume: bool) -> dict[str, dict[str, Any]]:
        """The results of an earlier run, by id."""
        if self._kept is None:
            return {}
        # plain neutral text is cut to the context, so its scores depend on it
        settings = {**self.metadata, **self.settings, "n_ctx": self.engine.n_ctx}
        if not resume:
            self._kept.start(settings)
            return {}
        self._kept.resume(settings, may_lack=may_lack(self.renderer.date_given))
        return {str(record["id"]): record for record in self._kept.records()}

    def _name(self, bias: AnyBias | None) -> str:
        """The name of a bias in the records: of its key, or the old one in a file that an earlier version began."""
        old = record_name(bias) if isinstance(bias, BiasFile) else None
        return old if old in self._resumed_names else bias_key(bias)

    def _jobs(
        self, key: str, bias: AnyBias | None, of: Source, items: Sequence[PromptItem], part: str = ""
    ) -> list[Job]:
        task, scorer, seeds, prompts, *_ = of
        return [
            Job(
                f"{key}/{part}{seed}/{item.id}",
                bias,
                item,
                prompts[str(item.id)],
                scorer,
                task.max_tokens,
                task.stop,
                seed,
                bool(part),
            )
            for seed in seeds
            for item in items
        ]

    def _answer(self, jobs: Sequence[Job], keep: Callable[[dict[str, Any]], None]) -> None:
        """Answer jobs; each is scored and kept when it is finished."""
        settings = self._settings
        with ExitStack() as stack:
            n_threads = max(job.scorer.n_parallel for job in jobs)
            scoring = stack.enter_context(Scoring(n_threads, lambda *scored: keep(record_of(*scored))))
            found = replies(self.engine, self.renderer, jobs, settings.sampling, settings.n_parallel)
            # closed here, whatever fails: its slots are free again then
            for job, reply in stack.enter_context(closing(found)):
                scoring.add(job, reply)
            scoring.finish()

    def _predict(self, biases: Mapping[str, AnyBias | None], keep: Callable[[dict[str, Any]], None]) -> None:
        """Predict the neutral text under each steering, beside the unsteered model."""
        keys = [key for key in biases if key != UNSTEERED]
        size = max(1, self._settings.n_parallel - 1)
        for start in range(0, max(1, len(keys)), size):
            group = keys[start : start + size]
            scores = score_text(self.engine, [None, *(biases[key] for key in group)], self._documents)
            for key, score in zip([UNSTEERED, *group], scores, strict=True):
                if key in biases and _text_id(key) not in self._records:
                    keep({"id": _text_id(key), "bias": key, "kind": "text", **score.to_dict()})

    def _keep(self, record: dict[str, Any]) -> None:
        self.n_computed += 1
        self._records[record["id"]] = record
        if self._kept is not None:
            self._kept.add(record)

    def finish(self) -> None:
        """Write the kept results to their file, in the order in which they were asked for. Raises UsageError."""
        if self._kept is not None:
            self._kept.finish(name for name in self._wanted if name in self._records)


def _text_id(key: str) -> str:
    return f"{key}/text"
