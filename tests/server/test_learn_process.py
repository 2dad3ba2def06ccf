"""A real server that has a real steering learnt: the child, its end with the server's, and going on later."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.running_server import until
from tests.support.serving import COMMAND, Process, serving

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

INSTRUCTIONS = {"name": "digits", "like": "Use digits.", "unlike": "Use words."}


def command(folder: Path) -> list[str]:
    return ["env", f"STEERMOE_MAPS={folder}", *COMMAND]


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

    until(heard, seconds=120)
    child = learner(server)
    assert child is not None
    return job_id, child


def gone(child: psutil.Process) -> bool:
    return not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_a_real_job(tmp_path: Path) -> None:
    with serving(command=command(tmp_path)) as server:
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
