"""What Windows does otherwise, in pieces that any system can run."""

from __future__ import annotations

import io
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steermoe_local import UsageError
from steermoe_local._util import windows
from steermoe_local._util.windows import as_typed, child_options, is_device, replace
from steermoe_local.cli.streams import settle_streams
from steermoe_local.models.user_maps import check_map_name


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")


def busy(monkeypatch: pytest.MonkeyPatch, times: int) -> list[str]:
    """os.replace fails so often, as where somebody reads the target."""
    tried: list[str] = []
    real = os.replace

    def fail(source: Any, target: Any) -> None:
        tried.append(str(target))
        if len(tried) <= times:
            raise PermissionError(13, "used by another process")
        real(source, target)

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(windows, "_PAUSE", 0)
    return tried


@pytest.mark.usefixtures("on_windows")
def test_a_file_that_is_read_is_replaced_when_its_reader_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    tried = busy(monkeypatch, 3)
    replace(source, target)
    assert (target.read_bytes(), source.exists(), len(tried)) == (b"new", False, 4)


@pytest.mark.usefixtures("on_windows")
def test_one_that_stays_open_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"new")
    target.write_bytes(b"old")
    busy(monkeypatch, 1000)
    with pytest.raises(PermissionError):
        replace(source, target)
    assert (target.read_bytes(), source.read_bytes()) == (b"old", b"new")


@pytest.mark.skipif(sys.platform == "win32", reason="waits there")
def test_elsewhere_nothing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = busy(monkeypatch, 1)
    with pytest.raises(PermissionError):
        replace(tmp_path / "source", tmp_path / "target")
    assert len(tried) == 1


@pytest.mark.parametrize("name", ["con", "NUL", "aux.json", "com1", "lpt9.gguf", "prn.a.b"])
def test_names_of_devices(name: str) -> None:
    assert is_device(name)


@pytest.mark.parametrize("name", ["console", "formal", "com", "com10", "nul-1", "a.con"])
def test_names_of_files(name: str) -> None:
    assert not is_device(name)


@pytest.mark.parametrize("name", ["con", "nul.a", "a.", "none"])
def test_names_that_no_map_gets(name: str) -> None:
    with pytest.raises(UsageError):
        check_map_name(name)


def test_words_are_typed_for_the_system_s_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["steermoe", "run", "-m", "C:\\my models\\a.gguf", "it's", 'a "b"']
    monkeypatch.setattr(sys, "platform", "linux")
    assert shlex.split(as_typed(words)) == words
    monkeypatch.setattr(sys, "platform", "win32")
    assert as_typed(words) == 'steermoe run -m "C:\\my models\\a.gguf" it\'s "a \\"b\\""'


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has these flags")
def test_children(monkeypatch: pytest.MonkeyPatch) -> None:
    assert child_options(5) == {}
    monkeypatch.setattr(sys, "platform", "win32")
    flags = {"CREATE_NEW_PROCESS_GROUP": 1, "BELOW_NORMAL_PRIORITY_CLASS": 2, "IDLE_PRIORITY_CLASS": 4}
    for name, value in flags.items():
        monkeypatch.setattr(subprocess, name, value, raising=False)
    wanted = {None: 1, 0: 1, 5: 1 | 2, 15: 1 | 4}
    assert {niceness: child_options(niceness)["creationflags"] for niceness in wanted} == wanted


def test_signals_that_ask_a_program_to_end() -> None:
    assert {signal.SIGINT, signal.SIGTERM} <= {*windows.STOP_SIGNALS}
    assert hasattr(signal, "SIGBREAK") == (len(windows.STOP_SIGNALS) == 3)


@pytest.mark.usefixtures("on_windows")
@pytest.mark.parametrize(("named", "encoding"), [(None, "utf-8"), ("cp1252", "cp1252")])
def test_a_pipe_gets_utf_8(monkeypatch: pytest.MonkeyPatch, named: str | None, encoding: str) -> None:
    """Not the system's code page, unless somebody wants another encoding."""
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    if named:
        monkeypatch.setenv("PYTHONIOENCODING", named)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "cp1252", newline="\n"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(io.BytesIO(), "cp1252"))
    settle_streams()
    sys.stdout.write("größe 模型\n")
    sys.stdout.flush()
    expected = "größe 模型\n" if encoding == "utf-8" else "größe \\u6a21\\u578b\n"
    assert raw.getvalue() == expected.encode(encoding)
