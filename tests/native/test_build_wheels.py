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
    ("platform", "limit", "refused"),
    [
        ("manylinux_2_34_x86_64", (2, 34), ""),
        ("manylinux_2_28_x86_64", (2, 34), ""),
        ("manylinux_2_35_x86_64", (2, 34), r"newer system than glibc 2\.34"),
        ("manylinux_2_39_x86_64", (2, 39), ""),
        ("manylinux_2_40_x86_64", (2, 39), r"newer system than glibc 2\.39"),
        ("any", (2, 34), r"newer system than glibc 2\.34"),
    ],
)
def test_the_oldest_system(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platform: str,
    limit: tuple[int, int],
    refused: str,
) -> None:
    output = tmp_path / "out"

    def repair(*_: Any) -> str:
        members = ("steermoe_local.libs/", "steermoe_local.libs/libgomp-24e2ab19.so.1.0.0")
        wheel(output, f"steermoe_local-1-py3-none-{platform}.whl", *members)
        return ""

    monkeypatch.setattr(script, "run", repair)
    if not refused:
        assert script.repaired(tmp_path / "x.whl", output, limit).parent == output
        return
    with pytest.raises(script.WheelError, match=refused):
        script.repaired(tmp_path / "x.whl", output, limit)


def test_a_newer_system_builds_wheels_for_its_kind(script: ModuleType) -> None:
    """What is built on Debian 12 and Ubuntu 22.04 has to run on the oldest systems; what newer ones build cannot."""
    assert script.most_glibc((2, 35)) == script.most_glibc((2, 36)) == (2, 34)
    assert script.most_glibc((2, 39)) == (2, 39)
    assert script.most_glibc(()) == (2, 34)


def test_what_auditwheel_may_copy(script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libraries = ["steermoe_local.libs/libgomp-24e2ab19.so.1.0.0", "steermoe_local.libs/libvulkan-0123abcd.so.1"]

    def repair(*_: Any) -> str:
        wheel(tmp_path / "out", "steermoe_local-1-py3-none-manylinux_2_34_x86_64.whl", *libraries)
        return ""

    monkeypatch.setattr(script, "run", repair)
    with pytest.raises(script.WheelError, match=r"auditwheel copied libvulkan-0123abcd\.so\.1 into it"):
        script.repaired(tmp_path / "x.whl", tmp_path / "out", (2, 34))


def test_other_options_begin_anew(script: ModuleType, tmp_path: Path) -> None:
    """What CMake kept of a build with other options must not come into the next wheel."""
    built = tmp_path / "native" / "CMakeCache.txt"

    def is_kept(options: dict[str, str]) -> bool:
        script.keep_build_folder(tmp_path, options)
        kept = built.exists()
        built.parent.mkdir(exist_ok=True)
        built.touch()
        return kept

    assert not is_kept({"CC": ""})
    assert is_kept({"CC": ""})
    assert not is_kept({"CC": "clang"})
    assert is_kept({"CC": "clang"})
    assert not is_kept({"CC": ""})
