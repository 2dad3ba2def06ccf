"""The responses that were given last, in memory, for requests that name them or their items."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .api_errors import ApiError
from .response_items import as_items
from .schemas_items import ReferenceItem

_MAX_RESPONSES = 256
_MAX_CHARACTERS = 64 * 1024 * 1024  # of the JSON of all


@dataclass(frozen=True)
class _Kept:
    body: dict[str, Any]
    items: list[Any]  # the conversation up to its end
    own_ids: list[str]
    size: int


class ResponseStore:
    """Responses by id, and their output items by theirs; the oldest ones give way. For one thread."""

    def __init__(self, most: int = _MAX_RESPONSES, most_characters: int = _MAX_CHARACTERS) -> None:
        self._most, self._most_characters = most, most_characters
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._items: dict[str, Any] = {}
        self._size = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, body: dict[str, Any], items: Sequence[Any]) -> None:
        """Keep a finished response, the answer to the conversation `items`; one that is too large is not kept."""
        output = as_items(body["output"])
        conversation = [*items, *output]
        size = len(json.dumps(body)) + sum(len(item.model_dump_json()) for item in conversation)
        if size > self._most_characters:
            return
        self._kept[body["id"]] = _Kept(body, conversation, [item.id for item in output], size)
        self._items |= {item.id: item for item in output}
        self._size += size
        while len(self._kept) > self._most or self._size > self._most_characters:
            self.delete(next(iter(self._kept)))

    def body(self, id_: str) -> dict[str, Any]:
        """The JSON of a response. Raises ApiError (404)."""
        return self._found(id_, None).body

    def delete(self, id_: str) -> None:
        """Forget a response and its items. Raises ApiError (404)."""
        kept = self._found(id_, None)
        del self._kept[id_]
        self._size -= kept.size
        for item_id in kept.own_ids:
            self._items.pop(item_id, None)

    def conversation(self, previous: str | None, items: Sequence[Any]) -> list[Any]:
        """The items of a previous response, its answer, and `items`, references resolved.

        Raises ApiError (404) for what is not kept.
        """
        found = list(self._found(previous, "previous_response_id").items) if previous is not None else []
        for i, item in enumerate(items):
            if isinstance(item, ReferenceItem):
                if item.id not in self._items:
                    raise ApiError.not_found(
                        f"input[{i}]: item {item.id!r} is not kept; send the item itself",
                        param=f"input[{i}]",
                        code="item_not_found",
                    )
                item = self._items[item.id]
            found.append(item)
        return found

    def _found(self, id_: str, param: str | None) -> _Kept:
        if id_ not in self._kept:
            where = "" if param is None else f"{param}: "
            raise ApiError.not_found(
                f"{where}response {id_!r} is not kept: the last {self._most} are, in memory, unless asked for "
                "with store: false; send the conversation as input",
                param=param,
                code="response_not_found",
            )
        return self._kept[id_]
