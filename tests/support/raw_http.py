"""Requests as bytes on a socket, for what no HTTP library sends."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any


def address_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def connect(url: str, data: bytes = b"", timeout: float = 20, receive_buffer: int | None = None) -> socket.socket:
    """A connection on which something was sent."""
    found = socket.socket()
    if receive_buffer is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    found.settimeout(timeout)
    found.connect(address_of(url))
    found.sendall(data)
    return found


def rest_of(connection: socket.socket, *, resets: bool = False) -> bytes:
    """What comes until the other side ends the connection; with `resets`, it must end by a reset."""
    found = b""
    try:
        while part := connection.recv(65536):
            found += part
    except ConnectionError:
        return found
    assert not resets, "the connection ended in order"
    return found


def exchange(url: str, data: bytes, *, half_close: bool = False) -> bytes:
    """All that a request is answered until the server closes the connection."""
    with connect(url) as connection:
        with suppress(ConnectionError):
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        return rest_of(connection)


def get(path: str = "/health", *headers: str, version: str = "1.1", method: str = "GET") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", *(headers or ("Host: localhost", "Connection: close"))]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


def post(path: str, body: Any, *headers: str, version: str = "1.1") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def status_of(answer: bytes) -> int:
    """The status of the last answer on a connection that is no 1xx; 0 if there is none."""
    statuses = [int(part.split(b" ")[1]) for part in answer.split(b"\r\n") if part.startswith(b"HTTP/1.1 ")]
    final = [status for status in statuses if status >= 200]
    return final[-1] if final else 0


def error_of(answer: bytes) -> dict[str, Any]:
    """The error of an answer, which must be in OpenAI's form."""
    head, _, body = answer.rpartition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), answer
    error: dict[str, Any] = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error
