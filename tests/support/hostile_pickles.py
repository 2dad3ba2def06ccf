"""Pickles that want to run something, or to fill the memory. `live` ones do run under Python's own unpickler."""

from __future__ import annotations

import os
import pickle
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support import pickled_frames as frames

GOOD = {"a1": [[3, 1], [2, 2]], "a2": [[1, 4], [4, 1]], "n1": 4, "n2": 5}


@dataclass(frozen=True)
class Hostile:
    name: str
    data: bytes
    live: bool = False


class Call:
    """Pickles as a call of a function that is found by name, wherever it is."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


def text(value: str) -> bytes:
    """BINUNICODE."""
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def name(module: str, attribute: str) -> bytes:
    """STACK_GLOBAL."""
    return text(module) + text(attribute) + b"\x93"


def old_name(module: str, attribute: str) -> bytes:
    """GLOBAL."""
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def finish(body: bytes, protocol: int = 4) -> bytes:
    return (b"\x80" + bytes([protocol]) if protocol >= 2 else b"") + body + b"."


def in_frame(part: str, value: Any) -> bytes:
    """A good ranking with `value` put into one of its parts."""
    columns = frames.ranking(**GOOD)
    made = frames.frame(columns)
    if part == "column":
        names = np.asarray(columns["Layer_Expert"]).copy()
        names[2] = value
        made = frames.frame(columns | {"Layer_Expert": names})
    elif part == "attrs":
        made.__dict__["attrs"] = {"model_name": value}
    elif part == "labels":
        broken = np.array([*columns], dtype=object)
        broken[0] = value
        made.__dict__["_mgr"].parts[1][0] = frames.Index(broken)
    elif part == "block":
        blocks, axes = made.__dict__["_mgr"].parts
        made.__dict__["_mgr"].parts = ((value, *blocks[1:]), axes)
    elif part == "rows":
        made.__dict__["_mgr"].parts[1][1] = value
    elif part == "state":
        made.__dict__["_more"] = value
    elif part == "manager":
        made.__dict__["_mgr"] = value
    return frames.dumps(made)


def executing(canary: Path) -> list[Hostile]:
    """Files that create `canary` when they are unpickled (`live`), or would on some other Python or machine."""
    shell = f"touch {canary}"
    python = f"open({str(canary)!r}, 'w').close()"
    command, code, path = text(shell), text(python), text(str(canary))
    system, evaluate = name("os", "system"), name("builtins", "eval")
    getter, importer = name("builtins", "getattr"), name("importlib", "import_module")
    frame = name("pandas.core.frame", "DataFrame")
    block = name("pandas.core.internals.blocks", "new_block")
    dtype = call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    made = [
        Hostile("os.system, protocol 0", finish(call(old_name("os", "system"), f"V{shell}\n".encode()), 0), True),
        Hostile("posix.system, protocol 2", finish(call(old_name("posix", "system"), command), 2), True),
        Hostile("nt.system", finish(call(old_name("nt", "system"), command), 2)),
        Hostile("os.system, STACK_GLOBAL", finish(call(system, command)), True),
        Hostile("os.popen", finish(call(name("os", "popen"), command)), True),
        Hostile("os.execl", finish(call(name("os", "execl"), text("/bin/touch"), text("touch"), path)), True),
        Hostile("os.mkfifo", finish(call(name("os", "mkfifo"), path)), True),
        Hostile("subprocess.call", pickle.dumps(Call(subprocess.call, (["touch", str(canary)],))), True),
        Hostile("builtins.eval", finish(call(evaluate, code)), True),
        Hostile("builtins.exec", finish(call(name("builtins", "exec"), code)), True),
        Hostile("__builtin__.eval", finish(call(old_name("__builtin__", "eval"), code), 2), True),
        Hostile("builtins.open", finish(call(name("builtins", "open"), path, text("w"))), True),
        Hostile(
            "getattr of an imported module",
            finish(call(call(getter, call(importer, text("os")), text("system")), command)),
            True,
        ),
        Hostile(
            "builtins.__import__",
            finish(call(call(getter, call(name("builtins", "__import__"), text("os")), text("system")), command)),
            True,
        ),
        Hostile(
            "operator.attrgetter",
            finish(
                call(call(call(name("operator", "attrgetter"), text("system")), call(importer, text("os"))), command)
            ),
            True,
        ),
        Hostile(
            "operator.methodcaller",
            finish(
                call(
                    call(name("operator", "methodcaller"), text("system"), command),
                    call(importer, text("os")),
                )
            ),
            True,
        ),
        Hostile(
            "functools.partial of os.system", finish(call(call(name("functools", "partial"), system), command)), True
        ),
        Hostile(
            "functools.partial of a block, its state of os.system",
            finish(call(name("functools", "partial"), block) + b"(" + system + b"(" + command + b"t}NtbR"),
        ),
        Hostile(
            "functools.reduce",
            finish(call(name("functools", "reduce"), evaluate, b"(" + code + b"t")),
        ),
        Hostile(
            "builtins.map",
            finish(call(name("builtins", "list"), call(name("builtins", "map"), system, b"(" + command + b"t"))),
            True,
        ),
        Hostile("INST", finish(b"(" + f"V{shell}\nios\nsystem\n".encode(), 0), True),
        Hostile("OBJ", finish(b"(" + old_name("os", "system") + f"V{shell}\no".encode(), 1), True),
        Hostile("OBJ of a known class", finish(b"(" + old_name("pandas.core.frame", "DataFrame") + b"o", 1)),
        Hostile(
            "NEWOBJ of a class with a command",
            finish(name("subprocess", "Popen") + b"(" + command + b"t\x81"),
        ),
        Hostile("NEWOBJ of a known class with arguments", finish(frame + b"(" + command + b"t\x81")),
        Hostile("NEWOBJ of a function", finish(name("numpy", "dtype") + b")\x81")),
        Hostile("NEWOBJ_EX", finish(name("subprocess", "Popen") + b"(" + command + b"t}\x92")),
        Hostile("NEWOBJ_EX of a known class", finish(frame + b")}" + text("a") + b"K\x01s\x92")),
        Hostile(
            "BUILD with a __setstate__ of os.system",
            finish(
                name("types", "SimpleNamespace") + b")\x81}" + text("__setstate__") + system + b"sb" + command + b"b"
            ),
            True,
        ),
        Hostile(
            "BUILD that sets a frame's __setstate__",
            finish(frame + b")\x81}" + text("__setstate__") + frame + b"sb" + command + b"b"),
        ),
        Hostile("BUILD that sets a frame's __class__", finish(frame + b")\x81}" + text("__class__") + system + b"sb")),
        Hostile("BUILD of a name", finish(frame + b"}b")),
        Hostile("BUILD of a list", finish(b"]}b")),
        Hostile("EXT1", finish(b"\x82\x01")),
        Hostile("EXT2", finish(b"\x83\x01\x00")),
        Hostile("EXT4", finish(b"\x84\x01\x00\x00\x00")),
        Hostile("PERSID", finish(b"Pposix\n", 0)),
        Hostile("BINPERSID", finish(command + b"Q")),
        Hostile("a dotted name through numpy", finish(call(name("numpy", "f2py.os.system"), command)), True),
        Hostile("a dotted name through builtins", finish(call(name("builtins", "eval.__call__"), code)), True),
        Hostile("a dotted name through pandas", finish(call(name("pandas", "io.common.os.system"), command))),
        Hostile("a dotted name of a known class", finish(call(name("pandas", "DataFrame.eval"), code))),
        Hostile("a dotted module", finish(call(name("numpy.core.multiarray.os", "system"), command))),
        Hostile(
            "numpy's runner of strings",
            finish(call(name("numpy.testing._private.utils", "runstring"), code, b"}")),
            True,
        ),
        Hostile("numpy.load", finish(call(name("numpy", "load"), path))),
        Hostile("numpy.savetxt", finish(call(name("numpy", "savetxt"), path, b"]")), True),
        Hostile("pandas.eval", finish(call(name("pandas", "eval"), code))),
        Hostile("pandas.read_pickle", finish(call(name("pandas", "read_pickle"), path))),
        Hostile("pickle in pickle", pickle.dumps(Call(pickle.loads, (finish(call(system, command)),))), True),
        Hostile(
            "copyreg.__newobj__", finish(call(name("copyreg", "__newobj__"), name("subprocess", "Popen"), command))
        ),
        Hostile(
            "copyreg._reconstructor of another class",
            finish(
                call(name("copyreg", "_reconstructor"), name("subprocess", "Popen"), name("builtins", "object"), b"N")
            ),
        ),
        Hostile(
            "copyreg._reconstructor with a state",
            finish(call(name("copyreg", "_reconstructor"), frame, name("builtins", "object"), command)),
        ),
        Hostile(
            "copyreg.add_extension, then EXT1",
            finish(
                call(name("copyreg", "add_extension"), text("os"), text("system"), b"K\x07")
                + b"0\x82\x07("
                + command
                + b"tR"
            ),
            True,
        ),
        Hostile(
            "timeit.timeit",
            finish(call(name("timeit", "timeit"), code, text("pass"), name("time", "time"), b"K\x01")),
            True,
        ),
        Hostile("runpy", finish(call(name("runpy", "_run_code"), code, b"}")), True),
        Hostile(
            "code.InteractiveInterpreter",
            finish(call(call(getter, call(name("code", "InteractiveInterpreter")), text("runsource")), code)),
            True,
        ),
        Hostile("shutil.copyfile", finish(call(name("shutil", "copyfile"), text("/dev/null"), path)), True),
        Hostile("a call of a call's result", finish(call(dtype, command))),
        Hostile("a call of a text", finish(call(command, command))),
        Hostile("arguments that are no tuple", finish(name("numpy", "dtype") + command + b"R")),
        Hostile("a call of a class", finish(call(frame, command))),
        Hostile("another encoding", finish(call(name("_codecs", "encode"), command, text("rot13")))),
        Hostile("_codecs.lookup", finish(call(name("_codecs", "lookup"), command))),
        Hostile(
            "a scalar of objects",
            finish(
                call(
                    name("numpy._core.multiarray", "scalar"),
                    call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88"),
                    b"C\x01x",
                )
            ),
        ),
        Hostile("a dtype of a structure", finish(call(name("numpy", "dtype"), b"]", b"\x89", b"\x88"))),
        Hostile(
            "a dtype with fields",
            finish(dtype + b"(K\x03" + text("<") + b"N" + text("a") + b"}J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"),
        ),
        Hostile(
            "_reconstruct of a memmap",
            finish(
                call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "memmap"), b"K\x00\x85", b"C\x01b")
            ),
        ),
        Hostile("a buffer from outside", finish(b"\x97", 5)),
        Hostile("a buffer made readonly", finish(b"C\x01x\x98", 5)),
        Hostile("a module that prints when imported", finish(name("this", "s"))),
        Hostile("a set", finish(b"\x8f")),
        Hostile("DUP", finish(b"K\x012.")),
    ]
    bomb = Call(os.system, (shell,))
    for part in ("column", "attrs", "labels", "block", "rows", "state", "manager"):
        made.append(Hostile(f"os.system in a frame's {part}", in_frame(part, bomb)))
    for protocol in range(6):
        made.append(Hostile(f"os.system, written with protocol {protocol}", pickle.dumps(bomb, protocol), True))
        made.append(
            Hostile(f"os.system in a list, protocol {protocol}", pickle.dumps([1, {"a": bomb}], protocol), True)
        )
    return made


def _array(dtype: bytes, data: bytes, *shape: bytes, order: str = "C") -> bytes:
    """_frombuffer."""
    return call(name("numpy._core.numeric", "_frombuffer"), data, dtype, b"(" + b"".join(shape) + b"t", text(order))


def exhausting() -> list[Hostile]:
    """Files that want memory or time, or are damaged where it could hurt."""
    dtype = call(name("numpy", "dtype"), text("f8"), b"\x89", b"\x88")
    objects = call(name("numpy", "dtype"), text("O8"), b"\x89", b"\x88")
    huge = b"\xff" * 7 + b"\x7f"
    word = b"X" + (1 << 20).to_bytes(4, "little") + b"a" * (1 << 20) + b"\x94"
    tuples = b")\x94" + b"".join(b"h" + bytes([i]) + b"\x86\x94" for i in range(90))
    doubled: Any = ()
    for _ in range(90):
        doubled = (doubled, doubled)
    again = call(name("_codecs", "encode"), b"h\x00", text("latin1"))
    long_list = b"](" + b"N" * 200_000 + b"e\x94"
    array = call(name("numpy._core.multiarray", "_reconstruct"), name("numpy", "ndarray"), b"K\x00\x85", b"C\x01b")
    filled = array + b"(K\x01J" + (200_000).to_bytes(4, "little") + b"\x85" + objects + b"\x89h\x00tb"
    return [
        Hostile("empty", b""),
        Hostile("only a stop", b"."),
        Hostile("text", b"layer,expert,risk_diff\n0,0,0.5\n"),
        Hostile("a ZIP file", b"PK\x03\x04" + bytes(60)),
        Hostile("a memo entry far out", finish(b"Nr\xff\xff\xff\xff")),
        Hostile("a memo entry that is not there", finish(b"h\x05")),
        Hostile("pairs of pairs", finish(tuples)),
        Hostile("pairs of pairs in a frame's labels", in_frame("labels", doubled)),
        Hostile("pairs of pairs for a frame's blocks", in_frame("block", doubled)),
        Hostile("arrays of one long list, many times", finish(b"(" + long_list + filled * 50 + b"t")),
        Hostile("pairs of pairs as a key", finish(b"}" + tuples + b"Ns")),
        Hostile("deep tuples", finish(b")" + b"\x85" * 500_000)),
        Hostile("deep lists", finish(b"]" * 50_000 + b"a" * 49_999)),
        Hostile("deep marks", finish(b"(" * 50_000)),
        Hostile("more steps than any frame", finish(b"N" * 1_100_000)),
        Hostile("a text of 8 EiB", finish(b"\x8d" + huge)),
        Hostile("bytes of 8 EiB", finish(b"\x8e" + huge)),
        Hostile("a bytearray of 8 EiB", finish(b"\x96" + huge, 5)),
        Hostile("a text of 16 EiB", finish(b"\x8d" + b"\xff" * 8)),
        Hostile("a frame of 8 EiB", b"\x80\x04\x95" + huge + b"N."),
        Hostile("a negative long", finish(b"\x8b\xff\xff\xff\xff")),
        Hostile("a number of a million digits", finish(b"I" + b"9" * 1_000_000 + b"\n", 0)),
        Hostile("a number that is none", finish(b"Iabc\n", 0)),
        Hostile("text that is no UTF-8", finish(b"\x8c\x01\xff")),
        Hostile("an unknown opcode", finish(b"\xff")),
        Hostile("underflow", finish(b"\x87")),
        Hostile("a tuple without a mark", finish(b"Nt")),
        Hostile("append to a number", finish(b"K\x01K\x02a")),
        Hostile("a value for no key", finish(b"}(Nu")),
        Hostile("two values", finish(b"NN")),
        Hostile("more after the end", finish(b"N") + b"N."),
        Hostile("a number, no frame", finish(b"K\x01")),
        Hostile("a series", finish(name("pandas.core.series", "Series"))),
        Hostile("a class, no frame", finish(name("pandas.core.frame", "DataFrame"))),
        Hostile("a frame without state", finish(name("pandas.core.frame", "DataFrame") + b")\x81")),
        Hostile("a frame whose state is a number", finish(name("pandas.core.frame", "DataFrame") + b")\x81K\x01b")),
        Hostile(
            "an array of more than there is",
            finish(_array(dtype, b"C\x08" + bytes(8), b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\x7f")),
        ),
        Hostile("an array of less than there is", finish(_array(dtype, b"C\x10" + bytes(16), b"K\x01"))),
        Hostile("an array of negative size", finish(_array(dtype, b"C\x08" + bytes(8), b"J\xff\xff\xff\xff"))),
        Hostile("an array of half a size", finish(_array(dtype, b"C\x08" + bytes(8), b"G\x3f\xf0" + bytes(6)))),
        Hostile("an array without dimensions", finish(_array(dtype, b"C\x08" + bytes(8)))),
        Hostile("an array of 40 dimensions", finish(_array(dtype, b"C\x08" + bytes(8), *[b"K\x01"] * 40))),
        Hostile("an array of objects from bytes", finish(_array(objects, b"C\x08" + bytes(8), b"K\x01"))),
        Hostile("an array of a text", finish(_array(dtype, text("12345678"), b"K\x01"))),
        Hostile("an array in no order", finish(_array(dtype, b"C\x08" + bytes(8), b"K\x01", order="X"))),
        Hostile("bytes made again and again", finish(b"(" + word + again * 100 + b"t")),
        Hostile("rows without end", in_frame("rows", frames.RangeIndex(10**18))),
        Hostile("rows that never step", in_frame("rows", frames.RangeIndex(4, step=0))),
        Hostile("rows of another number", in_frame("rows", frames.RangeIndex(5))),
        Hostile("rows counted in texts", in_frame("rows", frames.Index("four"))),
        Hostile("a column in no place", in_frame("block", frames.Block(np.zeros((1, 4)), slice(99, 100, 1)))),
        Hostile("a column in an endless place", in_frame("block", frames.Block(np.zeros((1, 4)), slice(0, 10**18, 1)))),
        Hostile("a column in a place of step 0", in_frame("block", frames.Block(np.zeros((1, 4)), slice(0, 1, 0)))),
        Hostile("a column in places far out", in_frame("block", frames.Block(np.zeros((1, 4)), np.array([1 << 62])))),
        Hostile("a column in negative places", in_frame("block", frames.Block(np.zeros((1, 4)), np.array([-1])))),
        Hostile("two columns in one place", in_frame("block", frames.Block(np.zeros((1, 4)), slice(1, 2, 1)))),
        Hostile("a column of other rows", in_frame("block", frames.Block(np.zeros((1, 5)), slice(0, 1, 1)))),
        Hostile("a column of no values", in_frame("block", frames.Block(None, slice(0, 1, 1)))),
        Hostile("a column's name that is a number", in_frame("labels", 7)),
        Hostile("two columns of one name", in_frame("labels", "expert")),
        Hostile("no manager", in_frame("manager", 3)),
    ]
