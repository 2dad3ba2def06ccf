"""Turns: so many at once, and the clients that wait take turns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .fair_queue import FairQueue


class Turns:
    """Lets at most `most` parts of the event loop's tasks run at once (`turn`), those of each client in turn."""

    def __init__(self, most: int) -> None:
        self._n_free = most
        self._waiting: FairQueue[asyncio.Future[None]] = FairQueue()

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it."""
        if self._n_free:  # then nobody waits
            self._n_free -= 1
        else:
            await self._wait(client)
        try:
            yield
        finally:
            self._give()

    async def _wait(self, client: str) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.put(client, mine, mine)
        try:
            await mine
        except asyncio.CancelledError:
            if mine.done() and not mine.cancelled():
                self._give()  # the turn came in the same moment
            else:
                self._waiting.drop(client, mine)
            raise

    def _give(self) -> None:
        while (following := self._waiting.get()) is not None:
            if not following.done():
                following.set_result(None)
                return
        self._n_free += 1
