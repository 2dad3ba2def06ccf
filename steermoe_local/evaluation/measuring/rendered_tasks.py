"""Renders the prompts of a task, and says how much context they need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...errors import UsageError
from ...llama.rendering import RenderedPrompt, Renderer
from ...pairs.prompts import PromptItem
from ..tasks.neutral_text import NeutralText
from ..tasks.tasks import Scorer, Task
from .replies import render

_TEXT_CONTEXT = 512  # tokens of a piece of plain neutral text, unless the task needs more


class Source(NamedTuple):
    """A task with its scorer, the seeds of each item, and its prompts; item `longest` needs `n_tokens` of context."""

    task: Task
    scorer: Scorer
    seeds: tuple[int, ...]
    prompts: dict[str, RenderedPrompt]
    longest: PromptItem
    n_tokens: int


def source(renderer: Renderer, task: Task, scorer: Scorer, seeds: tuple[int, ...]) -> Source:
    """Check and render all items. Raises FormatError (an item that cannot be scored), UsageError, ModelError."""
    prompts: dict[str, RenderedPrompt] = {}
    longest, most = task.items[0], 0
    for item in task.items:
        scorer.check(item)
        prompt = prompts[str(item.id)] = render(renderer, task, item)
        n = task.max_tokens
        if scorer.kind == "choices":
            whole = (
                renderer.tokenize(prompt.text + text, add_special=prompt.add_special)
                for text in choices(task, scorer, item)
            )
            n = max(len(tokens) for tokens in whole) - len(prompt.tokens)
        needed = len(prompt.tokens) + n + 1  # one more: a prompt is shorter than its context
        if needed > most:
            longest, most = item, needed
    return Source(task, scorer, seeds[:1] if scorer.kind == "choices" else seeds, prompts, longest, most)


def choices(task: Task, scorer: Scorer, item: PromptItem) -> tuple[str, ...]:
    """The choices of an item. Raises UsageError for none, and for an empty one."""
    texts = scorer.choices(item)
    if not texts or not all(texts):
        raise UsageError(f"task {task.name}, {item.id}: a choice without text; give each of the choices one")
    return texts


def context_size(
    sources: Sequence[Source], neutral: NeutralText | None, renderer: Renderer, n_trained: int, n_ctx: int | None
) -> int:
    """Tokens of context of each sequence: `n_ctx`, or None: as the tasks and the neutral text need.

    `n_trained`: tokens that the model was trained with. Raises UsageError for a prompt that does not fit.
    """
    most = max(sources, key=lambda found: found.n_tokens)
    text = 0 if neutral is None else neutral.longest(renderer)
    where = f"task {most.task.name}, {most.longest.id}: prompt and answer need {most.n_tokens} tokens of context"
    shorter = "shorten the prompt or lower --max-tokens" if most.scorer.kind == "text" else "shorten the prompt"
    if n_ctx is None:
        if n_trained and most.n_tokens > n_trained:
            raise UsageError(f"{where}, but the model was trained with {n_trained}; {shorter}, or force it with -c")
        plain = min(_TEXT_CONTEXT, n_trained or _TEXT_CONTEXT) if neutral else 0
        return max(most.n_tokens, plain, text)
    if n_ctx < most.n_tokens:
        raise UsageError(f"{where}, but n_ctx is {n_ctx}; raise it (-c {most.n_tokens}) or {shorter}")
    return n_ctx
