"""A file of answers as JSON Lines, written while they come, so that a run can be interrupted at any moment.

`<output>.partial`: a first line with `format`, `version` and `settings` (all that must be the same to resume), then one
answer a line as they were finished. At the end `<output>` gets the answers in the prompts' order, without that first
line. A last line that was cut off (a killed process) is dropped when the run is resumed. The partial file is not meant
for other versions of the program.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .._util.files import StrPath, parse_json, replacing, require_writable
from ..errors import FormatError, UsageError
from ..llama.template_date import other_date

_FORMAT = "steermoe-partial-answers"
_VERSION = 1
_AGAIN = "start over with --restart"

Record = dict[str, Any]


def json_line(record: Mapping[str, Any]) -> str:
    """One line of JSON Lines, with its end."""
    return json.dumps(record, ensure_ascii=False) + "\n"


class AnswerFile:
    """The answers of one run until `output` is written; every answer has an `id`. A context manager."""

    def __init__(self, output: StrPath) -> None:
        """Raises UsageError when `output` cannot be written."""
        self.output = require_writable(output)
        self.path = Path(f"{os.fspath(output)}.partial")
        self._lines: dict[str, tuple[int, int]] = {}  # of each id: where its line begins in the file, and its length
        self._begun = False
        self._file: Any = None

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()  # the partial file stays, if there is an answer in it to go on from
        if self._begun and not self._lines:
            self.path.unlink(missing_ok=True)

    def exists(self) -> bool:
        """Whether an interrupted run left something to resume."""
        return self.path.exists()

    def start(self, settings: Mapping[str, Any]) -> None:
        """Begin a new run; what an earlier one left is lost. Raises UsageError."""
        head = {"format": _FORMAT, "version": _VERSION, "settings": dict(settings)}
        with replacing(self.path) as temporary:
            temporary.write_text(json_line(head), encoding="utf-8", newline="\n")
        self._lines = {}
        self._open()

    def resume(self, settings: Mapping[str, Any], *, may_lack: Collection[str] = ()) -> set[str]:
        """Resume a run; returns the ids (as text) of its answers. It may lack the settings `may_lack`.

        Raises FormatError, UsageError (other settings).
        """
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
        self._lines, valid = {}, len(head)
        for start, line in lines:
            self._lines[_id(line, self.path)] = (start, len(line))
            valid = start + len(line)
        self._open()
        self._file.truncate(valid)
        return set(self._lines)

    def records(self) -> Iterator[Record]:
        """The answers so far, in the order in which they came."""
        with open(self.path, "rb") as kept:
            for start, length in self._lines.values():
                kept.seek(start)
                yield json.loads(kept.read(length))

    def add(self, record: Record) -> None:
        """Write an answer. Raises UsageError when there is no room for it."""
        line = json_line(record).encode("utf-8")
        try:
            start = self._file.seek(0, os.SEEK_END)
            # one unbuffered write: an interrupt comes before it or behind it
            written = self._file.write(line)
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        if written != len(line):
            raise UsageError(f"{self.path}: cannot be written: no space left; free some, then go on with --resume")
        self._lines[str(record["id"])] = (start, len(line))

    def finish(self, ids: Iterable[str | int]) -> None:
        """Write the output, in the order of `ids`, and remove the partial file. Raises UsageError."""
        self.close()
        with open(self.path, "rb") as kept, replacing(self.output) as temporary, open(temporary, "wb") as out:
            for name in ids:
                start, length = self._lines[str(name)]
                kept.seek(start)
                out.write(kept.read(length))
        self.path.unlink()

    def close(self) -> None:
        """Close the partial file, which stays."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self.close()
        self._begun = True
        try:
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115 # closed by close()
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written: {error.strerror or error}") from error

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
