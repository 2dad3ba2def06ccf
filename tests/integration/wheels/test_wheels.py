"""The installed wheels compute what the native build does, by every kernel that this CPU can run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steermoe_local.llama.library import pinned_version
from steermoe_local.model_files.model_info import model_info
from tests.integration.reference.native import data_file
from tests.integration.wheels.driver import signs
from tests.support import rounding
from tests.support.paths import ROOT
from tests.support.planted import plant, traces
from tests.support.wheel_install import PROGRAM, PYTHON, WHEELS, bare_environment, installed, libraries_of, variants

pytestmark = pytest.mark.wheels

DRIVER = Path(__file__).with_name("driver.py")
NATIVE = "native"
HERE = sorted(name for name, runs in variants().items() if runs) if PYTHON.exists() else []

Found = tuple[dict[str, np.ndarray], dict[str, Any]]


def run_driver(python: Path, output: Path, cwd: Path, environment: dict[str, str]) -> Found:
    command = [str(python), "-P", str(DRIVER), str(output)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(output, allow_pickle=False) as file:
        return dict(file), json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """What driver.py finds with a variant forced, with the wheel's own choice (""), or with the native build."""
    folder = tmp_path_factory.mktemp("found")

    @cache
    def find(variant: str) -> Found:
        output = folder / f"{variant}.npz"
        if variant == NATIVE:
            return run_driver(Path(sys.executable), output, folder, dict(os.environ))
        forced = {"STEERMOE_LIB_PATH": str(libraries_of(variant))} if variant else {}
        return run_driver(PYTHON, output, folder, bare_environment() | forced)

    return find


def variant_of(facts: dict[str, Any]) -> str:
    (library,) = (name for name in facts["loaded"] if "libggml-cpu" in name)
    return Path(library).stem.removeprefix("libggml-cpu-")


def test_the_wheels_are_portable() -> None:
    # that for 64-bit ARM may lie beside them, as those of the dependencies do
    own = [path.name for name in ("llama_cpp_python", "steermoe_local") for path in WHEELS.glob(f"{name}-*.whl")]
    names = sorted(name for name in own if not name.endswith("aarch64.whl"))
    assert len(names) == 2
    assert names[0] == f"llama_cpp_python-{pinned_version()}-py3-none-any.whl"
    assert re.fullmatch(r"steermoe_local-[0-9.]+-py3-none-manylinux_2_(\d+)_x86_64\.whl", names[1])
    members = zipfile.ZipFile(WHEELS / names[1]).namelist()
    assert sum(name.startswith("steermoe_local/lib/libggml-cpu-") for name in members) == len(variants())
    assert not any(name.endswith((".pyc", ".a", ".o")) for name in members)


def test_the_wheel_says_what_it_bundles() -> None:
    """An SBOM of ours, auditwheel's of what it copied, and a licence for each (docs/releasing.md)."""
    (wheel,) = WHEELS.glob("steermoe_local-*x86_64.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name.partition(".dist-info/")[2]: name for name in file.namelist() if ".dist-info/" in name}
        ours, auditwheels = (
            json.loads(file.read(names[f"sboms/{name}.cdx.json"])) for name in ("steermoe-local", "auditwheel")
        )
    (ggml,) = (part for part in ours["components"] if part["name"] == "ggml")
    kernels = {entry["value"] for entry in ggml["properties"] if entry["value"].startswith("ggml-cpu-")}
    assert kernels == {f"ggml-cpu-{name}" for name in variants()}
    assert any("libgomp" in part["name"] for part in auditwheels["components"])
    assert {"licenses/LICENSE.llama.cpp", "licenses/LICENSE.libgomp"} <= names.keys()


def test_libraries_are_found_by_their_own_folder_alone() -> None:
    """No entry of a search path but those that begin at the library itself."""
    libraries = [*(installed() / "lib").glob("*.so"), *installed().with_name("steermoe_local.libs").glob("*.so*")]
    assert len(libraries) > len(variants())
    for library in libraries:
        shown = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout
        for path in re.findall(r"R(?:UN)?PATH\).*\[(.*)\]", shown):
            assert all(re.fullmatch(r"\$ORIGIN(/\.\./\.\./steermoe_local\.libs)?/?", part) for part in path.split(":"))


def test_demo_with_an_empty_path(tmp_path: Path) -> None:
    done = subprocess.run(
        [PROGRAM, "demo"], cwd=tmp_path, env=bare_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "digits" in done.stdout


def test_the_best_variant_is_chosen(found: Callable[[str], Found]) -> None:
    """By the score that ggml gives them: it has every feature of the others that run here."""
    _, facts = found("")
    assert variant_of(facts) in HERE
    assert Path(facts["package"]).is_relative_to(installed())
    assert all(Path(library).is_relative_to(installed().parent) for library in facts["loaded"])
    lacking = [kind for kind in HERE if not set(facts["features"]) >= set(found(kind)[1]["features"])]
    # alderlake has AVX-VNNI, and kinds with AVX-512 before sapphirerapids have not
    assert not lacking or lacking == ["alderlake"] or variant_of(facts) == "alderlake", lacking


@pytest.mark.parametrize("variant", HERE)
def test_a_variant_computes_what_the_native_build_does(variant: str, found: Callable[[str], Found]) -> None:
    """Other kernels add the same products in another order: rounding.py says how far that may go."""
    (ours, facts), (native, _) = found(variant), found(NATIVE)
    assert variant_of(facts) == variant
    for steering in ("unsteered", "steered"):
        logits = native[f"logits, {steering}"]
        assert np.isfinite(ours[f"logits, {steering}"]).all()
        assert np.abs(ours[f"logits, {steering}"] - logits).max() <= rounding.logits(logits, **rounding.TINY)
        assert ours[f"answers, {steering}"].tolist() == native[f"answers, {steering}"].tolist()
    assert ours["answers, steered"].tolist() != ours["answers, unsteered"].tolist()


@pytest.mark.parametrize("variant", HERE)
def test_a_variant_keeps_the_promises_of_steering(variant: str, found: Callable[[str], Found]) -> None:
    """Every token selects what is promoted and nothing that is suppressed; an empty bias changes no bit."""
    ours, _ = found(variant)
    assert ours["logits, empty"].tobytes() == ours["logits, unsteered"].tobytes()
    assert ours["logits, steered"].tobytes() != ours["logits, unsteered"].tobytes()
    values = signs(model_info(data_file("tiny-moe.gguf")).require_moe().shape)
    for layer, chosen in enumerate(ours["selected, steered"]):
        assert (chosen == values[layer].argmax()).any(axis=-1).all()
        assert not (chosen == values[layer].argmin()).any()


@pytest.mark.parametrize("variant", HERE)
def test_a_variant_computes_what_transformers_did(variant: str) -> None:
    """tests/native/test_recorded_reference.py, on these kernels."""
    reference = "tests/native/test_recorded_reference.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", reference]
    environment = os.environ | {"STEERMOE_LIB_PATH": str(libraries_of(variant))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]


def test_planted_libraries_stay_unused(tmp_path: Path) -> None:
    """In a folder of files named like the wheel's libraries, the one for a better CPU and the renamed libgomp."""
    bundled = [path.name for path in installed().with_name("steermoe_local.libs").iterdir()]
    own = [path.name for path in (installed() / "lib").iterdir()]
    folder = plant(tmp_path / "current", libraries=(*own, *bundled, "libggml-cpu-planted.so", "libgomp.so.1"))
    run_driver(PYTHON, tmp_path / "found.npz", folder, bare_environment())
    assert traces(tmp_path) == []
