"""Installs the wheels of `make dist` as a machine without a compiler, CMake and network does.

    python -m tests.support.wheel_install

The wheels of what tests need are fetched before, into build/dist/others/; the virtual environment is build/dist/venv/.
Beside it are folders of the wheel's libraries with one of the CPU variants in each.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from tests.support.paths import ROOT

WHEELS = ROOT / "dist"
FOLDER = ROOT / "build" / "dist"
OTHERS = FOLDER / "others"
PYTHON = FOLDER / "venv" / "bin" / "python"
PROGRAM = PYTHON.with_name("steermoe")
_VARIANTS = FOLDER / "variants"
_SCORE = "import ctypes, sys; print(ctypes.CDLL(sys.argv[1]).ggml_backend_score())"


def bare_environment() -> dict[str, str]:
    """An environment without a PATH, and without what would change pip, Python or the library."""
    kept = ("HOME", "LANG", "LC_ALL", "TMPDIR")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"PATH": ""}


def _pip(*arguments: object, python: Path = Path(sys.executable), env: dict[str, str] | None = None) -> None:
    command = [python, "-P", "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    if subprocess.run([str(part) for part in command], env=env, check=False).returncode:
        sys.exit(f"error: pip {' '.join(map(str, arguments))} failed")


def install() -> None:
    """Fetch what tests need, make the environment anew, install from dist/ without an index, then add the tests'."""
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]["test"]
    shutil.rmtree(OTHERS, ignore_errors=True)
    shutil.rmtree(PYTHON.parent.parent, ignore_errors=True)
    _pip("download", "--only-binary", ":all:", "--dest", OTHERS, *tests)
    venv.create(PYTHON.parent.parent, with_pip=True)
    offline = ("install", "--no-index", "--find-links", WHEELS)
    _pip(*offline, "steermoe-local", python=PYTHON, env=bare_environment())
    _pip("check", python=PYTHON, env=bare_environment())
    _pip(*offline, "--find-links", OTHERS, *tests, python=PYTHON, env=bare_environment())
    shutil.rmtree(_VARIANTS, ignore_errors=True)
    for variant in variants():
        _put_together(variant)


def installed() -> Path:
    """The package's folder in the environment."""
    return next((PYTHON.parent.parent / "lib").glob("python3*/site-packages/steermoe_local"))


def variants() -> dict[str, bool]:
    """Kinds of CPUs that the wheel has code for, and if this one is of that kind, as the library itself says."""
    found = {}
    for library in sorted((installed() / "lib").glob("libggml-cpu-*.so")):
        done = subprocess.run([PYTHON, "-c", _SCORE, library], capture_output=True, text=True, check=True)
        found[library.stem.removeprefix("libggml-cpu-")] = int(done.stdout) > 0
    return found


def libraries_of(variant: str) -> Path:
    """A folder of the wheel's libraries in which this variant is the only code for the CPU."""
    return _VARIANTS / variant / "steermoe_local" / "lib"


def _put_together(variant: str) -> None:
    source, target = installed(), libraries_of(variant)
    target.mkdir(parents=True)
    for library in (source / "lib").iterdir():
        if not library.name.startswith("libggml-cpu-") or library.name == f"libggml-cpu-{variant}.so":
            shutil.copy2(library, target)
    shutil.copytree(source.with_name("steermoe_local.libs"), target.parent.parent / "steermoe_local.libs")


if __name__ == "__main__":
    install()
