"""Measures how fast a model reads and writes on this machine, and how long its answers are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..evaluation.tasks.neutral_text import Document, score_text
from ..generation.engine import Engine, FinishEvent, Request, Sampling, TokenEvent
from ..llama.rendering import RenderedPrompt
from .clock import Speed

_LONGEST = 8.0  # seconds for which answers are written at most
_ENOUGH = 0.3  # seconds for which the neutral text is read at least, if it has as much
_UNFINISHED = 0.8  # of the longest answer: what one takes whose end was not seen
_TEXT = 48  # tokens of the neutral text that are read at least


@dataclass(frozen=True)
class Measured:
    """Speeds of a model, and tokens of its answer to each of the prompts."""

    speed: Speed
    lengths: tuple[float, ...]


def measure_speed(
    engine: Engine,
    prompts: Sequence[RenderedPrompt],
    documents: Sequence[Document] = (),
    *,
    max_tokens: int,
    now: Callable[[], float] = time.monotonic,
) -> Measured:
    """Read prompts, one for each slot of the engine, answer them up to `max_tokens`, and read some neutral text."""
    tokens = [prompt.tokens for prompt in prompts[: engine.n_slots]]
    greedy = Sampling(temperature=0)

    def requests(n: int, of: Sequence[Sequence[int]]) -> list[Request]:
        return [Request(one, sampling=greedy, max_tokens=n, routing=False) for one in of]

    for _ in engine.generate(*requests(1, tokens[:1])):  # the first decode of a context is no measure of others
        pass
    engine.forget()
    start = now()
    for _ in engine.generate(*requests(1, tokens)):
        pass
    prompt = sum(map(len, tokens)) / max(now() - start, 1e-6)
    lengths, decode = _written(engine, requests(max_tokens, tokens), now)
    engine.forget()
    start = now()
    for _ in engine.generate(
        *(Request(one, sampling=greedy, max_tokens=0, prompt_probs=0, routing=False) for one in tokens)
    ):
        pass
    scored = sum(map(len, tokens)) / max(now() - start, 1e-6)
    engine.forget()
    text = _of_text(engine, documents, now) if documents and engine.n_slots > 1 else scored
    engine.forget()
    return Measured(Speed(prompt, decode, scored, text), lengths)


def _written(engine: Engine, requests: list[Request], now: Callable[[], float]) -> tuple[tuple[float, ...], float]:
    """Tokens of each answer, and how many are written in a second."""
    written = dict.fromkeys(range(len(requests)), 0.0)
    unfinished = set(written)
    start, n = now(), 0
    events = engine.generate(*requests)
    for number, event in events:
        if isinstance(event, TokenEvent) and event.token >= 0:
            n += 1
            written[number] += 1
        if isinstance(event, FinishEvent):
            unfinished.discard(number)
        if now() - start > _LONGEST:
            break
    seconds = now() - start
    events.close()
    for number in unfinished:
        written[number] = max(written[number], _UNFINISHED * (requests[number].max_tokens or 0))
    return tuple(written.values()), max(n, 1) / max(seconds, 1e-6)


def _of_text(engine: Engine, documents: Sequence[Document], now: Callable[[], float]) -> float:
    """Tokens of the text that are read in a second, as beside each steering: twice at once."""
    n, start = 0, now()
    for document in documents:
        score_text(engine, [None, None], [document])
        n += 2 * (len(document.tokens) - 1)
        if n >= 2 * _TEXT and now() - start > _ENOUGH:
            break
    return n / max(now() - start, 1e-6)
