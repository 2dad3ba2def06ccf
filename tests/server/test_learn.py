"""POST /v1/learn and its jobs over HTTP: who may, what a request may be, and what comes of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from steermoe_local import UsageError
from steermoe_local.cli.commands.learn import learn
from steermoe_local.cli.commands.serve import _of_learner
from steermoe_local.cli.options.llama import LlamaFlags
from steermoe_local.models.shipped_maps import shipped_maps
from steermoe_local.server import ServerSettings
from steermoe_local.server.learn_jobs import LearnJobs
from steermoe_local.server.learning import _ON_CPU, add_learnt
from steermoe_local.server.registry import SteeringRegistry
from steermoe_local.server.schemas_learn import MAX_EXAMPLE, MAX_INSTRUCTION, MAX_PAIRS
from tests.support.fake_learner import DID_NOT, WORKS, FakeLearner
from tests.support.running_server import Running, running, unending, until

FORMAL = {"name": "formal", "like": "Answer formally.", "unlike": "Answer casually."}
EXAMPLE = {"prompt": "Who are you?", "like": "A model.", "unlike": "dunno"}


@pytest.fixture
def server(learner: FakeLearner, maps_folder: Path) -> Iterator[Running]:
    with running(
        parallel=2, jobs=lambda registry: LearnJobs(["--model=m"], partial(add_learnt, registry), start=learner.start)
    ) as found:
        yield found


@pytest.fixture(scope="module")
def without() -> Iterator[Running]:
    with running(parallel=1) as found:
        yield found


def ended(server: Running, job: dict[str, Any]) -> dict[str, Any]:
    def get() -> dict[str, Any]:
        return dict(server.client.get(f"/v1/learn/{job['id']}").json())

    until(lambda: get()["state"] not in ("queued", "running"))
    return get()


def test_it_is_off_unless_the_server_learns(without: Running) -> None:
    assert without.client.get("/v1/learn").json() == {"object": "list", "enabled": False, "data": []}
    for response in (
        without.client.post("/v1/learn", json=FORMAL),
        without.client.get("/v1/learn/learn-1"),
        without.client.delete("/v1/learn/learn-1"),
    ):
        assert (response.status_code, response.json()["error"]["code"]) == (403, "learning_off")


def test_where_it_is_kept(maps_folder: Path, tmp_path: Path) -> None:
    """In the folder of --maps if the server writes there, else in the user's."""
    assert SteeringRegistry().learnt_folder == maps_folder
    assert SteeringRegistry(folder=tmp_path / "read").learnt_folder == maps_folder
    assert SteeringRegistry(folder=tmp_path / "write", writable=True).learnt_folder == tmp_path / "write"


@pytest.mark.parametrize(
    "flags",
    [
        LlamaFlags(),
        LlamaFlags(threads=3, mmap=False, repack=False, memory_check=False, n_gpu_layers=99, device=("CUDA0",)),
        LlamaFlags(flash_attn="on", cache_type_k="q8_0", cache_type_v="q8_0"),
    ],
)
def test_what_a_job_takes_over(flags: LlamaFlags) -> None:
    """The command line reads the words of a job as the server's flags, but computes on the CPU."""
    words = [*_ON_CPU, *_of_learner(flags), "-m", "tiny", "name"]
    read = learn.make_context("learn", words).params
    expected = replace(flags, n_gpu_layers=0, device=("none",))
    names = ("threads", "flash_attn", "cache_type_k", "cache_type_v", "mmap", "repack", "memory_check")
    for name in (*names, "n_gpu_layers", "device"):
        assert read[name] == getattr(expected, name), name


def test_what_settings_allow() -> None:
    assert ServerSettings("m").learns
    assert not ServerSettings("m", learn=False).learns
    assert not ServerSettings("m", host="0.0.0.0", api_key="k").learns
    assert ServerSettings("m", host="0.0.0.0", api_key="k", learn=True).learns
    assert not ServerSettings("m", host="0.0.0.0", no_auth=True).learns
    with pytest.raises(UsageError, match="--learn"):
        ServerSettings("m", host="0.0.0.0", no_auth=True, learn=True)


def test_a_steering_is_learnt_and_served(server: Running, learner: FakeLearner, maps_folder: Path) -> None:
    response = server.client.post("/v1/learn", json=FORMAL)
    assert response.status_code == 202
    job = response.json()
    assert (job["object"], job["name"], job["source"]) == ("learn.job", "formal", "instructions")
    learner.wait_for()
    assert learner.started[0][5:] == ["--like=Answer formally.", "--unlike=Answer casually.", "--", "formal"]
    assert server.client.get("/v1/learn").json()["enabled"] is True
    (maps_folder / "formal").mkdir()
    shutil.copy(shipped_maps()["digits-words"], maps_folder / "formal" / "map.json")
    learner.end()
    done = ended(server, job)
    assert (done["state"], done["verdict"], done["steering"]) == ("done", WORKS["verdict"], "formal")
    names = [entry["name"] for entry in server.client.get("/v1/steering").json()["data"]]
    assert "formal" in names
    steering = {"map": "formal", "activate": 2, "deactivate": 2}
    assert server.chat(steering=steering).json()["steering"]["name"] == "formal"
    taken = server.client.post("/v1/learn", json=FORMAL)
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "learnt_already")
    again = server.client.post("/v1/learn", json=FORMAL | {"replace": True})
    assert again.status_code == 202
    learner.wait_for(2)
    assert "--restart" in learner.started[1]


def test_what_did_not_work_is_told_and_not_served(server: Running, learner: FakeLearner) -> None:
    job = server.client.post("/v1/learn", json=FORMAL).json()
    learner.wait_for()
    learner.end(DID_NOT, 1)
    done = ended(server, job)
    assert (done["state"], done["outcome"], done["steering"]) == ("done", "did not work", None)
    assert server.client.get("/v1/steering/formal").status_code == 404


def test_a_job_is_cancelled_and_goes_on_later(server: Running, learner: FakeLearner, maps_folder: Path) -> None:
    job = server.client.post("/v1/learn", json=FORMAL).json()
    learner.wait_for()
    (maps_folder / "formal" / "work").mkdir(parents=True)
    assert server.client.post("/v1/learn", json=FORMAL).status_code == 409, "it is being learnt"
    response = server.client.delete(f"/v1/learn/{job['id']}")
    assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert server.client.post("/v1/learn", json=FORMAL).status_code == 202
    learner.wait_for(2)
    assert "--resume" in learner.started[1]
    assert server.client.get("/v1/learn/learn-0").status_code == 404


def test_examples_and_behaviours(server: Running, learner: FakeLearner) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    pairs = [EXAMPLE, EXAMPLE | {"prompt": talk}, EXAMPLE | {"like": " --x "}]
    assert server.client.post("/v1/learn", json={"name": "mine", "pairs": pairs}).json()["source"] == "pairs"
    learner.wait_for()
    found = [json.loads(line) for line in learner.pairs[0].splitlines()]
    assert found[0] == {
        "positive": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}],
        "negative": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "dunno"}],
        "positive_target": "A model.",
        "negative_target": "dunno",
    }
    assert found[1]["negative"][:2] == talk
    assert found[2]["positive_target"] == "--x"
    learner.end(DID_NOT, 1)
    listed = server.client.get("/v1/behaviours").json()["data"]
    assert listed[0]["name"] == "digits-words", "the embedded model's own come first"
    assert {"name", "title", "positive", "negative", "about", "one_way", "object"} == listed[0].keys()
    assert server.client.post("/v1/learn", json={"behaviour": "german"}).json()["name"] == "german"
    learner.wait_for(2)
    assert learner.started[1][-3:] == ["--behaviour=german", "--", "german"]
    learner.end(DID_NOT, 1)
    job = server.client.post("/v1/learn", json={"behaviour": "digits-words", "name": "digits"}).json()
    learner.wait_for(3)
    assert learner.started[2][-3:] == ["--behaviour=digits-words", "--", "digits"]
    learner.tell(err="error: /x/digits: begun with seed 1; start over with --restart\n", exit=2)
    assert ended(server, job)["error"].endswith("start over with replace: true")
    taken = server.client.post("/v1/learn", json={"behaviour": "digits-words"})
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")


def many(n: int) -> list[dict[str, Any]]:
    return [EXAMPLE | {"prompt": f"Question {i}?"} for i in range(n)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, None),
        ({"name": "formal"}, None),
        ({"like": "a", "unlike": "b"}, None),
        (FORMAL | {"name": "../formal"}, "name"),
        (FORMAL | {"name": "a/b"}, "name"),
        (FORMAL | {"name": "-m"}, "name"),
        (FORMAL | {"name": "A"}, "name"),
        (FORMAL | {"name": "a" * 65}, "name"),
        (FORMAL | {"name": "none"}, "name"),
        (FORMAL | {"name": "nul"}, "name"),
        (FORMAL | {"name": "x.choice"}, "name"),
        (FORMAL | {"like": "a" * (MAX_INSTRUCTION + 1)}, "like"),
        (FORMAL | {"like": " "}, "like"),
        (FORMAL | {"like": "a\0b"}, "like"),
        (FORMAL | {"like": 1}, "like"),
        (FORMAL | {"unlike": "Answer formally. "}, None),
        (FORMAL | {"behaviour": "formal"}, None),
        ({"name": "mine", "behaviour": "formel"}, None),
        ({"behaviour": "/etc/passwd"}, "behaviour"),
        ({"name": "mine", "like": "a"}, None),
        (FORMAL | {"model": "/etc/passwd"}, "model"),
        (FORMAL | {"folder": "/tmp"}, "folder"),
        ({"name": "mine", "pairs": many(2)}, "pairs"),
        ({"name": "mine", "pairs": many(MAX_PAIRS + 1)}, "pairs"),
        ({"name": "mine", "pairs": "/etc/passwd"}, "pairs"),
        ({"name": "mine", "pairs": [*many(3), EXAMPLE | {"like": "dunno"}]}, "pairs[3]"),
        ({"name": "mine", "pairs": [*many(3), EXAMPLE | {"like": "a" * (MAX_EXAMPLE + 1)}]}, "pairs[3].like"),
        ({"name": "mine", "pairs": [*many(3), EXAMPLE | {"prompt": []}]}, "pairs[3].prompt"),
        (
            {"name": "mine", "pairs": [*many(3), EXAMPLE | {"prompt": [{"role": "assistant", "content": "a"}]}]},
            "pairs[3]",
        ),
    ],
)
def test_what_is_refused(server: Running, learner: FakeLearner, body: dict[str, Any], param: str | None) -> None:
    response = server.client.post("/v1/learn", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["message"].isprintable()
    assert not learner.started


def test_half_of_a_surrogate_pair_is_refused(server: Running, learner: FakeLearner) -> None:
    body = json.dumps(FORMAL).replace("formally", "\\ud800").encode()
    response = server.client.post("/v1/learn", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert not learner.started


def test_names_of_others_stay(server: Running, learner: FakeLearner, maps_folder: Path) -> None:
    maps_folder.mkdir()
    (maps_folder / "loose.json").write_text("{}")
    (maps_folder / "elsewhere").symlink_to(maps_folder.parent)
    for name in ("digits-words", "loose", "elsewhere"):
        for more in ({}, {"replace": True}):
            response = server.client.post("/v1/learn", json=FORMAL | {"name": name} | more)
            assert (response.status_code, response.json()["error"]["code"]) == (409, "name_taken"), name
    assert not learner.started


def test_other_sites_cannot_ask(server: Running, learner: FakeLearner) -> None:
    """A form of another page sends no JSON; what sends JSON or DELETE is asked for first, and not allowed."""
    other = {"Origin": "http://evil.example"}
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = server.client.post("/v1/learn", content=json.dumps(FORMAL), headers=other | {"Content-Type": kind})
        assert response.status_code == 415
    asked = other | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert "access-control-allow-origin" not in server.client.options("/v1/learn", headers=asked).headers
    evil = {"Host": "evil.example"}
    rebound = httpx.post(f"{server.url}/v1/learn", json=FORMAL, headers=evil, timeout=60, trust_env=False)
    assert (rebound.status_code, rebound.json()["error"]["code"]) == (403, "unknown_host")
    assert not learner.started


def test_a_key_is_asked_for(learner: FakeLearner, maps_folder: Path) -> None:
    with running(parallel=1, api_key="k", jobs=lambda _: LearnJobs([], print, start=learner.start)) as server:
        for method, path in (("GET", ""), ("POST", ""), ("GET", "/x"), ("DELETE", "/x")):
            response = httpx.request(method, f"{server.url}/v1/learn{path}", timeout=60, trust_env=False)
            assert response.status_code == 401


def test_an_answer_stops_the_job_and_its_end_lets_it_go_on(server: Running, learner: FakeLearner) -> None:
    job = server.client.post("/v1/learn", json=FORMAL).json()
    learner.wait_for()

    def paused() -> bool:
        return bool(server.client.get(f"/v1/learn/{job['id']}").json()["paused"])

    body = {"messages": [{"role": "user", "content": "Count."}], "max_tokens": 400, "ignore_eos": True, "stream": True}
    with unending(server), server.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        until(paused)
        until(lambda: psutil.Process(learner.processes[0].pid).status() == psutil.STATUS_STOPPED)
    until(lambda: not paused())
    learner.end(DID_NOT, 1)
    assert ended(server, job)["state"] == "done"


def test_the_folder_cannot_be_written(server: Running, learner: FakeLearner, maps_folder: Path) -> None:
    maps_folder.write_text("a file")
    response = server.client.post("/v1/learn", json=FORMAL)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "storage_failed")
    assert str(maps_folder) not in response.text
    assert not learner.started
