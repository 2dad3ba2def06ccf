"""Strict reading of `.npz` archives from anywhere: no pickles, headers checked before anything is allocated by them."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError, SteerMoEError
from .files import StrPath

__all__ = ["Archive", "opened"]

_MAX_BYTES = 1 << 30  # of a member
_MAX_TEXT_BYTES = 1 << 28
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


class Archive:
    """The members of an open archive, each read when it is asked for."""

    def __init__(self, archive: zipfile.ZipFile, path: StrPath, what: str, again: str) -> None:
        self._archive = archive
        self._path, self._what, self._again = path, what, again

    def names(self) -> list[str]:
        """Names of the members, without `.npy`; a name may stand twice."""
        return [name.removesuffix(".npy") for name in self._archive.namelist()]

    def array(self, name: str, kind: str, shape: tuple[int, ...] | None) -> npt.NDArray[Any]:
        """A member of NumPy's dtype kind `kind` and of this shape; None: any one-dimensional. Read-only.

        Raises FormatError, and what zipfile and NumPy raise on damage; `opened` translates it.
        """
        if f"{name}.npy" not in self._archive.NameToInfo:
            raise FormatError(f"{self._path}: no {name} in it; not {self._what}")
        with self._archive.open(f"{name}.npy") as file:
            found, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
            fits = len(found) == 1 if shape is None else found == shape
            if dtype.kind != kind or not fits or (fortran and len(found) > 1):
                want = {"U": "a text", "f": "numbers"}.get(kind, "whole numbers")
                raise FormatError(
                    f"{self._path}: {name}: {dtype} of shape {found}, "
                    f"not {want} of shape {'(n,)' if shape is None else shape}; {self._again}"
                )
            n_bytes = dtype.itemsize
            for size in found:  # Python's integers: a forged shape must not overflow
                n_bytes *= size
            if n_bytes > (_MAX_TEXT_BYTES if kind == "U" else _MAX_BYTES):
                raise FormatError(f"{self._path}: {name}: takes {n_bytes} bytes; not {self._what}")
            data = file.read(n_bytes)
            if len(data) != n_bytes or file.read(1):
                raise FormatError(f"{self._path}: {name}: shorter or longer than its header says; {self._again}")
        return np.frombuffer(data, dtype=dtype).reshape(found)

    def text(self, name: str) -> str:
        """A member that is one text."""
        return str(self.array(name, "U", ()).reshape(1)[0])


@contextlib.contextmanager
def opened(path: StrPath, what: str, again: str) -> Iterator[Archive]:
    """Open an archive; inside, whatever zipfile and NumPy raise on a damaged one becomes FormatError.

    `what` names the kind of file in messages, `again` is the cure.
    """
    try:
        with Path(path).open("rb") as file:
            if file.read(2) != b"PK":
                raise FormatError(f"{path}: not {what}; check the path")
            with zipfile.ZipFile(file) as archive:
                yield Archive(archive, path, what, again)
    except SteerMoEError:
        raise
    except OSError as error:
        raise FormatError(f"{path}: cannot be read as {what}: {error.strerror or error}; check the path") from error
    except Exception as error:  # a dozen types
        raise FormatError(f"{path}: damaged, or not {what} ({error}); {again}") from error
