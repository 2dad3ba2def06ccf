"""Accepting connections: all that wait are taken, and a stop in the step in which one comes leaves no error."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import pytest

from steermoe_local.server.accepting import Acceptor
from steermoe_local.server.connections import Connections


class Counting(asyncio.Protocol):
    """A protocol that counts the connections made."""

    def __init__(self, made: list[bool], reserved: bool) -> None:
        self._made, self._reserved = made, reserved

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._made.append(self._reserved)
        transport.close()


class WithoutReaders(asyncio.SelectorEventLoop):
    """A loop that, as Windows' proactor loop, tells of no readable descriptors, and accepts in its own way."""

    own = 0

    def add_reader(self, *_: Any) -> None:
        raise NotImplementedError

    async def sock_accept(self, sock: socket.socket) -> tuple[socket.socket, Any]:
        self.own += 1
        return await super().sock_accept(sock)


def run(loop: asyncio.AbstractEventLoop, wanted: Callable[[Acceptor, socket.socket, list[bool]], Any]) -> list[Any]:
    """Run `wanted` with an acceptor and its listening socket; the errors that the loop would log."""
    errors: list[Any] = []
    made: list[bool] = []

    async def main() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        acceptor = Acceptor(listening, lambda reserved: Counting(made, reserved), Connections(8))  # type: ignore[arg-type, return-value]
        await asyncio.sleep(0)  # it waits for a connection now
        await asyncio.sleep(0)
        await wanted(acceptor, listening, made)

    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        loop.run_until_complete(main())
    finally:
        loop.close()
    return errors


@pytest.mark.parametrize("loop", [asyncio.SelectorEventLoop, WithoutReaders])
def test_every_connection_is_taken(loop: type[asyncio.SelectorEventLoop]) -> None:
    async def connect(acceptor: Acceptor, listening: socket.socket, made: list[bool]) -> None:
        for number in range(1, 4):
            with socket.create_connection(listening.getsockname()):
                while len(made) < number:
                    await asyncio.sleep(0.001)
        await acceptor.close()

    used = loop()
    assert run(used, connect) == []
    assert not isinstance(used, WithoutReaders) or used.own >= 3


def test_a_stop_in_the_step_in_which_a_connection_comes() -> None:
    async def connect_and_stop(acceptor: Acceptor, listening: socket.socket, made: list[bool]) -> None:
        with socket.create_connection(listening.getsockname()):
            # its first step cancels, and the loop has found the socket readable before it
            await asyncio.ensure_future(acceptor.close())
            await asyncio.sleep(0)
        assert made == []

    assert run(asyncio.SelectorEventLoop(), connect_and_stop) == []
