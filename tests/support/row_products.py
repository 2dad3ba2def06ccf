"""Products with many rows by libggml-cpu, ours and stock's: builds tests/native/row_products.cpp and runs it.

A library is one of tests/native/row_products.cmake, or an installed one.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from steermoe_local.llama.library import library_folder
from tests.support import native_programs
from tests.support.paths import ROOT

FOLDER = native_programs.BUILD / "rows"
PAIRS = {
    "native": ("native-ours", "native-stock"),
    "avx2": ("avx2-ours", "avx2-stock"),
    "vnni": ("vnni-ours", "avx2-stock"),
    "avx512": ("avx512-ours", "avx512-stock"),
    "off": ("off-ours", "avx2-stock"),
}
REPACKED = ("q4_0", "q4_K", "mxfp4", "iq4_nl")
# of these, experts alone are multiplied by our kernels
NOT_REPACKED = (
    "q8_0",
    "plain_q4_0",
    "q5_0",
    "q4_1",
    "q5_1",
    "f16",
    "bf16",
    "q6_K",
)
PRODUCTS = (
    *((op, name) for op in ("id", "mm") for name in REPACKED),
    *(("id", name) for name in NOT_REPACKED),
    ("mm", "q6_K"),  # by tiled/, of which a patch leaves out a step
)
ROUTINGS = ("even", "one", "all", "empty", "last", "twice")
ACTIVATIONS = ("normal", "outliers", "zeros", "tiny", "extreme", "overflow", "nan", "inf")
WEIGHTS = ("random", "extreme", "zero")
AVX2 = {"avx2", "fma", "f16c", "bmi2"}
AVX512 = {"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}
ENVIRONMENT = native_programs.SANITIZED | {
    "TSAN_OPTIONS": "halt_on_error=1",
    "GGML_NO_BACKTRACE": "1",
    "OMP_DYNAMIC": "false",
    "OMP_WAIT_POLICY": "passive",  # there are more threads than cores
}


@dataclass(frozen=True)
class Case:
    """A product; the fields are explained in row_products.cpp."""

    op: str
    type: str
    k: int
    m: int
    experts: int
    used: int
    tokens: int
    ne11: int
    pad: int
    threads: int
    routing: str
    activations: str
    weights: str
    seed: int

    def __str__(self) -> str:
        return " ".join(map(str, astuple(self)))


class Products(NamedTuple):
    """What the program says of a product's results."""

    hash: str
    n_hashed: int
    n_finite: int
    n_zero: int

    @classmethod
    def parse(cls, line: str) -> Products:
        """Of a line of the program's output."""
        digest, *numbers = line.split()
        return cls(digest, *map(int, numbers))


def cpu_flags() -> set[str]:
    """What this CPU can do, as Linux names it; nothing where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def block_size(name: str) -> int:
    """Values by whose multiples the columns of a type are tried."""
    return 256 if name in ("q4_K", "q6_K") else 32


def lacks(kernels: str = "avx2") -> str | None:
    """Why libraries of PAIRS do not run here; None where they do."""
    if sys.platform == "win32" or platform.machine().lower() not in ("x86_64", "amd64"):
        return "the kernels are for x86-64 and built with the options of GCC and clang"
    if missing := (AVX2 | (AVX512 if kernels == "avx512" else set())) - cpu_flags():
        return f"the CPU lacks {', '.join(sorted(missing))}"
    if not (native_programs.TREE / "ggml").exists():
        return "no prepared llama.cpp tree: make build"
    return None


def stock_tree() -> Path:
    """llama.cpp's tree without patches."""
    tree = FOLDER / "stock-tree"
    FOLDER.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, ROOT / "native" / "prepare_source.py", "--stock", "--output", tree]
    with FileLock(FOLDER / ".stock-tree.lock"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise native_programs.BuildError(done.stdout + done.stderr)
    return tree


def build_program() -> Path:
    """The program, for installed libraries."""
    native_programs.programs(FOLDER / "program", "row_products", STEERMOE_LIBS=library_folder())
    return FOLDER / "program" / "row_products"


def build(libraries: Iterable[str], sanitizers: str = "") -> Path:
    """The folder of the program and of `<library>.so`."""
    folder = FOLDER / (sanitizers.replace(",", "-") or "plain")
    variables = {
        "STEERMOE_LIBS": library_folder(),
        "STEERMOE_STOCK_TREE": stock_tree(),
        "STEERMOE_ROWS_SANITIZERS": sanitizers,
    }
    return native_programs.programs(folder, "row_products", *libraries, **variables)


def environment() -> dict[str, str]:
    """This process' environment, without limits on the threads of the program."""
    return {name: value for name, value in os.environ.items() if not name.startswith("OMP_")} | ENVIRONMENT


def run(program: Path, library: Path, cases: Sequence[object]) -> list[Products]:
    """The results of the cases, in a process of their own."""
    text = "".join(f"{case}\n" for case in cases)
    done = subprocess.run(
        [program, library], input=text, env=environment(), capture_output=True, text=True, errors="replace", check=False
    )
    lines = done.stdout.splitlines()
    at = cases[len(lines)] if len(lines) < len(cases) else "the end"
    assert done.returncode == 0, f"{library.name}: status {done.returncode} at: {at}\n{done.stderr[:6000]}"
    assert len(lines) == len(cases)
    return [Products.parse(line) for line in lines]


class Worker:
    """The program kept open: a case at a time."""

    def __init__(self, program: Path, library: Path) -> None:
        self.process = subprocess.Popen(
            [program, library], env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, case: object) -> Products:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"ended at: {case}"
        return Products.parse(line)

    def n_threads(self) -> int:
        """Threads that the process has now (Linux)."""
        return len(list(Path(f"/proc/{self.process.pid}/task").iterdir()))

    def close(self) -> None:
        self.process.communicate()
        assert self.process.returncode == 0
