"""native/prepare_source.py: what stops the build, and what it says."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.scripts import load_script

SCRIPT = ROOT / "native" / "prepare_source.py"
GRAPH = "int before;\nint here;\nint after;\n"
PATCH = """\
--- a/src/llama-graph.cpp
+++ b/src/llama-graph.cpp
@@ -1,3 +1,4 @@
 int before;
 int here;
+int added;
 int after;
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module, with a pin, a patch and an archive of its own."""
    pytest.importorskip("patch_ng")
    module = load_script("native/prepare_source.py")

    cache = tmp_path / "cache"
    cache.mkdir()
    archive = cache / "llama_cpp_python-1.2.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in {
            "vendor/llama.cpp/src/llama-graph.cpp": GRAPH,
            "vendor/llama.cpp/docs/x.md": "not needed",
            "llama_cpp/llama.py": "not needed",
        }.items():
            info = tarfile.TarInfo(f"llama_cpp_python-1.2/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    pin = tmp_path / "pin.txt"
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    pin.write_text(f"llama-cpp-python==1.2 --hash=sha256:{digest}\n")
    patches = tmp_path / "patches"
    patches.mkdir()
    (patches / "0001-x.patch").write_text(PATCH)
    monkeypatch.setattr(module, "PIN_FILE", pin)
    monkeypatch.setattr(module, "PATCHES", patches)
    monkeypatch.setenv("STEERMOE_CACHE_DIR", str(cache))
    return module


def graph_of(tree: Path) -> str:
    return (tree / "src" / "llama-graph.cpp").read_text()


def run(script: Any, output: Path, source: Path | None = None, patched: bool = True) -> None:
    script.prepare(output, source, patched, script.cache_folder())


def test_patched_and_stock(script: Any, tmp_path: Path) -> None:
    run(script, tmp_path / "tree")
    assert graph_of(tmp_path / "tree") == GRAPH.replace("here;\n", "here;\nint added;\n")
    assert sorted(p.name for p in (tmp_path / "tree").iterdir()) == [".steermoe-prepared", "src"]
    run(script, tmp_path / "stock", patched=False)
    assert graph_of(tmp_path / "stock") == GRAPH


def test_the_second_run_does_nothing(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path / "tree"
    run(script, tree)
    assert "1 patch(es) applied" in capsys.readouterr().out
    (tree / "marker").touch()
    before = (tree / "src" / "llama-graph.cpp").stat().st_mtime_ns
    run(script, tree)
    assert capsys.readouterr().out == ""
    assert (tree / "marker").exists()
    assert (tree / "src" / "llama-graph.cpp").stat().st_mtime_ns == before
    # another patch, or none, is another tree
    (script.PATCHES / "0001-x.patch").write_text(PATCH.replace("added", "changed"))
    run(script, tree)
    assert "int changed;" in graph_of(tree)
    assert not (tree / "marker").exists()
    run(script, tree, patched=False)
    assert graph_of(tree) == GRAPH


def test_a_wrong_hash(script: Any, tmp_path: Path) -> None:
    archive = tmp_path / "cache" / "llama_cpp_python-1.2.tar.gz"
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(script.PrepareError, match=r"1\.2\.tar\.gz: its SHA-256 is [0-9a-f]{64}, pin\.txt"):
        run(script, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


@pytest.mark.parametrize(
    "patch", [PATCH.replace("int here", "int there"), PATCH.replace("llama-graph", "missing"), "x\n", ""]
)
def test_a_patch_that_does_not_apply(script: Any, tmp_path: Path, patch: str) -> None:
    run(script, tmp_path / "tree")
    (script.PATCHES / "0002-bad.patch").write_text(patch)
    with pytest.raises(script.PrepareError, match=r"0002-bad\.patch does not apply .*"):
        run(script, tmp_path / "tree")
    assert "int added;" in graph_of(tmp_path / "tree"), "the tree from before stays"


def test_a_tree_of_ones_own(script: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    (own / "src").mkdir(parents=True)
    with pytest.raises(script.PrepareError, match=r"own: not a llama\.cpp tree"):
        run(script, tmp_path / "tree", own)
    (own / "src" / "llama-graph.cpp").write_text(GRAPH)
    for name in ("cmake/build-info.cmake", "build/old.o", ".git/config", "docs/x.md", "models/m.gguf"):
        (own / name).parent.mkdir()
        (own / name).touch()
    run(script, tmp_path / "tree", own)
    assert "int added;" in graph_of(tmp_path / "tree")
    assert graph_of(own) == GRAPH, "the user's tree is patched"
    copied = {p.relative_to(tmp_path / "tree").as_posix() for p in (tmp_path / "tree").rglob("*") if p.is_file()}
    assert copied == {"src/llama-graph.cpp", "cmake/build-info.cmake", ".steermoe-prepared"}
    (own / "src" / "llama-graph.cpp").write_text("// edited\n" + GRAPH.replace("before", "earlier"))
    with pytest.raises(script.PrepareError, match="does not apply"):
        run(script, tmp_path / "tree", own)


def test_a_damaged_pin(script: Any, tmp_path: Path) -> None:
    script.PIN_FILE.write_text("llama-cpp-python>=1\n")
    with pytest.raises(script.PrepareError, match="expected one line"):
        run(script, tmp_path / "tree")


def test_an_archive_without_the_tree(script: Any, tmp_path: Path) -> None:
    archive = tmp_path / "cache" / "llama_cpp_python-1.2.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("llama_cpp_python-1.2/README"))
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    script.PIN_FILE.write_text(f"llama-cpp-python==1.2 --hash=sha256:{digest}\n")
    with pytest.raises(script.PrepareError, match=r"has no vendor/llama\.cpp/"):
        run(script, tmp_path / "tree")


def test_command_line(tmp_path: Path) -> None:
    def call(*args: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, check=False)

    done = call("--output", tmp_path / "tree", "--source", tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}: not a llama.cpp tree")
    assert "src/llama-graph.cpp" in done.stderr
    assert call().returncode == 2


def test_the_patches_are_small() -> None:
    added = [
        line
        for patch in sorted((ROOT / "native" / "patches").glob("*.patch"))
        for line in patch.read_text("utf-8").splitlines()
        if line.startswith("+") and not line.startswith("+++") and line.strip("+ ")
    ]
    assert 0 < len(added) < 120, f"{len(added)} added lines in upstream files"
