"""What a failed write means, and bringing files and folders to the disk (fsync)."""

from __future__ import annotations

import errno
import os
import sys

from ..errors import SteerMoEError, StorageError, UsageError
from .file_kinds import StrPath

# The path, or what the user may do there, is wrong; everything else is the machine's fault.
_WRONG_PATH = {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP}
_WRONG_PATH |= {errno.EEXIST, errno.EINVAL}
_FULL = {getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG") if hasattr(errno, name)}
_NO_FLUSH = {errno.EINVAL, getattr(errno, "ENOTSUP", errno.EINVAL), getattr(errno, "ENOSYS", errno.EINVAL)}


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or the one that it came from, says that a disk, a quota or a limit of file sizes is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        error = error.__cause__
    return False


def cannot_write(path: StrPath, error: OSError, cure: str = "") -> SteerMoEError:
    """The error that a failed write means: UsageError for a path that cannot be, StorageError for a disk that fails.

    `cure` replaces "run the command again", which stands behind making room. Other errors of the system than those of
    a path are the disk's: EIO, EROFS of a disk that turned read-only, ...
    """
    reason = error.strerror or str(error)
    if error.errno in _WRONG_PATH:
        return UsageError(f"{path}: cannot be written: {reason}; choose another place")
    if error.errno == errno.EFBIG:
        first = "raise the limit of file sizes (ulimit -f)"
    else:
        first = "free some room there" if error.errno in _FULL else "check the disk"
    return StorageError(f"{path}: cannot be written: {reason}; {first}, then {cure or 'run the command again'}")


def flush_file(fd: int) -> None:
    """Bring an open file to the disk, where its file system can. Raises OSError."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise


def flush_folder(folder: StrPath) -> None:
    """Bring the names in a folder to the disk. Windows does it by itself. Raises OSError."""
    if sys.platform == "win32":
        return
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that can be written to and not be read
        return
    try:
        flush_file(fd)
    finally:
        os.close(fd)
