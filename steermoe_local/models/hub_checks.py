"""Whether a file is the one that the hub names: its SHA-256 (large files), or its git hash (others).

The hash comes from the hub, as the file does: it finds what a disk, a proxy or a content network changed, not a hub
that lies.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import SteerMoEError

_SHA256 = re.compile(r"[0-9a-f]{64}")
_GIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20
_log = logging.getLogger("steermoe.downloads")


class Check:
    """The running hash of a file's bytes, in order.

    `names` are what the hub calls the file by (ETag, object ids); the first SHA-256 among them counts, else the first
    hash of git. Two that contradict each other match nothing.
    """

    def __init__(self, names: tuple[str, ...], size: int) -> None:
        self.size = size
        kind = next((kind for kind in (_SHA256, _GIT) if any(map(kind.fullmatch, names))), None)
        self._expected = {name for name in names if kind and kind.fullmatch(name)}
        self._kind = kind
        self.restart()

    @property
    def is_possible(self) -> bool:
        """Whether the hub gives a hash."""
        return self._kind is not None

    def restart(self) -> None:
        """Begin again at the file's first byte."""
        self.n_bytes = 0
        self._hash: Any = hashlib.sha256() if self._kind is _SHA256 else _git_hash(self.size)

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        if self.is_possible:
            self._hash.update(data)
        self.n_bytes += len(data)

    def read(self, path: Path) -> Check:
        """Take a whole file from its beginning."""
        self.restart()
        with open(path, "rb") as file:
            while data := file.read(_CHUNK):
                self.update(data)
        return self

    def matches(self) -> bool:
        """Whether these were all bytes of that file, as far as the hub says."""
        return self.n_bytes == self.size and (not self.is_possible or self._expected == {self._hash.hexdigest()})

    def say_if_impossible(self, what: str) -> None:
        """Log that a file was not verified, if the hub gives no hash of it."""
        if not self.is_possible:
            _log.warning("%s: not verified, the hub gives no SHA-256 of it", what)


def _git_hash(size: int) -> Any:
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


class TooLong(Exception):
    """A server sends more than the file has."""


class CheckedFile:
    """A file that is written, and whose bytes go through a `Check`; as far as the client's `http_get` uses a file.

    Writing more bytes than the file has raises TooLong: a server may send without end.
    """

    def __init__(self, file: BinaryIO, check: Check) -> None:
        self._file = file
        self._check = check

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._check.size:
            raise TooLong
        self._check.update(data)
        return self._file.write(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def truncate(self, size: int | None = None) -> int:
        """The client starts again when a server sends the whole file instead of its rest."""
        size = self._file.truncate(size)
        self._check.restart()
        self._check.n_bytes = -1 if size else 0  # of an unknown beginning nothing is known: it will be read again
        return size

    def flush(self) -> None:
        self._file.flush()


def require_match(path: Path, names: tuple[str, ...], size: int, what: str, error_class: type[SteerMoEError]) -> None:
    """Read a file of the cache and compare it with the hub's hash; a damaged one is removed.

    Raises `error_class`.
    """
    check = Check(names, size).read(path)
    if not check.matches():
        discard(path)
        reason = "the copy in the cache has another SHA-256 than the hub's file"
        raise error_class(f"{what}: {reason} (it is damaged) and was removed; run it again")
    check.say_if_impossible(what)


def discard(path: Path) -> None:
    """Remove a file of the cache, and what it links to there (the cache's documented layout: blobs/)."""
    blob = path.resolve()
    with contextlib.suppress(OSError):
        if path.is_symlink() and blob.parent.name == "blobs":
            blob.unlink()
        path.unlink()
