"""The bias reader under AddressSanitizer and UBSan, over the whole hostile corpus."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import hostile
from tests.support.paths import BUILD, ROOT

ASAN = ROOT / "build" / "asan"


def program(name: str) -> str:
    """cmake or ninja of the virtual environment, else of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}")
    return found


@pytest.fixture(scope="module")
def load_bias() -> Path:
    """The instrumented program; built on first use and kept in build/asan."""
    tree = BUILD / "llama.cpp"
    if not (tree / "ggml" / "src" / "gguf.cpp").exists():
        pytest.skip("no prepared llama.cpp tree: make build")
    if sys.platform == "win32":
        pytest.skip("the compilers of this platform have other sanitizers")
    cmake = program("cmake")
    configure = [cmake, "-S", ROOT / "tests" / "native", "-B", ASAN, "-G", "Ninja"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={program('ninja')}", f"-DSTEERMOE_TREE={tree}"]
    for command in (configure, [cmake, "--build", ASAN]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return ASAN / "load_bias"


def run(program: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    options = {
        "ASAN_OPTIONS": "abort_on_error=0:exitcode=99:allocator_may_return_null=1:detect_leaks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
    }
    command = [str(program), str(folder)]
    return subprocess.run(
        command, env=os.environ | options, capture_output=True, text=True, errors="replace", check=False
    )


def test_no_sanitizer_report(load_bias: Path, tmp_path: Path) -> None:
    folder, scratch = tmp_path / "corpus", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()
    files = hostile.corpus(scratch, n_flips=600)
    for name, data in files.items():
        (folder / f"{name}.gguf").write_bytes(data)
    done = run(load_bias, folder)
    for words in ("AddressSanitizer", "LeakSanitizer", "runtime error"):
        assert words not in done.stderr, done.stderr[:4000]
    assert done.returncode == 0, done.stderr[-2000:]
    statuses = dict(line.split(" ", 2)[:2] for line in done.stdout.splitlines())
    assert set(statuses) == {f"{name}.gguf" for name in files}
    for name in hostile.LEGAL:
        assert statuses[f"legal-{name}.gguf"] == "0", name
    for name in hostile.FORGED:
        assert statuses[f"forged-{name}.gguf"] == "2", name
    for line in done.stdout.splitlines():
        name, status, message = line.split(" ", 2)
        assert status in ("0", "2"), line
        assert (status == "0") == (message == ""), line
        assert status == "0" or message.startswith(str(folder / name)), line


def test_the_sanitizer_is_on(load_bias: Path) -> None:
    """An empty report means nothing from a program without instruments."""
    symbols = (load_bias).read_bytes()
    assert b"__asan_report_load" in symbols
    assert b"__ubsan_handle" in symbols
