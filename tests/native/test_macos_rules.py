"""What CMake would do on macOS, read from the rules that it generates for it; none of them was built or run there."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.native_programs import BuildError, find
from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="stands in for macOS where there is none")
TOOLCHAIN = ROOT / "tests" / "support" / "macos_toolchain.cmake"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The patched llama.cpp tree, of this source: that of the build may be older."""
    folder = tmp_path_factory.mktemp("tree") / "llama.cpp"
    command = [sys.executable, str(ROOT / "native" / "prepare_source.py"), "--output", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no llama.cpp tree can be prepared: {done.stderr[-300:]}")
    return folder


def configure(folder: Path, tree: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Configure for macOS."""
    cc, cxx = shutil.which("cc"), shutil.which("c++")
    if cc is None or cxx is None:
        pytest.skip("no compiler")
    try:
        cmake, ninja = find("cmake"), find("ninja")
    except BuildError as error:
        pytest.skip(str(error))
    folder.mkdir()
    (folder / "llama.cpp").symlink_to(tree)
    command = [cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    command += [f"-DCMAKE_TOOLCHAIN_FILE={TOOLCHAIN}", f"-DSTEERMOE_CC={cc}", f"-DSTEERMOE_CXX={cxx}"]
    command += [f"-DPython3_EXECUTABLE={sys.executable}", "-DGGML_OPENMP=OFF", "-DGGML_BLAS=OFF", *options]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


@pytest.fixture(scope="module")
def configured(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("macos") / "build"
    done = configure(folder, tree, "-DCMAKE_OSX_DEPLOYMENT_TARGET=11.0", "-DCMAKE_OSX_ARCHITECTURES=arm64")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def links(configured: Path) -> dict[str, str]:
    """The rule that links each shared library that is installed, by its file's name."""
    rules = (configured / "build.ninja").read_text("utf-8")
    found = re.findall(r"^build bin/(\S+\.dylib): \S+SHARED_LIBRARY_LINKER\S+ .*\n((?:  .*\n)+)", rules, re.MULTILINE)
    return dict(found)


def test_libraries_find_each_other(links: dict[str, str]) -> None:
    """Beside themselves alone, wherever they lie, under names without versions (a wheel has no links)."""
    ours = ["libggml-base.dylib", "libggml-cpu.dylib", "libggml-metal.dylib", "libggml.dylib", "libllama.dylib"]
    assert set(ours) <= set(links), sorted(links)
    for name in ours:
        assert re.findall(r"-rpath,(\S+)", links[name]) == ["@loader_path"], name
        assert "INSTALLNAME_DIR = @rpath/" in links[name], name
        assert f"SONAME = {name}" in links[name], name
        assert "$ORIGIN" not in links[name], name


def test_each_is_for_one_architecture_and_the_wanted_macos(configured: Path, links: dict[str, str]) -> None:
    commands = json.loads((configured / "compile_commands.json").read_text("utf-8"))
    assert len(commands) > 50
    for words in [*(c["command"] for c in commands if c["file"].endswith((".c", ".cpp"))), *links.values()]:
        assert re.findall(r"-arch (\S+)", words)[:1] == ["arm64"], words
        assert set(re.findall(r"-mmacosx-version-min=(\S+)", words)) == {"11.0"}, words


def test_metal_s_shaders_are_in_the_library(configured: Path) -> None:
    commands = json.loads((configured / "compile_commands.json").read_text("utf-8"))
    metal = [c["command"] for c in commands if "/ggml-metal/" in c["file"] and c["file"].endswith((".cpp", ".m"))]
    assert metal
    assert all("-DGGML_METAL_EMBED_LIBRARY" in command for command in metal)
    assert "default.metallib" not in (configured / "cmake_install.cmake").read_text("utf-8")


def test_our_sources_are_in_the_libraries(configured: Path) -> None:
    commands = json.loads((configured / "compile_commands.json").read_text("utf-8"))
    for folder in ("src", "src/ggml"):
        ours = {path.name for path in (ROOT / "native" / folder).glob("*.cpp")}
        assert {Path(c["file"]).name for c in commands if Path(c["file"]).parent == ROOT / "native" / folder} == ours


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("-DCMAKE_OSX_ARCHITECTURES=arm64;x86_64", "build for each on its own"),
        ("-DCMAKE_OSX_DEPLOYMENT_TARGET=10.13", "needs macOS 10.15 or newer"),
    ],
)
def test_what_cannot_be_built_is_refused(tree: Path, tmp_path: Path, option: str, words: str) -> None:
    done = configure(tmp_path / "build", tree, option)
    assert done.returncode != 0
    assert words in " ".join(done.stderr.split())
