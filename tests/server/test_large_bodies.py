"""Large and hostile bodies: parsed and validated once, in one thread, while the event loop answers others."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from steermoe_local.server import json_requests
from tests.server.test_stopping import started
from tests.support.running_server import Running, running, until

JSON_TYPE = {"Content-Type": "application/json"}
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def post(server: Running, path: str, body: bytes) -> httpx.Response:
    with httpx.Client(base_url=server.url, timeout=120, trust_env=False) as client:
        return client.post(path, content=body, headers=JSON_TYPE)


def message(n: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x" * n}], "max_tokens": 1}


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(what, thread) of each parse and validation from now on."""
    found: list[tuple[str, str]] = []
    parse, validate = json_requests.strict_json, json_requests.JsonRoute._validated

    def parsing(data: bytes) -> Any:
        found.append(("parse", threading.current_thread().name))
        return parse(data)

    def validating(self: Any, value: Any) -> Any:
        found.append(("validate", threading.current_thread().name))
        return validate(self, value)

    monkeypatch.setattr(json_requests, "strict_json", parsing)
    monkeypatch.setattr(json_requests.JsonRoute, "_validated", validating)
    return found


def test_a_large_body_is_parsed_and_validated_in_the_thread(server: Running, works: list[tuple[str, str]]) -> None:
    assert server.client.post(CHAT, json=message(20_000)).status_code == 400, "too long for the context"
    assert [what for what, _ in works] == ["parse", "validate"]
    assert {thread for _, thread in works} == {"steermoe-bodies_0"}
    works.clear()
    assert server.client.post(CHAT, json=message(10)).status_code == 200
    assert [what for what, _ in works] == ["parse"]
    assert works[0][1] != "steermoe-bodies_0"


def test_health_answers_while_bodies_are_parsed(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty bodies wait behind one whose parsing does not end: nothing else waits for it."""
    go, running_now, most = threading.Event(), [0], [0]

    def endless(data: bytes) -> Any:
        running_now[0] += 1
        most[0] = max(most[0], running_now[0])
        go.wait(60)
        running_now[0] -= 1
        return json.loads(data)

    monkeypatch.setattr(json_requests, "strict_json", endless)
    body = json.dumps(message(20_000)).encode()
    with ThreadPoolExecutor(20) as pool:
        try:
            answers = [pool.submit(post, server, CHAT, body) for _ in range(20)]
            until(lambda: most[0] == 1)
            for _ in range(10):
                assert server.client.get("/health").status_code == 200
            assert not any(answer.done() for answer in answers)
        finally:
            go.set()
        assert {answer.result().status_code for answer in answers} == {400}
    assert most[0] == 1


BODIES: dict[str, tuple[str, bytes, str]] = {
    "one key": (CHAT, b"{" + b",".join([b'"a":1'] * 10_000) + b"}", "'a' stands twice"),
    "the last key": (CHAT, b"{" + b"".join(b'"%d":1,' % i for i in range(6000)) + b'"0":1}', "'0' stands twice"),
    "a long key": (CHAT, b'{"%s":1,"%s":2}' % (b"k" * 500_000, b"k" * 500_000), "stands twice"),
    "unknown fields": (CHAT, json.dumps(dict.fromkeys(map(str, range(9000)))).encode(), "0: unknown field"),
    "a number of digits": (CHAT, b'{"seed": ' + b"1" * 900_000 + b"}", "900000 characters"),
    "arrays": (CHAT, b'{"metadata": [' + b"[]," * 200_000 + b"1]}", "100000 arrays"),
    "values": ("/v1/completions", b'{"prompt": [' + b"1," * 1_000_001 + b"1]}", "1000000 values"),
    "tokens": ("/v1/completions", json.dumps({"prompt": [1] * 400_000}).encode(), "400000 tokens"),
    "tokens that are none": ("/detokenize", json.dumps({"tokens": [1] * 200_000 + [-1]}).encode(), "tokens[200000]"),
    "biases": (CHAT, json.dumps({**message(1), "logit_bias": {str(i): 1 for i in range(9999)}}).encode(), "logit_bias"),
    "stops": (CHAT, json.dumps({**message(1), "stop": ["x"] * 100_000}).encode(), "stop"),
    "messages": (CHAT, json.dumps({"messages": message(1)["messages"] * 5000}).encode(), "messages"),
    "rules": (CHAT, json.dumps({**message(1), "steering": ["answer: none"] * 60_000}).encode(), "1 to 64 rules"),
    "a long rule": (CHAT, json.dumps({**message(1), "steering": "answer: " + "x" * 900_000}).encode(), "4096"),
    "a rule of quotes": (CHAT, json.dumps({**message(1), "steering": ["'" * 4000]}).encode(), "rule 1"),
    "a long phase": (
        CHAT,
        json.dumps({**message(1), "steering": {"rules": [{"phase": "x\n" * 300_000, "map": None}]}}).encode(),
        "no phase",
    ),
    "a deep rule": (
        CHAT,
        json.dumps(message(1))[:-1].encode() + b', "steering": [{"after": ' + b"[" * 50 + b"1" + b"]" * 50 + b"}]}",
        "rule 1: after",
    ),
    "a wide rule": (
        CHAT,
        json.dumps({**message(1), "steering": [{"tokens": [0] * 300_000, "map": None}]}).encode(),
        "rule 1: tokens",
    ),
    "fields of a rule": (
        CHAT,
        json.dumps({**message(1), "steering": [dict.fromkeys(map(str, range(9000)))]}).encode(),
        "rule 1: '0': not a field",
    ),
    "rules to register": (
        "/v1/steering",
        json.dumps({"name": "x", "rules": [{"map": "y" * 15_000}] * 64}).encode(),
        "rule 1: ",
    ),
    "a large map": ("/v1/steering", json.dumps({"name": "x", "map": {"rd": [0.5] * 200_000}}).encode(), "expert map"),
    "a large bias": ("/v1/steering", json.dumps({"name": "x", "bias": "A" * 900_000}).encode(), "GGUF"),
}


@pytest.mark.parametrize("name", BODIES)
def test_hostile_bodies_are_refused_in_few_words(server: Running, name: str) -> None:
    path, body, words = BODIES[name]
    answer = post(server, path, body)
    assert answer.status_code == 400, answer.text[:500]
    assert words in answer.json()["error"]["message"]
    assert len(answer.content) < 2000


def test_values_behind_large_bodies_are_those_that_were_sent(server: Running) -> None:
    text = "one, two, " * 3000
    answer = server.client.post("/tokenize", json={"content": text, "with_pieces": True}).json()
    assert "".join(token["piece"] for token in answer["tokens"]) == text
    assert answer["count"] == len(answer["tokens"])
    tokens = server.client.post("/tokenize", json={"content": text}).json()["tokens"]
    assert tokens == [token["id"] for token in answer["tokens"]]
    assert server.client.post("/detokenize", json={"tokens": tokens}).json()["content"] == text
    padded = json.dumps(message(1)).encode() + b" " * 20_000
    large, small = (post(server, CHAT, body).json()["choices"][0] for body in (padded, padded.strip()))
    assert large["message"] == small["message"]


COUNTED = """
import gc
inner = program.run_server
def counted(settings, registry, load, say, *rest, **named):
    def counting(line):
        say(line)
        say(f"frozen {gc.get_freeze_count()} of {len(gc.get_objects())}")
    inner(settings, registry, load, counting, *rest, **named)
program.run_server = counted
"""


def test_collections_of_garbage_do_not_look_at_the_program() -> None:
    """They hold Python's lock for as long as they look, and a large body causes several."""
    with started(COUNTED, ready=r"frozen [1-9]\d* of \d+") as program:
        _, frozen, _, others = program.url.split()
        assert int(others) < 5000 < 50_000 < int(frozen)
