"""A wheel built from the source distribution without a network: what is in it, and that it steers."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from tests.support.sdist import make_sdist

pytestmark = pytest.mark.sdist

NO_NETWORK = {"PIP_NO_INDEX": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as a user would: pip, an unpacked archive in the cache folder, no isolation, no index."""
    sdist = make_sdist(tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-P", "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-cache-dir"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | NO_NETWORK
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # cmake and ninja
    done = subprocess.run(
        [*command, "-w", str(folder), str(sdist)],
        env=environment | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    (built,) = folder.glob("*.whl")
    return built


def test_what_it_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
        (sbom,) = (name for name in names if name.endswith(".dist-info/sboms/steermoe-local.cdx.json"))
        assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(file.read(sbom).decode()) is None
        info = sbom.partition("/")[0]
        metadata = file.read(f"{info}/METADATA").decode()
    assert "\nLicense-File: LICENSE\n" in metadata
    licences = {name.rpartition("/")[2] for name in names if name.startswith(f"{info}/licenses/")}
    assert {"LICENSE", "LICENSE.llama.cpp", "LICENSE.ggml", "LICENSE.xxhash"} <= licences
    assert "steermoe_local/llama_cpp_pin.txt" in names
    assert any(name.startswith("steermoe_local/lib/libllama.") for name in names)
    assert any(name.startswith("steermoe_local/expert_maps/") for name in names)
    assert not any("__pycache__" in name for name in names)


def test_it_steers(wheel: Path, tmp_path: Path) -> None:
    """Its package and libraries, over the dependencies that are installed here."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    code = """
import sys
from pathlib import Path
import steermoe_local
assert Path(steermoe_local.__file__).is_relative_to(sys.argv.pop(1)), steermoe_local.__file__
from steermoe_local.cli import main
main(prog_name="steermoe")
"""
    answers = []
    environment = {key: value for key, value in os.environ.items() if not key.startswith("STEERMOE_")}
    for reverse in ((), ("--reverse",)):
        command = ["run", "-m", "tiny", "--map", "digits-words", "--temp", "0", "-t", "1", *reverse]
        command += ["-p", "Which number comes after three?"]
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(tmp_path / "site"), *command],
            env=environment | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout.strip())
    assert answers[0].isdigit()
    assert answers[1].isalpha()
