"""What uvicorn and h11 answer themselves is answered in OpenAI's form; clients that end their side get their answer."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from steermoe_local.server import peers
from steermoe_local.server.security import host_allowed
from tests.support.raw_http import connect, error_of, exchange, get, post, rest_of, status_of
from tests.support.running_server import Running, running, unending, until

HOST = "Host: localhost"
JSON_TYPE = "Content-Type: application/json"
CHUNKED = "Transfer-Encoding: chunked"
ENDLESS = {"prompt": "one, two,", "logit_bias": {"0": -100}, "max_tokens": 4000}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2, n_ctx=1024, header_seconds=2.0, body_seconds=1.0, idle_seconds=2.0) as found:
        yield found


def chunked(chunks: bytes) -> bytes:
    return get("/tokenize", HOST, JSON_TYPE, CHUNKED, method="POST") + chunks


REFUSED: dict[str, tuple[bytes, int, str]] = {
    "HTTP/2's preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "http_version"),
    "HTTP/2.0": (get(version="2.0"), 505, "http_version"),
    "HTTP/0.9": (b"GET /health\r\n\r\n", 400, "invalid_http"),
    "zeros": (b"\0\1\2\r\n\r\n", 400, "invalid_http"),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n", 400, "invalid_http"),
    "an empty line": (b"\r\n\r\n", 400, "invalid_http"),
    "a long word": (b"A" * 200_000, 400, "invalid_http"),
    "a long address": (get("/" + "a" * 9000), 414, "address_too_long"),
    "a long address without end": (b"GET /" + b"a" * 9000, 414, "address_too_long"),
    "a long header": (get("/health", HOST, "X: " + "a" * 20_000), 431, "header_too_large"),
    "a long header without end": (get("/health", HOST, "X: " + "a" * 20_000)[:-4], 431, "header_too_large"),
    "a header of a megabyte": (get("/health", HOST, *["X: a"] * 170_000), 431, "header_too_large"),
    "many headers": (get("/health", HOST, *["X: a"] * 101), 431, "header_too_large"),
    "letters in the address": (get("/\xe9"), 400, "invalid_http"),
    "a control character": (get("/health", HOST, "X: a\0b"), 400, "invalid_http"),
    "no Host": (get("/health", "X: a"), 400, "invalid_http"),
    "two Hosts": (get("/health", HOST, HOST), 400, "invalid_http"),
    "two lengths": (
        get("/tokenize", HOST, "Content-Length: 2", "Content-Length: 3", method="POST"),
        400,
        "invalid_http",
    ),
    "length and chunks": (get("/tokenize", HOST, "Content-Length: 2", CHUNKED, method="POST"), 400, "invalid_http"),
    "chunks in HTTP/1.0": (get("/tokenize", HOST, CHUNKED, method="POST", version="1.0"), 400, "invalid_http"),
    "gzip": (get("/tokenize", HOST, "Transfer-Encoding: gzip", method="POST"), 501, "not_implemented"),
    "no chunk": (chunked(b"zz\r\n\r\n"), 400, "invalid_http"),
    "a long chunk header": (chunked(b"1;" + b"a" * 50_000), 431, "header_too_large"),
    "tiny chunks": (chunked(b"1\r\n \r\n" * 20_000), 400, "invalid_http"),
    "another host in the address": (get("http://evil.com/health"), 400, "two_hosts"),
    "a user in the address": (get("http://a@localhost/health"), 400, "two_hosts"),
    "CONNECT": (get("localhost:80", HOST, "Connection: close", method="CONNECT"), 404, ""),
    "OPTIONS *": (get("*", method="OPTIONS"), 404, ""),
    "no such address": (get("/nothing"), 404, ""),
    "a method": (get("/health", method="BREW"), 405, ""),
    "TRACE": (get("/health", method="TRACE"), 405, ""),
    "half a header": (b"GET /health HT", 408, "slow_header"),
    "half a body": (post("/tokenize", {})[:-1], 408, "slow_body"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(server: Running, case: str, caplog: pytest.LogCaptureFixture) -> None:
    data, status, code = REFUSED[case]
    with caplog.at_level(logging.ERROR):
        answer = exchange(server.url, data)
    assert status_of(answer) == status
    assert (error_of(answer)["code"] or "") == code
    assert not caplog.records, "a stranger does not fill the log"


def test_what_ends_too_early(server: Running) -> None:
    for data in (b"GET /health HT", post("/tokenize", {})[:-1], chunked(b"5\r\nab")):
        answer = exchange(server.url, data, half_close=True)
        assert (status_of(answer), error_of(answer)["code"]) == (400, "incomplete_request")
    assert exchange(server.url, b"", half_close=True) == b""


def test_what_is_answered(server: Running) -> None:
    upgrade = get("/health", HOST, "Connection: upgrade, close", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    whole = (get("http://localhost/health?a=b"), get("HTTP://LocalHost/health"), get("/health", HOST, version="1.0"))
    for data in (*whole, upgrade, get("/health", HOST, "X: \xe9", "Connection: close")):
        assert status_of(exchange(server.url, data)) == 200, data
    many = exchange(server.url, get("/health", HOST) * 200 + get("/health"))
    assert many.count(b"HTTP/1.1 200 OK") == 201, "requests in a pipeline"


def test_a_body_is_not_asked_for_in_vain(server: Running) -> None:
    for headers, status in ((("Content-Length: 99999999999", JSON_TYPE), 413), (("Content-Length: 9",), 415)):
        answer = exchange(server.url, get("/tokenize", HOST, "Expect: 100-continue", *headers, method="POST"))
        assert b"100 Continue" not in answer
        assert status_of(answer) == status
    with connect(
        server.url, get("/tokenize", HOST, "Expect: 100-continue", "Content-Length: 15", JSON_TYPE, method="POST")
    ) as one:
        assert one.recv(1000).startswith(b"HTTP/1.1 100 Continue")
        one.sendall(b'{"content":"a"}')
        assert b"200 OK" in one.recv(1000)


#
# Host
#


ODD_HOSTS = ["localhost:0", "localhost:65536", "localhost:123456", "[127.0.0.1]", "[localhost]", "[::1%lo]"]
ODD_HOSTS += ["[fe80::1%25eth0]", "a b.localhost", "u@x.localhost", ".localhost", "\xe9.localhost", "localhost.."]
ODD_HOSTS += ["[::1]localhost", "localhost,a", "user:pass@localhost", "http://localhost", "localhost/", "localhost\0"]
ODD_HOSTS += ["0177.0.0.1", "0x7f000001", "1.2.3.4.5"]


@pytest.mark.parametrize("host", ODD_HOSTS)
def test_odd_hosts_are_refused(host: str) -> None:
    assert not host_allowed(host, frozenset({"localhost"}))


def test_long_hosts_cost_nothing() -> None:
    for host in ("a." * 8000 + "!", "a" * 16_000 + "!", "-" * 16_000):
        assert not host_allowed(host, frozenset({"localhost"}))  # an ambiguous pattern would take years


def test_odd_hosts_over_the_wire(server: Running) -> None:
    for host in (
        "",
        "localhost@evil.com",
        "evil.com:80",
        "2130706433",
        "localhost.evil.com",
        "\xe9",
        "localhost:99999",
    ):
        answer = exchange(server.url, get("/health", f"Host: {host}", "Connection: close"))
        assert (status_of(answer), error_of(answer)["code"]) == (403, "unknown_host")
    forwarded = get("/health", "Host: evil.com", "X-Forwarded-Host: localhost", "Forwarded: host=localhost")
    assert status_of(exchange(server.url, forwarded)) == 403


#
# clients that have ended their side
#


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_whole_answer(server: Running, version: str, stream: bool) -> None:
    body = {"prompt": "one, two,", "max_tokens": 12, "logit_bias": {"0": -100}, "temperature": 0, "stream": stream}
    answer = exchange(server.url, post("/v1/completions", body, "Connection: close", version=version), half_close=True)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), "nothing before it, either"
    text = answer.partition(b"\r\n\r\n")[2]
    if stream:
        assert b"data: [DONE]\n\n" in text
        assert text.count(b"data: {") >= 12
    else:
        assert json.loads(text)["usage"]["completion_tokens"] == 12


def test_requests_in_a_pipeline_of_a_half_closed_client(server: Running) -> None:
    body = {"prompt": "one, two,", "max_tokens": 4, "logit_bias": {"0": -100}}
    answer = exchange(server.url, post("/v1/completions", body) * 3, half_close=True)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b'"completion_tokens":4') == 3


def test_a_client_that_is_gone_is_told_from_one(server: Running) -> None:
    """Both send the same; the answer of the one that is gone is stopped, streamed or not, begun or not."""
    for stream in (False, True):
        with unending(server):
            connection = connect(server.url, post("/v1/completions", ENDLESS | {"stream": stream}))
            until(lambda: server.worker.n_running == 1)
            connection.close()
            until(lambda: server.worker.n_running == 0)


def test_a_client_of_another_machine_is_asked(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel's table does not say it, an interim answer does: who is gone resets the connection."""
    monkeypatch.setattr("steermoe_local.server.protocol.ends_of", lambda *_: None)
    with unending(server):
        connection = connect(server.url, post("/v1/completions", ENDLESS))
        until(lambda: server.worker.n_running == 1)
        connection.close()
        until(lambda: server.worker.n_running == 0)
    engine, go = server.worker.engine, threading.Event()
    assert engine is not None
    step = engine.step
    # nothing is computed before the client was asked
    monkeypatch.setattr(engine, "step", lambda: step() if go.wait(0.001) else [])
    body, interim = ENDLESS | {"max_tokens": 6}, b"HTTP/1.1 100 Continue\r\n\r\n"
    with connect(server.url, post("/v1/completions", body, "Connection: close")) as connection:
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(len(interim), socket.MSG_WAITALL) == interim
        go.set()
        answer = rest_of(connection)
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 6
    old = exchange(server.url, post("/v1/completions", body, version="1.0"), half_close=True)
    assert old.startswith(b"HTTP/1.1 200 OK\r\n"), "HTTP/1.0 has no interim answers"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net")
@pytest.mark.parametrize(("host", "to"), [("127.0.0.1", "127.0.0.1"), ("::", "::1"), ("::", "127.0.0.1")])
def test_the_kernels_table(host: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.create_server((host, 0), family=family, dualstack_ipv6=":" in host)
    port = listening.getsockname()[1]
    with listening, socket.create_connection((to, port)) as client, listening.accept()[0] as own:
        ends = peers.ends_of(own.getpeername()[:2], own.getsockname()[:2])
        assert ends is not None
        client.shutdown(socket.SHUT_WR)
        assert own.recv(1) == b""
        assert peers.open_ends({ends}) == {ends}
        client.close()
        assert peers.open_ends({ends}) == set()
        assert peers.ends_of(("10.0.0.1", 5), own.getsockname()[:2]) is None, "it may be a container's"
        monkeypatch.setattr(peers, "_TABLES", (tmp_path / "a", tmp_path / "b"))
        assert peers.open_ends({ends}) is None


def test_a_body_after_its_answer_does_not_keep_the_connection(server: Running) -> None:
    with connect(server.url, get("/health", HOST, "Content-Length: 1000")) as connection:
        found = connection.recv(15)
        connection.sendall(b"a")
        assert status_of(found + rest_of(connection)) == 200  # and it ends, although it waits for 999 bytes
