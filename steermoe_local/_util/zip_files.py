"""Opening zip archives from strangers: zipfile makes an object for each member, so their list is bounded first."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, cast

_MAX_DIRECTORY = 4 << 20  # bytes of the list of members: some 50,000 of them
_SHARE = 64  # the list of a larger archive may take this part of it
_MAX_END = 1 << 17  # bytes of the end of an archive, which has a comment of 64 KiB at most


class _Bounded(io.RawIOBase):
    """A file of which no more than a list of members may take is read at once until it is `ready`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._most = max(_MAX_DIRECTORY, file.seek(0, 2) // _SHARE)
        self.ready = False

    def read(self, size: int = -1) -> bytes:
        if self.ready or 0 <= size <= self._most:
            return self._file.read(size)
        data = self._file.read(_MAX_END + 1) if size < 0 else b""
        if size > self._most or len(data) > _MAX_END:
            raise zipfile.BadZipFile("its list of members is too long")
        return data

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


@contextlib.contextmanager
def zip_archive(file: BinaryIO) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive that can be sought in; `file` stays open. Raises what zipfile raises on damage."""
    bounded = _Bounded(file)
    with zipfile.ZipFile(cast(BinaryIO, bounded)) as archive:
        bounded.ready = True
        yield archive
