"""The server as it runs: uvicorn on loopback in a thread, the embedded model, one thread of computation."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from steermoe_local import SteeredLlama
from steermoe_local.generation.engine import Engine, FinishEvent, Request, Sampling
from steermoe_local.models.embedded import data_folder
from steermoe_local.server import ServerSettings, SteeringRegistry, Worker, create_app
from steermoe_local.server.connections import Connections
from steermoe_local.server.learn_jobs import LearnJobs
from steermoe_local.server.program import Server, listen, url_of

TINY = data_folder() / "tiny-moe.gguf"
GREEDY = Sampling(temperature=0)

if TYPE_CHECKING:
    import pytest

Load = Callable[[], contextlib.AbstractContextManager[Engine]]


@dataclass
class Running:
    """A server and a client of it."""

    url: str
    client: httpx.Client
    worker: Worker
    registry: SteeringRegistry
    settings: ServerSettings
    connections: Connections

    def chat(self, text: str = "Which number comes after three?", **fields: Any) -> httpx.Response:
        """Ask one question, greedily."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 24} | fields
        return self.client.post("/v1/chat/completions", json=body)

    def complete(self, prompt: Any = "one, two, three,", **fields: Any) -> httpx.Response:
        """Continue a prompt, greedily."""
        return self.client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8} | fields)

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """All chunks of a stream; it must end as streams end."""
        with self.client.stream("POST", path, json=body | {"stream": True}) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def loader(
    registry: SteeringRegistry, path: Path, n_ctx: int, parallel: int, default: str | None, type_kv: int | None
) -> Load:
    """What the worker's thread begins with."""
    cache = {} if type_kv is None else {"type_k": type_kv, "type_v": type_kv}

    @contextmanager
    def load() -> Iterator[Engine]:
        llama = SteeredLlama(path, n_ctx=64, n_batch=64, n_threads=1)
        with (
            contextlib.closing(llama),
            Engine(llama, n_ctx=n_ctx, n_slots=parallel, n_batch=256, n_threads=1, **cache) as engine,
        ):
            registry.open(engine.identity)
            registry.default = default
            yield engine

    return load


@contextmanager
def running(
    *,
    model: Path = TINY,
    parallel: int = 4,
    n_ctx: int = 512,
    type_kv: int | None = None,
    steering: str | None = None,
    load: Callable[[Load], Load] = lambda load: load,
    page: Path | None = None,
    wait: bool = True,
    jobs: Callable[[SteeringRegistry], LearnJobs] | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve until the block ends; `load` may wrap what loads the model; `jobs` makes those of learning."""
    # The tests' connections stay, however slow the machine is between two requests.
    defaults = {"sampling": GREEDY, "idle_seconds": 3600.0, "stop_seconds": 5.0}
    chosen = ServerSettings(model="tiny", port=0, **(defaults | settings))
    registry = SteeringRegistry(folder=chosen.maps_folder, writable=chosen.maps_writable)
    learning = None if jobs is None else jobs(registry)
    worker = Worker(
        load(loader(registry, model, n_ctx, parallel, steering, type_kv)),
        queue_limit=chosen.queue_limit,
        on_busy=None if learning is None else learning.set_busy,
    )
    app = create_app(worker, registry, chosen, jobs=learning, **({} if page is None else {"page": page}))
    listening = listen(chosen.host, chosen.port)
    server = Server(app, worker, chosen, listening, say=lambda line: None)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[])), daemon=True)
    thread.start()
    url = url_of(listening)
    headers = {"Authorization": f"Bearer {chosen.api_key}"} if chosen.api_key else {}
    try:
        with httpx.Client(base_url=url, timeout=30, headers=headers, trust_env=False) as client:
            until(lambda: server.started)
            if wait:
                until(lambda: worker.state != "loading")
                assert worker.state == "ok", worker.error
            yield Running(url, client, worker, registry, chosen, server.open_connections)
    finally:
        server.should_exit = True
        thread.join(20)
        listening.close()
        assert not thread.is_alive(), "the server does not stop"
        assert not worker._thread.is_alive(), "the worker does not stop"


@contextmanager
def unending(server: Running, most: int = 200, others: bool = False) -> Iterator[None]:
    """No answer reaches its end while the block lasts, however fast the machine is.

    When an answer has `most` tokens, the engine computes nothing until a request is cancelled, late or fails; with
    `others`, when all of them have, so that shorter ones come to their end beside it. The block ends when nothing runs
    any more.
    """
    engine = server.worker.engine
    assert engine is not None
    step, abort = engine.step, engine.abort
    counts: Counter[Request] = Counter()
    ending = False

    def held_step() -> Any:
        nonlocal ending
        long = [count >= most for count in counts.values()]
        if not ending and (all(long) and len(long) == engine.n_unfinished if others else any(long)):
            time.sleep(0.001)  # else the worker's loop would keep a core busy
            return []
        ending = True  # also when the step raises: the next one reports what was lost
        events = step()
        ending = False
        for request, event in events:
            if isinstance(event, FinishEvent):
                del counts[request]
            else:
                counts[request] += 1
        return events

    def noted_abort(request: Request) -> None:
        nonlocal ending
        ending = True
        abort(request)

    engine.step, engine.abort = held_step, noted_abort  # type: ignore[method-assign]
    try:
        yield
        until(lambda: server.worker.n_running == 0)
    finally:
        engine.step, engine.abort = step, abort  # type: ignore[method-assign]


def requests_begun(monkeypatch: pytest.MonkeyPatch) -> set[Request]:
    """Those that engines compute steps of from now on, also if they have ended before the test looks again."""
    step, begun = Engine.step, set[Request]()

    def noted(engine: Engine) -> Any:
        begun.update(engine._states)
        return step(engine)

    monkeypatch.setattr(Engine, "step", noted)
    return begun


def slow(server: Running, seconds: float) -> None:
    """Make every step take longer."""
    engine = server.worker.engine
    assert engine is not None
    step = engine.step

    def slowly() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slowly  # type: ignore[method-assign]


@contextmanager
def asking(server: Running, path: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request on a connection of its own, sent and not answered yet; the end of the block closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + data)
        yield connection


def until(true: Callable[[], Any], seconds: float = 20) -> None:
    """Wait for something to become true."""
    ready = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        ready.wait(0.01)
    raise AssertionError("it did not happen")
