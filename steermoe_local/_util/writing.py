"""Writing files so that a crash, a full disk or a second process leaves the old file or the new one, never a mixture.

`replacing` writes a temporary file beside the target, brings it to the disk (fsync), renames it, and brings the folder
to the disk. The temporary file `.NAME.<12 hex digits>.tmp` is locked while its process lives (`locks.py`): the next
writer of the same target removes those of killed processes, and no others.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError
from .disk import cannot_write, flush_file, flush_folder
from .file_kinds import StrPath
from .locks import is_at, open_without_links, try_lock
from .windows import replace


def beside(path: StrPath, suffix: str) -> Path:
    """The path of a further file of an output: its name with a suffix, where the output really is if it is a link.

    Raises UsageError if something else than a file is there (`require_no_link`).
    """
    return require_no_link(Path(f"{os.path.realpath(path) if os.path.islink(path) else os.fspath(path)}{suffix}"))


def require_no_link(path: Path) -> Path:
    """Check the path of a file that is written and that nobody has named: it may be one that a stranger put there.

    A link would be followed to a file elsewhere; a pipe would be waited for. Links to folders pass. Returns the path;
    raises UsageError.
    """
    try:
        mode = os.lstat(path).st_mode
        is_other = not (stat.S_ISREG(mode) or os.path.isdir(path))
    except (OSError, ValueError):  # nothing there, or writing says why there cannot be
        return path
    if is_other:
        what = "a symbolic link" if stat.S_ISLNK(mode) else "not a regular file"
        raise UsageError(f"{path}: {what}, which is not written to here; remove it, or name another output")
    return path


def remove(path: Path) -> None:
    """Remove a file, if it is there, and bring that to the disk. Raises UsageError, StorageError."""
    try:
        path.unlink()
        flush_folder(path.parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise cannot_write(path, error) from error


class Replacement:
    """A temporary file, `path`, that becomes `target` by `commit`, or is removed by `abort`."""

    def __init__(self, given: StrPath, mode: int = 0o666) -> None:
        """Make it, with the permissions `mode` as far as the umask lets. Raises UsageError, StorageError."""
        self._given, self.target = given, require_writable(given)
        remove_leftovers(self.target)
        try:
            self.path, fd = _locked_file(self.target, mode)
        except OSError as error:
            raise cannot_write(given, error) from error
        self._fd: int | None = fd

    def commit(self) -> None:
        """Bring the file to the disk, give it its name, and bring the name to the disk.

        Raises OSError; the old file is still there then, unless the last of the three failed.
        """
        fd = self._fd
        if fd is None or not is_at(fd, self.path):  # somebody wrote another file of this name
            self._close()
            self._fd = fd = os.open(self.path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        flush_file(fd)
        if sys.platform == "win32":  # which does not rename open files
            self._close()
        replace(self.path, self.target)
        self._close()
        flush_folder(self.target.parent)

    def abort(self) -> None:
        """Remove the temporary file; after `commit` it does nothing."""
        if sys.platform == "win32":
            self._close()
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)


@contextlib.contextmanager
def replacing(path: StrPath, mode: int = 0o666, *, cure: str = "") -> Iterator[Path]:
    """Yield an empty temporary file beside `path`, which is renamed to `path` when the block succeeds.

    A reader sees the old file or the new one, never half a file, after a crash too. A symbolic link stays a link.
    Raises UsageError when no file can be written there, StorageError when the disk is full or fails; its message ends
    with `cure`, else "run the command again".
    """
    replacement = Replacement(path, mode)
    try:
        yield replacement.path
        replacement.commit()
    except OSError as error:
        raise cannot_write(path, error, cure) from error
    finally:
        replacement.abort()


def remove_leftovers(target: Path) -> None:
    """Remove temporary files of `target` whose process is gone."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{12}}\.tmp")
    with contextlib.suppress(OSError), os.scandir(target.parent) as entries:
        for path in [entry.path for entry in entries if name.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_if_free(path)


def _remove_if_free(path: str) -> None:
    fd = open_without_links(path, os.O_RDWR)
    try:
        free = try_lock(fd) is True and is_at(fd, path)
        if free and sys.platform != "win32":
            os.unlink(path)  # under the lock: its process, if it only begins, sees that the file is gone
    finally:
        os.close(fd)
    if free and sys.platform == "win32":
        os.unlink(path)  # fails if a process has opened it


def _locked_file(target: Path, mode: int) -> tuple[Path, int]:
    """A new file beside `target`, locked. Raises OSError."""
    while True:
        # not tempfile, whose files get mode 0600 whatever the umask
        path = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        fd = os.open(path, flags | getattr(os, "O_NOINHERIT", 0), mode)
        if try_lock(fd) is not False and is_at(fd, path):
            return path, fd
        os.close(fd)  # taken for a leftover before it was locked


def require_writable(path: StrPath) -> Path:
    """Check before long work that a file can be written at `path`.

    Returns the path with links followed. Raises UsageError.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise UsageError(f"{path}: is a folder; name a file in it")
        # a device like /dev/null would be replaced by a file
        is_other = os.path.lexists(target) and not target.is_file()
    except (OSError, ValueError) as error:  # ValueError: a name that the system cannot have
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"{path}: cannot be written: {reason}; name another") from error
    if is_other:
        raise UsageError(f"{path}: not a regular file, and would be replaced by one; name another")
    if not target.parent.is_dir():
        raise UsageError(f"{path}: the folder {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(f"{path}: the folder {target.parent} cannot be written to; choose another")
    return target
