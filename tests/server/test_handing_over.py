"""How an answer's events come from the engine's thread to the event loop and into a stream."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from steermoe_local.errors import NativeError
from steermoe_local.generation.engine import FinishEvent, TokenEvent
from steermoe_local.server import generation, worker
from steermoe_local.server.streaming import Answers, ClientGone, Frame, sse
from steermoe_local.server.worker import Event, Ticket
from tests.support.running_server import Running, asking, running, unending, until

N = 200  # tokens of an answer
ENDLESS = {"logit_bias": {"0": -100}, "max_tokens": N, "temperature": 0, "seed": 1}  # 0 is the end: it never comes
CHAT = {"messages": [{"role": "user", "content": "Please count starting at eleven until fifteen."}], **ENDLESS}
TEXT = {"prompt": "one, two,", **ENDLESS}
Put = list[tuple[int, Event]]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(n_ctx=512) as found:
        yield found


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> list[Put]:
    """What is handed over from now on, each time."""
    found: list[Put] = []
    put = Ticket.put

    def noted(self: Ticket, events: Put) -> None:
        found.append(list(events))
        put(self, events)

    monkeypatch.setattr(Ticket, "put", noted)
    return found


def token(number: int) -> TokenEvent:
    return TokenEvent(f"{number} ", number)


#
# from the engine's thread
#


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses"])
def test_an_answer_that_is_sent_whole_is_handed_over_in_portions(server: Running, puts: list[Put], path: str) -> None:
    body: dict[str, Any] = {"chat/completions": CHAT, "completions": TEXT}.get(path, {})
    if path == "responses":
        body = {"input": "Count.", "max_output_tokens": N, "temperature": 0, "logit_bias": {"0": -100}}
    assert server.client.post(f"/v1/{path}", json=body).status_code == 200
    sizes = [len(events) for events in puts if events]  # none: the client's connection was looked at
    rest = N - 1 - 3 * worker._EVENTS_TOGETHER + 1
    assert sizes == [1, *[worker._EVENTS_TOGETHER] * 3, rest], "the first token at once, the end with what is left"
    assert isinstance(puts[-1][-1][1], FinishEvent)


def test_the_end_of_each_of_several_answers_is_handed_over_at_once(server: Running, puts: list[Put]) -> None:
    body = server.client.post("/v1/completions", json=TEXT | {"n": 2, "max_tokens": 3}).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    ended = [i for i, events in enumerate(puts) for _, event in events if isinstance(event, FinishEvent)]
    for i in ended:
        assert isinstance(puts[i][-1][1], FinishEvent), "nothing came behind an end that waited"
    assert len(ended) == 2


def test_each_token_of_a_stream_is_handed_over_at_once(server: Running, puts: list[Put]) -> None:
    server.events("/v1/completions", TEXT)
    assert [len(events) for events in puts if events] == [1] * (N - 1) + [2]


def test_an_error_is_handed_over_at_once_with_what_waited(server: Running, puts: list[Put]) -> None:
    engine = server.worker.engine
    assert engine is not None
    step, n_steps = engine.step, 0

    def failing() -> Any:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 5:
            raise NativeError("planted")
        return step()

    engine.step = failing  # type: ignore[method-assign]
    try:
        assert server.client.post("/v1/completions", json=TEXT).status_code == 500
    finally:
        engine.step = step  # type: ignore[method-assign]
    assert [len(events) for events in puts if events] == [1, 4]
    assert isinstance(puts[1][-1][1], NativeError)


def test_nothing_is_kept_of_a_whole_answer_whose_client_leaves(server: Running) -> None:
    with unending(server, 40):
        with asking(server, "/v1/completions", TEXT):
            until(lambda: sum(len(events) for events in server.worker._outgoing.values()) > 20)
        until(lambda: not server.worker._outgoing)
    assert not server.worker._due


#
# on the event loop
#


def on_loop(run: Callable[[Ticket], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(run(Ticket("client", [], 0.0)), 20)

    asyncio.run(main())


def test_a_ticket_gives_what_came_in_order_and_some_at_a_time() -> None:
    async def run(ticket: Ticket) -> None:
        ticket.put([(0, token(0))])
        ticket.put([(0, token(n)) for n in range(1, 150)])
        found = [await ticket.next() for _ in range(3)]
        assert [len(events) for events in found] == [64, 64, 22], "a write, or a turn of the event loop, has a bound"
        assert [event.token for events in found for _, event in events if isinstance(event, TokenEvent)] == [
            *range(150)
        ]
        waiting = asyncio.ensure_future(ticket.next())
        await asyncio.sleep(0)
        assert not waiting.done()
        ticket.put([(0, token(7))])
        ticket.put([(0, token(8))])
        assert await waiting == [(0, token(7)), (0, token(8))]

    on_loop(run)


def test_others_have_their_turn_while_a_client_catches_up() -> None:
    async def run(ticket: Ticket) -> None:
        ticket.put([(0, token(n)) for n in range(6400)])
        turns = 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.ensure_future(other())
        for _ in range(100):
            await ticket.next()
        others.cancel()
        assert turns >= 99

    on_loop(run)


def test_an_error_comes_behind_what_came_before_it() -> None:
    async def run(ticket: Ticket) -> None:
        ticket.put([(0, token(1)), (0, NativeError("planted"))])
        assert await ticket.next() == [(0, token(1))]
        with pytest.raises(NativeError, match="planted"):
            await ticket.next()

    on_loop(run)


def test_a_wait_that_was_cancelled_loses_nothing() -> None:
    async def run(ticket: Ticket) -> None:
        waiting = asyncio.ensure_future(ticket.next())
        await asyncio.sleep(0)
        waiting.cancel()
        ticket.put([(0, token(1))])
        ticket.put([(0, token(2))])
        assert await ticket.next() == [(0, token(1)), (0, token(2))]

    on_loop(run)


class _Gone:
    """Of a worker and of a request: a client that leaves at once."""

    def submit(self, ticket: Ticket) -> None:
        ticket.put([(0, token(n)) for n in range(1000)])

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True

    async def receive(self) -> dict[str, Any]:
        return {"type": "http.disconnect"}


@pytest.mark.parametrize("backlog", [True, False])
def test_a_client_that_is_gone_is_noticed_before_what_waits_for_it(backlog: bool) -> None:
    async def run(ticket: Ticket) -> None:
        gone: Any = _Gone()
        answers = Answers(gone, ticket, gone)
        if not backlog:
            ticket._events.clear()
        else:
            await asyncio.sleep(0)  # the watch begins
            await asyncio.sleep(0)
        with pytest.raises(ClientGone):
            await answers.next()
        answers.close()
        assert ticket.cancelled

    on_loop(run)


#
# into a stream
#

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("completions", TEXT),
    "text with probabilities": ("completions", TEXT | {"logprobs": 3, "max_tokens": 20}),
    "echo": ("completions", TEXT | {"echo": True, "return_tokens": True, "max_tokens": 70}),
    "chat": ("chat/completions", CHAT | {"stream_options": {"include_usage": True}}),
    "two answers": ("chat/completions", CHAT | {"n": 2, "temperature": 1, "stop": ["e"], "max_tokens": 70}),
    "probabilities": ("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 2, "max_tokens": 20}),
    "object": ("chat/completions", CHAT | {"response_format": {"type": "json_object", "schema": {"const": "\u2028é"}}}),
    "response": ("responses", {"input": "Count.", "max_output_tokens": 70, "temperature": 0, "seed": 1}),
}
_VARYING = re.compile(rb'(?<=[-_])[0-9a-f]{24,}|(?<="created":)\d+|(?<=_at":)\d+|(?<=_ms":)[\d.]+')


def stream(server: Running, path: str, body: dict[str, Any]) -> bytes:
    """All bytes of a stream, without those that differ from one request to the next."""
    response = server.client.post(f"/v1/{path}", json=body | {"stream": True, "cache_prompt": False})
    assert response.status_code == 200, response.text
    return _VARYING.sub(b"*", response.content)


@pytest.mark.parametrize("case", CASES)
def test_a_stream_has_the_same_bytes_however_its_events_come(
    server: Running, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, body = CASES[case]
    one_by_one = stream(server, path, body)
    put, held = Ticket.put, []

    def late(self: Ticket, events: Put) -> None:
        """Everything at the end."""
        held.extend(events)
        if sum(isinstance(event, FinishEvent) for _, event in held) == body.get("n", 1):
            put(self, held.copy())
            held.clear()

    monkeypatch.setattr(Ticket, "put", late)
    assert stream(server, path, body) == one_by_one
    if case == "text":
        assert one_by_one.count(b'"finish_reason":null') == 1 + N, "the first chunk, and one for each token"


@pytest.mark.parametrize("case", CASES)
def test_prepared_events_are_those_that_are_encoded_whole(
    server: Running, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Whole:
        """A frame whose chunk is encoded anew for each text."""

        PLACEHOLDER = Frame.PLACEHOLDER

        def __init__(self, event: bytes) -> None:
            self.chunk = json.loads(event.removeprefix(b"data: "))

        def of(self, text: str) -> bytes:
            return sse(_with(self.chunk, text))

    path, body = CASES[case]
    prepared = stream(server, path, body)
    monkeypatch.setattr(generation, "Frame", Whole)
    assert stream(server, path, body) == prepared


def _with(value: Any, text: str) -> Any:
    if isinstance(value, dict):
        return {name: _with(one, text) for name, one in value.items()}
    if isinstance(value, list):
        return [_with(one, text) for one in value]
    return text if value == Frame.PLACEHOLDER else value


@given(st.text(), st.text())
@example('"},{"a":"\\', "tiny")
@example("\u2028\x00\U0001f600", '"text"')
def test_a_frame_takes_any_text(text: str, model: str) -> None:
    def event(content: str) -> bytes:
        return sse({"model": model, "choices": [{"delta": {"content": content}, "logprobs": None}]})

    assert Frame(event(Frame.PLACEHOLDER)).of(text) == event(text)


def test_what_all_chunks_have_is_not_encoded_for_each(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []

    def counted(data: dict[str, Any]) -> bytes:
        encoded.append(data)
        return sse(data)

    monkeypatch.setattr(generation, "sse", counted)
    for path, body in (("completions", TEXT), ("chat/completions", CHAT)):
        stream(server, path, body)
        assert len(encoded) == 3, "the first chunk, the frame, and the last chunk"
        encoded.clear()
