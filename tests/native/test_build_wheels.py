"""native/build_wheels.py: which wheels it refuses. That it builds them is tested by `make test-dist`."""

from __future__ import annotations

import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.scripts import load_script

LICENCE = "x-1.dist-info/licenses/LICENSE.md"


@pytest.fixture
def script() -> ModuleType:
    return load_script("native/build_wheels.py")


def wheel(folder: Path, name: str, *members: str) -> Path:
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as file:
        for member in members:
            file.writestr(member, "")
    return folder / name


def test_the_limit_of_size(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "llama_cpp_python-1.2-py3-none-any.whl"
    path.write_bytes(bytes(500_000))
    script.check_size(path)
    path.write_bytes(bytes(500_001))
    with pytest.raises(script.WheelError, match=r"0\.5 MB, the limit is 0\.5 MB"):
        script.check_size(path)


@pytest.mark.parametrize(
    ("name", "member", "refused"),
    [
        ("x-1-py3-none-any.whl", LICENCE, ""),
        ("x-1-py3-none-linux_x86_64.whl", LICENCE, "Python part alone"),
        ("x-1-py3-none-any.whl", "x/lib/libllama.so", "Python part alone"),
        ("x-1-py3-none-any.whl", "x/LICENSE", "no licence"),
    ],
)
def test_the_python_part(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, member: str, refused: str
) -> None:
    built = wheel(tmp_path, name, member)
    monkeypatch.setattr(script, "pip_wheel", lambda *_: built)
    if not refused:
        assert script.python_part(tmp_path / "x.tar.gz", tmp_path) == built
        return
    with pytest.raises(script.WheelError, match=refused):
        script.python_part(tmp_path / "x.tar.gz", tmp_path)


@pytest.mark.parametrize(
    ("platform", "taken"),
    [
        ("manylinux_2_34_x86_64", True),
        ("manylinux_2_28_x86_64", True),
        ("manylinux_2_35_x86_64", False),
        ("any", False),
    ],
)
def test_the_oldest_system(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, taken: bool
) -> None:
    output = tmp_path / "out"

    def repair(*_: Any) -> str:
        wheel(output, f"steermoe_local-1-py3-none-{platform}.whl")
        return ""

    monkeypatch.setattr(script, "run", repair)
    if taken:
        assert script.repaired(tmp_path / "x.whl", output).parent == output
        return
    with pytest.raises(script.WheelError, match=r"newer system than glibc 2\.34"):
        script.repaired(tmp_path / "x.whl", output)
