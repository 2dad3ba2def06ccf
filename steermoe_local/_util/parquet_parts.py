"""Writing Parquet files in row groups, in memory that does not grow with them. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ..errors import UsageError
from .disk import cannot_write
from .file_kinds import StrPath
from .writing import Replacement

_GROUP = 16 << 20  # bytes of a row group in memory, about
_WORD = 16  # bytes that a text takes, about

Column = npt.NDArray[np.generic] | list[str]


def require_pyarrow(path: StrPath) -> Any:
    """The module `pyarrow` with its `parquet`. Raises UsageError without it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UsageError(
            f'{path}: a Parquet file, which needs pyarrow; run pip install "steermoe-local[trace]", or name a file '
            "that ends in .npz or .csv"
        ) from None
    return pyarrow


class ParquetParts:
    """A Parquet file in the making; a context manager. Without `finish` nothing is left.

    Methods raise StorageError and UsageError where it cannot be written.
    """

    def __init__(self, path: StrPath) -> None:
        """Raises UsageError without pyarrow, StorageError."""
        self._arrow = require_pyarrow(path)
        self._path = path
        self._file = Replacement(path)
        self._out: BinaryIO = open(self._file.path, "wb")  # noqa: SIM115
        self._writer: Any = None
        self._held: list[dict[str, Column]] = []
        self._n_bytes = 0

    def __enter__(self) -> ParquetParts:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        for close in (self._writer.close if self._writer else None, self._out.close):
            try:
                if close is not None:
                    close()
            except (OSError, ValueError, self._arrow.ArrowException):
                pass  # it is removed
        self._file.abort()

    def add(self, columns: Mapping[str, Column]) -> None:
        """Append rows: texts, or numbers, by the names of their columns, which are always the same."""
        self._held.append(dict(columns))
        self._n_bytes += sum(len(c) * _WORD if isinstance(c, list) else c.nbytes for c in columns.values())
        if self._n_bytes >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        """Write what is held as one row group."""
        if not self._held:
            return
        arrow, held = self._arrow, self._held
        columns: dict[str, Any] = {}
        for name, first in held[0].items():
            parts = [part[name] for part in held]
            if isinstance(first, list):
                texts = arrow.array([text for part in parts for text in part], arrow.string())
                columns[name] = texts
            else:
                columns[name] = arrow.array(np.concatenate(parts))
        table = arrow.table(columns)
        try:
            if self._writer is None:
                self._writer = arrow.parquet.ParquetWriter(self._out, table.schema, compression="snappy")
            self._writer.write_table(table, row_group_size=max(1, table.num_rows))
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._held, self._n_bytes = [], 0

    def finish(self, **metadata: str) -> None:
        """Write what is held, and texts about the whole file as its metadata, and give the file its name."""
        self._flush()
        try:
            if self._writer is not None:
                self._writer.add_key_value_metadata(metadata)
                self._writer.close()
            self._out.close()
            self._file.commit()
        except OSError as error:
            raise cannot_write(self._path, error) from error
