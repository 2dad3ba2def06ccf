"""What the source distribution has, and that its tree can be prepared without a network."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.sdist import make_sdist, unpack

pytest.importorskip("scikit_build_core", reason="make test installs it")
pytest.importorskip("patch_ng", reason="make test installs it")


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    return unpack(make_sdist(tmp_path_factory.mktemp("sdist")), tmp_path_factory.mktemp("tree"))


def test_it_has_what_a_build_reads(tree: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    assert tree.name == f"steermoe_local-{version}"
    for folder in ("native", "steermoe_local", "expert_maps"):
        for path in (ROOT / folder).rglob("*"):
            name = path.relative_to(ROOT)
            if path.is_file() and "__pycache__" not in name.parts and "lib" not in name.parts:
                assert (tree / name).is_file(), f"{name} is left out"
                assert (tree / name).read_bytes() == path.read_bytes()
    for name in ("CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "Makefile", ".ci/run"):
        assert (tree / name).is_file()
    facts = (tree / "PKG-INFO").read_text("utf-8")
    assert f"\nVersion: {version}\n" in facts
    assert "\nRequires-Dist: llama-cpp-python==" in facts


def test_nothing_else_is_in_it(tree: Path) -> None:
    """No builds, environments, models of others, or files above a size."""
    names = {path.relative_to(tree).as_posix(): path.stat().st_size for path in tree.rglob("*") if path.is_file()}
    for name in names:
        parts = set(name.split("/"))
        assert not parts & {"build", "dist", ".venv", ".git", "__pycache__", "checkpoints"}, name
        assert not name.endswith((".so", ".dll", ".dylib", ".o", ".whl", ".pyc")), name
    models = [name for name in names if name.endswith(".gguf") and not name.startswith("tests/golden/")]
    assert models == ["steermoe_local/data/tiny-moe.gguf"]
    assert sum(names.values()) < 25e6


def test_the_tree_is_prepared_without_a_network(tree: Path, tmp_path: Path) -> None:
    """From the archive in the cache folder; where it is missing, one line names the cure."""
    cache = tmp_path / "cache"

    def prepare() -> subprocess.CompletedProcess[str]:
        blocked = {"STEERMOE_CACHE_DIR": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
        return subprocess.run(
            [sys.executable, "-P", "native/prepare_source.py", "--output", str(tmp_path / "llama.cpp")],
            cwd=tree,
            env=os.environ | blocked,
            capture_output=True,
            text=True,
            check=False,
        )

    done = prepare()
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: pip could not download llama-cpp-python")
    assert str(cache) in last
    pin = (tree / "steermoe_local" / "llama_cpp_pin.txt").read_text("utf-8")
    version, digest = pin.split()[0].partition("==")[2], pin.strip().rpartition(":")[2]
    kept = Path(os.environ.get("STEERMOE_CACHE_DIR") or cache_of_the_user()) / f"llama_cpp_python-{version}.tar.gz"
    if not kept.is_file():
        pytest.skip("the archive is not in the cache folder")
    assert hashlib.sha256(kept.read_bytes()).hexdigest() == digest
    (cache / kept.name).symlink_to(kept)
    done = prepare()
    assert done.returncode == 0, done.stderr
    assert "steermoe" in (tmp_path / "llama.cpp" / "src" / "llama-graph.cpp").read_text("utf-8"), "not patched"


def cache_of_the_user() -> Path:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import prepare_source; print(prepare_source.cache_folder())"
    command = [sys.executable, "-P", "-c", code, str(ROOT / "native")]
    return Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
