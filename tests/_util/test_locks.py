"""Locks on outputs: who has one is told, and it ends with its process."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from steermoe_local._util import locks
from steermoe_local._util.locks import OutputLock
from steermoe_local.errors import BusyError, StorageError, UsageError

_HOLD = """
import os, subprocess, sys
from steermoe_local._util.locks import OutputLock
with OutputLock(sys.argv[1]):
    if sys.argv[2] == "fork":
        seen, forked = os.pipe()
        if os.fork() == 0:
            os.write(forked, b".")  # Python has done in it what it does after a fork
            sys.stdin.readline()
            os._exit(0)
        os.read(seen, 1)
    child = subprocess.Popen(["sleep", "60"]) if sys.argv[2] == "child" else None
    print(os.getpid(), child.pid if child else 0, flush=True)
    sys.stdin.readline()
    if child:
        child.kill()
        child.wait()
"""


@contextmanager
def holder(path: Path, how: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that has the lock until a line comes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, path, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid, child = map(int, process.stdout.readline().split())
    assert pid == process.pid
    try:
        yield process
    finally:
        process.kill()
        if child:  # before what the process has written is read to its end: the child has its stdout, too
            os.kill(child, signal.SIGKILL)
        process.communicate()


def free(path: Path) -> bool:
    try:
        with OutputLock(path):
            return True
    except BusyError:
        return False


def test_another_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / "o.jsonl"
    with holder(path) as process:
        with pytest.raises(BusyError) as caught:
            OutputLock(path).acquire()
        assert f"another steermoe, pid {process.pid}," in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")
        process.communicate("end\n", timeout=60)
    assert list(tmp_path.iterdir()) == [], "the lock file stays behind"
    assert free(path)


@pytest.mark.parametrize("how", ["", "child", "fork"])
def test_a_killed_holder(tmp_path: Path, how: str) -> None:
    """kill -9 ends the lock, also while a child or a fork of the process is still there; what stays is no lock."""
    path = tmp_path / "o.jsonl"
    with holder(path, how) as process:
        assert not free(path)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert [found.name for found in tmp_path.iterdir()] == [".o.jsonl.lock"]
        assert free(path)
    assert list(tmp_path.iterdir()) == []


def test_other_names_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "o.jsonl"
    path.touch()
    (tmp_path / "link.jsonl").symlink_to(path)
    (tmp_path / "folder").symlink_to(tmp_path)
    (tmp_path / "hard.jsonl").hardlink_to(path)
    monkeypatch.chdir(tmp_path)
    with OutputLock(path):
        for name in ("o.jsonl", "./o.jsonl", "link.jsonl", "folder/link.jsonl", f"../{tmp_path.name}/o.jsonl"):
            assert not free(Path(name)), name
        assert free(tmp_path / "hard.jsonl"), "it is replaced by its name, so the other name keeps its file"
        assert free(tmp_path), "a folder is another output than a file in it"


def test_threads_of_one_process(tmp_path: Path) -> None:
    """Of many threads that want it at once exactly one has it at a time."""
    path = tmp_path / "o.jsonl"
    inside, most, got, lock = 0, 0, 0, threading.Lock()

    def work() -> None:
        nonlocal inside, most, got
        for _ in range(50):
            try:
                with OutputLock(path):
                    with lock:
                        inside += 1
                        most, got = max(most, inside), got + 1
                    with lock:
                        inside -= 1
            except BusyError:
                continue

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == (1, 0)
    assert got > 0
    assert list(tmp_path.iterdir()) == []


def test_it_may_be_entered_again(tmp_path: Path) -> None:
    lock = OutputLock(tmp_path / "o")
    with lock, lock:
        assert lock.held
    assert not lock.held
    lock.release()
    assert free(tmp_path / "o")


def test_waiting(tmp_path: Path) -> None:
    """`wait` is for locks that are held for a moment."""
    first = OutputLock(tmp_path / "o")
    first.acquire()
    timer = threading.Timer(0.1, first.release)
    timer.start()
    with OutputLock(tmp_path / "o", wait=60):
        pass
    timer.join()


def test_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A file system that has none is told, and the work goes on."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with caplog.at_level(logging.WARNING, "steermoe.files"), OutputLock(tmp_path / "o") as lock:
        assert lock.held
    assert str(tmp_path / "o") in caplog.text


def test_where_no_lock_file_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".o.lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match=str(tmp_path / "o")):
        OutputLock(tmp_path / "o").acquire()
    assert not (tmp_path / "elsewhere").exists()
    os.mkfifo(tmp_path / ".p.lock")
    with pytest.raises(UsageError):
        OutputLock(tmp_path / "p").acquire()
    with pytest.raises(UsageError):
        OutputLock(tmp_path / "no" / "o").acquire()

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(StorageError):
        OutputLock(tmp_path / "q").acquire()


def test_what_a_lock_file_says_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / ".o.lock").write_bytes(b"1 \x1b[2Jhost\n" * 1000)
    assert free(tmp_path / "o"), "nobody has the lock"
    with OutputLock(tmp_path / "o"):
        (tmp_path / ".o.lock").write_bytes(b"12 \x1b[2Jhost\n")
        with pytest.raises(BusyError) as caught:
            OutputLock(tmp_path / "o").acquire()
        assert str(caught.value).isprintable()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_in_the_way_is_named(tmp_path: Path, kind: str) -> None:
    """The output itself could be written; the cure is to remove what has the name of the lock."""
    lock = tmp_path / ".a.json.lock"
    if kind == "link":
        lock.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with pytest.raises(UsageError, match=rf"a\.json: cannot be locked: .*{re.escape(str(lock))}: .*; remove that"):
        OutputLock(tmp_path / "a.json").acquire()
    assert not (tmp_path / "elsewhere").exists()
