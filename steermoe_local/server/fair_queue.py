"""A queue in which clients take turns, and so do the requests of one client."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Gives out one item of each client in turn, and within a client one of each group.

    A client, or a group, that was served goes to the end, so one with many items does not delay the others, and clients
    with one item each are served in the order in which they came. Not safe for threads.
    """

    def __init__(self) -> None:
        self._clients: OrderedDict[Hashable, OrderedDict[Hashable, deque[T]]] = OrderedDict()

    def put(self, client: Hashable, group: Hashable, item: T) -> None:
        """Add an item."""
        self._clients.setdefault(client, OrderedDict()).setdefault(group, deque()).append(item)

    def get(self) -> T | None:
        """Remove and return the next item; None if there is none."""
        if not self._clients:
            return None
        client, groups = self._clients.popitem(last=False)
        group, items = groups.popitem(last=False)
        item = items.popleft()
        if items:
            groups[group] = items
        if groups:
            self._clients[client] = groups
        return item

    def drop(self, client: Hashable, group: Hashable) -> list[T]:
        """Remove and return the items of a group."""
        groups = self._clients.get(client, OrderedDict())
        items = groups.pop(group, deque())
        if not groups:
            self._clients.pop(client, None)
        return list(items)

    def __iter__(self) -> Iterator[T]:
        for groups in self._clients.values():
            for items in groups.values():
                yield from items

    @property
    def n_groups(self) -> int:
        """How many groups have items."""
        return sum(len(groups) for groups in self._clients.values())
