"""Replies to many prompts under many steerings, computed together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace

from ...errors import UsageError
from ...generation import reply
from ...generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from ...llama.rendering import RenderedPrompt, Renderer
from ...llama.tokenizing import common_prefix
from ...pairs.prompts import PromptItem
from ...steering.bias_plan import AnyBias
from ..tasks.tasks import Choice, Scorer, Task

GREEDY = Sampling(temperature=0)


def render(renderer: Renderer, task: Task, item: PromptItem) -> RenderedPrompt:
    """An item as the model reads it. Raises UsageError for messages without a chat template."""
    if not task.raw and renderer.has_template:
        return renderer.render(item.messages(task.system))
    if not isinstance(item.content, str):
        raise UsageError(f"task {task.name}, {item.id}: messages need a chat template; give a `prompt` as text")
    return renderer.render(item.content)


@dataclass(frozen=True)
class Job:
    """One reply that is wanted; `id` names its record."""

    id: str
    bias: AnyBias | None
    item: PromptItem
    prompt: RenderedPrompt
    scorer: Scorer
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    benign: bool


@dataclass
class Reply(reply.Reply):
    """A reply; to a job of choices, these with their log-probabilities.

    `n_steered` tokens were drawn under a rule that steers, of choices all together.
    """

    choices: tuple[Choice, ...] = field(default=(), kw_only=True)
    n_steered: int = field(default=0, kw_only=True)


def replies(
    engine: Engine, renderer: Renderer, jobs: Sequence[Job], sampling: Sampling, n_parallel: int
) -> Generator[tuple[Job, Reply]]:
    """Replies as they are finished, `n_parallel` at once; closing the generator aborts the others.

    What the engine holds in memory is forgotten first, so replies do not depend on earlier ones. Jobs of one steering
    should be neighbours: a batch of one steering is faster than a mixed one. Raises ModelMismatchError, NativeError.
    """
    engine.forget()
    waiting = deque(jobs)
    running: dict[Request, _Pending] = {}
    try:
        while waiting or running:
            while waiting and len(running) < n_parallel:
                pending = _Pending(renderer, waiting.popleft(), sampling)
                running[pending.begin(engine)] = pending
            for request, event in engine.step():
                if request not in running:
                    continue  # the end of what was aborted when an earlier call failed
                running[request].take(event)
                if isinstance(event, FinishEvent):
                    pending = running.pop(request)
                    if pending.is_done:
                        yield pending.job, pending.reply
                    else:
                        running[pending.begin(engine)] = pending
    finally:
        for request in running:
            engine.abort(request)


class _Pending:
    """A job's requests: one for a text, or one after the other for its choices, which find the prompt in memory."""

    def __init__(self, renderer: Renderer, job: Job, sampling: Sampling) -> None:
        self.job, self.reply = job, Reply(job.prompt.style)
        self._sampling = sampling
        self._choices = deque(job.scorer.choices(job.item)) if job.scorer.kind == "choices" else None
        # together, as a tokenizer may merge across the edge; the choice then begins with the merged token
        self._tokens = deque(
            renderer.tokenize(job.prompt.text + text, add_special=job.prompt.add_special)
            for text in self._choices or ()
        )
        # where choices begin, all at the same token: else one that merges would be likely given less than the others
        self._first = min(
            (min(common_prefix(job.prompt.tokens, tokens), len(tokens) - 1) for tokens in self._tokens), default=0
        )

    @property
    def is_done(self) -> bool:
        return not self._choices

    def begin(self, engine: Engine) -> Request:
        """Add the next request."""
        job = self.job
        if self._choices is None:
            request = Request(
                job.prompt.tokens,
                job.bias,
                replace(self._sampling, seed=job.seed),
                job.max_tokens,
                job.stop,
                special=job.prompt.has_control_markers,
                style=job.prompt.style,
            )
        else:
            tokens = self._tokens.popleft()
            request = Request(
                tokens,
                job.bias,
                GREEDY,
                max_tokens=0,
                prompt_probs=0,
                prompt_from=self._first,
                style=job.prompt.style,
                n_prompt=self._first,
            )
        engine.add(request)
        return request

    def take(self, event: TokenEvent | FinishEvent) -> None:
        if isinstance(event, FinishEvent):
            self.reply.n_steered += event.n_steered
        if self._choices is None:
            self.reply.add(event)
        elif isinstance(event, FinishEvent):
            logprob = sum(token.logprob or 0.0 for token in event.prompt)
            self.reply.choices += (Choice(self._choices.popleft(), logprob, len(event.prompt)),)
            self.reply.finish = event
