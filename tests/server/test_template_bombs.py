"""A model whose chat template is a bomb for some messages: nobody else waits for it, and the server goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from steermoe_local.llama import template_client
from steermoe_local.llama.template_pool import MOST_CHILDREN, SECONDS_VARIABLE, TemplateLimits, TemplatePool
from steermoe_local.server.turns import Turns
from tests.support.gguf_copy import copy_model
from tests.support.hostile_templates import FOREVER, LARGE, UNREADABLE
from tests.support.running_server import Running, asking, running, until
from tests.support.templated import ANSWER, TURNS

BOMBS = (
    "{% set said = messages[-1].content %}"
    "{% if said == 'time' %}" + FOREVER + "{% elif said == 'memory' %}" + LARGE["lists doubled"] + "{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    (path,) = copy_model(tiny_path, tmp_path_factory.mktemp("bombs") / "bomb.gguf", template=BOMBS + TURNS + ANSWER)
    return path


def pool(monkeypatch: pytest.MonkeyPatch, cpu_seconds: int) -> TemplatePool:
    """The children of the next server, whose limit is CPU time alone."""
    found = TemplatePool(TemplateLimits(cpu_seconds=cpu_seconds, seconds=3600))
    monkeypatch.setattr(template_client, "default_pool", lambda: found)
    return found


@pytest.fixture
def unending(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Running, TemplatePool]]:
    """A server that lets a template run for an hour."""
    children = pool(monkeypatch, 3600)
    with running(model=model, timeout=3600) as server:
        yield server, children
    children.close()


def busy(children: TemplatePool) -> int:
    return children._n_workers - len(children._idle)


def said(server: Running) -> str:
    """The answer to an ordinary question."""
    return str(server.chat().json()["choices"][0]["message"]["content"])


def body(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 4} | fields


# On a slow machine, too, memory is what the second runs out of.
@pytest.mark.parametrize(("text", "cpu_seconds"), [("time", 1), ("memory", 60)])
def test_a_bomb_is_an_error_and_the_next_request_is_answered(
    text: str, cpu_seconds: int, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = pool(monkeypatch, cpu_seconds)
    with running(model=model) as server:
        right = said(server)
        for _ in range(2):
            for path, asked in (
                ("/v1/chat/completions", body(text)),
                ("/v1/chat/completions", body(text, stream=True)),
                ("/v1/responses", {"input": text, "max_output_tokens": 16}),
            ):
                answer = server.client.post(path, json=asked, timeout=600)
                assert answer.status_code == 400, answer.text
                error = answer.json()["error"]
                assert error["code"] == "model_unsuitable"
                assert ("too long" if text == "time" else "memory") in error["message"]
            assert said(server) == right
    children.close()


def test_others_go_on_beside_a_bomb(unending: tuple[Running, TemplatePool]) -> None:
    server, children = unending
    right = said(server)
    with asking(server, "/v1/chat/completions", body("time")):
        until(lambda: busy(children) == 1)
        for _ in range(5):
            assert said(server) == right
            assert server.complete().status_code == 200
            assert server.client.get("/health").status_code == 200
        assert busy(children) == 1, "the bomb went off too early"
    # its client has gone
    until(lambda: busy(children) == 0)
    assert said(server) == right


def test_as_many_bombs_as_children(unending: tuple[Running, TemplatePool]) -> None:
    """What needs no template is answered; the rest is when their clients have gone."""
    server, children = unending
    connections = [asking(server, "/v1/chat/completions", body("time")) for _ in range(MOST_CHILDREN + 2)]
    for connection in connections:
        connection.__enter__()
    until(lambda: busy(children) == MOST_CHILDREN)
    assert server.complete().status_code == 200
    assert server.client.post("/tokenize", json={"content": "one, two"}).status_code == 200
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(server.chat)
        for connection in connections:
            connection.__exit__(None, None, None)
        assert waiting.result(600).status_code == 200
    until(lambda: busy(children) == 0)


def test_the_timeout_covers_the_template(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = pool(monkeypatch, 3600)
    with running(model=model, timeout=2) as server:
        answer = server.client.post("/v1/chat/completions", json=body("time"), timeout=600)
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "timeout")
        until(lambda: busy(children) == 0)
        object.__setattr__(server.settings, "timeout", 3600.0)  # on a slow machine, too, it is in time
        assert server.complete().status_code == 200
    children.close()


def test_the_server_ends_in_the_middle_of_a_bomb(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children = pool(monkeypatch, 3600)
    with contextlib.ExitStack() as connections, running(model=model, timeout=3600) as server:
        connections.enter_context(asking(server, "/v1/chat/completions", body("time")))
        until(lambda: busy(children) == 1)
    until(lambda: busy(children) == 0)
    children.close()


@pytest.mark.parametrize("name", ["parentheses", "a long sum"])
def test_a_template_that_cannot_be_read(
    name: str, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = pool(monkeypatch, 1)
    (path,) = copy_model(tiny_path, tmp_path / "broken.gguf", template=UNREADABLE[name])
    template_client.template_facts.cache_clear()
    with running(model=path) as server:
        for _ in range(3):
            answer = server.chat()
            assert answer.status_code == 400, answer.text
            assert "chat template" in answer.json()["error"]["message"]
        assert server.complete().status_code == 200
    children.close()


def test_the_variable_is_named() -> None:
    assert SECONDS_VARIABLE in str(TemplatePool(TemplateLimits()).too_much("time"))


def test_turns_are_fair() -> None:
    """One client with many requests delays the other's one by a single turn; who gives up leaves the queue."""
    order: list[str] = []

    async def work(turns: Turns, client: str, go: asyncio.Event) -> None:
        async with turns.turn(client):
            order.append(client)
            await go.wait()

    async def main() -> None:
        turns, go = Turns(1), asyncio.Event()
        tasks = [asyncio.create_task(work(turns, "many", go)) for _ in range(5)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(work(turns, "one", go)))
        await asyncio.sleep(0)
        tasks[1].cancel()
        go.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert tasks[1].cancelled()
        assert turns._n_free == 1
        assert turns._waiting.n_groups == 0

    asyncio.run(asyncio.wait_for(main(), 60))
    assert order == ["many", "many", "one", "many", "many"]


def test_a_turn_that_comes_with_the_cancellation_is_given_on() -> None:
    async def main() -> None:
        turns = Turns(1)
        async with turns.turn("a"):
            waiting = asyncio.create_task(turns._wait("b"))
            await asyncio.sleep(0)
        waiting.cancel()  # it has the turn, and has not run yet
        with pytest.raises(asyncio.CancelledError):
            await waiting
        async with asyncio.timeout(60), turns.turn("c"):
            pass
        assert turns._n_free == 1

    asyncio.run(main())
