"""Many at once: one batch, fair turns, limits, clients that go away, failures that stay where they belong."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local import ModelError, NativeError
from steermoe_local.generation import context
from steermoe_local.generation.engine import Engine
from steermoe_local.server.fair_queue import FairQueue
from tests.support.running_server import Load, Running, asking, requests_begun, running, slow, unending, until

QUESTIONS = (
    "Which number comes after three?",
    "Please count starting at eleven until fifteen.",
    "Add 4 and 6.",
    "What is the opposite of poor?",
)
STEERINGS: tuple[Any, ...] = (
    None,
    "digits-words",
    {"map": "digits-words", "reverse": True},
    {"map": "document-memory", "mode": "soft", "scale": 2.0},
)
ENDLESS = {"logit_bias": {"0": -100}, "max_tokens": 900, "temperature": 0}  # 0 is the end: it never comes


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(n_ctx=1024) as found:
        yield found


def test_the_tokenizer_of_grammars_is_made_before_the_server_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a large vocabulary it takes over a second, in which all answers would wait."""
    with running(parallel=1) as found:
        monkeypatch.setattr(context, "guided_tokenizer", lambda vocab: pytest.fail("made when it was asked for"))
        answer = found.chat(response_format={"type": "json_object", "schema": {"const": 1}}).json()
        assert answer["choices"][0]["message"]["content"] == "1"


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@contextmanager
def endless(server: Running, n: int = 1, **fields: Any) -> Iterator[list[httpx.Response]]:
    """Answers that do not end while the block lasts."""
    body = {"prompt": "one, two,", "stream": True} | ENDLESS | fields
    with unending(server), contextlib.ExitStack() as stack:
        streams = [stack.enter_context(server.client.stream("POST", "/v1/completions", json=body)) for _ in range(n)]
        for stream in streams:
            assert stream.status_code == 200
        yield streams


#
# one batch
#


def test_eight_at_once_answer_as_each_alone(server: Running) -> None:
    asked = [(question, steering) for question in QUESTIONS for steering in STEERINGS]
    alone = [server.chat(question, steering=steering).json()["choices"][0]["message"] for question, steering in asked]
    for part in (asked[:8], asked[8:]):
        calls = [lambda q=q, s=s: server.chat(q, steering=s) for q, s in part]
        for (question, steering), response in zip(part, together(calls), strict=True):
            body = response.json()
            assert body["choices"][0]["message"] == alone[asked.index((question, steering))], (question, steering)
            name = steering["map"] if isinstance(steering, dict) else steering
            assert (body["steering"] or {}).get("name") == name


def test_they_are_decoded_in_one_batch(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.worker.engine
    assert engine is not None
    seen: list[int] = []
    step = engine.step

    def counted() -> Any:
        if not seen and engine.n_unfinished < len(STEERINGS):  # nothing begins before all are there
            time.sleep(0.001)
            return []
        seen.append(engine.n_unfinished)
        return step()

    monkeypatch.setattr(engine, "step", counted)
    body = ENDLESS | {"max_tokens": 60}
    answers = together([lambda s=s: server.complete("one,", steering=s, **body) for s in STEERINGS])
    n_tokens = sum(answer.json()["usage"]["completion_tokens"] for answer in answers)
    assert n_tokens == 240
    assert max(seen) == 4
    assert len(seen) < 150, "four answers took as many steps as four alone"


def test_choices_of_one_request_share_the_work(server: Running) -> None:
    body = server.complete("one, two,", n=4, temperature=1.0, seed=1).json()
    assert len(body["choices"]) == 4
    many = server.complete([f"{i}, {i + 1}," for i in range(20)], max_tokens=2).json()
    assert [choice["index"] for choice in many["choices"]] == list(range(20)), "more than there are slots"
    until(lambda: server.worker.n_running == 0)


#
# waiting
#


def test_who_waits_is_told_how_long(server: Running) -> None:
    with running(n_ctx=1024, parallel=1, queue_limit=2) as small:
        with endless(small):
            until(lambda: small.worker.n_running == 1)
            with ThreadPoolExecutor(2) as pool:
                waiting = [pool.submit(small.complete, "one,", max_tokens=1) for _ in range(2)]
                until(lambda: small.worker.n_waiting == 2)
                health = small.client.get("/health").json()
                assert health == {"status": "ok", "slots": {"total": 1, "busy": 1}, "waiting": 2}
                response = small.complete("one,", max_tokens=1)
                assert response.status_code == 429
                assert int(response.headers["Retry-After"]) >= 1
                error = response.json()["error"]
                assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                assert "steermoe_waiting 2.0" in small.client.get("/metrics").text
                small.worker.cancel(next(entry.ticket for entry in small.worker._running.values()))
                assert [future.result().status_code for future in waiting] == [200, 200]
        assert small.complete("one,", max_tokens=1).status_code == 200
        assert 'status="429"' in small.client.get("/metrics").text


def test_nobody_waits_when_nobody_may() -> None:
    with running(n_ctx=1024, parallel=2, queue_limit=0) as small:
        assert [r.status_code for r in together([lambda: small.complete("one,")] * 2)] == [200, 200]
        with endless(small, 2):
            assert small.complete("one,").status_code == 429


def test_a_large_request_holds_up_nobody() -> None:
    """Forty prompts of one client, then one of the same client: it comes after the next one, not after all."""
    with running(n_ctx=1024, parallel=1) as small, ThreadPoolExecutor(2) as pool:
        engine = small.worker.engine
        assert engine is not None
        step, add = engine.step, engine.add
        go = threading.Event()
        begun: list[int] = []

        def held() -> Any:
            return step() if go.wait(0.001) else []

        def noted(request: Any) -> None:
            begun.append(request.max_tokens)
            add(request)

        engine.step, engine.add = held, noted  # type: ignore[method-assign]
        large = pool.submit(small.complete, ["one, two,"] * 40, max_tokens=3, logit_bias={"0": -100})
        until(lambda: begun and small.worker.n_waiting == 1)
        late = pool.submit(small.complete, "one,", max_tokens=1)
        until(lambda: small.worker.n_waiting == 2)
        go.set()
        assert late.result().status_code == large.result().status_code == 200
        assert begun == [3, 3, 1] + [3] * 38


Order = list[tuple[str, int]]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), max_size=40))
def test_turns(items: Order) -> None:
    queue: FairQueue[tuple[str, int, int]] = FairQueue()
    for number, (client, group) in enumerate(items):
        queue.put(client, group, (client, group, number))
    assert queue.n_groups == len(set(items))
    assert sorted(queue) == sorted((client, group, number) for number, (client, group) in enumerate(items))
    out = list(iter(queue.get, None))
    assert sorted(out) == sorted((client, group, number) for number, (client, group) in enumerate(items))
    assert queue.get() is None
    for key in set(items):  # a group's items keep their order
        numbers = [number for client, group, number in out if (client, group) == key]
        assert numbers == sorted(numbers)
    clients = [client for client, _, _ in out]
    for place, client in enumerate(clients):  # nobody comes twice before another who waits
        waiting = set(clients[place:])
        if place and clients[place - 1] == client:
            assert waiting == {client}


def test_turns_are_taken_out() -> None:
    queue: FairQueue[int] = FairQueue()
    for client, group, item in (("a", 1, 1), ("a", 2, 2), ("b", 1, 3), ("a", 1, 4)):
        queue.put(client, group, item)
    assert queue.drop("a", 1) == [1, 4]
    assert queue.drop("a", 1) == []
    assert queue.drop("c", 1) == []
    assert list(iter(queue.get, None)) == [2, 3]


def test_a_stream_that_takes_too_long() -> None:
    with running(n_ctx=1024, parallel=1, timeout=3600) as small, endless(small) as (stream,):
        (entry,) = small.worker._running.values()
        # of the server's setting, less what has passed since the request came
        assert 0 < entry.ticket.deadline - time.monotonic() < 3600
        entry.ticket.deadline = 0.0
        text = stream.read().decode()
        assert '"code":"timeout"' in text.strip().split("\n\n")[-1], "a stream that ends too early says so"
        assert "[DONE]" not in text
        until(lambda: small.worker.n_running == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seconds", [1e-6, 0.5])
def test_a_request_that_takes_too_long(stream: bool, seconds: float) -> None:
    """In the first case it is late before its first token on any machine."""
    with running(n_ctx=1024, parallel=1, timeout=seconds) as small:
        body = {"prompt": "one, two,", "stream": stream} | ENDLESS
        with unending(small):
            response = small.client.post("/v1/completions", json=body)
        if stream and response.status_code == 200 and seconds > 1e-6:  # it had begun, as on most machines
            assert '"code":"timeout"' in response.text.strip().split("\n\n")[-1]
        else:
            assert response.status_code == 408
            assert response.json()["error"]["code"] == "timeout"
            assert response.headers["x-should-retry"] == "false"
        assert small.worker.n_running == 0


@pytest.mark.parametrize("stream", [False, True])
def test_after_one_that_took_too_long(stream: bool) -> None:
    """The one that waits behind it is answered, in its own time."""
    with running(n_ctx=1024, parallel=1) as small, unending(small), ThreadPoolExecutor(2) as pool:
        body = {"prompt": "one, two,", "stream": stream} | ENDLESS
        first = pool.submit(small.client.post, "/v1/completions", json=body)
        until(lambda: small.worker.n_running == 1)
        second = pool.submit(small.complete, "one,", max_tokens=1)
        until(lambda: small.worker.n_waiting == 1)
        (entry,) = small.worker._running.values()
        entry.ticket.deadline = 0.0
        assert second.result().status_code == 200
        assert '"code":"timeout"' in first.result().text


def test_waiting_counts_as_well() -> None:
    with running(n_ctx=1024, parallel=1, timeout=0.5) as small, unending(small):
        calls = [lambda: small.complete("one, two,", **ENDLESS)] * 3
        assert [response.status_code for response in together(calls)] == [408, 408, 408]
        assert small.worker.n_waiting == small.worker.n_running == 0


#
# going away
#


def test_a_stream_that_is_closed(server: Running) -> None:
    with endless(server, 3) as streams:
        lines = streams[0].iter_lines()
        assert next(lines).startswith("data: ")
        until(lambda: server.worker.n_running == 3)
        streams[0].close()
        until(lambda: server.worker.n_running == 2)
    until(lambda: server.worker.n_running == 0)
    assert server.worker.engine is not None
    held = [len(slot.tokens) for slot in server.worker.engine._slots]
    assert max(held) < 900, "they were computed to their end"
    assert 'status="gone"' in server.client.get("/metrics").text


def test_a_client_that_does_not_wait(server: Running) -> None:
    with unending(server):
        with asking(server, "/v1/completions", {"prompt": "one, two,"} | ENDLESS):
            until(lambda: server.worker.n_running == 1)
        until(lambda: server.worker.n_running == 0)
    assert server.worker.engine is not None
    assert all(len(slot.tokens) < 900 for slot in server.worker.engine._slots)


def test_one_who_waits_and_goes() -> None:
    with running(n_ctx=1024, parallel=1) as small, endless(small):
        until(lambda: small.worker.n_running == 1)
        for stream in (False, True):
            body = {"prompt": "one,", "stream": stream, "max_tokens": 1}
            with asking(small, "/v1/completions", body):
                until(lambda: small.worker.n_waiting == 1)
            until(lambda: small.worker.n_waiting == 0)
        assert small.worker.n_running == 1


def test_what_was_computed_before_a_cancel_is_used(server: Running) -> None:
    prompt = "zinc, " * 60
    with endless(server, prompt=prompt) as streams:
        lines = streams[0].iter_lines()
        for _ in range(6):
            next(lines)
    until(lambda: server.worker.n_running == 0)
    usage = server.complete(prompt, max_tokens=1).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1


def test_one_who_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer ends, and when the time for sending is over its connection, too."""
    begun = requests_begun(monkeypatch)
    with running(n_ctx=1024, parallel=1, write_seconds=0.5) as small:
        body = {"prompt": "one,", "stream": True, "logprobs": 20} | ENDLESS
        with asking(small, "/v1/completions", body) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            until(lambda: len(begun) == 1)
            until(lambda: small.worker.n_running == 0, seconds=60)
        assert small.complete("one,", max_tokens=1).status_code == 200


#
# failures
#


def test_a_failing_step_ends_what_runs_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with running(n_ctx=1024, parallel=2) as small:
        engine = small.worker.engine
        assert engine is not None
        decode = engine._context.decode
        fail = threading.Event()

        def failing(parts: Any) -> Any:
            if fail.is_set():
                fail.clear()
                raise NativeError("llama_decode failed with -3")
            return decode(parts)

        monkeypatch.setattr(engine._context, "decode", failing)
        with endless(small) as streams:
            lines = streams[0].iter_lines()
            next(lines)
            fail.set()
            rest = [line for line in lines if line]
            assert "decoding failed: llama_decode failed with -3" in rest[-1]
            assert "[DONE]" not in rest
        answer = small.chat().json()["choices"][0]["message"]["content"]
        fail.set()
        response = small.chat()
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "native_error"
        assert small.chat().json()["choices"][0]["message"]["content"] == answer
        assert small.worker.state == "ok"


def test_a_request_that_the_engine_refuses_is_alone(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = server.worker.engine
    assert engine is not None
    add = engine.add

    def refusing(request: Any) -> None:
        if request.max_tokens == 7:
            raise RuntimeError("a secret of the server")
        if request.max_tokens == 8:
            raise ModelError("this cannot be")
        add(request)

    monkeypatch.setattr(engine, "add", refusing)
    responses = together([lambda n=n: server.complete("one,", max_tokens=n) for n in (6, 7, 8, 9)])
    assert [response.status_code for response in responses] == [200, 500, 400, 200]
    assert "secret" not in responses[1].text
    assert responses[2].json()["error"]["message"] == "this cannot be"


#
# beginning and end
#


def test_health_while_the_model_is_loaded() -> None:
    gate = threading.Event()

    def gated(load: Load) -> Load:
        @contextmanager
        def waits() -> Iterator[Engine]:
            gate.wait(20)
            with load() as engine:
                yield engine

        return waits

    with running(load=gated, wait=False, parallel=1) as server:
        response = server.client.get("/health")
        assert (response.status_code, response.json()["status"]) == (503, "loading")
        asked = [server.chat(), server.complete(), server.client.get("/v1/models"), server.client.get("/v1/steering")]
        asked += [server.client.post("/v1/steering", json={"name": "a", "map": "b"})]
        asked += [server.client.post("/tokenize", json={"content": "a"})]
        for response in asked:
            assert response.status_code == 503
            assert int(response.headers["Retry-After"]) >= 1
            assert response.json()["error"]["code"] == "loading"
        assert "steermoe_ready 0.0" in server.client.get("/metrics").text
        gate.set()
        until(lambda: server.worker.state == "ok")
        assert server.client.get("/health").status_code == 200
        assert server.chat().status_code == 200


def test_a_model_that_does_not_load() -> None:
    def broken(_: Load) -> Load:
        @contextmanager
        def fails() -> Iterator[Engine]:
            raise ModelError("m.gguf: broken")
            yield

        return fails

    with running(load=broken, wait=False) as server:
        until(lambda: server.worker.state == "failed")
        assert str(server.worker.error) == "m.gguf: broken"
        assert server.client.get("/health").json()["status"] == "failed"
        assert server.chat().json()["error"]["message"] == "the model could not be loaded"


def test_stopping_tells_those_who_wait() -> None:
    with running(n_ctx=1024, parallel=1) as server, ThreadPoolExecutor(2) as pool:
        slow(server, 0.01)
        waiting = [pool.submit(server.complete, "one, two,", **ENDLESS) for _ in range(2)]
        until(lambda: server.worker.n_waiting == 1 and server.worker.n_running == 1)
        server.worker.stop()
        for future in waiting:
            assert future.result().status_code == 503
            assert future.result().json()["error"]["code"] == "stopping"
        assert server.chat().status_code == 503
        assert server.client.get("/health").json()["status"] == "stopped"


def test_nothing_is_left_behind(server: Running) -> None:
    """Mixed requests, many of them given up: slots, queue and memory are as before."""
    import gc

    def some(i: int) -> None:
        steering = STEERINGS[i % len(STEERINGS)]
        if i % 3:
            assert server.chat(QUESTIONS[i % 4], steering=steering).status_code == 200
            return
        body = {"prompt": f"{i}, one,", "stream": bool(i % 2), "steering": steering} | ENDLESS
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/completions", json=body, timeout=0.1, trust_env=False)

    def round_() -> int:
        together([lambda i=i: some(i) for i in range(8)])
        until(lambda: server.worker.n_running == 0 and server.worker.n_waiting == 0)
        gc.collect()
        return len(gc.get_objects())

    round_()
    first = round_()
    later = round_()
    assert later < first * 1.05, "objects pile up"
    assert server.worker._outgoing == {}
    assert server.worker._cancels == []
