"""A file of answers as JSON Lines, written while they come, so that a run can be interrupted at any moment.

`<output>.partial`: a first line with `format`, `version` and `settings` (all that must be the same to resume), then one
answer a line as they were finished. At the end `<output>` gets the answers in the prompts' order, without that first
line. A last line that was cut off (a killed process, a power cut) is dropped when the run is resumed. The partial file
is not meant for other versions of the program.

The output is locked from before the partial file is read until the output is there: a second process is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._util.disk import cannot_write, flush_file
from .._util.files import StrPath, parse_json, replacing, require_writable
from .._util.locks import OutputLock
from .._util.writing import beside, remove
from ..errors import FormatError, UsageError
from ..llama.template_date import other_date

_FORMAT = "steermoe-partial-answers"
_VERSION = 1
_AGAIN = "start over with --restart"
_RESUME = "go on with the same command and --resume"
_FLUSH_EVERY = 1.0  # seconds: a power cut loses what was answered within them

Record = dict[str, Any]


def json_line(record: Mapping[str, Any]) -> str:
    """One line of JSON Lines, with its end."""
    return json.dumps(record, ensure_ascii=False) + "\n"


class AnswerFile:
    """The answers of one run until `output` is written; every answer has an `id`. A context manager.

    The block has the lock of the output; without a block it is taken by `start` or `resume`, until `finish` or `close`.
    """

    def __init__(self, output: StrPath) -> None:
        """Raises UsageError when `output` cannot be written."""
        self.output = require_writable(output)
        self.path = beside(output, ".partial")
        self._lock = OutputLock(output)
        self._lines: dict[str, tuple[int, int]] = {}  # of each id: where its line begins in the file, and its length
        self._end = 0  # of the last whole line
        self._begun = False
        self._flushed = 0.0
        self._own_lock = False
        self._file: Any = None

    def __enter__(self) -> AnswerFile:
        """Take the lock. Raises BusyError."""
        self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._close_file()  # the partial file stays, if there is an answer in it to go on from
            if self._begun and not self._lines:
                self.path.unlink(missing_ok=True)
        finally:
            self._lock.release()

    def exists(self) -> bool:
        """Whether an interrupted run left something to resume."""
        return self.path.exists()

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin a new run; what an earlier one left is lost. Raises BusyError, UsageError, StorageError."""
        self._lock_once()
        head = json_line({"format": _FORMAT, "version": _VERSION, "settings": dict(settings)}).encode("utf-8")
        with replacing(self.path) as temporary:
            temporary.write_bytes(head)
        self._lines, self._end = {}, len(head)
        self._open()

    def resume(self, settings: Mapping[str, Any], *, may_lack: Collection[str] = ()) -> set[str]:
        """Resume a run; returns the ids (as text) of its answers. It may lack the settings `may_lack`.

        Raises BusyError, FormatError, UsageError (other settings), StorageError.
        """
        self._lock_once()
        lines = self._read()
        _, head = next(lines)
        made = self._settings(head)
        wanted = json.loads(json.dumps(dict(settings)))  # tuples become lists, as in the file
        for name in set(may_lack) - set(made):
            wanted.pop(name, None)
        if made.get("date") != wanted.get("date"):
            raise UsageError(f"{self.path}: {other_date(made.get('date'), wanted.get('date'))}, or {_AGAIN}")
        for name in dict.fromkeys([*wanted, *made]):  # in the caller's order: the cause before what follows from it
            if made.get(name) != wanted.get(name):
                raise UsageError(
                    f"{self.path}: begun with {name} {_short(made.get(name))}, now it is {_short(wanted.get(name))}; "
                    f"give the same options, or {_AGAIN}"
                )
        self._lines, self._end = {}, len(head)
        for start, line in lines:
            if b"\0" in line:  # a power cut: the file had grown, its contents had not come to the disk
                break
            self._lines[_id(line, self.path)] = (start, len(line))
            self._end = start + len(line)
        self._open()
        return set(self._lines)

    @property
    def n_kept(self) -> int:
        """Number of answers in the file, also of an earlier run: as many as `resume` will find."""
        return len(self._lines)

    def records(self) -> Iterator[Record]:
        """The answers so far, in the order in which they came."""
        with open(self.path, "rb") as kept:
            for start, length in self._lines.values():
                kept.seek(start)
                yield json.loads(kept.read(length))

    def add(self, record: Record) -> None:
        """Write an answer. Raises StorageError when there is no room for it; the answers before it stay."""
        line = json_line(record).encode("utf-8")
        try:
            self._file.truncate(self._end)  # an answer whose `add` failed or was interrupted
            self._file.seek(self._end)
            # one unbuffered write: an interrupt comes before it or behind it
            written = self._file.write(line)
            if written != len(line):  # the next write says why
                self._file.write(line[written:])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if time.monotonic() - self._flushed >= _FLUSH_EVERY:
                self._flush()
        except OSError as error:
            raise cannot_write(self.path, error, _RESUME) from error
        self._lines[str(record["id"])] = (self._end, len(line))
        self._end += len(line)

    def finish(self, ids: Iterable[str | int]) -> None:
        """Write the output, in the order of `ids`, and remove the partial file. Raises UsageError, StorageError."""
        self._close_file()
        with (
            open(self.path, "rb") as kept,
            replacing(self.output, cure=_RESUME) as temporary,
            open(temporary, "wb") as out,
        ):
            for name in ids:
                start, length = self._lines[str(name)]
                kept.seek(start)
                out.write(kept.read(length))
        remove(self.path)
        self.close()

    def discard(self) -> None:
        """Remove the partial file, of which the caller has written the output itself."""
        self._close_file()
        self._lines = {}
        remove(self.path)
        self.close()

    def close(self) -> None:
        """Close the partial file, which stays, and give up the lock if no block has it."""
        self._close_file()
        if self._own_lock:
            self._own_lock = False
            self._lock.release()

    def _lock_once(self) -> None:
        if not self._lock.held:
            self._lock.acquire()
            self._own_lock = True

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.truncate(self._end)  # as in `add`: the file has what `n_kept` counts
                self._flush()
            self._file.close()
            self._file = None

    def _flush(self) -> None:
        flush_file(self._file.fileno())
        self._flushed = time.monotonic()

    def _open(self) -> None:
        self._close_file()
        self._begun = True
        try:
            if os.stat(self.path).st_nlink > 1:  # a copy by hard link, perhaps a backup, must not grow with it
                with replacing(self.path) as temporary:
                    shutil.copyfile(self.path, temporary)
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 # closed by _close_file()
            self._file.truncate(self._end)
            self._flushed = time.monotonic()
        except OSError as error:
            raise cannot_write(self.path, error, _RESUME) from error

    def _read(self) -> Iterator[tuple[int, bytes]]:
        """(start, bytes) of every line that has its end; the first one is always there."""
        try:
            with open(self.path, "rb") as file:
                start = 0
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    yield start, line
                    start += len(line)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be read: {error.strerror or error}; {_AGAIN}") from error
        if not start:
            raise FormatError(f"{self.path}: not the answers of an interrupted run; {_AGAIN}")

    def _settings(self, line: bytes) -> dict[str, Any]:
        head: Any = None
        with contextlib.suppress(ValueError):
            head = parse_json(line.decode("utf-8"))
        if not isinstance(head, dict) or head.get("format") != _FORMAT or not isinstance(head.get("settings"), dict):
            raise FormatError(f"{self.path}: not the answers of an interrupted run; {_AGAIN}")
        if head.get("version") != _VERSION:
            raise FormatError(f"{self.path}: of another version of this program; {_AGAIN}")
        settings: dict[str, Any] = head["settings"]
        return settings


def _id(line: bytes, path: Path) -> str:
    try:
        return str(parse_json(line.decode("utf-8"))["id"])
    except (ValueError, KeyError, TypeError):
        raise FormatError(f"{path}: a line that is no answer; {_AGAIN}") from None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
