"""Measures steerings of one model on one task: all answers, their scores, and how a neutral text is predicted.

Everything above it (evaluate, sweep, tune, transfer, recipes) asks an `Evaluator` for `Measurement`s and does
arithmetic on them. What was measured once is not measured again, also over an interruption: results are kept by what
steers, item and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from typing import Any

from ...errors import UsageError
from ...generation.answer_file import AnswerFile
from ...generation.engine import Engine
from ...identity import ModelIdentity
from ...llama.rendering import Renderer
from ...llama.steered_llama import SteeredLlama
from ...pairs.prompts import PromptItem
from ...steering.bias_file import BiasFile, none_if_empty
from ...steering.old_digests import record_name
from ..tasks.neutral_text import NeutralText, TextScore, score_text
from ..tasks.tasks import Score, Scorer, Task
from .measurements import UNSTEERED, Answer, Measurement, bias_key
from .rendered_tasks import Source, context_size, plan, source
from .replies import Job, Reply, replies
from .scoring import Scoring, record_of
from .settings import EvaluatorSettings, Progress

__all__ = ["Evaluator", "EvaluatorSettings", "Progress", "plan"]


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
        about: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Render all prompts and make the context.

        `benign` is a task whose positive side is a refusal, `neutral` a text to predict; None: not measured. Results
        are kept in `kept`, where it is given: a new file, or with `resume` what an interrupted run left, if the
        settings and `about` (facts of the caller that results hang on, such as the model's file) are the same.

        Raises UsageError (a prompt that does not fit, other settings), FormatError (an item that cannot be scored),
        ModelError.
        """
        self.model, self.task, self.scorer = model, task, scorer
        self.about = dict(about or {})
        self.benign_task = benign[0] if benign else None
        self.neutral = neutral
        self.n_computed = 0
        """Answers and texts that were computed here, not taken from what was kept."""
        self._settings = settings or EvaluatorSettings()
        self._kept = kept
        self.progress: Progress = progress or (lambda *_: None)
        """Called while something is measured; whoever works long on the evaluator's model shows it by this, too."""
        self.renderer = Renderer(
            model._model, thinking=self._settings.thinking, template_arguments=self._settings.template_arguments
        )
        self._task = source(self.renderer, task, scorer, self._settings.seeds)
        # benign prompts are a guard, not the result: one answer to each is enough
        self._benign = source(self.renderer, *benign, self._settings.seeds[:1]) if benign else None
        context = dict(self._settings.context)
        # text is predicted beside the unsteered model
        n_slots = max(self._settings.n_parallel, 1 if neutral is None else 2)
        context["n_batch"] = max(context.get("n_batch") or 512, n_slots)
        with ExitStack() as stack:
            self.engine = stack.enter_context(
                Engine(
                    model,
                    n_ctx=context_size(
                        [found for found in (self._task, self._benign) if found],
                        neutral,
                        self.renderer,
                        int(model._model.n_ctx_train()),
                        self._settings.n_ctx,
                    ),
                    n_slots=n_slots,
                    record=False,
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
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the context."""
        self._stack.close()

    @property
    def n_kept(self) -> int:
        """Results that are there, of this run and of the one it goes on with."""
        return len(self._records)

    @property
    def identity(self) -> ModelIdentity:
        """The model's. Raises UsageError for one without experts."""
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
            **self.context_arguments,
            "thinking": self._settings.thinking,
            "template_arguments": dict(self._settings.template_arguments),
            "progress": lambda done, total: self.progress(what, done, total),
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All that results hang on besides the model and the biases, as plain JSON values."""
        return {
            "task": self.task.name,
            "task_sha256": self.task.sha256,
            "benign_sha256": None if self.benign_task is None else self.benign_task.sha256,
            "neutral_sha256": None if self.neutral is None else self.neutral.sha256,
            **self._settings.to_dict(),
        }

    def measure(
        self,
        biases: Sequence[BiasFile | None],
        *,
        items: Iterable[str] | None = None,
        text: bool = True,
        benign: bool = True,
        what: str = "",
    ) -> list[Measurement]:
        """Measure steerings, in their order; None is the unsteered model.

        `items`: ids of the items to answer; None: all. `text`, `benign`: also predict the neutral text, and answer the
        benign prompts, where the evaluator has them. Biases that steer equally are measured once. `what` is shown with
        the progress. Raises UsageError, ModelMismatchError, NativeError, and what the scorer raises.
        """
        keys = [self._name(bias) for bias in biases]
        by_key = {key: None if key == UNSTEERED else bias for key, bias in zip(keys, biases, strict=True)}
        self._check(by_key.values())
        wanted = None if items is None else {str(name) for name in items}
        chosen = [item for item in self.task.items if wanted is None or str(item.id) in wanted]
        if not chosen:
            raise UsageError("no items to measure; give at least one")
        with_benign, with_text = self._benign if benign else None, text and bool(self._documents)
        answers = {key: self._jobs(key, bias, self._task, chosen) for key, bias in by_key.items()}
        others = {
            key: self._jobs(key, bias, with_benign, with_benign.task.items, "benign/") if with_benign else []
            for key, bias in by_key.items()
        }
        texts = {key: bias for key, bias in by_key.items() if with_text and _text_id(key) not in self._records}
        for key in by_key:
            ids = [job.id for job in (*answers[key], *others[key])]
            self._wanted |= dict.fromkeys([*ids, _text_id(key)] if with_text else ids)
        jobs = [job for key in by_key for job in (*answers[key], *others[key]) if job.id not in self._records]
        total = len(jobs) + len(texts)
        if total:
            self.progress(what, 0, total)
        self._answer(jobs, lambda done: self.progress(what, done, total))
        self._predict(texts, lambda done: self.progress(what, len(jobs) + done, total))
        found = {}
        for key, bias in by_key.items():
            ours, benigns = (
                tuple(Answer.from_record(self._records[job.id]) for job in side[key]) for side in (answers, others)
            )
            score = TextScore.from_record(self._records[_text_id(key)]) if with_text else None
            found[key] = Measurement(bias, key, ours, benigns, score)
        return [replace(found[key], bias=bias) for key, bias in zip(keys, biases, strict=True)]

    def _check(self, biases: Iterable[BiasFile | None]) -> None:
        """Refuse what cannot steer this model before long work. Raises as `measure`."""
        steered = [bias for bias in biases if bias is not None]
        if steered:
            _ = self.identity
            for bias in steered:
                self.engine.check(bias)

    def _begin(self, resume: bool) -> dict[str, dict[str, Any]]:
        """The results that are there already, by id."""
        if self._kept is None:
            return {}
        # plain neutral text is cut to the context, so its scores hang on that
        settings = {**self.about, **self.settings, "n_ctx": self.engine.n_ctx}
        if not resume:
            self._kept.start(settings)
            return {}
        self._kept.resume(settings)
        return {str(record["id"]): record for record in self._kept.records()}

    def _name(self, bias: BiasFile | None) -> str:
        """The name of a bias in the records: of its key, or the old one in a file that an earlier version began."""
        steering = none_if_empty(bias)
        old = None if steering is None else record_name(steering)
        return old if old in self._resumed_names else bias_key(steering)

    def _jobs(
        self, key: str, bias: BiasFile | None, of: Source, items: Sequence[PromptItem], part: str = ""
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

    def _answer(self, jobs: Sequence[Job], show: Callable[[int], None]) -> None:
        """Answer jobs; each is scored and kept when it is finished."""
        if not jobs:
            return
        done = 0

        def keep(job: Job, reply: Reply, score: Score) -> None:
            nonlocal done
            self._keep(record_of(job, reply, score))
            done += 1
            show(done)

        s = self._settings
        with ExitStack() as stack:
            waiting = stack.enter_context(Scoring(max(job.scorer.n_parallel for job in jobs), keep))
            # closed here, whatever fails: its slots are free again then
            found = stack.enter_context(closing(replies(self.engine, self.renderer, jobs, s.sampling, s.n_parallel)))
            for job, reply in found:
                if reply.choices:
                    keep(job, reply, job.scorer.score_choices(job.item, reply.choices))
                elif job.scorer.n_parallel:
                    waiting.add(job, reply)
                else:
                    keep(job, reply, job.scorer.score(job.item, reply.text))
            waiting.finish()

    def _predict(self, biases: Mapping[str, BiasFile | None], show: Callable[[int], None]) -> None:
        """Predict the neutral text under each steering, beside the unsteered model."""
        if not biases:
            return
        keys = [key for key in biases if key != UNSTEERED]
        size = max(1, self._settings.n_parallel - 1)
        groups = [keys[i : i + size] for i in range(0, len(keys), size)] or [[]]
        done = 0
        for number, group in enumerate(groups):
            scores = score_text(self.engine, [None, *(biases[key] for key in group)], self._documents)
            first = number == 0 and UNSTEERED in biases
            for key, score in zip([UNSTEERED, *group], scores, strict=True):
                if key == UNSTEERED and not first:
                    continue
                self._keep({"id": _text_id(key), "bias": key, "kind": "text", **score.to_dict()})
                done += 1
                show(done)

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
