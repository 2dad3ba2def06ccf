"""A real server that has a real steering learnt: the child, its end with the server's, and going on later."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.running_server import until
from tests.support.serving import COMMAND, Process, serving

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

_LONG = 900  # of a learner beside other work on all CPUs
_SEARCHES = ("answers", "attribute", "tune", "confirm")  # the steps that the clock ends
INSTRUCTIONS = {"name": "digits", "like": "Use digits.", "unlike": "Use words."}


# The server, whose learner gets as much of the CPU as other tests do; with its own low priority it gets little beside
# them, and the times of its steps were measured before those began.
EAGER = """
from steermoe_local.server import learn_jobs
learn_jobs._NICENESS = 0
from steermoe_local.cli import main
main()
"""


def command(folder: Path, eager: bool = True) -> list[str]:
    program = [sys.executable, "-c", EAGER, "serve"] if eager else COMMAND
    return ["env", f"STEERMOE_MAPS={folder}", *program]


def learner(server: Process) -> psutil.Process | None:
    """The child that learns, by the module of its function."""
    children = psutil.Process(server.process.pid).children()
    return next((child for child in children if "own_program" in " ".join(child.cmdline())), None)


def job(server: Process, job_id: str) -> dict[str, Any]:
    return dict(server.client.get(f"/v1/learn/{job_id}").json())


def begin(server: Process, body: dict[str, Any]) -> tuple[str, psutil.Process]:
    """Start a job and wait until it says how far it is: (its id, the child)."""
    response = server.client.post("/v1/learn", json=body)
    assert response.status_code == 202, response.text
    job_id = str(response.json()["id"])

    def heard() -> bool:
        now = job(server, job_id)
        assert now["state"] in ("queued", "running"), now
        return bool(now["step"])

    until(heard, seconds=_LONG)
    child = learner(server)
    assert child is not None
    return job_id, child


def gone(child: psutil.Process) -> bool:
    return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_real_job(tmp_path: Path) -> None:
    with serving(command=command(tmp_path, eager=False)) as server:
        assert server.client.get("/v1/learn").json()["enabled"] is True
        job_id, child = begin(server, INSTRUCTIONS)
        assert child.nice() > psutil.Process(server.process.pid).nice()
        assert "Use digits" not in " ".join(child.cmdline())
        told = job(server, job_id)
        assert told["total"] > 0
        assert server.client.delete(f"/v1/learn/{job_id}").json()["state"] == "cancelled"
        until(lambda: gone(child))
        assert (tmp_path / "digits" / "work").is_dir()
        again, child = begin(server, INSTRUCTIONS)
        until(lambda: job(server, again)["state"] == "running")
    until(lambda: gone(child))
    with serving("--no-learn", command=command(tmp_path)) as server:
        assert server.client.get("/v1/learn").json()["enabled"] is False
        assert server.client.post("/v1/learn", json=INSTRUCTIONS).status_code == 403


EXAMPLES = [
    {"prompt": f"What number comes after {word}?", "like": f"{number}.", "unlike": f"{after}."}
    for word, number, after in (("three", 4, "Four"), ("six", 7, "Seven"), ("nine", 10, "Ten"))
]


def answer(server: Process, **fields: Any) -> str:
    messages = [{"role": "user", "content": "What number comes after three?"}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 12, **fields}
    response = server.client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def verdict(server: Process, body: dict[str, Any]) -> dict[str, Any]:
    """The job of a request at its end."""
    response = server.client.post("/v1/learn", json=body)
    assert response.status_code == 202, response.text
    job_id = str(response.json()["id"])
    until(lambda: job(server, job_id)["state"] not in ("queued", "running"), seconds=_LONG)
    return job(server, job_id)


def works(server: Process, maps: Path, body: dict[str, Any]) -> None:
    """A job that has to work: again where the clock may have ended a step.

    The times of the steps follow from this machine's speed at the beginning; if other programs slow it down later, a
    step ends with what it has, in half of its time at the earliest.
    """
    for _ in range(3):
        done = verdict(server, body | {"replace": True})
        assert done["state"] == "done", done
        assert done["elapsed"] > 0
        clock = json.loads((maps / body["name"] / "learn.json").read_text("utf-8"))["clock"]
        if done["outcome"] == "works" or all(clock["spent"][step] < clock["expected"][step] / 2 for step in _SEARCHES):
            break
    assert done["outcome"] == "works", (done, clock)
    assert done["steering"] == body["name"]


def test_jobs_to_their_verdicts(tmp_path: Path) -> None:
    """Two instructions, a behaviour and three examples; what works steers answers, and is served after a restart."""
    maps, users = tmp_path / "maps", tmp_path / "users"
    maps.mkdir()
    words = ("--maps", str(maps), "--maps-writable")
    with serving(*words, command=command(users)) as server:
        works(server, maps, INSTRUCTIONS | {"name": "words", "like": "Use words.", "unlike": "Use digits."})
        works(server, maps, {"behaviour": "digits-words", "name": "planted"})
        assert re.search(r"\d", answer(server, steering="planted"))
        assert not re.search(r"\d", answer(server, steering="words"))
        of_examples = verdict(server, {"name": "three", "pairs": EXAMPLES})
        # the embedded model does not follow examples, so there may be too little to learn from: but it was tried
        assert of_examples["state"] == "done", of_examples
        assert of_examples["verdict"]
    assert (maps / "planted" / "map.json").is_file()
    assert not users.exists()
    with serving(*words, command=command(users)) as server:
        assert re.search(r"\d", answer(server, steering="planted"))


def test_time_for_which_it_is_stopped_is_not_its_own(tmp_path: Path) -> None:
    with serving(command=command(tmp_path)) as server:
        began = time.monotonic()
        job_id, child = begin(server, INSTRUCTIONS)
        for _ in range(3):
            child.send_signal(signal.SIGSTOP)
            time.sleep(3)
            child.send_signal(signal.SIGCONT)
            time.sleep(0.5)
        heard = job(server, job_id)["done"], job(server, job_id)["step"]
        until(lambda: (job(server, job_id)["done"], job(server, job_id)["step"]) != heard, seconds=_LONG)
        told, took = job(server, job_id)["elapsed"], time.monotonic() - began
        assert told <= took - 9 + 1.5
        server.client.delete(f"/v1/learn/{job_id}")


def killed(folder: Path, children: list[psutil.Process]) -> None:
    """A server that is killed while its learner stands still."""
    with serving(command=command(folder)) as server:
        _, child = begin(server, INSTRUCTIONS)
        children.append(child)
        child.send_signal(signal.SIGSTOP)
        until(lambda: child.status() == psutil.STATUS_STOPPED)
        server.process.kill()
        server.process.wait(30)


def test_a_server_that_is_killed_takes_a_stopped_learner_along(tmp_path: Path) -> None:
    children: list[psutil.Process] = []
    with pytest.raises(AssertionError, match="the server died"):
        killed(tmp_path, children)
    until(lambda: gone(children[0]))
