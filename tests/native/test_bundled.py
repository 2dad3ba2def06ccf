"""native/bundled.py: the SBOM of a wheel, and the licences of what is compiled into its libraries."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.support.paths import BUILD, ROOT
from tests.support.scripts import load_script

TREE = BUILD / "llama.cpp"
SCRIPT = ROOT / "native" / "bundled.py"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script("native/bundled.py")


@pytest.fixture
def tree(script: Any, tmp_path: Path) -> Path:
    """What the script reads of the tree."""
    tree = tmp_path / "tree"
    shutil.copytree(TREE / "vendor", tree / "vendor", ignore=shutil.ignore_patterns("*.hpp", "miniaudio.h"))
    for name in {part.text for part in script.PARTS} | {"CMakeLists.txt", "ggml/CMakeLists.txt"}:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TREE / name, tree / name)
    return tree


def test_it_is_valid_and_complete(script: Any, tmp_path: Path) -> None:
    script.write(TREE, tmp_path, ["ggml-cpu"])
    text = (tmp_path / "sboms" / "steermoe-local.cdx.json").read_text("utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    document = json.loads(text)
    by_name = {component["name"]: component for component in document["components"]}
    assert {"llama.cpp", "ggml", "xxHash", "sha1", "sha256", "rotate-bits", "llamafile sgemm"} < by_name.keys()
    for name in ("llama.cpp", "ggml", "xxHash"):
        assert re.fullmatch(r"\d+\.\d+\.\d+", by_name[name]["version"])
    assert {"name": "steermoe:backend", "value": "ggml-cpu"} in by_name["ggml"]["properties"]
    pin = (ROOT / "steermoe_local" / "llama_cpp_pin.txt").read_text("utf-8")
    (archive,) = (component for component in document["components"] if component["type"] == "file")
    assert archive["hashes"][0]["content"] in pin
    again = tmp_path / "again"
    script.write(TREE, again, ["ggml-cpu"])
    assert (again / "sboms" / "steermoe-local.cdx.json").read_text("utf-8") == text, "equal builds, equal files"


def test_every_part_has_its_licence(script: Any, tmp_path: Path) -> None:
    script.write(TREE, tmp_path, [])
    texts = {path.name: path.read_text("utf-8") for path in (tmp_path / "licenses").iterdir()}
    assert len(texts) == len(script.PARTS)
    for part in script.PARTS:
        text = texts["LICENSE." + re.sub(r"[^a-z0-9.]+", "-", part.name.lower())]
        sign = {"MIT": "Permission is hereby granted", "BSD-2-Clause": "Redistribution and use"}.get(part.license)
        assert (sign or "public domain").lower() in text.lower(), part.name
        assert not text.startswith(("//", "/*"))


def test_vendored_code_that_is_not_listed_stops_the_build(tree: Path, tmp_path: Path) -> None:
    def run() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(SCRIPT), "--tree", str(tree), "--output", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run().returncode == 0
    (tree / "vendor" / "hash" / "blake3").mkdir()
    (tree / "vendor" / "other").mkdir()
    done = run()
    assert done.returncode == 1
    assert done.stderr == "error: vendor/ of the tree has blake3, other; add it to native/bundled.py\n"


def test_a_licence_or_version_that_is_gone_stops_the_build(script: Any, tree: Path, tmp_path: Path) -> None:
    (tree / "vendor" / "hash" / "xxhash" / "LICENSE").unlink()
    with pytest.raises(script.BundleError, match="xxhash/LICENSE: the tree has no such file"):
        script.write(tree, tmp_path / "out", [])
    (tree / "ggml" / "CMakeLists.txt").write_text("project(ggml)\n")
    with pytest.raises(script.BundleError, match="has no GGML_VERSION_MAJOR"):
        script.write(tree, tmp_path / "out", [])
    (yarn,) = (part for part in script.PARTS if part.name == "YaRN")
    (tree / yarn.text).write_text("// another algorithm\n")
    with pytest.raises(script.BundleError, match=r"ops\.cpp: no longer says 'MIT licensed"):
        script.license_text(tree, yarn)


def test_the_licence_of_gnus_openmp(script: Any, tmp_path: Path) -> None:
    with pytest.raises(script.BundleError, match=r"no licence of libgomp on this system; looked for /usr/share/doc"):
        script.libgomp_license(tmp_path)
    for name in ("COPYING", "COPYING.RUNTIME"):
        (tmp_path / "usr/share/licenses/libgomp").mkdir(parents=True, exist_ok=True)
        (tmp_path / "usr/share/licenses/libgomp" / name).write_text(f"text of {name}\n")
    assert script.libgomp_license(tmp_path) == "text of COPYING\n\n\ntext of COPYING.RUNTIME\n"


def test_the_libraries_include_no_more(script: Any) -> None:
    """Of vendor/, the sources of libllama and ggml include what is listed alone."""
    vendored = re.compile(r'#include ["<](cpp-httplib|miniaudio|nlohmann|sheredom|stb|hash)/')
    used = set()
    for folder in ("src", "ggml/src/ggml-cpu", "ggml/src"):
        for path in (TREE / folder).glob("*.[ch]*"):
            used |= set(vendored.findall(path.read_text("utf-8")))
    assert used <= script.COMPILED.keys()


def test_code_of_others_inside_sources_is_listed(script: Any) -> None:
    """Sources of libllama and ggml that name a licence or an owner are those of PARTS."""
    other_backends = re.compile(r"ggml/(src/ggml-(?!cpu/)|src/ggml-cpu/kleidiai/|include/ggml-(cann|sycl)\.h)")
    names_one = re.compile(r"copyright|licen[sc]ed|\b(MIT|BSD|Apache).{0,5}licen[sc]e", re.IGNORECASE)
    found = set()
    for folder in ("src", "ggml/src", "include", "ggml/include"):
        for path in (TREE / folder).rglob("*.[ch]*"):
            name = path.relative_to(TREE).as_posix()
            if not other_backends.match(name) and names_one.search(path.read_text("utf-8")):
                found.add(name)
    listed = {part.text for part in script.PARTS if part.text.endswith(".cpp")}
    assert found == listed
