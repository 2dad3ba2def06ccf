"""Files that are replaced: the old one or the new one, whatever ends the process, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from steermoe_local._util.disk import cannot_write
from steermoe_local._util.files import replacing
from steermoe_local._util.writing import Replacement, beside, remove_leftovers
from steermoe_local.errors import SteerMoEError, StorageError, UsageError
from tests.support.crashing import failed_at_each_step, killed_at_each_step

NEW = "new\n" * 1000


def write(path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(NEW)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_killed_at_each_step(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    seen = set()

    def check() -> None:
        seen.add(path.read_text())
        write(tmp_path / "b.json")
        remove_leftovers(path)
        assert sorted(found.name for found in tmp_path.iterdir()) == ["a.json", "b.json"]

    path.write_text("old")
    assert killed_at_each_step(lambda: write(path), check, lambda: path.write_text("old")) >= 5
    assert seen == {"old", NEW}


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, StorageError),
        (errno.EIO, StorageError),
        (errno.EFBIG, StorageError),
        (errno.EROFS, StorageError),
        (errno.EACCES, UsageError),
        (errno.ENAMETOOLONG, UsageError),
    ],
)
def test_failing_at_each_step(tmp_path: Path, number: int, kind: type[SteerMoEError]) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def check(raised: BaseException | None) -> None:
        assert raised is None or (type(raised) is kind and str(path) in str(raised))
        assert path.read_text() in ("old", NEW)
        assert [found.name for found in tmp_path.iterdir()] == ["a.json"]
        path.write_text("old")

    assert failed_at_each_step(number, lambda: write(path), check) >= 5


def test_everything_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The contents before the name, the folder behind it."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(fd: int) -> None:
        done.append("folder" if os.path.isdir(f"/dev/fd/{fd}") else f"file of {os.fstat(fd).st_size}")
        fsync(fd)

    def replaced(source: str, target: str) -> None:
        done.append("name")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", replaced)
    write(tmp_path / "a.json")
    assert done == [f"file of {len(NEW)}", "name", "folder"]


def test_a_live_process_keeps_its_temporary_file(tmp_path: Path) -> None:
    """The next writer removes the temporary files of processes that are gone, and no others."""
    code = """
import sys
from pathlib import Path
from steermoe_local._util.files import replacing
with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print(temporary.name, flush=True)
    sys.stdin.readline()
"""
    path = tmp_path / "a.json"
    users = [".a.json.mine.tmp", ".a.json.0123456789ab.tmp.txt", ".b.json.0123456789ab.tmp", "a.json.0123456789ab.tmp"]
    for name in users:
        (tmp_path / name).touch()
    children = [
        subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        dead, alive = (child.stdout.readline().strip() for child in children if child.stdout)
        children[0].kill()
        children[0].wait()
        assert (tmp_path / dead).exists()
        write(path)
        assert {found.name for found in tmp_path.iterdir()} == {"a.json", alive, *users}
        children[1].communicate("go on\n", timeout=60)
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert children[1].returncode == 0
    assert path.read_text() == "half"
    assert {found.name for found in tmp_path.iterdir()} == {"a.json", *users}


def test_a_temporary_file_that_is_taken_away(tmp_path: Path) -> None:
    """Another program may write it anew; what has the name is what counts."""
    replacement = Replacement(tmp_path / "a.json")
    other = tmp_path / "other"
    other.write_text(NEW)
    shutil.move(other, replacement.path)
    replacement.commit()
    replacement.abort()
    assert (tmp_path / "a.json").read_text() == NEW
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_permissions(tmp_path: Path) -> None:
    with replacing(tmp_path / "secret", 0o600) as temporary:
        temporary.touch()
    write(tmp_path / "open")
    before = os.umask(0o22)
    os.umask(before)
    assert [(tmp_path / name).stat().st_mode & 0o777 for name in ("secret", "open")] == [0o600, 0o666 & ~before]


def test_links(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.json").write_text("old")
    (tmp_path / "link.json").symlink_to(Path("real") / "a.json")
    write(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real" / "a.json").read_text() == NEW
    assert beside(tmp_path / "link.json", ".partial") == (tmp_path / "real" / "a.json.partial").resolve()
    assert beside("some/a.json", ".partial") == Path("some/a.json.partial")


def test_names_that_cannot_be(tmp_path: Path) -> None:
    for name in ("x" * 300, "a\0b", "no/such/folder"):
        with pytest.raises(UsageError):
            write(tmp_path / name)
    assert isinstance(cannot_write("x", OSError("without a number")), StorageError)
