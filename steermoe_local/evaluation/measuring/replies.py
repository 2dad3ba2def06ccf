"""Answers to many prompts under many steerings, decoded together."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

from ...errors import UsageError
from ...generation.answering import Prepared, prepare
from ...generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from ...generation.engine import Sequence as EngineSequence
from ...llama.reasoning import ReasoningSplitter
from ...llama.rendering import Renderer
from ...pairs.prompts import PromptItem
from ...steering.bias_file import BiasFile
from ..tasks.tasks import Choice, Scorer, Task

__all__ = ["GREEDY", "Job", "RenderedPrompt", "Reply", "render", "replies", "sequences"]

GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class RenderedPrompt:
    """A prompt's text and tokens; `add_special`: the tokenizer puts its own tokens around the text."""

    text: str
    add_special: bool
    prepared: Prepared


def render(renderer: Renderer, task: Task, item: PromptItem) -> RenderedPrompt:
    """An item as the model sees it. Raises UsageError for messages without a chat template."""
    if task.raw or not renderer.has_template:
        if not isinstance(item.content, str):
            raise UsageError(f"task {task.name}, {item.id}: messages need a chat template; give a `prompt` as text")
        return RenderedPrompt(item.content, True, prepare(renderer, item.content))
    messages = item.messages(task.system)
    text = renderer.chat_text([message.to_dict() for message in messages])
    return RenderedPrompt(text, False, prepare(renderer, messages))


@dataclass(frozen=True)
class Job:
    """An answer that is still to come; `id` is where it is kept."""

    id: str
    bias: BiasFile | None
    item: PromptItem
    prompt: RenderedPrompt
    scorer: Scorer
    max_tokens: int
    stop: tuple[str, ...]
    seed: int
    benign: bool


@dataclass
class Reply:
    """A reply on its way; `text` is without what the model thought before it."""

    splitter: ReasoningSplitter
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish: FinishEvent | None = None
    choices: tuple[Choice, ...] = ()

    def take(self, event: TokenEvent | FinishEvent) -> bool:
        """True at the end."""
        if isinstance(event, FinishEvent):
            parts = self.splitter.finish()
            self.finish = event
        else:
            parts = self.splitter.feed(event.text)
            if event.token >= 0:
                self.tokens.append(event.token)
        self.text += "".join(text for kind, text in parts if kind == "answer")
        return self.finish is not None


def replies(
    engine: Engine, renderer: Renderer, jobs: Sequence[Job], sampling: Sampling, n_parallel: int
) -> Generator[tuple[Job, Reply]]:
    """Replies as they are finished, `n_parallel` at once.

    Jobs of one steering should stand together: a batch of one steering is faster than a mixed one. With a job of
    choices, the reply has them all. Raises ModelMismatchError, UsageError (no free sequences), NativeError.
    """
    waiting = deque(jobs)
    running: dict[Request, _Lane] = {}
    with sequences(engine, min(n_parallel, len(waiting))) as free:
        while True:
            while free and waiting:
                lane = _Lane(renderer, waiting.popleft(), free.pop())
                running[lane.start(engine, sampling)] = lane
            if not running:
                return
            for request, event in engine.step():
                if request not in running:
                    continue  # the end of what was given up when an earlier call failed
                lane = running[request]
                if not lane.take(event):
                    continue
                del running[request]
                if lane.is_done:
                    free.append(request.sequence)
                    yield lane.job, lane.reply
                else:
                    running[lane.start(engine, sampling)] = lane


@contextmanager
def sequences(engine: Engine, n: int) -> Iterator[list[EngineSequence]]:
    """Some sequences of the engine, empty; they are given back at the end."""
    with ExitStack() as stack:
        taken = []
        for _ in range(n):
            sequence = engine.sequence()
            stack.callback(sequence.close)
            taken.append(sequence)
        yield taken.copy()


class _Lane:
    """A job on its sequence: one request for a text, or one for each choice, which find the prompt in memory."""

    def __init__(self, renderer: Renderer, job: Job, sequence: EngineSequence) -> None:
        sequence.steer(job.bias)
        self.job, self._sequence = job, sequence
        self.reply = Reply(ReasoningSplitter(job.prompt.prepared.style))
        chooses = job.scorer.kind == "choices"
        self._texts = deque(job.scorer.choices(job.item)) if chooses else None
        # together, as a tokenizer may merge across the edge; the choice then begins with the merged token
        self._tokens = deque(
            renderer.tokenize(job.prompt.text + text, add_special=job.prompt.add_special) for text in self._texts or ()
        )
        # where choices begin, all at the same place: else one that merges would be likely given less than the others
        self._first = min(
            (min(_n_common(job.prompt.prepared.tokens, tokens), len(tokens) - 1) for tokens in self._tokens), default=0
        )

    @property
    def is_done(self) -> bool:
        return not self._texts

    def start(self, engine: Engine, sampling: Sampling) -> Request:
        job, prompt = self.job, self.job.prompt
        if self._texts is None:
            sampling = replace(sampling, seed=job.seed)
            special = prompt.prepared.special
            request = Request(
                self._sequence, prompt.prepared.tokens, sampling, job.max_tokens, job.stop, special=special
            )
        else:
            tokens = self._tokens.popleft()
            request = Request(self._sequence, tokens, GREEDY, max_tokens=0, prompt_probs=0, prompt_from=self._first)
        engine.add(request)
        return request

    def take(self, event: TokenEvent | FinishEvent) -> bool:
        """True at the end of the request."""
        if self._texts is None:
            return self.reply.take(event)
        if not isinstance(event, FinishEvent):
            return False
        choice = Choice(self._texts.popleft(), sum(piece.logprob or 0.0 for piece in event.prompt), len(event.prompt))
        self.reply.choices += (choice,)
        self.reply.finish = event
        return True


def _n_common(one: Sequence[int], two: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
