"""Makes this process resemble Windows, as far as a POSIX system lets: what Python lacks there is missing.

- Modules (fcntl, resource, termios, ...), functions and flags of `os`, signals, options of sockets, what the event loop
  of Windows does not implement, options of child processes. msvcrt, _winapi and ctypes.windll stand there in small.
- A file that is open or mapped, in this process, can be neither removed nor replaced, and `os.rename` replaces nothing.
- `sys.platform` is "win32" for this package's modules, which are imported after that; other libraries before.
- Children of `_util/children.py` resemble it, too.

Not covered: names of files, the console, the ends of lines and the encoding of text (tests/test_text_files.py), and how
asyncio, ctypes and the C runtime behave there.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

_MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty")
_OS = (
    *("chown", "chroot", "ctermid", "fchdir", "fchown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getgroups"),
    *("getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid", "killpg", "lchown", "lockf", "mkfifo"),
    *("mknod", "nice", "openpty", "pipe2", "posix_fadvise", "posix_fallocate", "posix_spawn", "pread", "pwrite"),
    *("readv", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "sched_yield", "sendfile", "setpgid"),
    *("setpriority", "setsid", "setuid", "statvfs", "fstatvfs", "sysconf", "tcgetpgrp", "ttyname", "uname", "wait"),
    *("wait3", "wait4", "writev", "O_CLOEXEC", "O_DIRECTORY", "O_NOCTTY", "O_NOFOLLOW", "O_NONBLOCK", "O_SYNC"),
)
_SIGNALS = (
    *("SIGALRM", "SIGBUS", "SIGCHLD", "SIGCONT", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGSTOP", "SIGTSTP"),
    *("SIGUSR1", "SIGUSR2", "SIGWINCH", "SIGXCPU", "SIGXFSZ", "alarm", "pthread_kill", "pthread_sigmask", "setitimer"),
    *("sigpending", "sigwait"),
)
_SOCKETS = ("AF_UNIX", "SO_REUSEPORT", "TCP_USER_TIMEOUT", "TCP_INFO", "sendmsg")
# they look at the platform, or need what is missing, when they are imported
_BEFORE = (
    *(
        "asyncio",
        "concurrent.futures",
        "ctypes.util",
        "getpass",
        "http.server",
        "importlib.metadata",
        "locale",
        "logging",
    ),
    *("mimetypes", "multiprocessing", "pathlib", "platform", "random", "selectors", "shutil", "site"),
    *("sysconfig", "tarfile", "tempfile", "urllib.request", "uuid", "zipfile"),
)
_BEFORE_PACKAGE = (
    *("click", "fastapi.testclient", "gguf", "httpx", "huggingface_hub", "filelock", "jinja2.sandbox", "llguidance"),
    *("markdown_it", "numpy", "platformdirs", "prometheus_client", "prompt_toolkit.shortcuts", "psutil", "pyarrow"),
    *("pyarrow.parquet", "pydantic", "rich.progress", "rich.table", "tomlkit", "uvicorn.protocols.http.h11_impl"),
)
BREAK = int(signal.SIGUSR1)
"""The number of SIGBREAK here, where it can be sent."""
children: list[int] = []
"""The creationflags of each child process."""


def become_windows(*, package: bool = True) -> None:
    """Change this process, for good. Without `package` it is a child that imports little."""
    for name in (*_BEFORE, *(_BEFORE_PACKAGE if package else ())):
        importlib.import_module(name)
    if package:
        _load_library()
    _take_modules()
    pair, family = socket.socketpair, socket.AF_UNIX
    socket.socketpair = lambda: pair(family)  # Windows' are of the loopback
    for module, names in ((os, _OS), (signal, _SIGNALS), (socket, _SOCKETS)):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
    setattr(signal, "SIGBREAK", BREAK)  # noqa: B010 # no attribute here
    setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE)  # noqa: B010
    for name, value in (("CREATE_NEW_PROCESS_GROUP", 0x200), ("IDLE_PRIORITY_CLASS", 0x40)):
        setattr(subprocess, name, value)
    setattr(subprocess, "BELOW_NORMAL_PRIORITY_CLASS", 0x4000)  # noqa: B010
    _change_children()
    _change_loop()
    sys.platform = "win32"
    _change_files()
    if package:
        import uvicorn.server

        uvicorn.server.HANDLED_SIGNALS += (BREAK,)  # as uvicorn does there
        import steermoe_local._util.children as own

        own._START = Path(__file__)  # it runs as a script: see below


def _load_library() -> None:
    """The native library, by its loader for this system; then the package is forgotten."""
    import steermoe_local.llama.library as library

    library.llama_cpp()
    for name in [name for name in sys.modules if name.partition(".")[0] == "steermoe_local"]:
        del sys.modules[name]


def _take_modules() -> None:
    fcntl = importlib.import_module("fcntl")
    psutil_wait = importlib.import_module("time").sleep
    for name in _MODULES:
        sys.modules[name] = None  # type: ignore[assignment] # importing it fails

    def locking(fd: int, mode: int, n_bytes: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    msvcrt = types.ModuleType("msvcrt")
    msvcrt.__dict__.update(locking=locking, LK_NBLCK=2)
    sys.modules["msvcrt"] = msvcrt

    def wait(parent: int, milliseconds: int) -> None:
        while os.getppid() == parent:
            psutil_wait(0.1)

    winapi = types.ModuleType("_winapi")
    winapi.__dict__.update(OpenProcess=lambda access, inherit, pid: pid, WaitForSingleObject=wait, INFINITE=-1)
    sys.modules["_winapi"] = winapi
    import ctypes

    kernel = types.SimpleNamespace(SetDllDirectoryW=lambda folder: 1)
    setattr(ctypes, "windll", types.SimpleNamespace(kernel32=kernel))  # noqa: B010


def _change_children() -> None:
    start = subprocess.Popen.__init__

    def init(self: Any, *arguments: Any, creationflags: int = 0, **options: Any) -> None:
        assert not {"pass_fds", "process_group", "preexec_fn", "start_new_session", "umask"} & set(options), options
        children.append(creationflags)
        start(self, *arguments, **options)

    def kill(self: Any) -> None:
        if self.poll() is None:
            os.kill(self.pid, 9)

    for name, function in (("__init__", init), ("kill", kill), ("terminate", kill)):
        setattr(subprocess.Popen, name, function)


def _change_loop() -> None:
    import asyncio

    def missing(*_: Any, **__: Any) -> None:
        raise NotImplementedError

    names = (
        "add_reader",
        "remove_reader",
        "add_writer",
        "remove_writer",
        "add_signal_handler",
        "remove_signal_handler",
    )
    for name in (*names, "create_unix_connection", "create_unix_server"):
        setattr(asyncio.SelectorEventLoop, name, missing)


def _change_files() -> None:
    rename, seek, opened = os.rename, os.lseek, "used by another process"

    def require_closed(path: Any, folder: int = -1) -> None:
        name = os.fsdecode(path)
        where = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), name) if folder >= 0 else os.path.abspath(name)
        links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
        files = {os.readlink(link) for link in links if os.path.islink(link)}
        with builtins.open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            files |= {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if line.count(" ") > 5 and "/" in line}
        if os.path.realpath(where) in files:
            raise PermissionError(errno.EACCES, opened, name)

    def check(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.remove":
            require_closed(*arguments)
        elif event == "os.rename":
            source, target, source_folder, target_folder = arguments
            require_closed(source, source_folder)
            require_closed(target, target_folder)

    def rename_nothing_away(source: Any, target: Any, **options: Any) -> None:
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, "File exists", os.fsdecode(source))
        rename(source, target, **options)

    def without_right(*_: Any, **__: Any) -> None:
        raise OSError(errno.EINVAL, "a required privilege is not held by the client")

    def seek_anywhere(fd: int, position: int, how: int) -> int:
        return position if position > 1 << 60 else seek(fd, position, how)

    os.rename = rename_nothing_away
    os.lseek = seek_anywhere
    os.symlink = without_right
    sys.addaudithook(check)


if __name__ == "__main__":  # in the place of `_util/child_start.py`, which stands beside the package's other modules
    import json

    become_windows(package=False)
    (package,) = json.loads(sys.argv[1])["package_path"]
    runpy.run_path(str(Path(package) / "_util" / "child_start.py"), run_name="__main__")
