"""Connections have deadlines, their number is bounded, and /health is answered whatever others do."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest

from steermoe_local.server.connections import Connections, State, share_of
from tests.support.raw_http import address_of, connect, exchange, get, post, rest_of, status_of
from tests.support.running_server import Running, requests_begun, running, unending, until

HOST = "Host: localhost"
ENDLESS = {"prompt": "one, two,", "logit_bias": {"0": -100}, "max_tokens": 4000}


@contextmanager
def many(server: Running, n: int, data: bytes, **options: Any) -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(connect(server.url, data, **options)) for _ in range(n)]


def health(server: Running) -> int:
    return status_of(exchange(server.url, get()))


#
# deadlines
#


@pytest.mark.parametrize("byte", [b"a", b"\r\n"])
def test_a_byte_now_and_then_does_not_extend_the_deadline(byte: bytes) -> None:
    """Of the header and of the body; the loop would go on for ever otherwise, so it is bounded by bytes."""
    with running(parallel=1, header_seconds=1.0, body_seconds=1.0) as server:
        for beginning in (b"GET /health HTTP/1.1\r\nX: ", post("/tokenize", b"", "X: a")[:-4]):
            with connect(server.url, beginning.replace(b"Content-Length: 0", b"Content-Length: 9999")) as connection:
                if b"9999" in beginning:
                    connection.sendall(b"\r\n\r\n")
                for _ in range(400):
                    try:
                        connection.settimeout(0.05)
                        if connection.recv(1, socket.MSG_PEEK) is not None:
                            break
                    except TimeoutError:
                        connection.sendall(byte if byte == b"a" else b"b")
                else:
                    raise AssertionError("the deadline is extended")
                connection.settimeout(20)
                assert status_of(rest_of(connection)) == 408


def test_idle_connections_are_closed() -> None:
    with (
        running(parallel=1, header_seconds=0.5, idle_seconds=0.5) as server,
        connect(server.url) as silent,
        connect(server.url, get("/health", HOST)) as idle,
    ):
        assert rest_of(silent) == b"", "nothing was asked, nothing is said"
        assert rest_of(idle).endswith(b"}")


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/page/page.js", "/v1/steering/digits-words/map"])
def test_answers_that_nobody_takes(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their connections end at the deadline, also where the whole answer is in buffers already."""
    n, pipeline = 4, get(path, HOST) * 40
    add, opened = Connections.add, list[Any]()
    monkeypatch.setattr(Connections, "add", lambda self, one: (add(self, one), opened.append(one)))
    with (
        running(parallel=1, write_seconds=0.5, idle_seconds=0.5) as server,
        many(server, n, pipeline, receive_buffer=4096) as connections,
    ):
        until(lambda: len(opened) >= n)
        until(lambda: not len(server.connections))  # that of the tests' client is idle, and ends, too
        if path == "/openapi.json":  # the largest: what was not taken is gone from the kernel's buffer, too
            assert all(rest_of(connection).count(b"HTTP/1.1 200 OK") < 20 for connection in connections)


def test_a_stream_that_nobody_reads_gives_back_all(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = requests_begun(monkeypatch)
    with running(parallel=2, n_ctx=1024, write_seconds=0.5) as server:
        body = {"stream": True, "logprobs": 20} | ENDLESS
        with many(server, 2, post("/v1/completions", body), receive_buffer=4096):
            until(lambda: len(begun) == 2)
            until(lambda: server.worker.n_running == 0, seconds=60)
            until(lambda: len(server.connections) <= 1)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other kernels do not say what was taken")
def test_a_client_may_read_slowly() -> None:
    """As slowly as an answer is spoken: the kernel asks the server for more in portions that take it minutes.

    Longer than the kernel would wait for a full buffer (TCP_USER_TIMEOUT) if it were told to.
    """
    with (
        running(parallel=1, write_seconds=4.0) as server,
        many(server, 1, get("/openapi.json", HOST) * 40, receive_buffer=16384) as (connection,),
    ):
        for _ in range(14):
            assert connection.recv(8192, socket.MSG_WAITALL), "ended"
            time.sleep(0.8)


#
# their number
#


@pytest.mark.parametrize("beginning", [b"", b"GET /hea", post("/tokenize", {})[:-1]])
def test_silent_ones_make_room(beginning: bytes) -> None:
    """Far more than may be open; each new one takes the place of the oldest, and others are answered."""
    with running(parallel=1, connections=20, queue_limit=4) as server, many(server, 100, beginning):
        assert len(server.connections) <= 24
        assert health(server) == 200
        assert server.complete("one,", max_tokens=1).status_code == 200


def test_health_while_every_connection_is_being_answered() -> None:
    """The reserve is for it; half-open connections cannot take the reserve either."""
    with running(parallel=2, n_ctx=1024, connections=3, queue_limit=4) as server, unending(server):
        server.client.close()
        body = post("/v1/completions", ENDLESS)
        with many(server, 6, body) as answered:
            until(lambda: server.worker.n_waiting == 4)
            answered += [connect(server.url, body)]  # 429, and then it is idle
            assert answered[-1].recv(65536).startswith(b"HTTP/1.1 429")
            with many(server, 40, b""), many(server, 40, b"GET /hea"):
                for _ in range(3):
                    assert health(server) == 200
                    head = exchange(server.url, get(method="HEAD"))
                    assert status_of(head) == 200
                    assert head.endswith(b"\r\n\r\n")
                answers = [exchange(server.url, get("/v1/models")) for _ in range(2)]
            assert {status_of(answer) for answer in answers} <= {200, 503}
            assert len(server.connections) <= server.connections.limit + server.connections.reserve
            assert server.worker.n_running == 2, "those that are being answered are left alone"
            answered.pop().close()


class _Fake:
    def __init__(self, address: str, since: float, state: State = State.IDLE) -> None:
        self.address, self.since, self.state = address, since, state
        self.reserved = self.closed = False
        self.ends = None

    def abort(self) -> None:
        self.closed = True

    def look(self, there: bool | None) -> None: ...


def test_who_is_given_up() -> None:
    connections = Connections(limit=5, reserve=2)
    greedy = [_Fake("10.0.0.1", since) for since in (3, 2, 4)]
    other = _Fake("10.0.0.2", 1)
    body = _Fake("10.0.0.1", 0, State.BODY)
    for one in (*greedy, other, body):
        connections.add(one)
    connections.add(_Fake("10.0.0.3", 9, State.ANSWERING))
    assert [one.closed for one in greedy] == [False, True, False], "the oldest idle one of who has most"
    assert not other.closed
    for _ in range(4):
        connections.add(_Fake("10.0.0.3", 9, State.ANSWERING))
    assert all(one.closed for one in (*greedy, other, body)), "then the other's, and who has no whole body last"
    late = [_Fake("10.0.0.4", 10) for _ in range(3)]
    for one in late:
        connections.add(one)
    assert all(one.reserved for one in late)
    assert [one.closed for one in late] == [True, False, False], "the reserve goes round"
    assert len(connections) == 7


def test_shares() -> None:
    assert share_of("2001:db8::1") == share_of("2001:db8::ffff:1%eth0") != share_of("2001:db8:0:1::1")
    assert share_of("::ffff:10.0.0.1") == share_of("10.0.0.1") != share_of("10.0.0.2")


#
# descriptors
#


@pytest.mark.skipif(sys.platform == "win32", reason="sockets are no files there")
def test_without_descriptors(caplog: pytest.LogCaptureFixture) -> None:
    """/health is answered, the log has one line, and the accept loop does not keep a core busy."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with running(parallel=1) as server:
        server.client.close()
        until(lambda: len(server.connections) == 0)
        clients = [socket.socket() for _ in range(60)]  # before the descriptors are taken, as they are of this process
        taken: list[int] = []
        try:
            highest = max(int(name) for name in os.listdir("/dev/fd")) + 20
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest, before[1]))
            with suppress(OSError):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            began = sum(os.times()[:2])
            for client in clients:
                client.settimeout(30)
                with suppress(ConnectionError):  # the server may have given it up already
                    client.connect(address_of(server.url))
                    if client in clients[-3:]:
                        client.sendall(get())
            assert [status_of(rest_of(client)) for client in clients[-3:]] == [200] * 3
            assert sum(os.times()[:2]) - began < 10
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            for descriptor in taken:
                os.close(descriptor)
            for client in clients:
                client.close()
        assert len([record for record in caplog.records if "no descriptor" in record.getMessage()]) == 1
        assert len(caplog.records) < 5
        until(lambda: len(server.connections) == 0)
        assert health(server) == 200


def test_the_limit_of_open_files_is_raised() -> None:
    resource = pytest.importorskip("resource")
    from steermoe_local.server.accepting import room_for

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert room_for(300) == 300
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 300 + 16 + 128
        assert 0 < room_for(10**9) < 10**9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
