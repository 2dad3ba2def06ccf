"""Accepting connections, also where the process has no descriptor left for one."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable

from .connections import RESERVE, Connections
from .protocol import GuardedProtocol

try:
    import resource
except ImportError:  # Windows, where sockets are not counted among the open files
    resource = None  # type: ignore[assignment]

log = logging.getLogger("steermoe.server")

_OTHER_FILES = 128  # of the process: the model's, the log's, children's
_NO_DESCRIPTOR = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
_PAUSE = 0.1  # seconds
_SAID_SECONDS = 60.0  # between two lines of the log


class Acceptor:
    """Accepts connections one after the other; asyncio's own loop fails 2,048 times at once for lack of a descriptor.

    A spare descriptor is kept: where there is no other, it is given up for the next connection, which becomes one of
    the reserve, so that /health is still answered.
    """

    def __init__(
        self, listening: socket.socket, make: Callable[[bool], GuardedProtocol], connections: Connections
    ) -> None:
        """`make` makes the protocol of a connection; its argument: one of the reserve from the beginning."""
        self._listening, self._make, self._connections = listening, make, connections
        self._spare: int | None = os.open(os.devnull, os.O_RDONLY)
        self._said = -_SAID_SECONDS
        listening.setblocking(False)
        self._task = asyncio.ensure_future(self._run())

    async def close(self) -> None:
        """Accept no more."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._listening.close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    async def _run(self) -> None:
        while True:
            try:
                found = await self._next()
            except OSError as error:
                if error.errno in _NO_DESCRIPTOR:
                    await self._accept_without(error)
                else:
                    await asyncio.sleep(0.01)  # the client is gone already
            else:
                await self._serve(found)

    async def _next(self) -> socket.socket:
        """The next connection.

        Not by `sock_accept` where it can be helped: cancelled in the loop's step in which a connection comes, that
        takes the connection, drops it, and has InvalidStateError logged.
        """
        loop = asyncio.get_running_loop()
        while True:
            with contextlib.suppress(BlockingIOError, InterruptedError):
                found, _ = self._listening.accept()
                found.setblocking(False)
                return found
            ready: asyncio.Future[None] = loop.create_future()
            try:
                loop.add_reader(self._listening, _finish, ready)
            except NotImplementedError:  # Windows' proactor loop
                return (await loop.sock_accept(self._listening))[0]
            try:
                await ready
            finally:
                loop.remove_reader(self._listening)

    async def _serve(self, found: socket.socket, reserved: bool = False) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self._make(reserved), found)
        except OSError:
            found.close()

    async def _accept_without(self, error: OSError) -> None:
        """Accept one connection by the spare descriptor, and give up another one."""
        if time.monotonic() - self._said >= _SAID_SECONDS:
            self._said = time.monotonic()
            log.error("no descriptor for a further connection (%s); raise ulimit -n", error.strerror)
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
            with contextlib.suppress(OSError):
                found, _ = self._listening.accept()
                found.setblocking(False)
                self._connections.make_room()  # before it is one of them
                await self._serve(found, reserved=True)
        else:
            self._connections.make_room()
        await asyncio.sleep(_PAUSE)
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY)


def _finish(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def room_for(connections: int) -> int:
    """How many connections the process may have, at most as many as wanted; its limit of open files is raised."""
    if resource is None:
        return connections
    needed = connections + RESERVE + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    return max(1, soft - RESERVE - _OTHER_FILES, soft // 2 - RESERVE)
