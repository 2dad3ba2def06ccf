"""Jobs of learning, with a fake learner: states, the queue, ends of every kind, hostile lines, pauses."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from steermoe_local import UsageError
from steermoe_local._util.children import Child
from steermoe_local.server import learn_jobs
from steermoe_local.server.api_errors import ApiError
from steermoe_local.server.learn_jobs import MAX_KEPT, MAX_WAITING, LearnJobs, Lesson, start_learning
from steermoe_local.server.learn_output import bounded_lines, progress_of, result_of
from tests.support.fake_learner import DID_NOT, WORKS, FakeLearner
from tests.support.running_server import until

EVENT = {"step": "detect", "done": 3, "total": 8, "elapsed": 2.5, "expected": 30}
POSIX = pytest.mark.skipif(os.name != "posix", reason="the system cannot stop a process")


@pytest.fixture
def learnt() -> list[str]:
    return []


@pytest.fixture
def jobs(learner: FakeLearner, learnt: list[str]) -> Iterator[LearnJobs]:
    found = LearnJobs(["--model=/models/m.gguf"], learnt.append, hidden=(Path("/secret/maps"),), start=learner.start)
    yield found
    found.close()


def lesson(name: str = "formal", **fields: Any) -> Lesson:
    return Lesson(name, "instructions", ("--like=Be formal.", "--unlike=-n"), **fields)


def state(jobs: LearnJobs, job: dict[str, Any]) -> str:
    return str(jobs.get(job["id"])["state"])


def ended(jobs: LearnJobs, job: dict[str, Any]) -> dict[str, Any]:
    until(lambda: state(jobs, job) not in ("queued", "running"))
    return jobs.get(job["id"])


def test_a_steering_is_learnt(jobs: LearnJobs, learner: FakeLearner, learnt: list[str]) -> None:
    job = jobs.add(lesson())
    assert (job["name"], job["source"], job["state"] in ("queued", "running")) == ("formal", "instructions", True)
    learner.wait_for()
    words = ["learn", "--quick", "--json", "--progress=json", "--model=/models/m.gguf"]
    assert learner.started == [[*words, "--like=Be formal.", "--unlike=-n", "--", "formal"]]
    learner.say("detect", 3, 8, 2.5, 30)
    until(lambda: jobs.get(job["id"])["step"] == "detect")
    running = jobs.get(job["id"])
    assert [running[name] for name in ("state", "done", "total", "elapsed", "expected")] == ["running", 3, 8, 2.5, 30]
    learner.end()
    done = ended(jobs, job)
    assert (done["state"], done["outcome"], done["verdict"]) == ("done", "works", WORKS["verdict"])
    assert (done["steering"], done["error"], learnt) == ("formal", None, ["formal"])


def test_what_did_not_work_is_not_registered(jobs: LearnJobs, learner: FakeLearner, learnt: list[str]) -> None:
    job = jobs.add(lesson())
    learner.wait_for()
    learner.end(DID_NOT, 1)
    done = ended(jobs, job)
    assert (done["state"], done["outcome"], done["verdict"]) == ("done", "did not work", DID_NOT["verdict"])
    assert (done["steering"], learnt) == (None, [])


def test_examples_come_as_a_file_of_pairs(jobs: LearnJobs, learner: FakeLearner) -> None:
    pair = {"positive": "caf\u00e9 \u2028 a", "negative": "caf\u00e9 b", "positive_target": "a", "negative_target": "b"}
    job = jobs.add(Lesson("formal", "pairs", (), (pair, pair)))
    learner.wait_for()
    assert [json.loads(line) for line in learner.pairs[0].splitlines()] == [pair, pair]
    learner.end()
    file = next(word for word in learner.started[0] if word.startswith("--pairs=")).removeprefix("--pairs=")
    ended(jobs, job)
    until(lambda: not Path(file).exists())


def test_one_at_a_time_and_few_wait(jobs: LearnJobs, learner: FakeLearner) -> None:
    added = [jobs.add(lesson("first"))]
    learner.wait_for()
    added += [jobs.add(lesson(f"waits-{i}")) for i in range(MAX_WAITING)]
    assert [jobs.get(job["id"])["position"] for job in added] == [None, 1, 2, 3, 4]
    with pytest.raises(ApiError) as full:
        jobs.add(lesson("more"))
    assert (full.value.status, full.value.code, "Retry-After" in full.value.headers) == (429, "queue_full", True)
    with pytest.raises(ApiError) as taken:
        jobs.add(lesson("waits-2"))
    assert (taken.value.status, taken.value.code) == (409, "name_taken")
    assert len(learner.started) == 1
    assert [job["name"] for job in jobs.list()] == ["waits-3", "waits-2", "waits-1", "waits-0", "first"]
    assert jobs.cancel(added[1]["id"])["state"] == "cancelled"
    assert jobs.get(added[2]["id"])["position"] == 1
    for n, job in enumerate([added[0], *added[2:]], 1):
        learner.wait_for(n)
        assert state(jobs, job) == "running"
        learner.end()
        assert ended(jobs, job)["state"] == "done"
    assert [words[-1] for words in learner.started] == ["first", "waits-1", "waits-2", "waits-3"]


def test_a_running_job_is_cancelled_and_the_next_one_begins(jobs: LearnJobs, learner: FakeLearner) -> None:
    first, second = jobs.add(lesson("first")), jobs.add(lesson("second"))
    learner.wait_for()
    assert jobs.cancel(first["id"])["state"] == "cancelled"
    assert learner.processes[0].wait(20) == -signal.SIGKILL
    learner.wait_for(2)
    learner.end()
    assert ended(jobs, second)["state"] == "done"
    assert jobs.cancel(second["id"])["state"] == "done", "what has ended stays as it is"
    assert state(jobs, first) == "cancelled"
    again = jobs.add(lesson("first"))
    learner.wait_for(3)
    learner.end()
    assert ended(jobs, again)["state"] == "done"


def test_jobs_that_are_not_there(jobs: LearnJobs) -> None:
    for ask in (jobs.get, jobs.cancel):
        with pytest.raises(ApiError) as error:
            ask("learn-0")
        assert (error.value.status, error.value.code) == (404, "job_not_found")


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ({"exit": 3}, "the learner ended with status 3 and without a result"),
        ({"err": "error: /secret/maps/formal: in use\n", "exit": 1}, "formal: in use"),
        ({"err": "error: one\nerror: two\nnotes\n", "exit": 2}, "two"),
        ({"err": "error: \x1b[31mred\x07\n", "exit": 1}, "\u241b[31mred\u2407"),
        ({"out": json.dumps(WORKS), "exit": 1}, "the learner ended with status 1 and without a result"),
        ({"out": json.dumps(DID_NOT), "exit": 0}, "the learner ended with status 0 and without a result"),
        ({"out": '{"outcome": "works"}', "exit": 0}, "the learner ended with status 0 and without a result"),
        ({"out": "[" * 100_000, "exit": 0}, "the learner ended with status 0 and without a result"),
    ],
)
def test_what_fails_says_why(jobs: LearnJobs, learner: FakeLearner, order: dict[str, Any], error: str) -> None:
    job = jobs.add(lesson())
    learner.wait_for()
    learner.tell(**order)
    failed = ended(jobs, job)
    assert (failed["state"], failed["error"], failed["steering"]) == ("failed", error, None)


def test_a_learner_that_dies_or_does_not_start(jobs: LearnJobs, learner: FakeLearner, monkeypatch: Any) -> None:
    job = jobs.add(lesson())
    learner.wait_for()
    learner.processes[0].kill()
    assert ended(jobs, job)["error"] == f"the learner ended with status {-signal.SIGKILL} and without a result"

    def no_room(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(jobs, "_start", no_room)
    assert ended(jobs, jobs.add(lesson()))["state"] == "failed"
    monkeypatch.setattr(jobs, "_start", learner.start)
    job = jobs.add(lesson())
    learner.wait_for(2)
    learner.end()
    assert ended(jobs, job)["state"] == "done", "the thread goes on"


def test_what_cannot_be_registered(learner: FakeLearner) -> None:
    def refuse(name: str) -> None:
        raise UsageError(f"{name}: taken")

    jobs = LearnJobs([], refuse, start=learner.start)
    job = jobs.add(lesson())
    learner.wait_for()
    learner.end()
    failed = ended(jobs, job)
    assert (failed["state"], failed["verdict"]) == ("failed", WORKS["verdict"])
    assert failed["error"] == "learnt, but it cannot be registered: formal: taken"
    jobs.close()


def test_hostile_lines_change_nothing_and_fill_nothing(jobs: LearnJobs, learner: FakeLearner) -> None:
    job = jobs.add(lesson())
    learner.wait_for()
    learner.say("detect", 3, 8)
    until(lambda: jobs.get(job["id"])["done"] == 3)
    lines = [
        '{"step": "x", "done": NaN, "total": 1, "elapsed": 1, "expected": 1}',
        '{"step": "x", "done": 1e308, "total": 1, "elapsed": 1, "expected": 1}',
        '{"step": "x", "done": true, "total": 1, "elapsed": 1, "expected": 1}',
        '{"step": "x", "done": -1, "total": 1, "elapsed": 1, "expected": 1}',
        '{"step": 1, "done": 1, "total": 1, "elapsed": 1, "expected": 1}',
        '{"step": "x"}',
        "{" * 9000,
        "[1]",
        "\xff\xfe\x00",
        "a" * 300_000,
        '{"step": "' + "b" * 20_000 + '", "done": 1, "total": 1, "elapsed": 1, "expected": 1}',
    ]
    for line in lines:
        learner.tell(err=f"{line}\n")
    learner.tell(err='{"step": "\\u001b[2J' + "c" * 100 + '", "done": 4, "total": 8, "elapsed": 1, "expected": 1}\n')
    until(lambda: jobs.get(job["id"])["done"] == 4)
    assert jobs.get(job["id"])["step"] == "\u241b[2J" + "c" * 36
    learner.end()
    assert ended(jobs, job)["state"] == "done"


def test_lines_are_bounded() -> None:
    stream = io.BytesIO(b"a" * 40_000 + b"\nb\n\n" + b"c" * 16_384 + b"\nd")
    assert [len(line) for line in bounded_lines(stream)] == [16_384, 1, 0, 16_384, 1]
    assert progress_of(json.dumps(EVENT)) is not None
    assert result_of(io.BytesIO(b"\xff")) is None
    long = result_of(io.BytesIO(json.dumps({"outcome": "works", "verdict": "a\n" * 5000}).encode()))
    assert long is not None
    assert (len(long.verdict), "\n" in long.verdict) == (600, False)


def stopped(process: subprocess.Popen[bytes]) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


@POSIX
def test_a_job_stands_still_while_requests_run(jobs: LearnJobs, learner: FakeLearner) -> None:
    job = jobs.add(lesson())
    learner.wait_for()
    until(lambda: jobs._process is not None)
    jobs.set_busy(True)
    assert jobs.get(job["id"])["paused"] is True
    until(lambda: stopped(learner.processes[0]))
    jobs.set_busy(True)
    jobs.set_busy(False)
    assert jobs.get(job["id"])["paused"] is False
    learner.end()
    assert ended(jobs, job)["state"] == "done"
    jobs.set_busy(True)
    job = jobs.add(lesson())
    learner.wait_for(2)
    until(lambda: stopped(learner.processes[1]))
    assert (state(jobs, job), jobs.get(job["id"])["paused"]) == ("running", True)
    assert jobs.cancel(job["id"])["paused"] is False
    assert learner.processes[1].wait(20) == -signal.SIGKILL, "one that is stopped ends, too"


@POSIX
def test_the_end_of_the_server_ends_all(learner: FakeLearner) -> None:
    jobs = LearnJobs([], print, start=learner.start)
    jobs.close()
    with pytest.raises(ApiError) as error:
        jobs.add(lesson())
    assert error.value.status == 503
    jobs = LearnJobs([], print, start=learner.start)
    first, second = jobs.add(lesson("first")), jobs.add(lesson("second"))
    learner.wait_for()
    jobs.set_busy(True)
    jobs.close()
    assert learner.processes[0].wait(20) == -signal.SIGKILL
    assert [state(jobs, job) for job in (first, second)] == ["cancelled", "cancelled"]
    assert len(learner.started) == 1


def test_old_jobs_are_forgotten(jobs: LearnJobs, learner: FakeLearner) -> None:
    for n in range(MAX_KEPT + 2):
        job = jobs.add(lesson(f"n{n}"))
        learner.wait_for(n + 1)
        learner.end()
        ended(jobs, job)
    until(lambda: len(jobs.list()) == MAX_KEPT)
    assert jobs.list()[0]["name"] == f"n{MAX_KEPT + 1}"


def test_the_real_program_is_a_child_that_reads_its_words(tmp_path: Path) -> None:
    """Texts that look like options, and those that no list of processes should show."""
    with open(tmp_path / "out", "w+b") as stdout:
        child = start_learning(["map", "show", "--", "--no-such-map \U0001f600 secret"], stdout)
        try:
            assert isinstance(child, Child)
            assert "secret" not in " ".join(map(str, child.args))  # type: ignore[arg-type]
            assert child.stderr is not None
            said = child.stderr.read().decode()
            assert child.wait(60) > 0
        finally:
            learn_jobs._end(child)
    assert "--no-such-map" in said
    assert learn_jobs._NICENESS > 0
