"""Bounds of compressed files: what they unpack to, and how many members they have."""

from __future__ import annotations

import io
from typing import IO, Any, BinaryIO

_RATIO = 200  # unpacked bytes for one packed; text has 3 to 20
_FREE = 64 << 20  # bytes that any file may unpack to
_DIRECTORY = 16 << 20  # bytes of a zip archive's directory; zipfile takes ten times as much memory
_END = b"PK\x05\x06"
_END_SIZE = 22
_COMMENT = 1 << 16


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


def is_bomb(packed: int, unpacked: int) -> bool:
    """Whether a member of an archive unpacks to far more than data do."""
    return unpacked > max(4 * _FREE, _RATIO * packed)  # tables of counts are mostly zeros


def require_small_directory(file: BinaryIO) -> None:
    """Raise ValueError for a zip archive with so many members that to list them takes more memory than it is worth."""
    end = file.seek(0, 2)
    start = max(0, end - _COMMENT - _END_SIZE)
    file.seek(start)
    tail = file.read(end - start)
    file.seek(0)
    found = tail.rfind(_END)
    if found >= 0 and int.from_bytes(tail[found + 12 : found + 16], "little") > _DIRECTORY:
        raise ValueError(f"its list of members takes more than {_DIRECTORY >> 20} MiB")
