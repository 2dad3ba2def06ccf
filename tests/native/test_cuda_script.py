"""tests/integration/cuda: what it says where it cannot run, and what goes into its kit."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.integration.cuda import kit
from tests.support.paths import ROOT

SCRIPT = ROOT / "tests" / "integration" / "cuda" / "run.sh"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a script of sh")


def run(folder: Path, *programs: str) -> subprocess.CompletedProcess[str]:
    """The script where there are these programs alone; those of CUDA are empty ones."""
    folder.mkdir()
    for name in ("dirname", "date", "sh", *programs):
        place = folder / name
        if name.startswith("nv"):
            place.write_text("#!/bin/sh\nexit 1\n")
            place.chmod(0o755)
        else:
            place.symlink_to(shutil.which(name) or "")
    environment = {"PATH": str(folder)}
    return subprocess.run(
        [str(folder / "sh"), str(SCRIPT)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("programs", "said"),
    [((), "error: no nvcc here"), (("nvcc",), "names no GPU"), (("nvcc", "nvidia-smi"), "names no GPU")],
)
def test_without_a_gpu(tmp_path: Path, programs: tuple[str, ...], said: str) -> None:
    done = run(tmp_path / "bin", *programs)
    assert done.returncode != 0
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_the_tree_of_the_kit(tmp_path: Path) -> None:
    """All that CUDA's build includes, and no other backend."""
    archive = tmp_path / "archive.tar.gz"
    names = {
        "CMakeLists.txt": True,
        "cmake/build-info.cmake": True,
        "ggml/CMakeLists.txt": True,
        "ggml/src/ggml.c": True,
        "ggml/src/ggml-cpu/ops.cpp": True,
        "ggml/src/ggml-cuda/template-instances/mmq.cu": True,
        "ggml/src/ggml-vulkan/ggml-vulkan.cpp": False,
        "src/llama-graph.cpp": True,
        "vendor/hash/hash.h": True,
        "tools/server/server.cpp": False,
        "tests/test-llama-archs.cpp": False,
    }
    with tarfile.open(archive, "w:gz") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(f"llama_cpp_python-1/vendor/llama.cpp/{name}"))
    kit.pack_tree(archive, tmp_path / "tree.tar.xz")
    with tarfile.open(tmp_path / "tree.tar.xz") as tar:
        assert sorted(tar.getnames()) == sorted(name for name, kept in names.items() if kept)
