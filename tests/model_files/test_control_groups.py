"""The limits of Linux control groups are found in every version and place of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from steermoe_local._util.control_groups import group_folders


def folders(controller: str, tmp_path: Path, text: str) -> list[tuple[int, str]]:
    proc = tmp_path / "cgroup"
    proc.write_text(text)
    return [(version, str(path.relative_to(tmp_path))) for version, path in group_folders(controller, proc, tmp_path)]


def test_version_2(tmp_path: Path) -> None:
    found = folders("memory", tmp_path, "0::/a/b\n")
    assert found[:3] == [(2, "a/b"), (2, "a"), (2, ".")]
    assert found[3:] == [(2, "unified/a/b"), (2, "unified/a"), (2, "unified")]


def test_version_1(tmp_path: Path) -> None:
    text = "4:memory:/m\n3:cpu,cpuacct:/c\n"
    assert folders("memory", tmp_path, text) == [(1, "memory/m"), (1, "memory")]
    assert folders("cpu", tmp_path, text) == [(1, "cpu/c"), (1, "cpu"), (1, "cpu,cpuacct/c"), (1, "cpu,cpuacct")]
    assert folders("pids", tmp_path, text) == []


@pytest.mark.parametrize("text", ["", "nonsense\n", ":::\n"])
def test_no_groups(text: str, tmp_path: Path) -> None:
    assert folders("memory", tmp_path, text) == []
    assert list(group_folders("memory", tmp_path / "missing", tmp_path)) == []
