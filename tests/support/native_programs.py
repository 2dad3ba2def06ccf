"""Builds the C++ programs of tests/native and the files they run on.

`make fuzz` is `python -m tests.support.native_programs fuzz`; `make test-threads` runs
tests/native/test_native_threads.py over a build of `libraries`.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from steermoe_local import BiasFile, write_bias
from steermoe_local.identity import ModelIdentity
from steermoe_local.model_files.model_info import model_info
from tests.support import hostile
from tests.support.paths import ROOT
from tests.support.random_models import RandomModel, write_random_model

BUILD = ROOT / "build"
TREE = BUILD / "native" / "llama.cpp"
# a layer that cannot be steered, and routers whose logits and whose selection both are edited
FUZZ_MODEL = RandomModel("dots1", n_dense=1, gating=2, selection_bias=True)
SANITIZED = {
    "ASAN_OPTIONS": "abort_on_error=0:exitcode=99:allocator_may_return_null=1:detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98",
}
REPORTS = ("Sanitizer", "runtime error", "fault: ")


class BuildError(Exception):
    """A program is missing, or does not build."""


def find(name: str) -> str:
    """cmake or ninja of the virtual environment, else of the system."""
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise BuildError(f"no {name}")
    return found


def cmake(source: Path, folder: Path, targets: Sequence[str], variables: Mapping[str, Any]) -> None:
    """Configure and build; quick when nothing changed."""
    configure = [
        find("cmake"),
        "-S",
        str(source),
        "-B",
        str(folder),
        "-G",
        "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find('ninja')}",
    ]
    configure += [f"-D{name}={value}" for name, value in variables.items()]
    build = [find("cmake"), "--build", str(folder), "--target", *targets]
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # tests run in several processes
        for command in (configure, build):
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode != 0:
                raise BuildError(done.stdout[-3000:] + done.stderr[-3000:])


def programs(folder: Path, *targets: str, **variables: Any) -> Path:
    """Build programs of tests/native in `folder`."""
    cmake(ROOT / "tests" / "native", folder, targets, {"STEERMOE_TREE": TREE} | variables)
    return folder


def libraries(folder: Path, sanitizers: str, **variables: Any) -> Path:
    """Build libllama and the CPU backend with sanitizers; minutes the first time. Returns their folder."""
    flags = f"-O1 -g1 -fno-omit-frame-pointer {sanitizers}"
    # without OpenMP, whose threads ThreadSanitizer does not understand, and without what only costs time to compile
    options = dict.fromkeys(("GGML_NATIVE", "GGML_OPENMP", "GGML_LLAMAFILE", "GGML_CPU_REPACK"), "OFF")
    options |= {"CMAKE_BUILD_TYPE": "None", "CMAKE_C_FLAGS": flags, "CMAKE_CXX_FLAGS": flags}
    options["Python3_EXECUTABLE"] = sys.executable
    cmake(ROOT, folder, ["steermoe_libs"], options | variables)
    return folder / "bin"


def run(program: Path, *arguments: Any, env: Mapping[str, Any] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program with the sanitizers' options."""
    environment = os.environ | SANITIZED | {name: str(value) for name, value in (env or {}).items()}
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", check=False)


def outcomes(output: str) -> dict[str, int]:
    """Outcomes of a fuzz target's inputs: {outcome: count}."""
    words = re.findall(r"^outcomes: (.*)$", output, re.MULTILINE)[-1].split()
    return dict(zip(words[::2], map(int, words[1::2]), strict=True))


def executions(output: str) -> int:
    """How many inputs a fuzz target was run on."""
    return int(re.findall(r"^Done (\d+) runs in ", output, re.MULTILINE)[-1])


def reader_seeds(folder: Path) -> Path:
    """Valid files, and those that are wrong in one way: what lies between them is near."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for table in (hostile.LEGAL, hostile.LENIENT, hostile.FORGED):
            for name, data in hostile.forge(Path(scratch), table).items():
                (folder / f"{name}.gguf").write_bytes(data)
    for name, data in hostile.RAW.items():
        (folder / f"raw-{name}.gguf").write_bytes(data)
    for name in ("hard", "soft", "empty", "capped"):
        shutil.copy(hostile.GOLDEN / f"{name}.gguf", folder)
    return folder


def attach_seeds(folder: Path, model: Path) -> Path:
    """Bias files for the model: every kind that can be attached, and some that cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = model_info(model).require_moe()
    hard = np.zeros(identity.shape, np.float32)
    hard[-1, 0], hard[-1, 1] = -1, 1
    wide = hard.copy()
    wide[1:, 2 : 2 + identity.n_expert_used] = 1
    wide[1:, 1] = 0
    soft = np.linspace(-3, 3, identity.shape[1], dtype=np.float32)
    layers = {layer: soft * layer for layer in range(1, identity.n_layer)}
    dense = np.zeros(identity.shape, np.float32)
    dense[0, 0] = 1
    other = ModelIdentity(**(vars(identity) | {"router_sha256": "0" * 64}))
    files = {
        "hard": BiasFile.from_signs(hard, identity),
        "wide": BiasFile.from_signs(wide, identity),
        "soft": BiasFile(identity, "soft", layers),
        "capped": BiasFile.from_capped(hard, identity, 1.5),
        "capped-infinite": BiasFile.from_capped(wide, identity, float("inf")),
        "capped-by-0": BiasFile.from_capped(hard, identity, 0),
        "nothing": BiasFile.from_signs(0 * hard, identity),
        "layer-0": BiasFile.from_signs(dense, identity),
        "other-router": BiasFile.from_signs(hard, other),
    }
    for name, bias in files.items():
        write_bias(bias, folder / f"{name}.gguf")
    return folder


def stress_files(folder: Path, model: Path) -> Path:
    """The bias files of stress_threads.cpp (make_bias), written by Python."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = model_info(model).require_moe()
    n_layer, n_expert = identity.shape
    for kind in range(4):
        plus, minus = (1.5, -2.5) if kind == 3 else (1, -1)
        values = {}
        for layer in range(n_layer - 1 if kind < 2 else 0, n_layer):
            row = np.zeros(n_expert, np.float32)
            row[(layer + kind) % n_expert], row[(layer + kind + 1) % n_expert] = plus, minus
            values[layer] = row
        write_bias(BiasFile(identity, "soft" if kind == 3 else "hard", values), folder / f"bias-{kind}.gguf")
    return folder


def libfuzzer() -> dict[str, str]:
    """CMake variables of a clang that has libFuzzer, {} if there is none. CC and CXX may name one."""
    versions = ["", *(f"-{version}" for version in range(22, 13, -1))]
    named = [(os.environ.get("CC", ""), os.environ.get("CXX", ""))]
    for cc, cxx in named + [(f"clang{version}", f"clang++{version}") for version in versions]:
        if "clang" not in cxx or not shutil.which(cc) or not shutil.which(cxx):
            continue
        source = 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char *, unsigned long) { return 0; }'
        command = [cxx, "-fsanitize=fuzzer,address", "-x", "c++", "-", "-o", os.devnull]
        if subprocess.run(command, input=source, capture_output=True, text=True, check=False).returncode == 0:
            return {"CMAKE_C_COMPILER": cc, "CMAKE_CXX_COMPILER": cxx}
    return {}


def fuzz(n_runs: int, seed: int) -> int:
    """Both targets, sanitized through and through. Returns how many have a finding."""
    clang = libfuzzer()
    print("== coverage-guided, by libFuzzer" if clang else "== by our own driver: no clang with libFuzzer", flush=True)
    folder = BUILD / ("fuzz" if clang else "fuzz-gcc")
    folder.mkdir(parents=True, exist_ok=True)
    print("== building the sanitized libraries (minutes the first time)", flush=True)
    # Left out is what ggml does by design: it reads a type number into an enum before it checks it, and calls functions
    # through pointers of another type. vptr wants type information that programs and libraries do not share.
    sanitizers = "-fsanitize=address,undefined -fno-sanitize=vptr,enum"
    if clang:
        # coverage of our sources and of the GGUF reader only: counters of all of llama.cpp make a run ten times longer
        covered = folder / "covered.txt"
        covered.write_text("src:*/native/src/*\nsrc:*/gguf.cpp\nfun:*\n", encoding="utf-8")
        sanitizers += f",function -fsanitize=fuzzer-no-link -fsanitize-coverage-allowlist={covered}"
    libs = libraries(folder / "libs", sanitizers, **clang)
    options: dict[str, Any] = {"STEERMOE_LIBS": libs, "STEERMOE_LIBFUZZER": "ON" if clang else "OFF"} | clang
    built = programs(folder / "programs", "fuzz_bias", "fuzz_attach", **options)
    model = write_random_model(folder / "model.gguf", FUZZ_MODEL)
    seeds = {"fuzz_bias": reader_seeds(folder / "seeds"), "fuzz_attach": attach_seeds(folder / "seeds-attach", model)}
    n_faults = 0
    for name, start in seeds.items():
        corpus = folder / f"corpus-{name}"
        shutil.rmtree(corpus, ignore_errors=True)
        corpus.mkdir()
        folders = [corpus, start] if clang else [start]
        print(f"== {name}: {n_runs:,} executions", flush=True)
        begin = time.monotonic()
        # inputs past some KiB only take time
        limits = [f"-runs={n_runs}", f"-seed={seed}", "-max_len=8192", f"-artifact_prefix={folder}/{name}-"]
        if clang:
            # leaks are looked for when the program ends, not after each run
            limits += [
                "-print_final_stats=1",
                "-mutate_depth=2",
                "-rss_limit_mb=4096",
                "-timeout=60",
                "-detect_leaks=0",
            ]
        done = run(built / name, *limits, *folders, env={"STEERMOE_FUZZ_MODEL": model})
        output = done.stdout + done.stderr
        (folder / f"{name}.log").write_text(output, encoding="utf-8")
        if done.returncode != 0 or any(words in output for words in REPORTS):
            n_faults += 1
            print(output[-4000:])
            print(f"== {name}: FINDING, see {folder}/{name}.log")
            continue
        edges = re.findall(r"\bcov: (\d+)", output)
        print(
            f"== {name}: {executions(output):,} executions in {time.monotonic() - begin:.0f} s, no finding; "
            f"{'edges ' + edges[-1] + ', ' if edges else ''}"
            + ", ".join(f"{outcome} {n:,}" for outcome, n in outcomes(output).items()),
            flush=True,
        )
    return n_faults


def main() -> int:
    """`fuzz [--runs N] [--seed S]`, or `tsan`, which builds the libraries of make test-threads."""
    parser = argparse.ArgumentParser(description="fuzz the bias reader and the attach call")
    parser.add_argument("what", choices=["fuzz", "tsan"])
    parser.add_argument("--runs", type=int, default=1_000_000, help="executions of each target")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    try:
        if arguments.what == "tsan":
            print(libraries(BUILD / "tsan", "-fsanitize=thread"))
            return 0
        return 1 if fuzz(arguments.runs, arguments.seed) else 0
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
