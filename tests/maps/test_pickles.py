"""Pickled frames: hostile files are refused within bounds of memory and time, and nothing in them ever runs."""

from __future__ import annotations

import codecs
import contextlib
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steermoe_local.errors import FormatError
from steermoe_local.maps import pickle_machine
from steermoe_local.maps.pickle_frames import read_frame
from steermoe_local.maps.rankings import read_rankings
from tests.maps.test_rankings import A1, A2, FRAMES
from tests.support.hostile_pickles import Hostile, executing, exhausting

codecs.lookup("raw_unicode_escape")  # the standard codec of the opcode UNICODE, loaded when it is first used


def refused(path: Path, hostile: Hostile, canary: Path) -> str:
    path.write_bytes(hostile.data)
    before = set(sys.modules)
    with pytest.raises(FormatError) as caught:
        read_rankings(path)
    assert not canary.exists(), f"{hostile.name}: it ran"
    # FormatError's own message imports nothing either
    assert set(sys.modules) - before == set(), f"{hostile.name}: it imported a module"
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable(), hostile.name
    return message


def test_hostile_pickles_never_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = executing(canary)
    assert len(files) >= 90
    for hostile in files:
        refused(tmp_path / "x.pkl", hostile, canary)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("a call of a class", "a call of something that is not to be called"),
        ("NEWOBJ of a known class with arguments", "a new object of something that is not to be made"),
        ("a dtype with fields", "a dtype with fields"),
        ("an array of less than there is", "an array whose shape is not that of its values"),
        ("pairs of pairs in a frame's labels", "its columns have no names"),
        ("two columns in one place", "two columns in one place"),
    ],
)
def test_what_a_refusal_says(tmp_path: Path, name: str, words: str) -> None:
    canary = tmp_path / "canary"
    (hostile,) = [h for h in (*executing(canary), *exhausting()) if h.name == name]
    assert words in refused(tmp_path / "x.pkl", hostile, canary)


FORKS = """
import os, pickle, sys, warnings
warnings.simplefilter("ignore")
canary, *files = sys.argv[1:]
for file in files:
    if os.fork() == 0:
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, 1), os.dup2(devnull, 2)
        try:
            kept = pickle.load(open(file, "rb"))
            if hasattr(kept, "close"):
                kept.close()
        finally:
            os._exit(0)
    os.wait()
    print(os.path.exists(canary))
    if os.path.exists(canary):
        os.remove(canary)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs the hostile files in processes of their own")
def test_the_live_ones_do_run_under_pickle(tmp_path: Path) -> None:
    """The canary sings: what is refused above is what Python's own unpickler runs."""
    canary = tmp_path / "canary"
    files = [hostile for hostile in executing(canary) if hostile.live]
    assert len(files) >= 40
    paths = []
    for number, hostile in enumerate(files):
        paths.append(tmp_path / f"{number}.pkl")
        paths[-1].write_bytes(hostile.data)
    command = [sys.executable, "-c", FORKS, str(canary), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    ran = [hostile.name for hostile, line in zip(files, done.stdout.split(), strict=True) if line == "True"]
    assert ran == [hostile.name for hostile in files]


def test_files_that_want_memory_or_time(tmp_path: Path) -> None:
    for hostile in exhausting():
        message = refused(tmp_path / "x.pkl", hostile, tmp_path / "canary")
        assert len(message) < len(str(tmp_path)) + 250


def test_what_calls_allocate_is_bounded(tmp_path: Path) -> None:
    hungry = {h.name: h for h in exhausting()}
    for name in ("bytes made again and again", "a text of 8 EiB", "rows without end", "a memo entry far out"):
        tracemalloc.start()
        message = refused(tmp_path / "x.pkl", hungry[name], tmp_path / "canary")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 160 << 20, f"{name}: {peak >> 20} MiB"
    assert "more than 64 MiB" in refused(
        tmp_path / "x.pkl", hungry["arrays of one long list, many times"], tmp_path / "canary"
    )
    assert message


def test_python_s_unpickler_is_never_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler", "_load", "_loads"):
        monkeypatch.setattr(pickle, name, never)
    assert read_rankings(FRAMES / "pandas-2.2.3.pkl").n1 == 10


@pytest.mark.parametrize("name", ["pandas-1.1.5", "pandas-1.3.5", "pandas-2.2.3-protocol0", "pandas-3.0.0-pyarrow"])
def test_damaged_at_any_byte(tmp_path: Path, name: str) -> None:
    data = (FRAMES / f"{name}.pkl").read_bytes()
    path = tmp_path / "x.pkl"
    for at in range(0, len(data), 17):
        path.write_bytes(data[:at])
        with pytest.raises(FormatError):
            read_rankings(path)
    for at in range(0, len(data), 13):
        for bit in (1 << at % 8, 0xFF):
            path.write_bytes(data[:at] + bytes([data[at] ^ bit]) + data[at + 1 :])
            with contextlib.suppress(FormatError):
                found = read_rankings(path)
                assert found.a1.tolist() == A1, "read, so a label or a column that nobody needs was hit"
                assert found.a2.tolist() == A2


@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(FormatError):
        read_frame(data, "x.pkl")


_OPCODES = [
    *(b"(", b")", b"]", b"}", b"t", b"e", b"u", b"s", b"a", b"R", b"b", b"\x81", b"\x93", b"\x94", b"\x85", b"\x86"),
    *(b"N", b"\x88", b"K\x01", b"h\x00", b"h\x01", b"\x8c\x01<", b"\x8c\x02f8", b"\x8c\x06latin1", b"C\x08" + bytes(8)),
    *(f"c{module}\n{name}\n".encode() for module, name in (("numpy", "dtype"), ("numpy", "ndarray"))),
    *(f"cnumpy._core.{name}\n".encode() for name in ("numeric\n_frombuffer", "multiarray\n_reconstruct")),
    *(f"cpandas.core.{name}\n".encode() for name in ("frame\nDataFrame", "internals.managers\nBlockManager")),
    *(b"cbuiltins\nslice\n", b"cfunctools\npartial\n", b"cpandas._libs.internals\n_unpickle_block\n"),
]


@given(st.lists(st.sampled_from(_OPCODES), max_size=60))
def test_any_opcodes(parts: list[bytes]) -> None:
    """Programs of what a frame is made of, in any order: FormatError or a frame, no other exception."""
    with pytest.raises(FormatError):
        read_frame(b"".join(parts) + b".", "x.pkl")


def test_nothing_may_follow_a_frame() -> None:
    data = (FRAMES / "pandas-2.2.3.pkl").read_bytes()
    with pytest.raises(FormatError, match="after its end"):
        read_frame(data + b"N.", "x")


_ALIKE = 2**61 - 1  # whole numbers that differ by a multiple of it have one hash
_SHARED_BLOCKS = (
    b"cpandas.core.internals.managers\nBlockManager\nq\x00(NNN}X\x06\0\0\x000.14.1}(X\x04\0\0\0axesNX\x06\0\0\0blocks]("
)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"N" + b"".join(b"p%d\n" % (n * _ALIKE) for n in range(100_000)) + b".", id="memo"),
        pytest.param(
            b"}(" + b"".join(b"\x8a\x0a" + (n * _ALIKE).to_bytes(10, "little") + b"N" for n in range(100_000)) + b"u.",
            id="keys",
        ),
        pytest.param(
            _SHARED_BLOCKS + b"}" * 5000 + b"eustq\x01" + b"h\x00)\x81h\x01b" * 5000 + b".", id="managers of one list"
        ),
        pytest.param(
            b"cpandas\nStringDtype\nq\x00(" + b"N" * 120_000 + b"tq\x01" + b"h\x00h\x01R" * 120_000 + b".",
            id="arguments",
        ),
    ],
)
def test_time_follows_the_size(data: bytes) -> None:
    start = time.process_time()
    with pytest.raises(FormatError):
        read_frame(data, "x")
    # under one second; each took more than ten when its parts were looked at again for each other part
    assert time.process_time() - start < 5


def test_a_limit_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (FRAMES / "pandas-2.2.3.pkl").read_bytes()
    monkeypatch.setattr(pickle_machine, "MAX_OPCODES", 50)
    with pytest.raises(FormatError, match="more than 50 steps"):
        read_frame(data, "x")


def test_not_there_and_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FormatError, match="cannot be read"):
        read_rankings(tmp_path / "none.pkl")
    monkeypatch.setattr("steermoe_local.maps.rankings._MAX_BYTES", 1000)
    with pytest.raises(FormatError, match="larger than"):
        read_rankings(FRAMES / "pandas-2.2.3.pkl")
