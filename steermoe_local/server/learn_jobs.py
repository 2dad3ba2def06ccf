"""Learning steerings while the server answers: jobs, of which one runs at a time, as a child process of low priority.

A job is `steermoe learn NAME --quick` in a process of its own. While the engine has requests the process is stopped
(SIGSTOP; Windows: suspended), so that answers are as quick as without it.
What a job has done is kept in the folder of its steering; the same request later goes on where it was ended.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from .._util.children import Child, Limits
from .._util.own_program import program_input, run_program
from ..errors import SteerMoEError
from .api_errors import ApiError, as_api_error
from .learn_output import Outcome, Progress, Words, bounded_lines, progress_of, result_of, sentence

log = logging.getLogger("steermoe.server")

MAX_WAITING = 4
MAX_KEPT = 32  # jobs that have ended, for clients that ask how
_NICENESS = 15

State = Literal["queued", "running", "done", "failed", "cancelled"]
Source = Literal["instructions", "behaviour", "pairs"]
Start = Callable[[Sequence[str], IO[bytes]], "subprocess.Popen[bytes]"]
"""Starts `steermoe` with words, its stdout to a file; stderr is a pipe."""


@dataclass(frozen=True)
class Lesson:
    """What is to be learnt under a name: `options` of the command line, and lines of a file of pairs."""

    name: str
    source: Source
    options: tuple[str, ...] = ()
    pairs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, eq=False)
class LearnJob:
    """A lesson and how far it is. `verdict` is the learner's sentence, `error` says why there is none."""

    lesson: Lesson
    id: str = field(default_factory=lambda: f"learn-{uuid.uuid4().hex[:16]}")
    created: int = field(default_factory=lambda: int(time.time()))
    state: State = "queued"
    paused: bool = False
    progress: Progress = field(default_factory=Progress)
    outcome: Outcome | None = None
    verdict: str = ""
    error: str = ""
    steering: str | None = None

    def to_dict(self, position: int | None = None) -> dict[str, Any]:
        """The job in GET /v1/learn; `position` of those that wait, from 1."""
        lesson, progress = self.lesson, self.progress
        facts: dict[str, Any] = {"id": self.id, "object": "learn.job", "created": self.created, "name": lesson.name}
        facts |= {"source": lesson.source, "state": self.state, "position": position, "paused": self.paused}
        facts |= {"step": progress.step or None, "done": progress.done, "total": progress.total}
        facts |= {"elapsed": round(progress.elapsed, 1), "expected": round(progress.expected, 1)}
        facts |= {"outcome": self.outcome, "verdict": self.verdict or None, "error": self.error or None}
        return facts | {"steering": self.steering}

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state not in ("queued", "running")


def start_learning(words: Sequence[str], stdout: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start `steermoe` as a child of low priority. Raises NativeError, OSError."""
    child = Child(
        run_program,
        limits=Limits(niceness=_NICENESS),
        stdin=subprocess.PIPE,
        stdout=stdout,
        stderr=subprocess.PIPE,
    )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError), child.stdin:  # it has ended already, and its status says so
        child.stdin.write(program_input(list(words)))
    return child


class LearnJobs:
    """The jobs of a server; safe to use from several threads.

    `options` are given to each of them, such as the model. `learnt(name)` is called in the thread of the jobs for a
    steering that works; it registers it, and may raise SteerMoEError or ApiError.
    """

    def __init__(
        self,
        options: Sequence[str],
        learnt: Callable[[str], object],
        *,
        hidden: Sequence[Path] = (),
        start: Start = start_learning,
    ) -> None:
        """`hidden` are folders whose paths no client is told."""
        self._options, self._learnt, self._start = tuple(options), learnt, start
        self._hidden = [f"{folder}{os.sep}" for folder in (*hidden, Path.home())]
        self._changed = threading.Condition()
        self._jobs: dict[str, LearnJob] = {}  # in the order in which they came
        self._waiting: deque[str] = deque()
        self._process: subprocess.Popen[bytes] | None = None
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    #
    # what clients ask
    #

    def add(self, lesson: Lesson) -> dict[str, Any]:
        """Queue a lesson. Raises ApiError: 409 for a name that is being learnt, 429 when too many wait."""
        with self._changed:
            if self._closed:
                raise ApiError.stopping()
            if any(job.lesson.name == lesson.name and not job.ended for job in self._jobs.values()):
                raise ApiError(409, f"{lesson.name}: is being learnt; cancel that, or wait", code="name_taken")
            if len(self._waiting) >= MAX_WAITING:
                raise ApiError.busy(
                    f"{MAX_WAITING} things to learn wait already; come again later", code="queue_full", retry_after=60
                )
            job = LearnJob(lesson)
            self._jobs[job.id] = job
            self._waiting.append(job.id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="steermoe-learn", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            return self._shown(job)

    def list(self) -> list[dict[str, Any]]:
        """All jobs, the latest first."""
        with self._changed:
            return [self._shown(job) for job in reversed(self._jobs.values())]

    def get(self, id_: str) -> dict[str, Any]:
        """A job. Raises ApiError (404)."""
        with self._changed:
            return self._shown(self._job(id_))

    def cancel(self, id_: str) -> dict[str, Any]:
        """End a job; what has ended stays as it is. Raises ApiError (404)."""
        with self._changed:
            job = self._job(id_)
            if not job.ended:
                if job.state == "queued":
                    self._waiting.remove(job.id)
                elif self._process is not None:
                    self._process.kill()
                self._set(job.id, state="cancelled", paused=False)
            return self._shown(self._job(id_))

    def _job(self, id_: str) -> LearnJob:
        job = self._jobs.get(id_)
        if job is None:
            raise ApiError.not_found("no such job; GET /v1/learn lists them", param="id", code="job_not_found")
        return job

    def _shown(self, job: LearnJob) -> dict[str, Any]:
        return job.to_dict(self._waiting.index(job.id) + 1 if job.state == "queued" else None)

    #
    # what the server tells
    #

    def set_busy(self, busy: bool) -> None:
        """Whether the engine has requests: the job stands still then. Returns at once."""
        with self._changed:
            self._busy = busy
            self._pause_or_go_on()

    def close(self) -> None:
        """End what runs and what waits, and the thread."""
        with self._changed:
            self._closed = True
            for job in list(self._jobs.values()):
                if not job.ended:
                    self._set(job.id, state="cancelled", paused=False)
            self._waiting.clear()
            if self._process is not None:
                self._process.kill()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _pause_or_go_on(self) -> None:
        """Stop the process or let it go on, as the engine's work wants it; with the lock."""
        running = next((job for job in self._jobs.values() if job.state == "running"), None)
        if running is None or self._process is None or running.paused == self._busy:
            return
        if self._process.poll() is None:  # else its number may be another's
            with contextlib.suppress(psutil.NoSuchProcess):
                learner = psutil.Process(self._process.pid)
                (learner.suspend if self._busy else learner.resume)()
        self._set(running.id, paused=self._busy)

    def _set(self, id_: str, **changes: Any) -> None:
        self._jobs[id_] = replace(self._jobs[id_], **changes)
        self._changed.notify_all()

    #
    # in the thread
    #

    def _run(self) -> None:
        while (job := self._next()) is not None:
            try:
                with tempfile.TemporaryDirectory(prefix="steermoe-learn-") as folder:
                    self._do(job, Path(folder))
            except (SteerMoEError, ApiError, OSError) as error:
                self._end(job.id, state="failed", error=sentence(str(as_api_error(error))))
            except Exception as error:
                log.error("learning failed", exc_info=error)
                self._end(job.id, state="failed", error="the server failed; its log says why")
            self._forget_old()

    def _next(self) -> LearnJob | None:
        """The next job, which runs from now on; None when the server stops."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            id_ = self._waiting.popleft()
            self._set(id_, state="running")
            return self._jobs[id_]

    def _do(self, job: LearnJob, folder: Path) -> None:
        lesson = job.lesson
        words = ["learn", "--quick", "--json", "--progress=json", *self._options, *lesson.options]
        if lesson.pairs:
            pairs = folder / "pairs.jsonl"
            pairs.write_text("".join(json.dumps(pair) + "\n" for pair in lesson.pairs), "utf-8", newline="\n")
            words.append(f"--pairs={pairs}")
        with open(folder / "result.json", "w+b") as stdout:
            process = self._begin(job.id, [*words, "--", lesson.name], stdout)
            if process is None:
                return
            said = Words()
            try:
                assert process.stderr is not None
                for line in bounded_lines(process.stderr):
                    self._hear(job.id, line, said)
                status = process.wait()
            finally:
                with self._changed:  # nothing is sent to it any more
                    self._process = None
                _end(process)
            self._finish(job, status, stdout, said)

    def _begin(self, id_: str, words: Sequence[str], stdout: IO[bytes]) -> subprocess.Popen[bytes] | None:
        """Start the process, unless the job was cancelled. Started outside the lock: it takes a while."""
        if self._jobs[id_].ended:
            return None
        process = self._start(words, stdout)
        with self._changed:
            if self._jobs[id_].ended:
                _end(process)
                return None
            self._process = process
            self._pause_or_go_on()
        return process

    def _hear(self, id_: str, line: str, said: Words) -> None:
        progress = progress_of(line)
        if progress is None:
            return said.add(line)
        with self._changed:
            if not self._jobs[id_].ended:
                self._set(id_, progress=progress)
        return None

    def _finish(self, job: LearnJob, status: int, stdout: IO[bytes], said: Words) -> None:
        result = result_of(stdout) if status in (0, 1) else None
        if self._jobs[job.id].ended:
            return
        if result is None or (result.outcome == "works") != (status == 0):
            fault = self._without_folders(said.fault())
            fault = fault or f"the learner ended with status {status} and without a result"
            log.warning("learning %s failed: %s", job.lesson.name, fault)
            return self._end(job.id, state="failed", error=fault)
        told = {"outcome": result.outcome, "verdict": result.verdict}
        log.info("learnt %s: %s", job.lesson.name, result.verdict)
        if result.outcome == "works":
            try:
                self._learnt(job.lesson.name)
            except (SteerMoEError, ApiError, OSError) as error:
                text = f"learnt, but it cannot be registered: {as_api_error(error)}"
                return self._end(job.id, state="failed", error=sentence(text), **told)
            told["steering"] = job.lesson.name
        return self._end(job.id, state="done", **told)

    def _without_folders(self, text: str) -> str:
        """A message of the program as one of the server: no paths, and fields for options."""
        for folder in self._hidden:
            text = text.replace(folder, "")
        return text.replace("--restart", "replace: true")

    def _end(self, id_: str, **changes: Any) -> None:
        with self._changed:
            if not self._jobs[id_].ended:
                self._set(id_, paused=False, **changes)

    def _forget_old(self) -> None:
        with self._changed:
            ended = [id_ for id_, job in self._jobs.items() if job.ended]
            for id_ in ended[: max(0, len(ended) - MAX_KEPT)]:
                del self._jobs[id_]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process, if it runs, wait, and close its pipes."""
    if isinstance(process, Child):
        process.end()
        return
    process.kill()
    with process:
        pass
