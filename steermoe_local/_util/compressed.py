"""Compressed files, which unpack to a bounded multiple of their size."""

from __future__ import annotations

import io
from typing import IO, Any

_RATIO = 200  # unpacked bytes for one packed; text has 3 to 20
_FREE = 64 << 20  # bytes that any file may unpack to


class Unpacked(io.RawIOBase):
    """Reads what `packed`, a file of `size` bytes, unpacks to; raises OSError for far more than data have."""

    def __init__(self, packed: IO[bytes], size: int) -> None:
        super().__init__()
        self._packed, self._left = packed, max(_FREE, _RATIO * size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._packed.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(f"it unpacks to more than {_RATIO} times its size")
        buffer[: len(data)] = data
        return len(data)
