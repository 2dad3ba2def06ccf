"""From a reply to a line of records.jsonl: scoring, also in threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from ..metrics.repetition import repetition
from ..tasks.tasks import Score
from .replies import Job, Reply

__all__ = ["Scoring", "record_of"]


class Scoring:
    """Answers that are scored in threads of their own; each is kept as soon as it is scored. A context manager."""

    def __init__(self, n_threads: int, keep: Callable[[Job, Reply, Score], None]) -> None:
        self._keep = keep
        self._pool = ThreadPoolExecutor(n_threads) if n_threads else None
        self._waiting: dict[Future[Score], tuple[Job, Reply]] = {}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        """Keep what is scored already; do not wait for what has not begun."""
        if self._pool is None:
            return
        self._pool.shutdown(cancel_futures=True)
        for future, (job, reply) in self._waiting.items():
            if not future.cancelled() and future.exception() is None:
                self._keep(job, reply, future.result())

    def add(self, job: Job, reply: Reply) -> None:
        """Score a reply, and keep those that are ready. Raises what the scorer raised."""
        assert self._pool is not None
        self._waiting[self._pool.submit(job.scorer.score, job.item, reply.text)] = job, reply
        self._take([future for future in self._waiting if future.done()])

    def finish(self) -> None:
        """Wait for all. Raises what the scorer raised."""
        while self._waiting:
            self._take(wait(self._waiting, return_when=FIRST_COMPLETED).done)

    def _take(self, futures: Iterable[Future[Score]]) -> None:
        for future in futures:
            score = future.result()
            self._keep(*self._waiting.pop(future), score)


def record_of(job: Job, reply: Reply, score: Score) -> dict[str, Any]:
    """A line of records.jsonl."""
    found = repetition(reply.tokens)
    text = max(reply.choices, key=lambda choice: choice.logprob).text if reply.choices else reply.text
    return {
        "id": job.id,
        "bias": job.id.partition("/")[0],
        "kind": "benign" if job.benign else "answer",
        "item": str(job.item.id),
        "seed": job.seed,
        "text": text,
        "value": score.value,
        "label": score.label,
        "finish": "stop" if reply.choices or reply.finish is None else reply.finish.reason,
        "n_tokens": len(reply.tokens),
        "distinct_2": found.distinct_2,
        "loop": found.loop,
        **({"choices": [[c.text, c.logprob, c.n_tokens] for c in reply.choices]} if reply.choices else {}),
    }
