"""A writable maps folder: whatever ends a change of it, the old state or the new one is there as a whole."""

from __future__ import annotations

import base64
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import ExpertMap, model_info, write_bias
from steermoe_local.errors import BusyError
from steermoe_local.server import SteeringRegistry
from steermoe_local.server.api_errors import as_api_error
from steermoe_local.server.schemas import RegisterRequest
from steermoe_local.steering.steering import Steering
from tests.support.crashing import failed_at_each_step, killed_at_each_step
from tests.support.running_server import TINY, running
from tests.support.steered_server import WORDS, bias_of, post

IDENTITY = model_info(TINY).identity

State = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "maps"
    path.mkdir()
    return path


def request_of(digits: ExpertMap, kind: str, folder: Path) -> RegisterRequest:
    """A request that registers `entry` as a map with numbers, a bare map, a choice, a plan, or a bias."""
    data = json.loads(digits.to_json())
    if kind == "bias":
        path = folder.parent / "b.gguf"
        write_bias(bias_of(WORDS), path)
        body: dict[str, Any] = {"bias": base64.b64encode(path.read_bytes()).decode()}
    else:
        body = {
            "map": {"map": data, "activate": 3, "deactivate": 1},
            "bare": {"map": data | {"behaviour": data["behaviour"] | {"name": "something else"}}},
            "choice": {"map": "digits-words", "activate": 1, "deactivate": 2},
            "plan": {"rules": ["thinking: none", "answer[0:8]: digits-words +1 -2"]},
        }[kind]
    return RegisterRequest(name="entry", replace=True, **body)


def opened(folder: Path, *, writable: bool = True) -> SteeringRegistry:
    found = SteeringRegistry(folder=folder, writable=writable)
    assert found.open(IDENTITY) == []
    return found


def held_by(registry: SteeringRegistry) -> State | None:
    """What `entry` stands for."""
    found = next((entry for entry in registry.entries() if entry.name == "entry"), None)
    if found is None:
        return None
    facts = found.to_dict()
    del facts["source"], facts["name"]
    bias = found.steering.bias if isinstance(found.steering, Steering) else None
    return facts | {"bias": None if bias is None else bias.key}


def state_of(folder: Path, *, writable: bool) -> State | None:
    registry = opened(folder, writable=writable)
    try:
        return held_by(registry)
    finally:
        registry.close()


CHANGES = [(None, "map"), ("map", None), ("bias", "map"), ("map", "bias"), ("map", "choice"), ("bare", "map")]
CHANGES += [(None, "plan"), ("plan", None), ("map", "plan"), ("plan", "choice")]


def change_of(digits: ExpertMap, folder: Path, new: str | None) -> Callable[[SteeringRegistry], Any]:
    if new is None:
        return lambda registry: registry.remove("entry")
    request = request_of(digits, new, folder)
    return lambda registry: registry.register(request)


def prepared(digits: ExpertMap, folder: Path, old: str | None) -> State | None:
    if old is None:
        return None
    registry = opened(folder)
    registry.register(request_of(digits, old, folder))
    registry.close()
    return state_of(folder, writable=False)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize(("old", "new"), CHANGES)
def test_killed_at_each_step(digits: ExpertMap, folder: Path, tmp_path: Path, old: str | None, new: str | None) -> None:
    before = prepared(digits, folder, old)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    change = change_of(digits, folder, new)
    registry = opened(folder)
    change(registry)
    registry.close()
    after = state_of(folder, writable=False)
    assert after != before
    seen: set[str] = set()

    def reset() -> None:
        shutil.rmtree(folder)
        shutil.copytree(copy, folder)

    def work() -> None:
        registry = opened(folder)
        change(registry)
        registry.close()

    def check() -> None:
        read_only = state_of(folder, writable=False)
        found = state_of(folder, writable=True)
        assert found in (before, after), sorted(path.name for path in folder.iterdir())
        assert read_only == found, "a server that does not write sees another state"
        assert not [path for path in folder.iterdir() if path.name.startswith(".")], "something was left"
        seen.add("new" if found == after else "old")

    reset()
    assert killed_at_each_step(work, check, reset) > 10
    assert seen == {"old", "new"}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES])
@pytest.mark.parametrize(("old", "new"), [("map", "bias"), ("map", None), (None, "map"), ("map", "plan")])
def test_failing_at_each_step(digits: ExpertMap, folder: Path, old: str | None, new: str | None, number: int) -> None:
    registry = opened(folder)
    if old is not None:
        registry.register(request_of(digits, old, folder))
    before = held_by(registry)
    files = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    change = change_of(digits, folder, new)
    n_failed = 0

    def check(raised: BaseException | None) -> None:
        nonlocal n_failed
        if raised is None:  # nothing failed, or what failed was tidying up
            assert held_by(registry) == state_of(folder, writable=False) != before
            if new is not None:
                registry.remove("entry")
            if old is not None:
                registry.register(request_of(digits, old, folder))
            return
        n_failed += 1
        error = as_api_error(raised)
        assert error.status == (507 if number in (errno.ENOSPC,) else 500)
        assert error.body()["error"]["type"] == "server_error"
        assert "/" not in str(error), "a path of the server"
        assert held_by(registry) == before, "the old entry is gone from memory"
        assert state_of(folder, writable=False) == before
        now = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        assert now == files

    failed_at_each_step(number, lambda: change(registry), check)
    assert n_failed > 4
    registry.close()
    opened(folder).close()  # what could not be tidied up then is now
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_two_servers_on_one_folder(folder: Path) -> None:
    first = opened(folder)
    with pytest.raises(BusyError, match=f"pid {os.getpid()}"):
        opened(folder)
    reading = opened(folder, writable=False)
    reading.close()
    first.close()
    opened(folder).close()


def test_files_of_others_stay(digits: ExpertMap, folder: Path) -> None:
    """What looks a little like the registry's own files, and is the user's."""
    names = [
        ".entry.json.bak.old",
        ".notes.new",
        ".x.changing",
        ".entry.changing.txt",
        "entry.json.old",
        ".h.json",
    ]
    for name in names:
        (folder / name).write_text("{}")
    (folder / ".evil.changing").write_text(
        json.dumps({"format": "steermoe-folder-change", "old": {"../x.json": ".y"}, "added": ["../../x"]})
    )
    (folder.parent / "x").write_text("mine")
    registry = opened(folder)
    registry.register(request_of(digits, "map", folder))
    registry.remove("entry")
    registry.close()
    assert {*names, ".evil.changing"} == {path.name for path in folder.iterdir()}
    assert (folder.parent / "x").read_text() == "mine"


def test_over_http(digits: ExpertMap, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(maps_folder=folder, maps_writable=True, parallel=1) as server:
        data = json.loads(digits.to_json())
        assert post(server, name="mine", map=data, activate=2, deactivate=2).status_code == 201
        before = server.client.get("/v1/steering/mine").json()

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            answers = [
                post(server, name="mine", map=data, activate=1, replace=True),
                post(server, name="new", map=data, activate=1),
                server.client.delete("/v1/steering/mine"),
            ]
        for answer in answers:
            error = answer.json()["error"]
            assert (answer.status_code, error["type"], error["code"]) == (507, "server_error", "storage_full")
            assert str(folder) not in answer.text
        assert server.client.get("/v1/steering/mine").json() == before
        assert server.client.get("/v1/steering/new").status_code == 404
        assert server.client.delete("/v1/steering/mine").status_code == 204
    assert list(folder.iterdir()) == []
