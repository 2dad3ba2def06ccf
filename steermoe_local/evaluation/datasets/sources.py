"""Rows of files that tasks are built from: tables in any of the usual formats, and lists of texts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..._util.files import listed
from ..._util.records import DELIMITERS, csv_header, csv_rows, lines, opened, parse, rows
from ...errors import FormatError

Row = dict[str, Any]

_MAX_TEXTS = 256 << 20  # bytes of a JSON list of texts
_MAX_LINE = 1 << 20  # bytes of a text on a line of its own, and of a header


def source_rows(path: Path, columns: Sequence[Sequence[str]], *, texts: bool = False) -> Iterator[Row]:
    """Yield the rows of a JSON, JSON Lines, Parquet or CSV file (comma, tab, semicolon, bar), compressed or not.

    `columns`: sets of columns of which the file has to have one as a whole. With `texts`, a JSON list of texts and
    plain lines of text are rows as well, each under the first name of `columns`.

    Raises FormatError, which names the file, and the columns that it has where they are the wrong ones.
    """
    start = _start(path)
    if start.startswith(b"PAR1") or start[:1] in (b"{", b"["):
        found = rows(path)
        if texts and start[:1] == b"[" and (listed := _listed_texts(path)) is not None:
            found = ({columns[0][0]: text} for text in listed)
        yield from _with_columns(found, columns, path)
        return
    header = _header(path)
    for delimiter, wanted in itertools.product(DELIMITERS, columns):
        if set(wanted) <= set(header[delimiter]):
            yield from csv_rows(path, wanted, delimiter)
            return
    if not texts:
        raise _wrong_columns(path, columns, max(header.values(), key=len))
    for line in text_lines(path):
        yield {columns[0][0]: line}


def _start(path: Path) -> bytes:
    """The first bytes that are not blank. Raises FormatError for a file without any."""
    with opened(path) as file:
        data = b"\n"
        while data and not data.removeprefix(b"\xef\xbb\xbf").strip():
            data = file.read(4096)
    if not data:
        raise FormatError(f"{path}: empty; check the path")
    return data.removeprefix(b"\xef\xbb\xbf").lstrip()


def _with_columns(found: Iterator[Row], columns: Sequence[Sequence[str]], path: Path) -> Iterator[Row]:
    """The rows; the first one has to have the columns. In a list of objects a later one may be without some."""
    for number, row in enumerate(found):
        if number == 0 and not any(set(wanted) <= set(row) for wanted in columns):
            raise _wrong_columns(path, columns, list(row))
        yield row


def _wrong_columns(path: Path, columns: Sequence[Sequence[str]], names: Sequence[str]) -> FormatError:
    missing = " or ".join(
        ", ".join(repr(name) for name in wanted if name not in names) for wanted in dict.fromkeys(map(tuple, columns))
    )
    shown = listed((repr(name[:40]) for name in names), 20)
    return FormatError(f"{path}: no column {missing}; its columns are {shown or 'none'}")


def _header(path: Path) -> dict[str, list[str]]:
    """The first line's cells, by delimiter."""
    line = next(text_lines(path), None)
    if line is None:  # blanks to a text, though not to bytes: \x1c, say
        raise FormatError(f"{path}: empty; check the path")
    return csv_header(line, path)


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file that are not blank, without their ends. Raises FormatError."""
    with opened(path) as file:
        for number, line in lines(file, path, _MAX_LINE):
            if "\0" in line:
                raise FormatError(f"{path}:{number}: not text; check the file")
            if line.strip():
                yield line.rstrip("\r\n")


def _listed_texts(path: Path) -> list[Any] | None:
    """The entries of a JSON list that begins with a text; None for a list of something else."""
    with opened(path) as file:
        data = file.read(_MAX_TEXTS + 1)
    if len(data) > _MAX_TEXTS:
        raise FormatError(f"{path}: more than {_MAX_TEXTS >> 20} MiB in one document; save it as JSON Lines")
    try:
        entries = parse(data.removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise FormatError(f"{path}: not JSON ({error}); check the file") from None
    return entries if isinstance(entries, list) and entries and isinstance(entries[0], str) else None
