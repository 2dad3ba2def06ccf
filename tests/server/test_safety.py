"""Safe by default: who may ask, under which name, what a body may be, what is written down."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steermoe_local import UsageError
from steermoe_local.server import ServerSettings
from steermoe_local.server.api_errors import ApiError, strict_json
from steermoe_local.server.security import host_allowed
from steermoe_local.server.settings import is_loopback
from tests.support.running_server import Running, running

KEY = "a-key-of-32-characters-or-so-1234"
JSON_TYPE = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=2, body_limit=1 << 20, body_seconds=1.0) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With a key, a page, an origin and a host name."""
    page = tmp_path_factory.mktemp("page")
    (page / "index.html").write_text("<!doctype html><title>page</title>")
    (page / "page.css").write_text("a{}")
    (page / "secret.txt").write_text("no")
    with running(
        api_key=KEY, cors_origins=("http://app.example",), allowed_hosts=("my.host",), page=page, parallel=1
    ) as found:
        yield found


#
# settings
#


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert ServerSettings("tiny", host=host).warnings == []


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "fe80::1%eth0", "no-such-host.invalid", ""]
)
def test_elsewhere_a_key_is_needed(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(UsageError, match="--api-key KEY"):
        ServerSettings("tiny", host=host)
    assert "not encrypted" in ServerSettings("tiny", host=host, api_key=KEY).warnings[0]
    assert "everyone who can" in ServerSettings("tiny", host=host, no_auth=True).warnings[0]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"api_key": "a", "no_auth": True}, "--api-key and --no-auth"),
        ({"api_key": ""}, "--api-key: "),
        ({"api_key": "a\nb"}, "--api-key: "),
        ({"api_key": "é"}, "--api-key: "),
        ({"cors_origins": ("*",)}, "--cors"),
        ({"maps_writable": True}, "--maps-writable: "),
        ({"maps_folder": Path("/nowhere/at/all")}, "/nowhere/at/all: "),
    ],
)
def test_settings_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ServerSettings("tiny", **fields)


def test_the_key_is_not_shown() -> None:
    assert KEY not in repr(ServerSettings("tiny", api_key=KEY))


#
# who may ask
#


def test_the_key(guarded: Running) -> None:
    def status(**headers: str) -> int:
        return httpx.get(f"{guarded.url}/v1/models", headers=headers, timeout=60, trust_env=False).status_code

    assert status(Authorization=f"Bearer {KEY}") == status(Authorization=f"bearer  {KEY}") == 200
    wrong = ["", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", "Bearer x" * 1000]
    assert {status(Authorization=value) for value in wrong} | {status()} == {401}
    response = httpx.get(f"{guarded.url}/v1/models", timeout=60, trust_env=False)
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    twice = [("Authorization", "Bearer x"), ("Authorization", f"Bearer {KEY}")]
    two = httpx.get(f"{guarded.url}/v1/models", headers=twice, timeout=60, trust_env=False)
    assert two.status_code == 401


def test_what_needs_no_key(guarded: Running) -> None:
    bare = httpx.Client(base_url=guarded.url, timeout=60, trust_env=False)
    with bare:
        for path in ("/", "/page/page.css", "/health", "/docs", "/openapi.json"):
            assert bare.get(path).status_code == 200, path
        needing = ["/metrics", "/v1/models", "/v1/steering", "/v1/steering/digits-words/map", "/page.js/", "/health/"]
        for path in [*needing, "/tokenize", "/nothing", "/docs/", "/page", "/%2e%2e/health"]:
            assert bare.get(path).status_code == 401, path
        for path in ("/", "/health", "/v1/chat/completions", "/tokenize"):
            assert bare.post(path, json={}).status_code == 401, path
        assert bare.request("DELETE", "/v1/steering/x").status_code == 401


def test_the_body_of_a_stranger_is_not_read(guarded: Running) -> None:
    response = httpx.post(f"{guarded.url}/v1/chat/completions", content=b"x" * 10_000_000, timeout=60, trust_env=False)
    assert response.status_code == 401


HOSTS_TAKEN = ["localhost", "LOCALHOST", "127.0.0.1", "127.0.0.1:1234", "[::1]:80", "[::1]", "10.1.2.3", "localhost."]
HOSTS_TAKEN += ["app.localhost:80", "localhost:"]
HOSTS_REFUSED = ["evil.com", "evil.com:80", "localhost.evil.com", "127.0.0.1.evil.com", "2130706433", "0x7f.1", "x", ""]
HOSTS_REFUSED += ["localhost:x", "[::1", "[::1]x", "[evil]", "127.1", "loc alhost", "localhost@evil.com", "[::1]:x"]
HOSTS_REFUSED += ["xlocalhost", "localhost:80:80"]


@pytest.mark.parametrize("host", HOSTS_TAKEN)
def test_hosts_that_are_taken(host: str) -> None:
    assert host_allowed(host, frozenset({"localhost"}))


@pytest.mark.parametrize("host", HOSTS_REFUSED)
def test_hosts_that_are_refused(host: str) -> None:
    assert not host_allowed(host, frozenset({"localhost"}))


def test_the_host_header(server: Running, guarded: Running) -> None:
    for path in ("/", "/health", "/v1/models", "/docs"):
        response = server.client.get(path, headers={"Host": "rebound.example"})
        assert response.status_code == 403, path
        assert response.json()["error"]["code"] == "unknown_host"
    response = server.client.post("/v1/chat/completions", headers={"Host": "rebound.example"}, json={})
    assert response.status_code == 403
    assert guarded.client.get("/v1/models", headers={"Host": "my.host:80"}).status_code == 200
    assert server.client.get("/health", headers={"Host": "my.host"}).status_code == 403


def test_origins(server: Running, guarded: Running) -> None:
    origin = {"Origin": "http://app.example"}
    ask = origin | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    response = guarded.client.options("/v1/chat/completions", headers=ask)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "http://app.example"
    assert guarded.client.get("/v1/models", headers=origin).headers["access-control-allow-origin"]
    other = guarded.client.get("/v1/models", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in other.headers
    for found in (server.client.options("/v1/models", headers=ask), server.client.get("/v1/models", headers=origin)):
        assert not [name for name in found.headers if name.startswith("access-control")], "CORS is closed"


def test_the_page(guarded: Running, server: Running) -> None:
    page = guarded.client.get("/")
    assert page.text.startswith("<!doctype html>")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    for path in ("/secret.txt", "/page/index.html", "/..%2fapp.py", "/page.js", "/page/", "/page/secret.txt"):
        assert guarded.client.get(path).status_code == 404, path


#
# bodies
#


def raw(server: Running, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    return server.client.post(path, content=body, headers=JSON_TYPE | headers)


DEEP = 100_000
BODIES: dict[str, tuple[bytes, int, str, str]] = {
    "empty": (b"", 400, "missing_body", ""),
    "no json": (b"{", 400, "invalid_json", ""),
    "text": (b"hello", 400, "invalid_json", ""),
    "no object": (b"[]", 400, "invalid_value", ""),
    "null": (b"null", 400, "invalid_value", ""),
    "number": (b"5", 400, "invalid_value", ""),
    "latin-1": ('{"prompt": "\xe9"}'.encode("latin-1"), 400, "invalid_encoding", "byte 12"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), 400, "invalid_encoding", "byte 0"),
    "surrogate": (b'{"prompt": "\\ud800"}', 400, "invalid_json", "surrogate"),
    "deep arrays": (b"[" * DEEP + b"]" * DEEP, 400, "invalid_json", "nested"),
    "deep objects": (b'{"a":' * DEEP + b"1" + b"}" * DEEP, 400, "invalid_json", "nested"),
    "rather deep": (b'{"metadata":' + b"[" * 70 + b"]" * 70 + b"}", 400, "invalid_json", "nested deeper than 64"),
    "unclosed": (b'{"messages": ' + b"[" * DEEP, 400, "invalid_json", ""),
    "NaN": (b'{"temperature": NaN}', 400, "invalid_json", "NaN"),
    "Infinity": (b'{"temperature": -Infinity}', 400, "invalid_json", "-Infinity"),
    "beyond a float": (b'{"temperature": 1e999}', 400, "invalid_json", "too large"),
    "many digits": (b'{"n": ' + b"9" * 5000 + b"}", 400, "invalid_json", ""),
    "large integer": (
        b'{"messages": [{"role": "user", "content": "a"}], "n": 99999999999999999999}',
        400,
        "invalid_value",
        "n: ",
    ),
    "twice": (b'{"model": "a", "model": "tiny"}', 400, "invalid_json", "'model'"),
    "byte order mark": (b"\xef\xbb\xbf{}", 400, "invalid_json", ""),
    "zero bytes": (b"\0" * 100, 400, "invalid_json", ""),
    "too large": (b" " * (1 << 20) + b"{}", 413, "body_too_large", "1 MiB"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bodies_that_are_refused(server: Running, case: str) -> None:
    body, status, code, words = BODIES[case]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/steering", "/tokenize"):
        response = raw(server, body, path)
        assert response.status_code == status, response.text
        if path == "/v1/chat/completions":
            assert response.json()["error"]["code"] == code
            assert words in response.json()["error"]["message"]
    assert server.chat(max_tokens=1).status_code == 200, "the server lives"


def test_a_text_may_hold_anything(server: Running) -> None:
    for text in ("\0\x01\x7f", "\u202e\U0010ffff", "<|end|><|assistant|>", "\n" * 50, "{{ 7*7 }} {% raw %}"):
        assert server.chat(text, max_tokens=1).status_code == 200


def test_types_of_bodies(server: Running) -> None:
    body = b'{"prompt": "one", "max_tokens": 1}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"):
        response = raw(server, body, "/v1/completions", **{"Content-Type": kind})
        assert response.status_code == 415, kind
    for kind in ("application/json", "application/json; charset=utf-8", "Application/JSON"):
        assert raw(server, body, "/v1/completions", **{"Content-Type": kind}).status_code == 200


def send(server: Running, data: bytes, rest: bytes = b"", pause: float = 0.0) -> bytes:
    """What a raw connection is answered before it is closed."""
    host, port = server.url.removeprefix("http://").split(":")
    found = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection, suppress(OSError):
        connection.sendall(data)
        if pause:
            time.sleep(pause)
        if rest and not pause:
            connection.sendall(rest)
        while part := connection.recv(65536):
            found += part
    return found


def head(server: Running, *lines: str, path: str = "/v1/completions") -> bytes:
    host = server.url.removeprefix("http://")
    start = [f"POST {path} HTTP/1.1", f"Host: {host}", "Content-Type: application/json", "Connection: close", *lines]
    return ("\r\n".join(start) + "\r\n\r\n").encode()


def test_lengths_that_lie(server: Running) -> None:
    for length in ("99999999999999999999", "2000000"):
        assert b"413" in send(server, head(server, f"Content-Length: {length}"), b"{}").split(b"\r\n")[0]
    for length in ("-1", "x", "1e3"):
        assert b"400" in send(server, head(server, f"Content-Length: {length}"), b"{}").split(b"\r\n")[0]
    chunked = head(server, "Transfer-Encoding: chunked")
    endless = (b"10000\r\n" + b" " * 65536 + b"\r\n") * 20
    assert b"413" in send(server, chunked, endless).split(b"\r\n")[0]
    assert server.chat(max_tokens=1).status_code == 200


def test_a_slow_body(server: Running) -> None:
    found = send(server, head(server, "Content-Length: 10") + b"{", b"}", pause=1.5)
    assert b"408" in found.split(b"\r\n")[0]
    assert b"did not come within 1 seconds" in found


def test_what_is_no_http(server: Running) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET\r\n\r\n", b"\0" * 5000, b"A" * 200_000):
        assert send(server, data + b"\r\n\r\n")[:12] in (b"", b"HTTP/1.1 400")
    no_host = send(server, b"GET /health HTTP/1.0\r\n\r\n")
    assert b" 403 " in no_host.split(b"\r\n")[0]
    two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.com\r\nConnection: close\r\n\r\n"
    assert send(server, two).split(b"\r\n")[0].split(b" ")[1] in (b"400", b"403")
    assert server.chat(max_tokens=1).status_code == 200


SCHEMAS: dict[str, dict[str, Any]] = {
    "many items": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "long text": {"type": "string", "maxLength": 10**9},
    "itself": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "bad pattern": {"type": "string", "pattern": "(((("},
    "deep pattern": {"type": "string", "pattern": "(" * 5000 + ")" * 5000},
    "many patterns": {"allOf": [{"type": "string", "pattern": f"a.{{{i}}}b"} for i in range(60)]},
    "multiples": {"type": "integer", "multipleOf": 10**9 + 7},
    "exponential": {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(9)]} for i in range(9)]},
    "chain": {"$ref": "#/$defs/0", "$defs": {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(1500)}},
    "wide": {"type": "object", "properties": {f"p{i}": {"enum": ["x" * 500]} for i in range(200)}},
    "deep": {},
    "no types": {"type": ["nothing"]},
    "strange": {"properties": [], "required": 5, "anyOf": {}},
    "elsewhere": {"$ref": "file:///etc/passwd"},
    "network": {"$ref": "https://127.0.0.1:9/x"},
}
for _ in range(40):
    SCHEMAS["deep"] = {"type": "array", "items": SCHEMAS["deep"]}


@pytest.mark.parametrize("case", SCHEMAS)
def test_schemas_of_strangers(server: Running, case: str) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[case]}}
    began = time.process_time()  # the server is a thread of this process
    response = server.chat(response_format=format_, max_tokens=3)
    assert response.status_code == 400, response.text
    assert time.process_time() - began < 5
    assert server.chat(max_tokens=1).status_code == 200


PATTERNS = {
    "long": "^" + "a" * 200 + "$",
    "long repeats": "^" + "a{0,900}" * 20 + "$",
    "open repeats": "^(a?a?a?b?){0,30}$",
    "nested repeats": "^(((a{0,99}){0,99}){0,99}){0,99}$",
    "ambiguous": "(a|b)*a(a|b){300}",
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_of_strangers(server: Running, case: str) -> None:
    """Patterns that a matcher which tries all ways would follow for hours: there is an answer."""
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": PATTERNS[case]}}}
    response = server.chat(response_format=format_, max_tokens=40)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"].startswith('"')


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = ["model", "messages", "prompt", "steering", "stop", "n", "seed", "tools", "response_format", "logit_bias"]
NAMES += ["max_tokens", "temperature", "stream", "stream_options", "echo", "logprobs", "name", "map", "bias", "content"]
NAMES += ["tokens", "routing", "chat_template_kwargs", "tool_choice", "top_logprobs"]
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/steering", "/tokenize", "/detokenize"]


@given(st.sampled_from(PATHS), st.dictionaries(st.sampled_from(NAMES), JSON, max_size=6))
@settings(max_examples=150)
def test_any_json_is_answered(server: Running, path: str, body: dict[str, Any]) -> None:
    """Never a 5xx, and always OpenAI's form."""
    base = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}}
    base |= {"/v1/completions": {"prompt": "a", "max_tokens": 2}}
    response = server.client.post(path, json=base.get(path, {}) | body)
    assert response.status_code < 500, response.text
    if response.status_code >= 400:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]


@given(st.binary(max_size=60))
@settings(max_examples=200)
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    with suppress(ApiError):
        assert strict_json(data) == json.loads(data)


#
# what is written down
#


def test_prompts_are_not_logged(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        server.chat("zinc and quartz", user="somebody", steering="digits-words")
        server.chat("zinc and quartz", n=99)
        server.complete("zinc and quartz", stream=True)
        server.client.get("/v1/models/zinc")
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("steermoe"))
    assert "chat/completions steering=digits-words prompt=" in ours
    assert "zinc" not in ours
    assert "somebody" not in ours


def test_prompts_are_logged_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    with running(log_prompts=True, parallel=1) as server, caplog.at_level(logging.INFO):
        server.chat("zinc\x1b[31m\nand quartz")
        server.complete("one, two,")
        text = caplog.text
    assert "zinc\\u001b[31m\\nand quartz" in text, "no control character reaches the terminal"
    assert "\x1b" not in text
    assert "one, two," in text


def test_no_traces_in_answers(server: Running) -> None:
    texts = [raw(server, body).text for body, *_ in BODIES.values()]
    texts += [server.client.get(path).text for path in ("/v1/models/x", "/nothing", "/v1/steering/x")]
    for text in texts:
        assert "Traceback" not in text
        assert "/work" not in text
        assert "site-packages" not in text
