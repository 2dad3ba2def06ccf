"""A folder of traps, as a downloaded one may be: modules, libraries, settings that leave a trace when they are used."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_TRACE = "trace.txt"
_MODULE = """\
with open({trace!r}, "a") as file:
    file.write({name!r} + "\\n")
raise SystemExit("a planted {name} was imported")
"""
_LIBRARY = """
#include <stdio.h>
__attribute__((constructor)) static void planted(void) {{
    FILE * file = fopen("{trace}", "a");
    if (file) {{
        fputs("{name}\\n", file);
        fclose(file);
    }}
}}
"""
LIBRARIES = (
    *("libllama.so", "libggml.so", "libggml-cpu.so", "libggml-cpu-x64.so", "libggml-cuda.so", "libggml-vulkan-x.so"),
    "libgomp.so.1",
)


def plant(folder: Path, *, without: frozenset[str] = frozenset(), libraries: Iterable[str] = ()) -> Path:
    """Make a folder with a trap for every module of the standard library and every installed package, but `without`.

    For shared libraries of these names as well, which needs `cc`; and a matplotlibrc that cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trace = str(folder / _TRACE)
    for name in sorted(_names() - without):
        (folder / f"{name}.py").write_text(_MODULE.format(trace=trace, name=name))
    (folder / "matplotlibrc").write_bytes(b"font.size: \xff\xfe\n")
    for name in libraries:
        source = _LIBRARY.format(trace=trace, name=name)
        command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
    return folder


def traces(folder: Path) -> list[str]:
    """What of the planted files below a folder was used."""
    return [line for path in sorted(folder.rglob(_TRACE)) for line in path.read_text().splitlines()]


@cache
def _names() -> frozenset[str]:
    names = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), "sitecustomize", "usercustomize"}
    return frozenset(name for name in names if name.isidentifier()) - {"steermoe_local"}


@cache
def loaded_by_python() -> frozenset[str]:
    """Modules that `python -m` has loaded before any line of a package runs."""
    code = "import runpy, sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return frozenset(done.stdout.split())
