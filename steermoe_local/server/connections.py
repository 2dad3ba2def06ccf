"""Which connections are open, how many may be, and which one is closed when there are too many."""

from __future__ import annotations

import asyncio
import enum
import functools
import ipaddress
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

from .peers import Ends, open_ends

RESERVE = 16  # connections beyond the limit, which get /health or an error and are closed
_ORDERED = 16  # connections that are chosen together
_LOOKED_SECONDS = 0.5  # between two looks at clients that have ended their side


class State(enum.IntEnum):
    """What a connection is doing; the least is given up first."""

    IDLE = 0
    """It waits for a request, or for the rest of a request's header."""
    BODY = 1
    """It waits for the rest of a body."""
    UNREAD = 2
    """Its client does not take what was sent."""
    ANSWERING = 3
    """It has a whole request, and is never given up for others."""


class Connection(Protocol):
    """What `Connections` knows of a connection."""

    state: State
    since: float
    """When its state began, in the clock of the event loop."""
    address: str
    reserved: bool
    """Whether it is one of the reserve."""
    ends: Ends | None
    """Both ends, if the client's is a socket of this machine."""

    def abort(self) -> None:
        """End it at once."""

    def look(self, there: bool | None) -> None:
        """Take note of whether the client is still there; None if that cannot be seen."""


class Connections:
    """The open connections of a server: `limit` of them, and a reserve so that /health is always answered.

    At the limit a new connection takes the place of one that waits for its client: first those without a request, then
    those without a whole body, then those whose client does not read; of these one of the address that has the most,
    and the oldest of them. Where there is none, because all are being answered, it becomes one of the reserve.
    """

    def __init__(self, limit: int, reserve: int = RESERVE) -> None:
        self.limit, self.reserve = limit, reserve
        self._open: dict[Connection, str] = {}  # the oldest first, and whose share each is of
        self._counts: Counter[str] = Counter()  # of the shares
        self._n_reserved = 0
        self._next: list[tuple[Connection, float]] = []  # to be given up, if they still wait as they did
        self._half_closed: dict[Connection, None] = {}
        self._looking: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._open)

    def add(self, connection: Connection) -> None:
        """Take a new connection in; its `reserved` says whether as one of the reserve."""
        share = share_of(connection.address)
        self._counts[share] += 1
        if not connection.reserved and len(self._open) - self._n_reserved >= self.limit:
            connection.reserved = not self._make_place()
        if connection.reserved:
            if self._n_reserved >= self.reserve:
                self._close(next(other for other in self._open if other.reserved))  # its answer is short
            self._n_reserved += 1
        self._open[connection] = share

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is closed."""
        share = self._open.pop(connection, None)
        if share is not None:
            self._n_reserved -= connection.reserved
            self._counts[share] -= 1
            if not self._counts[share]:
                del self._counts[share]
        self._half_closed.pop(connection, None)

    def make_room(self) -> bool:
        """Close one that waits for its client, if there is one: the process has no descriptor left."""
        order = self._order(self._open)
        if order:
            self._close(order[-1][0])
        return bool(order)

    def _make_place(self) -> bool:
        """Close one that is not of the reserve and waits for its client, if there is one."""
        if self._close_next():
            return True
        # for some at a time: a thousand connections that come at once are put into order few times
        self._next = self._order(other for other in self._open if not other.reserved)[-_ORDERED:]
        return self._close_next()

    def _close_next(self) -> bool:
        while self._next:
            connection, since = self._next.pop()
            if connection in self._open and connection.since == since and not connection.reserved:
                self._close(connection)
                return True
        return False

    def _order(self, among: Iterable[Connection]) -> list[tuple[Connection, float]]:
        """Those that wait for their client, the one to give up first at the end, and since when they do."""
        waiting = [connection for connection in among if connection.state is not State.ANSWERING]
        waiting.sort(key=lambda one: (one.state, -self._counts[self._open[one]], one.since), reverse=True)
        return [(connection, connection.since) for connection in waiting]

    def _close(self, connection: Connection) -> None:
        self.remove(connection)
        connection.abort()

    #
    # clients that have ended their side
    #

    def half_closed(self, connection: Connection) -> None:
        """Look from now on whether the client is still there: it will send no more, and may wait for its answer."""
        self._half_closed[connection] = None
        if self._looking is None:
            self._looking = asyncio.ensure_future(self._look())

    async def _look(self) -> None:
        while self._half_closed:
            asked = {connection: connection.ends for connection in self._half_closed}
            ends = {found for found in asked.values() if found is not None}
            # in a thread: the kernel takes milliseconds to write its table of connections
            there = await asyncio.to_thread(open_ends, ends) if ends else None
            for connection, its_ends in asked.items():
                if connection in self._half_closed:
                    connection.look(its_ends in there if there is not None and its_ends is not None else None)
            await asyncio.sleep(_LOOKED_SECONDS)
        self._looking = None


@functools.lru_cache(maxsize=1024)
def share_of(address: str) -> str:
    """Whose connections count together: an IPv4 address, or the /64 network of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        found = found.ipv4_mapped or found
    return str(ipaddress.ip_network((found, 64), strict=False)) if found.version == 6 else str(found)
