"""Clients that keep to no rule: they say nothing, stop in the middle, do not read, or close one half."""

from __future__ import annotations

import json
import random
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.integration.soak.hostile import CHAT, request

Address = tuple[str, int]
ENDLESS = {"prompt": "one, two,", "logit_bias": [[0, False]], "temperature": 0, "max_tokens": 400, "stream": True}
_HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
BEGINNINGS = (
    b"",
    b"GET /health",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Le",
    _HEAD + b"Content-Length: 500\r\n\r\n{",
)


def connect(address: Address, *, receive_buffer: int = 0) -> socket.socket:
    """A connection; `receive_buffer` in bytes, as small as the system allows."""
    found = socket.socket()
    found.settimeout(60)
    try:
        if receive_buffer:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        found.connect(address)
    except BaseException:
        found.close()
        raise
    return found


def reset(connection: socket.socket) -> None:
    """Close without a goodbye."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@contextmanager
def silent(address: Address, n: int) -> Iterator[list[socket.socket]]:
    """`n` connections that say nothing more after their beginning; the server may close them. 200 begin a second."""
    held: list[socket.socket] = []
    try:
        for number in range(n):
            time.sleep(0.005)
            connection = connect(address)
            held.append(connection)
            try:
                connection.sendall(BEGINNINGS[number % len(BEGINNINGS)])
            except OSError:  # the server has closed it again
                continue
        yield held
    finally:
        for connection in held:
            connection.close()


def status_of(address: Address, data: bytes, *, half_close: bool = False) -> tuple[int, bytes]:
    """Send bytes, perhaps close this half, and read the answer: its status and body; 0: closed without an answer."""
    with connect(address) as connection:
        try:
            connection.sendall(data)
            if half_close:
                connection.shutdown(socket.SHUT_WR)
        except OSError:  # refused before all was sent
            pass
        answer = b""
        try:
            while part := connection.recv(65536):
                answer += part
        except ConnectionError:
            pass
    head, _, body = answer.partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    return (int(words[1]), body) if len(words) > 1 and words[0].startswith(b"HTTP/1.") else (0, answer)


def ask_half_closed(address: Address, body: dict[str, Any]) -> tuple[int, Any]:
    """Ask, and close this half of the connection before the answer, as `nc -N` does."""
    status, data = status_of(address, request(json.dumps(body).encode(), CHAT), half_close=True)
    return status, json.loads(data) if status else data


def read_slowly(address: Address, rng: random.Random, seconds: float) -> int:
    """Ask for a long stream, and read a byte now and then, or nothing; how many bytes came."""
    n_read = 0
    with connect(address, receive_buffer=4096) as connection:
        connection.sendall(request(json.dumps(ENDLESS | {"logprobs": 5}).encode(), "/v1/completions"))
        reads = rng.random() < 0.5
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.2)
            if reads:
                try:
                    n_read += len(connection.recv(64))
                except (ConnectionError, TimeoutError):
                    break
    return n_read


def begin_and_reset(address: Address, rng: random.Random) -> None:
    """Ask for a long stream, and be gone: at once, or in the middle of it."""
    connection = connect(address)
    try:
        connection.sendall(request(json.dumps(ENDLESS).encode(), "/v1/completions"))
        if rng.random() < 0.7:
            connection.recv(rng.randrange(1, 4000))
    finally:
        (reset if rng.random() < 0.5 else socket.socket.close)(connection)
