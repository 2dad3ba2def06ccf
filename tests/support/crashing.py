"""Writers whose n-th step fails, or is the last thing that their process does.

Steps are the calls that change or open files: a process that is killed between two of them leaves what the calls
before left.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest

_KILLED = 77
_CALLS = ("open", "replace", "link", "unlink", "fsync", "ftruncate")


@contextmanager
def at_step(n: int, happens: Callable[[], Any]) -> Iterator[list[str]]:
    """In the block `happens` is called in place of the n-th step (from 1); yields the names of the steps so far.

    Files that are written as a whole are half written then.
    """
    steps: list[str] = []

    def stepped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            steps.append(name)
            if len(steps) == n:
                happens()
            return call(*args, **kwargs)

        return step

    def half(write: Callable[..., Any]) -> Callable[..., Any]:
        def step(path: Path, data: Any, *args: Any, **kwargs: Any) -> Any:
            steps.append("write")
            if len(steps) == n:
                write(path, data[: len(data) // 2], *args, **kwargs)
                happens()
            return write(path, data, *args, **kwargs)

        return step

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, stepped(name, getattr(os, name)))
        opened = stepped("open", open)
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        for name in ("write_bytes", "write_text"):
            patch.setattr(Path, name, half(getattr(Path, name)))
        yield steps


def killed_at_each_step(work: Callable[[], Any], check: Callable[[], Any], reset: Callable[[], Any]) -> int:
    """Do `work` in a forked process that is killed at its first, second, ... step; returns the number of steps.

    After each `check` is called, then `reset`.
    """
    for n in itertools.count(1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other tests' threads; the child uses none of them
            pid = os.fork()
        if pid == 0:
            _child(n, work)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, _KILLED), f"the process failed by itself at step {n}: {status}"
        check()
        reset()
        if status == 0:
            return n - 1
    raise AssertionError


def _child(n: int, work: Callable[[], Any]) -> NoReturn:
    try:
        with at_step(n, lambda: os._exit(_KILLED)):
            work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
    os._exit(1)


def failed_at_each_step(number: int, work: Callable[[], Any], check: Callable[[BaseException | None], Any]) -> int:
    """Do `work` with an OSError of this number at its first, second, ... step; returns the number of steps.

    `check` gets what it raised. It is called behind each; the last time nothing failed.
    """
    for n in itertools.count(1):

        def fail() -> NoReturn:
            raise OSError(number, os.strerror(number), "/srv/secret/folder")

        raised: BaseException | None = None
        with at_step(n, fail) as steps:
            try:
                work()
            except Exception as error:
                raised = error
            n_steps = len(steps)
        check(raised)
        if n_steps < n:
            return n - 1
    raise AssertionError
