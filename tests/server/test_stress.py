"""The real server under load: many at once under mixed steerings, clients that are killed, bodies meant to hurt."""

from __future__ import annotations

import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from steermoe_local import BiasFile, ExpertMap, SteeredLlama
from steermoe_local.models.shipped_maps import shipped_maps
from tests.support.running_server import TINY, until
from tests.support.serving import Process, serving

N_REQUESTS, CONCURRENCY = 200, 16
QUESTIONS = (
    "Which number comes after three?",
    "Which number comes before eleven?",
    "Please count starting at eleven until fifteen.",
    "Add 4 and 6.",
    "What is the opposite of poor?",
    "Document: The zinc is red. Question: Which colour is the zinc?",
)
STEERINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "digits": {"map": "digits-words", "activate": 2, "deactivate": 2},
    "words": {"map": "digits-words", "activate": 2, "deactivate": 2, "reverse": True},
    "document": {"map": "document-memory", "activate": 4, "deactivate": 4},
    "soft": {"map": "digits-words", "activate": 6, "deactivate": 6, "reverse": True, "mode": "soft", "scale": 3.0},
}
ENDLESS = {"prompt": "one, two,", "logit_bias": {"0": -100}, "max_tokens": 4000, "stream": True}  # 0 is the end
linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    with serving("--temp", 0, n_ctx=4096) as found:
        yield found


def bias_of(choice: dict[str, Any] | None) -> BiasFile | None:
    """The bias that a choice means, built without the server."""
    if choice is None:
        return None
    expert_map = ExpertMap.load(shipped_maps()[choice["map"]])
    signs = expert_map.choose(choice["activate"], choice["deactivate"], reverse=choice.get("reverse", False))
    if choice.get("mode") == "soft":
        return BiasFile.from_soft(signs, expert_map.identity, choice["scale"])
    return BiasFile.from_signs(signs, expert_map.identity)


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, str], str]:
    """What SteeredLlama answers, one question at a time."""
    llama = SteeredLlama(TINY, n_ctx=512, n_threads=1)
    found = {}
    for steering, choice in STEERINGS.items():
        llama.set_bias(bias_of(choice))
        for question in QUESTIONS:
            messages = [{"role": "user", "content": question}]
            body: Any = llama.create_chat_completion(messages, temperature=0, max_tokens=24)
            found[question, steering] = str(body["choices"][0]["message"]["content"])
    llama.close()
    return found


def ask(client: httpx.Client, question: str, steering: str, stream: bool) -> str:
    """An answer's text."""
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": 24, "steering": STEERINGS[steering]}
    response = client.post("/v1/chat/completions", json=body | {"stream": stream})
    assert response.status_code == 200, response.text
    if not stream:
        return str(response.json()["choices"][0]["message"]["content"])
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    deltas = [choice["delta"] for line in lines[:-1] for choice in json.loads(line)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def counters(client: httpx.Client) -> Counter[str]:
    """The metrics' values by name, labels summed up."""
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^(\w+)(?:\{.*\})? (\S+)$", client.get("/metrics").text, re.MULTILINE):
        found[name] += float(value)
    return found


def test_each_of_200_answers_is_the_one_alone(server: Process, alone: dict[tuple[str, str], str]) -> None:
    assert len({alone[QUESTIONS[0], steering] for steering in STEERINGS}) > 1, "the steerings do something"
    rng = random.Random(6)
    asked = [(rng.choice(QUESTIONS), rng.choice(list(STEERINGS)), rng.random() < 0.3) for _ in range(N_REQUESTS)]
    before = counters(server.client)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    with (
        httpx.Client(base_url=server.url, timeout=120, trust_env=False, limits=limits) as client,
        ThreadPoolExecutor(CONCURRENCY) as pool,
    ):
        answers = list(pool.map(lambda one: ask(client, *one), asked))
    wrong = {
        one: (answer, alone[one[:2]]) for one, answer in zip(asked, answers, strict=True) if answer != alone[one[:2]]
    }
    assert not wrong
    assert server.idle()
    after = counters(server.client)
    assert after["steermoe_requests_total"] - before["steermoe_requests_total"] == N_REQUESTS
    assert after["steermoe_cached_prompt_tokens_total"] > before["steermoe_cached_prompt_tokens_total"]


#
# clients that are killed
#


def request(server: Process, body: bytes, *, length: int | None = None, path: str = "/v1/completions") -> bytes:
    host, port = server.address
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}:{port}", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(body) if length is None else length}"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode() + body


def begin(server: Process, steering: str) -> socket.socket:
    """Ask for a long answer."""
    found = socket.create_connection(server.address, timeout=30)
    found.sendall(request(server, json.dumps(ENDLESS | {"steering": STEERINGS[steering]}).encode()))
    return found


def reset(connection: socket.socket) -> None:
    """Close as a killed machine's router does: without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


ENDS: dict[str, Callable[[socket.socket], None]] = {"close": socket.socket.close, "reset": reset}


@linux
def test_clients_that_are_killed_leave_nothing(server: Process) -> None:
    """Waves of clients, gone before the answer, in it, and while they wait; the process is as it was."""
    rng = random.Random(7)

    def wave() -> None:
        names = [list(STEERINGS)[number % len(STEERINGS)] for number in range(12)]
        connections = [begin(server, name) for name in names[:4]]
        for connection in connections:
            connection.recv(rng.randrange(1, 4000))  # an answer has begun
        connections += [begin(server, name) for name in names[4:]]
        until(lambda: server.health()[0] == 4)  # four are answered, the others wait
        rng.shuffle(connections)
        for number, connection in enumerate(connections):
            ENDS["close" if number % 2 else "reset"](connection)
        until(server.idle)

    for _ in range(2):
        wave()
    before = server.system()
    for _ in range(6):
        wave()
    until(lambda: server.system()["files"] <= before["files"])
    after = server.system()
    assert after["threads"] == before["threads"]
    assert after["memory"] < before["memory"] + 8 * 1024, "KiB"
    assert ask(server.client, QUESTIONS[0], "words", False) == "four"


CLIENT = """
import sys, urllib.request
url, body = sys.argv[1:]
request = urllib.request.Request(url + "/v1/completions", body.encode(), {"Content-Type": "application/json"})
answer = urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
print(answer.readline().decode(), flush=True)
for line in answer: pass
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGKILL")
def test_a_program_that_is_killed(server: Process) -> None:
    command = [sys.executable, "-I", "-c", CLIENT, server.url, json.dumps(ENDLESS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as program:
        assert program.stdout is not None
        assert program.stdout.readline().startswith(b"data: ")
        assert server.health()[0] == 1
        program.send_signal(signal.SIGKILL)
        until(server.idle)


#
# bodies
#

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}
HUGE = 10**30
HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "cut": b'{"messages": [',
    "latin-1": b'{"prompt": "\xe9"}',
    "utf-16": '{"prompt": "a"}'.encode("utf-16"),
    "overlong utf-8": b'{"prompt": "\xc0\x80"}',
    "surrogate": b'{"prompt": "\\ud800"}',
    "deep lists": b'{"prompt": ' + b"[" * 200_000,
    "deep objects": b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
    "huge number": b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}",
    "huge exponent": b'{"prompt": "a", "temperature": 1e99999}',
    "not a number": b'{"prompt": "a", "temperature": NaN}',
    "many keys": json.dumps({f"k{i}": i for i in range(200_000)}).encode(),
    "same key": b'{"prompt": "a", "prompt": "b"}',
    "many messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 100_000}).encode(),
    "many prompts": json.dumps({"prompt": ["a"] * 100_000}).encode(),
    "many tokens": json.dumps({"prompt": [1] * 500_000}).encode(),
    "millions of lists": b'{"prompt": [' + b"[]," * 2_000_000 + b"[]]}",
    "long text": json.dumps({"prompt": "one, " * 700_000}).encode(),
    "16 MiB and more": b" " * (17 << 20),
}
NUMBERS = (
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "repeat_penalty",
    "logprobs",
)
NUMBERS += ("repeat_last_n", "frequency_penalty", "top_logprobs", "max_completion_tokens")
for name in NUMBERS:
    for number in (-HUGE, HUGE, "1", [], 1.5 if name in ("n", "top_k", "repeat_last_n") else -1e300):
        HOSTILE[f"{name} {str(number)[:6]}"] = json.dumps({"prompt": "a"} | CHAT | {name: number}).encode()
for number in (-1, 1280, HUGE, -HUGE, 2**31):
    HOSTILE[f"token {number}"] = json.dumps({"prompt": [number], "max_tokens": 1}).encode()
    HOSTILE[f"logit_bias {number}"] = json.dumps({"prompt": "a"} | CHAT | {"logit_bias": {str(number): 1}}).encode()
for choice in (
    {"map": "../tiny"},
    {"map": "digits-words", "activate": HUGE},
    {"map": "digits-words", "layers": "0-" + "9" * 99},
):
    HOSTILE[f"steering {str(choice)[:40]}"] = json.dumps({"prompt": "a"} | CHAT | {"steering": choice}).encode()
ABSURD_BUT_ALLOWED = {"max_tokens": 2**31 - 1, "top_k": 2**31 - 1, "repeat_last_n": 2**31 - 1, "seed": -(2**63)}


def answer_to(server: Process, body: bytes, path: str) -> tuple[int, dict[str, Any]]:
    response = server.client.post(path, content=body, headers={"Content-Type": "application/json"}, timeout=600)
    return response.status_code, response.json()


@linux
def test_bodies_meant_to_hurt(server: Process) -> None:
    """All of them at once, over and over, while others are answered: each is a 4xx, and nobody notices."""
    paths = ("/v1/chat/completions", "/v1/completions")
    asked = [(name, path) for name in HOSTILE for path in paths]
    before = server.system()
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        good = [pool.submit(ask, server.client, QUESTIONS[2], steering, True) for steering in ("digits", "words")]
        found = list(pool.map(lambda one: answer_to(server, HOSTILE[one[0]], one[1]), asked))
        assert "13" in good[0].result()
        assert "thirteen" in good[1].result()
    for (name, path), (status, body) in zip(asked, found, strict=True):
        assert 400 <= status < 500, (name, path, status, str(body)[:300])
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert len(body["error"]["message"]) < 1000, name
    until(server.idle)
    after = server.system()
    assert after["threads"] <= before["threads"] + 32, "asyncio's threads, at most"
    assert after["peak"] < before["memory"] + 600 * 1024, "KiB"


@linux
def test_absurd_numbers_that_are_allowed(server: Process) -> None:
    """Whatever they ask for, no memory is taken for it."""
    before = server.system()
    for name, number in ABSURD_BUT_ALLOWED.items():
        body = {"prompt": "one,", "temperature": 0.5, "repeat_penalty": 1.1} | {"max_tokens": 2, name: number}
        if name == "max_tokens":
            body["stop"] = ["\n", ",", " "]
        began = server.cpu_seconds()
        response = server.client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        assert server.cpu_seconds() - began < 20
    assert server.system()["peak"] <= max(before["peak"], before["memory"] + 50 * 1024), "KiB"


@linux
def test_connections_that_say_nothing(server: Process) -> None:
    """Open, half a request, a length that lies: others are answered meanwhile, and closing them frees all."""
    before = server.system()
    beginnings = (b"", b"POST /v1/comp", request(server, b'{"prompt"', length=5000), request(server, b"", length=9))
    connections = []
    for number in range(80):
        connections.append(socket.create_connection(server.address, timeout=10))
        connections[-1].sendall(beginnings[number % len(beginnings)])
    assert ask(server.client, QUESTIONS[0], "digits", False) == "4"
    assert server.idle()
    for connection in connections:
        connection.close()
    until(lambda: server.system()["files"] <= before["files"] + 1)
    assert server.system()["threads"] <= before["threads"] + 32
