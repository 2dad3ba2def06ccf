"""Requests meant to hurt: {name: (bytes of the whole request, statuses that may answer it)}."""

from __future__ import annotations

import functools
import json
from typing import Any

Statuses = frozenset[int]
REFUSED: Statuses = frozenset(range(400, 500)) - {404, 408, 429}
CHAT = "/v1/chat/completions"
ASKED: dict[str, Any] = {"messages": [{"role": "user", "content": "one"}], "max_tokens": 2}


def request(body: bytes, path: str = CHAT, *, method: str = "POST", host: str = "127.0.0.1", **headers: str) -> bytes:
    """A whole request that closes its connection."""
    fields = {"Host": host, "Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= {"Connection": "close"} | {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def with_text(text: str, **fields: Any) -> bytes:
    """A chat about a text."""
    return json.dumps(ASKED | {"messages": [{"role": "user", "content": text}]} | fields).encode()


BODIES: dict[str, bytes] = {
    "duplicate keys": b'{"x": {' + b",".join(b'"k%d": 1, "k%d": 2' % (n, n) for n in range(4000)) + b"}}",
    "many keys": json.dumps({f"k{n}": n for n in range(200_000)}).encode(),
    "deep lists": b'{"messages": ' + b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long digits": b'{"n": ' + b"9" * 200_000 + b"}",
    "long fraction": b'{"temperature": 0.' + b"1" * 200_000 + b"}",
    "huge exponent": b'{"temperature": 1e99999}',
    "invalid utf-8": b'{"prompt": "\xff\xfe\xc0\x80"}',
    "lone surrogate": b'{"prompt": "\\ud800"}',
    "nul in a key": b'{"messages\\u0000": []}',
    "millions of lists": b'{"messages": [' + b"[]," * 1_000_000 + b"[]]}",
    "many messages": json.dumps({"messages": [{"role": "user", "content": "a"}] * 50_000}).encode(),
    "17 MiB": b" " * (17 << 20),
    "long text": with_text("one, " * 500_000),
    "long word": with_text("a" * 600_000),
    "preset of another model": with_text("one", steering={"map": "digits-words", "preset": "faithful"}),
    "more than all experts": with_text("one", steering={"map": "digits-words", "deactivate": 1_000_000}),
    "path as a map": with_text("one", steering={"map": "../../etc/passwd"}),
    "huge layers": with_text("one", steering={"map": "digits-words", "layers": "0-" + "9" * 99}),
    "nested schema": with_text(
        "one",
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {"type": "null"}}}},
    ),
    "deep schema": b'{"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_schema", '
    b'"json_schema": {"name": "a", "schema": ' + b'{"items": ' * 40 + b"{}" + b"}" * 43,
    "pattern that explodes": with_text(
        "one", response_format={"type": "json_object", "schema": {"type": "string", "pattern": "(a{1,999}){1,999}$"}}
    ),
    "unknown map": with_text("one", steering={"map": "nothing"}),
}


@functools.cache
def requests() -> dict[str, tuple[bytes, Statuses]]:
    """All of them."""
    found = {name: (request(body), REFUSED) for name, body in BODIES.items()}
    for name in (
        "more than all experts",
        "pattern that explodes",
    ):  # taken for what they say, and answered in good time
        found[name] = (found[name][0], REFUSED | {200})
    found["unknown map"] = (request(BODIES["unknown map"]), frozenset({404}))
    body = json.dumps(ASKED).encode()
    registration = json.dumps({"name": "x", "map": {"format": "steermoe-expert-map", "rd": [[1e9] * 9000]}}).encode()
    found |= {
        "a damaged map": (request(registration, "/v1/steering"), REFUSED),
        "huge header": (request(body, X_Long="a" * 200_000), REFUSED),
        "many headers": (request(body, **{f"X_{n}": "a" for n in range(5000)}), REFUSED),
        "wrong method": (request(body, method="DELETE"), REFUSED),
        "unknown method": (request(body, method="BREW"), REFUSED),
        "form": (request(body, Content_Type="text/plain"), REFUSED),
        "foreign host": (request(body, host="evil.example"), REFUSED),
        "odd host": (request(body, host="127.0.0.1:80:80"), REFUSED),
        "no path": (request(body, "/v1/nothing"), frozenset({404})),
        "path up": (request(b"", "/page/../../../etc/passwd", method="GET"), REFUSED | {404}),
        "no http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200) + b"\r\n\r\n", REFUSED),
        "negative length": (request(body, Content_Length="-1"), REFUSED),
        "two lengths": (request(body).replace(b"Connection", b"Content-Length: 7\r\nConnection"), REFUSED),
        "cut body": (request(body)[:-5], REFUSED | {408}),
    }
    return found
