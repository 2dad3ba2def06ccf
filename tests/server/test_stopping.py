"""SIGTERM and Ctrl-C end the server within its deadline, whatever it is doing."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.support.raw_http import connect, error_of, exchange, get, post, rest_of, status_of
from tests.support.running_server import until

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")

# The program with other deadlines; {before} changes it further.
START = """
import dataclasses, subprocess, sys, threading, time
from steermoe_local.cli import main
from steermoe_local.generation.engine import Engine
from steermoe_local.server import program
from steermoe_local.server.service import Service
run_server = program.run_server
program._TOLD_SECONDS, program._ENDED_SECONDS = {told}, {ended}
def short(settings, *rest, **named):
    run_server(dataclasses.replace(settings, stop_seconds={seconds}), *rest, **named)
program.run_server = short
step = Engine.step
{before}
sys.argv[1:] = ["serve", "-m", "tiny", "--port", "0", "-t", "1", "-np", "2", "-c", "1024", "--queue", "4"]
main()
"""
ENDLESS = {"prompt": "one, two,", "logit_bias": {"0": -100}, "max_tokens": 4000}
BEFORE = {
    "never ends": "Engine.step = lambda engine: time.sleep(0.01) or []",
    "one step takes for ever": "Engine.step = lambda engine: time.sleep(1000)",  # releases Python's lock, as llama.cpp
    "the event loop computes": "def models(service):\n    while True: pass\nService.models = models",
    "a thread computes": "from steermoe_local.server.prompting import Prompter\n"
    "def for_ever(*_, **__):\n    while True: pass\n"
    "Prompter.tokens_of = for_ever",
    "the jobs do not end": "from steermoe_local.server.learn_jobs import LearnJobs\n"
    "LearnJobs.close = lambda jobs: time.sleep(1000)",
    "the model loads": "def load(*_, **__):\n    print('loading', file=sys.stderr, flush=True)\n    time.sleep(1000)\n"
    "Engine.__init__ = load",
    "a child": "print('child', subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']).pid, "
    "file=sys.stderr, flush=True)\nEngine.step = lambda engine: time.sleep(1000)",
}


@dataclass
class Program:
    """The server in a process."""

    process: subprocess.Popen[bytes]
    url: str
    written: Callable[[], str]

    def stop(self, *signals: int) -> int:
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def started(
    before: str = "", seconds: float = 0.5, ready: str = r"http://\S+:\d+", in_order: bool = True
) -> Iterator[Program]:
    """`seconds`: what answers are given; `in_order`: what follows has time for it on any machine, else a second."""
    with tempfile.TemporaryFile("w+") as log:

        def written() -> str:
            log.seek(0)
            return log.read()

        told, ended = (100, 200) if in_order else (0.5, 1.5)
        start = START.format(before=before, seconds=seconds, told=told, ended=ended)
        command = [sys.executable, "-c", start]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log) as process:
            try:
                until(lambda: process.poll() is not None or re.search(ready, written()), seconds=60)
                found = re.search(ready, written())
                assert found, written()
                yield Program(process, found[0], written)
                assert "Traceback" not in written(), written()
            finally:
                process.kill()


SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize("number", SIGNALS)
def test_connections_that_say_nothing(number: int) -> None:
    """They are closed at once: the end is in order, and no answer's time is waited for."""
    beginnings = (b"", b"GET /hea", post("/tokenize", {"content": "a"})[:-1], get("/health", "Host: localhost"))
    with started(seconds=1000) as program, ExitStack() as stack:
        opened = [stack.enter_context(connect(program.url, data)) for data in beginnings for _ in range(60)]
        for _ in range(2):  # by then all of them were accepted, and read
            assert status_of(exchange(program.url, get())) == 200
        assert program.stop(number) == 0
        told = [rest_of(one) for one in opened[120:180]]
        assert {(status_of(answer), error_of(answer)["code"]) for answer in told} == {(503, "stopping")}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_take_too_long_are_told(stream: bool) -> None:
    with started(BEFORE["never ends"]) as program:
        with connect(program.url, post("/v1/completions", ENDLESS | {"stream": stream}), timeout=60) as connection:
            until(lambda: b'"busy":1' in exchange(program.url, get()))
            assert program.stop(signal.SIGTERM) == 0
            answer = rest_of(connection)
        assert (status_of(answer), error_of(answer)["code"]) == (503, "stopping")


def test_a_stream_ends_with_an_error() -> None:
    slowly = "def slowly(engine):\n    time.sleep(0.02)\n    return step(engine)\nEngine.step = slowly"
    with started(slowly) as program:
        with connect(program.url, post("/v1/completions", ENDLESS | {"stream": True}), timeout=60) as connection:
            assert b"200 OK" in connection.recv(65536)
            assert program.stop(signal.SIGTERM) == 0
            events = [line for line in rest_of(connection).split(b"\n") if line.startswith(b"data: ")]
        assert json.loads(events[-1].removeprefix(b"data: "))["error"]["code"] == "stopping"


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize(
    ("doing", "request_"),
    [
        ("one step takes for ever", post("/v1/completions", ENDLESS)),
        ("the event loop computes", get("/v1/models")),
        ("a thread computes", post("/tokenize", {"content": "a"})),
    ],
)
def test_what_does_not_end_is_ended(doing: str, request_: bytes, number: int) -> None:
    with started(BEFORE[doing], in_order=False) as program, connect(program.url, request_):
        busy = psutil.Process(program.process.pid)
        if doing == "one step takes for ever":
            until(lambda: b'"busy":1' in exchange(program.url, get()))
        else:
            used = busy.cpu_times().user
            until(lambda: busy.cpu_times().user > used + 0.3)
        assert program.stop(number) == 130


def test_while_the_model_loads() -> None:
    for number in SIGNALS:
        with started(BEFORE["the model loads"], seconds=1000, ready="loading", in_order=False) as program:
            assert program.stop(number) == 130


def test_a_second_signal_ends_it_at_once_and_its_children() -> None:
    for first in SIGNALS:
        with started(BEFORE["a child"], seconds=1000) as program:
            with connect(program.url, post("/v1/completions", ENDLESS)):
                until(lambda program=program: b'"busy":1' in exchange(program.url, get()))
                found = re.search(r"child (\d+)", program.written())
                assert found
                child = psutil.Process(int(found[1]))
                program.process.send_signal(first)
                until(lambda program=program: "finishing 1 answers" in program.written())
                assert program.stop(signal.SIGTERM) == 130
            until(lambda child=child: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("doing", ["", "the jobs do not end"])
def test_what_learns_and_what_reads_markdown_end_with_it(doing: str, number: int, tmp_path: Path) -> None:
    """In order, or by the deadline if the thread of the jobs does not end."""
    before = f"import os\nos.environ['STEERMOE_MAPS'] = {str(tmp_path)!r}\n{BEFORE.get(doing, '')}"
    with started(before, seconds=1, in_order=not doing) as program:
        lesson = {"name": "digits", "like": "Use digits.", "unlike": "Use words."}
        ask = post("/v1/learn", lesson, "Connection: close")
        assert status_of(exchange(program.url, ask)) == 202
        assert status_of(exchange(program.url, post("/page/markdown", {"text": "a *b*"}, "Connection: close"))) == 200
        until(lambda: b'"step":null' not in exchange(program.url, get("/v1/learn")), seconds=300)
        children = psutil.Process(program.process.pid).children(recursive=True)
        commands = [" ".join(child.cmdline()) for child in children]
        for module in ("own_program", "_util.markdown"):
            assert any(module in command for command in commands), commands
        assert program.stop(number) == (130 if doing else 0), program.written()
    for child in children:
        until(lambda child=child: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
