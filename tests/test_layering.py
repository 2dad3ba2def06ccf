"""Which folder may import which (docs/design.md), and what an import loads."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steermoe_local
from tests.support.paths import ROOT

PACKAGE = ROOT / "steermoe_local"

# folder (or module at the top): what it may import. docs/design.md draws it. Each stage may import all below it.
BOTTOM = {"errors", "identity", "_util"}
BELOW_LLAMA = BOTTOM | {"model_files", "pairs", "maps", "steering", "models"}
BELOW_EVALUATION = BELOW_LLAMA | {"behaviours", "llama", "detection", "generation"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_util": {"errors"},
    "identity": {"errors", "_util"},
    "model_files": BOTTOM,
    "pairs": BOTTOM,
    "maps": BOTTOM | {"model_files", "pairs"},
    "steering": BOTTOM | {"model_files", "pairs", "maps"},
    "models": BOTTOM | {"model_files", "pairs", "maps"},
    "behaviours": BELOW_LLAMA - {"steering"},
    "llama": BELOW_LLAMA,
    "detection": BELOW_LLAMA | {"llama"},
    "generation": BELOW_LLAMA | {"llama"},
    "evaluation": BELOW_EVALUATION,
    "attribution": BELOW_EVALUATION | {"evaluation"},
    "learning": BELOW_EVALUATION | {"evaluation", "attribution", "behaviours"},
    "server": BELOW_EVALUATION - {"detection"} | {"evaluation"},
    "cli": BELOW_EVALUATION | {"evaluation", "attribution", "learning", "behaviours", "server", "__init__"},
    "__main__": {"cli"},
}
# Inside evaluation and the command line.
INSIDE: dict[str, dict[str, set[str]]] = {
    "evaluation": {
        "metrics": set(),
        "tasks": {"metrics"},
        "datasets": {"metrics", "tasks"},
        "measuring": {"metrics", "tasks"},
        "studies": {"metrics", "tasks", "measuring"},
        "reports": {"metrics", "tasks", "measuring", "studies"},
        "experiments": {"metrics", "tasks", "measuring", "studies", "reports"},
        "demo": {"metrics", "tasks", "measuring", "studies"},
    },
    "evaluation.studies": {
        "steerings": set(),
        "search": {"steerings"},
        "layers": {"steerings"},
        "controls": set(),
        "signatures": {"steerings", "controls"},
        "evaluate": {"steerings", "controls", "signatures"},
        "transfer": {"steerings", "evaluate"},
        "audit": {"layers", "transfer"},
        "conditions": set(),
    },
    "cli": {
        "streams": set(),
        "output": {"streams"},
        "failures": {"output"},
        "options": {"output"},
        "help_pages": {"streams", "options"},
        "program": {"streams", "output", "failures", "options", "help_pages"},
        "chat": {"streams", "output", "failures", "options"},
        "run": {"streams", "output", "options"},
        "commands": {"streams", "output", "failures", "options", "chat", "run"},
        "start_page": {"output", "options", "help_pages"},
        "group": {"commands", "program", "help_pages", "start_page"},
        "start": {"streams", "failures", "group"},
    },
}

# Third-party modules that only these folders may import.
RESERVED = {
    "llama_cpp": {"llama", "server"},
    "jinja2": {"llama", "maps"},
    "cma": {"attribution"},
    "llguidance": {"llama"},
    "ctypes": {"llama", "detection"},
    "gguf": {"model_files", "steering"},
    "psutil": {"llama", "model_files", "server"},
    "platformdirs": {"models", "cli"},
    "click": {"cli"},
    "matplotlib": {"maps", "evaluation"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "tomlkit": {"cli"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "h11": {"server"},
    "pydantic": {"server"},
    "prometheus_client": {"server"},
    "markdown_it": {"_util"},
    "linkify_it": {"_util"},
    "torch": set(),
    "httpx": {"evaluation"},
    "huggingface_hub": {"models"},
    "filelock": {"models"},  # which the hub's client locks by
    "pyarrow": {"_util"},
    "pickle": set(),
    "pickletools": {"maps"},
    "pandas": set(),
}


def modules(folder: Path) -> dict[str, list[Path]]:
    """Each part of a folder and its files; a folder inside is one part."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        if name != "__init__":
            parts.setdefault(name, []).append(path)
    return parts


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(dotted modules of the package below its name, other top-level modules) that a file imports, anywhere in it."""
    own: set[str] = set()
    others: set[str] = set()
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                (own if first == "steermoe_local" else others).add(rest if first == "steermoe_local" else first)
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            if node.level == 0 and parts[0] != "steermoe_local":
                others.add(parts[0])
                continue
            base = [*here[: len(here) - node.level + 1], *parts] if node.level else parts[1:]
            for alias in node.names:  # `from . import x` names modules
                full = [*base, alias.name]
                is_module = PACKAGE.joinpath(*full).is_dir() or PACKAGE.joinpath(*full).with_suffix(".py").is_file()
                own.add(".".join(full if is_module else base) or "__init__")
    return own, others


PARTS = modules(PACKAGE)


def first_parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("part", PARTS)
def test_the_table(part: str) -> None:
    for path in PARTS[part]:
        extra = first_parts(imports(path)[0]) - ALLOWED[part] - {part}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)}; it may know {sorted(ALLOWED[part])}"


@pytest.mark.parametrize(("folder", "part"), [(folder, part) for folder, table in INSIDE.items() for part in table])
def test_the_inner_tables(folder: str, part: str) -> None:
    parts = modules(PACKAGE.joinpath(*folder.split(".")))
    assert set(parts) == set(INSIDE[folder])
    for path in parts[part]:
        own = {name.removeprefix(f"{folder}.") for name in imports(path)[0] if name.startswith(f"{folder}.")}
        extra = first_parts(own) - INSIDE[folder][part] - {part}
        assert not extra, f"{path.relative_to(PACKAGE)} imports {sorted(extra)} of {folder}"


@pytest.mark.parametrize("part", PARTS)
def test_third_party_modules(part: str) -> None:
    for path in PARTS[part]:
        _, others = imports(path)
        for name, allowed in RESERVED.items():
            assert name not in others or part in allowed, f"{path.relative_to(PACKAGE)} imports {name}"


def test_no_import_cycles() -> None:
    """Not even through imports inside functions; what stands under TYPE_CHECKING is no import."""
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {found for found in imports(path)[0] if found not in ("__init__", name)}
    graph = {name: {found for found in targets if found in graph} for name, targets in graph.items()}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the modules


def test_the_tables_are_read() -> None:
    assert set(ALLOWED) == set(PARTS)
    own, _ = imports(PACKAGE / "detection" / "recorder.py")
    assert {"llama.capi", "maps.counts", "pairs.pairs"} <= own, "the reader of imports sees nothing"
    assert "llama_cpp" in imports(PACKAGE / "llama" / "library.py")[1]


def test_native_parts() -> None:
    """Steering and recording do not know each other; the bias reader knows no llama.cpp."""
    source = ROOT / "native" / "src"

    def includes(name: str) -> str:
        lines = [line for path in source.glob(f"{name}.*") for line in path.read_text("utf-8").splitlines()]
        assert lines, f"no file {name}"
        return "\n".join(line for line in lines if "#include" in line)

    for name in ("steermoe-bank", "steermoe-sequences", "steermoe-rows"):
        assert "recorder" not in includes(name)
        assert name not in includes("steermoe-recorder")
    assert "llama" not in includes("steermoe-bias")
    assert "llama" not in includes("steermoe-error")
    everything = "\n".join(path.read_text("utf-8") for path in source.rglob("*.*"))
    assert "Python.h" not in everything
    assert "ggml_map_custom" not in everything, "custom operations run on the CPU alone"


def test_module_sizes() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text("utf-8").splitlines()) <= 450, f"{path.name} is far beyond 300 lines: split it"


#
# what is public
#


def test_all_is_importable() -> None:
    assert list(steermoe_local.__all__) == sorted(set(steermoe_local.__all__))
    for name in steermoe_local.__all__:
        assert getattr(steermoe_local, name) is not None
    assert dir(steermoe_local) == sorted(steermoe_local.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = steermoe_local.nothing
    names: dict[str, Any] = {}
    exec("from steermoe_local import *", names)
    assert set(steermoe_local.__all__) <= set(names)


def names_of(folder: Path) -> set[str]:
    """Names of modules below a folder, and of what they define at their top."""
    names: set[str] = set()
    for path in folder.rglob("*.py"):
        names.add(path.stem if path.stem != "__init__" else path.parent.name)
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


FOLDERS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: str(folder.relative_to(PACKAGE)))
def test_every_folder_says_what_it_is_for(folder: Path) -> None:
    """Its docstring says what it is for, what it may import, and what is public; and the public names are there."""
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text("utf-8"))) or ""
    assert "Imports:" in text
    public = re.findall(r"`(\w+)`", text.partition("Public:")[2])
    assert public or folder.name == "commands"
    assert set(public) <= names_of(folder), sorted(set(public) - names_of(folder))


#
# what an import loads
#


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True, check=False
    )


def test_the_pure_half_loads_no_library() -> None:
    code = """
import sys
import steermoe_local
from steermoe_local import errors, identity
from steermoe_local.maps import counts, expert_map, plots, scores, significance
from steermoe_local.models import hub_models, local_facts
from steermoe_local.pairs import builders, pairs
from steermoe_local.steering import bias_file, presets, steering
loaded = [name for name in sys.modules if name.split(".")[0] in ("llama_cpp", "torch")]
assert not loaded, loaded
assert "steermoe_local.llama.capi" not in sys.modules
if sys.platform == "linux":
    assert "libllama" not in open("/proc/self/maps").read()
steermoe_local.SteeredLlama
assert "llama_cpp" in sys.modules
if sys.platform == "linux":
    maps = open("/proc/self/maps").read()
    assert "libllama" in maps and "steermoe_local/lib" in maps
"""
    done = python(code)
    assert done.returncode == 0, done.stderr


FAKE_VERSION = """
import importlib.metadata as metadata
real = metadata.version
def version(name):
    if name == "llama-cpp-python":
        {action}
    return real(name)
metadata.version = version
from steermoe_local import SteeredLlama
"""


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ('return "0.2.90"', "llama-cpp-python 0.2.90 is installed, but this steermoe-local was built for "),
        ("raise metadata.PackageNotFoundError(name)", "llama-cpp-python is not installed; run "),
    ],
)
def test_another_version_of_llama_cpp(action: str, words: str) -> None:
    done = python(FAKE_VERSION.format(action=action))
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("steermoe_local.errors.VersionError: "), done.stderr
    assert words in last
    assert "CMAKE_ARGS=-DLLAMA_BUILD=OFF" in last
    assert "pip install llama-cpp-python==" in last


def test_llama_cpp_with_other_libraries(tmp_path: Path) -> None:
    """Somebody imported llama_cpp first, and it loaded a libllama that knows no steering."""
    fake = """
import sys, types
package, inner = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp.llama_cpp")
class Library:
    def __getattr__(self, name):
        raise AttributeError(name)
inner._lib = Library()
package.llama_cpp = inner
sys.modules.update({"llama_cpp": package, "llama_cpp.llama_cpp": inner})
from steermoe_local import SteeredLlama
"""
    done = python(fake)
    last = done.stderr.strip().splitlines()[-1]
    assert "VersionError: llama_cpp was imported before steermoe_local" in last
    assert "import steermoe_local first" in last


def test_a_library_of_another_abi() -> None:
    fake = """
import sys, types
package, inner = types.ModuleType("llama_cpp"), types.ModuleType("llama_cpp.llama_cpp")
inner._lib = types.SimpleNamespace(steermoe_abi_version=lambda: 99)
package.llama_cpp = inner
sys.modules.update({"llama_cpp": package, "llama_cpp.llama_cpp": inner})
from steermoe_local import SteeredLlama
"""
    done = python(fake)
    assert "native library has ABI 99" in done.stderr.strip().splitlines()[-1]


def test_the_abi_of_the_header() -> None:
    from steermoe_local.llama import library

    header = (ROOT / "native" / "include" / "steermoe.h").read_text("utf-8")
    assert f"#define STEERMOE_ABI_VERSION {library.ABI_VERSION}\n" in header
    assert library.llama_cpp().llama_cpp._lib.steermoe_abi_version() == library.ABI_VERSION


def test_the_library_path_of_the_user_stays() -> None:
    code = """
import os
from steermoe_local import SteeredLlama
assert os.environ["LLAMA_CPP_LIB_PATH"] == "/somewhere"
"""
    done = python(code, LLAMA_CPP_LIB_PATH="/somewhere")
    assert done.returncode == 0, done.stderr
