"""The numeric tests on ggml's CPU kernels for other instruction sets (make test-isa).

ggml computes the same products by other kernels on other CPUs: in other orders, in tiles of other sizes, with or
without fused multiply-add and F16 conversions. Only libggml-cpu depends on them: it alone is built for each set, and
put beside copies of the other libraries in build/isa/<set>/lib/.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent
TWO_PROCESSES = ("-n", "2", "--dist", "loadfile")

_OPTIONS = ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2", "AVX512")


@dataclass(frozen=True)
class InstructionSet:
    """Options of ggml, and the CPU's flags in /proc/cpuinfo without which the build does not run."""

    name: str
    options: tuple[str, ...]
    flags: tuple[str, ...]


SETS = (
    InstructionSet("sse4.2", _OPTIONS[:1], ("sse4_2",)),
    InstructionSet("avx2", _OPTIONS[:6], ("sse4_2", "avx2", "fma", "f16c", "bmi2")),
    InstructionSet("avx512", _OPTIONS, ("avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw")),
)


def cpu_flags() -> set[str]:
    """What this CPU can do, as Linux names it; nothing where that cannot be read."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def build(isa: InstructionSet) -> Path:
    """Build libggml-cpu for the set; the folder of libraries to test."""
    folder = ROOT / "build" / "isa" / isa.name
    libraries = folder / "lib"
    on = {name: "ON" if name in isa.options else "OFF" for name in _OPTIONS}
    configure = [
        *(PROGRAMS / "cmake", "-S", ROOT, "-B", folder / "build", "-G", "Ninja"),
        *(f"-DCMAKE_MAKE_PROGRAM={PROGRAMS / 'ninja'}", f"-DPython3_EXECUTABLE={sys.executable}"),
        *("-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON", "-DGGML_NATIVE=OFF"),
        *(f"-DGGML_{name}={value}" for name, value in on.items()),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "build.log").open("w") as log:
        for command in (
            configure,
            [PROGRAMS / "cmake", "--build", folder / "build", "--target", "ggml-cpu"],
        ):
            log.flush()
            if subprocess.run([str(part) for part in command], stdout=log, stderr=log, check=False).returncode:
                sys.exit(f"{(folder / 'build.log').read_text()[-4000:]}\nerror: {isa.name} could not be built")
    shutil.rmtree(libraries, ignore_errors=True)
    shutil.copytree(Path(str(distribution("steermoe-local").locate_file("steermoe_local/lib"))), libraries)
    shutil.copy2(folder / "build" / "bin" / "libggml-cpu.so", libraries)
    return libraries


def features(env: dict[str, str]) -> set[str]:
    """What the library that is loaded was built for, by its own account."""
    code = "from steermoe_local.llama import capi; print(capi.llama_cpp().llama_print_system_info().decode())"
    done = subprocess.run([sys.executable, "-P", "-c", code], env=env, capture_output=True, text=True, check=True)
    facts = (fact.split("=") for fact in done.stdout.replace("CPU :", "").split("|") if "=" in fact)
    return {name.strip() for name, value in facts if value.strip() == "1"}


def main(arguments: list[str]) -> int:
    """Build and test every set that this CPU can run, but the best one: the native build has at least its kernels.

    `--all` takes the best one, too. Further arguments are pytest's.
    """
    flags = cpu_flags() if platform.machine() in ("x86_64", "AMD64") else set()
    runnable = [isa for isa in SETS if flags.issuperset(isa.flags)]
    for isa in SETS:
        if isa not in runnable:
            print(f"== {isa.name}: LEFT OUT, this CPU cannot run it", flush=True)
    if "--all" not in arguments and runnable:
        print(f"== {runnable[-1].name}: left to the native build (make test); --all builds it", flush=True)
        runnable.pop()
    failed = []
    for isa in runnable:
        print(f"== {isa.name}: building libggml-cpu", flush=True)
        env = os.environ | {"STEERMOE_LIB_PATH": str(build(isa)), "STEERMOE_REQUIRE_TOOLS": "1"}
        loaded = features(env)
        for name in ("AVX", "AVX2", "FMA", "F16C", "AVX512"):
            assert (name in loaded) == (name in isa.options), f"{isa.name}: the loaded library says {sorted(loaded)}"
        options = [argument for argument in arguments if argument != "--all"]
        command = [str(PROGRAMS / "pytest"), "-q", "-p", "no:cacheprovider", *TWO_PROCESSES, "-m", "numeric", *options]
        if subprocess.run(command, cwd=ROOT, env=env, check=False).returncode:
            failed.append(isa.name)
    if failed:
        print(f"error: numeric tests failed on {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
