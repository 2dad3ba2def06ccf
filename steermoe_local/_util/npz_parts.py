"""Writing `.npz` archives of arrays that grow row by row, several at a time, in memory that does not grow with them."""

from __future__ import annotations

import contextlib
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, cast

import numpy as np
import numpy.typing as npt

from .disk import cannot_write
from .file_kinds import StrPath
from .writing import Replacement

_COPIED = 1 << 20  # bytes at once
_TIME = (1980, 1, 1, 0, 0, 0)  # of every member, so that equal arrays make equal files


@dataclass
class _Column:
    """An array as it grows: its rows, in a temporary file beside the output."""

    dtype: np.dtype[np.generic]
    shape: tuple[int, ...]  # of a row
    file: Replacement
    out: BinaryIO
    n_rows: int = 0


@dataclass
class NpzParts:
    """An archive in the making; a context manager.

    The members of a zip archive stand one behind the other, but the arrays grow together: each grows in a temporary
    file of its own beside the output, and `finish` puts them into the archive one after the other, removing each when
    it is in. So the disk holds the arrays once, and the largest twice. Without `finish` nothing is left. The members
    are not compressed.

    Methods raise StorageError and UsageError where a file cannot be written.
    """

    path: StrPath
    _columns: dict[str, _Column] = field(default_factory=dict)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __enter__(self) -> NpzParts:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, **arrays: npt.NDArray[np.generic]) -> None:
        """Append rows to arrays, [n, ...] each; the first rows say the type and the shape of all."""
        try:
            for name, rows in arrays.items():
                column = self._columns.get(name) or self._begin(name, rows)
                assert rows.dtype == column.dtype, name
                assert rows.shape[1:] == column.shape, name
                column.out.write(np.ascontiguousarray(rows).data)
                column.n_rows += len(rows)
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def _begin(self, name: str, rows: npt.NDArray[np.generic]) -> _Column:
        file = Replacement(self.path, 0o600)
        self._stack.callback(file.abort)
        out = open(file.path, "wb")  # noqa: SIM115
        self._stack.callback(_close, out)
        column = self._columns[name] = _Column(rows.dtype, rows.shape[1:], file, out)
        return column

    def finish(self, **whole: npt.NDArray[np.generic]) -> None:
        """Write the archive, with further arrays `whole` as they are, and give it its name."""
        archive = Replacement(self.path)
        try:
            with zipfile.ZipFile(archive.path, "w", zipfile.ZIP_STORED) as file:
                for name, array in whole.items():
                    with _member(file, name) as member:
                        np.lib.format.write_array(member, np.asanyarray(array), version=(1, 0), allow_pickle=False)
                for name, column in self._columns.items():
                    column.out.close()
                    with _member(file, name) as member, open(column.file.path, "rb") as rows:
                        _write_header(member, column)
                        shutil.copyfileobj(rows, member, _COPIED)
                    column.file.abort()
            archive.commit()
        except OSError as error:
            raise cannot_write(self.path, error) from error
        finally:
            archive.abort()


def _close(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # what a full disk did not take is tried again
        file.close()


def _member(archive: zipfile.ZipFile, name: str) -> BinaryIO:
    info = zipfile.ZipInfo(f"{name}.npy", _TIME)
    info.external_attr = 0o600 << 16
    return cast(BinaryIO, archive.open(info, "w", force_zip64=True))


def _write_header(member: BinaryIO, column: _Column) -> None:
    header: Mapping[str, object] = {
        "descr": np.lib.format.dtype_to_descr(column.dtype),
        "fortran_order": False,
        "shape": (column.n_rows, *column.shape),
    }
    np.lib.format.write_array_header_1_0(member, dict(header))
