"""Checks whether a task can be measured: its items by their scorer, its prompts by a model's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from ...errors import FormatError, ModelError, UsageError
from ...llama.rendering import vocabulary_renderer
from ...llama.template_date import AnyDate
from ...model_files.model_info import model_info
from ...pairs.prompts import PromptItem
from ..tasks.scorers import make_scorer
from ..tasks.tasks import Task
from .rendered_tasks import source


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rendered prompts. `needed`: at most this many for prompt and answer of the longest item."""

    shortest: int
    median: float
    mean: float
    longest: int
    needed: int
    trained: int
    """Context that the model was trained with, 0 where its file does not say."""


@dataclass(frozen=True)
class TaskCheck:
    """The result of `check_task`: pairs (id of an item, problem or warning); lengths if a model was given."""

    task: Task
    problems: tuple[tuple[str, str], ...] = ()
    warnings: tuple[tuple[str, str], ...] = ()
    lengths: Lengths | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        task = self.task
        return {
            "task": task.name,
            "source": task.source,
            "sha256": task.sha256,
            "items": len(task.items),
            "scorer": task.scorer,
            "options": dict(task.options),
            "max_tokens": task.max_tokens,
            "positive": task.positive,
            "negative": task.negative,
            "license": task.license,
            "tokens": None if self.lengths is None else dict(vars(self.lengths)),
            "problems": [{"id": name, "reason": reason} for name, reason in self.problems],
            "warnings": [{"id": name, "reason": reason} for name, reason in self.warnings],
        }


def check_task(
    task: Task,
    model: Path | None = None,
    *,
    thinking: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    date: AnyDate = None,
) -> TaskCheck:
    """Check every item against the task's scorer; with a model, render and count them all as measuring will.

    Of the model no more than the vocabulary is loaded. Raises UsageError (a scorer that there is not), ModelError.
    """
    scorer = make_scorer(task.scorer, task.options)
    problems: list[tuple[str, str]] = []
    good: list[PromptItem] = []
    for item in task.items:
        try:
            scorer.check(item)
            good.append(item)
        except FormatError as error:
            problems.append((str(item.id), str(error)))
    if model is None:
        return TaskCheck(task, tuple(problems))
    trained = model_info(model, routers=False).context_length
    counts: list[int] = []
    needed = 0
    warnings: list[tuple[str, str]] = []
    with vocabulary_renderer(model, thinking=thinking, template_arguments=template_arguments, date=date) as renderer:
        if renderer.has_template:
            renderer.check_template()
        for item in good:
            name = str(item.id)
            try:
                found = source(renderer, replace(task, items=(item,)), scorer, (0,))
            except (UsageError, FormatError, ModelError) as error:
                problems.append((name, str(error)))
                continue
            counts.append(len(found.prompts[name].tokens))
            needed = max(needed, found.n_tokens)
            if trained and found.n_tokens > trained:
                warnings.append((name, f"needs {found.n_tokens} tokens, the model was trained with {trained}"))
    if not counts:
        return TaskCheck(task, tuple(problems), tuple(warnings))
    lengths = Lengths(min(counts), median(counts), round(mean(counts), 1), max(counts), needed, trained)
    return TaskCheck(task, tuple(problems), tuple(warnings), lengths)
