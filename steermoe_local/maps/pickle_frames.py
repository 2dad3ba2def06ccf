"""Reads the numbers of pickled pandas frames, without pandas and without unpickling.

A frame is a few calls of pandas' and NumPy's own constructors on raw bytes. Each of them has a stand-in here that
checks its arguments: the layouts of pandas 1.1 to 3, pickle protocols 0 to 5. `pickle_machine` calls the stand-ins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError
from .pickle_arrow import ArrowArray, ArrowChunks, ArrowType, buffer
from .pickle_machine import Global, Refused, StandIn, run

# Bytes that calls may allocate, or read again, besides views of the file's own bytes. Published rankings need less than
# 1 MiB.
MAX_ALLOCATED = 64 << 20
_NUMBERS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"}
_OBJECTS = {"O", "O4", "O8"}


@dataclass(frozen=True)
class Frame:
    """A frame's columns, each of `n_rows` values; None for a column that is not of numbers."""

    n_rows: int
    columns: dict[str, npt.NDArray[Any] | None]


def read_frame(data: bytes, where: str) -> Frame:
    """Read the bytes of one pickled pandas DataFrame; `where` starts the messages.

    Raises FormatError for any other pickle, and for names and opcodes that no frame needs; nothing of it is run.
    """
    frame = run(data, _Calls().table(), where)
    if not isinstance(frame, _Frame):
        raise FormatError(f"{where}: a pickle, but not of a pandas DataFrame; export the table with to_pickle")
    try:
        return _assemble(frame.state)
    except Refused as error:
        raise FormatError(f"{where}: not a whole pandas DataFrame: {error}; export the table again") from None
    except (ValueError, TypeError, OverflowError):
        raise FormatError(f"{where}: not a whole pandas DataFrame; export the table again") from None


#
# stand-ins
#


class _Frame(StandIn):
    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def build(self, state: Any) -> None:
        self.state = _dict(state, "DataFrame")


@dataclass(slots=True, eq=False)
class _Manager(StandIn):
    """BlockManager: axes (columns, rows) and blocks of columns of one type."""

    axes: Any = None
    blocks: Any = None

    def build(self, state: Any) -> None:
        # pandas before 1.3: (axes, values, items, {"0.14.1": {"axes", "blocks": [{"values", "mgr_locs"}]}})
        if self.axes is not None or type(state) is not tuple or len(state) != 4:
            raise Refused("a BlockManager of an unknown layout")
        layout = _dict(_dict(state[3], "BlockManager").get("0.14.1"), "BlockManager")
        self.axes, self.blocks = layout.get("axes"), layout.get("blocks")  # read once, however many managers share them


@dataclass(frozen=True, slots=True, eq=False)
class _Block(StandIn):
    values: Any
    indices: Any


@dataclass(frozen=True, slots=True, eq=False)
class _Index(StandIn):
    data: dict[str, Any]


class _DType(StandIn):
    __slots__ = ("code", "order")

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    def build(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 8 or type(state[1]) is not str or state[1] not in ("<", ">", "|"):
            raise Refused("a dtype of an unknown layout")
        if any(part is not None for part in state[2:5]):
            raise Refused("a dtype with fields")
        self.order = "=" if state[1] == "|" else state[1]

    @property
    def numpy(self) -> np.dtype[Any]:
        if self.code in _OBJECTS:
            raise Refused("objects in place of numbers")
        return np.dtype(self.order + self.code)


class _Array(StandIn):
    __slots__ = ("calls", "value")

    def __init__(self, calls: _Calls, value: npt.NDArray[Any] | None = None) -> None:
        self.calls, self.value = calls, value

    def build(self, state: Any) -> None:
        """State of numpy.ndarray.__setstate__: (version, shape, dtype, in Fortran's order, bytes or list)."""
        if self.value is not None or type(state) is not tuple or len(state) != 5 or not isinstance(state[2], _DType):
            raise Refused("an array of an unknown layout")
        _, shape, dtype, fortran, data = state
        if dtype.code not in _OBJECTS:
            self.value = self.calls.view(data, dtype, shape, "F" if fortran is True else "C")
            return
        size = _size(shape)
        if type(data) is not list or len(data) != size:
            raise Refused("an array whose shape is not that of its values")
        self.calls.charge(8 * size)
        value = np.empty(size, dtype=object)
        value[:] = data
        self.value = value.reshape(shape, order="F" if fortran is True else "C")


class _Extension(StandIn):
    """An extension array or dtype of pandas; its state is read only when a column needs it."""

    __slots__ = ("charge", "state")

    def __init__(self, charge: Callable[[int], None]) -> None:
        self.charge = charge
        self.state: Any = None

    def build(self, state: Any) -> None:
        self.state = state

    def values(self) -> npt.NDArray[Any] | None:
        """The numbers of a nullable column, or the objects of a column of texts; else None."""
        if type(self.state) is dict:  # ArrowStringArray, IntegerArray, FloatingArray
            texts = self.state.get("_pa_array")
            if isinstance(texts, ArrowArray | ArrowChunks):
                found = texts.texts(self.charge)
                objects = np.empty(len(found), dtype=object)
                objects[:] = found
                return objects
            data, mask = self.state.get("_data"), self.state.get("_mask")
            if isinstance(data, _Array) and isinstance(mask, _Array) and data.value is not None:
                if mask.value is None or mask.value.dtype.kind != "b":
                    return None
                self.charge(mask.value.size)
                if mask.value.any():
                    return None
                return data.value
        # StringArray: its dtype, its objects, attributes; the codes of a Categorical are not values
        if type(self.state) is tuple:
            for part in self.state[:2]:
                if isinstance(part, _Array) and part.value is not None and part.value.dtype.kind == "O":
                    return part.value
        return None


class _Partial(Global):
    """pandas 1.3 makes its blocks with functools.partial(new_block, ndim=2)."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        """The state repeats the function and adds ndim, which the values have, too."""
        if type(state) is not tuple or len(state) != 4 or not isinstance(state[0], Global) or state[0].call != _block:
            raise Refused("a functools.partial of something else than a block")


def _block(values: Any, indices: Any, _ndim: Any = 2) -> _Block:
    return _Block(values, indices)


def _partial(function: Any) -> _Partial:
    if not isinstance(function, Global) or function.call != _block:
        raise Refused("a functools.partial of something else than a block")
    return _Partial("partial", call=_block)


def _slice(*bounds: Any) -> slice:
    if len(bounds) != 3 or any(bound is not None and type(bound) is not int for bound in bounds):
        raise Refused("a slice of something else than numbers")
    return slice(*bounds)


def _new_index(cls: Any, data: Any) -> _Index:
    if not isinstance(cls, Global) or not cls.name.endswith("Index"):
        raise Refused("an index of an unknown kind")
    return _Index(_dict(data, "index"))


def _reconstructor(cls: Any, base: Any, state: Any) -> StandIn:
    """copyreg._reconstructor, by which protocols 0 and 1 make objects."""
    if not isinstance(cls, Global) or cls.new is None or not isinstance(base, Global) or state is not None:
        raise Refused("a new object of something that is not to be made")
    return cls.new()


class _Calls:
    """The calls that turn bytes into values, with a budget for what they allocate."""

    def __init__(self) -> None:
        self.left = MAX_ALLOCATED

    def charge(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise Refused(f"more than {MAX_ALLOCATED >> 20} MiB of values")

    def view(self, data: Any, dtype: Any, shape: Any, order: str) -> npt.NDArray[Any]:
        """An array on the file's bytes, of exactly their size."""
        if not isinstance(dtype, _DType) or type(data) not in (bytes, bytearray):
            raise Refused("an array of something else than bytes")
        if _size(shape) * dtype.numpy.itemsize != len(data):
            raise Refused("an array whose shape is not that of its values")
        value: npt.NDArray[Any] = np.frombuffer(data, dtype=dtype.numpy)
        return value.reshape(shape, order="F" if order == "F" else "C")

    def from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:
        """numpy._core.numeric._frombuffer."""
        if type(order) is not str or order not in ("C", "F", "K"):
            raise Refused("an array of an unknown layout")
        _size(shape)
        if axes is None:
            return _Array(self, self.view(data, dtype, shape, order))
        if order != "K" or type(axes) is not tuple or not all(type(i) is int for i in axes):
            raise Refused("an array of an unknown layout")
        if sorted(axes) != list(range(len(shape))):
            raise Refused("an array of an unknown layout")
        return _Array(self, self.view(data, dtype, shape, "C").transpose(axes))

    def dtype(self, code: Any, align: Any = False, copy: Any = True) -> _DType:
        if type(code) is not str or code not in _NUMBERS | _OBJECTS or align not in (False, 0):
            raise Refused("a dtype that is not of plain numbers")
        return _DType(code)

    def reconstruct(self, cls: Any, shape: Any, code: Any) -> _Array:
        """numpy._core.multiarray._reconstruct: an empty array, BUILD fills it."""
        if not isinstance(cls, Global) or cls.name != "ndarray":
            raise Refused("an array of an unknown kind")
        return _Array(self)

    def scalar(self, dtype: Any, data: Any) -> Any:
        """numpy._core.multiarray.scalar, as frames' attributes may hold them."""
        return self.view(data, dtype, (1,), "C")[0].item()

    def extension(self, *_: Any) -> _Extension:
        return _Extension(self.charge)

    def encode(self, text: Any, encoding: Any = None) -> bytes:
        """_codecs.encode, by which protocols below 3 write bytes."""
        if type(text) is not str or type(encoding) is not str or encoding not in ("latin1", "latin-1"):
            raise Refused("a text in place of bytes")
        self.charge(len(text))
        return text.encode("latin-1")

    def plain_bytes(self, data: Any = b"", encoding: Any = None) -> bytes:
        """bytes and bytearray, by which protocols below 5 write empty bytes and bytearrays."""
        return data if type(data) is bytes else self.encode(data, encoding)

    def table(self) -> dict[tuple[str, str], Global]:
        """Every name that a frame may use, in each module that had it in some version."""
        names: dict[tuple[str, str], Global] = {}

        def add(modules: Iterable[str], name: str, **does: Any) -> None:
            for module in modules:
                names[module, name] = Global(name, **does)

        builtins = ("builtins", "__builtin__")
        add(builtins, "slice", call=_slice)
        add(builtins, "object")
        add(builtins, "bytes", call=self.plain_bytes)
        add(builtins, "bytearray", call=self.plain_bytes)
        add(("copyreg", "copy_reg"), "_reconstructor", call=_reconstructor)
        add(("_codecs",), "encode", call=self.encode)
        add(("functools",), "partial", call=_partial)
        add(("numpy",), "dtype", call=self.dtype)
        add(("numpy",), "ndarray")
        for core in ("numpy.core", "numpy._core"):
            add((f"{core}.multiarray",), "_reconstruct", call=self.reconstruct)
            add((f"{core}.multiarray",), "scalar", call=self.scalar)
            add((f"{core}.numeric",), "_frombuffer", call=self.from_buffer)
        add(("pandas", "pandas.core.frame"), "DataFrame", new=_Frame)
        manager = "pandas.core.internals.managers"
        add((manager,), "BlockManager", call=lambda blocks, axes: _Manager(axes, blocks), new=_Manager)
        add(("pandas._libs.internals",), "_unpickle_block", call=_block)
        add(("pandas.core.internals.blocks",), "new_block", call=_block)
        add(("pandas.core.indexes.base",), "_new_Index", call=_new_index)
        add(("pandas", "pandas.core.indexes.base"), "Index")
        add(("pandas", "pandas.core.indexes.range"), "RangeIndex")
        for name in ("Int64Index", "UInt64Index", "Float64Index"):
            add(("pandas.core.indexes.numeric",), name)
        add(("pandas._libs.arrays",), "__pyx_unpickle_NDArrayBacked", call=self.extension)
        for module, kinds in _EXTENSIONS.items():
            for name in kinds:
                add((module, "pandas", "pandas.arrays"), name, call=self.extension, new=self.extension)
        add(("pandas", "pandas._libs.missing"), "NA")
        arrow = ("pyarrow.lib",)
        add(arrow, "type_for_alias", call=ArrowType)
        add(arrow, "py_buffer", call=buffer)
        add(arrow, "_restore_array", call=ArrowArray)
        add(arrow, "chunked_array", call=ArrowChunks)
        return names


_EXTENSIONS = {
    "pandas.core.arrays.categorical": ("Categorical",),
    "pandas.core.dtypes.dtypes": ("CategoricalDtype",),
    "pandas.core.arrays.string_": ("StringArray", "StringDtype"),
    "pandas.core.arrays.string_arrow": ("ArrowStringArray",),
    "pandas.core.arrays.boolean": ("BooleanArray", "BooleanDtype"),
    "pandas.core.arrays.floating": ("FloatingArray", "Float32Dtype", "Float64Dtype"),
    "pandas.core.arrays.integer": (
        "IntegerArray",
        *(f"{kind}{bits}Dtype" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    ),
}


def _dict(value: Any, what: str) -> dict[str, Any]:
    if type(value) is not dict:
        raise Refused(f"a {what} of an unknown layout")
    return value


def _size(shape: Any) -> int:
    if (
        type(shape) is not tuple
        or not 0 < len(shape) <= 2
        or not all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
    ):
        raise Refused("an array of an unknown shape")
    return math.prod(shape)


#
# the frame
#


def _assemble(state: dict[str, Any]) -> Frame:
    manager = state.get("_mgr", state.get("_data"))
    if not isinstance(manager, _Manager) or type(manager.blocks) not in (tuple, list):
        raise Refused("it has no blocks of columns")
    if type(manager.axes) is not list or len(manager.axes) != 2:
        raise Refused("it has no two axes")
    labels, n_rows = _labels(manager.axes[0]), _length(manager.axes[1])
    columns: dict[str, npt.NDArray[Any] | None] = {}
    for part in manager.blocks:
        block = _Block(part.get("values"), part.get("mgr_locs")) if type(part) is dict else part
        if not isinstance(block, _Block):
            raise Refused("it has no blocks of columns")
        indices = _indices(block.indices, len(labels))
        values = _values(block.values)
        if values is not None and values.ndim == 1 and len(indices) == 1:  # an extension array
            values = values.reshape(1, -1)
        if values is not None and values.shape != (len(indices), n_rows):
            raise Refused("a block has another shape than its place")
        for row, column in enumerate(indices):
            if labels[column] in columns:
                raise Refused("two columns in one place")
            numbers = values is not None and values.dtype.kind in "iufb"
            columns[labels[column]] = values[row] if values is not None and numbers else None
    if len(columns) != len(labels):
        raise Refused("columns without values, or two of one name")
    return Frame(n_rows, columns)


def _values(value: Any) -> npt.NDArray[Any] | None:
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, _Extension):
        return value.values()
    raise Refused("a block without values")


def _labels(index: Any) -> list[str]:
    values = _values(index.data.get("data")) if isinstance(index, _Index) else None
    if values is None or values.ndim != 1 or values.dtype.kind != "O":
        raise Refused("its columns have no names")
    labels: list[Any] = values.tolist()
    if not all(type(label) is str for label in labels):
        raise Refused("its columns have no names")
    return labels


def _length(index: Any) -> int:
    if not isinstance(index, _Index):
        raise Refused("its rows have no index")
    if "data" in index.data:
        values = _values(index.data["data"])
        if values is None or values.ndim != 1:
            raise Refused("its rows have no index")
        return len(values)
    bounds = [index.data.get(name) for name in ("start", "stop", "step")]
    if not all(type(bound) is int and abs(bound) < 1 << 31 for bound in bounds) or bounds[2] == 0:
        raise Refused("its rows have no index")
    return len(range(*bounds))  # type: ignore[arg-type]


def _indices(indices: Any, n: int) -> list[int]:
    if isinstance(indices, slice):
        return list(range(*indices.indices(n))) if indices.step != 0 else []
    values = _values(indices)
    if values is None or values.ndim != 1 or values.dtype.kind not in "iu" or len(values) > n:
        raise Refused("a block in no place")
    if len(values) and not (values.min() >= 0 and values.max() < n):
        raise Refused("a block in no place")
    return [int(place) for place in values]
