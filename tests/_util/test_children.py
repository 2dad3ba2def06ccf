"""Child processes: isolated, bound to their parent, limited, and found from every kind of installation."""

from __future__ import annotations

import math
import operator
import os
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from steermoe_local._util import children
from steermoe_local._util.children import Child, ChildError, Limits, Worker
from steermoe_local.errors import NativeError
from steermoe_local.evaluation.tasks import safe_regex
from tests.support.paths import ROOT
from tests.support.planted import plant, traces

LONG = 600  # seconds; nothing waits for it
PATHS = [str(Path(module.__file__ or "").parents[1]) for module in (np, psutil)]
# finds a word with `re`, in a child of its own, and writes a number with NumPy in another
ASK = """
import re
import numpy
from steermoe_local._util.children import Worker
from steermoe_local.evaluation.tasks.safe_regex import search
print(search(re.compile("b(.)"), "abc"), Worker(numpy.base_repr).ask(5, seconds=60))
"""
ANSWER = "(True, 'c') 101\n"


def python(*arguments: Any, program: str = sys.executable, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


#
# requests and answers
#


def test_a_worker_is_kept() -> None:
    worker = Worker(math.sqrt)
    worker.start()
    first = worker._child
    assert [worker.ask(n, seconds=60) for n in (4, 9)] == [2, 3]
    assert worker._child is first
    worker.stop()
    assert worker.ask(16, seconds=60) == 4
    worker.stop()


def test_texts_arrive_as_they_are() -> None:
    worker = Worker(operator.add)
    for text in ("a\nb", "\0\x1b\u2028", "ä€𝄞", "\ud800", "x" * 300_000):
        assert worker.ask(text, "!", seconds=60) == text + "!"
    worker.stop()


def test_too_late_an_answer_is_not_the_next_ones() -> None:
    worker = Worker(time.sleep)
    with pytest.raises(ChildError) as caught:
        worker.ask(LONG, seconds=0.3)
    assert caught.value.timed_out
    assert worker.ask(0, seconds=60) is None
    worker.stop()


def test_an_error_ends_the_child_and_not_the_worker() -> None:
    worker = Worker(math.sqrt)
    with pytest.raises(ChildError) as caught:
        worker.ask(-1, seconds=60)
    assert not caught.value.timed_out
    assert worker.ask(4, seconds=60) == 2
    worker.stop()


def test_an_answer_beyond_its_bound() -> None:
    worker = Worker(operator.mul, most_bytes=1000)
    assert len(worker.ask("x", 900, seconds=60)) == 900
    with pytest.raises(ChildError):
        worker.ask("x", 2000, seconds=60)
    assert worker.ask("x", 3, seconds=60) == "xxx"
    worker.stop()


def test_one_call(tmp_path: Path) -> None:
    with Child(os.mkdir, [str(tmp_path / "made")]) as child:
        assert child.wait(60) == 0
    assert (tmp_path / "made").is_dir()
    with Child(operator.add, [3, 4]) as child:
        assert child.wait(60) == 7
    with Child(time.sleep, [LONG]) as child:
        child.end()
        assert child.returncode != 0


def test_without_a_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(NativeError, match="no Python"):
        Child(time.sleep, [0])


def test_a_child_that_cannot_start_is_no_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every answer of a task would be scored as too slow."""
    monkeypatch.setattr(safe_regex._search, "__module__", "steermoe_local.no_such_module")
    with pytest.raises(NativeError, match="no_such_module"):
        Worker(safe_regex._search).ask("b", 0, "abc", seconds=60)


#
# limits
#

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no such limits")


@posix
@pytest.mark.skipif(sys.platform == "darwin", reason="macOS does not keep it")
def test_memory() -> None:
    worker = Worker(operator.mul, Limits(memory=256 << 20))
    assert len(worker.ask("x", 1 << 20, seconds=60)) == 1 << 20
    with pytest.raises(ChildError) as caught:
        worker.ask("x", 1 << 30, seconds=60)
    assert not caught.value.timed_out
    worker.stop()


@posix
def test_cpu_time_of_a_request() -> None:
    worker = Worker(safe_regex._search, Limits(cpu_seconds=1))
    for _ in range(3):
        assert worker.ask("b", 0, "abc", seconds=60) == "b"
    with pytest.raises(ChildError):
        worker.ask("(a+)+b", 0, "a" * 60, seconds=LONG)
    worker.stop()


@posix
def test_it_gives_way() -> None:
    worker = Worker(os.nice, Limits(niceness=3))
    assert worker.ask(0, seconds=60) == min(os.nice(0) + 3, 19)
    worker.stop()


@posix
def test_size_of_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with Child(os.truncate, [str(path), 1 << 20], limits=Limits(file_bytes=1000), stderr=subprocess.DEVNULL) as child:
        assert child.wait(60) != 0
    assert path.stat().st_size == 0


#
# the parent's end
#

PARENT = """
import os, re, sys, threading, time
from steermoe_local._util.children import Child
from steermoe_local.evaluation.tasks import safe_regex
leftover = sys.argv[1]
first = Child(time.sleep, [600], leftover=leftover)
safe_regex.search(re.compile("b"), "abc")
second = safe_regex._worker._child
# holds Python's lock in the child for years
threading.Thread(target=safe_regex.search, args=(re.compile("(a+)+b"), "a" * 60, 600), daemon=True).start()
time.sleep(1)
print(first.pid, second.pid, flush=True)
{end}
"""
ENDS = {
    "returns": "",
    "raises": "raise ValueError",
    "exits at once": "os._exit(3)",
    "is terminated": "os.kill(os.getpid(), 15); time.sleep(600)",
    "is killed": "os.kill(os.getpid(), 9); time.sleep(600)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a child that holds Python's lock ends by its limits")
@pytest.mark.parametrize("end", ENDS)
def test_children_end_with_their_parent(end: str, tmp_path: Path) -> None:
    leftover = tmp_path / "half"
    leftover.touch()
    done = python("-c", PARENT.format(end=ENDS[end]), leftover)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 2, done.stderr

    def is_gone(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    deadline = time.monotonic() + 60
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, "the children live on"
        time.sleep(0.05)
    assert not leftover.exists()


@pytest.mark.skipif(os.name == "nt", reason="no process groups")
def test_ctrl_c_is_for_the_parent() -> None:
    worker = Worker(math.sqrt)
    worker.start()
    child = worker._child
    assert child is not None
    assert os.getpgid(child.pid) != os.getpgid(0)
    assert worker.ask(4, seconds=60) == 2  # it has started
    os.kill(child.pid, signal.SIGINT)
    assert worker.ask(9, seconds=60) == 3
    assert worker._child is child
    worker.stop()


def test_no_descriptors_are_lost() -> None:
    before = psutil.Process().num_fds() if os.name != "nt" else psutil.Process().num_handles()
    for _ in range(5):
        worker = Worker(math.sqrt)
        worker.ask(4, seconds=60)
        worker.stop()
    after = psutil.Process().num_fds() if os.name != "nt" else psutil.Process().num_handles()
    assert after <= before


#
# isolation
#


def test_nothing_of_other_folders_runs(tmp_path: Path) -> None:
    """The current folder, PYTHONPATH, PYTHONSTARTUP and the like; the parent's own path is as it was."""
    current, other = plant(tmp_path / "current"), plant(tmp_path / "other")
    (other / "steermoe_local.py").write_text("raise SystemError")
    # as if the parent had been started with them; "" is the current folder
    planted = ["", ".", str(current), str(other)]
    before = f"import os, sys; sys.path[:0] = {planted}; os.environ['PYTHONPATH'] = os.pathsep.join({planted})"
    code = ASK.replace("print(", f"{before}\nprint(")
    environment = os.environ | {"PYTHONSTARTUP": str(other / "json.py"), "PYTHONBREAKPOINT": "random.x"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *PATHS])
    done = python("-P", "-c", code, cwd=current, env=environment)
    assert done.stdout == ANSWER, done.stderr
    assert traces(tmp_path) == []


def test_the_interpreter_is_isolated() -> None:
    assert children._command()[1] == "-I"
    order = children.import_order()
    assert all(os.path.isabs(entry) for entry in order["path"])


ENVIRONMENTS = ["source tree", "from its folder", "editable", "user site"]


@pytest.mark.parametrize("kind", ENVIRONMENTS)
def test_it_is_found(kind: str, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    program, folder = sys.executable, plant(tmp_path / "current")
    everything = "\n".join(dict.fromkeys([str(ROOT), *PATHS])) + "\n"
    if kind in ("source tree", "from its folder"):
        environment["PYTHONPATH"] = str(ROOT)
        folder = ROOT if kind == "from its folder" else folder
    elif kind == "editable":
        venv.create(tmp_path / "venv", with_pip=False, symlinks=os.name != "nt")
        (site,) = [path for path in (tmp_path / "venv").rglob("site-packages") if path.is_dir()]
        (site / "editable.pth").write_text(everything)
        program = str(tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python")
    else:
        program = getattr(sys, "_base_executable", sys.executable)
        environment["PYTHONUSERBASE"] = str(tmp_path / "user")
        found = python("-c", "import site; print(site.getusersitepackages())", program=program, env=environment)
        site = Path(found.stdout.strip())
        site.mkdir(parents=True)
        (site / "user.pth").write_text(everything)
    options = ["-P"] if kind != "from its folder" else []
    done = python(*options, "-c", ASK, program=program, env=environment, cwd=folder)
    assert done.stdout == ANSWER, done.stderr
    assert traces(tmp_path) == []
