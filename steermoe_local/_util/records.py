"""Rows of untrusted data files: JSON, JSON Lines, CSV and Parquet, plain or compressed.

Files are streamed where the format permits, and sizes are limited. The format is detected from the content, not from
the name. A damaged file, or one of another format, raises a PairsError.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from ..errors import FormatError, PairsError
from .compressed import Unpacked
from .file_kinds import DATA, StrPath, refuse_pointer, require_kind
from .files import listed
from .json_text import FILE_LIMITS, JsonLimits, parse_json
from .regular_files import open_regular

Row = dict[str, Any]

DELIMITERS = (",", "\t", ";", "|")

_MAX_LINE = 64 << 20  # bytes of a row
_MAX_HEADER = 1 << 20  # characters of a CSV file's header
_MAX_ROW = 16 << 20  # characters of a CSV file's row, for which csv takes four bytes each
_DOCUMENT_LIMITS = JsonLimits(values=8_000_000, containers=4_000_000, keys=8_000_000)
_MAX_DOCUMENT = 256 << 20  # bytes of a JSON file that has to be read as a whole
_WORDS = dict.fromkeys(("true", "yes", "1", "1.0", "t", "y"), True) | dict.fromkeys(
    ("false", "no", "0", "0.0", "f", "n"), False
)
# Rows of a Parquet file in memory at a time. Few: one text, in a file of a kilobyte, may be that of every row.
_BATCH = 16
_COMPRESSED: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\x00": lzma.open, b"BZh": bz2.open}
_DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
_NO_PYARROW = '{path}: a Parquet file, which needs pyarrow; run pip install "steermoe-local[hub]"'


def rows(path: Path, columns: Sequence[str] = ()) -> Iterator[Row]:
    """Yield the rows of a JSON Lines, JSON or Parquet file, each a dictionary.

    A JSON file holds an array of objects, or one object, which is the only row. Of a Parquet file only those of
    `columns` that it has are read. Raises PairsError with the file (and the line).
    """
    with opened(path) as file:
        start = file.peek(4)[:4]
        if start == b"PAR1":
            yield from _parquet_rows(path, columns)
        else:
            yield from _json_rows(path, file)


def csv_rows(path: Path, columns: Sequence[str], delimiter: str | None = None) -> Iterator[Row]:
    """Yield the rows of a CSV file whose header line has all `columns`.

    Without `delimiter` it is the one of comma, tab, semicolon and bar under which the header has them. UTF-8, with or
    without a byte order mark. A row with another number of cells is yielded as {}. Raises PairsError.
    """
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline="") as text:
        for _, row in csv_table(text, path, columns, delimiter):
            yield row


def csv_table(
    text: TextIO, path: StrPath, columns: Sequence[str], delimiter: str | None = None
) -> Iterator[tuple[int, Row]]:
    """(line, row) of each row of an open CSV text, as of `csv_rows`; lines count from 1, and the header is the first.

    Raises PairsError, which begins with `path`.
    """
    if not (header := text.readline(_MAX_HEADER + 1)):
        raise PairsError(f"{path}: empty; check the path")
    read = csv_header(header, path, delimiter)
    for choice, names in read.items():
        if not set(columns) <= set(names):
            continue
        for name in columns:
            if names.count(name) > 1:
                raise PairsError(f"{path}: the column {name!r} stands twice in the header; rename one")
        for line, cells in _csv_cells(text, path, choice):
            yield line, dict(zip(names, cells, strict=True)) if len(cells) == len(names) else {}
        return
    names = max(read.values(), key=len)
    missing = ", ".join(repr(name) for name in columns if name not in names)
    raise PairsError(f"{path}: no column {missing or columns}; its columns are {_names(names)}")


def _csv_cells(text: TextIO, path: StrPath, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of the rows below the header that are not blank. Raises PairsError."""
    _lift_csv_limit()
    raw: list[str] = []  # the lines of the present row
    size = 0  # characters of them

    def noted() -> Iterator[str]:
        nonlocal size
        while line := text.readline(_MAX_ROW - size + 1):
            raw.append(line)
            size += len(line)
            if size > _MAX_ROW:
                raise PairsError(
                    f"{path}:{begin}: a row of more than {_MAX_ROW >> 20} million characters; check the quotes"
                )
            yield line

    reader = csv.reader(noted(), delimiter=delimiter)
    begin, last = 2, (2, [""])
    try:
        for cells in reader:
            if cells:
                yield begin, cells
            begin, last, raw[:], size = reader.line_num + 2, (begin, raw[:]), [], 0
    except csv.Error as error:
        raise PairsError(f"{path}:{begin}: not CSV ({error}); check the quotes") from None
    try:  # csv takes the end of the file as the end of an open quote, unless it is strict
        list(csv.reader(last[1], delimiter=delimiter, strict=True))
    except csv.Error as error:
        if "end of data" in str(error):
            raise PairsError(f"{path}:{last[0]}: a quote is opened and never closed; check the quotes") from None


def _lift_csv_limit() -> None:
    """Let a cell be as long as a document may; Python's limit of 128 KiB is one number for the whole process."""
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_DOCUMENT))


def csv_header(line: str, path: StrPath, delimiter: str | None = None) -> dict[str, list[str]]:
    """The cells of a header line by each delimiter (or the given one alone). Raises PairsError."""
    if len(line) > _MAX_HEADER:
        raise PairsError(f"{path}:1: a header of more than {_MAX_HEADER >> 10} KiB; check the file")
    _lift_csv_limit()
    try:
        choices = [delimiter] if delimiter else DELIMITERS
        return {choice: next(csv.reader([line], delimiter=choice), []) for choice in choices}
    except csv.Error as error:
        raise PairsError(f"{path}:1: not CSV ({error}); check the file") from None


def lines(
    file: BinaryIO, name: StrPath, limit: int = _MAX_LINE, first: int = 1, error: type[FormatError] = PairsError
) -> Iterator[tuple[int, str]]:
    """(number, text) of every line that is not blank, UTF-8 with or without a byte order mark.

    Numbers begin at `first`. Raises `error` for a line of more than `limit` bytes and for other encodings; `name`
    starts the messages.
    """
    # lines as bytes: str.splitlines would cut at U+2028, which JSON allows in a string
    for number, raw in enumerate(iter(lambda: file.readline(limit + 1), b""), first):
        if number == 1:
            refuse_pointer(raw, name, error)
        if len(raw) > limit:
            raise error(f"{name}:{number}: a line of more than {limit >> 20} MiB; check the file")
        data = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        try:
            if data.strip():
                yield number, data.decode("utf-8")
        except UnicodeDecodeError:
            raise error(f"{name}:{number}: not UTF-8; save the file as UTF-8") from None


def truth(value: Any) -> bool | None:
    """Whether a value means true or false: JSON's, 0 and 1, and the usual words for them; None for any other."""
    if isinstance(value, str):
        return _WORDS.get(value.strip().lower())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


def clean_text(value: Any) -> str | None:
    """A text without outer blanks, or a whole number as one; None for any other value, and for a blank one."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**15 else None
    return only_text(value)


def only_text(value: Any) -> str | None:
    """A text without outer blanks, which chat templates strip as well; None for another value or an empty text."""
    if not isinstance(value, str):
        return None
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return None
    return value.strip() or None


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file and decompress it; errors of reading inside the block become PairsErrors."""
    require_kind(path, "data", *DATA, error=PairsError)
    try:
        with open_regular(path, streams=True, fifos=True) as plain:
            start = plain.peek(6)[:6]
            if start.startswith(b"\x28\xb5\x2f\xfd"):
                raise PairsError(f"{path}: compressed by zstd, which is not read; decompress it first")
            for magic, decompress in _COMPRESSED.items():
                if start.startswith(magic):
                    yield io.BufferedReader(Unpacked(decompress(plain), path.stat().st_size), 1 << 16)
                    return
            yield plain
    except UnicodeDecodeError:
        raise PairsError(f"{path}: not UTF-8; save the file as UTF-8") from None
    except _DAMAGED as error:
        reason = getattr(error, "strerror", None) or error
        raise PairsError(f"{path}: cannot be read: {reason}; check the path, or fetch the file again") from error


def _json_rows(path: Path, file: io.BufferedReader) -> Iterator[Row]:
    """Rows of an open JSON or JSON Lines file."""
    n_read, line = 0, b"\n"
    while line and not line.strip():
        line = file.readline(_MAX_DOCUMENT + 1)
        if n_read == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        n_read += 1
    if not line:
        raise PairsError(f"{path}: empty; check the path")
    try:
        first = parse(line)
    except ValueError:
        # not a row: a document over several lines, or no JSON at all
        yield from _document(path, line + file.read(_MAX_DOCUMENT + 1 - len(line)))
        return
    if not isinstance(first, dict):
        yield from _document(path, line)
        return
    yield first
    for number, text in lines(file, path, first=n_read + 1):
        try:
            row = parse(text)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise PairsError(f"{path}:{number}: not JSON ({error}); the file needs one object a line") from None
        yield row


def _document(path: Path, data: bytes) -> Iterator[Row]:
    if len(data) > _MAX_DOCUMENT:
        raise PairsError(f"{path}: more than {_MAX_DOCUMENT >> 20} MiB in one document; save it as JSON Lines")
    try:
        document = parse(data, _DOCUMENT_LIMITS)
    except ValueError as error:
        raise PairsError(f"{path}: neither JSON nor Parquet ({error}); check the file") from None
    if isinstance(document, dict):
        document = [document]
    if not isinstance(document, list) or not all(isinstance(row, dict) for row in document):
        raise PairsError(f"{path}: neither an object nor an array of objects; check the file")
    yield from document


def parse(data: bytes | str, limits: JsonLimits = FILE_LIMITS) -> Any:
    """The value of a JSON document. Raises ValueError."""
    try:
        return parse_json(data if isinstance(data, str) else data.decode("utf-8"), limits, strict=False)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PairsError(_NO_PYARROW.format(path=path)) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            wanted = [name for name in names if name in columns] if columns else names
            if not wanted:
                raise PairsError(f"{path}: none of the columns {_names(columns)}; it has {_names(names)}")
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted, use_threads=False):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PairsError(f"{path}: damaged Parquet ({reason}); fetch the file again") from None


def _names(names: Sequence[str]) -> str:
    return listed(map(repr, names), 20) or "none"
