"""Strict reading of untrusted `.npz` archives: no pickles, headers are checked before memory is allocated."""

from __future__ import annotations

import contextlib
import io
import math
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError, SteerMoEError
from .file_kinds import FileKind, StrPath, require_kind
from .regular_files import open_regular
from .zip_files import zip_archive

_MAX_BYTES = 1 << 30  # of a member
_MAX_TEXT_BYTES = 1 << 28
_SMALL = 64 << 20  # bytes that any member may take
_MAX_LIST = 1 << 16  # values of a member of any length
_RATIO = 100  # what counts compress to; a larger member that compresses better is a bomb
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """The members of an open archive, each read on request."""

    def __init__(self, archive: zipfile.ZipFile, path: StrPath, what: str, again: str) -> None:
        self._archive = archive
        self._path, self._what, self._again = path, what, again

    def names(self) -> list[str]:
        """Names of the members, without `.npy`; a damaged archive may have a name twice."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def array(self, name: str, kind: str, shape: tuple[int, ...] | None) -> npt.NDArray[Any]:
        """A read-only member: `kind` is a kind of NumPy dtype ("i") or a dtype ("<i8"); shape None is any 1-D shape.

        Raises FormatError, and what zipfile and NumPy raise on damage; `opened` translates it.
        """
        info = self._archive.NameToInfo.get(f"{name}.npy")
        if info is None:
            raise FormatError(f"{self._path}: no {name} in it; not {self._what}")
        with self._archive.open(info) as file:
            found, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
            fits = len(found) == 1 and found[0] <= _MAX_LIST if shape is None else found == shape
            if kind not in (dtype.kind, dtype.str) or not fits or (fortran and len(found) > 1):
                want = {"U": "a text", "f": "numbers", "<f8": "numbers"}.get(kind, "whole numbers")
                raise FormatError(
                    f"{self._path}: {name}: {dtype} of shape {found}, "
                    f"not {want} of shape {'(n,)' if shape is None else shape}; {self._again}"
                )
            n_bytes = dtype.itemsize * math.prod(found)
            most = max(_SMALL, _RATIO * info.compress_size)
            if n_bytes > min(most, _MAX_TEXT_BYTES if kind == "U" else _MAX_BYTES):
                raise FormatError(f"{self._path}: {name}: takes {n_bytes} bytes; not {self._what}")
            if info.file_size != file.tell() + n_bytes or len(data := file.read(n_bytes)) != n_bytes:
                raise FormatError(f"{self._path}: {name}: shorter or longer than its header says; {self._again}")
        return np.frombuffer(data, dtype=dtype).reshape(found)

    def text(self, name: str) -> str:
        """A member that is one text."""
        return str(self.array(name, "U", ()).reshape(1)[0])


@contextlib.contextmanager
def opened(path: StrPath, what: str, again: str, kind: FileKind) -> Iterator[Archive]:
    """Open an archive; errors of zipfile and NumPy in the block become FormatError.

    `what` names the kind of file in messages, `again` is the cure. A file of another kind than `kind` is refused.
    """
    require_kind(path, what, kind)
    try:
        with open_regular(path, streams=True) as file:
            source = file if file.seekable() else io.BytesIO(file.read(_MAX_BYTES))
            if source.read(2) != b"PK":
                raise FormatError(f"{path}: not {what}; check the path")
            with zip_archive(source) as archive:
                yield Archive(archive, path, what, again)
    except SteerMoEError:
        raise
    except OSError as error:
        raise FormatError(f"{path}: cannot be read as {what}: {error.strerror or error}; check the path") from error
    except Exception as error:  # zipfile and NumPy raise a dozen types
        raise FormatError(f"{path}: damaged, or not {what} ({error}); {again}") from error
