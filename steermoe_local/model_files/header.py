"""Reads the header of a GGUF file, on this machine or elsewhere: every length is checked, no tensor data is read.

gguf-py's GGUFReader makes one NumPy view per array element (ten seconds and more for a vocabulary of 150,000 tokens)
and silently lets slices run past the end of the file. This reader skips vocabularies, refuses what llama.cpp's gguf.cpp
refuses, and raises nothing but FormatError. Types and block sizes are gguf-py's.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.quants import dequantize

from .._util.file_kinds import StrPath, refuse_pointer
from ..errors import FormatError

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}
_KEPT_ARRAY = 4096  # longer arrays are vocabularies, which are not needed
_MAX_ARRAY = 1 << 24
_MAX_HEADER = 64 << 20  # of a file elsewhere; vocabularies of 260,000 tokens take about 20 MB
_MAX_NAME = 63  # GGML_MAX_NAME without its NUL

Fetch = Callable[[int, int], bytes]
"""Returns all bytes of a file from a start to a stop."""


@dataclass(frozen=True)
class GGUFField:
    """One metadata value; `value` is None for an array that was skipped."""

    type: GGUFValueType
    value: Any


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor's description: `shape` in GGUF order (fastest first), `offset` in bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """The header of one file of `size` bytes. `data_end` is where the last tensor's padding ends.

    `fetch` reads data of a file that is elsewhere; `path` is then only its name.
    """

    path: Path
    size: int
    fields: dict[str, GGUFField]
    tensors: dict[str, GGUFTensor]
    data_end: int
    fetch: Fetch | None = field(default=None, repr=False, compare=False)

    def value(self, key: str, default: Any = None) -> Any:
        """The value of a field, `default` without the field."""
        entry = self.fields.get(key)
        return default if entry is None else entry.value

    def number(self, key: str, default: int = 0) -> int:
        """A whole number from 0 up; `default` without the field, and for another value."""
        value = self.value(key)
        return value if type(value) is int and value >= 0 else default

    def read(self, tensor: GGUFTensor) -> npt.NDArray[np.float32]:
        """Read one tensor as F32, shape reversed to NumPy order; raises FormatError."""
        try:
            if self.fetch is None:
                raw = np.fromfile(self.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
            else:
                raw = np.frombuffer(self.fetch(tensor.offset, tensor.offset + tensor.n_bytes), np.uint8)
            if tensor.type == GGMLQuantizationType.F32:
                flat = raw.view("<f4")
            elif tensor.type == GGMLQuantizationType.F16:
                flat = raw.view("<f2")
            else:
                rows = raw.reshape(prod(tensor.shape[1:]), -1)
                flat = dequantize(rows, tensor.type)
            return flat.astype(np.float32).reshape(tensor.shape[::-1])
        except (OSError, ValueError, NotImplementedError) as error:
            raise FormatError(
                f"{self.path}: tensor {tensor.name} ({tensor.type.name}) cannot be read: {error}"
            ) from error


class _Cursor:
    """Reads a file in order. `data` is the file, or its beginning, which `more` extends; `end` is the file's size."""

    def __init__(
        self,
        data: mmap.mmap | bytearray,
        path: StrPath,
        end: int,
        more: Callable[[int], None] | None = None,
    ) -> None:
        self.data, self.path, self.at, self.end, self.more = data, path, 0, end, more

    def fail(self, what: str) -> FormatError:
        return FormatError(f"{self.path}: damaged GGUF at byte {self.at}: {what}; fetch it again")

    def take(self, size: int) -> int:
        start = self.at
        if size > self.end - start:
            raise self.fail("the file ends too early")
        if self.more and start + size > len(self.data):
            self.more(start + size)
        self.at = start + size
        return start

    def scalar(self, fmt: str) -> Any:
        return struct.unpack_from(fmt, self.data, self.take(struct.calcsize(fmt)))[0]

    def string(self, limit: int, names: bool = True) -> str:
        length = self.scalar("<Q")
        if length > limit:
            raise self.fail(f"a string of {length} bytes")
        start = self.take(length)
        if names and self.data.find(b"\0", start, self.at) >= 0:
            raise self.fail("a NUL byte in a name or text, where llama.cpp would end it")
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.fail("a string that is not UTF-8") from None

    def value_type(self) -> GGUFValueType:
        number = self.scalar("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self.fail(f"unknown value type {number}") from None

    def value(self, kind: GGUFValueType, arrays: bool) -> Any:
        if kind == GGUFValueType.STRING:
            return self.string(self.end, names=not arrays)  # a model's texts may have any bytes
        if kind != GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        if not arrays:
            raise self.fail("an array, where this kind of file has none")
        item, count = self.value_type(), self.scalar("<Q")
        if count > _MAX_ARRAY or item == GGUFValueType.ARRAY:
            raise self.fail(f"an array of {count} values of type {item.name}")
        if item == GGUFValueType.STRING:
            for _ in range(count):
                self.take(self.scalar("<Q"))
            return None
        start = self.take(count * struct.calcsize(_SCALARS[item]))
        if count > _KEPT_ARRAY:
            return None
        return struct.unpack_from(f"<{count}{_SCALARS[item][1]}", self.data, start)

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
        """(name, shape, type, size in bytes, offset into the data section)."""
        name = self.string(_MAX_NAME)
        n_dims = self.scalar("<I")
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name!r} has {n_dims} dimensions")
        shape = tuple(self.scalar("<Q") for _ in range(n_dims))
        number, offset = self.scalar("<I"), self.scalar("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise self.fail(
                f"tensor {name!r} has type {number}, unknown to gguf-py (a newer gguf may know it)"
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if 0 in shape or prod(shape) > 1 << 62 or shape[0] % block:
            raise self.fail(f"tensor {name!r} has the impossible shape {list(shape)}")
        return name, shape, kind, prod(shape) // block * block_bytes, offset


def read_header(
    path: StrPath,
    *,
    max_size: int | None = None,
    max_tensors: int = 1 << 20,
    max_fields: int = 1 << 16,
    arrays: bool = True,
) -> GGUFHeader:
    """Read the header of one GGUF file of version 2 or 3, little-endian.

    `max_size` (bytes), `max_tensors` and `max_fields` bound the cost of a forged header; `arrays` False refuses array
    values. Raises FormatError for any other file and for one that cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            refuse_pointer(file.read(256), path)
            if size < 24:
                raise FormatError(f"{path}: not a GGUF file (only {size} bytes); check the path")
            if max_size is not None and size > max_size:
                raise FormatError(f"{path}: larger than {max_size >> 20} MiB; check the path")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, path, size), path, size, max_tensors, max_fields, arrays)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read as GGUF: {error.strerror or error}; check the path") from error


def read_header_from(
    name: Path, size: int, fetch: Fetch, *, first: int = 4 << 20, limit: int = _MAX_HEADER
) -> GGUFHeader:
    """Read the header of a file of `size` bytes that is elsewhere from its `first` bytes, then from twice as many.

    Raises FormatError as `read_header` does, and for a header longer than `limit`; errors of `fetch` pass through.
    """
    if size < 24:
        raise FormatError(f"{name}: not a GGUF file (only {size} bytes); take another file")
    data = bytearray()

    def more(stop: int) -> None:
        if stop > limit:
            raise FormatError(f"{name}: its header is longer than {limit >> 20} MiB; take another file")
        data.extend(fetch(len(data), min(max(stop, first, 2 * len(data)), size, limit)))

    header = _parse(_Cursor(data, name, size, more), name, size, 1 << 20, 1 << 16, True)
    return replace(header, fetch=fetch)


def _parse(cursor: _Cursor, path: Path, size: int, max_tensors: int, max_fields: int, arrays: bool) -> GGUFHeader:
    if cursor.data[cursor.take(4) : 4] != b"GGUF":
        raise FormatError(f"{path}: not a GGUF file (no GGUF magic at its start); check the path")
    version = cursor.scalar("<I")
    if version and not version & 0xFFFF:
        raise FormatError(f"{path}: a big-endian GGUF; convert it with gguf_convert_endian")
    if version not in (2, 3):
        raise FormatError(f"{path}: GGUF version {version} is not 2 or 3; convert the model again")
    n_tensors, n_fields = cursor.scalar("<Q"), cursor.scalar("<Q")
    if n_tensors > max_tensors or n_fields > max_fields:
        raise cursor.fail(f"{n_tensors} tensors and {n_fields} fields are too many")

    fields: dict[str, GGUFField] = {}
    for _ in range(n_fields):
        key = cursor.string(65535)
        if key in fields:
            raise cursor.fail(f"the field {key!r} stands twice")
        kind = cursor.value_type()
        fields[key] = GGUFField(kind, cursor.value(kind, arrays))
    infos = [cursor.tensor() for _ in range(n_tensors)]

    align = fields.get("general.alignment", GGUFField(GGUFValueType.UINT32, GGUF_DEFAULT_ALIGNMENT))
    step = align.value
    if align.type != GGUFValueType.UINT32 or step == 0 or step & (step - 1):
        raise cursor.fail(f"general.alignment {step!r} is not a power of two")
    start = _pad(cursor.at, step)
    tensors: dict[str, GGUFTensor] = {}
    expected = 0
    for name, shape, dtype, n_bytes, offset in infos:
        if name in tensors:
            raise cursor.fail(f"the tensor {name!r} stands twice")
        if offset != expected:
            raise cursor.fail(f"tensor {name!r} lies at {offset}, expected {expected}")
        if start + offset + n_bytes > size:
            raise cursor.fail(f"the data of tensor {name!r} is cut off")
        tensors[name] = GGUFTensor(name, shape, dtype, start + offset, n_bytes)
        expected = _pad(offset + n_bytes, step)
    return GGUFHeader(path, size, fields, tensors, start + expected)


def n_vocab(headers: Iterable[GGUFHeader]) -> int:
    """Tokens of the vocabulary by the embedding's shape; 0 without an embedding."""
    for header in headers:
        tensor = header.tensors.get("token_embd.weight")
        if tensor is not None and len(tensor.shape) == 2:
            return tensor.shape[1]
    return 0


def _pad(value: int, step: int) -> int:
    return (value + step - 1) // step * step
