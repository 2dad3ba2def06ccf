"""Imports `llama_cpp` over the patched libraries of this package (`steermoe_local/lib`); no other module imports it
first.

Another version than the pinned one is refused, because its ctypes structs must be those of the library.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from .._util.package import PACKAGE
from ..errors import NativeError, VersionError

SPINS = "1000"
"""Of a waiting thread of GNU's OpenMP before it sleeps, about 0.01 ms: what it takes itself where it has more threads
than there are CPUs."""

ABI_VERSION = 4  # steermoe.h: STEERMOE_ABI_VERSION

_CRASH_CURE = (
    "the model file may be damaged, or made for another llama.cpp: fetch it again, or try another file; "
    "docs/errors.md says more"
)
_crashes_told = False


def pinned_version() -> str:
    """The version of llama-cpp-python that the native library was built for."""
    text = (PACKAGE / "llama_cpp_pin.txt").read_text("utf-8")
    match = re.match(r"llama-cpp-python==(\S+) ", text)
    if match is None:
        raise VersionError("llama_cpp_pin.txt: damaged installation; install steermoe-local again")
    return match[1]


def library_folder() -> Path:
    """The folder of the patched libraries: in this package, or in the installed package when this is a source tree.

    STEERMOE_LIB_PATH names another folder, for example of a build with other backends.
    """
    if named := os.path.expanduser(os.environ.get("STEERMOE_LIB_PATH", "")):
        return Path(named)
    beside = PACKAGE / "lib"
    if beside.is_dir():
        return beside
    try:
        installed = importlib.metadata.distribution("steermoe-local").locate_file("steermoe_local/lib")
    except importlib.metadata.PackageNotFoundError:
        return beside
    return Path(str(installed))


@cache
def llama_cpp() -> Any:
    """Import `llama_cpp` over the patched libraries.

    Raises VersionError when another version is installed, or when `llama_cpp` was imported before with other libraries,
    and NativeError when this package was installed without its libraries.
    """
    wanted = pinned_version()
    cure = f"run CMAKE_ARGS=-DLLAMA_BUILD=OFF {Path(sys.executable).name} -m pip install llama-cpp-python=={wanted}"
    try:
        found = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        raise VersionError(f"llama-cpp-python is not installed; {cure}") from None
    if found != wanted:
        raise VersionError(
            f"llama-cpp-python {found} is installed, but this steermoe-local was built for {wanted}; {cure}"
        )
    if "llama_cpp" not in sys.modules:
        folder = library_folder()
        if not any(folder.glob("*llama.*")):
            raise NativeError(
                f"{folder}: has no libllama; install the package (pip install .), its source tree alone has no library"
            )
        if sys.platform == "win32":  # else ggml.dll, which llama.dll needs, is looked for in the current folder first
            ctypes.windll.kernel32.SetDllDirectoryW("")
        with _variables({"LLAMA_CPP_LIB_PATH": str(folder), **_waiting()}):
            import llama_cpp.llama_cpp  # noqa: F401
        module = sys.modules["llama_cpp"]
        _take_log(module)
        if _crashes_told:
            _tell_of_crashes(module)
    module = sys.modules["llama_cpp"]
    try:
        abi = module.llama_cpp._lib.steermoe_abi_version()
    except AttributeError:
        raise VersionError(
            "llama_cpp was imported before steermoe_local and loaded an unpatched library; import steermoe_local first"
        ) from None
    if abi != ABI_VERSION:
        raise VersionError(
            f"the native library has ABI {abi}, this package needs {ABI_VERSION}; install steermoe-local again"
        )
    module.llama_cpp.llama_backend_init()  # loads the code for this CPU, where there is a file for each kind of CPU
    return module


def _waiting() -> dict[str, str]:
    """How long a thread of GNU's OpenMP spins while it waits for the others, where the user's variables do not say it.

    By itself it spins for about 3 ms, after every operation of a graph whose other threads have lost their core to
    other work: a token then takes tens of times as long (benchmarks/threads.py). The variable is read when the
    library is loaded; where OpenMP is another's, nothing reads it.
    """
    said = "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    return {} if said else {"GOMP_SPINCOUNT": SPINS}


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Meanwhile the environment has these values."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _take_log(module: Any) -> None:
    """Let the native library keep llama.cpp's log, and print it where a `Llama` is made verbose.

    llama_cpp's own callback reads the levels by an older numbering, and a Ctrl-C that arrives while a callback in
    Python runs is lost.
    """
    install = module.llama_cpp._lib.steermoe_log_install
    install.argtypes, install.restype = (ctypes.c_bool,), None
    parts: list[Any] = [sys.modules["llama_cpp._logger"], sys.modules["llama_cpp.llama"]]
    set_level = parts[0].set_verbose

    def set_verbose(verbose: bool) -> None:
        set_level(verbose)
        install(verbose)

    for part in parts:
        part.set_verbose = set_verbose
    install(False)


def tell_of_crashes() -> None:
    """From now on, print a line on stderr when native code ends this process, with llama.cpp's last errors.

    For programs: the handlers of SIGSEGV, SIGABRT and the like are the process's. The library is not loaded for it.
    """
    global _crashes_told
    _crashes_told = True
    if llama_cpp.cache_info().currsize:
        _tell_of_crashes(llama_cpp())


def _tell_of_crashes(module: Any) -> None:
    install = getattr(module.llama_cpp._lib, "steermoe_crash_install", None)
    if install is None:  # STEERMOE_LIB_PATH names an older build of the same ABI
        return
    install.argtypes, install.restype = (ctypes.c_char_p,), None
    install(_CRASH_CURE.encode())


def take_log_error() -> str:
    """The first error that llama.cpp logged since the last call, in one line; "" for none."""
    buffer = ctypes.create_string_buffer(1024)
    _take_error()(buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace")


@cache
def _take_error() -> Any:
    take = llama_cpp().llama_cpp._lib.steermoe_log_take_error
    take.argtypes, take.restype = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_size_t
    return take
