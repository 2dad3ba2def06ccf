"""Reads texts of pickled Arrow arrays, in which pandas 3 stores column names when pyarrow is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .pickle_machine import Refused, StandIn

_OFFSETS = {"string": "<i4", "large_string": "<i8"}


@dataclass(frozen=True, slots=True, eq=False)
class ArrowType(StandIn):
    """pyarrow.lib.type_for_alias."""

    alias: Any


@dataclass(frozen=True, slots=True, eq=False)
class ArrowArray(StandIn):
    """pyarrow.lib._restore_array; its argument is (type, length, nulls, offset, buffers, children, dictionary)."""

    content: Any

    def texts(self, charge: Callable[[int], None]) -> list[str]:
        """The texts of an array of texts; `charge` is called with the bytes that they take."""
        content = self.content
        if type(content) is not tuple or len(content) < 5 or not isinstance(content[0], ArrowType):
            raise Refused("an Arrow array of an unknown layout")
        kind, length, _, first, buffers = content[:5]
        if type(kind.alias) is not str or kind.alias not in _OFFSETS or type(buffers) is not list or len(buffers) != 3:
            raise Refused("an Arrow array of something else than texts")
        validity, offset_bytes, data = buffers
        if validity is not None or type(offset_bytes) not in (bytes, bytearray) or type(data) not in (bytes, bytearray):
            raise Refused("an Arrow array with gaps")
        offsets = np.frombuffer(offset_bytes, dtype=_OFFSETS[kind.alias])
        if type(length) is not int or type(first) is not int or not 0 <= first <= first + length < len(offsets):
            raise Refused("an Arrow array whose length is not that of its values")
        ends = offsets[first : first + length + 1].tolist()
        if ends[0] < 0 or ends[-1] > len(data) or any(a > b for a, b in pairwise(ends)):
            raise Refused("an Arrow array whose length is not that of its values")
        charge(ends[-1] - ends[0] + 8 * length)
        return [bytes(data[a:b]).decode("utf-8") for a, b in pairwise(ends)]


@dataclass(frozen=True, slots=True, eq=False)
class ArrowChunks(StandIn):
    """pyarrow.lib.chunked_array."""

    chunks: Any
    kind: Any = None

    def texts(self, charge: Callable[[int], None]) -> list[str]:
        """The texts of all chunks."""
        if type(self.chunks) is not list:
            raise Refused("an Arrow array of an unknown layout")
        charge(64 * len(self.chunks))  # many blocks may share a list
        if not all(isinstance(chunk, ArrowArray) for chunk in self.chunks):
            raise Refused("an Arrow array of an unknown layout")
        return [text for chunk in self.chunks for text in chunk.texts(charge)]


def buffer(data: Any) -> bytes | bytearray:
    """pyarrow.lib.py_buffer."""
    if type(data) not in (bytes, bytearray):
        raise Refused("an Arrow buffer of something else than bytes")
    return data  # type: ignore[no-any-return]
