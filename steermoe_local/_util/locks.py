"""Locks on outputs: a second process that would write the same output is refused, and told who writes it.

A lock is one of the operating system on `.NAME.lock` beside the output (flock, on Windows a byte of the file), so it
ends with its process, however that ends. The file holds the number of the process for the message, and is removed with
the lock; one that a killed process left has no meaning. The `filelock` library is not used: it empties the file
whenever somebody asks for the lock, and so cannot say who holds it.

A file system without locks (some network file systems) is told in a warning, and the work goes on without. One whose
locks do not reach other machines (NFS mounted with `nolock` or `local_lock`) cannot be told from others.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import stat
import sys
import time
import weakref
from pathlib import Path

from ..errors import BusyError, UsageError
from .disk import cannot_write
from .file_kinds import StrPath

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("steermoe.files")

_HELD = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK}
_FAR = 1 << 62  # the byte that Windows locks: other processes may read and write those before it
_FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_FLAGS |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOINHERIT", 0)
_held: weakref.WeakSet[OutputLock] = weakref.WeakSet()


def try_lock(fd: int) -> bool | None:
    """Lock an open file until it is closed; False if another open file has the lock, None if there are no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(fd, _FAR, os.SEEK_SET)
            try:
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(fd, 0, os.SEEK_SET)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _HELD else None
    return True


def is_at(fd: int, path: StrPath) -> bool:
    """Whether an open file is still the one at `path`."""
    try:
        here, there = os.fstat(fd), os.lstat(path)
    except OSError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def open_without_links(path: StrPath, flags: int) -> int:
    """`os.open` of a regular file alone, without following a link or waiting for a pipe. Raises OSError."""
    fd = os.open(path, flags | _FLAGS, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return fd


class OutputLock:
    """The right to write one output, a file or a folder; a context manager, which may be entered again while held.

    Names that lead to one place (relative ones, symbolic links) are one output. Another `OutputLock` of the same
    process is refused like one of another.
    """

    def __init__(self, output: StrPath, wait: float = 0.0) -> None:
        """`wait`: seconds for which `acquire` waits for another process that needs the lock but for a moment."""
        self.output = output
        self._wait = wait
        target = Path(os.path.realpath(output))
        self.path = target / ".steermoe.lock" if target.is_dir() else target.with_name(f".{target.name}.lock")
        self._fd: int | None = None
        self._depth = 0

    def __enter__(self) -> OutputLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this object has the lock."""
        return self._depth > 0

    def acquire(self) -> None:
        """Take the lock. Raises BusyError, which names the process that has it, UsageError and
        StorageError (no lock file can be there)."""
        if not self._depth:
            try:
                self._fd = self._locked()
            except OSError as error:
                failed = cannot_write(self.output, error)
                if isinstance(failed, UsageError) and os.path.lexists(self.path):  # what stands there is in the way
                    raise UsageError(
                        f"{self.output}: cannot be locked: {self.path}: {error.strerror or error}; remove that, or "
                        "choose another place"
                    ) from error
                raise failed from error
            _held.add(self)
        self._depth += 1

    def release(self) -> None:
        """Give the lock back, when it was released as often as acquired."""
        if self._depth:
            self._depth -= 1
        if self._depth or self._fd is None:
            return
        fd, self._fd = self._fd, None
        with contextlib.suppress(OSError):
            if is_at(fd, self.path) and sys.platform != "win32":
                os.unlink(self.path)  # while it is held: nobody else has this file then
        os.close(fd)
        if sys.platform == "win32":
            with contextlib.suppress(OSError):  # another process may have opened it
                os.unlink(self.path)

    def _locked(self) -> int:
        """An open lock file with the lock. Raises BusyError, OSError."""
        end = time.monotonic() + self._wait
        while True:
            try:
                fd = open_without_links(self.path, os.O_RDWR | os.O_CREAT)
            except PermissionError:
                self._remove_other_users()
                continue
            got = try_lock(fd)
            if got is False:
                holder = _holder(fd)
                os.close(fd)
                if time.monotonic() < end:
                    time.sleep(0.02)
                    continue
                raise self._busy(holder)
            if not is_at(fd, self.path):  # its last holder removed it meanwhile
                os.close(fd)
                continue
            if got is None:
                log.warning(
                    "%s: this file system has no locks; do not let another steermoe write it meanwhile", self.output
                )
            with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
                os.ftruncate(fd, 0)
                os.write(fd, f"{os.getpid()} {socket.gethostname()}\n".encode())
            return fd

    def _remove_other_users(self) -> None:
        """Remove the lock file of another user whose process is gone. Raises BusyError, OSError."""
        fd = open_without_links(self.path, os.O_RDONLY)
        try:
            if try_lock(fd) is False:
                raise self._busy(_holder(fd))
            if is_at(fd, self.path):
                os.unlink(self.path)
        finally:
            os.close(fd)

    def _busy(self, holder: tuple[str, str]) -> BusyError:
        pid, host = holder
        if pid == str(os.getpid()) and host in ("", socket.gethostname()):
            return BusyError(f"{self.output}: this process, pid {pid}, is writing this already; wait until it is done")
        who = f"another steermoe, pid {pid}," if pid else "another steermoe"
        if host not in ("", socket.gethostname()):
            who = f"{who.rstrip(',')} on {host},"
        return BusyError(f"{self.output}: {who} is writing this; wait until it ends, end it, or name another output")

    def _forget(self) -> None:
        """In a forked child: the lock is the parent's."""
        fd, self._fd, self._depth = self._fd, None, 0
        if fd is not None:
            os.close(fd)


def _holder(fd: int) -> tuple[str, str]:
    """(pid, host) that a lock file names, "" where it does not say."""
    for _ in range(50):  # it is written right after the lock was taken
        with contextlib.suppress(OSError, ValueError):
            os.lseek(fd, 0, os.SEEK_SET)
            pid, _, host = os.read(fd, 300).decode("utf-8", "replace").strip().partition(" ")
            if pid.isdecimal() and len(pid) < 12:
                return pid, "".join(letter for letter in host if letter.isprintable())[:100]
        time.sleep(0.002)
    return "", ""


def _after_fork() -> None:
    for lock in list(_held):
        lock._forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
