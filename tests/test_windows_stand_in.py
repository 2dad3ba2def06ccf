"""The package where Python has what it has on Windows (tests/support/windows_stand_in.py)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="stands on /proc")

BEGIN = "from tests.support import windows_stand_in\nwindows_stand_in.become_windows()\n"
PROGRAM = f"{BEGIN}import sys\nfrom steermoe_local.cli.start import start\nstart()\n"


def python(code: str, *words: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=folder,
        env=environment(folder),
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )


def environment(folder: Path) -> dict[str, str]:
    """With PYTHONPATH: the stand-in is no part of what is installed."""
    own = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])), "HOME": str(folder)}
    return os.environ | own | {"STEERMOE_MAPS": str(folder / "maps")}


def steermoe(folder: Path, *words: str, stdin: str = "") -> str:
    """stdout of a command that succeeds there."""
    done = python(PROGRAM, *words, folder=folder, stdin=stdin)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_stand_in_lacks_what_windows_lacks(tmp_path: Path) -> None:
    code = (
        BEGIN
        + """
import os, signal, sys
for name in ("fcntl", "resource", "termios", "pwd"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} is there")
assert not hasattr(os, "fork") and not hasattr(os, "O_NONBLOCK") and not hasattr(signal, "SIGKILL")
open("a", "w", encoding="utf-8").close()
open("b", "w", encoding="utf-8").close()
with open("a", encoding="utf-8"):
    for change in (lambda: os.replace("b", "a"), lambda: os.unlink("a"), lambda: os.rename("b", "a")):
        try:
            change()
        except OSError:
            continue
        sys.exit("an open file was changed")
os.replace("b", "a")
os.unlink("a")
"""
    )
    done = python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_every_module_is_imported(tmp_path: Path) -> None:
    code = (
        BEGIN
        + """
import importlib, pkgutil
import steermoe_local
names = [m.name for m in pkgutil.walk_packages(steermoe_local.__path__, "steermoe_local.") if "__main__" not in m.name]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    )
    done = python(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 300


def test_an_answer(tmp_path: Path) -> None:
    """The same as here; and the template's child gives way, and gets no Ctrl-C."""
    words = ["run", "tiny", "count from one to nine", "-n", "12", "--temp", "0"]
    code = PROGRAM.removesuffix("start()\n")
    code += "try:\n    start()\nfinally:\n    print(windows_stand_in.children, file=sys.stderr)\n"
    done = python(code, *words, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    here = subprocess.run(
        [sys.executable, "-m", "steermoe_local", *words],
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout == here.stdout
    flags = json.loads(done.stderr.strip().splitlines()[-1])
    assert flags, "no child was started"
    assert all(flag == 0x200 | 0x4000 for flag in flags), flags
    assert "Traceback" not in done.stderr


def test_files_are_written_and_replaced(tmp_path: Path) -> None:
    pair = {"positive": "write one", "negative": "write 1", "positive_target": "one", "negative_target": "1"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for _ in range(3)), "utf-8")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n", "utf-8")
    detect = ["detect", "-m", "tiny", "--pairs", "pairs.jsonl", "--counts", "counts.npz", "--per-pair", "pairs.npz"]
    for _ in range(2):  # the second time over the files of the first
        steermoe(tmp_path, *detect, "-o", "map.json")
    steermoe(tmp_path, "map", "merge", "counts.npz", "pairs.npz", "--per-pair", "pairs.npz", "-o", "merged.json")
    steermoe(tmp_path, "bias", "build", "map.json", "-m", "tiny", "-o", "bias.gguf", "--activate", "2")
    for more in ([], ["--restart"]):
        words = ["run", "tiny", "--n-prompts", "prompts.txt", "-n", "4", "--bias", "bias.gguf", "-o", "answers.jsonl"]
        steermoe(tmp_path, *words, *more)
    assert len((tmp_path / "answers.jsonl").read_text("utf-8").splitlines()) == 3
    left = sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".") and path.is_file())
    assert left == [], "temporary files and locks"


def test_a_chat(tmp_path: Path) -> None:
    out = steermoe(tmp_path, "chat", "tiny", "--no-history", "-n", "4", stdin="one\r\ntwo\n/save chat.json\n/quit\n")
    assert out.strip()
    assert (tmp_path / "chat.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=["ctrl-c", "ctrl-break"])
def test_a_server(tmp_path: Path, number: int) -> None:
    """Answers, keeps a steering in its folder, replaces it, and ends in order."""
    words = ["serve", "tiny", "--port", "0", "--maps", "maps", "--maps-writable", "-c", "256"]
    (tmp_path / "maps").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    )
    try:
        assert process.stderr is not None
        said = ""
        while (match := re.search(r" at (http://\S+)", said)) is None:
            line = process.stderr.readline()
            assert line, said
            said += line
        body = {"model": "tiny", "messages": [{"role": "user", "content": "one"}], "max_tokens": 4}
        assert ask(f"{match[1]}/v1/chat/completions", body)["choices"][0]["message"]["content"]
        kept = []
        for rule in ("answer: none", "thinking: none"):  # the second time over the file of the first
            ask(f"{match[1]}/v1/steering", {"name": "plan", "rules": [rule], "replace": True})
            kept.append((tmp_path / "maps" / "plan.plan.json").read_bytes())
        assert kept[0] != kept[1]
        os.kill(process.pid, number)
        assert process.wait(120) == 0
    finally:
        process.kill()
        process.communicate()


def ask(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
