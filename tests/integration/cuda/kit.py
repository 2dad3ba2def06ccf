"""Collect what run.sh needs on a machine without a network: the llama.cpp tree as far as CUDA needs it, and wheels.

    python -m tests.integration.cuda.kit FOLDER [--python 3.12]        (make cuda-kit)

Copy the source tree and FOLDER (build/cuda-kit) there; nvcc, a C++ compiler, CMake and Python are that machine's own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.scripts import load_script

KEPT = ("CMakeLists.txt", "LICENSE", "cmake/", "ggml/", "include/", "licenses/", "src/", "vendor/")
BACKENDS = ("ggml-cpu", "ggml-cuda")
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17, 12)] + ["manylinux2014_x86_64"]
TESTS = ["pytest>=8", "pytest-xdist>=3.6", "ninja", "diskcache", "typing-extensions"]


def is_kept(name: str) -> bool:
    """Is a file of the tree needed for the library with CUDA."""
    if name.startswith("ggml/src/ggml-") and name.count("/") > 2:
        return name.split("/")[2] in BACKENDS
    return name.startswith(KEPT)


def pack_tree(archive: Path, output: Path) -> None:
    """The unpatched tree of the pinned archive, without what is not needed."""
    source = load_script("native/prepare_source.py")
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "llama.cpp"
        source.unpack(archive, tree)
        with tarfile.open(output, "w:xz", preset=6) as tar:
            for path in sorted(tree.rglob("*")):
                name = path.relative_to(tree).as_posix()
                if path.is_file() and is_kept(name):
                    tar.add(path, name)


def wheels(archive: Path, output: Path, version: str) -> None:
    """Wheels of the package's dependencies and of the tests' own, for CPython of a version on x86-64 Linux."""
    others = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["scikit-build"]["metadata"][
        "dependencies"
    ]["others"]
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    where = [word for name in PLATFORMS for word in ("--platform", name)]
    where += ["--python-version", version, "--implementation", "cp", "--only-binary", ":all:"]
    subprocess.run([*pip, "download", "-d", str(output), *where, *others, *TESTS], check=True)
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(output), "patch-ng>=1.18"], check=True)
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(output), str(archive)],
        check=True,
        env=os.environ | {"CMAKE_ARGS": "-DLLAMA_BUILD=OFF"},
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="{}.{}".format(*sys.version_info), help="version on the other machine")
    arguments = parser.parse_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    folder: Path = arguments.folder / "wheels"
    folder.mkdir(parents=True)
    source = load_script("native/prepare_source.py")
    archive = source.fetch(source.cache_folder())
    pack_tree(archive, arguments.folder / "llama.cpp.tar.xz")
    wheels(archive, folder, arguments.python)
    size = sum(path.stat().st_size for path in arguments.folder.rglob("*") if path.is_file())
    print(f"{arguments.folder}: {size / 2**20:.0f} MiB, for Python {arguments.python}")


if __name__ == "__main__":
    main()
