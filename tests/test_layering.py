"""Who may know whom (docs: design, "the way of the data"), and what an import loads."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steermoe_local
from tests.conftest import ROOT

PACKAGE = ROOT / "steermoe_local"

# module: the modules of the package that it may import. A new module has to be put in its place here.
FILES = {"errors", "_files", "identity"}
DATA = FILES | {"pairs", "counts", "pair_counts", "scores", "statistics", "expert_map", "bias_file", "model_info"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "_files": {"errors"},
    "_gguf": {"errors", "_files"},
    "_split": set(),
    "_gating": set(),
    "identity": {"errors", "_files"},
    "pairs": {"errors", "_files"},
    "counts": FILES,
    "_npz": {"errors", "_files"},
    "pair_counts": FILES | {"_npz", "counts"},
    "scores": {"errors"},
    "confidence": {"errors"},
    "expert_map": FILES | {"scores", "confidence"},
    "_pickle_machine": {"errors"},
    "_pickle_arrow": {"_pickle_machine"},
    "_pickle_frames": {"errors", "_pickle_machine", "_pickle_arrow"},
    "reference_maps": FILES | {"_pickle_frames", "scores", "expert_map"},
    "exchange": {"errors", "expert_map"},
    "cards": {"errors", "identity", "expert_map"},
    "statistics": {"errors", "scores", "confidence", "expert_map", "pair_counts"},
    "plots": {"errors", "_files", "scores", "statistics", "expert_map"},
    "bias_file": FILES | {"_gguf"},
    "model_info": FILES | {"_gating", "_gguf", "_split"},
    "_free_memory": set(),
    "_toml_edit": set(),
    "config": {"errors", "_files", "_toml_edit"},
    "_cache_shape": {"errors", "_gguf", "model_info"},
    "memory": {"_cache_shape", "_free_memory", "model_info"},
    "controls": {"errors", "identity"},
    "_records": {"errors"},
    "_hub": {"errors"},
    "pair_builders": {"errors", "_files", "pairs"},
    "number_pairs": {"errors", "pairs", "pair_builders"},
    "pair_controls": {"errors", "_files", "pairs", "pair_builders"},
    "pair_check": {"errors", "_files", "pairs", "_rendering"},
    "presets": {"errors", "identity"},
    "embedded": FILES,
    "model_names": {"errors"},
    "_hub_files": {"errors", "_files", "_hub"},
    "hub_models": {"errors", "_files", "_gating", "_gguf", "_hub", "_hub_files", "model_info", "model_names"},
    "shelf": {"errors", "_hub", "embedded", "model_names"},
    "shelf_facts": FILES | {"_split", "expert_map", "hub_models", "model_info", "shelf", "shipped_maps"},
    "shipped_maps": {"errors", "embedded"},
    "steering": FILES | {"bias_file", "expert_map", "presets"},
    "reasoning": set(),
    "answer_routing": {"errors", "expert_map"},
    "chat_file": FILES | {"engine"},
    "_reply": {"bias_file", "expert_map", "engine", "reasoning"},
    "chat": {
        "errors",
        "_files",
        "bias_file",
        "steering",
        "engine",
        "reasoning",
        "answer_routing",
        "chat_file",
        "_reply",
    },
    "prompts": {"errors", "_files", "pairs"},
    "answer_file": {"errors", "_files"},
    "answering": {"errors", "pairs", "bias_file", "_rendering", "model", "engine", "reasoning"},
    "_library": {"errors"},
    "_backends": {"errors", "_library"},
    "_quantize": {"errors", "_library"},
    "_native": {"errors", "_library", "_split"},
    "_tokenizing": {"errors", "_native"},
    "_rendering": {"errors", "pairs", "_native", "_tokenizing"},
    "_grouping": {"_rendering"},
    "_decoding": {"errors", "_native", "_grouping"},
    "_loaded": {"errors", "identity", "_native"},
    "_steps": {"errors", "pairs", "_rendering", "_grouping", "_decoding"},
    "checkpoint": FILES | {"_npz"},
    "recorder": {
        "errors",
        "identity",
        "pairs",
        "counts",
        "checkpoint",
        "_native",
        "_rendering",
        "_grouping",
        "_decoding",
        "_loaded",
        "_steps",
    },
    "model": {"errors", "bias_file", "_native", "_backends"},
    "token_routing": {"errors", "model", "_grouping", "_decoding", "_loaded"},
    "_detokenizer": set(),
    "_sampling": {"errors", "_native"},
    "_context": {"errors", "bias_file", "model", "_native", "_decoding", "_loaded", "_rendering"},
    "_sequences": {"errors", "bias_file", "_context"},
    "_answers": {"errors", "_context", "_detokenizer", "_sampling", "_sequences"},
    "engine": {"errors", "identity", "model", "_answers", "_context", "_rendering", "_sampling", "_sequences"},
    "batch": {"errors", "bias_file", "pairs", "_native", "_rendering", "model"},
    "evaluation": DATA
    | {
        "answer_file",
        "answering",
        "controls",
        "embedded",
        "engine",
        "model",
        "pair_builders",
        "pair_controls",
        "presets",
        "prompts",
        "reasoning",
        "recorder",
        "shipped_maps",
        "steering",
        "token_routing",
        "_gguf",
        "_hub",
        "_quantize",
        "_records",
        "_rendering",
    },
    "server": FILES
    | {"bias_file", "expert_map", "steering", "shipped_maps", "_rendering", "model", "engine", "reasoning"},
}
# What stands above `model`: these know the data and the model, but not the library.
APPLICATIONS = DATA | {"controls", "embedded", "recorder", "model", "batch"}

# Third-party modules that only these parts may import.
RESERVED = {
    "llama_cpp": {"_library", "_rendering", "recorder", "model", "batch", "chat", "server"},
    "ctypes": {"_library", "_backends", "_native", "_rendering", "_decoding", "_sampling", "batch"},
    "gguf": {"_gguf", "bias_file", "model_info", "_cache_shape"},
    "psutil": {"_free_memory"},
    "platformdirs": {"config", "shelf", "shelf_facts", "cli"},
    "click": {"cli"},
    "rich": {"cli"},
    "prompt_toolkit": {"cli"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "pydantic": {"server"},
    "prometheus_client": {"server"},
    "torch": set(),
    "httpx": {"evaluation"},
    "huggingface_hub": {"_hub", "_hub_files", "hub_models"},
    "pyarrow": {"_records"},
    "pickle": set(),
    "pickletools": {"_pickle_machine"},
    "pandas": set(),
}
WITHOUT_NUMPY = {
    "errors",
    "_files",
    "identity",
    "pairs",
    "_library",
    "_backends",
    "_quantize",
    "_native",
    "_rendering",
    "_tokenizing",
    "_loaded",
    "_detokenizer",
    "_sequences",
    "model",
    "embedded",
    "_free_memory",
    "_toml_edit",
    "config",
    "model_names",
    "_hub_files",
    "hub_models",
    "shelf",
    "shelf_facts",
    "shipped_maps",
    "steering",
    "reasoning",
    "chat_file",
    "prompts",
    "answer_file",
    "_records",
    "_hub",
    "pair_builders",
    "number_pairs",
    "pair_controls",
    "pair_check",
    "cli",
}


def modules() -> dict[str, list[Path]]:
    """Each part of the package and its files; a folder is one part."""
    parts: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if name != "__init__":
            parts.setdefault(name, []).append(path)
    return parts


def imports(path: Path) -> tuple[set[str], set[str]]:
    """(parts of the package, other top-level modules) that a file imports, anywhere in it."""
    own: set[str] = set()
    others: set[str] = set()
    depth = len(path.relative_to(PACKAGE).parts)  # dots that lead to the package
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, _, rest = alias.name.partition(".")
                if first == "steermoe_local":
                    own.add(rest.split(".")[0] or "__init__")
                else:
                    others.add(first)
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
            parts = (node.module or "").split(".") if node.module else []
            if node.level == 0 and parts[0] != "steermoe_local":
                others.add(parts[0])
                continue
            parts = parts[1:] if node.level == 0 else parts
            if node.level and node.level < depth:
                continue  # within its own folder
            own |= {parts[0]} if parts else set(names)
    return own, others


PARTS = modules()


@pytest.mark.parametrize("part", PARTS)
def test_the_table(part: str) -> None:
    for path in PARTS[part]:
        own, _ = imports(path)
        own = {name if name in PARTS else "__init__" for name in own} - {part}
        if part == "cli":
            forbidden = own & {"_library", "_native", "_rendering", "_gguf"}
            assert not forbidden, f"{path.name}: the command line may not import {sorted(forbidden)}"
            continue
        allowed = ALLOWED.get(part, APPLICATIONS)
        extra = own - allowed
        assert not extra, f"{path.name} imports {sorted(extra)}; it may know {sorted(allowed)}"


@pytest.mark.parametrize("part", PARTS)
def test_third_party_modules(part: str) -> None:
    for path in PARTS[part]:
        _, others = imports(path)
        for name, allowed in RESERVED.items():
            assert name not in others or part in allowed, f"{path.name} imports {name}"
        assert "numpy" not in others or part not in WITHOUT_NUMPY, f"{path.name} imports numpy"


def test_the_table_names_real_modules() -> None:
    assert set(ALLOWED) <= set(PARTS)
    assert imports(PACKAGE / "recorder.py")[0] >= {"_native", "counts", "pairs"}, "the reader of imports sees nothing"
    assert "llama_cpp" in imports(PACKAGE / "recorder.py")[1]


def test_native_parts() -> None:
    """Steering and recording do not know each other; the bias reader knows no llama.cpp."""
    source = ROOT / "native" / "src"

    def includes(name: str) -> str:
        return "\n".join(
            line
            for path in source.glob(f"{name}.*")
            for line in path.read_text("utf-8").splitlines()
            if "#include" in line
        )

    assert "recorder" not in includes("steermoe-steering")
    assert "steering" not in includes("steermoe-recorder")
    assert "llama" not in includes("steermoe-bias")
    assert "llama" not in includes("steermoe-error")
    everything = "\n".join(path.read_text("utf-8") for path in source.iterdir())
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


@pytest.mark.parametrize("part", [p for p in PARTS if not p.startswith("_") and p != "cli"])
def test_every_module_says_what_is_public(part: str) -> None:
    module = __import__(f"steermoe_local.{part}", fromlist=["__all__"])
    for name in module.__all__:
        assert hasattr(module, name), f"{part}.__all__ names {name}"


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
from steermoe_local import pairs, counts, scores, expert_map, bias_file, model_info, identity, errors
loaded = [name for name in sys.modules if name.split(".")[0] in ("llama_cpp", "torch")]
assert not loaded, loaded
assert "steermoe_local._native" not in sys.modules
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
    assert "VersionError: the native library has ABI 99" in done.stderr.strip().splitlines()[-1]


def test_the_abi_of_the_header() -> None:
    from steermoe_local import _library

    header = (ROOT / "native" / "include" / "steermoe.h").read_text("utf-8")
    assert f"#define STEERMOE_ABI_VERSION {_library.ABI_VERSION}\n" in header
    assert _library.llama_cpp().llama_cpp._lib.steermoe_abi_version() == _library.ABI_VERSION


def test_the_library_path_of_the_user_stays() -> None:
    code = """
import os
from steermoe_local import SteeredLlama
assert os.environ["LLAMA_CPP_LIB_PATH"] == "/somewhere"
"""
    done = python(code, LLAMA_CPP_LIB_PATH="/somewhere")
    assert done.returncode == 0, done.stderr
