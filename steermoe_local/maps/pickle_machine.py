"""Reads pickle files without running them: an interpreter of opcodes that makes plain values and inert stand-ins.

A pickle is a program; Python's unpickler imports and calls what the program names. This one looks every name up in a
table of stand-ins that the caller gives. Another name, an opcode that no table of numbers uses, or a value of an
unexpected type ends the reading.

Why not a `pickle.Unpickler` whose `find_class` returns the same stand-ins: nothing ran in a trial with the files of
tests/support/hostile_pickles.py, but memory and time have no bound, as `find_class` does not see these opcodes. In
CPython 3.11, LONG_BINPUT of nine bytes fills 16 bytes for each memo index (1 GiB for index 2^26, 64 GiB for the
largest), BYTEARRAY8 reserves the size that it declares, and a dictionary key of 368 bytes, tuples that share their
parts 90 levels deep, takes 2^90 steps to hash.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

from ..errors import FormatError

MAX_OPCODES = 1_000_000
_MAX_NUMBER = 1 << 32  # of keys and memo indexes: of larger ones, a stranger can choose many that hash alike
_MAX_ARGUMENTS = 16  # of a call: a tuple of the memo may be passed again and again


class Refused(Exception):
    """The pickle holds something that is not allowed; the text names it."""


class StandIn:
    """An inert object in place of one that the pickle would make."""

    __slots__ = ()

    def build(self, state: Any) -> None:
        """Take the state of the opcode BUILD; refused by default."""
        raise Refused("a state for an object that has none")


class Global(StandIn):
    """A name of the table: `call` is what REDUCE calls, `new` what NEWOBJ makes; None where that is refused."""

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
    """A text of a hostile file as it may appear in a message: ASCII, one line, short."""
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
        # stack underflow, a missing memo entry, a value of the wrong type
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


def _check_number(number: int) -> None:
    if not -_MAX_NUMBER < number < _MAX_NUMBER:
        raise Refused("a key or an index that no table has")


def _refuse(where: str, what: str) -> NoReturn:
    raise FormatError(
        f"{where}: refused, it holds {what}; only a pandas table of numbers is read, and nothing in the file was run"
    ) from None


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_SHORT_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


_KNOWN = {
    *(*_VALUES, *_CONSTANTS, *_SHORT_TUPLES, "TUPLE", "LIST", "DICT", "APPEND", "APPENDS", "SETITEM", "SETITEMS"),
    *("GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "MARK", "STOP", "PROTO", "FRAME"),
    *("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET"),
}


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
        """Carry out one opcode. Raises Refused; IndexError, KeyError and TypeError for a damaged program."""
        stack = self._stack
        match name:
            case _ if name in _VALUES:
                stack.append(argument)
            case _ if name in _CONSTANTS:
                stack.append(_CONSTANTS[name]())
            case _ if name in _SHORT_TUPLES:
                items = [stack.pop() for _ in range(_SHORT_TUPLES[name])]
                stack.append(tuple(reversed(items)))
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                _check_number(argument)
                self._memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "MARK":
                self._marks.append(stack)
                self._stack = []
            case "TUPLE" | "LIST" | "DICT" | "APPENDS" | "SETITEMS":
                self._stack = self._marks.pop()
                if name == "TUPLE":
                    self._stack.append(tuple(stack))
                elif name == "LIST":
                    self._stack.append(stack)
                elif name == "APPENDS":
                    self._extend(stack)
                else:
                    if name == "DICT":
                        self._stack.append({})
                    self._set_items(stack)
            case "APPEND":
                self._extend([stack.pop()])
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._set_items([key, value])
            case "GLOBAL":
                stack.append(self._found(*argument))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._found(module, attribute))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, Global) or function.call is None or type(arguments) is not tuple:
                    raise Refused("a call of something that is not to be called")
                if len(arguments) > _MAX_ARGUMENTS:
                    raise Refused(f"a call with {len(arguments)} arguments")
                stack.append(function.call(*arguments))
            case "NEWOBJ":
                arguments, cls = stack.pop(), stack.pop()
                if type(cls) is not Global or cls.new is None or type(arguments) is not tuple or len(arguments):
                    raise Refused("a new object of something that is not to be made")
                stack.append(cls.new())
            case "BUILD":
                state = stack.pop()
                if not isinstance(stack[-1], StandIn):
                    raise Refused("a state for an object that has none")
                stack[-1].build(state)
            # PROTO and FRAME say how the bytes are divided, which makes no difference here

    def _extend(self, items: list[Any]) -> None:
        if type(self._stack[-1]) is not list:
            raise TypeError
        self._stack[-1].extend(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Nothing else may be hashed: tuples that share their parts can take forever.
            if type(key) not in (str, int):
                raise Refused("a dictionary whose keys are not names")
            if type(key) is int:
                _check_number(key)
            target[key] = value

    def _found(self, module: Any, name: Any) -> Global:
        if type(module) is not str or type(name) is not str:
            raise Refused("a name that is not text")
        found = self._table.get((module, name))
        if found is None:
            raise Refused(f"the name {quoted(module)}.{quoted(name)}")
        return found
