"""Opening files that have to be regular ones: devices, sockets, folders and, but for data, FIFOs are refused at once.

A file of a folder may be anything, and opening a FIFO waits for a writer that need not come. So it is looked at before
it is opened, opened without waiting, and looked at again, since it may have been exchanged in between.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from io import BufferedReader

# names by which a program reads what the shell opened for it: /dev/stdin, <(command)
_STREAM = re.compile(r"/dev/(stdin|fd/[0-9]{1,9})|/proc/(self|[0-9]{1,9})/fd/[0-9]{1,9}")
_DO_NOT_WAIT: int = getattr(os, "O_NONBLOCK", 0)  # Windows has no FIFOs among its files


def open_regular(path: str | os.PathLike[str], *, streams: bool = False, fifos: bool = False) -> BufferedReader:
    """Open a regular file for reading bytes, never waiting for what is none.

    With `streams`, /dev/stdin, /dev/fd/N (as of `<(command)`) and the empty device may be opened as well; with `fifos`,
    for data that a user names, also a FIFO, whose writer is waited for. Raises OSError, also for a FIFO, a device, a
    socket or a folder, with a `strerror` that says what it is.
    """
    if streams and is_stream(path):
        return open(path, "rb")
    found = os.stat(path)
    if fifos and stat.S_ISFIFO(found.st_mode):
        return open(path, "rb")
    _require_regular(found, path)
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | _DO_NOT_WAIT))  # noqa: SIM115 # returned
    try:
        _require_regular(os.fstat(file.fileno()), path)
    except OSError:
        file.close()
        raise
    return file


def is_stream(path: str | os.PathLike[str]) -> bool:
    """Whether a path names what another program or the shell opened, or the empty device."""
    text = os.fspath(path)
    return text == os.devnull or _STREAM.fullmatch(text) is not None


def _require_regular(found: os.stat_result, path: str | os.PathLike[str]) -> None:
    mode = found.st_mode
    if stat.S_ISREG(mode):
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    kind = "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", os.fspath(path))
