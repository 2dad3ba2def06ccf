"""Native code that ends the process: one line on stderr says why and what to do, and the status is the signal's.

One model is broken in a way that only llama.cpp notices, and by aborting. The others, which end the process later
(while a graph is built, in computing), would be refused before llama.cpp sees them; here nothing is refused.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from steermoe_local import NativeError
from steermoe_local.llama.quantizer import quantize_file
from tests.support.hostile import obeyed
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="statuses of signals")

PROGRAM = "import sys; sys.argv[0] = 'steermoe'; from steermoe_local.cli import main; main()"
REFUSES_NOTHING = """
from steermoe_local.model_files import loadable, model_info
loadable.why_not_loadable = model_info.why_not_loadable = lambda parts: ""
"""
PAIRS = ROOT / "examples" / "pairs" / "numbers.jsonl"
# a key of the model, its new value, and what llama.cpp finds wrong: while it loads, builds a graph, computes
BROKEN = {
    "token twice": ("", b"", "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed"),
    "rope": ("olmoe.rope.dimension_count", struct.pack("<I", 3), "GGML_ASSERT(n_embd_head == n_rot) failed"),
    "epsilon": ("olmoe.attention.layer_norm_rms_epsilon", struct.pack("<f", -1.0), "GGML_ASSERT(eps >= 0.0f) failed"),
}


def patched(source: Path, target: Path, key: str, value: bytes) -> Path:
    """A copy of a GGUF file with other bytes of a value of fixed size."""
    data = bytearray(source.read_bytes())
    name = struct.pack("<Q", len(key)) + key.encode()
    at = data.index(name) + len(name) + 4  # behind the type
    data[at : at + len(value)] = value
    target.write_bytes(data)
    return target


def with_a_token_twice(source: Path, target: Path) -> Path:
    """A copy of a GGUF file in whose vocabulary two tokens have one text."""
    field = GGUFReader(source).fields["tokenizer.ggml.tokens"]
    one, other = [field.parts[i] for i in field.data if len(field.parts[i]) == 3][-2:]
    data = source.read_bytes()
    length = struct.pack("<Q", 3)
    start = data.index(b"tokenizer.ggml.tokens")
    at = data.index(length + other.tobytes(), start) + len(length)
    target.write_bytes(data[:at] + one.tobytes() + data[at + 3 :])
    return target


@pytest.fixture(scope="module", params=BROKEN)
def broken(
    request: pytest.FixtureRequest, tiny_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str, str]:
    """A model, llama.cpp's words, and the program that loads it."""
    key, value, words = BROKEN[request.param]
    path = tmp_path_factory.mktemp("broken") / "model.gguf"
    if not key:
        return with_a_token_twice(tiny_path, path), words, PROGRAM
    return patched(tiny_path, path, key, value), words, REFUSES_NOTHING + PROGRAM


def run(code: str, *args: Any, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **kwargs.pop("env", {})}
    options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.run(command, env=env, text=True, timeout=300, check=False, **{**options, **kwargs})


def last_words(done: subprocess.CompletedProcess[str], number: int, announced: str = "") -> str:
    """The one line of the crash, the last one; what was announced may stand before it, if it came so far."""
    assert done.returncode == -number, done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    line = said[1:] if announced and said[0] == announced else said
    assert len(line) == 1, done.stderr
    assert line[0].startswith("error: ")
    assert signal.Signals(number).name in line[0]
    assert "docs/errors.md" in line[0]
    assert not obeyed(line[0])
    return line[0]


@pytest.mark.parametrize(
    ("words", "announced"),
    [
        ("run -m {} -p hello -n 1", ""),
        (
            "detect -m {} --pairs {pairs} -o map.json",
            "detect: 4 pairs, 8 texts (shorter with --until-stable, or fewer pairs)",
        ),
        (
            "run -m {} --n-prompts {prompts} -n 1 -o a.jsonl",
            "run: 1 answer of at most 1 token (shorter with -n N, or fewer prompts)",
        ),
    ],
)
def test_a_command_tells_why_it_was_ended(
    broken: tuple[Path, str, str], words: str, announced: str, tmp_path: Path
) -> None:
    model, reason, program = broken
    (tmp_path / "prompts.jsonl").write_text('{"id": "a", "prompt": "hello"}\n')
    args = [word.format(model, pairs=PAIRS, prompts=tmp_path / "prompts.jsonl") for word in words.split()]
    done = run(program, *args, cwd=tmp_path)
    assert reason in last_words(done, signal.SIGABRT, announced)
    assert done.stdout == ""


def test_stderr_in_a_file(broken: tuple[Path, str, str], tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        done = run(broken[2], "run", "-m", broken[0], "-p", "hello", stderr=log)
    assert done.returncode == -signal.SIGABRT
    assert broken[1] in (tmp_path / "log").read_text()


def test_a_server_tells_its_log(broken: tuple[Path, str, str]) -> None:
    """It computes a token before it listens, or with the first request."""
    import httpx

    model, reason, program = broken
    command = [sys.executable, "-c", program, "serve", "-m", str(model), "--port", "0", "-np", "1", "-c", "64"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as process:
        assert process.stderr is not None
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if "serves" in line:
                    url = next(word for word in line.split() if word.startswith("http"))
                    with pytest.raises(httpx.TransportError):
                        httpx.post(f"{url}/v1/completions", json={"prompt": "hello", "max_tokens": 1}, timeout=60)
            status = process.wait(60)
        finally:
            process.kill()
    assert status == -signal.SIGABRT, lines
    assert sum(line.startswith("error: ") and reason in line for line in lines) == 1, lines


def test_a_quantization_tells_its_parent(tiny_path: Path, tmp_path: Path) -> None:
    model = patched(tiny_path, tmp_path / "model.gguf", "olmoe.block_count", bytes(4))
    with pytest.raises(NativeError, match=r"ended by signal 6; llama.cpp.* GGML_ASSERT.*n_layer"):
        quantize_file(model, tmp_path / "out.gguf", 7)


# What can end a process, by ctypes. `quiet`: llama_cpp points stderr to the null device while it loads.
FORCED = """
import ctypes, os, signal, sys
from steermoe_local.llama import library
library.tell_of_crashes()
llama = library.llama_cpp()
what, folder = sys.argv[1:3]
if what == "assert":
    base = ctypes.CDLL(next(str(path) for path in library.library_folder().glob("*ggml-base.*")))
    text = b"a\\x1b]0;t\\x07\\n\\xc2\\x9b" + b"b" * 9000
    base.ggml_abort(b"/home/somebody/ggml.c", 12, b"GGML_ASSERT(%s) failed", text)
if what == "quiet":
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
if what == "words":
    llama.llama_model_load_from_file(b"no\\x1b[2J such file", llama.llama_model_default_params())
if what == "handled":
    llama.llama_model_load_from_file(b"no such file", llama.llama_model_default_params())
    library.take_log_error()
if what in ("length", "terminate"):
    cpp = ctypes.CDLL("libstdc++.so.6")
    if what == "length":
        cpp._ZSt20__throw_length_errorPKc(b"too\\x1b[2J long")
    cpp._ZSt9terminatev()
if what in ("SIGBUS", "SIGFPE", "SIGILL", "SIGABRT"):
    os.kill(os.getpid(), getattr(signal, what))
if what == "thread":
    import threading
    thread = threading.Thread(target=ctypes.string_at, args=(8,))
    thread.start()
    thread.join()
if what == "stack":
    libc = ctypes.CDLL(None)
    values = (ctypes.c_int * 4)(3, 2, 1, 0)
    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    def again(a, b):
        libc.qsort(values, 4, 4, callback)
        return 0
    sys.setrecursionlimit(10**9)
    callback = kind(again)
    libc.qsort(values, 4, 4, callback)
if what == "two threads":
    import threading, time
    base = ctypes.CDLL(next(str(path) for path in library.library_folder().glob("*ggml-base.*")))
    abort = lambda: base.ggml_abort(b"ggml.c", 12, b"GGML_ASSERT(both) failed")
    first = threading.Thread(target=abort)
    first.start()
    def state():
        return open(f"/proc/self/task/{first.native_id}/stat").read().rpartition(")")[2].split()[0]
    while state() != "S":  # it waits for the one who reads stderr
        time.sleep(0.01)
    print("the second one", flush=True)
    abort()
ctypes.string_at(8)
"""


@pytest.mark.parametrize(
    ("what", "number", "says"),
    [
        ("assert", signal.SIGABRT, ": ggml.c:12: GGML_ASSERT(a?]0;t?; ??bbb"),
        ("null", signal.SIGSEGV, "(SIGSEGV, "),
        ("quiet", signal.SIGSEGV, "(SIGSEGV, "),
        ("thread", signal.SIGSEGV, "(SIGSEGV, "),
        ("words", signal.SIGSEGV, "; llama.cpp said: gguf_init_from_file: failed to open GGUF file 'no?[2J such file'"),
        ("SIGFPE", signal.SIGFPE, "(SIGFPE, "),
        ("SIGILL", signal.SIGILL, "(SIGILL, "),
        ("SIGABRT", signal.SIGABRT, "(SIGABRT)"),
        pytest.param("SIGBUS", getattr(signal, "SIGBUS", 0), "(SIGBUS, "),
    ],
)
def test_ways_to_end(what: str, number: int, says: str, tmp_path: Path) -> None:
    line = last_words(run(FORCED, what, tmp_path), number)
    assert says in line
    assert "somebody" not in line, "paths of the machine that compiled it"
    assert len(line) < 4_096


@pytest.mark.skipif(sys.platform != "linux", reason="names of libstdc++'s functions, of 64-bit Linux")
@pytest.mark.parametrize(
    ("what", "number", "says"),
    [
        ("length", signal.SIGABRT, ": too?[2J long; "),
        ("terminate", signal.SIGABRT, "an exception in C++ that nobody caught"),
        ("stack", signal.SIGSEGV, "(SIGSEGV, "),
    ],
)
def test_ways_of_cpp(what: str, number: int, says: str, tmp_path: Path) -> None:
    assert says in last_words(run(FORCED, what, tmp_path), number)


@pytest.mark.skipif(sys.platform != "linux", reason="states of threads in /proc")
def test_two_threads_that_fail_together() -> None:
    """The second one does not end the process before the first has said why."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))  # until it is full
    os.set_blocking(writing, True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", FORCED, "two threads", ""]
    with subprocess.Popen(command, env=env, stderr=writing, stdout=subprocess.PIPE) as process:
        os.close(writing)
        assert process.stdout is not None
        assert process.stdout.readline() == b"the second one\n"
        time.sleep(0.3)  # without the wait it has ended by now
        with open(reading, "rb") as stderr:
            text = stderr.read().strip(b"\0").decode()
    assert process.returncode == -signal.SIGABRT
    assert text.count("\n") == 1
    assert "GGML_ASSERT(both) failed" in text


def test_errors_that_were_handled_are_not_quoted(tmp_path: Path) -> None:
    assert "no such file" not in last_words(run(FORCED, "handled", tmp_path), signal.SIGSEGV)


def test_who_had_the_signal_before_has_it_after(tmp_path: Path) -> None:
    """Python's faulthandler still prints its traceback."""
    code = "import faulthandler; faulthandler.enable()\n" + FORCED
    done = run(code, "null", tmp_path)
    assert done.returncode == -signal.SIGSEGV
    assert done.stderr.startswith("error: ")
    assert "Fatal Python error: Segmentation fault" in done.stderr


def test_a_library_takes_no_signals(tmp_path: Path) -> None:
    """Only programs are told; whoever imports the package keeps the handlers of the process."""
    done = run(FORCED.replace("library.tell_of_crashes()\n", ""), "null", tmp_path)
    assert (done.returncode, done.stderr) == (-signal.SIGSEGV, "")
