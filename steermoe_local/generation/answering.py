"""Answers to one or many prompts as they come, several at once, each under one steering or under two to compare."""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..llama.reasoning import Kind, Part, ReasoningSplitter, ReasoningStyle, reasoning_style
from ..llama.rendering import Renderer, vocabulary
from ..llama.steered_llama import SteeredLlama
from ..pairs.pairs import Message
from ..steering.bias_file import BiasFile
from .engine import Engine, FinishEvent, Request, Sampling, TokenEvent

__all__ = ["Answer", "Answerer", "Event", "Prepared", "prepare", "renderer_of", "vocabulary_renderer"]

_RANDOM_SEEDS = 0xFFFFFFFF


@dataclass(frozen=True)
class Prepared:
    """A prompt as the model sees it. `style`: how the answer marks its reasoning; `special`: by control tokens."""

    tokens: Sequence[int]
    style: ReasoningStyle | None = None
    special: bool = False


def renderer_of(
    llama: SteeredLlama, *, thinking: bool = False, template_arguments: Mapping[str, Any] | None = None
) -> Renderer:
    """The renderer of a loaded model. Raises ModelError (no tokenizer), UsageError."""
    return Renderer(llama._model, thinking=thinking, template_arguments=template_arguments)


@contextmanager
def vocabulary_renderer(
    path: Path,
    *,
    thinking: bool = False,
    template_arguments: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> Iterator[Renderer]:
    """A renderer for a model of which nothing but the vocabulary is loaded. Raises ModelError, UsageError."""
    with vocabulary(path, verbose=verbose) as model:
        yield Renderer(model, thinking=thinking, template_arguments=template_arguments)


def prepare(renderer: Renderer, prompt: str | Sequence[Message]) -> Prepared:
    """Tokens of a text that is continued as it is, or of a conversation through the model's chat template.

    Raises ModelError (no template), UsageError (the template refuses the messages).
    """
    if isinstance(prompt, str):
        return Prepared(renderer.tokenize(prompt, add_special=True))
    text = renderer.chat_text([message.to_dict() for message in prompt])
    style = reasoning_style(renderer.template, text)
    special = style is not None and renderer.any_control(style.markers)
    return Prepared(renderer.tokenize(text, add_special=False), style, special)


@dataclass(frozen=True)
class Answer:
    """A whole answer, without and with what the model thought before it."""

    text: str
    reasoning: str
    finish: FinishEvent

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; rates are tokens per second, null where too little was computed to tell."""
        finish = self.finish
        return {
            "text": self.text,
            **({"reasoning": self.reasoning} if self.reasoning else {}),
            "finish_reason": finish.reason,
            **({"stop": finish.stop} if finish.stop is not None else {}),
            "usage": {
                "prompt_tokens": finish.n_prompt,
                "completion_tokens": finish.n_generated,
                "total_tokens": finish.n_prompt + finish.n_generated,
            },
            "seed": finish.seed,
        }

    def timings(self) -> dict[str, Any]:
        """Seconds, and tokens per second or None, of the prompt and of the tokens behind the answer's first."""
        finish = self.finish
        return {
            "prompt_seconds": round(finish.prompt_seconds, 6),
            "prompt_per_second": _rate(finish.n_prompt - finish.n_cached, finish.prompt_seconds),
            "generation_seconds": round(finish.seconds, 6),
            # the first token comes out of the prompt's last row
            "generation_per_second": _rate(finish.n_rows - 1, finish.seconds),
        }


def _rate(tokens: int, seconds: float) -> float | None:
    return round(tokens / seconds, 2) if tokens > 0 and seconds > 0 else None


Event = tuple[int, str, Part | Answer]
"""(index of the prompt, name of the side, what came): parts, at the end the whole answer."""


@dataclass
class _Reply:
    """An answer on its way."""

    index: int
    side: str
    splitter: ReasoningSplitter
    texts: dict[Kind, list[str]] = field(default_factory=lambda: {"reasoning": [], "answer": []})

    def take(self, event: TokenEvent | FinishEvent) -> Iterator[Event]:
        ended = isinstance(event, FinishEvent)
        for part in self.splitter.finish() if isinstance(event, FinishEvent) else self.splitter.feed(event.text):
            self.texts[part[0]].append(part[1])
            yield self.index, self.side, part
        if ended:
            assert isinstance(event, FinishEvent)
            texts = {kind: "".join(pieces) for kind, pieces in self.texts.items()}
            yield self.index, self.side, Answer(texts["answer"], texts["reasoning"], event)


class Answerer:
    """Answers prompts on an engine, under each of some steerings (`sides`, by name; None: unsteered)."""

    def __init__(
        self,
        engine: Engine,
        sides: Mapping[str, BiasFile | None],
        *,
        sampling: Sampling | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        parallel: int = 1,
    ) -> None:
        """`parallel` prompts are decoded at once; the engine needs as many free sequences for each side."""
        self._engine = engine
        self._sides = dict(sides)
        self._sampling = sampling or Sampling()
        self._max_tokens = max_tokens
        self._stop = tuple(stop)
        self._parallel = parallel

    def events(self, prompts: Iterable[Prepared]) -> Iterator[Event]:
        """Answer them; what comes is in order for each prompt and side. Closing it stops what is running.

        With a random seed one is drawn for each prompt, the same for its sides. Raises UsageError (a prompt that does
        not fit the context), ModelMismatchError, NativeError.
        """
        waiting: dict[str, deque[tuple[int, Prepared, Sampling]]] = {side: deque() for side in self._sides}
        for index, prompt in enumerate(prompts):
            sampling = self._seeded()
            for side in self._sides:
                waiting[side].append((index, prompt, sampling))
        with ExitStack() as stack:
            free: list[tuple[str, Any]] = []
            for _ in range(self._parallel):
                for side, bias in self._sides.items():
                    sequence = self._engine.sequence()
                    stack.callback(sequence.close)
                    sequence.steer(bias if bias is not None and bias.layers else None)
                    free.append((side, sequence))
            running: dict[Request, _Reply] = {}
            while True:
                idle = []
                for side, sequence in free:
                    if not waiting[side]:
                        idle.append((side, sequence))
                        continue
                    index, prompt, sampling = waiting[side].popleft()
                    request = Request(
                        sequence, prompt.tokens, sampling, self._max_tokens, self._stop, special=prompt.special
                    )
                    self._engine.add(request)
                    running[request] = _Reply(index, side, ReasoningSplitter(prompt.style))
                free = idle
                if not running:
                    return
                for request, event in self._engine.step():
                    reply = running[request]
                    yield from reply.take(event)
                    if isinstance(event, FinishEvent):
                        del running[request]
                        free.append((reply.side, request.sequence))

    def _seeded(self) -> Sampling:
        if self._sampling.seed is not None:
            return self._sampling
        # nothing is drawn at temperature 0, and the same run should tell the same
        seed = secrets.randbelow(_RANDOM_SEEDS) if self._sampling.temperature else 0
        return replace(self._sampling, seed=seed)
