"""Scores replies while others are still generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ..tasks.tasks import Score
from .replies import Job, Reply


class Scoring:
    """Scores replies, in threads where their scorer waits; each is kept when it is scored. A context manager."""

    def __init__(self, n_threads: int, keep: Callable[[Job, Reply, Score], None]) -> None:
        self._keep = keep
        self._pool = ThreadPoolExecutor(n_threads) if n_threads else None
        self._waiting: dict[Future[Score], tuple[Job, Reply]] = {}

    def __enter__(self) -> Scoring:
        return self

    def __exit__(self, *_: object) -> None:
        """Keep what is scored already; what has not begun is cancelled."""
        if self._pool is None:
            return
        self._pool.shutdown(cancel_futures=True)
        for future, (job, reply) in self._waiting.items():
            if not future.cancelled() and future.exception() is None:
                self._keep(job, reply, future.result())

    def add(self, job: Job, reply: Reply) -> None:
        """Score a reply, and keep those that are ready. Raises what the scorer raised."""
        if reply.choices:
            self._keep(job, reply, job.scorer.score_choices(job.item, reply.choices))
        elif self._pool is None or not job.scorer.n_parallel:
            self._keep(job, reply, job.scorer.score(job.item, reply.text))
        else:
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
