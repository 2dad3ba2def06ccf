"""`steermoe serve`, the real program: its first line, its signals, what it refuses; and llama-server beside it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from click.testing import CliRunner

from steermoe_local import BiasFile, ExpertMap, write_bias
from steermoe_local.cli import main
from steermoe_local.maps.recommended import with_recommended
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support import random_models
from tests.support.gguf_copy import copy_model
from tests.support.paths import BUILD
from tests.support.random_models import RandomModel, write_random_model
from tests.support.running_server import TINY, until

PROGRAM = [sys.executable, "-c", "from steermoe_local.cli import main; main()", "serve"]
# The server, which decodes 20 steps and then none until the file exists that its last argument names.
HELD = """
import sys, time
from pathlib import Path
from steermoe_local.cli import main
from steermoe_local.generation.engine import Engine

step, go, n_steps = Engine.step, Path(sys.argv.pop()), 0


def held(engine):
    global n_steps
    n_steps += 1
    if n_steps > 20 and not go.exists():
        time.sleep(0.001)
        return []
    return step(engine)


Engine.step = held
main()
"""
URL = re.compile(r"http://\S+:\d+")
QUESTION = {"messages": [{"role": "user", "content": "Which number comes after three?"}], "temperature": 0}


@contextmanager
def program(
    *args: str, log: Path, env: dict[str, str] | None = None, start: list[str] = PROGRAM
) -> Iterator[tuple[Any, str]]:
    """The running program and its URL, once it says that it is ready."""
    command = [*start, "-m", "tiny", "--port", "0", "-t", "1", "-np", "2", "-c", "512", *args]
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=file, text=True, env=os.environ | (env or {})
        )
    try:
        until(lambda: process.poll() is not None or URL.search(log.read_text()), seconds=60)
        found = URL.search(log.read_text())
        assert found, log.read_text()
        yield process, found[0]
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_serve(tmp_path: Path) -> None:
    """One line when it is ready, a log without texts, and a clean end by Ctrl-C."""
    log = tmp_path / "log"
    with program("--steering", "digits-words", "--alias", "other", "--temp", "0", log=log) as (process, url):
        first = log.read_text().splitlines()
        assert first == [f"steermoe serves tiny at {url} (2 at once, steering: digits-words)"]
        body = QUESTION | {"model": "other"}
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
        assert answer["choices"][0]["message"]["content"] == "4"
        assert answer["steering"]["name"] == "digits-words"
        assert "<!doctype html>" in httpx.get(f"{url}/docs", timeout=60, trust_env=False).text
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert out == "", "stdout is for results"
    text = log.read_text()
    assert "chat/completions steering=digits-words prompt=9" in text
    assert "three" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("signals", [1, 2])
def test_ctrl_c_while_an_answer_is_given(tmp_path: Path, signals: int) -> None:
    """The first one lets answers come to their end, the second one does not."""
    log, go = tmp_path / "log", tmp_path / "go"
    body = {"prompt": "one,", "max_tokens": 400, "logit_bias": {"0": -100}, "stream": True, "temperature": 0}
    with program(str(go), log=log, start=[sys.executable, "-c", HELD, "serve"]) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30, trust_env=False) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            until(lambda: "finishing 1 answers" in log.read_text())
            if signals == 1:
                go.touch()
                assert list(lines)[-2:] == ["data: [DONE]", ""]
            else:
                process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == (0 if signals == 1 else 130)
    assert "Traceback" not in log.read_text()


def test_a_key_from_the_environment(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with program("--host", "0.0.0.0", log=log, env={"STEERMOE_API_KEY": "s3cret"}) as (process, url):
        assert "warning: 0.0.0.0 is not encrypted" in log.read_text()
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/v1/models", timeout=60, trust_env=False).status_code == 401
        headers = {"Authorization": "Bearer s3cret"}
        assert httpx.get(f"{url}/v1/models", headers=headers, timeout=60, trust_env=False).status_code == 200
        process.terminate()
        process.communicate(timeout=20)
        assert process.returncode == 0, "SIGTERM ends it as Ctrl-C does"
    assert "s3cret" not in log.read_text()


def test_what_is_refused(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = str(taken.getsockname()[1])
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "key").write_bytes(b"\xff")
    cases: dict[str, tuple[tuple[str, ...], int, str]] = {
        "port in use": (("--port", port), 2, f"--host 127.0.0.1 --port {port}: "),
        "no key": (("--host", "0.0.0.0"), 2, "a key is needed: --api-key KEY"),
        "everyone's lessons": (
            ("--host", "0.0.0.0", "--no-auth", "--learn"),
            2,
            "give an --api-key, or leave out --learn",
        ),
        "no host": (("--host", "no-such-host.invalid", "--no-auth"), 2, "not an address of this machine"),
        "no name": (("--steering", "nothing"), 2, "--steering nothing: steering 'nothing' is not registered"),
        "no map": (("--steering", str(tmp_path / "broken.json")), 1, "broken.json: not an expert map"),
        "no numbers": (("--steering", str(bare_copy(tmp_path))), 2, "the map recommends"),
        "no such preset's numbers": (
            ("--steering", "digits-words", "--preset", "safe"),
            2,
            "the paper has no numbers for",
        ),
        "two sources of numbers": (
            ("--steering", "digits-words", "--preset", "safe", "--activate", "1"),
            2,
            "--preset",
        ),
        "a bad rule": (("--steer", "anser: digits-words"), 2, "--steer: rule 1 "),
        "a rule of no map": (("--steer", "answer: nothing +1"), 2, "rule 1: nothing: no such file"),
        "two starts": (("--steer", "answer: x", "--steering", "digits-words"), 2, "--steer and --steering both steer"),
        "no plan": (("--plan", str(tmp_path / "broken.json")), 1, "broken.json: not a steering plan"),
        "numbers beside a plan": (("--steer", "answer: x", "--activate", "1"), 2, "--activate: each rule of a plan"),
        "several rules in one": (("--steer", "thinking: none; anser: x"), 2, "--steer: rule 2 'anser: x'"),
        "no name for requests": (("--plan", str(odd_plan(tmp_path))), 2, "not a name for requests"),
        "numbers of no map": (("--activate", "1"), 2, "--activate: of which map?"),
        "numbers of no name": (("--steering", "No Name", "--activate", "1"), 2, "steering 'No Name' is not registered"),
        "no folder": (("--maps", str(tmp_path / "x")), 2, "no such folder"),
        "no key file": (("--api-key-file", str(tmp_path / "key")), 2, "cannot be read"),
        "two keys": (("--api-key-file", str(tmp_path / "key"), "--api-key", "x"), 2, "both give a key"),
    }
    with taken:
        for case, (args, status, words) in cases.items():
            result = CliRunner().invoke(main, ["serve", "-m", "tiny", "-t", "1", "-c", "64", "--port", "0", *args])
            assert result.exit_code == status, (case, result.output)
            lines = result.output.splitlines()
            assert lines[-1].startswith("error: "), case
            assert words in lines[-1], case
    result = CliRunner().invoke(main, ["serve", "-m", str(tmp_path / "broken.json")])
    assert (result.exit_code, len(result.output.splitlines())) == (1, 1)


def test_a_plan_is_refused_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without experts, as `run` refuses it; and names that are none."""
    from steermoe_local.cli.commands import serve

    with mock.patch.object(random_models, "N_VOCAB", 1280):  # of the embedded model
        plain = write_random_model(tmp_path / "plain.gguf", RandomModel("dots1", n_layer=2, n_dense=2))
    (dense,) = copy_model(plain, tmp_path / "dense.gguf", tokenizer_of=TINY)
    monkeypatch.setattr(serve, "open_engine", lambda *_, **__: pytest.fail("the model is loaded"))
    for model, rule, status, words in (
        (dense, "answer: digits-words", 1, "no layer has experts"),
        (TINY, "answer: nothing +1", 2, "rule 1: nothing: no such file"),
    ):
        done = CliRunner().invoke(main, ["serve", "-m", str(model), "-c", "64", "--port", "0", "--steer", rule])
        assert done.exit_code == status, done.output
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


def odd_plan(folder: Path) -> Path:
    path = folder / "Odd Name.plan.json"
    path.write_text(json.dumps({"rules": ["answer: digits-words"]}))
    return path


def bare_copy(folder: Path) -> Path:
    """A map that recommends nothing."""
    path = folder / "bare.json"
    with_recommended(ExpertMap.load(shipped_maps()["digits-words"]), None).save(path)
    return path


def test_a_file_as_the_default(tmp_path: Path) -> None:
    path = bare_copy(tmp_path)
    log = tmp_path / "log"
    with program("--steering", str(path), "--activate", "2", "--deactivate", "2", log=log) as (_, url):
        assert "steering: bare)" in log.read_text()
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60, trust_env=False).json()
        assert (answer["steering"]["name"], answer["steering"]["n_active"]) == ("bare", 2)


def test_a_name_with_other_numbers_as_the_default(tmp_path: Path) -> None:
    with program("--steering", "digits-words", "--activate", "1", log=tmp_path / "log") as (_, url):
        answer = httpx.post(f"{url}/v1/chat/completions", json=QUESTION, timeout=60, trust_env=False).json()
        applied = answer["steering"]
        assert (applied["name"], applied["n_active"], applied["n_inactive"]) == ("digits-words", 1, 4)


def test_a_plan_from_the_start(tmp_path: Path) -> None:
    """Its rules name maps of the folder; a request may say otherwise, and may name the plan."""
    (tmp_path / "own.json").write_bytes(shipped_maps()["digits-words"].read_bytes())
    rules = ("--steer", "thinking: none", "--steer", "answer: own +2 -2 reverse")
    log = tmp_path / "log"
    with program(*rules, "--maps", str(tmp_path), log=log) as (_, url):
        assert "steering: start-plan)" in log.read_text()

        def answer(**fields: Any) -> tuple[str, Any]:
            body = QUESTION | fields
            data = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False).json()
            return data["choices"][0]["message"]["content"], data["steering"]

        text, steering = answer()
        assert (text, steering["name"]) == ("four", "start-plan")
        assert steering["rules"] == ["thinking: none", "answer: own +2 -2 reverse"]
        assert answer(steering="digits-words")[0] == "4"
        assert answer(steering="start-plan")[0] == "four"
    (tmp_path / "brief.plan.toml").write_text('rules = ["answer: own +2 -2 reverse"]\n')
    with program("--plan", str(tmp_path / "brief.plan.toml"), log=log) as (_, url):
        assert "steering: brief)" in log.read_text()


WITHOUT = """
import importlib.util, json, sys
from click.testing import CliRunner
HIDDEN = {"fastapi", "uvicorn", "pydantic", "prometheus_client", "llguidance"}
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in HIDDEN else real(name, *rest)
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from steermoe_local.cli import main
found = []
for args in (["--help"], ["serve", "--help"]):
    found.append(CliRunner().invoke(main, args).exit_code)
found.append("llama_cpp" in sys.modules)
refused = CliRunner().invoke(main, ["serve", "-m", "tiny"])
print(json.dumps([*found, refused.exit_code, refused.output]))
"""


def test_without_the_extra() -> None:
    """`steermoe --help` works and loads nothing; serve says what is missing."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, check=True)
    message = "error: the server needs fastapi; run pip install steermoe-local again\n"
    assert json.loads(done.stdout) == [0, 0, False, 2, message]


#
# the alternative: llama-server with one steering for all
#


def test_llama_server_is_steered_by_the_environment(tmp_path: Path) -> None:
    server = BUILD / "bin" / "llama-server"
    if not server.exists():
        (pytest.fail if os.environ.get("STEERMOE_REQUIRE_TOOLS") else pytest.skip)(
            "llama-server is not built: make tools"
        )
    digits = ExpertMap.load(shipped_maps()["digits-words"])
    answers = {}
    for name, reverse in (("digits", False), ("words", True)):
        bias = tmp_path / f"{name}.gguf"
        write_bias(BiasFile.from_signs(digits.choose(2, 2, reverse=reverse), digits.identity), bias)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [server, "-m", TINY, "--host", "127.0.0.1", "--port", port, "-c", 512, "-np", 1, "-t", 1, "--jinja"]
        process = subprocess.Popen(
            list(map(str, command)),
            env=os.environ | {"STEERMOE_BIAS": str(bias)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            until(lambda port=port: healthy(port), seconds=60)
            url = f"http://127.0.0.1:{port}/v1/chat/completions"
            body = httpx.post(url, json=QUESTION | {"max_tokens": 8}, timeout=30, trust_env=False).json()
            answers[name] = body["choices"][0]["message"]["content"]
        finally:
            process.terminate()
            process.wait(20)
    assert answers == {"digits": "4", "words": "four"}


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=60, trust_env=False).status_code == 200
    except httpx.HTTPError:
        time.sleep(0.1)
        return False


def test_the_configuration_masks_the_key(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[serve]\napi-key = "s3cret"\nport = 0\n')
    command = [sys.executable, "-c", "from steermoe_local.cli import main; main()", "config", "show", "--json", "serve"]
    env = os.environ | {"STEERMOE_CONFIG": str(path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert "s3cret" not in done.stdout
    shown = {row["option"]: row["value"] for row in json.loads(done.stdout)["settings"]}
    assert shown["api-key"] == "********"
    assert shown["port"] == 0


def test_reasoning_that_is_not_known_is_said(tmp_path: Path) -> None:
    (model,) = copy_model(TINY, tmp_path / "m.gguf", template="{{ messages[0].content }}{{ reasoning_effort }}")
    log = tmp_path / "log"
    with program("-m", str(model), log=log):
        lines = [line for line in log.read_text().splitlines() if "reasoning" in line]
    assert len(lines) == 1
    assert "m.gguf" in lines[0]
