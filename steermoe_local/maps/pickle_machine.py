"""A reader of pickle files that runs nothing: opcodes in, inert stand-ins out.

A pickle is a program. Python's own unpickler imports and calls what the program names; this one never does. It walks
through the opcodes and keeps plain values; every name must be in a table that the caller gives, and the table holds
stand-ins of ours. A name outside the table, an opcode that no such file uses, or a value of an unexpected kind ends the
reading, before anything was built of it.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from ..errors import FormatError

__all__ = ["Global", "MAX_OPCODES", "Refused", "StandIn", "Table", "quoted", "run"]

MAX_OPCODES = 1_000_000


class Refused(Exception):
    """The pickle asks for something that it may not have; the text says for what."""


class StandIn:
    """What stands in the place of an object of the pickled program."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        """Take the state that the pickle gives (opcode BUILD); refuse by default."""
        raise Refused("a state for an object that has none")


class Global(StandIn):
    """A name of the table: may be called (REDUCE), or made without arguments (NEWOBJ), as its entry allows."""

    __slots__ = ("call", "name", "new")

    def __init__(
        self,
        name: str,
        call: Callable[..., Any] | None = None,
        new: Callable[[], StandIn] | None = None,
    ) -> None:
        self.name, self.call, self.new = name, call, new


Table = Mapping[tuple[str, str], Global]


def quoted(text: str) -> str:
    """A name from a hostile file, fit for a message: ASCII, on one line, short."""
    return ascii(text)[1:-1] if len(text) <= 60 else ascii(text[:60])[1:-1] + "..."


def run(data: bytes, table: Table, where: str) -> Any:
    """Read one pickle and return its value, made of plain values and the table's stand-ins.

    Raises FormatError for anything else than a whole, well-formed pickle of such values.
    """
    machine = _Machine(table)
    try:
        for name, argument, position in _opcodes(data):
            if name == "STOP":
                if position + 1 != len(data):
                    raise Refused("bytes after its end")
                return machine.result()
            machine.step(name, argument)
    except Refused as error:
        _refuse(where, str(error))
    except (IndexError, KeyError, TypeError, ValueError):
        # What Python's unpickler calls stack underflow, a missing memo entry and a value of the wrong kind.
        _refuse(where, "values in an order that no pickle has")
    raise AssertionError("opcodes end with STOP or Refused")


def _opcodes(data: bytes) -> Iterator[tuple[str, Any, int]]:
    """(name, argument, position) of the opcodes; the argument of an unknown one is not read."""
    file = io.BytesIO(data)
    for _ in range(MAX_OPCODES):
        position = file.tell()
        opcode = _OPCODES.get(file.read(1).decode("latin-1"))
        if opcode is None:
            raise Refused("bytes that are no pickle, or half of one")
        if opcode.name not in _KNOWN:
            raise Refused(f"the opcode {opcode.name}, which no table needs")
        try:
            argument: Any = None
            if opcode.name == "GLOBAL":
                argument = (_line(file), _line(file))
            elif opcode.arg:
                argument = opcode.arg.reader(file)
        except (ValueError, OverflowError, MemoryError):
            raise Refused("bytes that are no pickle, or half of one") from None
        yield opcode.name, argument, position
    raise Refused(f"more than {MAX_OPCODES:,} steps")


def _line(file: io.BytesIO) -> str:
    line = file.readline()
    if not line.endswith(b"\n"):
        raise ValueError
    return line[:-1].decode("utf-8")


def _refuse(where: str, what: str) -> NoReturn:
    raise FormatError(
        f"{where}: refused, it holds {what}; only a pandas table of numbers is read, and nothing in the file was run"
    ) from None


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Machine:
    def __init__(self, table: Table) -> None:
        self._table = table
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []  # the stacks below each open mark
        self._memo: dict[int, Any] = {}

    def result(self) -> Any:
        if len(self._stack) != 1 or self._marks:
            raise Refused("values that are left over")
        return self._stack[0]

    def step(self, name: str, argument: Any) -> None:
        stack = self._stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _SHORT_TUPLES:
            n = _SHORT_TUPLES[name]
            if len(stack) < n:
                raise IndexError
            items = tuple(stack[len(stack) - n :])
            del stack[len(stack) - n :]
            stack.append(items)
        elif name in ("PROTO", "FRAME"):
            pass  # how the bytes are cut up
        elif name == "MEMOIZE":
            self._memo[len(self._memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self._memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self._memo[argument])
        elif name == "MARK":
            self._marks.append(stack)
            self._stack = []
        else:
            _METHODS[name](self, argument)

    def _since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _tuple(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(tuple(items))

    def _list(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append(items)

    def _empty_list(self, _: Any) -> None:
        self._stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self._stack.append({})

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self._stack.append({})
        self._set(items)

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError
        self._stack[-1].extend(items)

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def _set_items(self, _: Any) -> None:
        self._set(self._since_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else may be hashed: tuples that share their parts can take forever.
            if type(key) not in (str, int):
                raise Refused("a dictionary whose keys are not names")
            target[key] = value

    def _global(self, argument: Any) -> None:
        self._find(*argument)

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._find(module, name)

    def _find(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is not text")
        found = self._table.get((module, name))
        if found is None:
            raise Refused(f"the name {quoted(module)}.{quoted(name)}")
        self._stack.append(found)

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or function.call is None or type(arguments) is not tuple:
            raise Refused("a call of something that is not to be called")
        self._stack.append(function.call(*arguments))

    def _new(self, _: Any) -> None:
        arguments, cls = self._stack.pop(), self._stack.pop()
        if type(cls) is not Global or cls.new is None or type(arguments) is not tuple or len(arguments):
            raise Refused("a new object of something that is not to be made")
        self._stack.append(cls.new())

    def _build(self, _: Any) -> None:
        state = self._stack.pop()
        target = self._stack[-1]
        if not isinstance(target, StandIn):
            raise Refused("a state for an object that has none")
        target.build(state)


_METHODS: dict[str, Callable[[_Machine, Any], None]] = {
    "TUPLE": _Machine._tuple,
    "LIST": _Machine._list,
    "EMPTY_LIST": _Machine._empty_list,
    "EMPTY_DICT": _Machine._empty_dict,
    "DICT": _Machine._dict,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "GLOBAL": _Machine._global,
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._reduce,
    "NEWOBJ": _Machine._new,
    "BUILD": _Machine._build,
}
_KNOWN = {
    *(*_VALUES, *_CONSTANTS, *_SHORT_TUPLES, *_METHODS),
    *("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET", "MARK", "STOP"),
}
